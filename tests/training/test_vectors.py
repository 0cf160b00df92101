"""Stage 1 on the vectors of the tokens before the text encoder: what it trains, what it stores, and what an edit makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import PROMPT, array, opened, tiny_config
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_sd3, save_tiny_sdxl

import imagic_lora.training.run as running
from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import atomic_folder
from imagic_lora.adapters.export import export
from imagic_lora.adapters.record import EMBEDDINGS, RECORD
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.core.config import EditConfig, EmbedConfig, RunConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import Processes
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.plan import Assumed
from imagic_lora.memory.prediction import predict
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.generate import generate
from imagic_lora.sampling.mixing import mixed, mixtures
from imagic_lora.training.embed import embed_stage, optimised
from imagic_lora.training.fit import fit, result
from imagic_lora.training.rehearsing.rehearsal import rehearse

FAMILIES: dict[str, Callable[[Path], Path]] = {"sd": save_tiny, "sdxl": save_tiny_sdxl, "sd3": save_tiny_sd3}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """One base of each family."""
    root = tmp_path_factory.mktemp("families")
    return {name: opened(save(root / name)) for name, save in FAMILIES.items()}


def config(folder: Path, **changes) -> RunConfig:
    """A run in the input space. The rate is high: the vectors of a tiny random base are as large as its embeddings."""
    return tiny_config(folder, embed={"steps": 3, "learning_rate": 0.3, "batch_size": 2, "space": "input"}, **changes)


def fitted(folder: Path, photo: Path, root: Path, name: str = "one", **options) -> Adapter:
    made = result(fit(photo, PROMPT, config(folder), Store(root), name, **options))
    assert made is not None
    return made


@every_family
def test_the_vectors_of_a_prompt_give_its_embedding(bases: dict[str, Base], family: str) -> None:
    """Looked up or given, they are encoded as the prompt is; gradients reach those of every text encoder."""
    base = bases[family]
    expected, found = base.encode_prompt(PROMPT), base.encode_vectors(PROMPT)
    again = base.encode_vectors(PROMPT, found.vectors)
    assert {name: tuple(value.shape) for name, value in found.vectors.items()} == base.architecture.vectors
    for each in (found, again):
        assert torch.equal(each.tokens, expected.tokens)
        assert each.pooled is expected.pooled is None or torch.equal(each.pooled, expected.pooled)  # pyright: ignore[reportArgumentType]
    given = {name: value.clone().requires_grad_() for name, value in found.vectors.items()}
    base.encode_vectors(PROMPT, given).tokens.square().sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in given.values())
    assert torch.equal(base.encode_prompt(PROMPT).tokens, expected.tokens)  # no hook is left


@every_family
def test_masks_tell_words_from_padding(bases: dict[str, Base], family: str) -> None:
    """A longer prompt has more words and less padding; start and end token are neither."""
    base = bases[family]
    short, long = base.vector_masks("a cat"), base.vector_masks("a cat on a mat")
    for name, masks in short.items():
        assert not (masks.words & masks.padding).any()
        assert masks.words.sum() < long[name].words.sum()
        assert masks.padding.sum() > long[name].padding.sum() > 0
        special = (~(masks.words | masks.padding)).sum().item()
        assert special == (1 if name == "text_encoder_3" else 2)  # T5 has no start token
        assert masks.words.shape == base.encode_vectors("").vectors[name].shape[:2]


@every_family
def test_stage_1_trains_words_and_padding(bases: dict[str, Base], family: str) -> None:
    """Not the start and end token; what it gives is the encoding of the vectors that it stores."""
    base = bases[family]
    target = base.with_added_conditions(base.encode_vectors(PROMPT), 32, 32, 1.0)
    latents = torch.randn(1, base.encode_image(torch.zeros(1, 3, 32, 32)).shape[1], 4, 4, generator=torch.Generator().manual_seed(0))
    stage = embed_stage(base, latents, target, EmbedConfig(steps=2, learning_rate=0.01, space="input"), 0, Processes(), PROMPT)
    for k in range(2):
        stage.step(k)
    found = optimised(stage)
    for name, (words, padding) in base.vector_masks(PROMPT).items():
        moved = (found.vectors[name] != target.vectors[name]).any(-1)
        assert torch.equal(moved, words | padding) or family == "sd3"  # CLIP's tokens after the last layer that is read have no gradient
        assert not (moved & ~(words | padding)).any()
        assert (moved & words).any()
    with torch.no_grad():
        assert torch.equal(base.encode_vectors(PROMPT, found.vectors).tokens, found.tokens)
    assert not found.tokens.requires_grad
    assert set(found.extra) == set(target.extra)


def test_words_and_padding_mix_apart(folder: Path) -> None:
    """At eta the words, at eta times padding_eta the padding, then the text encoder; 0 is what was stored."""
    base = opened(folder)
    target = base.encode_vectors(PROMPT)
    shifted = {name: value + 0.3 for name, value in target.vectors.items()}
    with torch.no_grad():
        e_opt = base.encode_vectors(PROMPT, shifted)
    (masks,), (name,) = base.vector_masks(PROMPT).values(), target.vectors
    for eta, padding_eta in ((0.5, 1.0), (1.0, 0.25), (1.2, 0.0)):
        share = torch.zeros(masks.words.shape)
        share[masks.words], share[masks.padding] = eta, eta * padding_eta
        vectors = {name: shifted[name] + share[..., None] * (target.vectors[name] - shifted[name])}
        found = mixed(base, PROMPT, target, e_opt, eta, padding_eta)
        with torch.no_grad():
            torch.testing.assert_close(found.tokens, base.encode_vectors(PROMPT, vectors).tokens)
        assert not found.vectors
    assert torch.equal(mixed(base, PROMPT, target, e_opt, 0.0, 0.5).tokens, e_opt.tokens)
    plain = replace(e_opt, vectors={})
    half = mixed(base, PROMPT, target, plain, 0.5, 0.5)
    torch.testing.assert_close(half.tokens, (target.tokens + plain.tokens) / 2)  # without vectors, the embeddings are mixed


@pytest.mark.parametrize("space", ["output", "input"])
def test_sources_are_where_the_photo_is_inverted(folder: Path, space: str) -> None:
    """At the source eta, or at an eta below it; one object for all that are equal."""
    base = opened(folder)
    target = base.encode_vectors(PROMPT)
    optimised = base.encode_vectors("a dog")
    if space == "output":
        target, optimised = replace(target, vectors={}), replace(optimised, vectors={})
    config = EditConfig(source_eta=0.4)
    edits, sources = mixtures(base, PROMPT, target, optimised, [0.0, 0.2, 0.4, 0.7, 1.0], config)
    for one, at in zip(sources, [0, 0.2, 0.4, 0.4, 0.4], strict=True):
        assert torch.equal(one.tokens, mixed(base, PROMPT, target, optimised, at, config.padding_eta).tokens)
    assert sources[2] is sources[3] is sources[4] is edits[2]
    assert len({id(one) for one in (*edits, *sources)}) == 5


def test_fit_and_edit(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """The adapter holds the vectors; padding_eta, and another prompt, change the picture; eta 0 is that of what is stored."""
    adapter = fitted(folder, photo_file, tmp_path)
    stored = load_file(adapter.folder / EMBEDDINGS)
    assert {"optimised.vectors.text_encoder", "target.vectors.text_encoder"} <= set(stored)
    assert not any(name.startswith("null.vectors") for name in stored)
    base = opened(folder)
    editor, edit = Editor(base), adapter.record.config.edit

    def picture(eta: float, prompt: str | None = None, **changes: float) -> np.ndarray:
        return array(next(editor.edit(adapter, [eta], [0], edit.model_copy(update=changes), prompt)).image)

    first = picture(1.0)
    assert np.array_equal(first, picture(1.0))
    assert not np.array_equal(first, picture(1.0, padding_eta=1.0))
    assert not np.array_equal(first, picture(1.0, prompt="a dog on a mat"))
    assert np.array_equal(picture(0.0), picture(0.0, padding_eta=1.0))
    assert np.array_equal(picture(1.0, padding_eta=1.0), picture(1.0, prompt=PROMPT, padding_eta=1.0))
    editor.close()


def test_the_preview_has_no_text_encoder_in_memory(folder: Path, photo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --idle release it is gone again once the mixtures are encoded, as the plan has it."""
    held: list[int] = []

    def counting(base: Base, *given: Any) -> Any:
        held.append(len(base.helper_bytes()))  # pyright: ignore[reportAttributeAccessIssue]
        return generate(base, *given)

    monkeypatch.setattr(running, "generate", counting)
    base = opened(folder, idle="release")
    assert result(fit(photo_file, PROMPT, config(folder), Store(tmp_path), "one", base=base)) is not None
    assert held == [0]


@pytest.mark.slow
def test_resume_gives_the_same_bytes(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Stopped in each stage."""
    whole = fitted(folder, photo_file, tmp_path / "whole")
    for steps in (2, 5):
        root = tmp_path / str(steps)
        running = fit(photo_file, PROMPT, config(folder), Store(root), "one")
        list(islice(running, steps))
        running.close()
        again = fitted(folder, photo_file, root, resume=True)
        for file in (EMBEDDINGS, *again.record.weight_files):
            assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_vectors_are_where_the_record_says(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """An adapter of the input space without vectors would be mixed as another: it is refused, as are vectors of other shapes."""
    adapter = fitted(folder, photo_file, tmp_path)
    path = adapter.folder / EMBEDDINGS
    stored = load_file(path)
    without = {name: value for name, value in stored.items() if ".vectors." not in name}
    short = {name: value[:, :-1].clone() if ".vectors." in name else value for name, value in stored.items()}
    for name, tensors, message in (("without", without, "holds no vectors"), ("short", short, "shapes.*vectors")):
        save_file(tensors, path)
        with atomic_folder(tmp_path / "other" / name) as writer:
            for file in adapter.record.files:
                writer.write(file, [(adapter.folder / file).read_bytes()])
            writer.write_manifest(RECORD, adapter.record)
        forged = Store(tmp_path / "other").read(name)
        with pytest.raises(ImagicError, match=message):
            next(Editor(opened(folder)).edit(forged, [1.0], [0], forged.record.config.edit))


def test_settings_that_would_have_no_effect_are_refused() -> None:
    """By name."""
    space = {"embed": {"space": "input"}}
    for given, flag in (
        ({"edit": {"padding_eta": 0.5}}, "--padding-eta"),
        ({"embed": {"space": "input", "tokens": "words"}}, "--embed.tokens"),
        ({"embed": {"space": "input", "relative": True}}, "--embed.relative"),
    ):
        with pytest.raises(ImagicError, match=flag):
            resolve({"base": "sd15"}, given, {})
    assert resolve({"base": "sd15"}, space | {"edit": {"padding_eta": 0.5}}, {}).edit.padding_eta == 0.5


def test_t5_is_not_moved_while_it_is_trained_through(photo_file: Path, tmp_path: Path) -> None:
    """Where encoders make room for T5, the backward pass would not find them: refused before anything is loaded."""
    folder = save_tiny_sd3(tmp_path / "base")
    run = tiny_config(folder, embed={"space": "input"}, tune={"targets": "attention"}, memory={"idle": "release"})
    with pytest.raises(ImagicError, match=r"--embed\.space input"):
        result(fit(photo_file, PROMPT, run, Store(tmp_path), "one"))
    assert result(fit(photo_file, PROMPT, run.model_copy(update={"memory": MemoryConfig(device="cpu")}), Store(tmp_path), "one"))


def test_an_export_says_how_vectors_mix(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """The formula for embeddings would be wrong."""
    adapter = fitted(folder, photo_file, tmp_path / "store")
    pages = [path.read_text() for path in export(adapter, "diffusers", tmp_path / "out") if path.suffix == ".md"]
    assert len(pages) == 1
    assert "target.vectors" in pages[0]
    assert "eta * target + (1 - eta) * optimised" not in pages[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stage_1_is_planned_with_the_text_encoders(dtype: str) -> None:
    """The prediction is near the rehearsal; both hold the encoders, and more than in the output space."""
    found = {}
    for space in ("output", "input"):
        run = resolve({"base": "sd15"}, {"resolution": 64, "embed": {"space": space}, "memory": {"idle": "release"}}, {})
        assumed = Assumed("cuda" if dtype == "bf16" else "cpu", dtype, "adam")
        architecture = architecture_of("sd15", None)
        found[space] = predict(architecture, run, assumed).stages["embed"], rehearse(architecture, run, assumed).stages["embed"]
    (output, exact_output), (inside, exact) = found["output"], found["input"]
    assert inside.weights == pytest.approx(exact.weights, rel=0.01)
    assert inside.weights > output.weights + 100 * 2**20
    added, exact_added = inside.activations - output.activations, exact.activations - exact_output.activations
    assert added == pytest.approx(exact_added, rel=0.05)
