"""What is mirrored to Weights & Biases offline, read back from the files that it writes; and that its failures end none
of our work.

An offline run is one `.wandb` file, a log of protobuf records in LevelDB's log format: after a header of 7 bytes,
blocks of 32 KiB hold pieces of records, each behind a checksum, its length and whether it is whole, the first, a
middle or the last one. wandb itself has a reader of it in its uploader alone, hence the one here. Tables lie beside it
as JSON.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.report.page import Headline, Section
from speedstack.eval.report.wandb_mirror import Mirror, _summary, mirror_report, start_run
from speedstack.eval.results.report import Curve, Report
from speedstack.train.core.metrics import MetricsLog

FILE_HEADER = b":W&B\xe1\xbe\x00"
BLOCK_SIZE, PIECE_HEADER_SIZE = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_log(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, checksums checked."""
    data = path.read_bytes()
    assert data[: len(FILE_HEADER)] == FILE_HEADER
    position, record = len(FILE_HEADER), b""
    while position + PIECE_HEADER_SIZE <= len(data):
        left_in_block = BLOCK_SIZE - position % BLOCK_SIZE
        if left_in_block < PIECE_HEADER_SIZE:
            position += left_in_block
            continue
        checksum = int.from_bytes(data[position : position + 4], "little")
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        place = data[position + 6]
        piece = data[position + PIECE_HEADER_SIZE : position + PIECE_HEADER_SIZE + size]
        assert zlib.crc32(bytes([place]) + piece) == checksum and place in (WHOLE, FIRST, MIDDLE, LAST)
        record += piece
        if place in (WHOLE, LAST):
            yield record
            record = b""
        position += PIECE_HEADER_SIZE + size
    assert record == b""


def read_run(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Config, rows of history and summary of the one offline run below `directory`."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    # The file is a background process' own, which may hold back its last records until it ends.
    wandb.teardown()
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}

    def values(items: Any) -> dict[str, Any]:
        """Keys of dictionaries inside a value are a path of their own there."""
        found: dict[str, Any] = {}
        for item in items:
            *parents, key = item.nested_key or [item.key]
            place = found
            for parent in parents:
                place = place.setdefault(parent, {})
            place[key] = json.loads(item.value_json)
        return found

    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    for data in read_log(file):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= values(record.run.config.update)
            assert record.run.project == "speedstack"
            config |= {"group": record.run.run_group, "name": record.run.display_name}
        elif kind == "history":
            history.append(values(record.history.item))
        elif kind == "summary":
            summary |= values(record.summary.update)
    return config, history, summary


class FakeRun:
    """A run that fails when a step is logged that is in `fails_at`, or at its end for "finish"."""

    def __init__(self, *fails_at: int | str) -> None:
        self.fails_at = fails_at
        self.logged: list[int] = []
        self.exit_codes: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append(step)
        if step in self.fails_at:
            raise ConnectionResetError("Connection lost\nto the service")

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        if "finish" in self.fails_at:
            raise TimeoutError("no answer")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """`started(run)`: put `run` in wandb's place; the value is what it is started with. An exception as `run`, or as
    `login`, is raised there; `login` may be what wandb answers, too.
    """

    def fake(run: FakeRun | Exception, login: bool | Exception = True) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def answer(what: Any, **options: Any) -> Any:
            calls.append(options)
            if isinstance(what, Exception):
                raise what
            return what

        monkeypatch.setattr("wandb.init", lambda **options: answer(run, **options))
        monkeypatch.setattr("wandb.login", lambda **options: answer(login, **options))
        monkeypatch.delenv("WANDB_MODE", raising=False)
        return calls

    return fake


def test_metrics_of_a_run_are_in_its_offline_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "a-run"
    run.mkdir()
    mirror = Mirror()
    mirror.start("offline", run, {"loop": {"num_steps": 3}})
    with mirror:
        log = MetricsLog(run, mirror, resume_step=0)
        for step in (1, 2, 3):
            log.write("train", step, {"loss": 4.0 / step, "learning_rate": 1e-3})
        log.write("eval", 3, {"heldout_loss": 1.5})
        log.close()
    config, history, _ = read_run(run)
    assert config["loop"] == {"num_steps": 3} and config["group"].startswith("a-run-") and config["name"] == "a-run"
    rows = {row["_step"]: row for row in history}
    assert [rows[step]["train/loss"] for step in (1, 2, 3)] == [4.0, 2.0, 4.0 / 3]
    # Two lines of one step are one row there.
    assert rows[3]["eval/heldout_loss"] == 1.5 and rows[3]["train/learning_rate"] == 1e-3


def test_continuations_are_a_group_and_runs_of_one_name_elsewhere_are_not(
    started: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    calls = started(FakeRun())
    for place in ("one/qat", "one/qat", "other/qat"):
        Mirror().start("offline", tmp_path / place)
    first, again, elsewhere = (options["group"] for options in calls)
    assert first == again != elsewhere and [options["name"] for options in calls] == ["qat"] * 3


@pytest.mark.parametrize("fails_at", [(2, 3), ("finish",)])
def test_a_failure_is_said_once_and_ends_nothing(
    fails_at: tuple[int | str, ...], started: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    run, mirror = FakeRun(*fails_at), Mirror()
    started(run)
    mirror.start("offline", tmp_path)
    with pytest.warns(UserWarning, match=": not mirrored any more, metrics.jsonl goes on") as said, mirror:
        for step in (1, 2, 3):
            mirror.log({"train/loss": 1.0}, step)
    (line,) = [str(each.message) for each in said]
    assert line.startswith("wandb failed") and "\n" not in line
    assert run.logged == ([1, 2] if 2 in fails_at else [1, 2, 3])


def test_a_job_that_fails_is_a_failed_run_there(started: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    run, mirror = FakeRun(), Mirror()
    started(run)
    mirror.start("offline", tmp_path)
    with pytest.raises(ZeroDivisionError), mirror:
        raise ZeroDivisionError
    mirror.start("offline", tmp_path)
    with mirror:
        pass
    assert run.exit_codes == [1, 0]


STARTS = [
    (FakeRun(), False, "wandb has no API key: give it one with `wandb login` or WANDB_API_KEY, or set wandb_mode to"),
    (
        FakeRun(),
        OSError("No route to host\nat all"),
        "wandb cannot be started online (set wandb_mode to offline, which ",
    ),
    (
        RuntimeError("the service did not start"),
        True,
        "keeps the run in files): RuntimeError: the service did not start",
    ),
]


@pytest.mark.parametrize(("run", "login", "message"), STARTS, ids=["no key", "no network", "no service"])
def test_online_without_a_key_or_a_server_is_refused_in_a_line(
    run: FakeRun | Exception,
    login: bool | Exception,
    message: str,
    started: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    calls = started(run, login)
    with pytest.raises(ValueError) as refused:
        Mirror().start("online", tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    # Nobody is asked for a key, and what is there is tried before the work.
    assert calls[0] == {"prompt": False, "verify": True}


def test_an_offline_mirror_that_does_not_start_is_done_without(
    started: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    started(RuntimeError("the service did not start"), AssertionError("asked for a key"))
    mirror = Mirror()
    with pytest.warns(
        UserWarning, match="cannot be started offline: RuntimeError: the service did not start: not mirro"
    ):
        mirror.start("offline", tmp_path)
    with mirror:
        mirror.log({"train/loss": 1.0}, 1)


def test_curves_tables_and_headlines_of_a_report_are_mirrored(
    made_up_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert mirror_report(made_up_report, tmp_path, "offline")
    config, history, summary = read_run(tmp_path)
    assert config["seed"] == 7 and config["name"] == "A made-up run"
    losses = [row for row in history if "pretrain/training: loss (nats)" in row]
    assert [row["pretrain/step"] for row in losses] == [1, 2, 3]
    assert [row["pretrain/training: loss (nats)"] for row in losses] == [8.0, 5.0, 3.0]
    assert summary["divergence of QAD from the teacher, against PTQ"] == "0.45\u00d7"
    (mention,) = (row["Speed"] for row in history if "Speed" in row)
    assert mention["_type"] == "table-file" and mention["nrows"] == 4
    (directory,) = tmp_path.glob("wandb/offline-run-*/files")
    table = json.loads((directory / mention["path"]).read_text(encoding="utf-8"))
    assert table["columns"][:2] == ["contestant", "decode (tokens/s)"]
    assert [row[:2] for row in table["data"]] == [
        ["engine", 400.0],
        ["engine + drafter", 650.0],
        ["transformers", 80.0],
        ["transformers + drafter", None],
    ]


def test_stages_are_series_whose_steps_rise(
    made_up_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one recipe, one of whose names the other's begins with; two curves of each, with other steps."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    curves = [
        Curve(
            stage=stage, label=label, quantity="nats", steps=steps, values=tuple(float(step + shift) for step in steps)
        )
        for stage, shift in (("lr-1.5/qat", 0), ("lr-1.5/qat/more", 100))
        for label, steps in (("training", (1, 2, 3, 4)), ("held-out", (0, 2, 4)))
    ]
    assert mirror_report(made_up_report.model_copy(update={"curves": tuple(curves)}), tmp_path, "offline")
    _, history, _ = read_run(tmp_path)
    for stage, shift in (("lr-1_5/qat", 0), ("lr-1_5/qat/more", 100)):
        rows = [row for row in history if f"{stage}/step" in row]
        assert [row[f"{stage}/step"] for row in rows] == [0, 1, 2, 3, 4]
        held_out = {row[f"{stage}/step"]: row.get(f"{stage}/held-out: nats") for row in rows}
        assert held_out == {0: shift, 1: None, 2: 2 + shift, 3: None, 4: 4 + shift}
        # No row is of two stages.
        assert {key.rpartition("/")[0] for row in rows for key in row if not key.startswith("_")} == {stage}


def test_headlines_of_two_results_are_both_in_the_summary() -> None:
    speeds = [
        Section(
            f"Speed: {run}", headlines=(Headline(value, "against before", ""), Headline("7", f"of {run} alone", ""))
        )
        for run, value in (("a", "2\u00d7"), ("b", "3\u00d7"))
    ]
    assert _summary(speeds) == {
        "Speed: a: against before": "2\u00d7",
        "of a alone": "7",
        "Speed: b: against before": "3\u00d7",
        "of b alone": "7",
    }


def test_a_report_is_written_whatever_becomes_of_its_mirror(
    started: Callable[..., list[dict[str, Any]]], made_up_report: Report, tmp_path: Path, fails: Callable[..., str]
) -> None:
    made_up_report.save(tmp_path / "made.json")
    out = tmp_path / "out"
    for run, login, message in ((FakeRun(), False, "wandb has no API key"), (FakeRun("define"), True, "wandb failed")):
        started(run, login)
        line = fails("report", tmp_path / "made.json", "--out", out, "--wandb-mode", "online")
        assert message in line and (out / "report.html").is_file()
        (out / "report.html").unlink()


def test_the_environment_rules_modes_out(
    started: Callable[..., list[dict[str, Any]]],
    made_up_report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = started(FakeRun())
    for limit, mode in (("disabled", "online"), ("disabled", "offline"), ("offline", "disabled"), ("", "disabled")):
        monkeypatch.setenv("WANDB_MODE", limit)
        assert start_run(mode, tmp_path, "x") is None  # type: ignore[arg-type]
        assert not mirror_report(made_up_report, tmp_path, mode)  # type: ignore[arg-type]
    assert not calls
    for limit in ("offline", "dryrun"):
        monkeypatch.setenv("WANDB_MODE", limit)
        assert start_run("online", tmp_path, "x") is not None
    assert [options["mode"] for options in calls] == ["offline"] * 2
