"""Plans of real shapes: proved, tight (no wait is idle), costed by hand, and built from a config alone."""

import dataclasses
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedstack.runtime.model.config_file import read_model_config, spec_from_fields
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec
from speedstack.runtime.model.tensor_parallel import shard
from speedstack.runtime.model.weight_formats import WeightFormats, formats_from_fields
from speedstack.runtime.perf.cost import Assumptions, active_experts, step_cost, weights_bytes
from speedstack.runtime.perf.gpus import Gpu, gpu_named
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.step import build_plan
from speedstack.runtime.plan.tiling import MMA_TILES, choose_tile
from speedstack.runtime.plan.verify.access_tables import Tables
from speedstack.runtime.plan.verify.proof import prove
from tests.runtime.plan.exhaustive import Lists, search
from tests.runtime.plan.interpret import items_of

SHAPES = Path(__file__).parents[2] / "shapes"
ALL_SHAPES = sorted(path.stem for path in SHAPES.glob("*.json"))


def fields_of(name: str) -> dict[str, Any]:
    return json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))


def tiny_spec() -> ModelSpec:
    """Two layers: global attention with a dense MLP, a sliding window with experts. Odd sizes on purpose."""
    full = AttentionSpec(4, 2, 24, 16, 8, 1e4)
    sliding = AttentionSpec(4, 1, 24, 16, 8, 1e4, window=20, has_sinks=True)
    return ModelSpec(
        "tiny",
        100,
        40,
        1e-5,
        4096,
        (),
        (LayerSpec(full, DenseSpec(72)), LayerSpec(sliding, MoeSpec(6, 2, 24, "softmax", False, True))),
    )


def tiny_plan(num_programs: int = 3, rows: int = 3, has_prompt_lookup: bool = False) -> Plan:
    return build_plan(
        tiny_spec(),
        WeightFormats(),
        num_programs,
        rows,
        max_context=100,
        split_size=32,
        has_prompt_lookup=has_prompt_lookup,
    )


either = pytest.mark.parametrize("has_prompt_lookup", [False, True], ids=["plain", "look-up"])


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_plans_of_released_models_are_safe(name: str) -> None:
    spec, formats = read_model_config(SHAPES / f"{name}.json")
    for num_programs, rows, context in ((132, 1, 1024), (148, 16, 2000)):
        proof = prove(build_plan(spec, formats, num_programs, rows, context, has_prompt_lookup=rows > 1))
        assert proof.is_safe, proof.failure


@either
@pytest.mark.parametrize(("num_programs", "rows"), [(1, 1), (2, 16), (3, 3), (8, 1), (37, 5), (300, 16)])
def test_any_number_of_programs_and_rows_is_safe(num_programs: int, rows: int, has_prompt_lookup: bool) -> None:
    proof = prove(tiny_plan(num_programs, rows, has_prompt_lookup))
    assert proof.is_safe, proof.failure


def test_the_largest_model_is_planned_and_proved_in_time() -> None:
    started = time.process_time()
    spec, formats = read_model_config(SHAPES / "mimo-v2.5-pro.json")
    assert prove(build_plan(shard(spec, 8), formats, 132, 8, 131072, is_sharded=True)).is_safe
    assert time.process_time() - started < 10


@either
def test_no_wait_and_no_signal_of_a_plan_is_idle(has_prompt_lookup: bool) -> None:
    """Every wait and every signal is needed, and every threshold is the least: without it the proof fails."""
    plan = tiny_plan(has_prompt_lookup=has_prompt_lookup)
    num_mutants = 0
    for index, phase in enumerate(plan.phases):
        changes: list[dict[str, Any]] = [{"signals": ()}]
        for wait in phase.waits:
            changes += [{"waits": ()}, {"waits": (replace(wait, offset=wait.offset - 1),)}]
            changes += [{"waits": (replace(wait, offset=wait.offset - wait.per_step),)}]
            changes += [{"waits": (replace(wait, offset=wait.offset + 1),)}]
        for change in changes:
            phases = list(plan.phases)
            phases[index] = dataclasses.replace(phase, **change)
            mutant = replace(plan, phases=tuple(phases))
            assert prove(mutant).failure is not None, (phase.name, change)
            num_mutants += 1
    assert num_mutants == 5 * len(plan.phases)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_plans_of_random_shapes_are_safe(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    layers = []
    for _ in range(number(1, 3)):
        heads = number(1, 3)
        attention = AttentionSpec(
            heads * number(1, 4), heads, 8 * number(1, 6), 8 * number(1, 4), 8, 1e4,
            window=data.draw(st.sampled_from([None, 1, 20, 128])), has_sinks=data.draw(st.booleans()),
            has_bias=data.draw(st.booleans()),
        )  # fmt: skip
        experts = number(1, 40)
        moe = MoeSpec(experts, number(1, min(8, experts)), number(1, 70), "sigmoid", True, True)
        layers.append(LayerSpec(attention, moe if data.draw(st.booleans()) else DenseSpec(number(1, 300))))
    spec = ModelSpec("random", number(1, 500), number(1, 200), 1e-5, 4096, (), tuple(layers))
    plan = build_plan(spec, WeightFormats(), number(1, 40), number(1, 16), number(1, 4096), 16 * number(1, 20))
    proof = prove(plan)
    assert proof.is_safe, proof.failure


@either
def test_a_built_plan_under_every_interleaving(has_prompt_lookup: bool) -> None:
    """One layer with experts on two programs: no schedule does harm; a change that does is rejected."""
    attention = AttentionSpec(2, 1, 8, 8, 8, 1e4)
    layer = LayerSpec(attention, MoeSpec(2, 1, 8, "softmax", False, True))
    spec = ModelSpec("least", 16, 32, 1e-5, 64, (), (layer,))
    plan = build_plan(spec, WeightFormats(), 2, 1, 32, 16, has_prompt_lookup=has_prompt_lookup)
    assert len(plan.phases) == 12 + has_prompt_lookup and prove(plan).is_safe
    for seed in range(3):
        found = search(plan, num_steps=2, lists=Lists(seed))
        assert found.harm is None and found.num_states > 100, found
    num_harmful = 0
    for index, phase in enumerate(plan.phases):
        for changed in (replace(phase, waits=()), replace(phase, signals=())):
            phases = list(plan.phases)
            phases[index] = changed
            mutant = replace(plan, phases=tuple(phases))
            if any(search(mutant, 3, Lists(seed)).harm is not None for seed in range(3)):
                num_harmful += 1
                assert prove(mutant).failure is not None, phase.name
    # Some waits are not needed here: with so few items, one program runs both phases.
    assert num_harmful >= 15, num_harmful


@either
def test_no_two_phases_of_a_plan_can_be_swapped(has_prompt_lookup: bool) -> None:
    plan = tiny_plan(has_prompt_lookup=has_prompt_lookup)
    for index in range(len(plan.phases) - 1):
        phases = list(plan.phases)
        phases[index : index + 2] = phases[index : index + 2][::-1]
        assert prove(replace(plan, phases=tuple(phases))).failure is not None, phases[index].name


def test_buffers_that_live_at_once_cannot_share_memory() -> None:
    plan = tiny_plan(has_prompt_lookup=True)
    names = [buffer.name for buffer in plan.buffers]
    pairs = [("hidden", "router.6"), ("logits", "best"), ("L00.cache", "L01.cache"), ("hidden", "rows")]
    pairs += [("hidden", "sequences"), ("chosen", "rows"), ("chosen", "history"), ("sequences", "rows")]
    for a, b in pairs:
        buffers = list(plan.buffers)
        buffers[names.index(b)] = replace(buffers[names.index(b)], memory=a)
        failure = prove(replace(plan, buffers=tuple(buffers))).failure
        assert (failure is not None) == (b != "L01.cache"), (a, b, failure)
        if failure is not None:
            assert failure.kind in ("wrong value", "race")


def test_phases_and_items() -> None:
    plan = tiny_plan()
    names = [phase.name for phase in plan.phases]
    assert names[:6] == ["embed", "L00.qkv", "L00.attention", "L00.combine", "L00.o_proj", "L00.gate_up"]
    assert names[6:] == ["L00.down", "L01.qkv", "L01.attention", "L01.combine", "L01.o_proj", "L01.router",
                         "L01.gate_up", "L01.down", "lm_head", "logit_histogram", "sample", "accept"]  # fmt: skip
    assert [phase.name for phase in tiny_plan(has_prompt_lookup=True).phases] == ["draft", *names]
    full, sliding = plan.phases[plan.phase_named["L00.attention"]], plan.phases[plan.phase_named["L01.attention"]]
    # 100 positions are 4 splits of 32; a window of 20 and 3 rows span 22 positions, which touch at most 2 splits
    assert [axis.size for axis in full.axes] == [3, 2, 4]
    assert [axis.size for axis in sliding.axes] == [3, 1, 2]
    experts = plan.phases[plan.phase_named["L01.gate_up"]]
    assert [(axis.name, axis.size, axis.is_dynamic) for axis in experts.axes] == [
        ("expert", 6, True),
        ("tile", 1, False),
    ]
    tables = Tables(plan)
    for phase in plan.phases:
        for program in range(3):  # the proof has each item on the program that executes it
            (proved,) = (tables.table(phase).programs == program).nonzero()
            assert proved.tolist() == list(items_of(phase, program, 3))
        items = sorted(item for program in range(3) for item in items_of(phase, program, 3))
        assert items == list(range(phase.num_items))
        assert [phase.index(item) for item in items[:2]] == sorted(phase.index(item) for item in items[:2])


def test_a_window_never_touches_more_splits_than_planned() -> None:
    for window, rows, split in ((20, 3, 32), (128, 16, 16), (129, 8, 256), (1, 1, 16), (33, 1, 32), (34, 1, 32)):
        spec = replace(tiny_spec(), layers=(tiny_spec().layers[1],))
        sliding = replace(spec.layers[0].attention, window=window)
        spec = replace(spec, layers=(replace(spec.layers[0], attention=sliding),))
        plan = build_plan(spec, WeightFormats(), 2, rows, 2048, split)
        planned = plan.phases[2].axes[2].size
        spans = [
            (first + rows - 1) // split - max(0, first - window + 1) // split + 1 for first in range(0, 2048 - rows)
        ]
        assert max(spans) == planned, (window, rows, split)


def test_tiles_balance_programs() -> None:
    assert choose_tile(2048, 132, MMA_TILES) == 16  # 128 items: one round, where 32 columns would leave half idle
    assert choose_tile(151936, 132, MMA_TILES) == 128  # 1187 items, nine rounds of 132, all but one item full
    assert choose_tile(10, 4, MMA_TILES) == 16
    # Of 16 the busiest program would have 1168 columns instead of 1184, and read activations twice as often.
    assert choose_tile(152576, 132, MMA_TILES) == 32
    assert choose_tile(2880, 132, MMA_TILES) == 32 and choose_tile(768, 132, MMA_TILES, 8) == 16


def test_sharding() -> None:
    spec = spec_from_fields(fields_of("mimo-v2.5-pro"))
    part = shard(spec, 8)
    assert (part.layers[0].attention.num_heads, part.layers[0].attention.num_kv_heads) == (16, 1)
    assert (part.layers[1].mlp.intermediate_size, part.vocab_size) == (256, 19072)
    assert shard(spec, 16).layers[0].attention.num_kv_heads == 1
    with pytest.raises(ValueError, match="128 heads with 8 key/value heads cannot be divided among 3 GPUs"):
        shard(spec, 3)
    # 2880 columns are 90 blocks of 32; eight GPUs hold at most 12 of them
    assert shard(spec_from_fields(fields_of("gpt-oss-20b")), 8).layers[0].mlp.intermediate_size == 384


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 16 rows, not 17"):
        build_plan(tiny_spec(), WeightFormats(), 3, 17, 100)
    with pytest.raises(ValueError, match="context 5000 is outside the model's 1 to 4096"):
        build_plan(tiny_spec(), WeightFormats(), 3, 1, 5000)


def test_cost_by_hand() -> None:
    plan = tiny_plan(num_programs=4)
    gpu = Gpu("test", 4, bandwidth=1e9, bf16_flops=1e9, memory_bytes=1e9)
    assumed = Assumptions(
        bandwidth_fraction=0.5, handoff_us=2.0, all_reduce_us=7.0, draft_us=5.0, acceptance_length=1.5
    )
    cost = step_cost(plan, gpu, rows=2, sequences=1, context=50, assumptions=assumed)
    of = {phase.name: phase for phase in cost.phases}
    # 2 key/value heads' groups of 2 * 24 + 24 + 16 = 88 columns of 40 inputs, bf16, and a norm of 40
    assert of["L00.qkv"].weight_bytes == 2 * 88 * 40 * 2 + 40 * 2
    assert of["L00.qkv"].flops == 2 * 2 * 2 * 88 * 40
    # 50 positions of 2 heads of 24 + 16 values, bf16; the window sees 20 of them
    assert of["L00.attention"].kv_bytes == 50 * 2 * 40 * 2
    assert of["L01.attention"].kv_bytes == 20 * 1 * 40 * 2
    assert of["L00.attention"].flops == 2 * 50 * 2 * 4 * 40
    # one sequence, two key/value heads, two splits of 32 positions
    assert of["L00.attention"].num_items == 4 and of["L00.attention"].balance == 1.0
    # two rows choose 2 of 6 experts each: 6 (1 - (2/3)^2) = 10/3 different ones; 48 rows of 40 weights each
    assert of["L01.gate_up"].weight_bytes == pytest.approx(10 / 3 * 48 * 40 * 2)
    assert of["L01.gate_up"].flops == 2 * 2 * 4 * 24 * 40
    assert of["L01.down"].weight_bytes == pytest.approx(10 / 3 * 24 * 40 * 2)
    # 40 columns in tiles of 16 are 3 items on 4 programs
    assert of["L00.o_proj"].balance == 0.75
    assert of["L00.o_proj"].weight_bytes == 4 * 16 * 40 * 2
    seconds = 4 * 16 * 40 * 2 / 0.5e9
    assert of["L00.o_proj"].roofline_seconds == pytest.approx(seconds)
    assert of["L00.o_proj"].predicted_seconds == pytest.approx(seconds / 0.75 + 2e-6)
    assert of["lm_head"].weight_bytes == 100 * 40 * 2 + 80
    # attention of the second layer computes for longer than it reads: 2 rows * 20 positions * 2 * 4 heads * 40
    assert of["L01.attention"].roofline_seconds == pytest.approx(2 * 20 * 2 * 4 * 40 / 1e9)
    assert cost.roofline_seconds == pytest.approx(sum(phase.roofline_seconds for phase in cost.phases))
    assert cost.tokens_per_second(1e-3) == pytest.approx(1.5 / (1e-3 + 5e-6))
    assert weights_bytes(plan, 8000) == pytest.approx(
        8000 + sum(p.weight_bytes for n, p in of.items() if n not in ("embed", "L01.gate_up", "L01.down"))
        + 6 * (48 * 40 + 24 * 40) * 2
    )  # fmt: skip
    sharded = build_plan(tiny_spec(), WeightFormats(), 4, 3, 100, 32, is_sharded=True)
    shared = {p.name: p for p in step_cost(sharded, gpu, 2, 1, 50, assumed).phases}
    assert shared["L00.o_proj"].predicted_seconds == pytest.approx(of["L00.o_proj"].predicted_seconds + 7e-6)
    assert shared["L00.qkv"].predicted_seconds == pytest.approx(of["L00.qkv"].predicted_seconds)


def test_look_up_is_costed_by_its_texts() -> None:
    """One program a sequence reads 4 bytes a token, once, with its share of the bandwidth."""
    gpu = Gpu("test", 4, bandwidth=1e9, bf16_flops=1e9, memory_bytes=1e9)
    plan = build_plan(tiny_spec(), WeightFormats(), 4, 3, 100, 32, has_prompt_lookup=True)
    for rows, sequences in ((2, 1), (3, 3)):
        (draft,) = [one for one in step_cost(plan, gpu, rows, sequences, 60).phases if one.op == "draft"]
        assert (draft.kv_bytes, draft.weight_bytes, draft.num_items) == (sequences * 60 * 4, 0, sequences)
        assert draft.roofline_seconds == pytest.approx(sequences * 240e-9)
        assert draft.predicted_seconds == pytest.approx(4 * 240e-9 + 1e-6)


def test_bytes_a_step_agree_with_the_models_parameters() -> None:
    """Bytes a token, without the cache, that others computed for these models."""
    for name, formats, expected in (
        ("qwen3-30b-a3b", WeightFormats(experts="mxfp4"), 3.42e9),
        ("qwen3-30b-a3b", None, 6.08e9),
        ("gpt-oss-20b", None, 3.71e9),
    ):
        fields = fields_of(name)
        plan = build_plan(spec_from_fields(fields), formats or formats_from_fields(fields), 132, 1, 1024)
        cost = step_cost(plan, gpu_named("H200"), 1, 1, 1024)
        assert sum(phase.weight_bytes for phase in cost.phases) == pytest.approx(expected, rel=2e-3), name
    # The card's 1.02 T and 42 B parameters: 2 bytes each in bf16
    spec = spec_from_fields(fields_of("mimo-v2.5-pro"))
    plan = build_plan(spec, WeightFormats(), 132, 1, 1024)
    assert weights_bytes(plan, 2 * spec.vocab_size * spec.hidden_size) == pytest.approx(2 * 1.02e12, rel=0.01)
    active = sum(phase.weight_bytes for phase in step_cost(plan, gpu_named("B200"), 1, 1, 1).phases)
    assert active == pytest.approx(2 * 42e9, rel=0.05)


def test_active_experts() -> None:
    assert active_experts(128, 8, 1) == pytest.approx(8)
    # 128 (1 - (15/16)^8): the 51.6 of eight rows that others computed
    assert active_experts(128, 8, 8) == pytest.approx(51.6, abs=0.1)
    assert active_experts(32, 4, 8) == pytest.approx(21, abs=0.1)


def test_rows_and_sequences_that_do_not_fit_are_refused() -> None:
    plan, gpu = tiny_plan(), gpu_named("H200")
    for rows, sequences, context, message in (
        (4, 1, 50, "4 rows are outside the plan's 1 to 3"),
        (3, 2, 50, "3 rows cannot be shared out evenly among 2"),
        (3, 3, 101, "context 101 is outside the plan's 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            step_cost(plan, gpu, rows, sequences, context)


def test_mimo_pro_from_its_makers_configuration() -> None:
    spec, formats = read_model_config(SHAPES / "mimo-v2.5-pro.json")
    full, sliding = spec.layers[7].attention, spec.layers[1].attention
    assert sum(layer.attention.window is None for layer in spec.layers) == 10
    assert (full.num_heads, full.num_kv_heads, full.qk_head_dim, full.v_head_dim) == (128, 8, 192, 128)
    assert (sliding.window, sliding.has_sinks, full.has_sinks, sliding.rope_theta) == (129, True, False, 1e4)
    assert spec.layers[0].mlp == DenseSpec(16384)
    assert spec.layers[1].mlp == MoeSpec(384, 8, 2048, "sigmoid", True, True, 1.0)
    assert (formats.experts, formats.attention, formats.attention_output, formats.router, formats.lm_head) == (
        "mxfp4", "fp8", "bf16", "float32", "bf16",
    )  # fmt: skip


def test_mimo_flash_reads_alike_by_both_names() -> None:
    from transformers import MiMoV2FlashConfig

    from speedstack.runtime.model.families.registry import spec_from_config

    theirs = spec_from_fields(fields_of("mimo-v2-flash"))
    ours = spec_from_config(MiMoV2FlashConfig(max_position_embeddings=262144))
    assert theirs == ours
    saved = json.loads(MiMoV2FlashConfig().to_json_string())
    assert spec_from_fields(saved) == spec_from_config(MiMoV2FlashConfig())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-30b-a3b", {"model_type": "llama"}, "'llama' is none .* gpt_oss, mimo_v2, mimo_v2_flash, qwen3_moe"),
        ("qwen3-30b-a3b", {"num_experts": None}, "qwen3_moe configuration needs num_experts$"),
        ("gpt-oss-20b", {"hidden_size": None, "vocab_size": None}, "needs vocab_size, hidden_size$"),
        ("gpt-oss-20b", {"num_local_experts": None}, "needs num_local_experts$"),
        ("gpt-oss-20b", {"model_type": ["gpt_oss"]}, r"model type \['gpt_oss'\] is none"),
        ("mimo-v2.5-pro", {"moe_layer_freq": [0, 1]}, "moe_layer_freq 2, not 70"),
        ("mimo-v2.5-pro", {"n_shared_experts": 1}, "n_shared_experts 1 of mimo_v2 is not supported, only 0 or null"),
        ("mimo-v2.5-pro", {"n_group": 8}, "n_group 8"),
        ("mimo-v2.5-pro", {"hidden_act": "gelu"}, "hidden_act 'gelu' of mimo_v2 is not supported, only 'silu'"),
        ("mimo-v2.5-pro", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling .* is not supported"),
        ("mimo-v2.5-pro", {"moe_layer_freq": 1}, "a field of this mimo_v2 configuration must be wrong: TypeError"),
        ("mimo-v2.5-pro", {"swa_rope_theta": [1e4]}, "a field of this mimo_v2 configuration must be wrong: TypeError"),
        ("mimo-v2.5-pro", {"swa_num_attention_heads": "64"}, "gives num_heads '64', which should be a whole number"),
        ("mimo-v2.5-pro", {"num_key_value_heads": 7}, "128 attention heads are not shared evenly by 7 key/value heads"),
        ("mimo-v2.5-pro", {"num_experts_per_tok": 999}, "999 experts a token are more than the 384 there are"),
        ("mimo-v2-flash", {"num_key_value_heads": {}}, "not a valid mimo_v2_flash configuration"),
        (
            "mimo-v2-flash",
            {"partial_rotary_factor": "12"},
            "partial_rotary_factor is '12' and should be a number above 0",
        ),
        ("qwen3-30b-a3b", {"moe_intermediate_size": 0}, "gives intermediate_size 0, which should be a whole number"),
        ("qwen3-30b-a3b", {"num_hidden_layers": 0}, "num_hidden_layers 0 is no model"),
        ("gpt-oss-20b", {"max_position_embeddings": -1}, "gives max_position_embeddings -1"),
        ("mimo-v2.5-pro", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("mimo-v2.5-pro", {"sliding_window_size": None, "sliding_window": None}, "needs sliding_window_size"),
        ("qwen3-30b-a3b", {"hidden_size": "wide"}, "not a valid qwen3_moe configuration"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_fields(fields_of(name) | changes)


def test_number_of_experts_under_another_name() -> None:
    fields = fields_of("gpt-oss-20b")
    renamed = {key: value for key, value in fields.items() if key != "num_local_experts"}
    assert spec_from_fields(renamed | {"n_routed_experts": fields["num_local_experts"]}) == spec_from_fields(fields)


@pytest.mark.parametrize(
    "quantization",
    [["mxfp4"], {"quant_method": "fp8", "ignored_layers": {"a": 1}}, {"quant_method": "fp8", "ignored_layers": [3]}],
)
def test_quantization_that_is_none_is_refused(quantization: Any) -> None:
    with pytest.raises(ValueError, match="quantization_config"):
        formats_from_fields(fields_of("gpt-oss-20b") | {"quantization_config": quantization})


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json at"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="JSON list instead of an object"):
        read_model_config(tmp_path)


def test_gpus_by_name() -> None:
    assert gpu_named("rtx 4090").name == "RTX4090"
    with pytest.raises(ValueError, match="unknown GPU 'H2000'; did you mean 'H200'"):
        gpu_named("H2000")
