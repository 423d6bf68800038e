"""Modules as commands: how they fail, what they say, where their result lies."""

from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from speedstack.support.command import module_command, module_parser, show_result
from speedstack.support.files import write_atomically

DOCUMENTATION = """What is measured, in words
that take two lines.

    python -m package.module MODEL
"""


class Text:
    def save(self, path: Path) -> Path:
        return write_atomically(path, "saved")


@module_command
def main(arguments: Sequence[str] | None = None) -> int | None:
    parser = module_parser(ModuleSpec("package.module", None), DOCUMENTATION)
    parser.add_argument("what")
    options = parser.parse_args(arguments)
    if options.what == "mistake":
        raise ValueError("first line\n  second line")
    if options.what == "missing":
        Path("missing").read_text()
    if options.what == "defect":
        raise KeyError("defect")
    show_result(Text(), "shown", options.out)
    return 3 if options.what == "partly" else None


def test_a_result_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "result.json"
    assert main(["fine", "--out", str(out)]) == 0 and out.read_text() == "saved"
    assert capsys.readouterr().out == f"shown\nwritten: {out}\n"
    assert main(["partly"]) == 3
    assert capsys.readouterr().out == "shown\n"


def test_what_is_shown_outlives_a_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["fine", "--out", str(tmp_path / "file" / "result.json")]) == 1
    shown = capsys.readouterr()
    assert shown.out == "shown\n" and shown.err.startswith("test_command: error: ") and shown.err.count("\n") == 1


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mistake"]) == 2
    assert capsys.readouterr().err == "test_command: error: first line second line\n"
    monkeypatch.chdir(tmp_path)
    assert main(["missing"]) == 1
    assert capsys.readouterr().err == "test_command: error: No such file or directory: missing\n"
    with pytest.raises(KeyError):
        main(["defect"])


def test_help_is_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m package.module [-h] [--out OUT] what")
    assert "What is measured, in words that take two lines." in " ".join(shown.split()) and "MODEL" not in shown
