"""The graph backend, interpreted or on a GPU: every buffer as the reference has it, and a row's bits its own.

Legend: W wanted rows, V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.buffers import row_records
from speedstack.runtime.backends.gpu.expected_buffers import expected_buffers, found_buffer
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.model.synthetic_weights import empty_weights
from speedstack.runtime.model.weights import ModelWeights
from tests.devices import not_interpreted
from tests.runtime.backends.gpu.plan_cases import (
    CASES,
    CPU,
    LOST,
    MAX_LENGTH,
    NUM_ROWS,
    NUM_SLOTS,
    assert_buffers_close,
    bits_of,
    check_caches,
    check_text,
    decided,
    dequantized,
    fill,
    placed,
    prefilled,
    rows_of,
)


def graph_of(weights: ModelWeights, reference: ReferenceBackend, split_size: int) -> GraphBackend:
    backend = GraphBackend(weights, None, NUM_SLOTS, MAX_LENGTH, NUM_ROWS, split_size)
    fill(backend, reference)
    return backend


@pytest.mark.parametrize(("case", "split_size", "queries"), [
    ("mimo", 16, 32), ("qwen3-mxfp4", 16, 4), ("gpt-oss-mxfp4", 16, 32), ("qwen3-mxfp4", 2, 32),
    ("mimo-fp8-mxfp4", 16, 32),
])  # fmt: skip
def test_every_buffer_equals_the_reference(
    case: str, split_size: int, queries: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences, one in two splits. Queries 4: a tile a row; splits of 2: more than are combined at once."""
    from speedstack.runtime.backends.gpu.bindings import layers

    monkeypatch.setattr(layers, "QUERIES", queries)
    weights = placed(CASES[case](), device)
    reference, ids = prefilled(weights, [39, 15])
    backend = graph_of(weights, reference, split_size)
    rows = rows_of(ids, (1, 15), (1, 16), (0, 39))
    expected = expected_buffers(reference, rows)
    decided_R = decided(reference, expected, device)
    backend.memory.rows.copy_(row_records(rows, NUM_ROWS))
    compared = set()
    for launch in backend.launches:
        launch.run(is_dependent=False)
        found = found_buffer(backend, launch.phase, 3)
        if found is not None:
            name = launch.phase.name
            compared.add(name)
            assert_buffers_close(found, expected[name], name, decided_R)
    assert compared == set(expected)
    check_caches(backend, reference)
    chosen_R, wanted_R = backend.memory.chosen[0, :3], backend.memory.logits_VR[:, :3].argmax(0)
    assert chosen_R.tolist() == wanted_R.tolist()
    assert decided_R is not None or chosen_R.tolist() == expected["lm_head"].argmax(-1).tolist()


def test_fp8_in_registers_is_bit_for_bit_what_it_dequantizes_to(device: torch.device) -> None:
    """The kernels on FP8 weights, and on the values that every other backend multiplies by."""
    weights = placed(CASES["mimo-fp8-mxfp4"](), device)
    reference, ids = prefilled(weights, [39, 15])
    rows = rows_of(ids, (1, 15), (1, 16), (0, 39))
    found = []
    for held in (weights, dequantized(weights)):
        backend = GraphBackend(held, None, NUM_SLOTS, MAX_LENGTH, NUM_ROWS, 16)
        fill(backend, reference)
        logits_WV, _ = backend.step(rows, range(3))
        found.append([logits_WV, *backend.memory.caches])
        fp8_rows = [launch.binding.constants.values.get("FP8_ROWS") for launch in backend.launches]
        assert sum(map(bool, fp8_rows)) == (7 if held is weights else 0)
        assert held is not weights or {4, 2, 128} <= set(fp8_rows)
    for kept, plain in zip(*found, strict=True):
        assert torch.equal(bits_of(kept), bits_of(plain))


@pytest.mark.parametrize("case", ["mimo", "gpt-oss-mxfp4"])
def test_unwritten_memory_has_no_influence(case: str, device: torch.device) -> None:
    """What fills blocks and tiles, and rows that the step does not have: numbers or not, results are the same bits."""
    weights = placed(CASES[case](), device)
    reference, ids = prefilled(weights, [39, 15])
    rows, found = rows_of(ids, (1, 15), (1, 16), (0, 39)), []
    for value in (0.0, float("nan")):
        backend = graph_of(weights, reference, 16)
        for name, buffer in backend.memory.buffers.items():
            if buffer.is_floating_point():
                buffer.fill_(value)
            elif name == "routes":
                buffer.fill_(0 if value == 0.0 else 2**30)
        logits_WV, best = backend.step(rows, range(3))
        found.append((best, logits_WV, backend.memory.caches))
    assert found[0][0] == found[1][0] and torch.isfinite(found[1][1]).all()
    for clean, other in zip([found[0][1], *found[0][2]], [found[1][1], *found[1][2]], strict=True):
        assert torch.equal(bits_of(clean), bits_of(other))


@pytest.mark.parametrize("case", ["mimo", "gpt-oss-mxfp4"])
def test_a_row_is_bit_identical_alone_and_among_others(case: str, device: torch.device) -> None:
    """The same row alone, as the last of a draft that crosses a split, and behind other rows, one of them lost."""
    weights = placed(CASES[case](), device)
    reference, ids = prefilled(weights, [31, 5, 20])
    weights.embedding_VD[LOST] = float("nan")

    def decode(*steps: Rows) -> tuple[torch.Tensor, list[int]]:
        backend = graph_of(weights, reference, split_size=16)
        for rows in steps[:-1]:
            backend.step(rows, [])
        return backend.step(steps[-1], range(len(steps[-1].tokens)))

    before, alone = rows_of(ids, (0, 31)), rows_of(ids, (0, 32))
    expected_V = decode(before, alone)[0][0]
    assert torch.isfinite(expected_V).all()
    assert torch.equal(decode(rows_of(ids, (0, 31), (0, 32)))[0][1], expected_V), "as the last row of a draft"
    crowd = rows_of(ids, (2, 20), (1, 5), (1, 6), (0, 32))
    logits_WV, best = decode(before, replace(crowd, tokens=[LOST, *crowd.tokens[1:]]))
    assert torch.equal(logits_WV[3], expected_V), "behind rows of other sequences"
    assert logits_WV[0].isnan().all() and torch.isfinite(logits_WV[1:]).all()
    assert best == [-1, *logits_WV[1:].argmax(-1).tolist()]


@pytest.mark.interpret
def test_features_reach_the_drafter(tiny_model_dir: Path, tiny_drafter_dir: Path) -> None:
    """Its context, and with it its proposals, are the reference backend's; more rows than a step holds are cut."""
    from speedstack.dflash.checkpoint import load_drafter
    from speedstack.quant.checkpoint import load_checkpoint
    from speedstack.runtime.backends.base import DraftRequest
    from speedstack.runtime.model.families.registry import spec_from_config
    from speedstack.runtime.model.weights import read_weights

    checkpoint = load_checkpoint(tiny_model_dir)
    spec = spec_from_config(checkpoint.config)
    weights = read_weights(spec, dict(checkpoint.tensors), torch.float32, CPU, tied=False)
    drafter = load_drafter(tiny_drafter_dir)
    reference = ReferenceBackend(weights, drafter, 1, 32)
    graph = GraphBackend(weights, None, 1, 32, num_rows=4, split_size=16)
    graph.set_drafter(drafter)
    rows = Rows([5, 6, 7, 8, 9], [0] * 5, list(range(5)))
    logits, best = zip(*[backend.step(rows, [0, 4]) for backend in (reference, graph)], strict=True)
    # float32 sums of up to 96 terms in another order, through three layers of logits up to about 20
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert best[0] == best[1]
    drafts = [backend.draft([DraftRequest(best[0][1], 0, 5)], 7)[0] for backend in (reference, graph)]
    assert drafts[0].tokens == drafts[1].tokens
    assert graph.weight_bytes() == reference.weight_bytes() and graph.cache_bytes() > 0


@pytest.mark.interpret
def test_engine_writes_the_same_text(tmp_path: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = make_tiny_model(num_hidden_layers=1, layer_types=["sliding_attention"], mlp_layer_types=["sparse"])
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    check_text(tmp_path, "graph")


@pytest.mark.interpret
def test_bfloat16_is_refused_under_the_interpreter() -> None:
    weights = empty_weights(CASES["qwen3-mxfp4"]().spec, torch.bfloat16, CPU, True)
    with pytest.raises(ValueError, match="float32 only under Triton's interpreter"):
        GraphBackend(weights, None, 1, 32)


@not_interpreted
def test_refused_by_name_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = CASES["qwen3-mxfp4"]()
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match=r"'graph' runs on a GPU; on a CPU .* TRITON_INTERPRET=1"):
            GraphBackend(weights, None, 1, 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'graph' needs Triton, which is not installed"):
        GraphBackend(weights, None, 1, 32)
