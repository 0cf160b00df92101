"""Conditioning and its interpolation, against float64."""

from __future__ import annotations

import pytest
import torch
from common import each

from imagic_lora.core.conditioning import Conditioning, concatenate, interpolate


def conditioning(seed: int, batch: int = 1, pooled: bool = True) -> Conditioning:
    """Random tokens ``[batch, 5, 4]``, with a pooled embedding and sizes as SDXL has them."""
    draw = torch.Generator().manual_seed(seed)
    tokens, vector = torch.randn(batch, 5, 4, generator=draw), torch.randn(batch, 6, generator=draw)
    return Conditioning(tokens, vector if pooled else None, {"sizes": torch.randint(0, 99, (batch, 6), generator=draw)})


def same(a: Conditioning, b: Conditioning) -> bool:
    """Whether two conditionings hold equal tensors under equal names."""
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@each("eta", [0.1, 0.5, 0.7, 1.2, 2.0])
@each("part", ["tokens", "pooled"])
def test_interpolation_is_equation_3_in_float64(eta: float, part: str) -> None:
    """``eta * e_tgt + (1 - eta) * e_opt``, element by element, beyond 1 too."""
    target, optimised = conditioning(0), conditioning(1)
    expected = eta * getattr(target, part).double() + (1 - eta) * getattr(optimised, part).double()
    torch.testing.assert_close(getattr(interpolate(target, optimised, eta), part).double(), expected, rtol=0, atol=1e-6)


@each("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each("eta, end", [(0, 1), (0.0, 1), (1, 0), (1.0, 0)])
def test_the_ends_of_an_interpolation_are_exact(dtype: torch.dtype, eta: float, end: int) -> None:
    """0 is the optimised embedding and 1 the target, bit for bit."""
    pair = [conditioning(seed).to("cpu", dtype) for seed in (0, 1)]
    mixed = interpolate(pair[0], pair[1], eta)
    assert all(torch.equal(mixed.tensors()[part], pair[end].tensors()[part]) for part in ("tokens", "pooled"))


def test_an_interpolation_shares_no_memory_with_its_ends() -> None:
    """Training the optimised embedding further does not move what was interpolated from it."""
    target, optimised = conditioning(0), conditioning(1)
    mixes = [interpolate(target, optimised, eta) for eta in (0, 1)]
    expected = [optimised.tokens.clone(), target.tokens.clone()]
    target.tokens.zero_()
    optimised.tokens.zero_()
    assert all(torch.equal(mix.tokens, kept) for mix, kept in zip(mixes, expected, strict=True))


def test_without_a_pooled_embedding_there_is_none_after_interpolation() -> None:
    """A family without one stays without one."""
    assert interpolate(conditioning(0, pooled=False), conditioning(1, pooled=False), 0.5).pooled is None


@each("eta", [0, 0.5, 1])
def test_extra_inputs_are_the_targets(eta: float) -> None:
    """Sizes are carried from the target, never mixed."""
    target = conditioning(0)
    assert torch.equal(interpolate(target, conditioning(1), eta).extra["sizes"], target.extra["sizes"])


@each("pooled", [True, False])
def test_tensors_and_from_tensors_are_inverse(pooled: bool) -> None:
    """Names and values survive the way to a file and back."""
    made = conditioning(0, pooled=pooled)
    assert set(made.tensors()) == {"tokens", "sizes"} | ({"pooled"} if pooled else set())
    back = Conditioning.from_tensors(made.tensors())
    assert same(back, made)
    assert (back.pooled is None) == (not pooled)
    assert set(back.extra) == {"sizes"}


@each("pooled", [True, False])
def test_a_single_one_is_expanded_by_repeating_it(pooled: bool) -> None:
    """Every sample of the batch has the same conditioning."""
    one = conditioning(0, pooled=pooled)
    assert same(one.expand(3), concatenate([one, one, one]))


def test_a_whole_batch_is_kept_and_another_size_refused() -> None:
    """Three stay three; they cannot become four."""
    three = conditioning(0, batch=3)
    assert same(three.expand(3), three)
    with pytest.raises(RuntimeError, match="expanded size"):
        three.expand(4)


@each("pooled", [True, False])
def test_concatenation_keeps_the_order(pooled: bool) -> None:
    """Each part of the batch is the conditioning it came from."""
    parts = [conditioning(seed, batch=seed + 1, pooled=pooled) for seed in range(3)]
    whole = concatenate(parts).tensors()
    cut = [Conditioning.from_tensors({name: value[a:b] for name, value in whole.items()}) for a, b in ((0, 1), (1, 3), (3, 6))]
    assert all(same(a, b) for a, b in zip(cut, parts, strict=True))


def test_a_dtype_is_for_what_is_optimised_only() -> None:
    """Tokens and pooled change precision, whole-number sizes do not."""
    moved = conditioning(0).to("cpu", torch.float16).tensors()
    assert {name: tensor.dtype for name, tensor in moved.items()} == {
        "tokens": torch.float16,
        "pooled": torch.float16,
        "sizes": torch.int64,
    }


def test_tokens_of_any_rank_with_a_mask() -> None:
    """Several states of a token, as some language models give: broadcast, mixed, stored and read with the mask of the words."""
    made = [Conditioning(torch.rand(1, 5, 3, 4) + k, mask=torch.tensor([[True, True, True, False, False]])) for k in range(2)]
    mixed = interpolate(*made, 0.25)
    torch.testing.assert_close(mixed.tokens, 0.25 * made[0].tokens + 0.75 * made[1].tokens)
    both = concatenate([mixed.expand(2), made[1]])
    assert both.tokens.shape == (3, 5, 3, 4)
    assert both.mask is not None
    assert both.mask.tolist() == [[True, True, True, False, False]] * 3
    again = Conditioning.from_tensors(both.tensors())
    assert torch.equal(again.tokens, both.tokens)
    assert again.mask is not None
    assert torch.equal(again.mask, both.mask)
