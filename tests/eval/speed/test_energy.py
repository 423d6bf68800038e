"""Joules from NVML's counter or nvidia-smi's power, both made up here, and none with a reason."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speedstack.eval.speed import energy
from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.eval.speed.energy import EnergyCounter, SmiMeter
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


def write_smi(directory: Path, *lines: str, then: str = "sleep 5") -> Path:
    file = directory / "nvidia-smi"
    file.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exec {then}\n")
    file.chmod(0o755)
    return file


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


def test_without_bindings_nvidia_smi_is_followed(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_smi(tmp_path, "100.0", "[N/A]")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with EnergyCounter("cuda") as counter:
        started, first = time.perf_counter(), counter.joules()
        time.sleep(0.05)
        last, seconds = counter.joules(), time.perf_counter() - started
        assert first is not None and last is not None
        # 100 watts all the time; the clock here and there are read microseconds apart.
        assert last - first == pytest.approx(100.0 * seconds, abs=1.0)
        assert counter.description.startswith("nvidia-smi's power.draw.instant of the GPU")


def test_a_driver_without_the_power_of_the_moment_gives_its_mean(
    a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nvidia-smi"
    refusal = 'Field "power.draw.instant" is not a valid field to query.'
    file.write_text(f"#!/bin/sh\ncase $1 in *instant) echo '{refusal}';; *) echo 70.0; exec sleep 5;; esac\n")
    file.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with EnergyCounter("cuda") as counter:
        assert counter.description.startswith("nvidia-smi's power.draw of the GPU")


def test_what_cannot_be_counted_says_why(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    counter = EnergyCounter("cuda")
    assert counter.joules() is None
    assert counter.description == (
        "not counted: pynvml is not installed (pip install nvidia-ml-py), and there is no nvidia-smi"
    )

    def unsupported(handle: object) -> int:
        raise Exception("Not Supported")  # what NVMLError derives from

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetTotalEnergyConsumption=unsupported))
    assert EnergyCounter("cuda").description == "not counted: NVML: Not Supported, and there is no nvidia-smi"
    write_smi(tmp_path, "[N/A]")
    assert (
        EnergyCounter("cuda").description == "not counted: NVML: Not Supported; nvidia-smi printed '[N/A]' as its power"
    )


def test_a_driver_that_hangs_is_not_waited_for(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints nothing, and does not end when it is asked to."""
    file = tmp_path / "nvidia-smi"
    file.write_text(
        f"#!{sys.executable}\nimport signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n"
    )
    file.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(energy, "FIRST_SAMPLE_SECONDS", 0.3)
    monkeypatch.setattr(energy, "CLOSE_SECONDS", 0.2)
    started = time.perf_counter()
    assert EnergyCounter("cuda").description.endswith("nvidia-smi printed nothing in 0.3 s")
    assert time.perf_counter() - started < 20


def test_a_meter_that_fails_at_its_end_does_not_end_the_job(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise Exception("GPU is lost")  # what NVMLError derives from

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlShutdown=lost))
    with EnergyCounter("cuda") as counter:
        assert counter.joules() == 1500.0
    assert counter.description.startswith("NVML's energy counter")


def test_a_meter_that_dies_is_an_error(tmp_path: Path) -> None:
    meter = SmiMeter("GPU-1", str(write_smi(tmp_path, "50.0", then="true")))
    meter._process.wait()
    with pytest.raises(ValueError, match="nvidia-smi ended with code 0 while energy was counted"):
        meter.joules()
    meter.close()


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
