"""fit --method textual-inversion: only the rows of the new word change, and diffusers reads them."""

from __future__ import annotations

import json
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Run, each, opened, same, tiny_config, weights
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny import save_tiny_sdxl
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_embeddings
from imagic_lora.adapters.export import export
from imagic_lora.adapters.store import Store
from imagic_lora.adapters.word import NewWord, place, read_word
from imagic_lora.bases.base import Base
from imagic_lora.bases.loading.registry import architecture_of
from imagic_lora.core.config import RunConfig
from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.core.settings.merging import merged
from imagic_lora.memory.prediction import predict
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result
from imagic_lora.training.word import TEMPLATES, WordStage

WORD, PROMPT = "<q>", "a <q> up"
FILES = ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]


def config(folder: Path, **changes: Any) -> RunConfig:
    """A run of 3 steps for a word of two vectors; the tiny tokenizer reads 14 letters, too few for the templates."""
    own = {"method": "textual-inversion", "inversion": {"initial_word": "c", "vectors": 2, "templates": "prompt"}}
    return tiny_config(folder, "embedding", **merged(own, changes))


def fitted(photo: Path, run: RunConfig, store: Path, base: Base | None = None, prompt: str = PROMPT, **options: Any) -> Adapter:
    adapter = result(fit(photo, prompt, run, Store(store), "one", base=base, **options))
    assert adapter is not None
    return adapter


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two text encoders."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


def encoders(base: Base) -> dict[str, dict[str, Tensor]]:
    """Copies of the weights of the text encoders, which a fit must not change."""
    return {name: weights(base._on_device(name)) for name in base.architecture.text_encoders}  # pyright: ignore[reportAttributeAccessIssue]


def test_only_the_new_rows_change(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Denoiser, text encoder and vocabulary are bit-equal; the vectors differ from that of the initial word and from each other."""
    base = opened(folder)
    before, texts, tokens = weights(base.denoiser), encoders(base), base.tokenize(PROMPT)
    initial = base.encode_vectors("c").vectors["text_encoder"][0, 1]
    adapter = fitted(photo_file, config(folder), tmp_path, base)
    assert same(weights(base.denoiser), before)
    assert all(same(after, texts[name]) for name, after in encoders(base).items())
    assert base.tokenize(PROMPT) == tokens
    rows = load_file(adapter.folder / FILES[0])[WORD]
    assert adapter.record.weight_files == FILES[:1]
    assert adapter.record.parts == []
    assert rows.shape == (2, 16)
    assert not any(torch.equal(row, initial) for row in rows)
    assert not torch.equal(rows[0], rows[1])


def test_a_step_takes_the_gradient_of_the_rows_alone(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """The first step of Adam moves every row against the gradient of the loss with respect to the looked-up rows, at the learning rate."""
    base, run = opened(folder), config(folder, inversion={"vectors": 1})
    found = []

    class Watched(WordStage):
        def step(self, k: int) -> Any:
            if k == 0:
                start = {name: value.detach().clone() for name, value in self.trainables.items()}
                loss = self.batch(0).run().mean()
                (gradient,) = torch.autograd.grad(loss, [self.trainables["text_encoder"]])
                report = super().step(0)
                found.append((start["text_encoder"], gradient, self.trainables["text_encoder"].detach().clone()))
                return report
            return super().step(k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagic_lora.training.fit.WordStage", Watched)
        fitted(photo_file, run, tmp_path, base)
    start, gradient, after = found[0]
    assert torch.equal(start, base.encode_vectors("c").vectors["text_encoder"][0, 1:2])
    moved = gradient.abs() > 1e-6
    assert moved.any()
    assert torch.allclose((after - start)[moved], -run.embed.learning_rate * gradient.sign()[moved], rtol=1e-2)


@each("xl", [False, True])
def test_diffusers_reads_the_vectors(folder: Path, sdxl: Path, photo_file: Path, tmp_path: Path, xl: bool) -> None:
    """Its tokenizer and text encoders give the same embeddings as ours, for the prompt of the fit and for another one."""
    path, pipeline = (sdxl, StableDiffusionXLPipeline) if xl else (folder, StableDiffusionPipeline)
    base = opened(path)
    adapter = fitted(photo_file, config(path), tmp_path, base)
    pipe: Any = pipeline.from_pretrained(path)
    pipe.load_textual_inversion(str(adapter.folder), weight_name=FILES[0])
    if xl:
        second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
        pipe.load_textual_inversion(str(adapter.folder), weight_name=FILES[1], **second)
    for prompt in (PROMPT, "<q> cat of <q>"):
        with torch.no_grad():
            by_diffusers = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        ours = Editor(base).conditionings(adapter, None if prompt == PROMPT else prompt)["target"]
        assert torch.equal(by_diffusers[0], ours.tokens)
        if ours.pooled is not None:
            assert torch.equal(by_diffusers[2], ours.pooled)
    word = read_word(adapter, base)
    assert word is not None
    token = pipe.tokenizer.convert_tokens_to_ids([WORD, f"{WORD}_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[token], word.rows["text_encoder"])


@each("xl", [False, True])
def test_the_export_is_that_of_a1111(folder: Path, sdxl: Path, photo_file: Path, tmp_path: Path, xl: bool) -> None:
    """One file with the vectors, under the names that A1111 and ComfyUI look for, and a page."""
    adapter = fitted(photo_file, config(sdxl if xl else folder), tmp_path)
    file, page = export(adapter, "kohya", tmp_path / "out")
    written = load_file(file)
    own = [load_file(adapter.folder / name)[WORD] for name in FILES[: 1 + xl]]
    assert set(written) == ({"clip_l", "clip_g"} if xl else {"emb_params"})
    assert all(torch.equal(written[name], rows) for name, rows in zip(["clip_l", "clip_g"] if xl else ["emb_params"], own, strict=True))
    assert "embeddings" in page.read_text(encoding="utf-8")
    names = {path.name for path in export(adapter, "diffusers", tmp_path / "out")}
    assert names == {*FILES[: 1 + xl], "README.md"}


def test_a_stopped_fit_resumes_to_the_same_bytes(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Interrupted after each step."""
    base = opened(folder)
    whole = fitted(photo_file, config(folder), tmp_path / "whole", base)
    for steps in (1, 3):
        store = tmp_path / str(steps)
        run = fit(photo_file, PROMPT, config(folder), Store(store), "one", base=base)
        list(islice(run, steps))
        run.close()
        again = fitted(photo_file, config(folder), store, base, resume=True)
        for file in (*FILES[:1], "embeddings.safetensors"):
            assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes(), (file, steps)
    run = fit(photo_file, PROMPT, config(folder), Store(tmp_path / "other"), "one", base=base)
    list(islice(run, 2))
    run.close()
    with pytest.raises(ImagicError, match="initial_word was 'c', is 'd'"):
        fitted(photo_file, config(folder, inversion={"initial_word": "d"}), tmp_path / "other", base, resume=True)


def test_the_places_of_a_word(folder: Path) -> None:
    """Every occurrence that stands alone is replaced by as many tokens as there are vectors."""
    base = opened(folder)
    placed = place(base, "<q> a <q>, x", WORD, "c", 2)
    assert [token.id for token in base.tokenize(placed.prompt)][1:-1] == [base.tokenize(letter)[1].id for letter in "ccacc"] + [
        token.id for token in base.tokenize(", x")[1:-1]
    ]
    assert placed.positions.tolist() == [1, 2, 4, 5]
    word = NewWord(WORD, "c", {"text_encoder": torch.zeros(2, 16)})
    assert word.occurs("a <q>!")
    assert not word.occurs("a b<q>")
    plain = word.encode(base, "a cat")
    assert torch.equal(plain.tokens, base.encode_prompt("a cat").tokens)
    with pytest.raises(ImagicError, match="cut off"):
        place(base, "abcdefghijklm <q>", WORD, "c", 2)


def test_templates_contain_the_word_and_change_from_step_to_step() -> None:
    """The 27 of the paper."""
    prompts = {template.format(WORD) for template in TEMPLATES}
    assert len(prompts) == 27
    assert all(prompt.endswith(f" {WORD}") for prompt in prompts)


def test_steps_use_the_templates(photo_file: Path, tmp_path: Path) -> None:
    """Each step encodes one of them; the adapter holds the embedding of the target prompt."""
    run = config(
        Path("critters"),
        base="critters",
        inversion={"templates": "object", "initial_word": "dog"},
        embed={"steps": 4, "batch_size": 1, "learning_rate": 1e-12},
    )
    seen: list[Tensor] = []

    class Watched(WordStage):
        def batch(self, k: int) -> Any:
            seen.append(self.conditioning_at(k, range(1)).tokens.detach())
            return super().batch(k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagic_lora.training.fit.WordStage", Watched)
        steps = fit(photo_file, "a <q> jumping", run, Store(tmp_path), "one")
        list(islice(steps, 4))
        steps.close()
    assert len(seen) == 4
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_an_adapter_with_other_vectors_is_refused(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """Rows of a wrong width or name, whose hash is right, do not reach the text encoder."""
    base = opened(folder)
    adapter = fitted(photo_file, config(folder), tmp_path, base)
    for stored in ({WORD: torch.zeros(2, 15)}, {WORD: torch.zeros(1, 16)}, {"<p>": torch.zeros(2, 16)}):
        save_file(stored, adapter.folder / FILES[0])
        with pytest.raises(ImagicError, match="vectors"):
            read_word(adapter, base)


def test_the_plan_has_one_stage_of_training(folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """With the text encoder in memory; the file of the vectors is what the plan says."""
    architecture = architecture_of(str(folder), None)
    plan, stored = predict(architecture, config(folder)), fitted(photo_file, config(folder), tmp_path)
    assert list(plan.stages) == ["encode", "embed", "sample", "decode"]
    held = sum(value.numel() * 4 for value in load_file(stored.folder / FILES[0]).values())
    embeddings = sum(value.numel() * 4 for value in load_file(stored.folder / "embeddings.safetensors").values())
    assert plan.adapter == held + embeddings


def test_the_commands(run: Run, folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """fit, list, edit; a prompt without the word is a warning, an eta is refused."""
    tiny = ["--embed.steps", "1", "--edit.steps", "1", "--templates", "prompt", "--device", "cpu"]
    store = ["--store", str(tmp_path / "store")]
    fit_word = ["fit", photo_file, PROMPT, "--base", folder, "--method", "textual-inversion", "--name", "q", *tiny, *store]
    code, _, errors = run(*fit_word, "--initial-word", "c")
    assert code == 0, errors
    assert "textual-inversion" in run("list", *store)[1]
    edit = ["edit", "q", *store, "--device", "cpu", "--out", tmp_path / "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("always", ImagicWarning)  # the command prints it
        code, out, errors = run(*edit, "--prompt", "a cat", "--json")
    assert (code, "does not contain <q>" in errors) == (0, True), errors
    assert Path(json.loads(out)["pictures"][0]["file"]).name == "seed0.png"
    assert read_embeddings(Store(tmp_path / "store").read("q"))["target"].tokens.shape == (1, 16, 16)
    assert run(*edit, "--eta", "0.3")[0] == 2


def test_bad_input_is_refused(run: Run, folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """With exit code 2, and what to do; nothing is stored."""
    store = ["--store", str(tmp_path / "store")]
    common = ["--base", str(folder), "--method", "textual-inversion", "--embed.steps", "1", *store]
    start = ["--initial-word", "c", "--templates", "prompt"]
    cases = [
        (["a cat", *start], "no word in angle brackets"),
        (["a <q> <p>", *start], "several words in angle brackets"),
        (["a <q>", "--word", "<p>", *start], "not in the prompt"),
        (["a <q>", "--word", "<q> x", *start], "one word without spaces"),
        (["a b", "--word", "b", *start], "a word of the vocabulary"),
        (["a <q>", "--templates", "prompt"], "no --initial-word"),
        (["a <q>", "--initial-word", "cat", "--templates", "prompt"], "3 tokens"),
        (["a <q>", "--initial-word", "c", "--vectors", "20", "--templates", "prompt"], "cut off"),
        (["a <q>", *start, "--rank", "2"], "--rank"),
        (["a <q>", *start, "--mode", "lora"], "--mode"),
        (["a <q>", *start, "--embed.space", "input"], "--embed.space"),
        (["a <q>", *start, "--vectors", "0"], "vectors"),
    ]
    for given, expected in cases:
        code, _, errors = run("fit", photo_file, *given, *common)
        assert (code, expected in errors) == (2, True), (given, errors)
    assert Store(tmp_path / "store").names() == []
