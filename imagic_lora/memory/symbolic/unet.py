"""The denoiser of Stable Diffusion on symbolic tensors, in the order of diffusers' own code. No torch here.

A local variable holds its tensor until it is assigned anew or the function returns. These lifetimes are those of diffusers' code, and the
predicted peak depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .layers import Layers, NotPlanned
from .tape import SymbolicTensor

_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
_UNSUPPORTED = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "only_cross_attention",
    "dual_cross_attention",
    "reverse_transformer_layers_per_block",
)


def _check_supported(config: dict[str, Any]) -> None:
    """Raises NotPlanned if the config of a U-Net has a block or a setting that this module does not model."""
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    unsupported = sorted(blocks - _BLOCKS) + [name for name in _UNSUPPORTED if config.get(name)]
    unsupported += [name for name in ("cross_attention_dim", "layers_per_block") if not isinstance(config[name], int)]
    unsupported += [] if config.get("addition_embed_type") in (None, "text_time") else ["addition_embed_type"]
    if unsupported:
        raise NotPlanned(
            f"a U-Net with {', '.join(unsupported)}",
            f"a U-Net with blocks of type {', '.join(sorted(_BLOCKS))} only, and one number for every size",
            "run fit with --preset 8gb, which needs no prediction",
        )


class UNet:
    """A symbolic ``UNet2DConditionModel``.

    Args:
        config: of the U-Net.
        layers: runs and counts the layers.
        checkpointing: residual blocks and transformer blocks are recomputed in the backward pass.

    Raises:
        NotPlanned: the U-Net has a block or a setting that this module does not model.
    """

    def __init__(self, config: dict[str, Any], layers: Layers, checkpointing: bool) -> None:
        _check_supported(config)
        self.config, self.layers, self.checkpointing = config, layers, checkpointing

    def forward(self, latent_pixels: int, batch: int, tokens: int, tokens_need_grad: bool) -> SymbolicTensor:
        """Runs a forward pass.

        Args:
            latent_pixels: ``h * w`` of the latents.
            batch: number of samples.
            tokens: number of tokens of one conditioning.
            tokens_need_grad: the conditioning is trained, its pooled embedding included.

        Returns:
            The prediction, ``[batch, out_channels, h, w]``.
        """
        c, layers = self.config, self.layers
        level_channels, per_block = c["block_out_channels"], c["layers_per_block"]
        itemsize, depths = layers.options.itemsize, self._depths()
        text = layers.tape.tensor(batch * tokens * c["cross_attention_dim"], itemsize, tokens_need_grad)
        self.time_embedding = self._time_embedding(batch, tokens_need_grad)
        latents = layers.tape.tensor(batch * latent_pixels * c["in_channels"], itemsize)
        h = layers.conv(latents, c["in_channels"], level_channels[0], name="conv_in")
        skips, channels = [(h, level_channels[0])], level_channels[0]
        for level, block_type in enumerate(c["down_block_types"]):
            for _ in range(per_block):
                h = self._resnet(h, channels, level_channels[level])
                channels = level_channels[level]
                if block_type == "CrossAttnDownBlock2D":
                    h = self._transformer(h, channels, text, depths[level])
                skips.append((h, channels))
            if level + 1 < len(level_channels):
                h = layers.conv(h, channels, channels, stride=2, name="downsamplers.0.conv")
                skips.append((h, channels))
        h = self._resnet(h, channels, channels)
        h = self._transformer(h, channels, text, depths[-1])
        h = self._resnet(h, channels, channels)
        for level, block_type in enumerate(c["up_block_types"]):
            out_channels, held = level_channels[-1 - level], h  # diffusers' caller holds the input of a block until the block returns
            for _ in range(per_block + 1):
                skip, skip_channels = skips.pop()
                h = layers.tape.op([h, skip], h.numel + skip.numel, h.itemsize)
                del skip
                h = self._resnet(h, channels + skip_channels, out_channels)
                channels = out_channels
                if block_type == "CrossAttnUpBlock2D":
                    h = self._transformer(h, channels, text, depths[-1 - level])
            if level + 1 < len(level_channels):
                h = layers.tape.op([h], h.numel * 4, h.itemsize)
                h = layers.conv(h, channels, channels, name="upsamplers.0.conv")
        held = h  # noqa: F841
        h = layers.silu(layers.norm(h, channels))
        return layers.conv(h, channels, c["out_channels"], name="conv_out")

    @property
    def _time_channels(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.config["block_out_channels"][0]

    def _depths(self) -> list[int]:
        """Number of transformer blocks per transformer, for each level."""
        depths = self.config.get("transformer_layers_per_block") or 1
        return depths if isinstance(depths, list) else [depths] * len(self.config["block_out_channels"])

    def _time_embedding(self, batch: int, needs_grad: bool) -> SymbolicTensor:
        """The embedding of the timestep, plus that of the guidance scale and of the pooled embedding where the family has them.

        Args:
            needs_grad: the pooled embedding is trained.
        """
        c, layers = self.config, self.layers
        channels, tape, itemsize = c["block_out_channels"][0], layers.tape, layers.options.itemsize
        times = tape.tensor(batch * channels, itemsize)
        if guidance := c.get("time_cond_proj_dim"):
            embedded = tape.tensor(batch * guidance, itemsize)
            times = layers.add(times, layers.linear(embedded, guidance, channels, bias=False, name="time_embedding.cond_proj"))
            del embedded
        times = self._perceptron(times, channels, "time_embedding")
        if c.get("addition_embed_type"):
            added = c["projection_class_embeddings_input_dim"]
            times = layers.add(times, self._perceptron(tape.tensor(batch * added, itemsize, needs_grad), added, "add_embedding"))
        return times

    def _perceptron(self, x: SymbolicTensor, in_features: int, name: str) -> SymbolicTensor:
        layers, inner = self.layers, self._time_channels
        h = layers.silu(layers.linear(x, in_features, inner, name=f"{name}.linear_1"))
        return layers.linear(h, inner, inner, name=f"{name}.linear_2")

    def _run(self, part: Callable[[SymbolicTensor], SymbolicTensor], x: SymbolicTensor) -> SymbolicTensor:
        """Runs a part, with gradient checkpointing if it is on."""
        return self.layers.tape.checkpoint(part, x) if self.checkpointing else part(x)

    def _resnet(self, x: SymbolicTensor, in_channels: int, out_channels: int) -> SymbolicTensor:
        return self._run(lambda y: self.layers.resnet(y, in_channels, out_channels, self.time_embedding, self._time_channels), x)

    def _transformer(self, x: SymbolicTensor, channels: int, text: SymbolicTensor, depth: int) -> SymbolicTensor:
        layers = self.layers
        h = layers.norm(x, channels)
        h = self._projection(h, channels, "proj_in")
        for _ in range(depth):
            h = self._run(lambda y: self._block(y, channels, text), h)
        return layers.add(self._projection(h, channels, "proj_out"), x)

    def _projection(self, h: SymbolicTensor, channels: int, name: str) -> SymbolicTensor:
        if self.config.get("use_linear_projection"):
            return self.layers.linear(h, channels, channels, name=name)
        return self.layers.conv(h, channels, channels, kernel=1, name=name)

    def _block(self, h: SymbolicTensor, channels: int, text: SymbolicTensor) -> SymbolicTensor:
        """A transformer block: self-attention, cross-attention to the text, feed-forward with GEGLU (arXiv 2002.05202)."""
        layers, text_channels = self.layers, self.config["cross_attention_dim"]
        n = layers.norm(h, channels)
        out = self._attention(n, channels, None, channels)
        h = layers.add(out, h)
        n = layers.norm(h, channels)
        out = self._attention(n, channels, text, text_channels)
        h = layers.add(out, h)
        n = layers.norm(h, channels)
        both = layers.linear(n, channels, 8 * channels, name="ff.net.0.proj")
        half = both.numel // 2
        gate = layers.tape.op([both], half, both.itemsize, [both])
        product = layers.tape.op([both, gate], half, both.itemsize, [both, gate])
        del both, gate
        return layers.add(layers.linear(product, 4 * channels, channels, name="ff.net.2"), h)

    def _attention(self, x: SymbolicTensor, channels: int, text: SymbolicTensor | None, context_channels: int) -> SymbolicTensor:
        """Multi-head attention with its projections; self-attention if there is no text."""
        layers = self.layers
        context = x if text is None else text
        q = layers.linear(x, channels, channels, bias=False, name="to_q")
        k = layers.linear(context, context_channels, channels, bias=False, name="to_k")
        v = layers.linear(context, context_channels, channels, bias=False, name="to_v")
        return layers.rescale(layers.linear(layers.attention(q, k, v), channels, channels, name="to_out.0"))
