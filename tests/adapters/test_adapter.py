"""What is read from an adapter, and what is rejected: every forged adapter here has the right hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from common import MODES, PROMPT, each, opened, output, same, tiny_config, weights
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.atomic import atomic_folder
from imagic_lora.adapters.contents import applied, check_base, read_canvas, read_embeddings, save_embeddings
from imagic_lora.adapters.export import Format, export
from imagic_lora.adapters.full import WEIGHTS
from imagic_lora.adapters.lora import LORA_FILE
from imagic_lora.adapters.manifest import read_manifest
from imagic_lora.adapters.record import CARD, EMBEDDINGS, RECORD, SOURCE, BaseRecord, Record, SourceRecord, WeightsRecord
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.conditioning import Conditioning
from imagic_lora.core.config import Mode
from imagic_lora.core.errors import ImagicError
from imagic_lora.photos.canvas import to_canvas, to_image
from imagic_lora.photos.png import png
from imagic_lora.photos.reading import read_photo
from imagic_lora.training.fit import fit, result

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Any]
Forge = Callable[..., Adapter]
FULL_FILE = f"unet/{WEIGHTS}"
METADATA_KEY = "lora_adapter_metadata"


@pytest.fixture
def forge(tmp_path: Path, fitted: Callable[..., Adapter]) -> Forge:
    """Gives an adapter with other files, none where it is None, or with another record; the hashes are right."""

    number = count()

    def make(mode: Mode = "lora", files: dict[str, bytes | None] | None = None, **changes: Any) -> Adapter:
        real, root = fitted(mode), tmp_path / str(next(number))
        content = {name: (real.folder / name).read_bytes() for name in real.record.files} | (files or {})
        with atomic_folder(root / "forged") as writer:
            for name, data in content.items():
                if data is not None:
                    writer.write(name, [data])
            writer.write_manifest(RECORD, real.record.model_copy(update=changes))
        return Store(root).read("forged")

    return make


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    """One for all: each refusal leaves it as it was."""
    return opened(folder)


@pytest.fixture
def refused(base: Base) -> Callable[[Adapter, str], None]:
    """Checks that an adapter cannot be applied and that the base stays bit-equal."""
    before, picture = weights(base.denoiser), output(base)

    def check(adapter: Adapter, match: str) -> None:
        with pytest.raises(ImagicError, match=match), applied(adapter, base):
            pytest.fail("it is applied")
        assert same(weights(base.denoiser), before)
        assert torch.equal(output(base), picture)

    return check


def changed(path: Path, change: Change) -> bytes:
    """A safetensors file with other tensors and the same metadata."""
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        return save(tensors, file.metadata())


def set_to(**values: Any) -> Change:
    """Puts tensors in, or takes those that are None out; ``__`` stands for a dot."""

    def change(tensors: Tensors) -> None:
        for name, value in values.items():
            tensors.pop(name.replace("__", "."), None)
            if value is not None:
                tensors[name.replace("__", ".")] = value

    return change


# Reading


def test_embeddings_come_back_as_they_were(tmp_path: Path, fitted: Callable[..., Adapter]) -> None:
    """Tokens, pooled and extra inputs of each kind, under the names of the design, fp32."""
    extra = {"sizes": torch.tensor([[64.0, 48.0]])}
    named = {kind: Conditioning(torch.rand(1, 3, 4), torch.rand(1, 5).half(), extra) for kind in ("target", "optimised", "null")}
    with atomic_folder(tmp_path / "one") as writer:
        save_embeddings(writer, named)
        writer.write_manifest(RECORD, fitted("lora").record)
    folder = tmp_path / "one"
    assert sorted(load_file(folder / EMBEDDINGS)) == sorted(f"{kind}.{part}" for kind in named for part in ("tokens", "pooled", "sizes"))
    found = read_embeddings(Adapter(folder, read_manifest(folder, RECORD, Record)))
    assert found.keys() == named.keys()
    for kind, value in named.items():
        assert found[kind].tensors().keys() == value.tensors().keys()
        assert all(torch.equal(found[kind].tensors()[name], tensor.float()) for name, tensor in value.tensors().items())
        assert {tensor.dtype for tensor in found[kind].tensors().values()} == {torch.float32}


def test_embeddings_in_half_precision_come_as_fp32(forge: Forge, fitted: Callable[..., Adapter]) -> None:
    """Somebody may want to spare room."""
    expected = load_file(fitted("lora").folder / EMBEDDINGS)["optimised.tokens"].half()
    adapter = forge(files={EMBEDDINGS: changed(fitted("lora").folder / EMBEDDINGS, set_to(optimised__tokens=expected))})
    assert torch.equal(read_embeddings(adapter)["optimised"].tokens, expected.float())


def test_a_base_without_a_null_has_none(forge: Forge, fitted: Callable[..., Adapter]) -> None:
    """Then there are two kinds."""
    adapter = forge(files={EMBEDDINGS: changed(fitted("lora").folder / EMBEDDINGS, set_to(null__tokens=None))})
    assert set(read_embeddings(adapter)) == {"target", "optimised"}


def test_the_canvas_is_the_one_trained_on(fitted: Callable[..., Adapter], photo_file: Path) -> None:
    """Bit-equal pixels, the same box and size, from the adapter alone."""
    expected, found = to_canvas(read_photo(photo_file).image, 32, 8), read_canvas(fitted("lora"))
    assert torch.equal(found.pixels, expected.pixels)
    assert (found.box, found.size) == (expected.box, expected.size)


@pytest.mark.parametrize("mode", MODES)
def test_size_counts_weights_and_embeddings(fitted: Callable[..., Adapter], mode: Mode) -> None:
    """What a user has to keep, not the pictures."""
    adapter = fitted(mode)
    kept = [*adapter.folder.rglob("*.safetensors"), *adapter.folder.rglob("config.json")]
    assert adapter.size == sum(path.stat().st_size for path in kept)


@each("mode", MODES)
def test_an_adapter_holds_no_pickle(folder: Path, photo_file: Path, tmp_path: Path, mode: Mode) -> None:
    """Only formats that cannot run code, and every one as the design lists it."""
    config = tiny_config(folder, mode, monitoring={"convergence_every": 50})
    adapter = result(fit(photo_file, PROMPT, config, Store(tmp_path), "one"))
    assert adapter is not None
    files = {path.relative_to(adapter.folder).as_posix() for path in adapter.folder.rglob("*") if path.is_file()}
    own: dict[Mode, set[str]] = {
        "lora": {"pytorch_lora_weights.safetensors"},
        "full": {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"},
        "embedding": set(),
    }
    shown = {"README.md", "convergence.png", "photo.png", "preview.png", "source.png", "steps.jsonl"}
    common = {"adapter.json", "embeddings.safetensors"} | shown
    assert files == common | own[mode]


@each("mode", MODES)
def test_the_card_says_what_loads_the_weights(fitted: Callable[..., Adapter], mode: Mode) -> None:
    """Its own class or call of diffusers, or that there are none."""
    words: dict[Mode, str] = {"lora": "load_lora_weights", "full": "from_pretrained", "embedding": "There are no weights"}
    card = (fitted(mode).folder / CARD).read_text()
    assert f"mode {mode}," in card
    assert [name for name, word in words.items() if word in card] == [mode]


@each("mode", MODES)
def test_an_applied_adapter_is_removed(base: Base, fitted: Callable[..., Adapter], mode: Mode) -> None:
    """The output differs while it is applied, but in mode embedding, and is bit-equal afterwards."""
    before = output(base)
    with applied(fitted(mode), base):
        assert torch.equal(output(base), before) == (mode == "embedding")
    assert torch.equal(output(base), before)


@each("mode", MODES)
def test_a_forgery_of_nothing_is_as_good_as_the_real_one(base: Base, forge: Forge, fitted: Callable[..., Adapter], mode: Mode) -> None:
    """So that what is refused below is refused for what was changed: the same output, though every file was written anew."""
    real = fitted(mode)
    copy = forge(mode, {name: changed(real.folder / name, lambda _: None) for name in real.record.files if name.endswith("tensors")})
    with applied(real, base):
        expected = output(base)
    with applied(copy, base):
        assert torch.equal(output(base), expected)
    assert torch.equal(read_canvas(copy).pixels, read_canvas(real).pixels)


# Embeddings, photo and record that are rejected

TOKENS = torch.zeros(1, 16, 16)
KINDS = ("target", "optimised", "null")
LAYOUTS: list[Format] = ["kohya", "diffusers"]
EMBEDDED: dict[str, Change] = {
    "nothing": dict.clear,
    "no target": set_to(target__tokens=None),
    "no optimised": set_to(optimised__tokens=None),
    "another kind": set_to(other__tokens=TOKENS),
    "another kind instead": set_to(null__tokens=None, nul__tokens=TOKENS),
    "no kind": set_to(tokens=TOKENS),
    "no name": set_to(target=TOKENS),
    "no tokens": set_to(target__tokens=None, target__pooled=TOKENS),
    "no tokens at all": set_to(**{f"{kind}__tokens": None for kind in KINDS}, **{f"{kind}__pooled": TOKENS.clone() for kind in KINDS}),
    "pooled in one": set_to(target__pooled=TOKENS),
    "extra in one": set_to(null__sizes=TOKENS),
    "one longer": set_to(optimised__tokens=torch.zeros(1, 17, 16)),
    "one wider": set_to(null__tokens=torch.zeros(1, 16, 17)),
    "a batch": set_to(target__tokens=torch.zeros(2, 16, 16)),
}


@each("change", EMBEDDED)
def test_embeddings_of_other_kinds_or_shapes_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], change: Change
) -> None:
    """There are target, optimised and perhaps null, all with the same inputs of the same shapes."""
    adapter = forge(files={EMBEDDINGS: changed(fitted("lora").folder / EMBEDDINGS, change)})
    with pytest.raises(ImagicError, match=rf"{EMBEDDINGS} holds the embeddings: .*; their shapes are (not )?equal"):
        read_embeddings(adapter)
    refused(adapter, "holds the embeddings: .*; their shapes are (not )?equal")


@each("value", [torch.nan, torch.inf])
@each("kind", KINDS)
def test_embeddings_that_are_not_finite_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], kind: str, value: float
) -> None:
    """By name."""
    wrong = set_to(**{f"{kind}__tokens": torch.full((1, 16, 16), value)})
    adapter = forge(files={EMBEDDINGS: changed(fitted("lora").folder / EMBEDDINGS, wrong)})
    with pytest.raises(ImagicError, match=rf"{kind}\.tokens in .*not finite"):
        read_embeddings(adapter)
    refused(adapter, "not finite")


INVALID = [("tokens", (2, 16, 16)), ("tokens", (16, 16)), ("tokens", (1, 0, 16)), ("tokens", ()), ("pooled", ()), ("pooled", (1,))]


@each("name, shape", INVALID)
def test_embeddings_that_no_base_can_use_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    """To read, to edit and to export: scalars, several conditionings in one, nothing."""
    all_three = set_to(**{f"{kind}__{name}": torch.zeros(shape) for kind in KINDS})
    adapter = forge(files={EMBEDDINGS: changed(fitted("lora").folder / EMBEDDINGS, all_three)})
    why = rf"{EMBEDDINGS} holds '{name}' of the shape \{list(shape)}"
    refused(adapter, why)
    for layout in LAYOUTS:
        with pytest.raises(ImagicError, match=why):
            export(adapter, layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@each("shape", [(1, 16, 17), (1, 15, 16)])
def test_embeddings_that_the_base_cannot_use_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], shape: tuple[int, ...]
) -> None:
    """All of the same shape, but not of its own."""
    all_three = set_to(**{f"{kind}__tokens": torch.zeros(shape) for kind in KINDS})
    refused(forge(files={EMBEDDINGS: changed(fitted("lora").folder / EMBEDDINGS, all_three)}), "has embeddings of shape")


PLACED = {
    "left of it": {"box": (-1, 0, 32, 24)},
    "above it": {"box": (0, -1, 32, 24)},
    "right of it": {"box": (0, 0, 33, 24)},
    "below it": {"box": (0, 0, 32, 25)},
    "far away": {"box": (10**9, 10**9, 10**9 + 1, 10**9 + 1)},
    "no width": {"box": (5, 0, 5, 24)},
    "no height": {"box": (0, 7, 32, 7)},
    "turned round": {"box": (32, 24, 0, 0)},
    "size 0": {"size": (0, 37)},
    "size below 0": {"size": (50, -37)},
    "both below 0": {"size": (-50, -37)},
    "gigantic": {"size": (100_000, 100_000)},
    "without end": {"size": (1, 2**62)},
}


@each("change", PLACED)
def test_a_photo_that_lies_elsewhere_is_refused(forge: Forge, fitted: Callable[..., Adapter], change: dict[str, Any]) -> None:
    """Its box is a part of the canvas, its size one that a photo can have."""
    source = fitted("lora").record.source
    assert (source.box, source.size) == ((0, 0, 32, 24), (50, 37))
    with pytest.raises(ImagicError, match="a box inside the canvas"):
        read_canvas(forge(source=source.model_copy(update=change)))


def test_a_photo_may_lie_anywhere_on_the_canvas(forge: Forge, fitted: Callable[..., Adapter]) -> None:
    """A single pixel of it is enough."""
    source = SourceRecord(sha256=fitted("lora").record.source.sha256, size=(1, 1), box=(31, 23, 32, 24))
    assert read_canvas(forge(source=source)).photo().size == (1, 1)


def test_a_photo_that_is_none_is_refused(forge: Forge, fitted: Callable[..., Adapter]) -> None:
    """Whatever its hash."""
    whole = png(to_image(read_canvas(fitted("lora")).pixels[0]), {})
    for content in (b"", b"words", whole[: len(whole) // 2]):
        with pytest.raises(ImagicError, match=SOURCE):
            read_canvas(forge(files={SOURCE: content}))


@each("mode, name", [("lora", EMBEDDINGS), ("lora", SOURCE), ("lora", LORA_FILE), ("full", FULL_FILE), ("full", "unet/config.json")])
def test_a_file_that_is_not_on_record_is_not_read(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], mode: Mode, name: str
) -> None:
    """Though it is there: nobody knows what was written."""
    adapter = forge(mode, {name: None})
    (adapter.folder / name).write_bytes((fitted(mode).folder / name).read_bytes())
    wanted = rf"{name} is not listed in the adapter's record"
    if name == SOURCE:
        with pytest.raises(ImagicError, match=wanted):
            read_canvas(adapter)
    else:
        refused(adapter, wanted)


@each("mode", MODES)
def test_an_adapter_of_another_base_is_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], mode: Mode
) -> None:
    """By the fingerprint, not by the name; the error distinguishes a changed base from another one."""
    made_for = fitted(mode).record.base
    refused(forge(mode, base=made_for.model_copy(update={"fingerprint": "f"})), "the weights have changed: fit again")
    other = BaseRecord(name="sd15", revision=None, fingerprint="f")
    refused(forge(mode, base=other), r"was made for base sd15, not for .*use --base sd15")


LORA_PART = WeightsRecord(component="unet", mode="lora", files=[LORA_FILE])
FULL_PART = WeightsRecord(component="unet", mode="full", files=["unet/config.json", FULL_FILE])
PARTS: dict[str, list[WeightsRecord]] = {
    "none": [],
    "twice": [LORA_PART, LORA_PART],
    "the other mode": [FULL_PART],
    "both": [LORA_PART, FULL_PART],
    "another component": [LORA_PART.model_copy(update={"component": "transformer"})],
    "another file": [LORA_PART.model_copy(update={"files": [SOURCE]})],
    "no file": [LORA_PART.model_copy(update={"files": []})],
    "a file more": [LORA_PART.model_copy(update={"files": [LORA_FILE, SOURCE]})],
}


@each("parts", PARTS)
def test_weights_under_other_names_are_refused(forge: Forge, refused: Callable[[Adapter, str], None], parts: list[WeightsRecord]) -> None:
    """Each mode has its own, and no others."""
    refused(forge(parts=parts), "lists unexpected weight files")


@each("parts", [[LORA_PART], [FULL_PART]])
def test_weights_in_mode_embedding_are_refused(forge: Forge, refused: Callable[[Adapter, str], None], parts: list[WeightsRecord]) -> None:
    """Nobody would load them."""
    refused(forge("embedding", parts=parts), "lists unexpected weight files")


def test_full_weights_are_not_applied_to_a_quantised_base(wide: Path, fitted: Callable[..., Adapter], forge: Forge) -> None:
    """They would replace the quantised weights; LoRA layers are not rejected for the quantization."""
    quantised = opened(wide, quantize="nf4")
    made_for = fitted("full").record.base.model_copy(update={"fingerprint": quantised.fingerprint})
    with pytest.raises(ImagicError, match="replaces every weight of a quantised base"):
        check_base(forge("full", base=made_for), quantised)
    with pytest.raises(ImagicError, match="has embeddings of shape"):
        check_base(forge("lora", base=made_for), quantised)


# LoRA files that are rejected


def first(tensors: Tensors, end: str = "attn1.to_q.lora_A.weight") -> str:
    """The first name with this end."""
    return next(name for name in sorted(tensors) if name.endswith(end))


def renamed(name: Callable[[str], str]) -> Change:
    """Gives one layer another name."""

    def change(tensors: Tensors) -> None:
        layer = first(tensors).removesuffix(".lora_A.weight")
        for side in "AB":
            tensors[f"{name(layer)}.lora_{side}.weight"] = tensors.pop(f"{layer}.lora_{side}.weight")

    return change


def reshaped(end: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Changes one tensor."""

    def change(tensors: Tensors) -> None:
        name = first(tensors, end)
        tensors[name] = make(tensors[name]).contiguous()

    return change


def removed(end: str) -> Change:
    """Takes one tensor out."""
    return lambda tensors: tensors.pop(first(tensors, end))


def added(end: str, value: Tensor) -> Change:
    """Adds a tensor to those of a layer."""
    return lambda tensors: tensors.update({first(tensors).replace("lora_A.weight", end): value})


def one_of_another_rank(tensors: Tensors) -> None:
    """A whole layer."""
    name = first(tensors)
    tensors[name] = torch.zeros(5, tensors[name].shape[1])
    tensors[name.replace("_A", "_B")] = torch.zeros(tensors[name.replace("_A", "_B")].shape[0], 5)


LORA: dict[str, Change] = {
    "no layers": dict.clear,
    "a layer of another rank": one_of_another_rank,
    "A of another rank": reshaped("to_q.lora_A.weight", lambda value: value[:3]),
    "B of another rank": reshaped("to_q.lora_B.weight", lambda value: value[:, :3]),
    "too narrow": reshaped("to_q.lora_A.weight", lambda value: value[:, 1:]),
    "too high": reshaped("to_q.lora_B.weight", lambda value: torch.cat([value, value])),
    "turned round": reshaped("to_q.lora_A.weight", lambda value: value.t()),
    "a flat kernel": reshaped("conv1.lora_A.weight", lambda value: value.flatten(1)),
    "another kernel": reshaped("conv1.lora_A.weight", lambda value: value[..., 1:]),
    "a large kernel in B": reshaped("conv1.lora_B.weight", lambda value: value.expand(-1, -1, 3, 3)),
    "a dimension more": reshaped("to_q.lora_A.weight", lambda value: value[None]),
    "no A": removed("to_q.lora_A.weight"),
    "no B": removed("to_q.lora_B.weight"),
    "an alpha": added("alpha", torch.tensor(2.0)),
    "a bias": added("lora_B.bias", torch.zeros(16)),
    "a magnitude": added("lora_magnitude_vector", torch.zeros(16)),
    "weights of the base": set_to(unet__conv_in__weight=torch.zeros(8, 4, 3, 3)),
    "loose": set_to(loose=torch.zeros(1)),
    "diffusers' older names": added("lora.down.weight", torch.zeros(4, 8)),
    "a layer that is not there": renamed(lambda layer: layer.replace("to_q", "to_z")),
    "a layer without weights": renamed(lambda layer: layer.removesuffix(".to_q")),
    "a norm": renamed(lambda layer: "unet.conv_norm_out"),
    "the text encoder's": renamed(lambda layer: "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
    "no name": renamed(lambda layer: "unet"),
}


@each("change", LORA)
def test_layers_that_do_not_fit_the_base_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], change: Change
) -> None:
    """By names and shapes alone, before anything is loaded."""
    refused(forge(files={LORA_FILE: changed(fitted("lora").folder / LORA_FILE, change)}), rf"{LORA_FILE} (adapts|holds)")


def without_prefix(tensors: Tensors) -> None:
    """As a component's own file would have it."""
    for name in list(tensors):
        tensors[name.removeprefix("unet.")] = tensors.pop(name)


def added_elsewhere(tensors: Tensors) -> None:
    """A layer of the base, of the right shapes, that is never adapted."""
    name = "unet.time_embedding.linear_2.lora_{}.weight"
    tensors |= {name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(32, 4)}


@each("change", [without_prefix, renamed(lambda layer: layer.removeprefix("unet.")), added_elsewhere])
def test_layers_that_would_not_be_loaded_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], change: Change
) -> None:
    """Of no component, or not among those that the settings name."""
    refused(forge(files={LORA_FILE: changed(fitted("lora").folder / LORA_FILE, change)}), LORA_FILE)


@each("value", [torch.nan, torch.inf])
def test_layers_that_are_not_finite_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], value: float
) -> None:
    """By name, before anything is loaded."""
    wrong = reshaped("to_k.lora_B.weight", lambda tensor: torch.full_like(tensor, value))
    refused(forge(files={LORA_FILE: changed(fitted("lora").folder / LORA_FILE, wrong)}), r"to_k\.lora_B\.weight in .* not finite")


@each("dtype", [torch.complex64, torch.float8_e4m3fn, torch.bool])
@each("mode, file, end", [("lora", LORA_FILE, "to_k.lora_B.weight"), ("full", FULL_FILE, "conv_in.weight"),
                                                   ("lora", EMBEDDINGS, "target.tokens")])  # fmt: skip
def test_numbers_of_odd_types_are_refused(
    forge: Forge,
    fitted: Callable[..., Adapter],
    refused: Callable[[Adapter, str], None],
    mode: Mode,
    file: str,
    end: str,
    dtype: torch.dtype,
) -> None:
    """Complex ones, or of a few bits, of the right shape."""
    wrong = reshaped(end, lambda tensor: tensor.to(dtype))
    refused(forge(mode, {file: changed(fitted(mode).folder / file, wrong)}), file)


@each("content", [b"", b"words" * 100, bytes(1000)])
@each("mode, file", [("lora", LORA_FILE), ("full", FULL_FILE), ("lora", EMBEDDINGS)])
def test_weights_in_another_format_are_refused(
    forge: Forge, refused: Callable[[Adapter, str], None], mode: Mode, file: str, content: bytes
) -> None:
    """Whatever their hash."""
    refused(forge(mode, {file: content}), "is not a whole safetensors file")


@pytest.fixture
def altered(forge: Forge, fitted: Callable[..., Adapter]) -> Callable[..., Adapter]:
    """Gives an adapter whose LoRA file has other settings, merged into its own or in place of them."""
    path = fitted("lora").folder / LORA_FILE
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        own = json.loads(file.metadata()[METADATA_KEY])

    def make(settings: dict[str, Any] | None = None, instead: dict[str, str] | None = None, without: str = "") -> Adapter:
        kept = {key: value for key, value in own.items() if key != without}
        metadata = {METADATA_KEY: json.dumps(kept | (settings or {}))} if instead is None else instead
        return forge(files={LORA_FILE: save(tensors, metadata)})

    return make


NOT_OURS: dict[str, dict[str, Any]] = {
    "megatron": {"megatron_core": "os", "megatron_config": {"a": 1}},
    "a module to import": {"megatron_core": "os"},
    "pissa": {"init_lora_weights": "pissa"},
    "no init": {"init_lora_weights": False},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules to save": {"modules_to_save": ["conv_in"]},
    "rank pattern": {"rank_pattern": {"to_q": 8}},
    "alpha pattern": {"alpha_pattern": {"to_q": 8}},
    "bias": {"bias": "all"},
    "lora bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "fan in": {"fan_in_fan_out": True},
    "excluded": {"exclude_modules": ["to_q"]},
    "layers": {"layers_to_transform": [0]},
    "replication": {"layer_replication": [[0, 1]]},
    "parameters": {"target_parameters": ["conv_in.weight"]},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "auto mapping": {"auto_mapping": {"parent_library": "os"}},
    "another kind": {"peft_type": "IA3"},
    "a task": {"task_type": "CAUSAL_LM"},
    "a base": {"base_model_name_or_path": "owner/name"},
    "unknown": {"surprise": True},
    "unknown null": {"surprise": None},
    "unknown text": {"surprise": "os"},
    "unknown record": {"surprise": {"a": 1}},
}


@each("settings", NOT_OURS)
def test_settings_of_peft_that_are_not_ours_are_refused(
    altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None], settings: dict[str, Any]
) -> None:
    """Some change the base's weights, and one names a module to import."""
    refused(altered({f"unet.{key}": value for key, value in settings.items()}), rf"unsupported PEFT settings \(.*'{next(iter(settings))}'")


@each("name", ["dora", "rslora", "pissa", "megatron", "rank pattern"])
def test_settings_that_are_not_ours_cannot_be_hidden(
    altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None], fitted: Callable[..., Adapter], name: str
) -> None:
    """Behind ours under another name."""
    with safe_open(fitted("lora").folder / LORA_FILE, "pt") as file:
        own = json.loads(file.metadata()[METADATA_KEY])
    wrong = {f"unet.{key}": value for key, value in NOT_OURS[name].items()}
    refused(altered(wrong | {key.removeprefix("unet."): own[key] for key in wrong}), "unsupported PEFT settings")


OUT_OF_RANGE: dict[str, dict[str, Any]] = {
    "rank 0": {"r": 0},
    "rank below 0": {"r": -4},
    "rank too high": {"r": 1025},
    "rank without end": {"r": 10**30},
    "a rank in text": {"r": "4"},
    "a rank with a point": {"r": 4.0},
    "a rank that is a switch": {"r": True},
    "no rank": {"r": None},
    "alpha 0": {"lora_alpha": 0},
    "alpha below 0": {"lora_alpha": -1.0},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha in words": {"lora_alpha": "two"},
    "alpha in a list": {"lora_alpha": [2.0]},
    "no alpha": {"lora_alpha": None},
    "all layers": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": ".*"},
    "a name": {"target_modules": "to_q"},
    "unknown layers": {"target_modules": ["to_q", "conv_in"]},
    "lists of layers": {"target_modules": [["to_q"]]},
    "no layers": {"target_modules": None},
    "a number of layers": {"target_modules": 3},
}


@each("settings", OUT_OF_RANGE)
def test_settings_out_of_range_are_refused(
    altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None], settings: dict[str, Any]
) -> None:
    """Rank, alpha and layers are those of a fit."""
    refused(altered({f"unet.{key}": value for key, value in settings.items()}), "unsupported PEFT settings")


@each("settings", [{"lora_alpha": "2.0"}, {"lora_alpha": True}, {"target_modules": []}, {"target_modules": {"to_q": 1}}])
def test_settings_of_another_type_are_refused(
    altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None], settings: dict[str, Any]
) -> None:
    """Alpha is a number, layers are a list."""
    refused(altered({f"unet.{key}": value for key, value in settings.items()}), rf"{LORA_FILE} (adapts|has unsupported PEFT settings)")


def test_another_rank_than_that_of_the_layers_is_refused(altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None]) -> None:
    """PEFT would build other layers than there are."""
    refused(altered({"unet.r": 5}), "tensors of other names or shapes.*LoRA layers of rank 5")


@each("key", ["r", "lora_alpha", "target_modules"])
def test_a_setting_that_is_missing_is_refused(altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None], key: str) -> None:
    """Without it diffusers would guess."""
    refused(altered(without=f"unet.{key}"), "unsupported PEFT settings")


SETTINGS_BROKEN = {
    "none": {},
    "others": {"format": "pt"},
    "empty": {METADATA_KEY: ""},
    "half": {METADATA_KEY: "{"},
    "a list": {METADATA_KEY: "[]"},
    "null": {METADATA_KEY: "null"},
    "a text": {METADATA_KEY: '"r"'},
    "deep": {METADATA_KEY: "[" * 100_000},
    "another component's": {METADATA_KEY: '{"text_encoder.r": 4}'},
}


@each("metadata", SETTINGS_BROKEN)
def test_settings_that_cannot_be_read_are_refused(
    altered: Callable[..., Adapter], refused: Callable[[Adapter, str], None], metadata: dict[str, str]
) -> None:
    """Nor are they guessed from the layers."""
    refused(altered(instead=metadata), "unsupported PEFT settings")


@each("settings", [{"peft_version": "99.0"}, {"peft_version": None}, {"lora_alpha": 2}])
def test_settings_of_another_version_of_peft_are_fine(
    base: Base, altered: Callable[..., Adapter], fitted: Callable[..., Adapter], settings: dict[str, Any]
) -> None:
    """Where they are not used, or say the same in another way."""
    with applied(fitted("lora"), base):
        expected = output(base)
    with applied(altered({f"unet.{key}": value for key, value in settings.items()}), base):
        assert torch.equal(output(base), expected)


# Full weights that are rejected

FULL: dict[str, Change] = {
    "nothing": dict.clear,
    "one missing": removed("conv_in.weight"),
    "one more": set_to(surprise=torch.zeros(1)),
    "another name": lambda tensors: tensors.update({"conv_inn.weight": tensors.pop("conv_in.weight")}),
    "another shape": reshaped("conv_in.weight", lambda value: value[1:]),
    "as many numbers": reshaped("conv_in.weight", lambda value: value.flatten()),
    "one number for all": reshaped("conv_in.bias", lambda value: value[:1]),
}


@each("change", FULL)
def test_full_weights_that_do_not_fit_the_base_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], change: Change
) -> None:
    """By names and shapes alone, before anything is loaded."""
    wrong = changed(fitted("full").folder / FULL_FILE, change)
    refused(forge("full", {FULL_FILE: wrong}), rf"{WEIGHTS} holds tensors of other names or shapes")


@each("value", [torch.nan, torch.inf])
def test_full_weights_that_are_not_finite_are_refused(
    forge: Forge, fitted: Callable[..., Adapter], refused: Callable[[Adapter, str], None], value: float
) -> None:
    """By name, before anything is loaded."""
    wrong = changed(fitted("full").folder / FULL_FILE, reshaped("conv_out.bias", lambda tensor: torch.full_like(tensor, value)))
    refused(forge("full", {FULL_FILE: wrong}), r"conv_out\.bias in .* not finite")
