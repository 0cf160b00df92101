"""A full adapter made a LoRA adapter: of what full fine-tuning has changed, what is nearest to it at a low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases.base import Base
from ..core.errors import ImagicError
from ..core.tensors import read, shapes
from .adapter import Adapter
from .atomic import AtomicWriter
from .card import card
from .contents import check_base, weights_record
from .full import full_files
from .lora import attached, save_lora
from .record import CARD, EMBEDDINGS, PREVIEW, SOURCE, STEPS, CompressedRecord, Record
from .store import Store

_MOST = 1024
_CARD = """
It is the adapter `{name}`, mode full, compressed to rank {rank}: {lost} of the norm of what that has changed is lost. `preview.png` and
`steps.jsonl` are from the fit, before it was compressed.
"""


def check_compression(adapter: Adapter, rank: int) -> None:
    """Raises ImagicError for an adapter without full weights, or a rank outside [1, 1024]."""
    if not 1 <= rank <= _MOST:
        raise ImagicError(f"--rank {rank}", f"a whole number from 1 to {_MOST}", "choose another --rank")
    tune = adapter.record.config.tune
    if tune.mode != "full":
        got = f"adapter {adapter.name} is LoRA already, of rank {tune.rank}"
        raise ImagicError(got, "an adapter of mode full", "use it as it is, or fit one with --mode full")


def compress(
    adapter: Adapter,
    base: Base,
    rank: int,
    store: Store,
    name: str,
    overwrite: bool = False,
    shown: Callable[[Sequence[str]], Iterable[str]] = lambda names: names,
) -> Adapter:
    """Stores what a full adapter has changed as LoRA layers of scale 1 on every linear and convolutional layer.

    Photo, sentence, embeddings and settings stay. What LoRA layers cannot say is lost: what is beyond the rank, and what was changed of
    biases and normalisations. The new adapter's record tells how much that is.

    Args:
        base: in fp32; bit-equal to before afterwards.
        rank: of every layer, 1 to 1024; a layer whose change has less is filled up with zeros.
        name: of the new adapter.
        shown: passes the names of the tensors on as they are worked on.

    Raises:
        ImagicError: as :func:`check_compression`; an adapter of another base, or with weights that do not fit it; as :meth:`Store.write`.
    """
    check_compression(adapter, rank)
    store.check_free(name, overwrite)
    check_base(adapter, base)
    base.offload_encoders()
    before = base.denoiser.state_dict()
    after = _tuned(adapter, base)
    config = adapter.record.config
    tune = config.tune.model_copy(update={"mode": "lora", "rank": rank, "alpha": None, "targets": "all"})
    with attached(base, tune, 0) as parameters:
        error = factorise(before, after, _pairs(parameters), shown)
        told = {
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "parts": [weights_record(base, "lora")],
            "config": config.model_copy(update={"tune": tune}),
            "compressed": CompressedRecord(name=adapter.name, error=error),
        }
        record = adapter.record.model_copy(update=told)
        return store.write(record, lambda writer: _fill(writer, adapter, base, record), overwrite)


def _tuned(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """The tuned weights, in host memory, as half precision has them."""
    path = adapter.listed(full_files(base)[1])
    if shapes(path) != {name: tuple(value.shape) for name, value in base.denoiser.state_dict().items()}:
        raise ImagicError(f"{path} holds tensors of other names or shapes", "those of the base", "fit or copy the adapter again")
    return read(path)


def _pairs(parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The two matrices of every layer that has them, by its name."""
    downs = [name for name in parameters if ".lora_A." in name]
    return {name.partition(".lora_A.")[0]: (parameters[name], parameters[name.replace(".lora_A.", ".lora_B.")]) for name in downs}


@torch.no_grad()
def factorise(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    shown: Callable[[Sequence[str]], Iterable[str]] = lambda names: names,
) -> float:
    """Sets the matrices of every layer to what is nearest to the change of its weight.

    Args:
        before, after: the weights of the denoiser.
        pairs: for a layer ``[out, in, ...]`` the matrices ``[rank, in, ...]`` and ``[out, rank, ...]``, which are written to.
        shown: as for :func:`compress`.

    Returns:
        The norm of what is lost over the norm of all that has changed, layers without matrices, biases and normalisations included.
    """
    lost = changed = 0.0
    for name in shown(list(before)):
        change = after[name].to(before[name].device, torch.float64) - before[name].double()
        changed += change.square().sum().item()
        if pair := pairs.get(name.removesuffix(".weight")):
            down, up = pair
            for matrix, value in zip(pair, truncated_svd(change.flatten(1), len(down)), strict=True):
                matrix.copy_(value.reshape(matrix.shape))
            change -= (up.double().flatten(1) @ down.double().flatten(1)).reshape(change.shape)
        lost += change.square().sum().item()
    return math.sqrt(lost / changed) if changed else 0.0


def truncated_svd(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is nearest to ``change`` in the Frobenius norm: its truncated singular value decomposition.

    It comes from the eigenvectors of the Gram matrix of the shorter side, which takes far less time than all singular vectors.

    Args:
        change: ``[out, in]`` fp64.

    Returns:
        ``[rank, in]`` and ``[out, rank]``, singular values shared evenly; zeros where there is no such rank.
    """
    short = change if change.shape[0] <= change.shape[1] else change.T
    _, vectors = torch.linalg.eigh(short @ short.T)
    left = vectors.flip(1)[:, :rank]
    right = left.T @ short
    sizes = right.norm(dim=1).clamp_min(1e-30).sqrt()
    left, right = left * sizes, right / sizes[:, None]
    lacking = rank - left.shape[1]
    left, right = F.pad(left, (0, lacking)), F.pad(right, (0, 0, 0, lacking))
    return (right, left) if short is change else (left.T, right.T)


def _fill(writer: AtomicWriter, adapter: Adapter, base: Base, record: Record) -> None:
    """Every file of the new adapter but its record."""
    save_lora(base, writer)
    for name in (EMBEDDINGS, SOURCE, PREVIEW, STEPS):
        writer.write(name, [adapter.listed(name).read_bytes()])
    assert record.compressed is not None
    more = _CARD.format(name=adapter.name, rank=record.config.tune.rank, lost=f"{record.compressed.error:.1%}")
    writer.write(CARD, [(card(record.prompt, record.base.name, record.config) + more).encode()])
