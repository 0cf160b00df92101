"""Full adapters compressed to LoRA adapters: the best approximation of their rank, with the recorded error, used like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import PROMPT, array, each, opened, output, same, tiny_config, weights
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_sdxl
from torch import Tensor, nn

import imagic_lora.cli.app as cli
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.compress import compress, factorise, truncated_svd
from imagic_lora.adapters.contents import applied
from imagic_lora.adapters.full import WEIGHTS
from imagic_lora.adapters.lora import LORA_FILE
from imagic_lora.adapters.record import CARD, EMBEDDINGS, RECORD, SOURCE, BaseRecord
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.tensors import safetensors_pieces
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result

FULL_FILE = f"unet/{WEIGHTS}"
Fitted = Callable[..., Adapter]
State = dict[str, Tensor]
Forge = Callable[..., Adapter]


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of fp16 weights, so that storing a full adapter rounds nothing that was not trained."""
    return save_tiny(tmp_path_factory.mktemp("halved") / "base", dtype=torch.float16)


@pytest.fixture
def forge(tmp_path: Path, fitted: Fitted) -> Forge:
    """Gives a full adapter of a base whose weights are the base's, changed."""

    def make(base: Base, change: Callable[[State], Any]) -> Adapter:
        real = fitted("full")
        state = {name: value.half() for name, value in weights(base.denoiser).items()}
        change(state)
        record = real.record.model_copy(
            update={"name": "forged", "base": BaseRecord(name=base.name, revision=None, fingerprint=base.fingerprint)}
        )

        def fill(writer: Any) -> None:
            for name in real.record.files:
                content = safetensors_pieces(state) if name == FULL_FILE else [(real.folder / name).read_bytes()]
                writer.write(name, content)

        return Store(tmp_path / "forged").write(record, fill, overwrite=True)

    return make


def layers(base: Base) -> set[str]:
    """Names of all linear and convolutional layers."""
    return {name for name, module in base.denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def adapted(adapter: Adapter) -> set[str]:
    """Names of the layers that a LoRA adapter has matrices for."""
    return {name.removeprefix("unet.").partition(".lora_")[0] for name in load_file(adapter.folder / LORA_FILE)}


def shaken(state: State) -> None:
    """Changes the weights of all layers, and nothing else, by what half precision can hold."""
    generator = torch.Generator().manual_seed(3)
    for name, value in state.items():
        if name.endswith(".weight") and value.ndim > 1:
            value += (0.2 * torch.randn(value.shape, generator=generator)).half()


def recorded_error(adapter: Adapter) -> float:
    assert adapter.record.compressed is not None
    return adapter.record.compressed.error


def independent_error(before: State, after: State, names: set[str], rank: int) -> float:
    """By numpy's singular values: those beyond the rank are lost, and all of what is no layer's weight."""
    lost = changed = 0.0
    for name, old in before.items():
        change = after[name].numpy().astype(np.float64) - old.numpy().astype(np.float64)
        flat = change.reshape(len(change), -1)
        squares = np.square(np.linalg.svd(flat, compute_uv=False))
        changed += squares.sum()
        lost += squares[rank:].sum() if name.removesuffix(".weight") in names else squares.sum()
    return float(np.sqrt(lost / changed))


# The decomposition


@each("rank", [1, 3, 8, 12])
@each("shape", [(8, 20), (20, 8), (9, 9)])
def test_no_matrices_of_that_rank_come_nearer(shape: tuple[int, int], rank: int) -> None:
    """The product is the truncated singular value decomposition (Eckart and Young), by PyTorch's own in fp64; beyond it there are zeros."""
    change = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    down, up = truncated_svd(change, rank)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    assert torch.allclose(up @ down, best, rtol=0, atol=1e-12)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-9, atol=0)
    assert not down[min(shape) :].any()
    assert not up[:, min(shape) :].any()


def test_a_change_of_lower_rank_leaves_nothing_behind() -> None:
    """And no numbers that are not finite, even where nothing has changed."""
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(12, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, 30, generator=generator, dtype=torch.float64)
    for change in (thin, torch.zeros_like(thin)):
        down, up = truncated_svd(change, 5)
        assert torch.allclose((up.float() @ down.float()).double(), change, rtol=0, atol=1e-5)
        assert down.float().isfinite().all()
        assert up.float().isfinite().all()


def test_what_no_layer_can_take_is_lost() -> None:
    """Half of the squares lies in a weight without matrices, a bias and a norm; the other half is of rank 1."""
    one, more = torch.ones(4, 4), torch.zeros(4, 4)
    more[0, 0] = 8**0.5
    before: State = {
        name: torch.zeros_like(value) for name, value in {"a.weight": one, "b.weight": one, "a.bias": one[0], "n": one[0]}.items()
    }
    after = {"a.weight": one, "b.weight": more, "a.bias": one[0], "n": one[0]}
    down, up = torch.full((1, 4), 9.0), torch.full((4, 1), 9.0)
    assert factorise(before, after, {"a": (down, up)}) == pytest.approx(0.5**0.5)
    assert torch.allclose(up @ down, one)


# A whole adapter


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_recorded_error_is_the_error(folder: Path, fitted: Fitted, tmp_path: Path, rank: int) -> None:
    """As computed from the files alone, without biases and normalisations in what is kept; each layer is the best of its rank."""
    full, base = fitted("full"), opened(folder)
    before, after = weights(base.denoiser), {name: value.float() for name, value in load_file(full.folder / FULL_FILE).items()}
    made = compress(full, base, rank, Store(tmp_path), "small")
    expected = independent_error(before, after, layers(base), rank)
    assert recorded_error(made) == pytest.approx(expected, rel=1e-6)
    assert 0.01 < expected < 1
    found = load_file(made.folder / LORA_FILE)
    assert adapted(made) == layers(base)
    for layer in layers(base):
        down, up = (found[f"unet.{layer}.lora_{matrix}.weight"].double().flatten(1) for matrix in "AB")
        change = (after[f"{layer}.weight"].double() - before[f"{layer}.weight"].double()).flatten(1)
        tail = torch.linalg.svdvals(change)[rank:].norm()
        assert torch.allclose((change - up @ down).norm(), tail, rtol=1e-5, atol=1e-7)


def test_with_all_ranks_it_is_the_full_adapter(halved: Path, forge: Forge, tmp_path: Path) -> None:
    """Where only weights of layers were changed: the same output, and next to nothing lost."""
    base = opened(halved)
    full = forge(base, shaken)
    made = compress(full, base, 200, Store(tmp_path), "whole")
    assert recorded_error(made) < 1e-6
    bare = output(base)
    with applied(full, base):
        expected = output(base)
    with applied(made, base):
        found = output(base)
    assert torch.allclose(found, expected, rtol=0, atol=2e-5)
    assert (expected - bare).abs().max() > 0.1


def test_an_adapter_that_changes_nothing_loses_nothing(halved: Path, forge: Forge, tmp_path: Path) -> None:
    """0 of 0, and the base's own output."""
    base = opened(halved)
    made = compress(forge(base, lambda _: None), base, 2, Store(tmp_path), "nothing")
    expected = output(base)
    with applied(made, base):
        assert torch.equal(output(base), expected)
    assert recorded_error(made) == 0


def test_the_rest_is_copied_and_the_record_has_the_error(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """Embeddings and photo byte for byte, target prompt, base and settings; the mode, the rank and the loss are its own. Fits have none."""
    full = fitted("full")
    made = Store(tmp_path).read(compress(full, opened(folder), 3, Store(tmp_path), "small").name)
    for name in (EMBEDDINGS, SOURCE):
        assert (made.folder / name).read_bytes() == (full.folder / name).read_bytes()
    old, new = (json.loads((one.folder / RECORD).read_text()) for one in (full, made))
    assert {key for key in new if new[key] != old.get(key)} <= {"name", "created", "parts", "config", "compressed", "files", "sha256"}
    assert new["compressed"] == {"name": full.name, "error": recorded_error(made)}
    assert "compressed" not in old
    tune = old["config"]["tune"] | {"mode": "lora", "rank": 3, "alpha": None, "targets": "all"}
    assert new["config"] == old["config"] | {"tune": tune}
    card = (made.folder / CARD).read_text()
    assert "mode lora" in card
    assert f"the adapter `{full.name}`, mode full, compressed to rank 3: {recorded_error(made):.1%}" in " ".join(card.split())
    assert made.size < full.size


def test_it_is_edited_like_any_other(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """The picture is the nearer to the full adapter's the higher the rank; the base is as before."""
    base, config = opened(folder), EditConfig(steps=2, guidance_scale=3.0)
    before = weights(base.denoiser)
    made = [compress(fitted("full"), base, rank, Store(tmp_path), f"rank-{rank}") for rank in (2, 16)]
    assert same(weights(base.denoiser), before)
    editor = Editor(base)
    full, low, high = (array(next(editor.edit(one, [0.6], [5], config)).image) for one in (fitted("full"), *made))
    editor.close()
    assert same(weights(base.denoiser), before)
    assert 0 < np.abs(high - full).mean() < 0.5 * np.abs(low - full).mean()


def test_plain_diffusers_loads_it(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """load_lora_weights on the adapter's folder gives the very output it has here."""
    base = opened(folder)
    made = compress(fitted("full"), base, 4, Store(tmp_path), "small")
    with applied(made, base):
        expected = output(base)
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(made.folder)
    base._denoiser = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(output(base), expected)


@pytest.mark.slow
def test_sdxl_is_compressed_too(photo_file: Path, tmp_path: Path) -> None:
    """Every layer of its U-Net, the embedding of the size ids included."""
    folder = save_tiny_sdxl(tmp_path / "base")
    full = result(fit(photo_file, PROMPT, tiny_config(folder, "full"), Store(tmp_path), "full"))
    assert full is not None
    base = opened(folder)
    before, after = weights(base.denoiser), {name: value.float() for name, value in load_file(full.folder / FULL_FILE).items()}
    made = compress(full, base, 4, Store(tmp_path), "small")
    assert recorded_error(made) == pytest.approx(independent_error(before, after, layers(base), 4), rel=1e-6)
    assert adapted(made) == layers(base)
    assert "add_embedding.linear_1" in layers(base)
    (edit,) = Editor(base).edit(made, [0.6], [5], EditConfig(steps=2))
    assert edit.image.size == full.record.source.size
    assert (made.folder / "photo.png").read_bytes() == photo_file.read_bytes()


# What is refused


def refused(adapter: Adapter, base: Base, rank: int, store: Store, name: str, match: str) -> None:
    """Sees that nothing is stored and the base is as before."""
    before, there = weights(base.denoiser), store.names()
    with pytest.raises(ImagicError, match=match):
        compress(adapter, base, rank, store, name)
    assert same(weights(base.denoiser), before)
    assert store.names() == there


@pytest.mark.parametrize("rank", [-1, 0, 1025])
def test_a_rank_out_of_range_is_refused(folder: Path, fitted: Fitted, tmp_path: Path, rank: int) -> None:
    """1 to 1024, as in a fit."""
    refused(fitted("full"), opened(folder), rank, Store(tmp_path), "small", rf"--rank {rank}\. Expected: a whole number from 1 to 1024")


def test_there_must_be_something_to_compress(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """A LoRA adapter is small already, and one of mode embedding has no weights."""
    refused(fitted("lora"), opened(folder), 2, Store(tmp_path), "small", "is already a LoRA adapter of rank 4")
    refused(fitted("embedding"), opened(folder), 2, Store(tmp_path), "small", "is of mode embedding and holds no weights")


def test_an_adapter_of_another_base_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    """The difference to other weights would be no edit."""
    refused(fitted("full"), opened(save_tiny(tmp_path / "base", seed=1)), 2, Store(tmp_path), "small", "was made for base")


def test_a_name_is_taken_only_if_asked_for(folder: Path, fitted: Fitted, tmp_path: Path) -> None:
    """As everywhere; the one that was there is then replaced."""
    base, store = opened(folder), Store(tmp_path)
    compress(fitted("full"), base, 2, store, "small")
    refused(fitted("full"), base, 3, store, "small", "exists")
    assert compress(fitted("full"), base, 3, store, "small", overwrite=True).record.config.tune.rank == 3


@pytest.mark.parametrize("wrong", ["missing", "shape", "nan"])
def test_weights_that_do_not_fit_are_refused(folder: Path, forge: Forge, tmp_path: Path, wrong: str) -> None:
    """Before anything is computed, by name."""
    base = opened(folder)

    def spoil(state: State) -> None:
        value = state.pop("conv_in.weight")
        if wrong == "shape":
            state["conv_in.weight"] = value[:, :3]

    full = forge(base, spoil if wrong != "nan" else lambda _: None)
    if wrong == "nan":
        state = load_file(full.folder / FULL_FILE)
        state["conv_in.weight"][0, 0, 0, 0] = torch.nan
        save_file(state, full.folder / FULL_FILE)
    refused(full, base, 2, Store(tmp_path), "small", "not finite" if wrong == "nan" else "other names or shapes")


# The command


def test_the_command_stores_it_and_prints_the_error(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name with the rank where none is given; in JSON as in the record; the exit code is 0."""
    monkeypatch.chdir(tmp_path)
    store, full = fitted("full").folder.parent, fitted("full").name
    assert cli.main(["compress", full, "--rank", "2", "--store", str(store), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    made = Store(store).read(f"{full}-r2")
    assert (answer["name"], answer["error"], answer["bytes"]) == (made.name, recorded_error(made), made.size)
    assert cli.main(["compress", full, "--rank", "2", "--name", "other", "--store", str(store)]) == 0
    assert f"{recorded_error(made):.1%}" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["compress", full, "--rank", "2", "--name", "other", "--store", str(store)]) == 2
    for name in (made.name, "other"):
        Store(store).remove(name)


@pytest.mark.parametrize(
    ("tokens", "match"), [(["lora", "--rank", "2"], "already a LoRA adapter"), (["full", "--rank", "0"], "--rank 0"), (["full"], "rank")]
)
def test_the_command_refuses_before_it_opens_a_base(
    fitted: Fitted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokens: list[str], match: str
) -> None:
    """Exit code 2 and what was wrong."""
    monkeypatch.setattr("imagic_lora.bases.loading.registry.load_base", None)
    adapter = fitted(tokens[0])
    assert cli.main(["compress", adapter.name, *tokens[1:], "--store", str(adapter.folder.parent)]) == 2
    assert match in " ".join(capsys.readouterr().err.split())
