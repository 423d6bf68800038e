"""The verb `ablate` on the tiny model: every kind of row, against what they are made of; what it reuses and refuses."""

import bisect
import csv
import fnmatch
import glob
import heapq
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from speedstack.ablation.ablate import Ablation
from speedstack.ablation.config import AblateConfig, Grids, drafter_config, load_ablate_config, qat_config
from speedstack.ablation.step_pool import OnStep, describe
from speedstack.ablation.steps import run_step
from speedstack.cli import main
from speedstack.eval.quality.heldout import corpus_windows
from speedstack.eval.quality.measure import model_quality
from speedstack.eval.quality.storage import directory_bytes
from speedstack.eval.results.ablation import AblationGrid
from speedstack.eval.results.environment import describe_environment
from speedstack.quant.checkpoint import load_model
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.quant.ptq import round_to_nearest
from speedstack.support.steps import Step, StepStore
from speedstack.train.config.recipes import identity
from speedstack.train.data.corpus import prepare_corpus

ROOT = Path(__file__).resolve().parents[2]
TRAINING = {"data.sequence_length": 48, "loop.num_steps": 2, "loop.batch_size": 4}
DRAFTER = {
    "drafter.target_dtype": "float32",
    "drafter.target_layer_ids": [0, 2],
    "drafter.block_size": 4,
    "drafter.intermediate_size": 64,
    "drafter.num_attention_heads": 4,
    "drafter.num_key_value_heads": 2,
    "drafter.head_dim": 16,
    "drafter.num_sequences": 4,
    "drafter.num_eval_sequences": 4,
    "drafter.prompt_length": 12,
    "drafter.num_anchors": 4,
    "drafter.num_served_prompts": 0,
}


@pytest.fixture(scope="module")
def corpus(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for module in (bisect, fnmatch, glob, heapq, json.decoder, json.encoder, shlex, textwrap):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        (directory / f"{module.__name__}.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tiny_model_dir)
    return prepare_corpus(directory / "corpus", source=str(directory), heldout_fraction=0.5, tokenizer=tokenizer).path


@pytest.fixture
def write_config(tiny_model_dir: Path, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """`write_config(name="grid", **fields)`: a small grid's YAML, with `fields` in the place of what it has."""
    bases = {}
    for kind in ("qat", "drafter"):
        bases[kind] = tmp_path / f"{kind}.yaml"
        run = {"precision": "float32"}
        bases[kind].write_text(yaml.safe_dump({"run": run, "loop": {"batch_size": 4}}), encoding="utf-8")

    def write(name: str = "grid", **fields: Any) -> Path:
        content = {
            "model": str(tiny_model_dir),
            "corpus": str(corpus),
            "out": str(tmp_path / "out"),
            "device": "cpu",
            "gptq": {"num_sequences": 2, "sequence_length": 32},
            "qat": {"base": str(bases["qat"]), "set": TRAINING},
            "drafter": {
                "base": str(bases["drafter"]),
                "set": TRAINING | DRAFTER,
            },
            "heldout": {"num_tokens": 96, "window": 33},
            "suite": {"limit": 3, "max_length": 256},
            "speed": {"num_prompts": 1, "num_prompt_tokens": 16, "num_new_tokens": 8, "num_repeats": 2},
            "predict": {"context": 64},
        } | fields
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return file

    return write


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps run here, without workers that each import for seconds; the value lists those that were made."""
    made: list[str] = []

    def run_steps(
        store: StepStore, steps: Sequence[Step], runner: str, places: object, logs: Path, on_step: OnStep
    ) -> dict[str, str]:
        failures: dict[str, str] = {}
        for step in store.missing(steps):
            try:
                if any(need.name in failures for need in step.needs.values()):
                    raise ValueError("needs one that failed")
                store.make(step, partial(run_step, step))
                made.append(step.name)
            except Exception as error:
                failures[step.name] = describe(error)
            on_step(step, failures.get(step.name))
        return failures

    monkeypatch.setattr("speedstack.ablation.step_pool.run_steps", run_steps)
    # lm-eval asks compilers and pip for their versions, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    return made


INCLUDE = [
    {"format": "nvfp4", "modules": "all"},
    {"method": ["gptq", "qad"]},
    {"drafter": "full", "temperature": [0, 1]},
    {"drafter": "quantized"},
]


def test_every_kind_of_row(
    write_config: Callable[..., Path], in_process: list[str], tiny_model_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    file = write_config(grid={"method": ["none", "rtn"]}, include=INCLUDE)
    assert main(["ablate", str(file)]) == 0
    grid = AblationGrid.load(tmp_path / "out" / "results.json")
    rows = {row.name: row for row in grid.rows}
    full, rtn, everything, gptq, qad = (
        rows[name]
        for name in ("full precision", "mxfp4 experts rtn", "nvfp4 all rtn", "mxfp4 experts gptq", "mxfp4 experts qad")
    )
    drafted = [row for row in grid.rows if row.drafter != "none"]
    assert len(grid.rows) == 8 and len(drafted) == 3 and grid.num_failed == 0

    # What the divergences are of.
    windows = corpus_windows(corpus, tiny_model_dir, 33, 96)
    teacher = load_model(tiny_model_dir)
    for row, arguments in ((rtn, {}), (everything, {"number_format": "nvfp4", "modules": "all"})):
        student = load_model(tiny_model_dir)
        round_to_nearest(student, **arguments)  # type: ignore[arg-type]
        quality = model_quality("", teacher, student, windows)
        assert (row.kl_nats, row.perplexity) == (quality.kl_to_teacher_nats, quality.perplexity)
        assert row.top1_agreement == quality.top1_agreement and row.num_tokens == quality.num_tokens
    assert full.kl_nats is None and full.perplexity != rtn.perplexity
    assert full.score == 1.0 and grid.score_metric == "same_text exact_match"
    assert len({row.kl_nats for row in (rtn, everything, gptq, qad)}) == 4

    # How they are held, and what that takes.
    assert [row.served for row in (full, rtn, everything)] == ["unquantized", "packed", "dequantized"]
    stored = sum(directory_bytes(tiny_model_dir).values())
    assert full.model_bytes == stored and rtn.model_bytes == gptq.model_bytes == qad.model_bytes
    experts = 2 * 8 * 3 * 64 * 32
    assert (full.expert_bytes, rtn.expert_bytes) == (4 * experts, experts * 17 // 32)
    assert rtn.model_bytes == stored - 4 * experts + experts * 17 // 32
    # 4.5 bits a weight, and a scale for each of two matrices an expert.
    assert everything.expert_bytes == experts * 9 // 16 + 2 * 8 * 2 * 4
    assert (full.bits_per_weight, rtn.bits_per_weight, everything.bits_per_weight) == (32.0, 4.25, 4.5)

    # How fast, and with how many tokens a round.
    assert all(row.tokens_per_second is not None and row.tokens_per_second.num_repeats == 2 for row in grid.rows)
    assert all(row.busy_cores_of_others is not None for row in grid.rows)
    assert full.tau is None and all(row.tau_greedy is not None and row.tau_greedy >= 1 for row in drafted)
    greedy, sampled = (row for row in drafted if row.drafter == "full")
    assert greedy.tau == greedy.tau_greedy == sampled.tau_greedy and sampled.temperature == 1.0
    assert greedy.tau_stderr is not None and sampled.steps["acceptance"] != sampled.steps["acceptance_greedy"]
    assert greedy.steps["drafter"] == sampled.steps["drafter"] != drafted[2].steps["drafter"]
    assert full.predicted_tokens_per_second and rtn.predicted_tokens_per_second
    assert rtn.predicted_tokens_per_second > full.predicted_tokens_per_second
    assert any("served dequantized" in note for note in grid.notes)

    # The files.
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["name"] for line in lines] == [row.name for row in grid.rows]
    assert float(lines[1]["kl_nats"]) == rtn.kl_nats
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert text.startswith(grid.table()) and f"{1e3 * (rtn.kl_nats or 0):.4g} ± " in text
    plots = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    names = ("kl_by_bits", "kl_by_bytes", "kl_by_speed", "score_by_bits", "tau_by_bits")
    assert plots == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}

    # All there: nothing is made, whatever the path of the checkpoint; an additional row makes its own steps alone.
    num_made = len(in_process)
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    again = write_config(grid={"method": ["none", "rtn"]}, include=INCLUDE, model=str(tmp_path / "copy"))
    assert main(["ablate", str(again)]) == 0 and len(in_process) == num_made
    assert AblationGrid.load(tmp_path / "out" / "results.json").rows == grid.rows
    more = write_config(grid={"method": ["none", "rtn"]}, include=[*INCLUDE, {"format": "int4_g32"}])
    assert main(["ablate", str(more)]) == 0
    assert sorted(name.partition("-")[0] for name in in_process[num_made:]) == [
        "quality",
        "quantize",
        "suite",
        "timing",
    ]


def test_another_checkpoint_setting_or_software_makes_other_steps(
    write_config: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(**fields: Any) -> dict[str, set[str]]:
        config = load_ablate_config(write_config(grid={"method": ["gptq", "qad"]}, include=INCLUDE, **fields), [])
        assert isinstance(config, AblateConfig)
        by_kind: dict[str, set[str]] = {}
        for row in Ablation(config).rows:
            for step in (step for each in row.steps() for step in each.closure()):
                by_kind.setdefault(step.kind, set()).add(step.name)
        return by_kind

    def changed(**fields: Any) -> set[str]:
        """Kinds all of whose steps are others than before."""
        now = names(**fields)
        assert now.keys() == before.keys()
        return {kind for kind in before if not before[kind] & now[kind]}

    before = names()
    assert changed() == set() and changed(out=str(tmp_path / "other")) == set()
    assert changed(heldout={"num_tokens": 97, "window": 33}) == {"quality"}
    assert changed(suite={"limit": 4, "max_length": 256}) == {"suite"}
    assert changed(speed={"num_prompts": 2}) == {"acceptance", "timing"}
    with monkeypatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE" if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE" else "ACTIVE")
        assert changed() == {"timing"}
    other = tmp_path / "model"
    shutil.copytree(tiny_model_dir, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert changed(model=str(other)) == set(before)
    # The same weights with other end tokens, or another tokenizer, answer otherwise.
    side_files = {"generation_config.json": '{"eos_token_id": [0, 7]}', "chat_template.jinja": "{{ messages }}"}
    for name, content in side_files.items():
        again = shutil.copytree(tiny_model_dir, tmp_path / name)
        (again / name).write_text(content)
        assert changed(model=str(again)) == set(before)
    machine = describe_environment()
    for package, kinds in (("lm_eval", {"tasks", "suite"}), ("torch", set(before)), ("numpy", set())):
        packages = machine.packages | {package: "0.0.1"}
        monkeypatch.setattr(
            "speedstack.ablation.plan.describe_environment",
            partial(machine.model_copy, update={"packages": packages}),
        )
        assert changed() == kinds


def test_what_other_software_made_is_named_and_made_anew(
    write_config: Callable[..., Path],
    in_process: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_config(grid={"method": ["rtn"]})
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["suite"]["name"], content["speed"]["num_repeats"] = None, 0
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["ablate", str(file)]) == 0
    num_made = len(in_process)
    assert num_made and "other software" not in capsys.readouterr().err
    machine = describe_environment()
    then = machine.packages["torch"]
    newer = machine.model_copy(update={"packages": machine.packages | {"torch": "99.0"}})
    with monkeypatch.context() as patch:
        patch.setattr("speedstack.ablation.plan.describe_environment", lambda: newer)
        assert main(["ablate", str(file)]) == 0
    assert f"{num_made} steps are there of other software (torch {then}, is 99.0)" in capsys.readouterr().err
    assert len(in_process) == 2 * num_made
    assert main(["ablate", str(file)]) == 0 and len(in_process) == 2 * num_made


def test_a_row_that_fails_keeps_its_line_and_others_go_on(
    write_config: Callable[..., Path], in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(grid={"method": ["rtn"]}, include=[{"method": "qad"}])
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["qat"]["set"]["data.sequence_length"] = 4096
    content["suite"]["name"], content["speed"]["num_repeats"] = None, 0
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["ablate", str(file)]) == 1
    rtn, qad = AblationGrid.load(tmp_path / "out" / "results.json").rows
    assert rtn.error is None and rtn.kl_nats is not None and rtn.score is None and rtn.tokens_per_second is None
    assert qad.error is not None and qad.error.startswith("qat: data.sequence_length 4096 exceeds the 256 positions")
    assert qad.kl_nats is None and qad.name == "mxfp4 experts qad"
    assert f"failed: {qad.name}: {qad.error}" in capsys.readouterr().err
    assert qad.error in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    content["qat"]["set"]["data.sequence_length"] = 48
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["ablate", str(file)]) == 0


def test_refusals(
    write_config: Callable[..., Path], tiny_packed_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *flags: str, **fields: Any) -> None:
        assert main(["ablate", str(write_config(**fields)), *flags]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("speedstack: error: ") and message in line
        assert not (tmp_path / "out").exists()

    refused("unknown format 'mxpf4'; did you mean 'mxfp4'?", grid={"format": ["mxpf4"]})
    refused("unknown method 'qda'; did you mean 'qad'?", include=[{"method": "qda"}])
    refused("temperature -1.0 is no number from 0 on", grid={"temperature": -1})
    refused("unknown key 'grid.formats'; did you mean 'grid.format'?", grid={"formats": "nvfp4"})
    refused(
        "not attention in mxfp4: leave them out with exclude",
        include=[{"method": "gptq", "modules": "attention"}],
    )
    refused(
        "nvfp4 experts qad: qad trains experts in mxfp4, not experts in nvfp4",
        grid={"format": "nvfp4", "method": "qad"},
    )
    refused("int4_g32 has no scale rule that could be searched: use rtn", grid={"format": "int4_g32", "method": "mse"})
    refused(
        "serves no experts packed in nvfp4, and serving is packed",
        grid={"format": ["mxfp4", "nvfp4"]},
        serving="packed",
    )
    refused("exclude: no row of the grid has {'method': ('gptq',)}", exclude=[{"method": "gptq"}])
    refused("exclude leaves no row", exclude=[{"method": "rtn"}])
    refused("a pattern of exclude names at least one axis", exclude=[{}])
    refused("unknown GPU 'H2000'; did you mean 'H200'?", "--predict.gpu", "H2000")
    refused("predict: context 9999 is outside the model's 1 to 256", "--predict.context", "9999")
    refused("no task 'same_txt' in suite offline; there are heldout_perplexity", "--suite.score", "same_txt")
    refused("is quantized already", model=str(tiny_packed_dir))
    refused("no model directory at", model=str(tmp_path / "nowhere"))
    refused("is not a prepared corpus", corpus=str(tmp_path))
    refused("held-out documents give 4 of 99 prompts", "--speed.num-prompts", "99")
    refused("qat.set: qat.model is set by the grid", grid={"method": "qad"}, qat={"set": {"qat.model": "x"}})
    base = str(tmp_path / "qat.yaml")
    refused(
        "qat.set: a qat config has no field loop.steps",
        grid={"method": "qad"},
        qat={"base": base, "set": {"loop.steps": 1}},
    )


def test_several_grids(write_config: Callable[..., Path], tmp_path: Path) -> None:
    first, second = write_config("first"), write_config("second", out=str(tmp_path / "second"))
    config = load_ablate_config(first, [str(second), "--seed", "3"])
    assert isinstance(config, Grids) and [grid.seed for grid in config.grids] == [3, 3]
    with pytest.raises(ValueError, match="two grids have the same out"):
        load_ablate_config(first, [str(write_config("third"))])
    bad = write_config("bad", grid={"format": "fp3"})
    with pytest.raises(ValueError, match=r"bad\.yaml: .*unknown format 'fp3'"):
        load_ablate_config(first, [str(bad)])


def test_runs_have_their_own_text_and_know_inputs_however_they_are_spelled(
    write_config: Callable[..., Path],
    tiny_model_dir: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "base.yaml"
    section = {"text": "runs/text", "features": "disk", "features_path": "runs/features"}
    base.write_text(yaml.safe_dump({"drafter": section}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    configs = [
        load_ablate_config(write_config(drafter={"base": str(base)}, model=model, corpus=text, out=out), [])
        for model, text, out in (
            (str(tiny_model_dir), str(corpus), str(tmp_path / "out")),
            (os.path.relpath(tiny_model_dir), os.path.relpath(corpus), "out"),
        )
    ]
    absolute, relative = (config for config in configs if isinstance(config, AblateConfig))
    drafter = drafter_config(relative, Path(), Path()).drafter
    assert (drafter.text, drafter.features_path, drafter.features) == (None, None, "disk")
    # What a killed run compares with its own when it goes on.
    assert identity(qat_config(relative, "qad", Path())) == identity(qat_config(absolute, "qad", Path()))
    assert Ablation(relative).store.root == Ablation(absolute).store.root


@pytest.mark.slow
def test_killed_and_continued(write_config: Callable[..., Path], in_process: list[str], tmp_path: Path) -> None:
    """The command as a user gives it, with its worker processes, killed; then the rest."""
    fields: dict[str, Any] = {"suite": {"name": None}, "speed": {"num_repeats": 0}}
    file = write_config(grid={"method": ["none", "rtn", "qad"]}, **fields)
    command = [sys.executable, "-m", "speedstack", "ablate", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    steps = tmp_path / "out" / "steps"
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 200
    # In the middle: one step is there, and another is being made.
    store = StepStore(steps)
    while not (store.completed() and len(list(steps.iterdir())) > len(store.completed())):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: record.completion for name, record in store.completed()}
    assert main(command[3:]) == 0
    grid = AblationGrid.load(tmp_path / "out" / "results.json")
    assert len(grid.rows) == 3 and grid.num_failed == 0
    after = {name: record.completion for name, record in store.completed()}
    assert before.items() <= after.items() and len(after) == 5 and len(in_process) == 5 - len(before)
