"""Where a run happens, and noise that is a function of its key."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from common import each

from imagic_lora.core.device_config import MemoryConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.noise import noise_at, times_at
from imagic_lora.core.runtime import Processes, peak_memory, resolve_runtime

KEY: dict[str, Any] = {"seed": 3, "stage": "embed", "step": 5, "samples": [2]}
CHANGES = [{"seed": 4}, {"stage": "tune"}, {"step": 6}, {"samples": [3]}]


def noise(**changes: Any) -> torch.Tensor:
    """The noise of :data:`KEY` with changes, ``[samples, 4, 8, 8]``."""
    return noise_at(**(KEY | changes), shape=(4, 8, 8))


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA, wherever the tests run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with one CUDA card, of the compute capability given as the parameter, 8.0 without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test Card 9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: getattr(request, "param", (8, 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**34))


def test_noise_is_a_function_of_its_key_alone() -> None:
    """Drawn again, whatever was drawn in between, it is the same, and the global generator is left alone."""
    first, state = noise(), torch.get_rng_state()
    noise(step=9)
    assert torch.equal(noise(), first)
    assert torch.equal(torch.get_rng_state(), state)


@each("change", CHANGES)
def test_noise_differs_with_every_part_of_its_key(change: dict[str, Any]) -> None:
    """No part of the key is ignored: not one element agrees."""
    assert not (noise(**change) == noise()).any()


def test_one_batch_of_four_is_two_of_two() -> None:
    """A sample's noise does not depend on its neighbours."""
    assert torch.equal(noise(samples=range(4)), torch.cat([noise(samples=[0, 1]), noise(samples=[2, 3])]))


def test_noise_is_standard_normal() -> None:
    """The distribution of 65536 draws passes Kolmogorov and Smirnov at one in a thousand."""
    drawn = noise_at(0, "embed", 0, range(64), (4, 16, 16)).double().flatten().sort().values
    empirical = (torch.arange(drawn.numel(), dtype=torch.float64) + 0.5) / drawn.numel()
    assert (torch.special.ndtr(drawn) - empirical).abs().max() < 1.95 / drawn.numel() ** 0.5


def test_noise_of_neighbouring_keys_is_uncorrelated() -> None:
    """Correlations of 32 samples over two steps are within five standard errors of none."""
    drawn = torch.cat([noise_at(0, "embed", step, range(16), (4096,)) for step in (0, 1)]).double()
    assert (torch.corrcoef(drawn) - torch.eye(32)).abs().max() < 5 / 4096**0.5


@each("total", [1, 4, 7])
@each("step", [0, 1, 123])
def test_stratified_times_have_one_in_each_part(total: int, step: int) -> None:
    """Sample k of the batch is in the k-th of ``total`` equal parts of [0, 1)."""
    times = times_at(0, "tune", step, range(total), total, "stratified")
    assert times.dtype == torch.float64
    assert (times * total).floor().tolist() == list(range(total))


@each("steps", [8, 21, 54, 300])
@each("seed", [0, 1, 2])
def test_stratified_times_of_a_batch_of_one_cover_the_range(steps: int, seed: int) -> None:
    """N steps hit every one of N/2 equal bins: the widest gap of a golden rotation is below 2/N."""
    times = torch.cat([times_at(seed, "embed", step, [0], 1, "stratified") for step in range(steps)])
    assert torch.bincount((times * (steps // 2)).long(), minlength=steps // 2).min() >= 1
    assert 0 <= times.min() <= times.max() < 1


def test_uniform_times_are_uniform() -> None:
    """The distribution of 4096 draws passes Kolmogorov and Smirnov at one in a thousand."""
    times = torch.cat([times_at(0, "tune", step, range(8), 8, "uniform") for step in range(512)]).sort().values
    empirical = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    assert 0 <= times[0] <= times[-1] < 1
    assert (times - empirical).abs().max() < 1.95 / 4096**0.5


@each("change", CHANGES)
@each("kind", ["stratified", "uniform"])
def test_times_are_a_function_of_their_key_and_of_all_of_it(kind: Any, change: dict[str, Any]) -> None:
    """The same key gives the same times, another key others."""
    first = times_at(**KEY, total=4, kind=kind)
    assert torch.equal(times_at(**KEY, total=4, kind=kind), first)
    assert not torch.equal(times_at(**(KEY | change), total=4, kind=kind), first)


@each("kind", ["stratified", "uniform"])
def test_two_processes_draw_what_one_would(kind: Any) -> None:
    """Samples, noise and times of two processes with 2 each are those of one with 4."""
    two: list[Any] = [SimpleNamespace(num_processes=2, process_index=rank) for rank in (0, 1)]
    shares = [Processes(state).samples(2) for state in two]
    assert [k for share in shares for k in share] == list(Processes().samples(4))
    assert torch.equal(torch.cat([noise(samples=share) for share in shares]), noise(samples=range(4)))
    times = [times_at(0, "tune", 7, share, 4, kind) for share in shares]
    assert torch.equal(torch.cat(times), times_at(0, "tune", 7, range(4), 4, kind))


def test_a_single_process_writes_and_averages_nothing() -> None:
    """Without a launcher there is one process, the main one, whose mean is itself."""
    processes, tensor = Processes(), torch.arange(3.0)
    processes.average([tensor])
    assert (processes.count, processes.rank, processes.main, list(processes.samples(3))) == (1, 0, True, [0, 1, 2])
    assert tensor.tolist() == [0, 1, 2]


def test_only_the_first_process_is_the_main_one() -> None:
    """Of two, the second does not write."""
    states: list[Any] = [SimpleNamespace(num_processes=2, process_index=rank) for rank in (0, 1)]
    assert [Processes(state).main for state in states] == [True, False]


@pytest.mark.usefixtures("without_cuda")
def test_auto_without_cuda_is_plain_and_says_why() -> None:
    """The CPU, fp32, Adam in 32 bits and PyTorch's attention, each with its reason, and no lever pulled."""
    runtime = resolve_runtime(MemoryConfig())
    assert (runtime.device, runtime.dtype, runtime.optimizer) == (torch.device("cpu"), torch.float32, "adam")
    assert runtime.memory == MemoryConfig()
    assert runtime.reasons == {
        "device": "cpu (no CUDA device found)",
        "precision": "float32 (exact, and fast enough on a CPU)",
        "attention": "sdpa (built into PyTorch)",
        "optimizer": "adam (8-bit states are not needed on the CPU)",
        "memory levers": "none",
    }


@pytest.mark.parametrize(("with_cuda", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")], indirect=["with_cuda"])
def test_auto_with_cuda_takes_the_precision_that_the_card_has(with_cuda: None, dtype: str) -> None:
    """bfloat16 from compute capability 8.0, float16 below, with 8-bit Adam on either."""
    runtime = resolve_runtime(MemoryConfig())
    assert (runtime.device, runtime.dtype, runtime.optimizer) == (torch.device("cuda", 0), getattr(torch, dtype), "adam8bit")
    assert runtime.reasons["device"] == "cuda:0 (Test Card 9)"
    assert runtime.reasons["precision"].startswith(dtype)


@pytest.mark.usefixtures("with_cuda")
@each("asked, dtype", [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
@each("optimizer", ["adam", "adam8bit"])
@each("device", ["cpu", "cuda"])
def test_what_is_asked_for_is_done_and_said(device: Any, asked: Any, dtype: torch.dtype, optimizer: Any) -> None:
    """An explicit setting beats whatever auto would have chosen, on either device."""
    runtime = resolve_runtime(MemoryConfig(device=device, dtype=asked, optimizer=optimizer))
    assert (runtime.device.type, runtime.dtype, runtime.optimizer) == (device, dtype, optimizer)
    assert runtime.reasons["precision"].endswith("(asked for)")
    assert runtime.reasons["optimizer"] == f"{optimizer} (asked for)"


PULLED: list[tuple[dict[str, Any], str]] = [
    ({"gradient_checkpointing": True}, "gradient checkpointing"),
    ({"optimizer_in_backward": True}, "optimizer in backward"),
    ({"vae_tiling": True}, "vae tiling"),
    ({"vae_slicing": True}, "vae slicing"),
    ({"autocast_cache": True}, "autocast cache"),
    ({"idle": "offload"}, "offload idle components"),
    ({"idle": "release"}, "release idle components"),
    ({"master_weights": "bf16-stochastic"}, "bf16-stochastic master weights"),
    ({"quantize": "nf4"}, "nf4 base"),
    ({"quantize_text": "nf4"}, "nf4 text encoders"),
    (
        {"gradient_checkpointing": True, "vae_slicing": True, "idle": "release"},
        "gradient checkpointing, vae slicing, release idle components",
    ),
]


@pytest.mark.usefixtures("with_cuda")
@each("levers, said", PULLED)
def test_every_lever_that_is_pulled_is_kept_and_said(levers: dict[str, Any], said: str) -> None:
    """By its own words, and no other lever with it."""
    runtime = resolve_runtime(MemoryConfig(**levers))
    assert runtime.memory == MemoryConfig(**levers)
    assert runtime.reasons["memory levers"] == said


def test_every_lever_has_its_words() -> None:
    """The cases above are all the settings but those with a reason of their own."""
    explained = {"device", "dtype", "attention", "optimizer"}
    assert {name for levers, _ in PULLED for name in levers} == set(MemoryConfig.model_fields) - explained


@pytest.mark.usefixtures("without_cuda")
@each("flag", [{"device": "cuda"}, {"attention": "xformers"}, {"idle": "offload"}])
def test_what_needs_cuda_is_refused_without_it(flag: dict[str, Any]) -> None:
    """The error names the flag and CUDA."""
    with pytest.raises(ImagicError, match=rf"--{next(iter(flag))} {next(iter(flag.values()))}.*CUDA"):
        resolve_runtime(MemoryConfig(**flag))


@pytest.mark.usefixtures("with_cuda")
@each("flag", [{"attention": "xformers"}, {"idle": "offload"}])
def test_what_needs_cuda_is_refused_on_a_cpu_of_a_machine_with_a_card(flag: dict[str, Any]) -> None:
    """It comes down to the device that is used."""
    with pytest.raises(ImagicError, match="without CUDA"):
        resolve_runtime(MemoryConfig(device="cpu", **flag))


@pytest.mark.usefixtures("with_cuda")
@each("there", [True, False])
def test_xformers_is_taken_only_where_it_is_installed(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA it comes down to the package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if there else None)
    if there:
        assert resolve_runtime(MemoryConfig(attention="xformers")).reasons["attention"] == "xformers (asked for)"
    else:
        with pytest.raises(ImagicError, match="not installed"):
            resolve_runtime(MemoryConfig(attention="xformers"))


@pytest.mark.parametrize(
    ("with_cuda", "asked"),
    [((8, 0), {"dtype": "fp16"}), ((8, 0), {"dtype": "fp32"}), ((8, 0), {"device": "cpu"}), ((7, 5), {})],
    indirect=["with_cuda"],
)
def test_stochastic_weights_are_refused_without_bf16_arithmetic(with_cuda: None, asked: dict[str, Any]) -> None:
    """Be it asked for, that of the CPU, or all that the card has; the error says which it is."""
    came_to = resolve_runtime(MemoryConfig(**asked)).reasons["precision"].split()[0]
    with pytest.raises(ImagicError, match=f"--master-weights bf16-stochastic with arithmetic in {came_to}"):
        resolve_runtime(MemoryConfig(master_weights="bf16-stochastic", **asked))


@pytest.mark.usefixtures("with_cuda")
@each("asked", [{}, {"device": "cpu", "dtype": "bf16"}])
def test_stochastic_weights_are_taken_with_bf16_arithmetic(asked: dict[str, Any]) -> None:
    """On a card that has it without asking, on a CPU by asking."""
    runtime = resolve_runtime(MemoryConfig(master_weights="bf16-stochastic", **asked))
    assert (runtime.dtype, runtime.memory.master_weights) == (torch.bfloat16, "bf16-stochastic")


@pytest.mark.usefixtures("with_cuda")
@each(
    "device, asked, taken",
    [("cuda", "auto", "adam8bit"), ("cpu", "auto", "adam"), ("cuda", "adam", "adam"), ("cpu", "adam8bit", "adam8bit")],
)
def test_the_automatic_optimiser_has_8_bits_on_cuda_only(device: Any, asked: Any, taken: str) -> None:
    """auto follows the device; a name is taken as it is."""
    assert resolve_runtime(MemoryConfig(device=device, optimizer=asked)).optimizer == taken


@pytest.mark.usefixtures("with_cuda")
@each(
    "asked, remedy",
    [
        ({"optimizer": "adam8bit"}, "--optimizer adam"),
        ({"device": "cpu", "optimizer": "adam8bit"}, "--optimizer adam"),
        ({"optimizer": "adam", "quantize": "nf4"}, "--quantize none"),
        ({"quantize": "nf4"}, "--quantize none"),
    ],
)
def test_what_needs_bitsandbytes_is_refused_where_it_cannot_be_imported(
    asked: dict[str, Any], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names what would do without, and that does."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImagicError, match="bitsandbytes cannot be imported") as caught:
        resolve_runtime(MemoryConfig(**asked))
    assert caught.value.got.startswith("nf4" if "quantize" in remedy else "adam8bit")
    assert caught.value.remedy.endswith(f"or use {remedy}")
    name, value = remedy.removeprefix("--").split()
    assert resolve_runtime(MemoryConfig(**(asked | {name: value}))).optimizer == "adam"


@pytest.mark.usefixtures("with_cuda")
def test_the_automatic_optimiser_does_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam in 32 bits then, and the reason is said."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    runtime = resolve_runtime(MemoryConfig())
    assert runtime.optimizer == "adam"
    assert "bitsandbytes" in runtime.reasons["optimizer"]


def test_the_peak_on_the_cpu_is_in_bytes() -> None:
    """It is no less than what the process holds now, and no more than the machine has."""
    now = psutil.Process().memory_info().rss
    assert 0.9 * now <= peak_memory(torch.device("cpu")) <= psutil.virtual_memory().total
