"""The peer on tiny models: steps at two depths over a filled static cache, traceable whole, with weights like ours."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from speedstack.eval.gpu_suite.backends import model_config
from speedstack.eval.gpu_suite.peer import Peer, Step, extrapolate
from speedstack.eval.gpu_suite.scale import Cell, scale_for
from speedstack.eval.speed.random_model import draw_weights
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.released_models import MODELS
from speedstack.runtime.model.synthetic_weights import random_weights
from speedstack.runtime.model.weights import MoeWeights

SCALE = scale_for("cpu")


@pytest.mark.parametrize("model", MODELS)
def test_every_cell_is_timed_and_rewound(model: str) -> None:
    num_layers = spec_from_config(model_config(SCALE, model)).num_layers
    peer = Peer(SCALE, model, num_layers, seed=0)
    for cell in (*SCALE.cells, Cell(1, 30)):
        ready = peer.prepare(cell)
        assert ready["is_extrapolated"] == (num_layers != 2) and ready["depths"] == [1, 2]
        for _ in range(2):
            sample = peer.sample()
            assert min(sample["shallow"], sample["deep"]) > 0
            assert sample["seconds"] == extrapolate(sample["shallow"], sample["deep"], (1, 2), num_layers)
        assert peer.cost(1e9)["read_bytes"] > 0
        for step, layers in zip(peer.steps, peer.depths, strict=True):
            step.run(3)
            assert len(step.cache.layers) == layers
            for layer in step.cache.layers:
                assert layer.keys.isfinite().all() and layer.keys.shape[2] == layer.max_cache_len
                if not hasattr(layer, "cumulative_length_int"):
                    assert int(layer.cumulative_length) == cell.context + 2 * cell.rows


def test_extrapolation() -> None:
    assert extrapolate(3.0, 7.0, (2, 4), 24) == pytest.approx(3.0 + 22 * 2.0)
    assert extrapolate(3.0, 7.0, (2, 4), 4) == pytest.approx(7.0)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_step_is_one_graph_and_is_not_traced_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks the graph raises under `fullgraph`; a second trace would be timed as a step."""
    from torch._dynamo.utils import counters

    compile_whole = torch.compile
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def traced(function: Any, mode: str, fullgraph: bool) -> Any:
        assert mode == "reduce-overhead" and fullgraph
        return compile_whole(function, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    counters.clear()
    scale = replace(SCALE, compiles_peer=True)
    peer = Peer(scale, model, 2, seed=0)
    for made in peer.models:
        made.set_experts_implementation("batched_mm")
    for cell in (Cell(1, 20), Cell(3, 20)):  # a step rolls a full window in another way than it extends one
        graphs.clear()
        with torch.no_grad():
            step = Step(scale, peer.models[1], cell)
            step.run(4)
        assert len(graphs) == 1 and not counters["graph_break"]


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_drawn_as_ours(model: str) -> None:
    """Deviation of every kind of matrix, on tensors large enough to have one."""
    from transformers import AutoModelForCausalLM

    config = model_config(SCALE, model)
    made = AutoModelForCausalLM.from_config(config)
    draw_weights(made, config.num_hidden_layers, torch.Generator().manual_seed(0))
    ours = random_weights(spec_from_config(config), torch.float32, torch.device("cpu"), is_packed=False)
    moe = ours.layers[-1].mlp
    assert isinstance(moe, MoeWeights)
    theirs = made.model.layers[-1]
    gate = theirs.mlp.router if model == "gpt-oss-20b" else theirs.mlp.gate
    pairs = [
        (made.model.embed_tokens.weight, ours.embedding_VD),
        (made.lm_head.weight, ours.lm_head_VD),
        (theirs.self_attn.q_proj.weight, ours.layers[-1].attention.qkv_OD),
        (theirs.self_attn.o_proj.weight, ours.layers[-1].attention.output_DO),
        (theirs.mlp.experts.gate_up_proj, moe.gate_up_EID),
        (theirs.mlp.experts.down_proj, moe.down_EDI),
        (gate.weight, moe.router_ED),
    ]
    for number, (their_weight, our_weight) in enumerate(pairs):
        assert isinstance(our_weight, torch.Tensor)
        assert their_weight.std().item() == pytest.approx(our_weight.std().item(), rel=0.15), number
