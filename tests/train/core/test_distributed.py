"""Two processes on CPUs: the loop under DeepSpeed gives the losses of one process, and resumes."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from speedstack.eval.results.metrics import read_metrics
from speedstack.quant.checkpoint import load_model
from speedstack.support.config import dump_config
from speedstack.train.config.recipes import PretrainConfig, QatConfig
from speedstack.train.core.distributed import World, check_divisible, resolve_device
from speedstack.train.core.loop import RunResult
from speedstack.train.qat.recipe import qat

# ZeRO-3 on CPUs can abort while the interpreter shuts down, after everything is done and on disk; the job is judged by
# what it left, and leaves without destructors.
_JOB = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from speedstack.quant.checkpoint import load_model
from speedstack.support.config import read_config
from speedstack.train.config.recipes import QatConfig
from speedstack.train.core.distributed import join_world
from speedstack.train.qat.recipe import qat
from speedstack.train.core.sharding import gathered, is_sharded, load_for_stage

def check_loading(path, config):
    wrong = []
    with join_world(config) as world:
        for dtype in (torch.float32, torch.bfloat16):
            sharded, whole = load_for_stage(path, dtype, 3, world), load_model(path, dtype=dtype)
            for (name, parameter), expected in zip(sharded.named_parameters(), whole.parameters(), strict=True):
                num_elements = parameter.numel()
                with gathered([parameter]):
                    same = parameter.dtype == expected.dtype and torch.equal(parameter, expected)
                    if not (is_sharded(parameter) and num_elements == 0 and same):
                        wrong.append(name)
            expected = dict(whole.named_buffers())
            wrong += [name for name, buffer in sharded.named_buffers() if not torch.equal(buffer, expected[name])]
        path.with_suffix(f".{world.rank}.json").write_text(json.dumps(wrong))

for path in map(Path, sys.argv[1:]):
    if path.suffix == ".yaml":
        config = read_config(QatConfig, path)
        qat(config)
    else:
        check_loading(path, config)
sys.stderr.flush()
os._exit(0)
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_give_the_losses_of_one_at_every_stage(
    pretrained: RunResult,
    make_qat_config: Callable[..., QatConfig],
    random_model: Callable[[str, Path], Path],
    tmp_path: Path,
    torchrun: Callable[[str, Path, Sequence[Path]], None],
) -> None:
    def config(name: str, **changes: Any) -> QatConfig:
        options = {"optim__name": "adamw", "optim__lr": 1e-3, "optim__weight_decay": 0.1, "qat__trainable": "all"}
        options |= {"run__name": name, "qat__look_every": 2} | changes
        return make_qat_config(tmp_path, pretrained.export_path, **options)

    stages = {f"zero-{stage}": config(f"zero-{stage}", distributed__zero_stage=stage) for stage in range(4)}
    jobs = stages | {
        "lean": config("lean", distributed__zero_stage=3, qat__activation_checkpointing=True),
        "muon": config("muon", optim__name="muon", optim__lr=1e-3, loop__micro_batch_size=1),
        "bf16": config(
            "bf16", distributed__zero_stage=3, qat__trainable="experts", run__precision="bfloat16",
            qat__teacher_dtype="bfloat16", qat__dampening=0.01, loop__micro_batch_size=1,
        ),
    }  # fmt: skip
    for name, job in jobs.items():
        (tmp_path / f"{name}.yaml").write_text(dump_config(job))
    torchrun(_JOB, tmp_path / "job.py", [tmp_path / f"{name}.yaml" for name in jobs])

    # One process against two: float32 sums in another order. A weight on the edge of two MXFP4 codes may fall to the
    # other side, which moves a KL of 1e-3 and its gradient by some per cent and the held-out loss not at all.
    for name in ("zero-0", "muon", "bf16"):
        values = jobs[name].model_dump()
        values["run"]["name"] += "-alone"
        values["distributed"]["zero_stage"] = 0
        alone = qat(QatConfig.model_validate(values))
        assert_same_numbers(alone.path, jobs[name].run_directory, rel=0.05)
        exported, expected = load_model(jobs[name].run_directory / "export"), load_model(alone.export_path)
        assert exported.state_dict().keys() == expected.state_dict().keys()
    # Stage against stage: the same sums over the same two processes, but for the clipping norm's.
    for name in ("zero-1", "zero-2", "zero-3", "lean"):
        assert_same_numbers(jobs["zero-0"].run_directory, jobs[name].run_directory, rel=1e-5)

    # Resume: without export and without the last checkpoint a run goes on from step 4 to the same end. In the same
    # processes, families whose experts are stored in two other ways are loaded in parts.
    resumed = ("zero-1", "zero-2", "zero-3")
    expected_lines = {name: numbers(jobs[name].run_directory) for name in resumed}
    for name in resumed:
        directory = jobs[name].run_directory
        os.rename(directory / "export", tmp_path / f"{name}-export")
        (directory / "checkpoints" / "step-6" / "COMPLETE.json").unlink()
    families = [random_model(family, tmp_path / family) for family in ("qwen3_moe", "gpt_oss", "minimax_m2")]
    models = [tmp_path / "pretrained", *families]
    shutil.copytree(pretrained.export_path, models[0])
    torchrun(_JOB, tmp_path / "job.py", [*(tmp_path / f"{name}.yaml" for name in resumed), *models])
    for name in resumed:
        directory = jobs[name].run_directory
        assert numbers(directory) == expected_lines[name]
        first, second = (load_model(path).state_dict() for path in (tmp_path / f"{name}-export", directory / "export"))
        assert all(torch.equal(first[key], second[key]) for key in first)
        manifest = json.loads((directory / "checkpoints" / "step-6" / "COMPLETE.json").read_text())
        assert manifest["world_size"] == 2
    for path in models:
        for rank in range(2):
            assert json.loads(path.with_suffix(f".{rank}.json").read_text()) == [], path
    with pytest.raises(ValueError, match="there is one: start with torchrun"):
        qat(jobs["zero-2"])


def numbers(run_directory: Path) -> list[dict[str, Any]]:
    """The record without what a clock says."""
    clock = {"elapsed_seconds", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in read_metrics(run_directory)]


def assert_same_numbers(directory: Path, other: Path, rel: float) -> None:
    for one, two in zip(numbers(directory), numbers(other), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        for key in {"loss", "grad_norm", "heldout_loss", "heldout_kl"} & one.keys():
            tolerance = min(rel, 1e-3) if key == "heldout_loss" else rel
            assert two[key] == pytest.approx(one[key], rel=tolerance), (other.name, one["step"], key)


def test_shares_are_equal_and_in_order() -> None:
    worlds = [World(rank, 3, torch.device("cpu")) for rank in range(3)]
    assert [list(world.share(range(7))) for world in worlds] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"loop": {"batch_size": 6}}, 4, "loop.batch_size 6 is not a multiple of 4"),
        ({"loop": {"batch_size": 8, "micro_batch_size": 4}}, 4, "not a multiple of 16"),
        ({"distributed": {"zero_stage": 2}}, 1, "start with torchrun"),
        ({"distributed": {"zero_stage": 1}}, 2, "Muon needs whole matrices"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_divisible(PretrainConfig.model_validate(changes), world_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        resolve_device("cuda")


def test_a_mean_is_over_the_processes_that_have_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(totals: torch.Tensor) -> None:
        totals += torch.tensor([[5.0, 1.0], [1.0, 1.0], [0.0, 0.0], [float("nan"), 1.0]], dtype=torch.float64)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    world = World(rank=0, size=2, device=torch.device("cpu"))
    mean = world.mean({"one": None, "both": 3.0, "none": None, "bad": 1.0})
    assert (mean["one"], mean["both"]) == (5.0, 2.0) and math.isnan(mean["bad"]) and "none" not in mean
    assert World(rank=0, size=1, device=torch.device("cpu")).mean({"a": None, "b": 1.0}) == {"b": 1.0}
