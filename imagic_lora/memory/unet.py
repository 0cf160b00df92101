"""The U-Net, VAE and text encoder of Stable Diffusion drawn in sizes alone, layer by layer as diffusers runs them. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.errors import ImagicError
from .symbolic import Paper, Sized

_KNOWN = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
_UNKNOWN = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "only_cross_attention",
    "dual_cross_attention",
    "reverse_transformer_layers_per_block",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONV = ("conv1", "conv2")
_REST = (
    "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "time_embedding.cond_proj", "add_embedding.linear_1",
    "add_embedding.linear_2",
)  # fmt: skip
LORA_TARGETS = {"attention": ATTENTION, "attention+conv": (*ATTENTION, *_CONV), "all": (*ATTENTION, *_CONV, *_REST)}
"""Layers by the ends of their names; ``all`` is every linear and convolutional one."""
BLOCK_4BIT = 64  # weights that share a scale in 4 bits


class NotDrawn(ImagicError):
    """A model that cannot be planned without running it."""


@dataclass
class Numbers:
    """How the layers compute and what of them is trained.

    Args:
        width: bytes of an element in the arithmetic.
        weights: bytes of a weight of the denoiser; other than ``width`` means autocast.
        trained: the weights themselves are trained.
        rank: of LoRA layers, 0 for none.
        targets: layers that have them.
        four_bit: linear layers hold half a byte a weight.
        wide_norms: autocast normalises in fp32, as it does on a card.
    """

    width: int
    weights: int
    trained: bool = False
    rank: int = 0
    targets: tuple[str, ...] = ()
    four_bit: bool = False
    wide_norms: bool = True

    @property
    def mixed(self) -> bool:
        """Whether autocast is at work."""
        return self.weights != self.width


@dataclass
class Layers:
    """The layers that the models are made of; what it draws, it counts, so read the counts before the backward pass draws parts again.

    Attributes:
        parameters: of the model so far.
        bytes: of its weights.
        lora: parameters of LoRA layers.
        states, lora_states: bytes of Adam's 8-bit states for either.
        cache: where autocast's cache of cast weights is kept, if it is.
    """

    paper: Paper
    numbers: Numbers
    parameters: int = 0
    bytes: int = 0
    lora: int = 0
    states: int = 0
    lora_states: int = 0
    cache: list[Sized] | None = None

    def _own(self, *sizes: int, four_bit: bool = False) -> list[tuple[int, int]]:
        """Counts parameters; gives the gradients they get."""
        self.parameters += sum(sizes)
        self.states += sum(states_8bit(size) for size in sizes)
        if four_bit:
            self.bytes += sizes[0] // 2 + sizes[0] // BLOCK_4BIT * 4 + sum(sizes[1:]) * self.numbers.weights
        else:
            self.bytes += sum(sizes) * self.numbers.weights
        return [(size, self.numbers.weights) for size in sizes] if self.numbers.trained else []

    def _packs(self, inside: int) -> bool:
        """Whether a linear layer is held in 4 bits (:mod:`imagic_lora.bases.quantization`)."""
        return self.numbers.four_bit and inside % BLOCK_4BIT == 0

    def cast(self, x: Sized, width: int) -> Sized:
        """The same elements in another width."""
        return x if x.width == width else self.paper.op([x], x.count, width)

    def _product(self, x: Sized, out: int, sizes: tuple[int, ...], four_bit: bool = False) -> Sized:
        numbers, width = self.numbers, self.numbers.width
        trained = self._own(*sizes, four_bit=four_bit)
        x = self.cast(x, width)
        kept, scratch = ([x] if trained else []), 0
        if numbers.mixed:  # each use casts its weight, and keeps the cast for the backward pass
            kept.append(self.paper.tensor(sum(sizes), width))
            if self.cache is not None:
                self.cache.append(kept[-1])
            scratch = sum(sizes) * width if trained else 0
        if four_bit:
            scratch = sizes[0] * width
            self.paper.meter.touch(scratch)
        return self.paper.op([x], out, width, kept, trained=trained, scratch=scratch)

    def _adapted(self, x: Sized, result: Sized, down: int, up: int, ranked: int) -> Sized:
        """What PEFT adds to a layer: fp32 matrices on an fp32 copy of the input.

        Args:
            down, up: parameters of the two matrices.
            ranked: elements between them.
        """
        self.lora += down + up
        self.lora_states += states_8bit(down) + states_8bit(up)
        wide = self.cast(x, 4)
        inner = self.paper.op([wide], ranked, 4, [wide], trained=[(down, 4)])
        outer = self.paper.op([inner], result.count, 4, [inner], trained=[(up, 4)])
        scaled = self.paper.op([outer], result.count, 4)
        del outer
        return self.cast(self.paper.op([result, scaled], result.count, 4, passes=result.width == 4), result.width)

    def linear(self, x: Sized, inside: int, outside: int, bias: bool = True, name: str = "") -> Sized:
        """``[.., inside] -> [.., outside]``."""
        rows = x.count // inside
        result = self._product(x, rows * outside, (inside * outside, *([outside] if bias else [])), self._packs(inside))
        rank = self.numbers.rank
        if rank and name in self.numbers.targets:
            return self._adapted(x, result, inside * rank, outside * rank, rows * rank)
        return result

    def conv(self, x: Sized, inside: int, outside: int, kernel: int = 3, shrink: int = 1, name: str = "") -> Sized:
        """``[B, inside, h, w] -> [B, outside, h / shrink, w / shrink]``."""
        pixels = x.count // inside // shrink**2
        result = self._product(x, pixels * outside, (inside * outside * kernel**2, outside))
        rank = self.numbers.rank
        if rank and name in self.numbers.targets:
            return self._adapted(x, result, inside * rank * kernel**2, outside * rank, pixels * rank)
        return result

    def norm(self, x: Sized, channels: int) -> Sized:
        """Group or layer normalisation."""
        trained = self._own(channels, channels)
        x = self.cast(x, 4) if self.numbers.mixed and self.numbers.wide_norms else x
        return self.paper.op([x], x.count, x.width, [x], trained=trained)

    def silu(self, x: Sized) -> Sized:
        """The nonlinearity of the residual blocks."""
        return self.paper.op([x], x.count, x.width, [x])

    def add(self, x: Sized, y: Sized) -> Sized:
        """A residual sum; the wider number wins."""
        return self.paper.op([x, y], x.count, max(x.width, y.width), passes=x.width == y.width)

    def scaled(self, x: Sized) -> Sized:
        """Division by a constant, which diffusers does even where it is one."""
        return self.paper.op([x], x.count, x.width)

    def attend(self, q: Sized, k: Sized, v: Sized) -> Sized:
        """Scaled dot-product attention that holds no matrix of scores (arXiv 2205.14135)."""
        return self.paper.op([q, k, v], q.count, q.width, [q, k, v], keeps_output=True)

    def resnet(self, x: Sized, inside: int, outside: int, times: Sized | None, embedding: int) -> Sized:
        """A residual block.

        Args:
            times: the time embedding, ``[B, embedding]``, where it is told one.
        """
        h = self.norm(x, inside)
        h = self.silu(h)
        h = self.conv(h, inside, outside, name="conv1")
        if times:
            told = self.linear(self.silu(times), embedding, outside, name="time_emb_proj")
            h = self.paper.op([h, told], h.count, h.width, passes=True)
        h = self.norm(h, outside)
        h = self.silu(h)
        h = self.conv(h, outside, outside, name="conv2")
        if inside != outside:
            x = self.conv(x, inside, outside, kernel=1, name="conv_shortcut")
        return self.scaled(self.add(x, h))


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
            raise NotDrawn(
                f"a U-Net with {', '.join(odd)}",
                f"blocks of kind {', '.join(sorted(_KNOWN))} alone, one number for each size",
                "fit it unplanned, with --preset 8gb",
            )

    def forward(self, latents: int, batch: int, tokens: int, tokens_need_grad: bool) -> Sized:
        """One pass.

        Args:
            latents: pixels of one latent picture, ``h * w``.
            tokens: of one conditioning; its pooled embedding needs a gradient where they do.
        """
        c, layers = self.config, self.layers
        channels, per_block = c["block_out_channels"], c["layers_per_block"]
        width, depths = layers.numbers.width, self._depths()
        text = layers.paper.tensor(batch * tokens * c["cross_attention_dim"], width, tokens_need_grad)
        self.times = self._times(batch, tokens_need_grad)
        first = layers.paper.tensor(batch * latents * c["in_channels"], width)
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
                h = layers.paper.op([h, skip], h.count + skip.count, h.width)
                del skip
                h = self._resnet(h, here + extra, outside)
                here = outside
                if kind == "CrossAttnUpBlock2D":
                    h = self._transformer(h, here, text, depths[-1 - k])
            if k + 1 < len(channels):
                h = layers.paper.op([h], h.count * 4, h.width)
                h = layers.conv(h, here, here, name="upsamplers.0.conv")
        came = h  # noqa: F841
        h = layers.silu(layers.norm(h, here))
        return layers.conv(h, here, c["out_channels"], name="conv_out")

    def _depths(self) -> list[int]:
        """Transformer blocks of each level."""
        depths = self.config.get("transformer_layers_per_block") or 1
        return depths if isinstance(depths, list) else [depths] * len(self.config["block_out_channels"])

    def _times(self, batch: int, needs_grad: bool) -> Sized:
        """The embedding of the timestep, and of what else the family is told beside the tokens."""
        c, layers = self.config, self.layers
        here, paper, width = c["block_out_channels"][0], layers.paper, layers.numbers.width
        times = paper.tensor(batch * here, width)
        if told := c.get("time_cond_proj_dim"):
            times = layers.add(
                times, layers.linear(paper.tensor(batch * told, width), told, here, bias=False, name="time_embedding.cond_proj")
            )
        times = self._perceptron(times, here, "time_embedding")
        if c.get("addition_embed_type"):
            wide = c["projection_class_embeddings_input_dim"]
            times = layers.add(times, self._perceptron(paper.tensor(batch * wide, width, needs_grad), wide, "add_embedding"))
        return times

    def _perceptron(self, x: Sized, inside: int, name: str) -> Sized:
        layers, inner = self.layers, 4 * self.config["block_out_channels"][0]
        h = layers.silu(layers.linear(x, inside, inner, name=f"{name}.linear_1"))
        return layers.linear(h, inner, inner, name=f"{name}.linear_2")

    def _part(self, part: Callable[[Sized], Sized], x: Sized) -> Sized:
        return self.layers.paper.checkpoint(part, x) if self.checkpointing else part(x)

    def _resnet(self, x: Sized, inside: int, outside: int) -> Sized:
        embedding = 4 * self.config["block_out_channels"][0]
        return self._part(lambda y: self.layers.resnet(y, inside, outside, self.times, embedding), x)

    def _transformer(self, x: Sized, channels: int, text: Sized, depth: int) -> Sized:
        layers = self.layers
        h = layers.norm(x, channels)
        h = self._projection(h, channels, "proj_in")
        for _ in range(depth):
            h = self._part(lambda y: self._block(y, channels, text), h)
        return layers.add(self._projection(h, channels, "proj_out"), x)

    def _projection(self, h: Sized, channels: int, name: str) -> Sized:
        if self.config.get("use_linear_projection"):
            return self.layers.linear(h, channels, channels, name=name)
        return self.layers.conv(h, channels, channels, kernel=1, name=name)

    def _block(self, h: Sized, channels: int, text: Sized) -> Sized:
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
        gate = layers.paper.op([both], half, both.width, [both])
        product = layers.paper.op([both, gate], half, both.width, [both, gate])
        del both, gate
        return layers.add(layers.linear(product, 4 * channels, channels, name="ff.net.2"), h)

    def _attention(self, x: Sized, channels: int, text: Sized | None, inside: int) -> Sized:
        layers = self.layers
        context = x if text is None else text
        q = layers.linear(x, channels, channels, bias=False, name="to_q")
        k = layers.linear(context, inside, channels, bias=False, name="to_k")
        v = layers.linear(context, inside, channels, bias=False, name="to_v")
        return layers.scaled(layers.linear(layers.attend(q, k, v), channels, channels, name="to_out.0"))


def vae_forward(config: dict[str, Any], layers: Layers, pixels: int, pictures: int, decode: bool) -> None:
    """Half of an ``AutoencoderKL`` in sizes.

    Args:
        pixels: of one picture.
        decode: latents to picture; picture to latents otherwise.
    """
    channels, width = config["block_out_channels"], layers.numbers.width
    latent = config["latent_channels"]
    area = pictures * (pixels // 4 ** (len(channels) - 1) if decode else pixels)
    ends = (latent, 3) if decode else (3, 2 * latent)
    order = [*reversed(channels)] if decode else channels
    if decode:
        layers._own(latent * latent, latent)  # post_quant_conv
    here = order[0]
    h = layers.conv(layers.paper.tensor(area * ends[0], width), ends[0], here)
    if decode:
        h = _middle(layers, h, here)
    for k, outside in enumerate(order):
        came = h  # the caller holds what it gave a block
        for _ in range(config["layers_per_block"] + (1 if decode else 0)):
            h, here = layers.resnet(h, here, outside, None, 0), outside
        if k + 1 < len(order):
            h = layers.paper.op([h], h.count * 4, h.width) if decode else h
            h = layers.conv(h, here, here, shrink=1 if decode else 2)
    came = h  # noqa: F841
    if not decode:
        h = _middle(layers, h, here)
    h = layers.silu(layers.norm(h, here))
    layers.conv(h, here, ends[1])
    if not decode:
        layers._own(4 * latent * latent, 2 * latent)  # quant_conv


def _middle(layers: Layers, h: Sized, channels: int) -> Sized:
    h = layers.resnet(h, channels, channels, None, 0)
    n = layers.norm(h, channels)
    q, k, v = (layers.linear(n, channels, channels) for _ in range(3))
    out = layers.linear(layers.attend(q, k, v), channels, channels)
    del q, k, v, n
    h = layers.scaled(layers.add(out, h))
    return layers.resnet(h, channels, channels, None, 0)


def text_parameters(config: dict[str, Any], projects: bool = False) -> int:
    """Parameters of a ``CLIPTextModel``: token and position embeddings, blocks of attention and MLP with two norms each, a last norm.

    Args:
        projects: it is one ``WithProjection``, of the pooled embedding.
    """
    d, inner = config["hidden_size"], config["intermediate_size"]
    block = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    ends = (config["vocab_size"] + config["max_position_embeddings"]) * d + 2 * d
    return ends + config["num_hidden_layers"] * block + (d * config["projection_dim"] if projects else 0)


def scales_8bit(size: int) -> int:
    """How many fp32 scales a state of Adam8bit has for a tensor: one for every 256 elements, none under 4,096, where it keeps 32 bits."""
    return 0 if size < 4096 else -(-size // 256)


def states_8bit(size: int) -> int:
    """Bytes of Adam8bit's two states for a tensor: a byte and a share of a scale each, or 32 bits."""
    return 2 * (size + 4 * scales_8bit(size)) if scales_8bit(size) else 8 * size
