"""The environment is described without names that do not belong into a shared report."""

import importlib.machinery
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speedstack.eval.results import environment
from speedstack.eval.results.environment import command_line, describe_environment


def test_describes_the_running_process() -> None:
    found = describe_environment()
    assert found.python == platform.python_version()
    assert found.num_threads == torch.get_num_threads()
    assert found.packages["torch"].startswith(torch.__version__.split("+")[0])
    assert found.num_cores >= 1 and found.memory_bytes > 2**20 and found.cpu_model
    assert platform.node() not in found.model_dump_json()


def test_what_changes_how_threads_wait_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("AN_OMP_SECRET", "x")
    assert describe_environment().thread_settings["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "AN_OMP_SECRET" not in describe_environment().thread_settings


def test_no_revision_outside_a_checkout_that_tracks_the_source(tmp_path: Path) -> None:
    source = tmp_path / "file.py"
    source.write_text("")
    assert environment._git_sha(source) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    # A repository is there, but the source is a stranger in it, as a virtual environment in a project is.
    assert environment._git_sha(source) is None
    subprocess.run([*git, "add", "file.py"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment._git_sha(source) == head


def test_what_cannot_be_read_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No git, no PATH, a GPU driver that fails, a system that does not know its memory, no /proc."""

    def fails(*arguments: object) -> str:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCUDA kernel errors might be ...")

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    read_text = Path.read_text

    def without_proc(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path.is_relative_to("/proc"):
            raise PermissionError(str(path))
        return read_text(path, encoding, errors)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    monkeypatch.setattr("os.sysconf", unknown)
    monkeypatch.setattr(Path, "read_text", without_proc)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {})
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-package-of-this-name"))
    found = describe_environment()
    assert found.gpus == ("unknown (RuntimeError: CUDA error: all CUDA-capable devices are busy)",)
    assert (found.memory_bytes, found.git_sha, found.cpu_model) == (0, None, "unknown")
    assert list(found.packages) == ["torch"] and found.operating_system == platform.system()


def test_a_git_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], **options: object) -> None:
        assert options["timeout"]
        raise subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert describe_environment().git_sha is None


def test_arguments_that_are_no_text_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/speedstack", "report", "caf\udce9"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setenv("OMP_PLACES", "\udcff")
    found = describe_environment()
    assert found.command == "speedstack report 'caf\\udce9'" and found.model_dump_json()
    monkeypatch.setattr(sys, "argv", [])
    assert command_line() is None


@pytest.mark.parametrize(
    ("module", "arguments", "torchrun", "expected"),
    [
        ("speedstack.__main__", ["-m", "bench", "--out", "a b"], False, "speedstack bench --out 'a b'"),
        (None, ["/somewhere/bin/speedstack", "report", "x.json"], False, "speedstack report x.json"),
        ("speedstack.ablation.ptq", ["bench_ptq.py", "MODEL"], False, "python -m speedstack.ablation.ptq MODEL"),
        ("speedstack.__main__", ["-m", "eval"], True, "torchrun --nproc-per-node 2 -m speedstack eval"),
        ("speedstack.eval.x", ["x.py", "y"], True, "torchrun --nproc-per-node 2 -m speedstack.eval.x y"),
        ("pytest.__main__", ["pytest", "-q"], False, None),
        (None, ["ipykernel_launcher.py"], False, None),
    ],
)
def test_the_command_is_named_if_it_is_ours(
    module: str | None, arguments: list[str], torchrun: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if module is None else importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", arguments)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_line() == expected
