"""Models of random weights that score or caption images, saved in the format of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import tokenizer
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

SIDE = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "do_convert_rgb": True,
}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """A CLIP model of two layers; returns its folder."""
    words = tokenizer()
    torch.manual_seed(0)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = LAYERS | {"vocab_size": len(words), "intermediate_size": 32, "max_position_embeddings": 16} | ends
    vision = LAYERS | {"intermediate_size": 32, "image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"image_processor_type": "CLIPImageProcessor"}))
    return folder


def save_dino(folder: Path) -> Path:
    """A DINOv2 model of two layers; returns its folder."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**LAYERS, mlp_ratio=2, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"image_processor_type": "BitImageProcessor"}))
    return folder


def save_vit(folder: Path) -> Path:
    """A ViT of two layers, as DINO is one; returns its folder."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**LAYERS, intermediate_size=32, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"image_processor_type": "ViTImageProcessor"}))
    return folder


def save_captioner(folder: Path) -> Path:
    """A BLIP of two layers that writes letters; returns its folder."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefghijklmnopqrstuvwxyz"]
    text_tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(words)}, additional_special_tokens=["[DEC]"])
    layers = LAYERS | {"intermediate_size": 32, "projection_dim": 16, "initializer_range": 0.5}
    tokens = {"bos_token_id": 5, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3}
    text = layers | tokens | {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 40}
    vision = layers | {"image_size": SIDE, "patch_size": 8}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), text_tokenizer).save_pretrained(folder)
    return folder
