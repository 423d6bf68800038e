"""The ablation driver on the tiny packed model: every row once, interrupted and continued, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from speedstack.ablation import drafters, step_times
from speedstack.ablation.drafters import Ablation, main
from speedstack.ablation.drafters_config import AblationConfig
from speedstack.eval.results.ablation import AblationTimes, DrafterAblation
from speedstack.quant.checkpoint import load_model
from speedstack.support.config import read_config
from speedstack.train.drafter import frozen_target

ROWS = {
    "ngram": {},
    "eagle": {"drafter.architecture": "eagle"},
    "plain": {},
    "all of them": {
        "drafter.sample_from_anchor": True,
        "drafter.block_size": 3,
        "drafter.markov_rank": 8,
        "drafter.tv_weight": 0.9,
        "drafter.ce_weight": 0.1,
        "drafter.weighting": "dpace",
        "drafter.draft_vocab_size": 200,
    },
}


@pytest.fixture(scope="module")
def unmade(tmp_path_factory: pytest.TempPathFactory, tiny_packed_dir: Path) -> Path:
    """The config of an ablation that has not run."""
    root = tmp_path_factory.mktemp("ablation")
    lines = [json.dumps({"text": f"def f{i}(x):\n" + f"    return x + {i}\n" * 30}) for i in range(12)]
    (root / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "code.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("def g(x):\n", "x" * 900, "import os\n")),
        encoding="utf-8",
    )
    base = {
        "run": {"device": "cpu", "precision": "float32"},
        "data": {
            "corpus": str(root / "corpus"),
            "source": str(root / "texts.jsonl"),
            "heldout_fraction": 0.2,
            "sequence_length": 48,
        },
        "loop": {"batch_size": 4},
        "drafter": {
            "target": str(tiny_packed_dir),
            "target_dtype": "float32",
            "target_layer_ids": [0, 2],
            "block_size": 4,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_sequences": 8,
            "num_eval_sequences": 6,
            "prompt_length": 12,
            "num_anchors": 8,
        },
    }
    (root / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    ablation = {
        "out": str(root / "out"),
        "base": str(root / "base.yaml"),
        "rows": ROWS,
        "seeds": [0, 1],
        "budget_seconds": 0.1,
        "num_timed_steps": 3,
        "num_prompts": 4,
        "num_new_tokens": 24,
        "code_prompts": str(root / "code.jsonl"),
    }
    (root / "ablation.yaml").write_text(yaml.safe_dump(ablation, sort_keys=False), encoding="utf-8")
    return root / "ablation.yaml"


@pytest.fixture(scope="module")
def config(unmade: Path) -> Path:
    """The config of one that has."""
    assert main([str(unmade)]) == 0
    return unmade


def test_a_stopped_ablation_goes_on_with_what_is_missing(unmade, tmp_path, capsys, monkeypatch):
    config = tmp_path / "ablation.yaml"
    raw = yaml.safe_load(unmade.read_text(encoding="utf-8")) | {"out": str(tmp_path / "out")}
    config.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")

    class Stop(Exception):
        pass

    trained: list[str] = []
    train = drafters.run

    def counting_run(recipe, drafter_config):
        trained.append(drafter_config.run.name)
        if len(trained) == 4:
            raise Stop
        return train(recipe, drafter_config)

    monkeypatch.setattr(drafters, "run", counting_run)
    with pytest.raises(Stop):
        main([str(config)])
    out = read_config(AblationConfig, config).out
    times = (out / "times.json").read_bytes()
    features = {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()}
    assert main([str(config)]) == 0
    assert trained[:3] == ["eagle-seed-0", "plain-seed-0", "all of them-seed-0"]
    assert trained[3:] == ["eagle-seed-1", "eagle-seed-1", "plain-seed-1", "all of them-seed-1"]
    assert (out / "times.json").read_bytes() == times
    assert features == {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()}

    result = DrafterAblation.load(out / "results.json")
    assert len(result.runs) == 8
    for run in result.runs:
        assert run.code is not None and run.code.num_prompts == 2  # the long one does not fit
        assert 1.0 <= run.heldout.tau_simulated <= 4.0
        assert (run.heldout.tau_served is None) == (run.row == "eagle")
        time = result.times.row(run.row)
        assert run.num_steps == (0 if time is None else time.num_steps)
    assert [run.seed for run in result.of("plain")] == [0, 1]
    first, second = (run.heldout.model_dump(exclude={"tokens_per_second"}) for run in result.of("ngram"))
    assert first == second
    weights = [(out / f"runs/plain-seed-{seed}/export/model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    table = (out / "results.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 2 + len(ROWS)


def test_rows_added_later_get_steps_of_the_same_budget(config, tmp_path, monkeypatch):
    """A machine that has become three times slower buys nobody less."""
    cost_ms = {"plain": 2.0, "eagle": 1.0, "all of them": 4.0, "added": 5.0, "late": 8.0}
    load, now_ms = 1.0, 0.0
    turns: list[str] = []

    def fake_step(recipe, drafter_config, world, trainer, step):
        nonlocal now_ms
        row = drafter_config.run.name.removesuffix("-seed-0")
        turns.append(row)
        now_ms += load * cost_ms[row] * (10.0 if step == 0 else 1.0)

    loaded: list[Path] = []

    def counting_load(path, **options):
        loaded.append(path)
        return load_model(path, **options)

    monkeypatch.setattr(frozen_target, "load_model", counting_load)
    monkeypatch.setattr(step_times, "train_step", fake_step)
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: now_ms / 1e3))
    raw = yaml.safe_load(config.read_text())
    raw["rows"] |= {"added": {"drafter.gamma": 2.0}, "late": {"drafter.markov_rank": 4}}
    # The data is prepared already.
    raw |= {"budget_seconds": 1.0, "common": {"drafter.text": str(Path(raw["out"]) / "text")}, "out": str(tmp_path)}
    all_rows = AblationConfig.model_validate(raw)

    def times_of(*rows: str, rows_of: AblationConfig = all_rows) -> AblationTimes:
        ablation = Ablation(rows_of, rows)
        ablation._prepare()
        return ablation._times()

    times_of("plain", "eagle", "all of them")
    assert turns == ["plain", "eagle", "all of them"] * 3
    assert len(loaded) == 1  # for three rows
    load = 3.0
    turns.clear()
    times_of("added")  # a row that is not asked for is the one to compare with
    assert turns == ["plain", "added"] * 3
    load = 0.5
    found = times_of("all of them", "late")

    assert {entry.row: entry.num_steps for entry in found.rows} == {
        "plain": 500,
        "eagle": 1000,
        "all of them": 250,
        "added": 200,
        "late": 125,
    }
    assert {row: found.comparable_ms(row) for row in cost_ms} == pytest.approx(cost_ms)
    saved = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [row["beside"] and row["beside"]["row"] for row in saved] == [None, None, None, "plain", "plain"]
    assert saved[3]["median_ms"] == pytest.approx(15.0) and saved[3]["beside"]["median_ms"] == pytest.approx(6.0)

    others = AblationConfig.model_validate(raw | {"rows": {"plain": {"drafter.gamma": 3.0}, "new": {}}})
    with pytest.raises(ValueError, match="add one of plain, eagle, all of them, added, late to rows as it was"):
        times_of("new", rows_of=others)


def test_look_up_simulated_is_look_up_served(config):
    ablation = Ablation(read_config(AblationConfig, config))
    found = DrafterAblation.load(ablation.config.out / "results.json").of("ngram")[0].heldout
    assert found.tau_served == pytest.approx(found.tau_simulated)  # two divisions of the same numbers
    assert found.tau_simulated > 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"plain": {"drafter.markov": 8}}}, "row plain: a drafter config has no field drafter.markov"),
        ({"rows": {"plain": {"drafter.markov_rank": -1}}}, "row plain: drafter.markov_rank"),
        ({"rows": {"ngram": {}}}, "needs a row that is trained"),
        ({"rows": {"a": {}, "b": {"data.sequence_length": 32}}}, "row b has another target, corpus or device than a"),
        ({"num_new_tokens": 100}, "do not fit a window of 48"),
        ({"num_prompts": 7}, "num_prompts 7 is more than drafter.num_eval_sequences 6"),
        ({"num_prompts": 5}, "holds rows measured with another num_prompts"),
        ({"rows": {"plain": {"drafter.gamma": 2.0}}}, "holds a row plain with other settings"),
        ({"code_prompts": "nowhere.jsonl"}, "cannot read prompts nowhere.jsonl"),
        ({"budget_seconds": 5.0}, "measured for a budget of 0.1 s"),
    ],
)
def test_what_does_not_fit_is_one_line(config, tmp_path, change, message, capsys):
    raw = yaml.safe_load(config.read_text()) | change
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    assert main([str(tmp_path / "changed.yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("drafters: error: ") and message in error


def test_rows_of_another_version_are_refused_and_stay(config, tmp_path, capsys):
    """It kept its results in the runs alone, which have no record here."""
    out = tmp_path / "out"
    export = out / "runs" / "plain-seed-0" / "export"
    export.mkdir(parents=True)
    raw = yaml.safe_load(config.read_text()) | {"out": str(out)}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    assert main([str(tmp_path / "old.yaml")]) == 2
    assert "holds rows of another version of speedstack" in capsys.readouterr().err and export.is_dir()


def test_rows_of_another_target_are_not_gone_on_with(config, tmp_path):
    raw = yaml.safe_load(config.read_text())
    base = yaml.safe_load(Path(raw["base"]).read_text())
    target = shutil.copytree(base["drafter"]["target"], tmp_path / "model")
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | {"attention_value_scale": 1.0}))
    ablation = Ablation(AblationConfig.model_validate(raw | {"common": {"drafter.target": str(target)}}))
    with pytest.raises(ValueError, match="holds rows measured with another target_sha256"):
        ablation._claim()


def test_rows_that_are_not_there(config, capsys):
    assert main([str(config), "--rows", "plain", "fancy"]) == 2
    assert "no row fancy; there are ngram, eagle, plain, all of them" in capsys.readouterr().err
