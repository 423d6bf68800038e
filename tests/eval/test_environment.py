"""The environment is described without names that do not belong into a shared report."""

import platform
import subprocess
from pathlib import Path

import torch

from speedstack.eval import environment
from speedstack.eval.environment import describe_environment


def test_describes_the_running_process() -> None:
    found = describe_environment()
    assert found.python == platform.python_version()
    assert found.num_threads == torch.get_num_threads()
    assert found.packages["torch"].startswith(torch.__version__.split("+")[0])
    assert found.num_cores >= 1 and found.memory_bytes > 2**20 and found.cpu_model
    assert platform.node() not in found.model_dump_json()


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
