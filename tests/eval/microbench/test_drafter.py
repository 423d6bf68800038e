"""The drafter bench: our contestant runs and learns, and the chunked loss holds less memory than all logits."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from speedstack.eval.microbench.drafter import DrafterCost, main, measure_steps
from speedstack.eval.microbench.drafter_race import Batch, Shape, our_step, peer_step

SHAPE = Shape(
    name="test",
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_taps=2,
    vocab_size=64,
    num_windows=2,
    length=24,
    num_anchors=4,
    block_size=4,
)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_our_steps_are_timed(loss):
    times = measure_steps(SHAPE, loss, 2, with_peer=False)
    (ours,) = times.contestants
    assert ours.contestant == "speedstack" and len(ours.step_ms) == 2 and ours.num_blocks == 8
    assert times.speedup is None


@pytest.mark.skipif(importlib.util.find_spec("speculators") is None, reason="speculators is not installed")
@pytest.mark.parametrize("is_packed", [False, True])
def test_speculators_takes_the_same_batch(is_packed):
    peer_step(SHAPE, "ce", Batch(SHAPE), "sdpa", is_packed)(0)


def test_a_step_changes_the_drafter(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spying_step(self, *args):
        seen.append([p.grad.abs().max().item() for group in self.param_groups for p in group["params"]])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spying_step)
    our_step(SHAPE, "ce", Batch(SHAPE))(0)
    assert seen and min(seen[0]) > 0


def test_peak_memory_is_a_part_of_the_plain_ways(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("speedstack.eval.microbench.drafter.SHAPES", (SHAPE,))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sizes = ["--num-blocks", "256", "--hidden-size", "32", "--vocab-size", "8192"]
    assert main(["--num-steps", "1", "--out", str(tmp_path / "cost.json"), *sizes]) == 0
    assert "left out: speculators is not installed" in capsys.readouterr().err
    result = DrafterCost.load(tmp_path / "cost.json")
    chunked, plain = result.memory
    assert (chunked.way, plain.way) == ("chunked", "plain")
    assert plain.peak_bytes > plain.logits_bytes
    assert chunked.peak_bytes < plain.peak_bytes / 3
    assert result.unavailable[0].name == "speculators"


def test_unknown_shapes_are_refused():
    command = [sys.executable, "-m", "speedstack.eval.microbench.drafter", "--shapes", "huge"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'huge'" in done.stderr
