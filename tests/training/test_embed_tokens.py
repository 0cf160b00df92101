"""Which tokens stage 1 trains, in which units, and what the adapter stores of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import PROMPT, array, by_diffusers, each, opened, slow_but, tiny_config
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sd3

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import AtomicWriter
from imagic_lora.adapters.contents import read_embeddings, save_embeddings
from imagic_lora.adapters.export import export
from imagic_lora.adapters.record import EMBEDDINGS
from imagic_lora.adapters.store import Store
from imagic_lora.core.conditioning import Conditioning, changed, difference
from imagic_lora.core.config import EditConfig, EmbedConfig
from imagic_lora.core.errors import ImagicError, Stopped
from imagic_lora.core.runtime import Processes
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.embed import embed_stage, optimised, with_noise
from imagic_lora.training.fit import fit, result

EMBED = {"steps": 3, "learning_rate": 0.05, "batch_size": 2}
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def places(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A base with a U-Net, and one with a transformer."""
    return {"unet": folder, "sd3": save_tiny_sd3(tmp_path_factory.mktemp("sd3") / "base")}


def fitted_on(folder: Path, photo: Path, store: Path, name: str = "one", **embed: Any) -> Adapter:
    """An adapter whose stage 1 has these settings."""
    made = result(fit(photo, PROMPT, config(folder, **embed), Store(store), name))
    assert made is not None
    return made


def config(folder: Path, **embed: Any) -> Any:
    return tiny_config(folder, "lora", tune={"targets": "attention"}, embed=EMBED | embed)


@pytest.mark.parametrize("kind", slow_but(["unet"], ["unet", "sd3"]))
def test_padding_stays_where_words_are_trained(places: Folders, photo_file: Path, tmp_path: Path, kind: str) -> None:
    """With every token everything changes; with words only they do, and the pooled embedding."""
    base = opened(places[kind])
    words = base.word_mask(PROMPT)[0]
    assert 3 <= int(words.sum()) < len(words)
    for tokens in ("all", "words"):
        stored = read_embeddings(fitted_on(places[kind], photo_file, tmp_path / tokens, tokens=tokens))
        moved = (stored["target"].tokens != stored["optimised"].tokens).any(-1)[0]
        assert moved.tolist() == (words if tokens == "words" else torch.ones_like(words)).tolist()
        if stored["target"].pooled is not None:
            assert not torch.equal(stored["target"].pooled, stored["optimised"].pooled)  # pyright: ignore[reportArgumentType]


def test_a_relative_rate_does_not_depend_on_the_scale(folder: Path) -> None:
    """Adam's first step is the rate in every element: times the root mean square of its token. Padding of a mask stays."""
    base, latents = opened(folder), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    target = base.encode_prompt(PROMPT)
    target = Conditioning(target.tokens * torch.linspace(0.5, 100, target.tokens.shape[1]).view(1, -1, 1), mask=base.word_mask(PROMPT))
    for relative in (False, True):
        settings = EmbedConfig(steps=1, learning_rate=0.01, tokens="words", relative=relative)
        stage = embed_stage(base, latents, target, settings, 0, Processes())
        assert torch.equal(stage.conditioning().tokens, target.tokens)
        stage.step(0)
        step = (stage.conditioning().tokens - target.tokens).abs().amax(-1)[0].detach()
        size = target.tokens.square().mean(-1).sqrt()[0] if relative else torch.ones(len(step))
        torch.testing.assert_close(step, 0.01 * size * target.mask[0], rtol=2e-2, atol=2e-5)  # pyright: ignore[reportOptionalSubscript]


def test_noise_is_added_in_the_same_units(folder: Path) -> None:
    """Of each token's size, and not to padding that is not trained."""
    base = opened(folder)
    target = Conditioning(torch.ones(1, 16, 16) * torch.arange(1.0, 17).view(1, -1, 1), mask=base.word_mask(PROMPT))
    settings = EmbedConfig(steps=1, noise=0.1, tokens="words", relative=True)
    stage = embed_stage(base, torch.zeros(1, 4, 8, 8), target, settings, 0, Processes())
    noisy = stage.perturbed(target, 0, range(400))
    stds = (noisy.tokens - target.tokens).std(dim=(0, 2))
    torch.testing.assert_close(stds, 0.1 * torch.arange(1.0, 17) * target.mask[0], rtol=0.05, atol=1e-6)  # pyright: ignore[reportOptionalSubscript]
    plain = with_noise({"tokens": torch.tensor(0.1)}, 0, target, 0, range(2))
    assert plain.tokens.shape == (2, 16, 16)


@pytest.mark.parametrize("kind", [pytest.param("unet", marks=pytest.mark.slow), "sd3"])
@each("embed", [{"tokens": "words"}, {"relative": True}, {"tokens": "words", "relative": True}])
def test_the_difference_is_stored_and_read_exactly(
    places: Folders, photo_file: Path, tmp_path: Path, kind: str, embed: dict[str, Any]
) -> None:
    """In bf16, over the trained tokens: e_opt of the file is that of the preview and of stage 2; and the file is smaller."""
    adapter = fitted_on(places[kind], photo_file, tmp_path, **embed)
    stored, read = load_file(adapter.folder / EMBEDDINGS), read_embeddings(adapter)
    count = int(read["target"].mask.sum()) if "tokens" in embed else read["target"].tokens.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    assert "optimised.tokens" not in stored
    assert stored["optimised.difference"].dtype == torch.bfloat16
    assert stored["optimised.difference"].shape == (1, count, *read["target"].tokens.shape[2:])
    again = changed(read["target"], {k: v.bfloat16().float() for k, v in difference(read["optimised"], read["target"]).items()})
    assert torch.equal(again.tokens, read["optimised"].tokens)
    writer = AtomicWriter(tmp_path)
    save_embeddings(writer, read, differs=True)
    assert (tmp_path / EMBEDDINGS).read_bytes() == (adapter.folder / EMBEDDINGS).read_bytes()


def test_a_resumed_fit_has_the_same_bytes(places: Folders, photo_file: Path, tmp_path: Path) -> None:
    """Stopped in stage 1, and in stage 2, where e_opt comes from the checkpoint."""
    embed = {"tokens": "words", "relative": True}
    whole = fitted_on(places["sd3"], photo_file, tmp_path / "whole", **embed)
    for after in (2, 5):
        store, seen = Store(tmp_path / str(after)), iter([False] * (after - 1))
        with pytest.raises(Stopped):
            result(fit(photo_file, PROMPT, config(places["sd3"], **embed), store, "one", stop=lambda seen=seen: next(seen, True)))
        resumed = result(fit(photo_file, PROMPT, config(places["sd3"], **embed), store, "one", resume=True))
        assert resumed is not None
        for name in (EMBEDDINGS, *resumed.record.weight_files):
            assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), (after, name)


def test_an_export_has_the_whole_embedding(places: Folders, photo_file: Path, tmp_path: Path) -> None:
    """Other programs know no difference: plain diffusers makes the same picture from it."""
    adapter = fitted_on(places["sd3"], photo_file, tmp_path / "store", tokens="words", relative=True)
    paths = export(adapter, "diffusers", tmp_path / "out")
    written = load_file(next(path for path in paths if path.name == EMBEDDINGS))
    assert torch.equal(written["optimised.tokens"], read_embeddings(adapter)["optimised"].tokens)
    edits = EditConfig(steps=3, guidance_scale=3.0)
    edited = next(Editor(opened(places["sd3"])).edit(adapter, [0.6], [5], edits)).image
    exported: Any = Adapter(adapter.folder, adapter.record)
    (adapter.folder / EMBEDDINGS).write_bytes((tmp_path / "out/one" / EMBEDDINGS).read_bytes())
    plain = by_diffusers(StableDiffusion3Pipeline.from_pretrained(places["sd3"]), exported, 0.6, 5, edits)
    assert np.abs(array(edited) - array(plain)).max() <= 1


@pytest.mark.slow
@each(
    "change",
    [
        lambda tensors: tensors.update({"optimised.difference": tensors["optimised.difference"][:, 1:].clone()}),
        lambda tensors: tensors.update({"optimised.tokens": tensors["target.tokens"].clone()}),
        lambda tensors: tensors.update({"target.mask": tensors["target.mask"][:, :3].clone()}),
        lambda tensors: tensors.pop("target.mask"),
    ],
)
def test_a_difference_that_fits_nothing_is_refused(places: Folders, photo_file: Path, tmp_path: Path, change: Any) -> None:
    """Of another number of tokens, beside whole tokens, or without its mask."""
    adapter = fitted_on(places["unet"], photo_file, tmp_path, tokens="words")
    tensors = load_file(adapter.folder / EMBEDDINGS)
    change(tensors)
    save_file(tensors, adapter.folder / EMBEDDINGS)
    with pytest.raises(ImagicError, match=r"optimised\.difference of the shape"):
        read_embeddings(adapter)


def test_without_these_settings_nothing_is_different(folder: Path) -> None:
    """The defaults train and store whole embeddings: bytes of older versions."""
    base = opened(folder)
    stage = embed_stage(base, torch.zeros(1, 4, 8, 8), base.encode_prompt(PROMPT), EmbedConfig(steps=1), 0, Processes())
    assert stage.trainables["tokens"].shape == (1, 16, 16)
    assert optimised(stage).mask is None
    assert not EmbedConfig().stores_difference
