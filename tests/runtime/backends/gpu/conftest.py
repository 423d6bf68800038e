"""Fixtures that run a test of Triton kernels interpreted on a CPU, and compiled on a CUDA device."""

import pytest
import torch

from tests.devices import DEVICES
from tests.runtime.backends.gpu.launch import Launcher


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def launch(device: torch.device) -> Launcher:
    return Launcher(device)
