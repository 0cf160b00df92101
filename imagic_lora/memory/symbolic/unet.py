"""The U-Net, VAE and text encoder of Stable Diffusion drawn in sizes alone, layer by layer as diffusers runs them. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .layers import Layers, NotPlanned
from .tape import SymbolicTensor

_KNOWN = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
_UNKNOWN = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "only_cross_attention",
    "dual_cross_attention",
    "reverse_transformer_layers_per_block",
)


class UNet:
    """``UNet2DConditionModel`` in sizes.

    Args:
        config: its own.
        checkpointing: residual blocks and transformer blocks are made again in the backward pass.

    Raises:
        NotDrawn: something in it is not drawn here.
    """

    def __init__(self, config: dict[str, Any], layers: Layers, checkpointing: bool) -> None:
        self.config, self.layers, self.checkpointing = config, layers, checkpointing
        found = {*config["down_block_types"], *config["up_block_types"]}
        odd = sorted(found - _KNOWN) + [name for name in _UNKNOWN if config.get(name)]
        odd += [name for name in ("cross_attention_dim", "layers_per_block") if not isinstance(config[name], int)]
        odd += [] if config.get("addition_embed_type") in (None, "text_time") else ["addition_embed_type"]
        if odd:
            raise NotPlanned(
                f"a U-Net with {', '.join(odd)}",
                f"blocks of kind {', '.join(sorted(_KNOWN))} alone, one number for each size",
                "fit it unplanned, with --preset 8gb",
            )

    def forward(self, latents: int, batch: int, tokens: int, tokens_need_grad: bool) -> SymbolicTensor:
        """One pass.

        Args:
            latents: pixels of one latent picture, ``h * w``.
            tokens: of one conditioning; its pooled embedding needs a gradient where they do.
        """
        c, layers = self.config, self.layers
        channels, per_block = c["block_out_channels"], c["layers_per_block"]
        width, depths = layers.options.width, self._depths()
        text = layers.tape.tensor(batch * tokens * c["cross_attention_dim"], width, tokens_need_grad)
        self.times = self._times(batch, tokens_need_grad)
        first = layers.tape.tensor(batch * latents * c["in_channels"], width)
        h = layers.conv(first, c["in_channels"], channels[0], name="conv_in")
        skips, here = [(h, channels[0])], channels[0]
        for k, kind in enumerate(c["down_block_types"]):
            for _ in range(per_block):
                h = self._resnet(h, here, channels[k])
                here = channels[k]
                if kind == "CrossAttnDownBlock2D":
                    h = self._transformer(h, here, text, depths[k])
                skips.append((h, here))
            if k + 1 < len(channels):
                h = layers.conv(h, here, here, shrink=2, name="downsamplers.0.conv")
                skips.append((h, here))
        h = self._resnet(h, here, here)
        h = self._transformer(h, here, text, depths[-1])
        h = self._resnet(h, here, here)
        for k, kind in enumerate(c["up_block_types"]):
            outside, came = channels[-1 - k], h  # the caller holds what it gave a block
            for _ in range(per_block + 1):
                skip, extra = skips.pop()
                h = layers.tape.op([h, skip], h.count + skip.count, h.width)
                del skip
                h = self._resnet(h, here + extra, outside)
                here = outside
                if kind == "CrossAttnUpBlock2D":
                    h = self._transformer(h, here, text, depths[-1 - k])
            if k + 1 < len(channels):
                h = layers.tape.op([h], h.count * 4, h.width)
                h = layers.conv(h, here, here, name="upsamplers.0.conv")
        came = h  # noqa: F841
        h = layers.silu(layers.norm(h, here))
        return layers.conv(h, here, c["out_channels"], name="conv_out")

    def _depths(self) -> list[int]:
        """Transformer blocks of each level."""
        depths = self.config.get("transformer_layers_per_block") or 1
        return depths if isinstance(depths, list) else [depths] * len(self.config["block_out_channels"])

    def _times(self, batch: int, needs_grad: bool) -> SymbolicTensor:
        """The embedding of the timestep, and of what else the family is told beside the tokens."""
        c, layers = self.config, self.layers
        here, tape, width = c["block_out_channels"][0], layers.tape, layers.options.width
        times = tape.tensor(batch * here, width)
        if told := c.get("time_cond_proj_dim"):
            times = layers.add(
                times, layers.linear(tape.tensor(batch * told, width), told, here, bias=False, name="time_embedding.cond_proj")
            )
        times = self._perceptron(times, here, "time_embedding")
        if c.get("addition_embed_type"):
            wide = c["projection_class_embeddings_input_dim"]
            times = layers.add(times, self._perceptron(tape.tensor(batch * wide, width, needs_grad), wide, "add_embedding"))
        return times

    def _perceptron(self, x: SymbolicTensor, inside: int, name: str) -> SymbolicTensor:
        layers, inner = self.layers, 4 * self.config["block_out_channels"][0]
        h = layers.silu(layers.linear(x, inside, inner, name=f"{name}.linear_1"))
        return layers.linear(h, inner, inner, name=f"{name}.linear_2")

    def _part(self, part: Callable[[SymbolicTensor], SymbolicTensor], x: SymbolicTensor) -> SymbolicTensor:
        return self.layers.tape.checkpoint(part, x) if self.checkpointing else part(x)

    def _resnet(self, x: SymbolicTensor, inside: int, outside: int) -> SymbolicTensor:
        embedding = 4 * self.config["block_out_channels"][0]
        return self._part(lambda y: self.layers.resnet(y, inside, outside, self.times, embedding), x)

    def _transformer(self, x: SymbolicTensor, channels: int, text: SymbolicTensor, depth: int) -> SymbolicTensor:
        layers = self.layers
        h = layers.norm(x, channels)
        h = self._projection(h, channels, "proj_in")
        for _ in range(depth):
            h = self._part(lambda y: self._block(y, channels, text), h)
        return layers.add(self._projection(h, channels, "proj_out"), x)

    def _projection(self, h: SymbolicTensor, channels: int, name: str) -> SymbolicTensor:
        if self.config.get("use_linear_projection"):
            return self.layers.linear(h, channels, channels, name=name)
        return self.layers.conv(h, channels, channels, kernel=1, name=name)

    def _block(self, h: SymbolicTensor, channels: int, text: SymbolicTensor) -> SymbolicTensor:
        """A transformer block: self-attention, attention to the text, feed-forward with GEGLU (arXiv 2002.05202).

        ``n`` and ``out`` live on until they are made anew, as in diffusers' code.
        """
        layers, inside = self.layers, self.config["cross_attention_dim"]
        n = layers.norm(h, channels)
        out = self._attention(n, channels, None, channels)
        h = layers.add(out, h)
        n = layers.norm(h, channels)
        out = self._attention(n, channels, text, inside)
        h = layers.add(out, h)
        n = layers.norm(h, channels)
        both = layers.linear(n, channels, 8 * channels, name="ff.net.0.proj")
        half = both.count // 2
        gate = layers.tape.op([both], half, both.width, [both])
        product = layers.tape.op([both, gate], half, both.width, [both, gate])
        del both, gate
        return layers.add(layers.linear(product, 4 * channels, channels, name="ff.net.2"), h)

    def _attention(self, x: SymbolicTensor, channels: int, text: SymbolicTensor | None, inside: int) -> SymbolicTensor:
        layers = self.layers
        context = x if text is None else text
        q = layers.linear(x, channels, channels, bias=False, name="to_q")
        k = layers.linear(context, inside, channels, bias=False, name="to_k")
        v = layers.linear(context, inside, channels, bias=False, name="to_v")
        return layers.scaled(layers.linear(layers.attend(q, k, v), channels, channels, name="to_out.0"))
