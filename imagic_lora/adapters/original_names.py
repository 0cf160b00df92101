"""The names of SDXL's U-Net layers in Stability's code, which kohya's layout has."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..core.errors import ImagicError

_LAYER = re.compile(
    r"(?P<side>down_blocks|mid_block|up_blocks)(\.(?P<level>[0-9]+))?"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>[0-9]+)\.(?P<rest>.+)"
)
_INSIDE = {
    "resnets": {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
    "downsamplers": {"conv": "op"},
    "upsamplers": {"conv": "conv"},
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """Maps the names of SDXL's U-Net layers in diffusers to the names in Stability's own code.

    Stability's code numbers all blocks consecutively, where diffusers groups them by level. The input blocks are the first convolution,
    then for each level its residual blocks and its downsampler. The output blocks are the residual blocks of each level, one more than on
    the input side. A block contains its residual layers, then its attention. The last output block of a level also contains the upsampler.

    Args:
        layers: names in diffusers. They must include layers of every attention, from which the number of blocks per level is derived.

    Returns:
        Stability's name for each name in diffusers.

    Raises:
        ImagicError: a layer is not part of such a U-Net.
    """
    matches = {layer: _LAYER.fullmatch(layer) for layer in layers}
    ups = [match for match in matches.values() if match and match["side"] == "up_blocks" and match["kind"] in ("resnets", "attentions")]
    per_level = 1 + max((int(match["index"]) for match in ups), default=0)
    attended = {match["level"] for match in ups if match["kind"] == "attentions"}
    names: dict[str, str] = {}
    for layer, match in matches.items():
        if match is None:
            name = _OUTSIDE.get(layer)
        else:
            rest = match["rest"] if match["kind"] == "attentions" else _INSIDE[match["kind"]].get(match["rest"])
            name = rest and f"{_block(match, per_level, match['level'] in attended)}.{rest}"
        if name is None:
            raise ImagicError(f"a LoRA layer on {layer[:80]!r}", "a layer of SDXL's U-Net", "use --format diffusers")
        names[layer] = name
    return names


def _block(match: re.Match[str], per_level: int, attended: bool) -> str:
    """Returns the block of a layer in Stability's code and its position in the block, separated by a dot.

    Args:
        match: of ``_LAYER`` with the layer's name in diffusers.
        per_level: number of output blocks per level.
        attended: whether the layer's level has attention.
    """
    first, index, place = int(match["level"] or 0) * per_level, int(match["index"]), int(match["kind"] == "attentions")
    if match["side"] == "mid_block":
        return f"middle_block.{2 * index + place}"
    if match["kind"] == "downsamplers":
        return f"input_blocks.{first + per_level}.0"
    if match["kind"] == "upsamplers":
        return f"output_blocks.{first + per_level - 1}.{1 + attended}"
    return f"input_blocks.{1 + first + index}.{place}" if match["side"] == "down_blocks" else f"output_blocks.{first + index}.{place}"
