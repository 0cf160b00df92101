"""The environment of a process: what is set before a library is imported."""

from __future__ import annotations

import os

import psutil
import pytest

from imagic_lora.core.environment import wait_passively_on_busy_machine

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch):
    """Sets the load of two cores, both of which this process may use, and removes what the user may have set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    def load(*percent: float) -> None:
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: list(percent))

    return load


@pytest.mark.parametrize(("percent", "policy"), [((100, 0), "PASSIVE"), ((30, 30), "PASSIVE"), ((20, 20), None), ((0, 0, 100), None)])
def test_threads_wait_passively_beside_other_processes(cores, monkeypatch: pytest.MonkeyPatch, percent, policy) -> None:
    """From half a core on, over the cores of this process alone."""
    cores(*percent)
    monkeypatch.setenv("OMP_WAIT_POLICY", "later removed")  # so that monkeypatch restores what the call sets
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_passively_on_busy_machine()
    assert os.environ.pop("OMP_WAIT_POLICY", None) == policy


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_is_kept(cores, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Any setting of the threads means that nothing is decided."""
    cores(100, 100)
    monkeypatch.setenv(name, "2")
    wait_passively_on_busy_machine()
    assert [variable for variable in VARIABLES if variable in os.environ] == [name]
