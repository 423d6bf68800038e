"""vLLM and llama.cpp themselves on a tiny Qwen3-MoE, where `make peers` has put them; elsewhere skipped by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.eval.data.prompts import PromptSet
from speedstack.eval.results.failures import PeerFailure
from speedstack.eval.results.speed import TimingResult
from speedstack.eval.speed import random_model
from speedstack.eval.speed.contestants import Peer, TimingSettings, measure_timing
from speedstack.eval.speed.peers.install import ENVIRONMENT
from speedstack.eval.speed.peers.process import check_installed
from speedstack.runtime.model.released_models import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # vLLM compiles
PYTHON = Path(__file__).parents[3] / ENVIRONMENT / "bin" / "python"
PROMPTS = [[5, 17, 200, 31, 8, 90], [299, 298, 297], [7] * 40, [12, 250]]


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TimingResult]:
    """`race(peer, module, package)`: a race of the engine and a peer, one and two sequences at once."""

    def config(model: str) -> Any:
        made = tiny_config(model)
        made.vocab_size, made.moe_intermediate_size, made.head_dim = 300, 64, 32  # vLLM has kernels for these
        return made

    def run(peer: Peer, module: str, package: str) -> TimingResult:
        try:
            check_installed(PYTHON, module, package)
        except PeerFailure as absent:
            pytest.skip(str(absent))
        monkeypatch.setattr(random_model, "released_config", config)
        random_model.write_random_model("qwen3-30b-a3b", tmp_path / "model")
        settings = TimingSettings(
            num_new_tokens=16,
            num_repeats=1,
            backend="reference",
            peers=(peer,),
            batch_sizes=(1, 2),
            gguf_weights=("f32",),
            copies=tmp_path / "copies",
            vllm_python=PYTHON,
            llama_cpp_python=PYTHON,
        )
        sets = [PromptSet("a", "made up", PROMPTS)]
        return measure_timing(tmp_path / "model" / random_model.PACKED, None, sets, settings, progress=False)

    return run


@pytest.mark.parametrize(
    ("peer", "module", "package"), [("vllm", "vllm", "vllm"), ("llama.cpp", "llama_cpp", "llama-cpp-python")]
)
def test_a_peer_says_what_the_engine_says(
    race: Callable[..., TimingResult], peer: Peer, module: str, package: str
) -> None:
    result = race(peer, module, package)
    assert not result.unavailable, result.unavailable
    for entry in result.sets:
        _, found = entry.contestants
        assert found.identity is not None
        # llama.cpp rounds activations for products with MXFP4, which may decide between near ties.
        assert found.identity.num_identical >= (len(PROMPTS) if peer == "vllm" else 2), found.identity
    assert torch.get_num_threads() == result.num_threads
