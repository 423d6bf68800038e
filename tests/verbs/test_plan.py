"""The `plan` verb: what it prints agrees with what it computed, and everything wrong is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from speedstack.cli import main
from speedstack.verbs.plan import PlanResult

SHAPES = Path(__file__).parents[1] / "shapes"
QWEN = SHAPES / "qwen3-30b-a3b.json"


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["plan", *(str(argument) for argument in arguments)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return json.loads(run(capsys, *arguments, "--json"))


def test_a_table_of_a_released_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    text = run(capsys, QWEN, "--experts", "mxfp4", "--out", out)
    ops = "qkv attention combine o_proj router expert_gate_up expert_down lm_head sample accept"
    for op in ops.split():
        assert op in text
    result = PlanResult.load(out)
    assert "proof: safe" in text and result.proof.is_safe
    assert f"roofline: {1e6 * result.roofline_seconds:.1f} us a step" in text and "weights 18.48 GB" in text
    assert "weights: attention bf16, attention output bf16, dense bf16, router bf16, experts mxfp4, " in text
    assert f"{result.roofline_tokens_per_second:.0f} tokens/s" in text
    # 3.42 GB of weights and 0.10 GB of cache at 4.8 TB/s
    assert result.step_memory_bytes == pytest.approx(3.523e9, rel=1e-3)
    assert result.roofline_seconds == pytest.approx(3.523e9 / 4.8e12, rel=1e-3)
    assert result.roofline_tokens_per_second == pytest.approx(1 / result.roofline_seconds)
    assert sum(row.share for row in result.ops) == pytest.approx(1)
    assert sum(row.weight_bytes + row.kv_bytes for row in result.ops) == pytest.approx(result.step_memory_bytes)
    assert str(out) in text


def test_json_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    one = as_json(capsys, QWEN, "--experts", "mxfp4")
    half = as_json(capsys, QWEN, "--experts", "mxfp4", "--bandwidth-fraction", "0.5")
    assert half["roofline_seconds"] == pytest.approx(2 * one["roofline_seconds"], rel=1e-2)
    fp8 = as_json(capsys, QWEN, "--experts", "mxfp4", "--attention", "fp8", "--lm-head", "fp8")
    assert fp8["step_memory_bytes"] < 0.7 * one["step_memory_bytes"]
    assert (fp8["weight_formats"]["lm_head"], one["weight_formats"]["lm_head"]) == ("fp8", "bf16")
    drafted = as_json(capsys, QWEN, "--rows", "8", "--acceptance-length", "4", "--draft-us", "100")
    seconds = drafted["roofline_seconds"] + 100e-6
    assert drafted["roofline_tokens_per_second"] == pytest.approx(4 / seconds)
    batch = as_json(capsys, QWEN, "--rows", "8")
    assert batch["roofline_tokens_per_second"] == pytest.approx(8 / batch["roofline_seconds"])


def test_eight_gpus_share_the_largest_model(capsys: pytest.CaptureFixture[str]) -> None:
    name = SHAPES / "mimo-v2.5-pro.json"
    eight = as_json(capsys, name, "--num-gpus", "8", "--rows", "8", "--sequences", "1")
    assert eight["proof"]["is_safe"] and eight["num_layers"] == 70
    assert "MORE THAN THE 141 GB" in run(capsys, name)
    assert "MORE THAN" not in run(capsys, name, "--num-gpus", "8")
    one = as_json(capsys, name, "--rows", "8", "--sequences", "1")
    # All matrices are divided but the router, which is small
    assert eight["step_memory_bytes"] == pytest.approx(one["step_memory_bytes"] / 8, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H2000"], "unknown GPU 'H2000'; did you mean 'H200'"),
        (["--rows", "17"], "rows"),
        (["--rows", "3", "--sequences", "2"], "3 rows cannot be shared out evenly among 2 sequences"),
        (["--acceptance-length", "2"], "a step of 1 rows a sequence cannot gain 2.0 tokens"),
        (["--context", "50000"], "context 50000 is outside the model's 1 to 40960 positions"),
        (["--num-gpus", "3"], "cannot be divided among 3 GPUs"),
        (["--experts", "int4"], "experts"),
        (["--row", "3"], "did you mean '--rows'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, QWEN, *arguments, code=2).strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_models_that_cannot_be_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "there is no config.json at" in run(capsys, tmp_path, code=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    assert "'llama' is none that the runtime can plan for" in run(capsys, tmp_path, code=2)
    fields = json.loads(QWEN.read_text(encoding="utf-8"))
    del fields["num_experts"]
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert "configuration needs num_experts" in run(capsys, tmp_path, code=2)


def test_a_local_model_is_planned_from_its_directory(capsys: pytest.CaptureFixture[str], tiny_packed_dir: Path) -> None:
    result = as_json(capsys, tiny_packed_dir, "--context", "100")
    assert result["model_type"] == "mimo_v2_flash" and result["proof"]["is_safe"]


def test_a_drafter_is_planned_with_its_target(
    capsys: pytest.CaptureFixture[str], tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> None:
    """Its phases are rows of their own, proved and costed; what it needs, or has no phases, is one line."""
    options = ("--context", "100", "--rows", "8", "--sequences", "1")
    drafted = as_json(capsys, tiny_packed_dir, *options, "--drafter", tiny_packed_drafter_dir)
    plain = as_json(capsys, tiny_packed_dir, *options)
    ops = [row["op"] for row in drafted["ops"]]
    assert [op for op in ops if op not in {row["op"] for row in plain["ops"]}] == [
        "D.block", "D.qkv", "D.attention", "D.combine", "D.o_proj", "D.dense_gate_up", "D.dense_down", "D.lm_head",
        "pick", "fuse", "context", "append",
    ]  # fmt: skip
    assert drafted["proof"]["is_safe"] and drafted["weights_bytes"] > plain["weights_bytes"]
    assert drafted["step_memory_bytes"] > plain["step_memory_bytes"]
    path = tiny_packed_drafter_dir / "config.json"
    assert as_json(capsys, tiny_packed_dir, *options, "--drafter", path)["ops"] == drafted["ops"]
    # The rows of a step that drafts are one sequence's unless it is said otherwise.
    text = run(capsys, tiny_packed_dir, "--drafter", path, "--rows", "8", "--context", "64")
    assert "(1 sequence, acceptance length 1, " in text

    def refusal(*arguments: object) -> str:
        return run(capsys, tiny_packed_dir, "--context", "100", *arguments, code=2)

    assert "at least two rows a sequence" in refusal("--drafter", path)
    assert "more than the drafter's 7" in refusal("--drafter", path, "--rows", "16", "--sequences", "1")
    assert "give one of them" in refusal("--drafter", path, "--rows", "8", "--draft-us", "5", "--sequences", "1")
    assert "leave out num_gpus" in refusal("--drafter", path, "--rows", "8", "--num-gpus", "2", "--sequences", "1")
    fields = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_size": 8}), encoding="utf-8")
    assert "drafter of another target" in refusal("--drafter", tmp_path, "--rows", "8", "--sequences", "1")
