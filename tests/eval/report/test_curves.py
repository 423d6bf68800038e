"""Curves of runs that were cut off, diverged, or come from elsewhere: what can be drawn is, the rest is said."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.report.curves import ACCEPTANCE, CROSS_ENTROPY, KL, UNKNOWN, WEIGHTED, run_curves
from speedstack.eval.results.metrics import FILE_NAME


def write(run: Path, *lines: dict[str, Any] | str) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (run / FILE_NAME).write_text("".join(text), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("config", "training", "heldout"),
    [
        ("kind: pretrain", CROSS_ENTROPY, CROSS_ENTROPY),
        ("{kind: qat, qat: {objective: kl}}", KL, CROSS_ENTROPY),
        ("{kind: qat, qat: {objective: ce}}", CROSS_ENTROPY, CROSS_ENTROPY),
        ("kind: drafter", WEIGHTED, WEIGHTED),
        # Of an older release, of another program, empty.
        ("kind: qat", UNKNOWN, CROSS_ENTROPY),
        ("[1, 2]", UNKNOWN, CROSS_ENTROPY),
        ("", UNKNOWN, CROSS_ENTROPY),
    ],
)
def test_curves_name_what_their_recipe_trains_on(config: str, training: str, heldout: str, tmp_path: Path) -> None:
    write(tmp_path, {"kind": "train", "step": 1, "loss": 2.0}, {"kind": "eval", "step": 1, "heldout_loss": 3.0})
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run_curves(tmp_path)
    assert [(c.label, c.quantity) for c in found] == [("training", training), ("held-out", heldout)]


def test_a_config_that_is_no_yaml_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"kind": "train", "step": 1, "loss": 2.0})
    (tmp_path / "config.yaml").write_bytes(b"kind: [pre\xff")
    with pytest.warns(
        UserWarning, match=r"config\.yaml is not YAML .*: what its run's loss is remains unknown"
    ) as said:
        (curve,) = run_curves(tmp_path)
    assert curve.quantity == UNKNOWN and "\n" not in str(said[0].message)


def test_values_that_are_no_numbers_are_counted_and_left_out(tmp_path: Path) -> None:
    losses = (5.0, float("nan"), 4.0, float("inf"), None, "low", True, 10**400, 3)
    write(
        tmp_path,
        *({"kind": "train", "step": 10 * i, "loss": loss} for i, loss in enumerate(losses)),
        *({"kind": "eval", "step": step, "acceptance_length": float("nan")} for step in (0, 50)),
    )
    said: list[str] = []
    (curve,) = run_curves(tmp_path, said.append)
    assert (curve.steps, curve.values) == ((0, 20, 80), (5.0, 4.0, 3.0))
    assert said == [
        f"{tmp_path / FILE_NAME}: loss is no finite number in 6 of 9 values, the first nan at step 10: left out",
        f"{tmp_path / FILE_NAME}: acceptance_length is no finite number in 2 of 2 values, the first nan at step 0: "
        "left out",
    ]


def test_steps_rise_and_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    pairs = ((5, 1.0), (10, 2.0), (15, 3.0), (10, 2.5), (20, 4.0))
    write(tmp_path, *({"kind": "eval", "step": step, "acceptance_length": value} for step, value in pairs))
    (curve,) = run_curves(tmp_path)
    assert (curve.quantity, curve.steps, curve.values) == (ACCEPTANCE, (5, 10, 15, 20), (1.0, 2.5, 3.0, 4.0))


def test_a_run_without_lines_has_no_curves(tmp_path: Path) -> None:
    assert run_curves(tmp_path) == []
    assert run_curves(write(tmp_path, '{"kind": "train", "step": 1, "lo')) == []
