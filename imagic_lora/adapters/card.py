"""README.md of an adapter."""

from __future__ import annotations

import json

from ..core.config import RunConfig


def card(prompt: str, base: str, config: RunConfig) -> str:
    """``README.md`` of an adapter; text from outside stands in indented blocks, where Markdown means nothing."""
    mode = config.tune.mode
    return "\n".join(
        [
            "# An imagic-lora adapter",
            "",
            f"Made by imagic-lora (Imagic, arXiv 2210.09276), mode {mode}, for this sentence:",
            "",
            f"    {json.dumps(prompt)}",
            "",
            "on this base:",
            "",
            f"    {json.dumps(base)}",
            "",
            "`embeddings.safetensors` holds the embeddings of the sentence (`target.tokens`) and of the photo (`optimised.tokens`).",
            "Interpolate them with eta and give the result as `prompt_embeds`; the weights load with plain diffusers:",
            "`load_lora_weights` on this folder." if mode == "lora" else "`UNet2DConditionModel.from_pretrained` on `unet/`.",
            "`adapter.json` says how it was made.",
            "",
        ]
    )
