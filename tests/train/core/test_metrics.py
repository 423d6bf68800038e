import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.report.wandb_mirror import Mirror
from speedstack.eval.results.metrics import FILE_NAME, read_metrics
from speedstack.train.core.metrics import MetricsLog


def test_resume_cuts_the_record_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, Mirror(), resume_step=0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1 / step})
    log.close()
    # A killed process leaves half a line.
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    log = MetricsLog(tmp_path, Mirror(), resume_step=2)
    log.write("eval", 2, {"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("eval", 2)]
    assert lines[1]["loss"] == 0.5


def test_a_new_run_starts_an_empty_record(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"kind": "train", "step": 1}\n')
    MetricsLog(tmp_path, Mirror(), resume_step=0).close()
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nowhere") == []


def test_lines_of_a_damaged_record_are_counted_and_left_out(tmp_path: Path) -> None:
    """As a disk leaves it that was full for a while, and an editor, and another program."""
    good = b'{"kind": "train", "step": 4, "loss": 1.0}\n'
    bad = [b'{"kind": "tra' + good, b"\xff\xfe\n", b"[4]\n", b'{"kind": "train"}\n', b'{"kind": 1, "step": 4}\n', b"\n"]
    (tmp_path / FILE_NAME).write_bytes(good + b"".join(bad) + good + b'{"kind": "train", "step": 5}')
    expected = f"{tmp_path / FILE_NAME}: 6 of 8 lines, the first in line 2, are no JSON object with kind and step"
    with pytest.warns(UserWarning, match="left out") as said:
        assert [line["step"] for line in read_metrics(tmp_path)] == [4, 4]
    assert [str(each.message).partition(": left")[0] for each in said] == [expected]
    # A run goes on from such a record, which then is whole again.
    with pytest.warns(UserWarning, match="6 of 8 lines"):
        MetricsLog(tmp_path, Mirror(), resume_step=4).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_metrics(tmp_path)) == 2


def test_lines_are_mirrored(tmp_path: Path) -> None:
    mirrored: list[Any] = []
    mirror = Mirror()
    mirror.log = lambda *line: mirrored.append(line)  # type: ignore[method-assign]
    log = MetricsLog(tmp_path, mirror, resume_step=0)
    log.write("train", 3, {"loss": 2.0, "grad_norm": 1.0})
    log.write("eval", 3, {"heldout_loss": 4.0})
    log.close()
    assert mirrored == [({"train/loss": 2.0, "train/grad_norm": 1.0}, 3), ({"eval/heldout_loss": 4.0}, 3)]
