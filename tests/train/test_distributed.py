"""Two processes on CPUs: the loop under DeepSpeed gives the losses of one process, and resumes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.quant.checkpoint import load_model
from speedstack.train.config import PretrainConfig, QatConfig, dump_config
from speedstack.train.distributed import World, check_divisible, resolve_device
from speedstack.train.loop import RunResult
from speedstack.train.metrics import read_metrics
from speedstack.train.qat import qat

# ZeRO-3 on CPUs can abort while the interpreter shuts down, after everything is done and on disk; the job is judged by
# its run directory, and leaves without destructors.
_JOB = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from speedstack.train.config import QatConfig, read_config
from speedstack.train.qat import qat
for path in sys.argv[1:]:
    qat(read_config(QatConfig, Path(path)))
sys.stderr.flush()
os._exit(0)
"""


def torchrun(config_paths: list[Path], script: Path) -> None:
    script.write_text(_JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command + [str(path) for path in config_paths], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def evaluations(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if line["kind"] == "eval"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_give_the_losses_of_one(
    pretrained: RunResult, make_qat_config: Callable[..., QatConfig], tmp_path: Path
) -> None:
    def config(name: str, **changes: Any) -> QatConfig:
        options = {"optim__name": "adamw", "optim__lr": 1e-3, "qat__trainable": "all", "run__name": name} | changes
        return make_qat_config(tmp_path, pretrained.export_path, **options)

    jobs = {
        "muon": config("muon", optim__name="muon", optim__lr=1e-3, loop__micro_batch_size=1),
        "zero-2": config("zero-2", distributed__zero_stage=2),
        "zero-3": config("zero-3", distributed__zero_stage=3, qat__trainable="experts"),
    }
    paths = []
    for name, job in jobs.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(dump_config(job))
    torchrun(paths, tmp_path / "job.py")
    for name, job in jobs.items():
        values = job.model_dump()
        values["run"]["name"] += "-alone"
        values["distributed"]["zero_stage"] = 0
        alone = qat(QatConfig.model_validate(values))
        for one, two in zip(read_metrics(alone.path), read_metrics(job.run_directory), strict=True):
            assert (one["kind"], one["step"]) == (two["kind"], two["step"])
            for key in {"loss", "grad_norm", "heldout_loss", "heldout_kl"} & one.keys():
                # float32 sums in another order; a weight on the edge of two MXFP4 codes may fall to the other side,
                # which moves a KL of 1e-3 and its gradient by some per cent and the held-out loss not at all.
                assert two[key] == pytest.approx(one[key], rel=1e-3 if key == "heldout_loss" else 0.05), (name, key)
        exported, expected = load_model(job.run_directory / "export"), load_model(alone.export_path)
        assert exported.state_dict().keys() == expected.state_dict().keys()

    # Resume: without export and without the last checkpoint the run goes on from step 4 to the same end.
    finished = evaluations(jobs["zero-2"].run_directory)
    directory = jobs["zero-2"].run_directory
    os.rename(directory / "export", tmp_path / "first-export")
    (directory / "checkpoints" / "step-6" / "COMPLETE.json").unlink()
    torchrun([tmp_path / "zero-2.yaml"], tmp_path / "job.py")
    assert evaluations(directory)[-1]["heldout_kl"] == finished[-1]["heldout_kl"]
    first, second = (load_model(path).state_dict() for path in (tmp_path / "first-export", directory / "export"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    manifest = json.loads((directory / "checkpoints" / "step-6" / "COMPLETE.json").read_text())
    assert manifest["world_size"] == 2
    with pytest.raises(ValueError, match="there is one: start with torchrun"):
        qat(jobs["zero-2"])


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
