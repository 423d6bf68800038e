"""Joules from NVML's counter, which is made up here, and none with a reason."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.eval.speed.energy import EnergyCounter
from speedstack.eval.speed.harness import race


def fake_nvml(**changes: Any) -> SimpleNamespace:
    readings = iter([1_000_000, 1_500_000, 1_750_000])
    functions: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(readings),
    }
    return SimpleNamespace(**(functions | changes))


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-abcd"))


def test_a_cpu_has_no_meter() -> None:
    with EnergyCounter("cpu") as counter:
        assert counter.joules() is None
        assert counter.description == "not counted: joules are those of an NVIDIA GPU, and this ran on cpu"


def test_nvml_counts_millijoules(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    nvml = fake_nvml(nvmlShutdown=lambda: asked.append("shutdown"))
    nvml.nvmlDeviceGetHandleByUUID = asked.append
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with EnergyCounter("cuda:0") as counter:  # opening it takes the first reading
        assert counter.joules() == 1500.0 and counter.joules() == 1750.0
        assert counter.description.startswith("NVML's energy counter")
    assert asked == ["GPU-1234-abcd", "shutdown"]


def test_what_cannot_be_counted_says_why(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    counter = EnergyCounter("cuda")
    assert counter.joules() is None
    assert (
        counter.description == "not counted: pynvml is not installed (pip install nvidia-ml-py, or speedstack[energy])"
    )
    asked: list[str] = []

    def unsupported(handle: object) -> int:
        raise Exception("Not Supported")  # what NVMLError derives from

    nvml = fake_nvml(nvmlDeviceGetTotalEnergyConsumption=unsupported, nvmlShutdown=lambda: asked.append("shutdown"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert EnergyCounter("cuda").description == "not counted: NVML: Not Supported" and asked == ["shutdown"]


def test_a_meter_that_fails_at_its_end_does_not_end_the_job(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise Exception("GPU is lost")  # what NVMLError derives from

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlShutdown=lost))
    with EnergyCounter("cuda") as counter:
        assert counter.joules() == 1500.0
    assert counter.description.startswith("NVML's energy counter")


def test_a_meter_that_fails_on_the_way_leaves_the_race_running(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening takes one of the three readings, the warm-up the others: the repeats find none."""
    closed: list[bool] = []
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlShutdown=lambda: closed.append(True)))
    one = Contestant("one", "", lambda prompt, n: Sample([1] * n, [(0.1, 1), (0.2, n - 1)], 0.3))
    with EnergyCounter("cuda") as counter:
        standings = race([one], {"a": [[1]]}, 2, num_repeats=2, energy=counter, progress=False)
        assert counter.description.startswith("not counted: the meter failed, joules are of the repeats before")
    assert not standings.unavailable and standings.overall[0].tokens_per_second.num_repeats == 2
    assert standings.overall[0].joules_per_token is None and closed == [True]
