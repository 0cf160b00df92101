"""The components of a base, made of vetted JSON and safetensors alone.

diffusers' and transformers' own loaders are kept away from its files: they follow what these say to other files, other bases, other
libraries. Here the classes are fixed, and nothing that comes with a base names what is run or read.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel, schedulers
from diffusers.models.modeling_utils import no_init_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..layers import text_parameters
from .files import Files, cast_finite
from .vetting import library_errors, unusable_base

TEXT_ENCODERS: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_PROBE = "a1~\u4e00"  # characters that not every vocabulary has


def model(
    kind: type[UNet2DConditionModel] | type[AutoencoderKL], config: dict[str, Any], files: Files, part: str, dtype: torch.dtype
) -> Any:
    """A U-Net or a VAE, whose weights are exactly those that its config asks for.

    Raises:
        ImagicError: they are not, or cannot be read.
    """
    where = files.place(part)
    with library_errors(where), torch.device("meta"), no_init_weights():
        made: Any = kind.from_config(config)
    state = files.tensors(part)
    made._fix_state_dict_keys_on_load(state)  # names of diffusers' early days, which the VAE of Stable Diffusion 1.5 has
    _same({name: value.shape for name, value in made.state_dict().items()}, {name: value.shape for name, value in state.items()}, where)
    made.load_state_dict(cast_finite(state, dtype, where), assign=True)
    if any(one.is_meta for one in made.buffers()):
        raise unusable_base(f"{where} has parts that no file holds", "a U-Net or VAE of Stable Diffusion")
    return made


def _same(asked: dict[str, torch.Size], held: dict[str, torch.Size], where: Path) -> None:
    missing, extra = sorted(asked.keys() - held.keys()), sorted(held.keys() - asked.keys())
    shapes = [name for name in asked if name in held and asked[name] != held[name]]
    for names, what in ((missing, "are missing"), (extra, "are not in its config"), (shapes, "are not of the shape in its config")):
        if names:
            raise unusable_base(
                f"{len(names)} tensors of {where} {what}, {names[0][:80]!r} among them", "the weights that the config describes"
            )


def text_encoder(config: dict[str, Any], files: Files, part: str, dtype: torch.dtype) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder; transformers is given the weights and no file.

    Raises:
        ImagicError: as :func:`model`.
    """
    where, state = files.place(part), files.tensors(part)
    held, asked = sum(value.numel() for value in state.values()), text_parameters(config, projects=part == "text_encoder_2")
    if held != asked:
        raise unusable_base(f"{where} holds {held:,} weights", f"the {asked:,} that its config describes")
    with library_errors(where):
        loaded: Any = TEXT_ENCODERS[part].from_pretrained(
            None, config=CLIPTextConfig(**config), state_dict=cast_finite(state, dtype, where), dtype=dtype, output_loading_info=True
        )
    made, told = loaded
    if any(told.values()):
        odd = next(name for names in told.values() for name in names)
        raise unusable_base(
            f"the tensors of {where} are not those of a CLIP text encoder: {str(odd)[:80]!r}", "the weights that the config describes"
        )
    return made


def tokenizer(text: dict[str, Any], files: Files, part: str) -> CLIPTokenizer:
    """The tokenizer, read from a copy that holds what was vetted and nothing else.

    Args:
        text: config of the text encoder, which it has to fit.

    Raises:
        ImagicError: it cannot be read, or gives what the text encoder cannot take.
    """
    where = files.place(part)
    with TemporaryDirectory() as copy, library_errors(where):
        for name, content in files.tokenizer(part).items():
            Path(copy, name).write_text(content, encoding="utf-8")
        made = CLIPTokenizer.from_pretrained(copy, local_files_only=True)
        if (length := made.model_max_length) < text["max_position_embeddings"]:
            raise unusable_base(f"{where} reads {length} tokens", f"the {text['max_position_embeddings']} that the text encoder takes")
        length = made.model_max_length = text["max_position_embeddings"]
        ids = made(_PROBE, padding="max_length", max_length=length, truncation=True).input_ids
        highest = max(made.get_vocab().values())
    if len(ids) != length or length < 3 or ids[0] != made.bos_token_id:
        raise unusable_base(f"{where} reads {length} tokens, the first of them {ids[:1]}", "a tokenizer of CLIP")
    if highest >= text["vocab_size"]:
        raise unusable_base(f"{where} has a token {highest}", f"numbers below the {text['vocab_size']} that the text encoder knows")
    return made


def scheduler(config: dict[str, Any], files: Files, few_steps: int | None = None) -> Any:
    """The scheduler of the kind that its config names, which has been seen to make a schedule.

    Raises:
        ImagicError: diffusers has none of that name, or the config is none of it.
    """
    where, name = files.place("scheduler"), config.get("_class_name")
    with library_errors(where):
        kind: Any = getattr(schedulers, name, None) if isinstance(name, str) else None
        if not _is_scheduler(kind):
            raise unusable_base(f"{where} has a scheduler {reprlib.repr(name)}", "one of diffusers whose libraries are installed")
        if _is_other_process(str(name), kind, config):
            raise unusable_base(f"{where} has a scheduler {name} that noises by another rule than DDPM's", "one of Stable Diffusion")
        tried = kind.from_config(config)
        tried.set_timesteps(min(10, tried.config.num_train_timesteps))
        distilled_timesteps(tried, few_steps)
        training: Any = DDPMScheduler.from_config(dict(tried.config))
        kept = training.alphas_cumprod
        if len(kept) != tried.config.num_train_timesteps or not bool(((kept >= 0) & (kept <= 1)).all()):
            raise unusable_base(f"{where} has betas that make no noise", "betas between 0 and 1, one for each timestep")
        return kind.from_config(config)


def distilled_timesteps(scheduler: Any, few_steps: int | None) -> torch.Tensor | None:
    """The timesteps that a distilled base samples at, ascending; None for one that samples at any.

    A consistency sampler takes its few from those that its base was distilled at, which are all given.
    """
    if few_steps is None:
        return None
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(copy.config.get("original_inference_steps", few_steps))
    return copy.timesteps.round().long().sort().values


def _is_other_process(name: str, kind: Any, config: dict[str, Any]) -> bool:
    """Whether a base was made with other noise than is trained with here: EDM's (arXiv 2206.00364), a flow's."""
    odd = name.startswith(("EDM", "FlowMatch")) or config.get("timestep_type", "discrete") != "discrete" or config.get("use_flow_sigmas")
    return bool(odd) or not hasattr(kind, "add_noise")


def _is_scheduler(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)
