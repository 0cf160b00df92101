"""Untrusted bases: pickles under every name, code in the folders, hostile JSON, weights with false headers."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from imagic_lora.bases.loading.registry import architecture_of, load_base
from imagic_lora.core.config import RunConfig
from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.runtime import resolve_runtime
from imagic_lora.memory.prediction import predict

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = {part: f"{part}/config.json" for part in WEIGHTS} | {
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "index": "model_index.json",
}
MODULE = "imagic_canary"
_SECONDS, _BYTES = 5, 2**29

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """What is done to a copy of a good base.

    Args:
        harmless: True if it must still load, False if it must be rejected, None if both are accepted.
    """

    name: str
    change: Change
    harmless: bool | None = False


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    """A pickle that makes a folder."""
    return pickle.dumps({"state_dict": Canary(marker)}, protocol=2)


def code(marker: Path) -> str:
    """A module that makes a folder when it is imported."""
    return f"import os\n\nos.mkdir({str(marker)!r})\n\n\nclass X:\n    pass\n"


def torture(cases: int, seed: int, folder: Path) -> Iterator[str]:
    """Every case once, in an order of the seed, and then random changes of what the files say."""
    marker, chance = folder / "marker", random.Random(seed)
    good, copy = save_tiny(folder / "good"), folder / "case"
    kinds = known(folder, marker)
    for kind in kinds:
        chance.shuffle(kind)
    chosen = [case for row in zip_longest(*kinds) for case in row if case][:cases]
    chosen += [_random(chance, good, k) for k in range(cases - len(chosen))]
    _tried(Case("", lambda base: None, True), good, copy, marker)  # what is imported late is not on any case's clock
    sys.path.append(str(copy))
    try:
        for case in chosen:
            yield _tried(case, good, copy, marker)
    finally:
        sys.path.remove(str(copy))


def known(folder: Path, marker: Path) -> list[list[Case]]:
    """The cases that were thought of, by kind."""
    kinds = (_pickles(marker), _code(marker), _json(), _sizes(), _tokens(), _weights(), _ordinary(folder))
    return [list(kind) for kind in kinds]


def _tried(case: Case, good: Path, copy: Path, marker: Path) -> str:
    """The case's verdict."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    shutil.rmtree(marker, ignore_errors=True)
    case.change(copy)
    began, held = time.process_time(), _peak()  # the time of others does not count
    wrong = [_outcome(case, open_it, copy) for open_it in (_planned, _opened)]
    if marker.exists():
        wrong.append("something of it was run")
    if (took := time.process_time() - began) > _SECONDS:
        wrong.append(f"took {took:.1f} s")
    if (grown := _peak() - held) > _BYTES:
        wrong.append(f"took {grown >> 20} MiB")
    found = "; ".join(filter(None, wrong))
    return " ".join(f"{case.name}: {found}".split()) if found else ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _outcome(case: Case, open_it: Change, base: Path) -> str:
    try:
        open_it(base)
    except ImagicError as error:
        return f"refused ({error})" if case.harmless else ""
    except Exception as error:
        return f"{type(error).__name__} ({error})"
    return "not refused" if case.harmless is False and open_it is _opened else ""


def _planned(base: Path) -> None:
    predict(architecture_of(str(base)), RunConfig(base=str(base)))


def _opened(base: Path) -> None:
    """Opened and used once, since what opens has to work."""
    opened = load_base(str(base), resolve_runtime(MemoryConfig(device="cpu", dtype="fp32")))
    clean, times = torch.zeros(1, 4, 8, 8), opened.timesteps(torch.tensor([0.999]))
    with torch.no_grad():
        opened.predict(opened.noised(clean, clean, times), times, opened.encode_prompt("a cat"))
        opened.decode(opened.encode_image(torch.zeros(1, 3, 16, 16)))
    opened.pipeline("text2image")


def _put(file: str, content: bytes | str) -> Change:
    def change(base: Path) -> None:
        path = base / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def _set(part: str, **values: Any) -> Change:
    """Sets keys of a config; ``...`` removes one."""

    def change(base: Path) -> None:
        path = base / CONFIGS[part]
        found = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))

    return change


def _all(*changes: Change) -> Change:
    return lambda base: [change(base) for change in changes]


def _without(part: str) -> Change:
    return lambda base: (base / WEIGHTS[part]).unlink()


def _pickles(marker: Path) -> Iterator[Case]:
    sick = pickled(marker)
    for part, file in WEIGHTS.items():
        yield Case(f"a pickle as {file}", _put(file, sick))
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl", "weights.txt"):
            yield Case(f"a pickle next to good weights: {part}/{name}", _put(f"{part}/{name}", sick), True)
        bin_name = file.replace("model.safetensors", "model.bin") if part != "text_encoder" else "text_encoder/pytorch_model.bin"
        yield Case(f"a pickle instead of weights: {bin_name}", _all(_without(part), _put(bin_name, sick)))
        for target in (bin_name.split("/")[1], f"../{bin_name}", "/dev/stdin", "../../marker"):
            index = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": target}})
            planted = _all(_put(f"{file}.index.json", index), _put(bin_name, sick))
            yield Case(f"an index of shards next to good weights, to {target}: {part}", planted, True)
            yield Case(f"an index of shards alone, to {target}: {part}", _all(planted, _without(part)))
        shard = file.replace(".safetensors", "-00001-of-00001.safetensors")
        yield Case(f"a pickle as a shard: {part}", _all(_without(part), _put(shard, sick)))
        yield Case(f"a pickle as fp16: {part}", _all(_without(part), _put(file.replace(".safe", ".fp16.safe"), sick)))
    for file in CONFIGS.values():
        yield Case(f"a pickle as {file}", _put(file, sick))
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        yield Case(f"a pickle as tokenizer/{name}", _put(f"tokenizer/{name}", sick))
    for name in ("tokenizer.model", "tekken.json", "chat_template.jinja", "vocab.txt"):
        yield Case(f"a pickle next to a good tokenizer: {name}", _put(f"tokenizer/{name}", sick), True)
    for name in ("scheduler.bin", "../training_args.bin", "../optimizer.pt", "../safety_checker/pytorch_model.bin"):
        yield Case(f"a pickle: scheduler/{name}", _put(f"scheduler/{name}", sick), True)
    adapter = json.dumps({"base_model_name_or_path": "../unet", "peft_type": "LORA"})
    planted = _all(_put("text_encoder/adapter_config.json", adapter), _put("text_encoder/adapter_model.bin", sick))
    yield Case("an adapter next to the text encoder", planted, True)


def _code(marker: Path) -> Iterator[Case]:
    sick = code(marker)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        yield Case(f"code of its own for {part}", _all(_set("index", **{part: ["own", "X"]}), _put(f"{part}/own.py", sick)))
        yield Case(f"an importable module for {part}", _all(_set("index", **{part: [MODULE, "X"]}), _put(f"{MODULE}.py", sick)))
        for pair in (
            ["os", "system"],
            ["builtins", "eval"],
            ["diffusers", "DiffusionPipeline"],
            ["transformers", "AutoModel"],
            [None, None],
        ):
            yield Case(f"{pair} for {part}", _set("index", **{part: pair}))
        for value in ("unet", None, 1, [], ["diffusers"], {"a": 1}, [["diffusers"], ["X"]], ["diffusers", "../../X"]):
            yield Case(f"{value} for {part}", _set("index", **{part: value}))
    for part in ("safety_checker", "feature_extractor", "image_encoder"):
        planted = _all(_put(f"{part}/own.py", sick), _put(f"{MODULE}.py", sick))
        for module in ("own", MODULE):
            yield Case(f"{module} for {part}", _all(_set("index", **{part: [module, "X"]}), planted), True)
    for name in ("utils", "scheduling_ddim", "FlaxDDIMScheduler", "SchedulerMixin", "__builtins__", "no such"):
        yield Case(f"the scheduler {name}", _set("index", scheduler=["diffusers", name]))
    planted = _all(_put("own.py", sick), _put("pipeline.py", sick), _put(f"{MODULE}.py", sick))
    for value in (
        ["own", "X"],
        [MODULE, "X"],
        ["lpw_stable_diffusion", "X"],
        "own",
        None,
        3,
        {},
        "DiffusionPipeline",
        "StableDiffusionXLPipeline",
    ):
        yield Case(f"_class_name {value}", _all(_set("index", _class_name=value), planted))
    for name in ("custom_pipeline", "_name_or_path", "trust_remote_code", "modules"):
        yield Case(f"{name} in the index", _all(_set("index", **{name: "own"}), planted), name in ("_name_or_path", "trust_remote_code"))
    yield Case("an unknown component", _all(_set("index", extra=["own", "X"]), _put("extra/own.py", sick)))
    mapped = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "own.X"), "trust_remote_code": True}
    others = {"custom_pipelines": {}, "attn_implementation": f"own/{MODULE}", "_attn_implementation": "own/kernel", "is_remote_code": True}
    others |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}, "transformers_weights": "../own.bin"}
    others |= {"tokenizer_file": "/etc/passwd", "gguf_file": "../own.bin", "fast_tokenizer_files": ["../own.py"], "init_inputs": ["own"]}
    for part in CONFIGS:
        yield Case(f"auto_map in {part}", _all(_set(part, **mapped), _put(f"{part}/own.py", sick)), True if part != "index" else None)
        yield Case(f"keys of libraries in {part}", _all(_set(part, **others), planted))
    yield Case("keys of libraries in the map of special tokens", _put("tokenizer/special_tokens_map.json", json.dumps(others | mapped)))


def _json() -> Iterator[Case]:
    deep, digits = 100_000, "9" * 5000
    for part, file in CONFIGS.items():
        texts = {
            "empty": "", "a list": "[]", "null": "null", "a string": '"x"', "cut": '{"a": ', "twice": '{"a": 1, "a": 2}',
            "NaN": '{"a": NaN}', "infinity": '{"a": -Infinity}', "1e999": '{"a": 1e999}', "many digits": f'{{"a": {digits}}}',
            "zeros": "\0" * 100, "deep": '{"a": ' + "[" * deep + "]" * deep + "}", "deep objects": '{"a": ' * deep + "1" + "}" * deep,
            "mark": '\ufeff{"a": 1}', "huge": '{"a": "' + "x" * 2**20 + '"}', "many": '{"a": [' + "[]," * 2**19 + "1]}",
        }  # fmt: skip
        for name, text in texts.items():
            wanted = None if part == "tokenizer" and name == "huge" else False  # its files may be longer
            yield Case(f"{name} as {file}", _put(file, text), wanted)
        yield Case(f"UTF-16 as {file}", _put(file, "{}".encode("utf-16")))
        for name, target in {"/dev/zero": "/dev/zero", "nothing": "nothing", "itself": Path(file).name, "a folder": ".."}.items():
            wanted = None if part == "tokenizer" else False  # as good as none at all
            yield Case(f"a link to {name} as {file}", _replaced(file, lambda path, target=target: path.symlink_to(target)), wanted)
        yield Case(f"a pipe as {file}", _replaced(file, os.mkfifo))
        yield Case(f"a folder as {file}", _replaced(file, Path.mkdir))
        yield Case(f"no {file}", _replaced(file, lambda path: None), None if part == "tokenizer" else False)
        yield Case(f"nested in {part}", _set(part, nested=json.loads("[" * 60 + "1" + "]" * 60)), None)
        yield Case(f"a long key in {part}", _set(part, **{"\x1b[2J" * 10_000: 2**40}), None)


def _replaced(file: str, make: Callable[[Path], object]) -> Change:
    def change(base: Path) -> None:
        (base / file).unlink()
        make(base / file)

    return change


ODD = (
    0,
    -1,
    -(10**12),
    10**6,
    10**9,
    10**30,
    0.5,
    -1.5,
    1e300,
    True,
    None,
    "",
    "8",
    [],
    [0],
    [-1, -1],
    [10**6] * 4,
    [[8], [8]],
    ["x"] * 2,
    {},
    {"a": 1},
)
"""Of a size, what is no size."""


def _sizes() -> Iterator[Case]:
    sizes = {
        "unet": ("sample_size", "in_channels", "out_channels", "layers_per_block", "block_out_channels", "cross_attention_dim"),
        "vae": ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor", "sample_size"),
        "text_encoder": ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    }
    for part, names in sizes.items():
        for name in names:
            for value in ODD:
                fine = (name, value) in (("scaling_factor", 10**6), ("scaling_factor", 0.5), ("scaling_factor", 1e300))
                yield Case(f"{part}.{name} = {value}", _set(part, **{name: value}), None if fine or name == "sample_size" else False)
    others = {
        "unet": ("attention_head_dim", "norm_num_groups", "transformer_layers_per_block", "time_embedding_dim", "class_embed_type",
                 "num_class_embeds", "act_fn", "down_block_types", "up_block_types", "mid_block_type", "dropout", "conv_in_kernel",
                 "encoder_hid_dim", "time_cond_proj_dim", "resnet_out_scale_factor", "use_linear_projection", "_use_default_values",
                 "_diffusers_version", "_class_name", "addition_embed_type", "num_attention_heads", "flip_sin_to_cos", "norm_eps"),
        "vae": ("down_block_types", "up_block_types", "in_channels", "out_channels", "norm_num_groups", "act_fn", "shift_factor",
                "latents_mean", "use_quant_conv", "mid_block_add_attention", "_class_name"),
        "text_encoder": ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id", "pad_token_id", "attention_dropout"),
        "scheduler": ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "clip_sample",
                      "timestep_spacing", "steps_offset", "thresholding", "rescale_betas_zero_snr", "_class_name"),
        "tokenizer": ("model_max_length", "bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder", "padding_side",
                      "additional_special_tokens", "extra_special_tokens", "tokenizer_class", "errors", "clean_up_tokenization_spaces"),
    }  # fmt: skip
    for part, names in others.items():
        for name in names:
            for value in (*ODD, "x" * 1000, ["X"] * 2, ["CrossAttnDownBlock2D"] * 10**4):
                yield Case(f"{part}.{name} = {str(value)[:80]}", _set(part, **{name: value}), None)
    blocks = {"block_out_channels": [8] * 6, "layers_per_block": 4, "transformer_layers_per_block": 2, "norm_num_groups": 4}
    blocks |= {"down_block_types": ["CrossAttnDownBlock2D"] * 6, "up_block_types": ["CrossAttnUpBlock2D"] * 6}
    yield Case("as many layers as may be", _set("unet", **blocks))
    yield Case("as wide as may be", _set("unet", **blocks | {"block_out_channels": [2**20] * 6}))
    yield Case("as long a text encoder as may be", _set("text_encoder", num_hidden_layers=64, hidden_size=2**20, vocab_size=2**20))


def _tokens() -> Iterator[Case]:
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    plain = {"vocab.json": json.dumps(words), "merges.txt": "#version: 0.2\n"}
    for name, files in {
        "plain": plain,
        "merges of nothing": plain | {"merges.txt": "x y\nz z</w>\n"},
        "merges that are none": plain | {"merges.txt": "\n \n\0\na b c d\n"},
        "a huge merge": plain | {"merges.txt": "x" * 10**6 + " y\n"},
        "no merges": {"vocab.json": plain["vocab.json"]},
        "negative ids": plain | {"vocab.json": json.dumps(words | {"b": -5})},
        "huge ids": plain | {"vocab.json": json.dumps(words | {"b": 2**31})},
        "larger ids": plain | {"vocab.json": json.dumps(words | {"b": 10**30})},
        "ids of words": plain | {"vocab.json": json.dumps(words | {"b": "c"})},
        "equal ids": plain | {"vocab.json": json.dumps(dict.fromkeys(words, 1))},
        "an id outside": plain | {"vocab.json": json.dumps(words | {"b": 54})},
        "no begin": plain | {"vocab.json": json.dumps({"a": 0})},
        "an empty vocabulary": plain | {"vocab.json": "{}"},
        "many added tokens": plain | {"added_tokens.json": json.dumps({f"t{k}": k for k in range(3000)})},
        "odd added tokens": plain | {"added_tokens.json": json.dumps({"": 3, "x": "y", "z": [1]})},
        "nothing": {},
    }.items():
        wanted = {"plain": True, "no merges": None, "equal ids": None, "merges that are none": None, "huge ids": False}
        change = _all(
            lambda base: (base / "tokenizer/tokenizer.json").unlink(), *(_put(f"tokenizer/{file}", text) for file, text in files.items())
        )
        yield Case(f"a tokenizer with {name}", change, wanted.get(name))
    yield Case("many lists in tokenizer.json", _put("tokenizer/tokenizer.json", '{"a": [' + "[]," * 2_700_000 + "1]}"))
    for name in ("model", "added_tokens", "post_processor", "normalizer", "padding", "truncation", "version"):
        for value in (
            None,
            1,
            [],
            {},
            "x",
            {"type": "BPE"},
            {"type": "Precompiled", "precompiled_charsmap": "x"},
            [{"id": 10**9, "content": "x"}],
        ):
            yield Case(f"{name} = {value} in tokenizer.json", _edited("tokenizer/tokenizer.json", name, value), None)


def _edited(file: str, name: str, value: Any) -> Change:
    def change(base: Path) -> None:
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | {name: value}))

    return change


def _changed(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Rewrites the weights of a component."""

    def rewrite(base: Path) -> None:
        found = load_file(base / WEIGHTS[part])
        change(found)
        save_file(found, base / WEIGHTS[part])

    return rewrite


def _bytes(part: str, change: Callable[[bytes], bytes]) -> Change:
    def rewrite(base: Path) -> None:
        (base / WEIGHTS[part]).write_bytes(change((base / WEIGHTS[part]).read_bytes()))

    return rewrite


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def rewrite(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return rewrite


def _weights() -> Iterator[Case]:
    names = {"unet": "conv_in.weight", "vae": "decoder.conv_in.weight", "text_encoder": "final_layer_norm.weight"}
    for part, name in names.items():
        for value in (float("nan"), float("inf"), float("-inf")):
            yield Case(f"{value} in {part}", _changed(part, lambda found, name=name, value=value: found[name].view(-1)[-1:].fill_(value)))
        for dtype in (torch.int8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64):
            converted = _changed(part, lambda found, name=name, dtype=dtype: found.update({name: found[name].to(dtype)}))
            yield Case(f"{dtype} in {part}", converted, dtype.is_floating_point)
        yield Case(f"a tensor missing in {part}", _changed(part, lambda found, name=name: found.pop(name)))
        yield Case(f"no tensors in {part}", _changed(part, lambda found: found.clear()))
        yield Case(f"one more tensor in {part}", _changed(part, lambda found: found.update(more=torch.ones(3))))
        yield Case(f"another name in {part}", _changed(part, lambda found, name=name: found.update(more=found.pop(name))))
        yield Case(f"another shape in {part}", _changed(part, lambda found, name=name: found.update({name: found[name].flatten()[None]})))
        yield Case(f"a tensor of nothing in {part}", _changed(part, lambda found, name=name: found.update({name: torch.empty(0, 5)})))
        for size in (0, 7, 8, 100, -1, -1000):
            yield Case(f"{part} cut at {size}", _bytes(part, lambda content, size=size: content[:size]))
        yield Case(f"{part} is longer", _bytes(part, lambda content: content + b"\0" * 100))
        for size in (0, 1, 2**31, 2**63, 2**64 - 1):
            yield Case(f"{part} has a header of {size}", _bytes(part, lambda content, size=size: struct.pack("<Q", size) + content[8:]))
        for key, value in {"shape": [10**9, 10**9], "dtype": "X", "data_offsets": [0, 2**62]}.items():
            forged_header = _header(lambda header, name=name, key=key, value=value: header[name].update({key: value}))
            yield Case(f"{part} says {key} {value}", _bytes(part, forged_header))
        for value in ([2**32, 2**32], [-1], [0], [], "x", None):
            forged_header = _header(lambda header, name=name, value=value: header[name].update(shape=value))
            yield Case(f"{part} says shape {value}", _bytes(part, forged_header))
        for target in ("/dev/zero", "nothing"):
            yield Case(f"a link to {target} as {part}", _replaced(WEIGHTS[part], lambda path, target=target: path.symlink_to(target)))
        yield Case(f"a pipe as {part}", _replaced(WEIGHTS[part], os.mkfifo))
        yield Case(f"a shard missing in {part}", _all(_sharded(part), lambda base, part=part: next(_shards(base, part)).unlink()))
        yield Case(f"a shard twice in {part}", _all(_sharded(part), _twice(part)))
    many = {f"{k:09}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(70_000)}
    yield Case("a header of many tensors", _bytes("unet", _header(lambda header: header.update(many))))
    yield Case("a file with holes, and a config to match", _holes)


def _shards(base: Path, part: str) -> Iterator[Path]:
    return (base / part).glob("*-of-*.safetensors")


def _sharded(part: str) -> Change:
    def change(base: Path) -> None:
        whole = base / WEIGHTS[part]
        found = sorted(load_file(whole).items())
        whole.unlink()
        for k, half in enumerate((found[::2], found[1::2])):
            save_file(dict(half), whole.with_name(f"{whole.stem}-0000{k + 1}-of-00002.safetensors"))

    return change


def _twice(part: str) -> Change:
    def change(base: Path) -> None:
        one = next(_shards(base, part))
        shutil.copy(one, one.with_name(one.name.replace("of-00002", "of-00003")))

    return change


def _holes(base: Path) -> None:
    """A terabyte of weights that take no place on the disk."""
    _set("text_encoder", vocab_size=2**20, hidden_size=2**18)(base)
    header = json.dumps(
        {"embeddings.token_embedding.weight": {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}}
    ).encode()
    with (base / WEIGHTS["text_encoder"]).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**40)


def _ordinary(folder: Path) -> Iterator[Case]:
    yield Case("as it was", lambda base: None, True)
    for part in WEIGHTS:
        for dtype in (torch.float16, torch.bfloat16):
            half = _changed(part, lambda found, dtype=dtype: found.update({name: value.to(dtype) for name, value in found.items()}))
            yield Case(f"{part} in {dtype}", half, True)
        yield Case(
            f"{part} as fp16", lambda base, part=part: (base / WEIGHTS[part]).rename(base / WEIGHTS[part].replace(".s", ".fp16.s")), True
        )
        yield Case(f"{part} in shards", _sharded(part), True)
    positions = _changed("text_encoder", lambda found: found.update({"embeddings.position_ids": torch.arange(16)[None]}))
    yield Case("position ids", positions, True)
    yield Case("prefixed names", _changed("text_encoder", _prefixed), True)
    yield Case("old names of attention", _changed("vae", _aged), True)
    yield Case("the published index", _set("index", **PUBLISHED_INDEX), True)
    yield Case("the cache of the hub", _cached(folder / "blobs"), True)


PUBLISHED_INDEX = {
    "_diffusers_version": "0.6.0",
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
}


def _prefixed(found: dict[str, torch.Tensor]) -> None:
    """As files of Stable Diffusion 1.5 have it."""
    for name in list(found):
        found[f"text_model.{name}"] = found.pop(name)


def _aged(found: dict[str, torch.Tensor]) -> None:
    """As the VAE of Stable Diffusion 1.5 has it."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(found):
        for new, was in old.items():
            if f".attentions.0.{new}." in name:
                found[name.replace(new, was)] = found.pop(name)


def _cached(blobs: Path) -> Change:
    """Files elsewhere, and links to them."""

    def change(base: Path) -> None:
        shutil.rmtree(blobs, ignore_errors=True)
        blobs.mkdir()
        for k, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
            shutil.move(path, blobs / str(k))
            path.symlink_to(os.path.relpath(blobs / str(k), path.parent))

    return change


def _random(chance: random.Random, good: Path, k: int) -> Case:
    """One value of one JSON file is another, or some bytes of a file of weights are."""
    if chance.random() < 0.3:
        part, place, new = chance.choice(list(WEIGHTS)), chance.random(), chance.randbytes(chance.choice((1, 4)))

        def flip(content: bytes) -> bytes:
            header = 8 + struct.unpack("<Q", content[:8])[0]
            at = int(place * header)
            return content[:at] + new + content[at + len(new) :]

        return Case(f"random {k}: {new!r} at {place} of the header of {part}", _bytes(part, flip), None)
    file = chance.choice([*CONFIGS.values(), "tokenizer/tokenizer.json"])
    found = json.loads((good / file).read_text())
    inside: Any = found
    while isinstance(inside, (dict, list)) and inside:
        holder, key = inside, chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        inside = holder[key]
        if chance.random() < 0.2:
            break
    holder[key] = value = chance.choice((*ODD, chance.choice("abc"), chance.uniform(-2, 2), chance.randrange(20)))
    return Case(f"random {k}: {key} = {value} in {file}", _put(file, json.dumps(found)), None)
