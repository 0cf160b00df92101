"""Checkpoints in the original layout: what they are taken for, what they share with their folders, what is refused."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import each, opened, same, slow_but, tiny_config, weights
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models.modeling_utils import no_init_weights
from original import unet_names, write_single
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_sdxl
from transformers import CLIPTokenizer

from imagic_lora.adapters.store import Store
from imagic_lora.bases.families.sd import StableDiffusion
from imagic_lora.bases.families.sdxl import StableDiffusionXL
from imagic_lora.bases.loading.components import tokenizer
from imagic_lora.bases.loading.configs import architecture, architecture_at
from imagic_lora.bases.loading.known import VARIABLE, BaseEntry
from imagic_lora.bases.loading.original.files import SingleFile
from imagic_lora.bases.loading.published import PUBLISHED
from imagic_lora.bases.loading.registry import files_of, load_base
from imagic_lora.bases.loading.tokenizers import shipped_tokenizer
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.sampling.editor import Editor
from imagic_lora.training.fit import fit, result

MARKS = {
    "sd15": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "sd21": "cond_stage_model.model.ln_final.weight",
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
}


def on_cpu(name: str, **memory: Any) -> Any:
    return load_base(name, resolve_runtime(MemoryConfig(device="cpu", **memory)))


def marked(path: Path, *names: str, said: dict[str, str] | None = None) -> Path:
    """A file that holds these tensors."""
    save_file({name: torch.zeros(1) for name in names}, path, metadata=said)
    return path


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a file and the folder of its configs on the user's list; gives the name."""

    def put(path: Path, folder: Path) -> str:
        (tmp_path / "bases.yaml").write_text(yaml.safe_dump({"mine": {"source": str(path), "config": str(folder)}}))
        monkeypatch.setenv(VARIABLE, str(tmp_path / "bases.yaml"))
        return "mine"

    return put


DTYPES = [("sd1", torch.float16), ("sdxl", torch.float32), ("sdxl", torch.float16)]


@pytest.mark.parametrize(("kind", "dtype"), slow_but(DTYPES[:2], DTYPES))
def test_a_single_file_is_the_same_base(tmp_path: Path, named: Callable[..., str], kind: str, dtype: torch.dtype) -> None:
    """Every weight of every component, and the fingerprint, in half precision too."""
    folder = (save_tiny if kind == "sd1" else save_tiny_sdxl)(tmp_path / "base")
    half = dtype == torch.float16
    base, same_base = on_cpu(named(write_single(folder, tmp_path / "one.safetensors", dtype), folder)), opened(folder)
    assert base.fingerprint == same_base.fingerprint
    assert base.architecture == same_base.architecture
    for name, helper in {**same_base._helpers, "unet": same_base.denoiser}.items():  # pyright: ignore[reportAttributeAccessIssue]
        expected = weights(helper.half().float() if half else helper)
        assert same(dict(sorted(weights(({**base._helpers, "unet": base.denoiser})[name]).items())), dict(sorted(expected.items())))


def test_an_adapter_fits_its_base_in_every_form(tmp_path: Path, named: Callable[..., str], folder: Path, photo_file: Path) -> None:
    """Fitted on the folder, edited on the same base in half precision and as a single file: the same picture, to rounding."""
    adapter = result(fit(photo_file, "a cat", tiny_config(folder), Store(tmp_path / "store"), "cat"))
    assert adapter is not None
    half = save_tiny(tmp_path / "half", variant="fp16", dtype=torch.float16)
    single = named(write_single(folder, tmp_path / "one.safetensors"), folder)
    config = adapter.record.config.edit
    pictures = [next(Editor(base).edit(adapter, [0.6], [3], config)).image for base in (opened(folder), opened(half), on_cpu(single))]
    assert pictures[0].tobytes() == pictures[2].tobytes()
    worst = max(abs(a - b) for a, b in zip(pictures[0].tobytes(), pictures[1].tobytes(), strict=True))
    assert worst <= 4


@each("kind", list(MARKS))
def test_a_file_is_known_by_its_tensors(tmp_path: Path, kind: str) -> None:
    """Without any config; what it predicts is what it says."""
    path = marked(tmp_path / "one.safetensors", MARKS[kind], said={"modelspec.prediction_type": "epsilon"})
    built, published = architecture(str(path)), PUBLISHED[kind]
    size = {"sample_size": 64} if kind == "sd21" else {}  # the models of Stable Diffusion 2 that predict the noise are those of 512 pixels
    assert (built.denoiser, built.vae, built.text_encoders) == (published.denoiser | size, published.vae, published.text_encoders)
    assert built.scheduler == PUBLISHED[kind].scheduler | {"prediction_type": "epsilon"}


@each(
    "kind, extra, said, known, expected",
    [
        ("sd15", [], {}, None, "epsilon"),
        ("sdxl", ["v_pred"], {}, None, "v_prediction"),
        ("sdxl", [], {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("sd21", ["v_pred"], {}, None, "v_prediction"),
        ("sd21", [], {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("sd21", [], {}, BaseEntry(source="x", prediction="epsilon"), None),
    ],
)
def test_what_a_file_predicts(
    tmp_path: Path, kind: str, extra: list[str], said: dict[str, str], known: BaseEntry | None, expected: str | None
) -> None:
    """By a tensor or its metadata; Stable Diffusion 2 has to say it, or its user."""
    path = marked(tmp_path / "one.safetensors", MARKS[kind], *extra, said=said)
    found = architecture_at(path, known).scheduler
    assert expected is None or found["prediction_type"] == expected
    assert SingleFile(path, known).architecture.scheduler["prediction_type"] == (expected or "epsilon")
    assert "rescale_betas_zero_snr" not in found


def test_a_schedule_without_signal_at_its_end_is_kept(tmp_path: Path) -> None:
    """A tensor says so (arXiv 2305.08891)."""
    path = marked(tmp_path / "one.safetensors", MARKS["sdxl"], "v_pred", "ztsnr")
    assert architecture_at(path, None).scheduler["rescale_betas_zero_snr"] is True


def test_a_file_that_does_not_say_what_it_predicts_is_refused(tmp_path: Path) -> None:
    """With where to say it."""
    with pytest.raises(ImagicError, match=r"epsilon or v_prediction.*bases\.yaml, with its prediction"):
        architecture(str(marked(tmp_path / "one.safetensors", MARKS["sd21"])))


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """By its name."""
    path = marked(tmp_path / "one.safetensors", MARKS["sd15"])
    with pytest.raises(ImagicError, match="config '/nowhere'"):
        architecture_at(path, BaseEntry(source=str(path), config="/nowhere"))
    assert architecture_at(path, BaseEntry(source=str(path), config="sdxl")) == PUBLISHED["sdxl"]


def test_a_published_config_is_not_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer comes from where the sizes come from."""
    path = marked(tmp_path / "one.safetensors", MARKS["sd15"])
    (tmp_path / "sd15").mkdir()
    monkeypatch.chdir(tmp_path)
    assert SingleFile(path, BaseEntry(source=str(path), config="sd15")).tokenizer("tokenizer").keys() == shipped_tokenizer().keys()


def _pickled(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    return path


def _zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return path


@each("make", [_pickled, _zipped])
@each("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
def test_a_pickle_is_refused_whatever_its_name(tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    """With the reason, before anything of it is read."""
    path = str(make(tmp_path / name))
    for use in (architecture, on_cpu):
        with pytest.raises(ImagicError, match="is a pickle, which can run code"):
            use(path)


def test_a_header_may_be_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """Its length in bytes begins like one where it is 128 and a multiple of 256 more."""
    path, padding = tmp_path / "one.safetensors", ""
    while path.exists() is False or path.read_bytes()[:1] != b"\x80":
        marked(path, MARKS["sd15"], said={"padding": padding})
        padding += "x"
    assert architecture(str(path)) == PUBLISHED["sd15"]


def test_a_checkpoint_under_another_name_is_read(tmp_path: Path, named: Callable[..., str], folder: Path) -> None:
    """The format is detected from the file's content."""
    assert on_cpu(named(write_single(folder, tmp_path / "one.ckpt"), folder)).fingerprint == opened(folder).fingerprint


@each(
    "write, why",
    [
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff" * 100), "a header of"),
        (lambda path: path.write_bytes(b"\x10" + bytes(7) + b"no json at all.."), "cannot be read"),
        (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"), "a list, not an object"),
        (lambda path: marked(path, "lora_unet_x.lora_up.weight"), "is a LoRA file"),
        (lambda path: marked(path, "x"), "holds 1 tensors.*original layout"),
        (
            lambda path: marked(path, MARKS["sd15"], "model.diffusion_model.input_blocks.0.0.weight"),
            "looks like sd15, but its U-Net has model_channels = 1.*model_channels = 320",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, write: Callable[[Path], Any], why: str) -> None:
    """A LoRA file, for one."""
    write(tmp_path / "one.safetensors")
    for use in (architecture, on_cpu):
        with pytest.raises(ImagicError, match=why):
            use(str(tmp_path / "one.safetensors"))


@each(
    "spoil, why",
    [
        (lambda found: [found.pop(name) for name in list(found) if name.startswith("first_stage")], "holds 0 tensors of a vae"),
        (lambda found: found.pop("model.diffusion_model.out.0.weight"), "tensors of .* are missing"),
        (lambda found: found.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 7, 3, 3)}), "have another shape"),
        (lambda found: found.pop("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"), r"holds .* weights"),
        (lambda found: found.update({"model.diffusion_model.out.0.weight": torch.full((8,), torch.nan)}), "NaN"),
        (lambda found: found.pop("model.diffusion_model.input_blocks.2.0.op.bias"), "lacks .*downsamplers.0.conv.bias"),
        (lambda found: found.pop("first_stage_model.encoder.down.0.downsample.conv.bias"), "lacks .*downsamplers.0.conv.bias"),
        (lambda found: found.pop("first_stage_model.decoder.up.1.upsample.conv.bias"), "cannot be loaded"),
        (
            lambda found: found.update({f"model.diffusion_model.x{k}": torch.zeros(0) for k in range(4000)}),
            "tensors of a unet",
        ),
        (lambda found: found.update({"first_stage_model.post_quant_conv.bias": torch.zeros(4, dtype=torch.int64)}), "as I64"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, named: Callable[..., str], folder: Path, spoil: Callable[[dict[str, Any]], Any], why: str
) -> None:
    """An inpainting model among them, whose first layer is wider."""
    found = load_file(write_single(folder, tmp_path / "one.safetensors"))
    spoil(found)
    save_file(found, tmp_path / "one.safetensors")
    with pytest.raises(ImagicError, match=why):
        on_cpu(named(tmp_path / "one.safetensors", folder))


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_whatever_is_missing_or_bent_is_refused(tmp_path: Path, kind: str) -> None:
    """Thirty tensors of every part, dropped, cut short or flattened: a clear refusal each."""
    folder = (save_tiny if kind == "sd1" else save_tiny_sdxl)(tmp_path / "base")
    path = write_single(folder, tmp_path / "one.safetensors")
    whole, known = load_file(path), BaseEntry(source=str(path), config=str(folder))
    names = random.Random(0).sample([name for name in whole if not name.endswith(("model_ema.decay", "betas", "logit_scale"))], 30)
    bend = {"dropped": None, "cut": lambda one: one[..., :-1].contiguous(), "flat": lambda one: one.reshape(-1)[:1].squeeze()}
    runtime, family = resolve_runtime(MemoryConfig(device="cpu")), StableDiffusionXL if kind == "sdxl" else StableDiffusion
    for k, name in enumerate(names):
        change = list(bend.values())[k % 3]
        spoilt = {other: value for other, value in whole.items() if other != name} | ({name: change(whole[name])} if change else {})
        save_file(spoilt, path)
        with pytest.raises(ImagicError):
            family.load(SingleFile(path, known), "x", None, runtime)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_true_sizes_are_renamed_without_loss(kind: str) -> None:
    """Every tensor of a U-Net of true size finds its name, and no other."""
    with torch.device("meta"), no_init_weights():
        unet: Any = UNet2DConditionModel.from_config(PUBLISHED[kind].denoiser)
    state = unet.state_dict()
    found = convert_ldm_unet_checkpoint({f"model.diffusion_model.{new}": state[old] for old, new in unet_names(unet)}, unet.config)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in state.items()}


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    """Known numbers: OpenAI's own example, and the padding of either text encoder."""
    words = tokenizer(
        "CLIPTextModel",
        PUBLISHED["sd15"].text_encoders["text_encoder"],
        SingleFile(marked(tmp_path / "one.safetensors", MARKS["sd15"])),
        "tokenizer",
    )
    assert words("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(words), words.model_max_length) == (49408, 77)


def test_a_prompt_is_read_and_filled_up_as_by_the_programs_of_single_files(tmp_path: Path) -> None:
    """OpenAI's encoder with the end of the text, OpenCLIP's with the id of "!", which stays punctuation in a prompt (openclip, ComfyUI)."""
    files = SingleFile(marked(tmp_path / "one.safetensors", MARKS["sdxl"]))
    first, second = (
        tokenizer("CLIPTextModel", files.architecture.text_encoders[part], files, part.replace("text_encoder", "tokenizer"))
        for part in ("text_encoder", "text_encoder_2")
    )
    for text, ids in {"wow! a dog!!": [2781, 256, 320, 1929, 748], "!": [256], "!;-)": first("!;-)").input_ids[1:-1], "": []}.items():
        for words, pad in ((first, 49407), (second, 0)):
            found = words(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert found == [49406, *ids, 49407, *[pad] * (75 - len(ids))]


def test_a_folder_is_read_as_by_diffusers(tmp_path: Path) -> None:
    """A word that the config names as padding, as that of Stable Diffusion 2 names "!", is padding in a prompt too."""
    folder = save_tiny_sdxl(tmp_path / "base")
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "a"}))
    plain = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    config = architecture(str(folder)).text_encoders["text_encoder_2"]
    ours: Any = tokenizer("CLIPTextModelWithProjection", config, files_of(str(folder)), "tokenizer_2")
    kwargs: Any = {"padding": "max_length", "max_length": 16, "truncation": True}
    assert ours("a dog", **kwargs).input_ids == plain("a dog", **kwargs).input_ids
    assert plain("a dog").input_ids[1] == plain.pad_token_id
