"""What a stage came to, kept when a later one fails, and taken up again by the next run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .conditioning import Conditioning


class KeptEmbedding:
    """The outcome of the embedding stage of one adapter, in the store beside it.

    Args:
        store: folder of adapters.
        name: of the adapter.
        inputs: everything that the stage depends on; a file that was kept for other inputs is left alone and not read.
    """

    def __init__(self, store: Path, name: str, inputs: list[object]) -> None:
        self.path = store / f".{name}.embedding.safetensors"
        self.mark = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()

    def save(self, optimised: Conditioning, losses: Tensor) -> None:
        """Writes the optimised embedding and the losses on the way to it."""
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in optimised.tensors().items()}
        save_file({**tensors, "losses": losses.cpu()}, self.path, {"mark": self.mark})

    def load(self, device: torch.device) -> tuple[Conditioning, Tensor] | None:
        """What was kept for these inputs, or None."""
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("mark") != self.mark:
                    return None
                tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except (OSError, SafetensorError):
            return None
        losses = tensors.pop("losses")
        return Conditioning.from_tensors(tensors), losses

    def forget(self) -> None:
        """Removes what was kept for these inputs: the adapter is stored."""
        if self.load(torch.device("cpu")):
            self.path.unlink()
