"""The ``README.md`` of an adapter."""

from __future__ import annotations

import json

from ..core.config import Mode, RunConfig

_WEIGHTS: dict[Mode, str] = {
    "lora": "The weights load with plain diffusers: `load_lora_weights` on this folder.",
    "full": "The weights load with plain diffusers: `from_pretrained` of the denoiser's class on its folder (`unet/` or `transformer/`).",
    "embedding": "There are no weights: the denoiser is that of the base, unchanged.",
}


_PHOTO_DIFFERENCE = (
    "(`optimised.difference`: what is added to the target's tokens, at those of `target.mask` or at all; `imagic-lora export` writes them\n"
    "in full)."
)


def card(prompt: str, base: str, config: RunConfig, licence: str | None) -> str:
    """Returns the content of an adapter's ``README.md``. User text is placed in indented code blocks, where Markdown has no effect.

    Args:
        prompt: the target prompt.
        base: name of the base.
        config: settings of the fit.
        licence: name of the licence of the base; None if it is not known.
    """
    use = [
        "`embeddings.safetensors` holds the embeddings of the target prompt (`target.tokens`) and of the photo",
        _PHOTO_DIFFERENCE if config.embed.stores_difference else "(`optimised.tokens`).",
        "Interpolate them with eta and pass the result as `prompt_embeds`.",
        _WEIGHTS[config.tune.mode],
    ]
    if config.method == "dreambooth":
        use = [_WEIGHTS[config.tune.mode], "Use prompts with the rare word of the prompt above."]
    if config.method == "textual-inversion":
        use = ["The vectors of the new word load with plain diffusers: `load_textual_inversion`. `imagic-lora export` writes how."]
    made = {"imagic": "Imagic, arXiv 2210.09276", "dreambooth": "DreamBooth, arXiv 2208.12242"}
    method = made.get(config.method, "textual inversion, arXiv 2208.01618")
    return "\n".join(
        [
            "# An imagic-lora adapter",
            "",
            f"Made by imagic-lora ({method}), mode {config.tune.mode}, for this target prompt:",
            "",
            f"    {json.dumps(prompt)}",
            "",
            "with this base:",
            "",
            f"    {json.dumps(base)}",
            "",
            *(
                ["The licence of the base also applies to what is made from its weights:", "", f"    {json.dumps(licence)}", ""]
                if licence
                else []
            ),
            *use,
            "`adapter.json` records the settings of the fit.",
            "",
        ]
    )
