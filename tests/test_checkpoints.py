"""What a stage came to, kept for the next run: bit-exact, for the same inputs only, and never a reason to fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import same
from safetensors.torch import save_file

from imagic_lora.checkpoints import KeptEmbedding
from imagic_lora.conditioning import Conditioning

CPU = torch.device("cpu")
INPUTS: list[object] = ["0f3a", "a cat", {"steps": 3, "learning_rate": 0.05}, 0, (1, 4, 8, 8), torch.float32, "adam", 1]
LOSSES = torch.tensor([1 / 3, 1e-30, 0.2])


def embedding(pooled: bool = True) -> Conditioning:
    """Numbers of all sizes; tokens that are a view, with a gradient, as a stage may have them."""
    generator = torch.Generator().manual_seed(3)
    tokens = (torch.randn(1, 16, 7, generator=generator) * 10.0 ** torch.arange(-20, 15, 5)).requires_grad_().transpose(1, 2)
    if not pooled:
        return Conditioning(tokens)
    sizes = torch.tensor([[512, 512, 0, 0]])
    return Conditioning(tokens, torch.randn(1, 5, generator=generator), {"sizes": sizes, "scale": torch.tensor([0.1], dtype=torch.float64)})


@pytest.mark.parametrize("pooled", [True, False])
def test_what_is_kept_comes_back(tmp_path: Path, pooled: bool) -> None:
    """Bit for bit and type for type, pooled embedding and extra inputs too, by another object for equal inputs."""
    kept, given = KeptEmbedding(tmp_path, "cat", INPUTS), embedding(pooled)
    assert kept.load(CPU) is None
    kept.save(given, LOSSES)
    found = KeptEmbedding(tmp_path, "cat", list(INPUTS)).load(CPU)
    assert found is not None
    (back, losses), expected = found, given.tensors()
    assert torch.equal(losses, LOSSES)
    assert (back.pooled is None) == (not pooled)
    assert set(back.extra) == set(given.extra)
    assert same(dict(sorted(back.tensors().items())), dict(sorted(expected.items())))
    assert {name: value.dtype for name, value in back.tensors().items()} == {name: value.dtype for name, value in expected.items()}
    assert not any(value.requires_grad for value in back.tensors().values())


def test_it_goes_to_the_device_that_is_asked_for(tmp_path: Path) -> None:
    """The embedding; PyTorch's pretended device stands in for a card."""
    kept = KeptEmbedding(tmp_path, "cat", INPUTS)
    kept.save(embedding(), LOSSES)
    found = kept.load(torch.device("meta"))
    assert found is not None
    assert {value.device.type for value in found[0].tensors().values()} == {"meta"}


@pytest.mark.parametrize("place", range(len(INPUTS)))
def test_other_inputs_find_nothing(tmp_path: Path, place: int) -> None:
    """Any one of them; what is there stays for the inputs that it was kept for, until it is kept anew."""
    kept = KeptEmbedding(tmp_path, "cat", INPUTS)
    kept.save(embedding(), LOSSES)
    changed = ["0f3b", "a dog", {"steps": 3, "learning_rate": 0.06}, 1, (1, 4, 8, 6), torch.bfloat16, "adam8bit", 2]
    other = KeptEmbedding(tmp_path, "cat", [*INPUTS[:place], changed[place], *INPUTS[place + 1 :]])
    assert other.load(CPU) is None
    assert kept.load(CPU) is not None
    other.save(embedding(pooled=False), LOSSES)
    assert kept.load(CPU) is None
    assert other.load(CPU) is not None


def test_the_order_of_names_does_not_matter(tmp_path: Path) -> None:
    """Equal settings are equal inputs, whatever order they were given in."""
    KeptEmbedding(tmp_path, "cat", [{"a": 1, "b": 2}]).save(embedding(), LOSSES)
    assert KeptEmbedding(tmp_path, "cat", [{"b": 2, "a": 1}]).load(CPU) is not None
    assert KeptEmbedding(tmp_path, "cat", [{"a": 2, "b": 1}]).load(CPU) is None


def test_adapters_do_not_share_what_is_kept(tmp_path: Path) -> None:
    """Another name finds nothing, and its leaving takes nothing along."""
    kept, other = (KeptEmbedding(tmp_path, name, INPUTS) for name in ("cat", "dog"))
    kept.save(embedding(), LOSSES)
    assert other.load(CPU) is None
    other.forget()
    assert kept.load(CPU) is not None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_nothing(tmp_path: Path, share: float) -> None:
    """Wherever it was cut off; and it can be kept again."""
    kept = KeptEmbedding(tmp_path, "cat", INPUTS)
    kept.save(embedding(), LOSSES)
    raw = kept.path.read_bytes()
    kept.path.write_bytes(raw[: int(share * len(raw))])
    assert kept.load(CPU) is None
    kept.save(embedding(), LOSSES)
    assert kept.path.read_bytes() == raw


def unmarked(path: Path) -> None:
    """Good tensors without a word about their inputs."""
    save_file({"tokens": torch.ones(1, 2, 3), "losses": LOSSES}, path)


GARBAGE: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("not a tensor " * 100),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "ones": lambda path: path.write_bytes(b"\xff" * 1000),
    "no JSON": lambda path: path.write_bytes((16).to_bytes(8, "little") + b"{" * 16 + bytes(100)),
    "no UTF-8": lambda path: path.write_bytes((4).to_bytes(8, "little") + b'{"\xff"' + bytes(100)),
    "unmarked": unmarked,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("write", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_nothing(tmp_path: Path, write: Callable[[Path], object]) -> None:
    """No exception, whatever lies there."""
    kept = KeptEmbedding(tmp_path, "cat", INPUTS)
    write(kept.path)
    assert kept.load(CPU) is None


def test_forgetting_removes_the_file(tmp_path: Path) -> None:
    """And nothing besides; a second time there is nothing to do."""
    (tmp_path / "other").write_text("stays")
    kept = KeptEmbedding(tmp_path, "cat", INPUTS)
    kept.save(embedding(), LOSSES)
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(2):
        kept.forget()
        assert [path.name for path in tmp_path.iterdir()] == ["other"]
        assert kept.load(CPU) is None


def test_it_holds_no_map_of_the_file(tmp_path: Path) -> None:
    """What was loaded outlives the file, and one that is written over it."""
    kept, given = KeptEmbedding(tmp_path, "cat", INPUTS), embedding()
    kept.save(given, LOSSES)
    found = kept.load(CPU)
    assert found is not None
    kept.path.write_bytes(bytes(kept.path.stat().st_size))
    kept.forget()
    assert torch.equal(found[0].tokens, given.tokens)
    assert torch.equal(found[1], LOSSES)
