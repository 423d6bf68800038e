"""The real contestants on the tiny model: all run, and make the same greedy tokens in float32."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CompileConfig

from speedstack.eval.data.prompts import PromptSet
from speedstack.eval.results.speed import AcceptanceResult, TimingResult
from speedstack.eval.speed.contestant import Sample
from speedstack.eval.speed.contestants import (
    ENGINE,
    ENGINE_DRAFTER,
    ENGINE_LOOK_UP,
    ENGINE_UNPACKED,
    ENGINE_WHOLE_BLOCKS,
    TRANSFORMERS,
    TRANSFORMERS_COMPILED,
    TRANSFORMERS_DRAFTER,
    Peer,
    TimingSettings,
    engine_contestants,
    measure_timing,
    peer_contestants,
)
from speedstack.eval.speed.peers.transformers_peer import (
    EXPERTS_IMPLEMENTATIONS,
    ArrivalClock,
    CompiledGenerate,
    experts,
    prompt_experts,
    rounds_of,
    transformers_runner,
    try_experts_implementations,
)
from speedstack.quant.checkpoint import load_checkpoint, load_model, weights_sha256
from speedstack.runtime import Engine
from speedstack.runtime.backends.reference import ReferenceBackend

PROMPTS = [[5, 17, 200, 31, 8, 90], [300, 301, 302]]
SETS = [PromptSet("a", "made up", PROMPTS[:1]), PromptSet("b", "made up", PROMPTS[1:], notes=("b: short",))]
ONE = SETS[:1]


def test_all_contestants_make_the_same_tokens(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> None:
    settings = TimingSettings(num_new_tokens=24, num_repeats=2, backend="reference", look_up=True)
    seen: list[tuple[TimingResult, AcceptanceResult | None]] = []
    result = measure_timing(
        tiny_packed_dir,
        tiny_packed_drafter_dir,
        SETS,
        settings,
        on_result=lambda timing, acceptance: seen.append((timing, acceptance)),
        progress=False,
    )
    names = [
        ENGINE,
        ENGINE_DRAFTER,
        ENGINE_WHOLE_BLOCKS,
        ENGINE_LOOK_UP,
        TRANSFORMERS,
        TRANSFORMERS_DRAFTER,
    ]
    assert [entry.name for entry in result.contestants] == names, result.unavailable
    for entry in result.contestants[1:]:
        assert entry.identity is not None
        assert entry.identity.num_identical == len(PROMPTS), (entry.name, entry.identity.first_difference)
    promised = [entry.identity.promised for entry in result.contestants[1:] if entry.identity is not None]
    assert promised == [True, True, True, True, False]
    # The same proposals, verified whole and counted by one rule.
    ours, theirs = result.contestants[2], result.contestants[5]
    assert ours.acceptance_length is not None and ours.acceptance_length == theirs.acceptance_length
    assert ours.survival == theirs.survival and len(ours.survival) == 7
    for entry in result.contestants:
        assert 0 < entry.first_token_seconds.median < entry.warmup_seconds + 60
        assert entry.decode_tokens_per_second.median > 0
        assert entry.token_ms is not None and entry.token_ms.p50.median <= entry.token_ms.p99.median
    assert [[one.name for one in entry.contestants] for entry in result.sets] == [names, names]
    assert result.num_threads == torch.get_num_threads() and result.num_prompt_tokens == (6, 3)
    assert (result.target_sha256, result.notes) == (weights_sha256(tiny_packed_dir), ("b: short",))
    assert result.drafter_sha256 == weights_sha256(tiny_packed_drafter_dir)
    assert result.energy is not None and result.energy.startswith("not counted")
    assert TimingResult.load(result.save(tmp_path / "timing.json")) == result

    assert len(seen) == 4 and seen[-1][0] == result
    acceptance = seen[-1][1]
    assert acceptance is not None and [entry.name for entry in acceptance.sets] == ["a", "b"]
    assert acceptance.overall.acceptance_length == ours.acceptance_length and acceptance.block_size == 8
    assert acceptance.overall.rows_per_token is not None


def test_batches_and_unpacked_experts_say_the_same(tiny_packed_dir: Path, tmp_path: Path) -> None:
    peers: tuple[Peer, ...] = ("transformers", "unpacked")
    settings = TimingSettings(
        num_new_tokens=6, num_repeats=1, backend="reference", peers=peers, batch_sizes=(2, 1), copies=tmp_path
    )
    sets = [PromptSet("a", "made up", [*PROMPTS, [7] * 9, [8, 9]])]
    result = measure_timing(tiny_packed_dir, None, sets, settings, progress=False)
    names = [ENGINE, TRANSFORMERS, ENGINE_UNPACKED]
    assert not result.unavailable
    assert [(entry.name, entry.batch_size) for entry in result.sets] == [("a", 1), ("a x2", 2)]
    for entries in (result.contestants, *(entry.contestants for entry in result.sets)):
        assert [entry.name for entry in entries] == names
        for entry in entries[1:]:
            assert entry.identity is not None and entry.identity.num_identical == 4, entry.identity
    assert "experts for 2 sequences" in result.contestants[1].description
    # The copy is made once.
    other = dataclasses.replace(settings, peer_dtype="bfloat16", peers=("transformers",))
    result = measure_timing(tiny_packed_dir, None, sets, other, progress=False)
    peer = result.contestants[1]
    assert peer.description.endswith(", bfloat16") and peer.identity is not None and not peer.identity.promised
    (copy,) = tmp_path.iterdir()
    before = copy.stat()
    measure_timing(tiny_packed_dir, None, sets, dataclasses.replace(settings, peers=("unpacked",)), progress=False)
    assert copy.stat().st_ctime_ns == before.st_ctime_ns


def test_how_the_engine_holds_weights_and_buffers_is_said_and_passed_on(tiny_packed_dir: Path) -> None:
    settings = TimingSettings(4, 1, peers=(), backend="cpu", dense_dtype="int8", kv_dtype="bfloat16")
    result = measure_timing(tiny_packed_dir, None, ONE, settings, progress=False)
    assert "dense layers in int8, key/value buffers in bfloat16" in result.contestants[0].description
    with pytest.raises(ValueError, match="dense_dtype and kv_dtype are options of backend 'cpu'"):
        measure_timing(tiny_packed_dir, None, ONE, dataclasses.replace(settings, backend="reference"))


def test_experts_that_are_not_packed_need_no_unpacking(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = TimingSettings(4, 1, backend="reference", peers=("unpacked",), copies=tmp_path)
    result = measure_timing(tiny_model_dir, None, ONE, settings, progress=False)
    assert [(entry.name, entry.reason) for entry in result.unavailable] == [
        (ENGINE_UNPACKED, "the target's experts are not packed")
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)  # the compiler
def test_compiled_transformers_says_the_same(make_tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    # One layer: every one takes the compiler its time.
    make_tiny_model(num_hidden_layers=1, layer_types=["full_attention"], mlp_layer_types=["sparse"]).save_pretrained(
        tmp_path
    )
    settings = TimingSettings(num_new_tokens=8, num_repeats=2, backend="reference", peers=("compiled",))
    result = measure_timing(tmp_path, None, SETS, settings, progress=False)
    assert [entry.name for entry in result.contestants] == [ENGINE, TRANSFORMERS_COMPILED], result.unavailable
    compiled = result.contestants[1]
    assert compiled.identity is not None and compiled.identity.num_identical == 2
    # Compiled in the warm-up and never again, whatever the length of the prompt.
    assert compiled.tokens_per_second.minimum > 8 / compiled.warmup_seconds


def test_a_compiled_peers_cache_is_as_long_as_the_texts_of_a_set(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[list[int], int, int]] = []

    def runner_of(model: Any, options: dict[str, Any]) -> Callable[[list[int], int], Sample]:
        def run(prompt: list[int], num_new_tokens: int) -> Sample:
            length = max(layer.max_cache_len for layer in options["past_key_values"].layers)
            ran.append((prompt, length, num_new_tokens))
            return Sample([1] * num_new_tokens, [(0.1, 1), (0.2, num_new_tokens - 1)], 0.3)

        return run

    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.transformers_runner", runner_of)
    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.COMPILED_EXPERTS", ("eager",))
    long = [7] * 90
    sets = [*SETS, PromptSet("long", "made up", [long]), PromptSet("as long as b", "made up", [[1, 2, 3]])]
    settings = TimingSettings(num_new_tokens=8, num_repeats=2, backend="reference", peers=("compiled",))
    measure_timing(tiny_model_dir, None, sets, settings, progress=False)
    lengths = {(tuple(prompt), length) for prompt, length, num_new_tokens in ran if num_new_tokens == 8}
    assert lengths == {(tuple(PROMPTS[0]), 14), (tuple(PROMPTS[1]), 11), (tuple(long), 98), ((1, 2, 3), 11)}
    prompts = {entry.name: entry.prompts for entry in sets}
    caches = CompiledGenerate(load_model(tiny_model_dir), prompts, 8).caches
    assert caches["b"] is caches["as long as b"] is not caches["a"]


def test_each_set_is_compiled_for_its_length_and_never_again(
    make_tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[set[tuple[Any, ...]]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append({tuple(tensor.shape) for tensor in inputs if isinstance(tensor, torch.Tensor)})
        return graph

    # One of the layers has a window of 16, which is full before the longer texts end.
    layer_types = ["sliding_attention", "full_attention"]
    model = make_tiny_model(num_hidden_layers=2, layer_types=layer_types, mlp_layer_types=["dense", "sparse"])
    prompts = {"short": [[5, 17, 200], [7] * 9], "long": [[8] * 50, [9, 10]]}
    # Not before the model, whose import would put the original back.
    monkeypatch.setattr("transformers.CompileConfig", functools.partial(CompileConfig, backend=backend))
    compiled = CompiledGenerate(model, prompts, 24)
    for name, length in (("short", 33), ("long", 74)):
        graphs.clear()
        with experts(model, "batched_mm", "grouped_mm"):
            compiled.enter_set(name)
        # Keys of a global layer, of that length, not of any.
        assert graphs and all((1, 1, length, 48) in shapes for shapes in graphs)
        assert not any(isinstance(size, torch.SymInt) for shapes in graphs for shape in shapes for size in shape)
    graphs.clear()
    plain = transformers_runner(model)
    for name, group in prompts.items():
        for prompt in [*group, [11] * (max(map(len, group)) - 3)]:
            with experts(model, "batched_mm", "grouped_mm"):
                compiled.enter_set(name)
                tokens = compiled(prompt, 24).tokens
            assert tokens == plain(prompt, 24).tokens
    assert not graphs


def test_one_copy_of_the_target_for_all_of_ours_and_one_for_transformers(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            loads.append(name)
            time.sleep(0.05)
            return function(*arguments, **options)

        return call

    engines: list[Engine] = []
    from_target = Engine.from_target

    def make(*arguments: Any, **options: Any) -> Engine:
        engines.append(from_target(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr("speedstack.runtime.model.loading.load_checkpoint", counted("ours", load_checkpoint))
    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.load_model", counted("transformers", load_model))
    monkeypatch.setattr(Engine, "from_target", make)
    peers: tuple[Peer, ...] = ("transformers", "assisted", "compiled")
    settings = TimingSettings(num_new_tokens=4, backend="reference", look_up=True, peers=peers)
    prompts = {"a": PROMPTS}
    ours, _ = engine_contestants(tiny_packed_dir, tiny_packed_drafter_dir, torch.float32, settings, 16)
    tried: tuple[dict[str, float], list[Any]] = ({"eager": 1.0}, [])
    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.try_experts_implementations", lambda *_: tried)
    theirs, _ = peer_contestants(
        tiny_packed_dir, tiny_packed_drafter_dir, torch.float32, settings, prompts, ExitStack()
    )
    assert len(ours) == 4 and len(theirs) == 3 and loads == ["ours", "transformers"]
    plain, drafting = (engine.backend for engine in engines)
    assert isinstance(plain, ReferenceBackend) and isinstance(drafting, ReferenceBackend)
    assert plain.weights is drafting.weights
    # Who shares a load has it in its preparation all the same.
    assert all(contestant.prepare_seconds > 0.05 for contestant in (*ours, *theirs))


def test_a_models_own_generation_settings_change_no_race(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    own = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2, "eos_token_id": list(range(64)), "max_length": 4}
    (model / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    settings = TimingSettings(num_new_tokens=24, num_repeats=1, backend="reference", peers=("transformers",))
    result = measure_timing(model, None, SETS, settings, progress=False)
    entry = result.contestant(TRANSFORMERS)
    assert entry is not None and entry.identity is not None, result.unavailable
    assert entry.identity.num_identical == len(PROMPTS), entry.identity.first_difference


def test_without_drafter_and_with_a_peer_that_cannot_run(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("this class is not known")

    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.load_model", refuse)
    settings = TimingSettings(num_new_tokens=4, num_repeats=1, backend="reference")
    result = measure_timing(tiny_model_dir, None, ONE, settings, progress=False)
    assert [entry.name for entry in result.contestants] == [ENGINE]
    assert result.contestants[0].acceptance_length is None
    assert [(entry.name, entry.reason) for entry in result.unavailable] == [
        (TRANSFORMERS_DRAFTER, "no drafter: give --drafter DIR"),
        (TRANSFORMERS, "ValueError: this class is not known"),
    ]


def test_the_try_experts_implementations_is_one_that_runs(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float32).eval()
    set_implementation = type(model).set_experts_implementation

    def only_eager(self: torch.nn.Module, name: str) -> None:
        if name != "eager":
            raise NotImplementedError(f"{name} is not built")
        set_implementation(self, name)

    monkeypatch.setattr(type(model), "set_experts_implementation", only_eager)
    seconds, unavailable = try_experts_implementations(model, PROMPTS[0])
    assert list(seconds) == ["eager"] and seconds["eager"] > 0
    assert [entry.name for entry in unavailable] == [
        f"transformers ({name} experts)" for name in EXPERTS_IMPLEMENTATIONS if name != "eager"
    ]
    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.EXPERTS_IMPLEMENTATIONS", ("grouped_mm",))
    settings = TimingSettings(num_new_tokens=4, num_repeats=1, backend="reference", peers=("transformers",))
    result = measure_timing(tiny_model_dir, None, ONE, settings, progress=False)
    assert [entry.name for entry in result.contestants] == [ENGINE]
    assert [(entry.name, entry.reason) for entry in result.unavailable] == [
        ("transformers (grouped_mm experts)", "NotImplementedError: grouped_mm is not built"),
        (TRANSFORMERS, "none of its experts implementations runs this model"),
    ]


def test_experts_implementations_are_compared_by_decoding_alone(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner(model: object) -> Callable[[list[int], int], Sample]:
        return lambda prompt, n: Sample([1] * n, [(10.0, 1), (10.0 + 0.5 * (n - 1), n - 1)], 10.0 + 0.5 * (n - 1))

    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.transformers_runner", runner)
    seconds, _ = try_experts_implementations(load_model(tiny_model_dir), PROMPTS[0])
    assert set(seconds.values()) == {0.5}


def test_generate_switches_from_the_prompts_experts_to_the_decoders(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(tiny_model_dir, dtype=torch.float32).eval()
    seen: list[tuple[int, str]] = []
    forward = type(model).forward

    def spy(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        seen.append((input_ids.shape[1], self.config._experts_implementation))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    run = transformers_runner(model)
    with experts(model, "batched_mm", "grouped_mm"):
        run(PROMPTS[0], 3)
    assert seen == [(6, "grouped_mm"), (1, "batched_mm"), (1, "batched_mm")]
    # Its own switch is back, and a contestant that failed leaves none behind.
    with pytest.raises(RuntimeError, match="broken"), experts(model, "eager", "grouped_mm"):
        raise RuntimeError("broken")
    assert "_optimize_model_for_decode" not in vars(model)
    # On a CPU transformers prefills and decodes alike.
    assert prompt_experts(model, {"grouped_mm": 1.0}, "compiled") is None
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert prompt_experts(model, {"grouped_mm": 1.0}, "compiled") == "grouped_mm"
    assert prompt_experts(model, {"grouped_mm": 1.0}, "assisted") is None
    assert prompt_experts(model, {"eager": 1.0}, "transformers") is None


def test_every_contestant_runs_under_its_own_experts(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def runner_of(model: Any, options: dict[str, Any] | None = None) -> Callable[[list[int], int], Sample]:
        def run(prompt: list[int], num_new_tokens: int) -> Sample:
            if num_new_tokens == 4:
                ran.append(("plain" if options is None else "compiled", model.config._experts_implementation))
            return Sample([1] * num_new_tokens, [(0.1, 1), (0.2, num_new_tokens - 1)], 0.3)

        return run

    def tried(model: Any, prompt: list[int], run: object = None, *rest: object) -> tuple[dict[str, float], list[Any]]:
        return ({"eager": 1.0, "grouped_mm": 2.0} if run is None else {"batched_mm": 1.0}), []

    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.transformers_runner", runner_of)
    monkeypatch.setattr("speedstack.eval.speed.peers.transformers_peer.try_experts_implementations", tried)
    settings = TimingSettings(num_new_tokens=4, num_repeats=2, backend="reference", peers=("transformers", "compiled"))
    measure_timing(tiny_model_dir, None, ONE, settings, progress=False)
    # A warm-up and two repeats each; before them the compiled one runs the shortest prompt and the longest.
    # On a CPU what decodes fastest is also what reads the prompt.
    assert sorted(ran) == 5 * [("compiled", "batched_mm")] + 3 * [("plain", "eager")]


def test_broken_logits_are_an_error_that_names_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tiny_model_dir / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    settings = TimingSettings(num_new_tokens=4, num_repeats=1, backend="reference", peers=("transformers",))
    seen: list[Any] = []
    with pytest.raises(ValueError, match=r"engine cannot decode this model: .*are NaN"):
        measure_timing(broken, None, ONE, settings, on_result=lambda *found: seen.append(found), progress=False)
    (unavailable,) = [result.unavailable for result, _ in seen]
    assert {entry.name for entry in unavailable} == {ENGINE, TRANSFORMERS}
    assert all("NaN" in entry.reason for entry in unavailable)


def test_arrival_clock_skips_the_prompt_and_counts_tokens() -> None:
    clock = ArrivalClock()
    clock.put(torch.tensor([[1, 2, 3]]))
    assert clock.arrivals == []
    clock.put(torch.tensor([4]))
    clock.put(torch.tensor([[5, 6, 7]]))
    clock.end()
    (first, one), (second, three) = clock.arrivals
    assert (one, three) == (1, 3) and first <= second


def test_rounds_of_a_foreign_decoder_are_counted_as_ours() -> None:
    # 3 proposals a round: all taken, none, and at the end two tokens of which one could still be proposed.
    stats = rounds_of([(0.0, 1), (0.0, 4), (0.0, 1), (0.0, 2)], num_new_tokens=8, num_proposals=3)
    assert (stats.num_rounds, stats.num_round_tokens, stats.acceptance_length) == (3, 7, 7 / 3)
    assert stats.drafted_by_position == [3, 2, 1]
    assert stats.accepted_by_position == [2, 1, 1]


def test_bad_input_is_refused_by_name(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'float16': use 'float32' or 'bfloat16'"):
        measure_timing(tiny_model_dir, None, ONE, TimingSettings(dtype="float16"))
    with pytest.raises(ValueError, match="peer_dtype is 'float16'"):
        measure_timing(tiny_model_dir, None, ONE, TimingSettings(peer_dtype="float16"))
    with pytest.raises(ValueError, match="a has 1 prompts, which do not fill batches of 2"):
        measure_timing(tiny_model_dir, None, ONE, TimingSettings(batch_sizes=(1, 2)))
    with pytest.raises(ValueError, match="two sets of prompts have one name: a, a"):
        measure_timing(tiny_model_dir, None, ONE * 2)
    for sets in ([], [*ONE, PromptSet("empty", "made up", [])]):
        with pytest.raises(ValueError, match="a timing needs prompts, in every set"):
            measure_timing(tiny_model_dir, None, sets)
