"""Random-weight pipelines of a few thousand parameters, saved in diffusers' format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from imagic_lora.bases.loading.known import CRITTERS

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "lcm": LCMScheduler, "pndm": PNDMScheduler}
NOISE = {"steps_offset": 1, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer() -> CLIPTokenizer:
    """A tokenizer of single letters with a maximum length of 16."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=16)


def save_tiny(
    folder: Path,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    scheduler: str = "ddim",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    width: int = 16,
    guided: bool = False,
) -> Path:
    """A Stable Diffusion pipeline for 32x32 images with 4x8x8 latents and layers of at most ``width`` channels; returns its folder.

    Args:
        guided: the U-Net has a guidance embedding, as in latent consistency models.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(width // 2, width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
        **({"time_cond_proj_dim": 12} if guided else {}),
    )
    kind = SCHEDULERS[scheduler]
    options = {"ddim": {"clip_sample": False, "set_alpha_to_one": False}, "pndm": {"skip_prk_steps": True}}.get(scheduler, {})
    declared = kind(**options, **NOISE, prediction_type=prediction_type)
    pipe = StableDiffusionPipeline(
        _vae(),
        text_encoder(words, width),
        words,
        unet,
        declared,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=dtype).save_pretrained(folder, variant=variant)
    return folder


def save_tiny_sdxl(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Path:
    """A Stable Diffusion XL pipeline for 32x32 images: two text encoders of 16 and 24 channels; returns its folder."""
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=40,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=24 + 6 * 6,
    )
    pipe = StableDiffusionXLPipeline(
        _vae(),
        text_encoder(words, 16),
        CLIPTextModelWithProjection(_text_config(words, 24, projection_dim=24, hidden_act="gelu")),
        words,
        words,
        unet,
        EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.to(dtype=dtype).save_pretrained(folder, variant=variant)
    return folder


def _vae(**more) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        **more,
    )


def _text_config(words: CLIPTokenizer, width: int, **more) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **more,
    )


def text_encoder(words: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A CLIP text model of two layers."""
    return CLIPTextModel(_text_config(words, width))


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in letters)], extra_ids=0)


def save_tiny_sd3(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, t5: bool = True, shift: float = 3.0, wide: bool = False
) -> Path:
    """A Stable Diffusion 3.5 pipeline for 32x32 images with 4x8x8 latents, one layer of dual attention and one without.

    Args:
        t5: False saves it without T5.
        wide: whether layers of T5 have rows of 64 values, the block size of 4-bit quantization.
    """
    torch.manual_seed(seed)
    words, texts = tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for parameter in transformer.parameters():  # as initialised, most of the conditioning changes nothing
            parameter.add_(0.1 * torch.randn(parameter.shape))
    config = T5Config(
        vocab_size=len(texts), d_model=48, d_kv=32 if wide else 8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    pipe = StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=shift),
        _vae(shift_factor=0.1),
        CLIPTextModelWithProjection(_text_config(words, 16, projection_dim=16)),
        words,
        CLIPTextModelWithProjection(_text_config(words, 24, projection_dim=24, hidden_act="gelu")),
        words,
        T5EncoderModel(config) if t5 else None,
        texts if t5 else None,
    )
    pipe.to(dtype=dtype).save_pretrained(folder)
    return folder


def save_inpainting(source: Path, folder: Path, scale: float = 1.0) -> Path:
    """An inpainting model made from a text-to-image base in diffusers' format, as such models are; returns its folder.

    Args:
        scale: of the random weights of the new inputs; at 0 they change nothing.
    """
    shutil.copytree(source, folder)
    folder.chmod(0o755)
    index, config = folder / "model_index.json", folder / "unet" / "config.json"
    index.write_text(index.read_text().replace('Pipeline"', 'InpaintPipeline"'))
    unet = json.loads(config.read_text())
    added = unet["in_channels"] + 1
    config.write_text(json.dumps(unet | {"in_channels": unet["in_channels"] + added}))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    first = weights["conv_in.weight"]
    new = scale * torch.randn(len(first), added, *first.shape[2:], generator=torch.Generator().manual_seed(5)) * first.std()
    save_file(weights | {"conv_in.weight": torch.cat([first, new.to(first)], dim=1)}, file)
    return folder


def joint_transformer(seed: int, channels: int, width: int, patch_size: int, num_layers: int) -> Any:
    """A small transformer of Stable Diffusion 3 with random weights, for latents of 8 x 8 and one CLIP text encoder of a width."""
    torch.manual_seed(seed)
    transformer: Any = SD3Transformer2DModel(
        sample_size=8,
        patch_size=patch_size,
        in_channels=channels,
        out_channels=channels,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=16,
        pooled_projection_dim=width,
        pos_embed_max_size=8 // patch_size,
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return transformer


def save_tiny_sd3_clip(folder: Path, others: Path, width: int = 16) -> Path:
    """The transformer and the scheduler of a flow whose VAE and text encoder are those of :func:`save_tiny` in another folder."""
    transformer = joint_transformer(5, channels=4, width=width, patch_size=1, num_layers=2)
    return save_flow(folder, others, transformer, FlowMatchEulerDiscreteScheduler(shift=2.0))


QWEN3_TEMPLATE = (  # as far as a pipeline of text to image runs it
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of single bytes with the special tokens and the chat template of Qwen3."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [*map(chr, printable), *(chr(256 + k) for k in range(len(others)))]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Qwen2Tokenizer(
        vocab={word: k for k, word in enumerate(symbols)}, merges=[], eos_token=special[2], pad_token=special[0], model_max_length=131072,
        additional_special_tokens=special,
    )  # fmt: skip
    words.add_tokens(["<think>", "</think>"])
    words.chat_template = QWEN3_TEMPLATE
    return words


def save_tiny_klein(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, distilled: bool = False, dynamic: bool = True, tied: bool = True
) -> Path:
    """A FLUX.2 klein pipeline for 64x64 images with 16x4x4 latents, one block of two streams and two of one, and 28 layers of Qwen3.

    Args:
        distilled: what its index says.
        dynamic: whether the scheduler shifts its levels by size and steps.
        tied: whether the text encoder shares the weights of its head with its embeddings, as Qwen3-4B does.
    """
    torch.manual_seed(seed)
    words = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=64,  # the block size of 4-bit weights
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            initializer_range=0.5,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        vae.bn.running_mean.copy_(0.1 * torch.randn(16))
        vae.bn.running_var.copy_(0.5 + torch.rand(16))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    pipe = Flux2KleinPipeline(scheduler, vae, text, words, transformer, is_distilled=distilled)
    pipe.to(dtype=dtype).save_pretrained(folder)
    return folder


def save_tiny_critters_dit(folder: Path, num_layers: int = 1) -> Path:
    """The transformer and the scheduler of a small ``critters-dit`` with random weights; its other parts are those of ``critters``."""
    transformer = joint_transformer(6, channels=8, width=128, patch_size=2, num_layers=num_layers)
    return save_flow(folder, CRITTERS, transformer, FlowMatchEulerDiscreteScheduler(shift=1.0))


def save_flow(folder: Path, others: Path, transformer: Any, scheduler: Any) -> Path:
    """A flow whose VAE and text encoder are those of another folder: transformer, scheduler and index alone."""
    none: dict[str, Any] = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    texts: Any = CLIPTextModel.from_pretrained(others / "text_encoder")
    vae: Any = AutoencoderKL.from_pretrained(others / "vae")
    StableDiffusion3Pipeline(transformer, scheduler, vae, texts, tokenizer(), **none).save_config(folder)
    return folder
