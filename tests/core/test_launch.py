"""The environment of a launcher: complete, or absent, or rejected by name."""

from __future__ import annotations

import os

import pytest
from common import each

from imagic_lora.core.errors import ImagicError, ImagicWarning
from imagic_lora.core.launch import Launch, launched_settings, read_launch

COMPLETE = {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher is set, wherever the tests run."""
    for name in list(os.environ):
        if name in COMPLETE or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


def given(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@each(
    "variables, launch",
    [
        ({}, Launch()),
        (COMPLETE, Launch(3, 2, 1)),
        ({"WORLD_SIZE": ""}, Launch()),
        (COMPLETE | {"WORLD_SIZE": ""}, Launch()),
        (COMPLETE | {"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "7", "LOCAL_RANK": "nothing"}, Launch()),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "OMPI_COMM_WORLD_SIZE": "2"}, Launch()),
    ],
)
def test_the_processes_of_a_launcher_are_read(variables: dict[str, str], launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is not set. Without a WORLD_SIZE above 1 there is one process, whatever RANK says."""
    given(monkeypatch, **variables)
    assert read_launch() == launch


@each(
    "changes, got",
    [
        ({"RANK": None, "MASTER_ADDR": None}, "WORLD_SIZE is 3, but RANK, MASTER_ADDR are not set"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 3, but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number from 1"),
        ({"RANK": "3"}, "RANK is '3', not a number from 0 to 2"),
        ({"RANK": "-1"}, "RANK is '-1', not a number from 0 to 2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number from 0 to 2"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', not a number from 1 to 65535"),
    ],
)
def test_half_a_launcher_is_refused_by_name(changes: dict[str, str | None], got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing or wrong, and how to start one process or several."""
    given(monkeypatch, **(COMPLETE | changes))
    with pytest.raises(ImagicError) as caught:
        read_launch()
    assert caught.value.got.startswith(got)
    assert "unset WORLD_SIZE" in caught.value.remedy


@each(
    "variables, settings",
    [
        ({}, {}),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, {"device": "cpu"}),
        ({"ACCELERATE_USE_CPU": "on", "ACCELERATE_MIXED_PRECISION": "BF16"}, {"device": "cpu", "dtype": "bf16"}),
        ({"ACCELERATE_USE_CPU": "f", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "false"}, {"dtype": "fp16"}),
        ({"ACCELERATE_USE_CPU": "", "ACCELERATE_MIXED_PRECISION": ""}, {}),
    ],
)
def test_settings_of_accelerate_are_honoured(variables: dict[str, str], settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and precision, in every spelling that accelerate accepts."""
    given(monkeypatch, **variables)
    assert launched_settings() == settings


@each(
    "name, value, why",
    [
        ("ACCELERATE_USE_CPU", "maybe", "ACCELERATE_USE_CPU is 'maybe'"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "ACCELERATE_MIXED_PRECISION is 'fp8'"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED is set"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP is set"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "ACCELERATE_USE_MEGATRON_LM is set"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "ACCELERATE_USE_PARALLELISM_CONFIG is set"),
    ],
)
def test_what_a_fit_cannot_do_is_refused_by_name(name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a fit in another precision, or with another memory, than accelerate was told."""
    given(monkeypatch, **{name: value})
    with pytest.raises(ImagicError, match=why):
        launched_settings()


def test_a_compiler_without_effect_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change the speed only, so the fit goes on."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.warns(ImagicWarning, match="INDUCTOR has no effect"):
        assert launched_settings() == {}
