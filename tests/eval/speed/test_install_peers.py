"""The installer of peers: what it asks pip for, and what it says when pip fails. Nothing is installed here."""

import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speedstack.eval.speed.peers import install


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is run instead of pip: a download brings a source archive, llama.cpp fails to build if asked to."""
    found: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        found.append(command[1:])
        if "download" in command:
            source = tmp_path / "llama_cpp_python-1"
            for name in install.CONVERTER_FILES:
                (source / "vendor" / "llama.cpp" / name).mkdir(parents=True)
            with tarfile.open(Path(command[-1]) / "x.tar.gz", "w:gz") as archive:
                archive.add(source, source.name)
        if options["check"] and (tmp_path / "broken").exists() and "install" in command:
            raise subprocess.CalledProcessError(1, command)
        return SimpleNamespace(stdout="torch\t==2.13.0+cpu\t\nfastapi\t>=0.1\t[standard]\ntorchaudio\t\t\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("venv.create", lambda directory, **options: directory.mkdir())
    return found


def test_each_peer_is_installed_with_what_it_needs(commands: list[list[str]], tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    assert install.main(["--environment", str(environment)]) == 0
    assert sorted(path.name for path in (environment / "share" / "llama.cpp").iterdir()) == sorted(
        install.CONVERTER_FILES
    )
    pip = [command[2:] for command in commands if command[:2] == ["-m", "pip"]]
    assert [command[0] for command in pip] == ["install", "install", "download", "install", "install"]
    constraints = ["install", "-c", str(install.CONSTRAINTS)]
    assert pip[3] == [*constraints, *install.CONVERTER] and pip[4][1].endswith("llama_cpp_python-1")
    assert pip[0] == ["install", "--no-deps", install.VLLM]
    assert pip[1] == [*constraints, "torch==2.13.0", "fastapi[standard]>=0.1"]
    assert install.CONSTRAINTS.is_file()


def test_what_fails_is_a_line_and_the_others_go_on(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").touch()
    assert install.main(["--environment", str(tmp_path / "environment")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["vllm was not installed", "llama.cpp was not installed"]
    with pytest.raises(SystemExit, match="2"):
        install.main(["sglang"])
    assert "unknown peer 'sglang'; known: vllm, llama.cpp" in capsys.readouterr().err
