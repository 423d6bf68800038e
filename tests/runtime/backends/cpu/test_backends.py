"""Backend 'cpu' on every instruction set: the reference's logits, and the same bits in any company and on any set.

Legend: T tokens, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.quant.checkpoint import load_checkpoint
from speedstack.runtime.backends.base import Backend, Rows
from speedstack.runtime.backends.cpu.backend import CpuBackend, HeldAs
from speedstack.runtime.backends.cpu.kernels.build import VARIABLE, available_sets
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.weights import ModelWeights, read_weights
from tests.packing import save_packed
from tests.runtime.model import test_gpt_oss, test_qwen3_moe

NUM_TOKENS = 90  # past a prompt chunk, more than five windows of 16, past the original length of stretched embeddings
MODELS: dict[str, Callable[[], Any] | None] = {
    "mimo": None,
    "qwen3_moe": test_qwen3_moe.build_model,
    "qwen3_moe with biases and yarn": lambda: test_qwen3_moe.build_model(
        attention_bias=True, rope_parameters=test_qwen3_moe.YARN
    ),
    "gpt_oss": test_gpt_oss.build_model,
}
IDS = torch.randint(3, 200, (NUM_TOKENS,), generator=torch.Generator().manual_seed(11)).tolist()


@pytest.fixture(scope="module", params=list(MODELS))
def weights(
    request: pytest.FixtureRequest, tiny_packed_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> ModelWeights:
    """A model with experts in MXFP4."""
    build, path = MODELS[request.param], tiny_packed_dir
    if build is not None:
        path = tmp_path_factory.mktemp("packed")
        save_packed(build(), path / "model")
        path = path / "model"
    checkpoint = load_checkpoint(path)
    spec = spec_from_config(checkpoint.config)
    return read_weights(spec, dict(checkpoint.tensors), torch.float32, torch.device("cpu"), tied=False)


@pytest.fixture
def with_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Every step takes so many threads from here on, whether they help or not."""
    return lambda number: monkeypatch.setattr(CpuBackend, "_num_threads", lambda self, num_rows: number)


def run(backend: Backend, chunk: int, slot: int = 0) -> torch.Tensor:
    """Logits [T, V], `chunk` rows a step."""
    parts = []
    for first in range(0, NUM_TOKENS, chunk):
        tokens = IDS[first : first + chunk]
        rows = Rows(tokens, [slot] * len(tokens), list(range(first, first + len(tokens))))
        parts.append(backend.step(rows, range(len(tokens)))[0].clone())
    return torch.cat(parts)


def test_logits_equal_the_references(weights: ModelWeights, loaded_set: str) -> None:
    expected_TV = run(ReferenceBackend(weights, None, 1, 128), 64)
    # float32 sums of up to 96 terms in another order, through three layers; logits up to about 20
    torch.testing.assert_close(run(CpuBackend(weights, None, 1, 128), 64), expected_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("held", [HeldAs(), HeldAs("int8", "bfloat16")], ids=["as stored", "fewer bits"])
def test_logits_are_bit_identical_for_any_rows_threads_and_instruction_set(
    held: HeldAs, weights: ModelWeights, with_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_threads(1)
    monkeypatch.setenv(VARIABLE, available_sets()[0])
    alone_TV = run(CpuBackend(weights, None, 1, 128, held), 1)
    assert alone_TV.isfinite().all()
    for name in available_sets():
        monkeypatch.setenv(VARIABLE, name)
        for num_threads in (1, 2, 3, 8):
            with_threads(num_threads)
            for chunk in (1, 3, 8, 13, 64):
                found_TV = run(CpuBackend(weights, None, 1, 128, held), chunk)
                assert torch.equal(found_TV, alone_TV), f"{name}, {num_threads} threads, chunks of {chunk}"


def test_a_row_is_bit_identical_alone_and_among_others(
    weights: ModelWeights, loaded_set: str, with_threads: Callable[[int], None]
) -> None:
    with_threads(2)
    alone_TV = run(CpuBackend(weights, None, 1, 128), 1)
    together = CpuBackend(weights, None, 4, 128)
    for cache in together._caches:
        cache.fill_(float("nan"))
    for t in range(NUM_TOKENS):
        # Slot 2 is the sequence; others are ahead of it by some tokens, and one begins again all the time.
        rows = Rows([7, *IDS[:3], IDS[t], 9, 9], [0, 1, 1, 1, 2, 3, 3], [t % 5, 0, 1, 2, t, t, t + 1])
        logits, _ = together.step(rows, [1, 4])
        assert torch.equal(logits[1], alone_TV[t]) and torch.equal(logits[0], alone_TV[0])
