"""Writes a base in diffusers' format as a single file in the original layout; the names follow from the structure of the networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def write_single(folder: Path, path: Path, dtype: torch.dtype = torch.float32, metadata: dict[str, str] | None = None) -> Path:
    """Writes the base in a folder as a single file and returns its path."""
    unet, vae = UNet2DConditionModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vae")
    state = unet.state_dict()
    tensors = {f"model.diffusion_model.{new}": state[old] for old, new in unet_names(unet)}
    tensors |= {f"first_stage_model.{name}": value for name, value in vae_names(vae)}
    texts = {
        part: load_file(folder / part / "model.safetensors") for part in ("text_encoder", "text_encoder_2") if (folder / part).is_dir()
    }
    first = "conditioner.embedders.0.transformer" if len(texts) == 2 else "cond_stage_model.transformer"
    tensors |= {f"{first}.text_model.{name}": value for name, value in texts["text_encoder"].items()}
    if len(texts) == 2:
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in _open_clip(texts["text_encoder_2"])}
    tensors |= {"model_ema.decay": torch.ones(()), "betas": torch.zeros(3, dtype=torch.float64)}  # such files contain leftovers of training
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return path


def unet_names(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Each tensor's names in diffusers and in the original layout; blocks are numbered in the order of execution."""
    places = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    count = 1
    for side, blocks in (("input", unet.down_blocks), ("output", unet.up_blocks)):
        kind = "down" if side == "input" else "up"
        for k, block in enumerate(blocks):
            for j in range(len(block.resnets)):
                places[f"{kind}_blocks.{k}.resnets.{j}"] = f"{side}_blocks.{count}.0"
                if attends := hasattr(block, "attentions"):
                    places[f"{kind}_blocks.{k}.attentions.{j}"] = f"{side}_blocks.{count}.1"
                if side == "output" and j == len(block.resnets) - 1 and block.upsamplers:
                    places[f"up_blocks.{k}.upsamplers.0.conv"] = f"output_blocks.{count}.{1 + attends}.conv"
                count += 1
            if side == "input" and block.downsamplers:
                places[f"down_blocks.{k}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
                count += 1
        count = 0
    for name in unet.state_dict():
        place = next(place for place in places if name.startswith(f"{place}."))
        rest = name.removeprefix(f"{place}.")
        if "resnets" in place:
            part, _, end = rest.partition(".")
            rest = f"{_RESNET[part]}.{end}"
        yield name, f"{places[place]}.{rest}"


def vae_names(vae: AutoencoderKL) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a VAE by its name in the original layout."""
    last = len(vae.config.block_out_channels) - 1
    swaps = [("mid_block.attentions.0", "mid.attn_1"), ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2")]
    swaps += [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm")]
    swaps += [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), (".resnets.", ".block.")]
    swaps += [("downsamplers.0", "downsample"), ("upsamplers.0", "upsample")]
    swaps += [(f"down_blocks.{k}.", f"down.{k}.") for k in range(last + 1)]
    swaps += [(f"up_blocks.{k}.", f"up.{last - k}.") for k in range(last + 1)]
    for name, value in vae.state_dict().items():
        attends = "attentions" in name and name.endswith("weight") and value.ndim == 2
        for old, new in swaps:
            name = name.replace(old, new)
        yield name, value[..., None, None] if attends else value


def _open_clip(text: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    text = {name.removeprefix("text_model."): value for name, value in text.items()}
    yield "logit_scale", torch.ones(())
    yield "text_projection", text.pop("text_projection.weight").T
    yield "positional_embedding", text.pop("embeddings.position_embedding.weight")
    yield "token_embedding.weight", text.pop("embeddings.token_embedding.weight")
    for end in ("weight", "bias"):
        yield f"ln_final.{end}", text.pop(f"final_layer_norm.{end}")
        for k in {name.split(".")[2] for name in text if name.startswith("encoder.layers.")}:
            three = [text.pop(f"encoder.layers.{k}.self_attn.{one}_proj.{end}") for one in "qkv"]
            yield f"transformer.resblocks.{k}.attn.in_proj_{end}", torch.cat(three)
    for name, value in text.items():
        _, _, k, rest = name.split(".", 3)
        part, _, end = rest.rpartition(".")
        yield f"transformer.resblocks.{k}.{_BLOCK[part]}.{end}", value
