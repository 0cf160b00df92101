"""Converts a full adapter to a LoRA adapter: the best low-rank approximation of the weight change of full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases.altered import check_unaltered
from ..bases.base import Base
from ..bases.loading.known import licence_of
from ..core.errors import ImagicError
from ..core.tensors import read, shapes
from .adapter import Adapter
from .atomic import AtomicWriter
from .card import card
from .contents import check_base, weights_record
from .full import full_files
from .lora import attached, save_lora
from .record import CARD, CONVERGENCE, EMBEDDINGS, PREVIEW, PREVIEWS, SOURCE, STEPS, CompressedRecord, Record
from .store import Store

_MAX_RANK = 1024
_CARD = """
This is the adapter `{name}`, mode full, compressed to rank {rank}: {lost} of the norm of its weight change is lost. `preview.png` and
`steps.jsonl` come from the fit of the full adapter.
"""


def check_compression(adapter: Adapter, rank: int) -> None:
    """Raises ImagicError if the adapter is not of mode full, or if the rank is outside [1, 1024]."""
    if not 1 <= rank <= _MAX_RANK:
        raise ImagicError(f"--rank {rank}", f"a whole number from 1 to {_MAX_RANK}", "choose another --rank")
    tune = adapter.record.config.tune
    if tune.mode != "full":
        holds = f"is already a LoRA adapter of rank {tune.rank}" if tune.mode == "lora" else "is of mode embedding and holds no weights"
        got = f"adapter {adapter.name} {holds}"
        raise ImagicError(got, "an adapter of mode full", "use it unchanged, or fit an adapter with --mode full")


def compress(
    adapter: Adapter,
    base: Base,
    rank: int,
    store: Store,
    name: str,
    overwrite: bool = False,
    progress: Callable[[Sequence[str]], Iterable[str]] = lambda names: names,
) -> Adapter:
    """Stores the weight change of a full adapter as LoRA layers of scale 1 on every linear and convolutional layer.

    Photo, target prompt, embeddings and settings are copied. LoRA layers cannot represent the components beyond the rank and the changes
    of biases and normalisations. The record of the new adapter stores the relative norm of this loss.

    Args:
        adapter: of mode full.
        base: the adapter's base in fp32; its weights are bit-equal before and after the call.
        rank: rank of every LoRA layer, 1 to 1024; the matrices are padded with zeros where the weight change has a lower rank.
        store: receives the new adapter.
        name: name of the new adapter.
        overwrite: whether an existing adapter of that name is replaced.
        progress: wraps the list of tensor names; the returned iterable yields each name before its tensor is processed.

    Returns:
        The new adapter.

    Raises:
        ImagicError: as :func:`check_compression`; the adapter belongs to another base or its weights do not fit the base; as
            :meth:`~imagic_lora.adapters.store.Store.write`.
    """
    check_compression(adapter, rank)
    store.check_free(name, overwrite)
    check_base(adapter, base)
    check_unaltered(base)
    base.offload_encoders()
    before = base.denoiser.state_dict()
    after = _tuned(adapter, base)
    config = adapter.record.config
    tune = config.tune.model_copy(update={"mode": "lora", "rank": rank, "alpha": None, "targets": "all"})
    with attached(base, tune, 0) as parameters:
        error = factorise(before, after, _matrix_pairs(parameters), progress)
        changes = {
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "parts": [weights_record(base, "lora")],
            "config": config.model_copy(update={"tune": tune}),
            "compressed": CompressedRecord(name=adapter.name, error=error),
            "suggested": None,  # it was found with the weights before the compression
        }
        record = adapter.record.model_copy(update=changes)
        return store.write(record, lambda writer: _fill(writer, adapter, base, record), overwrite)


def _tuned(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """Reads the tuned weights into host memory, rounded to half precision as stored."""
    path = adapter.listed(full_files(base)[1])
    if shapes(path) != {name: tuple(value.shape) for name, value in base.denoiser.state_dict().items()}:
        raise ImagicError(f"{path} holds tensors of other names or shapes", "those of the base", "fit or copy the adapter again")
    return read(path)


def _matrix_pairs(parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices A and B of every LoRA layer, by the name of the layer."""
    downs = [name for name in parameters if ".lora_A." in name]
    return {name.partition(".lora_A.")[0]: (parameters[name], parameters[name.replace(".lora_A.", ".lora_B.")]) for name in downs}


@torch.no_grad()
def factorise(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    progress: Callable[[Sequence[str]], Iterable[str]] = lambda names: names,
) -> float:
    """Sets the LoRA matrices of every layer to the best approximation of its weight change ``after - before`` at their rank.

    Args:
        before: weights of the denoiser before full fine-tuning, by name.
        after: weights of the denoiser after full fine-tuning, by name.
        pairs: for each layer with a weight ``[out, in, ...]`` the matrices A ``[rank, in, ...]`` and B ``[out, rank, ...]``, which are
            overwritten.
        progress: as for :func:`compress`.

    Returns:
        The Frobenius norm of the lost change divided by that of the whole change. Both include biases, normalisations and layers without
        matrices.
    """
    lost = changed = 0.0
    for name in progress(list(before)):
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
    """Returns two matrices whose product is the best rank-limited approximation of ``change`` in the Frobenius norm (Eckart and Young).

    The truncated singular value decomposition is computed from the eigenvectors of the Gram matrix of the shorter side. This is much
    faster than computing all singular vectors.

    Args:
        change: ``[out, in]``, fp64.
        rank: at least 1.

    Returns:
        Matrices ``[rank, in]`` and ``[out, rank]``. Each contains the square root of the singular values. Rows and columns beyond the
        smaller side of ``change`` are zero.
    """
    short = change if change.shape[0] <= change.shape[1] else change.T
    _, vectors = torch.linalg.eigh(short @ short.T)
    left = vectors.flip(1)[:, :rank]
    right = left.T @ short
    scales = right.norm(dim=1).clamp_min(1e-30).sqrt()
    left, right = left * scales, right / scales[:, None]
    missing = rank - left.shape[1]
    left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    return (right, left) if short is change else (left.T, right.T)


def _fill(writer: AtomicWriter, adapter: Adapter, base: Base, record: Record) -> None:
    """Writes every file of the new adapter except its record."""
    save_lora(base, writer)
    others = [name for name in (SOURCE, PREVIEW, CONVERGENCE, PREVIEWS, record.source.file) if name in adapter.record.files]
    for name in (EMBEDDINGS, STEPS, *others):
        writer.write(name, [adapter.listed(name).read_bytes()])
    assert record.compressed is not None
    note = _CARD.format(name=adapter.name, rank=record.config.tune.rank, lost=f"{record.compressed.error:.1%}")
    page = card(record.prompt, record.base.name, record.config, licence_of(record.base.name, record.base.revision))
    writer.write(CARD, [(page + note).encode()])
