"""Fixtures that run a test once for every instruction set."""

import pytest

from speedstack.runtime.backends.cpu.kernels.build import INSTRUCTION_SETS, VARIABLE, available_sets
from tests.runtime.backends.cpu.machines import Machine, find_machine


@pytest.fixture(params=list(INSTRUCTION_SETS))
def machine(request: pytest.FixtureRequest) -> Machine:
    return find_machine(request.param)


@pytest.fixture(params=available_sets())
def loaded_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set whose kernels are loaded from here on: each that this machine has."""
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)
