"""What is mirrored to Weights & Biases offline, read back from the files that it writes.

An offline run is one `.wandb` file, a log of protobuf records in LevelDB's log format: after a header of 7 bytes,
blocks of 32 KiB hold pieces of records, each behind a checksum, its length and whether it is whole, the first, a
middle or the last one. wandb itself has a reader of it in its uploader alone, hence the one here. Tables lie beside it
as JSON.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.results import Report
from speedstack.eval.wandb_mirror import mirror_report
from speedstack.train.metrics import MetricsLog

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
            config["group"] = record.run.run_group
        elif kind == "history":
            history.append(values(record.history.item))
        elif kind == "summary":
            summary |= values(record.summary.update)
    return config, history, summary


def test_metrics_of_a_run_are_in_its_offline_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "a-run"
    run.mkdir()
    log = MetricsLog(run, resume_step=0, wandb_mode="offline", config={"loop": {"num_steps": 3}})
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 4.0 / step, "learning_rate": 1e-3})
    log.write("eval", 3, {"heldout_loss": 1.5})
    log.close()
    config, history, _ = read_run(run)
    assert config["loop"] == {"num_steps": 3} and config["group"] == "a-run"
    rows = {row["_step"]: row for row in history}
    assert [rows[step]["train/loss"] for step in (1, 2, 3)] == [4.0, 2.0, 4.0 / 3]
    # Two lines of one step are one row there.
    assert rows[3]["eval/heldout_loss"] == 1.5 and rows[3]["train/learning_rate"] == 1e-3


def test_curves_tables_and_headlines_of_a_report_are_mirrored(
    made_up_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert mirror_report(made_up_report, tmp_path, "offline")
    config, history, summary = read_run(tmp_path)
    assert config["seed"] == 7 and config["group"] == "A made-up run"
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


def test_the_environment_switches_it_off(
    made_up_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not mirror_report(made_up_report, tmp_path, "offline") and list(tmp_path.iterdir()) == []
    monkeypatch.delenv("WANDB_MODE")
    assert not mirror_report(made_up_report, tmp_path, "disabled") and list(tmp_path.iterdir()) == []
