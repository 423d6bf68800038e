"""The resident kernel: whole steps equal to the reference, under seeded schedules where it is interpreted.

The kernel is the one that a GPU runs. Interpreted, its programs are threads that take turns at every counter operation
and every store, in an order that a seed decides.

Legend: R rows, V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.runtime.backends.base import Draw, Rows
from speedstack.runtime.backends.gpu.expected_buffers import expected_buffers, found_buffer
from speedstack.runtime.backends.gpu.resident import ResidentBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.backends.select import make_backend
from speedstack.runtime.rounds.sampling import SamplingParams
from tests.devices import not_interpreted
from tests.runtime.backends.gpu.plan_cases import (
    CASES,
    NUM_ROWS,
    SMALL_CASES,
    assert_buffers_close,
    check_caches,
    check_text,
    prefilled,
    rows_of,
)
from tests.runtime.backends.gpu.resident_cases import (
    SPLIT,
    outcome,
    resident_of,
    same,
    small,
)


class Watch:
    """Copies what a phase wrote when the last of its signals is given, before anybody can write over it."""

    def __init__(self, backend: ResidentBackend, num_rows: int) -> None:
        self.backend, self.num_rows = backend, num_rows
        self.seen: dict[str, torch.Tensor] = {}
        plan = backend.plan
        self.phase_of = {plan.counter_base[phase.name]: phase for phase in plan.phases}
        self.left: dict[str, int] = {}

    def begin(self) -> None:
        """A step begins."""
        self.seen.clear()
        plan = self.backend.plan
        for phase in plan.phases:
            per_item = any(signal.each == "item" for signal in phase.signals)
            self.left[phase.name] = phase.num_items if per_item else plan.num_programs

    def __call__(self, address: int, value: int) -> None:
        plan, counters = self.backend.plan, self.backend.counters
        element = (address - counters.data_ptr()) // counters.element_size()
        if not 0 <= element < plan.num_counters:
            return
        phase = self.phase_of[max(base for base in self.phase_of if base <= element)]
        self.left[phase.name] -= 1
        if self.left[phase.name] == 0:
            found = found_buffer(self.backend, phase, self.num_rows)
            if found is not None:
                self.seen[phase.name] = found.clone()


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "num_programs"),
    # FP8 changes nothing about who waits for whom: once is enough.
    [(case, number) for case in CASES for number in (1, 3, 8) if number == 3 or "fp8" not in case],
)
def test_every_buffer_of_every_step_equals_the_reference(case: str, num_programs: int) -> None:
    """Two sequences, one in two splits, over consecutive steps that meet what earlier ones left in all buffers."""
    weights = CASES[case]()
    reference, ids = prefilled(weights, [39, 15])
    backend = resident_of(weights, reference, num_programs, num_rows=NUM_ROWS, prefetch="none", seed=num_programs)
    watch = Watch(backend, 3)
    backend.interpreter_options = {"observe": watch}
    for step, places in enumerate((((1, 15), (1, 16), (0, 39)), ((0, 40), (1, 17)), ((0, 41), (0, 42), (1, 18)))):
        rows = rows_of(ids, *places)
        watch.num_rows = len(places)
        watch.begin()
        logits_RV, best = backend.step(rows, range(len(places)))
        expected = expected_buffers(reference, rows)
        assert watch.seen.keys() == expected.keys()
        for name, found in watch.seen.items():
            assert_buffers_close(found, expected[name], f"{step} {name}")
        assert torch.equal(logits_RV, watch.seen["lm_head"]) and best == expected["lm_head"].argmax(-1).tolist()
    check_caches(backend, reference)
    assert backend.next_step == 3 and not any(watch.left.values())


@pytest.mark.parametrize("is_draft", [False, True])
def test_repeating_a_step_leaves_it_as_it_was(is_draft: bool, device: torch.device) -> None:
    """However many steps a launch makes of them, rows that the host named stay what they are."""
    backend, (_, rows) = small("qwen3-mxfp4", 3, device)
    if is_draft:
        rows = Rows(rows.tokens, [0, 0], [17, 18])
    logits_WV, best = backend.step(rows, [0, 1])
    kept_WV, records, first_step = logits_WV.clone(), backend.memory.rows.clone(), backend.next_step
    backend.repeat(2)
    assert backend.next_step == first_step + 2 and torch.equal(backend.memory.rows, records)
    again_WV, best_again = backend.step(rows, [0, 1])
    assert torch.equal(again_WV, kept_WV) and best_again == best


@pytest.mark.parametrize("first_step", [715_827_881, 2**31 - 2, 2**32 - 1])
def test_counters_and_steps_wrap_around(first_step: int, device: torch.device) -> None:
    """Thresholds pass 2^31 at the first of these (three programs), steps do at the others."""
    backend, start = small("qwen3-mxfp4", 3, device)
    expected = outcome(backend, start, 3)
    rates = backend.counters.long() // 3
    assert rates.max() == 3 and rates.min() >= 1
    backend.next_step = first_step
    backend.counters.copy_((rates * first_step + 2**31) % 2**32 - 2**31)
    assert same(outcome(backend, start, 3), expected)
    assert torch.equal((backend.counters.long() - rates * backend.next_step) % 2**32, torch.zeros_like(rates))


def test_sampling_goes_on_without_the_host(device: torch.device) -> None:
    """With a temperature too: several steps in one launch are as many launches."""
    backend, (caches, rows) = small("qwen3-mxfp4", 3, device)
    draws = [Draw(5, 1, SamplingParams(1.5)), None]
    rows = replace(rows, draws=draws)
    start = (caches, rows)
    tokens, logits_RV, _ = outcome(backend, start, 4)
    for cache, was in zip(backend.memory.caches, start[0], strict=True):
        cache.copy_(was)
    single = []
    for _ in range(4):
        found_RV, best = backend.step(rows, range(2))
        rows = Rows(best, rows.slots, [position + 1 for position in rows.positions], draws=draws)
        single.append(best)
    assert tokens == single and torch.equal(found_RV, logits_RV)
    greedy = [int(row.argmax()) for row in logits_RV]
    assert tokens[3][1] == greedy[1] and len({*zip(*tokens, strict=True)}) == 2


def fetched(backend: ResidentBackend, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of all sixteens of bytes that prefetches of a run name."""
    from triton.runtime.interpreter import interpreter_builder

    from speedstack.runtime.backends.gpu.kernels import prefetch

    load, ends, lanes = interpreter_builder.create_masked_load, list[Any](), prefetch._LANES.value

    def record(ptrs: Any, mask: Any, *args: Any) -> Any:
        if ptrs.data.shape == (lanes,) and ptrs.get_element_ty().name == "uint8":
            ends.append(ptrs.data[mask.data].tolist())
        return load(ptrs, mask, *args)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", record, raising=False)
        run()
    both = zip(ends[::2], ends[1::2], strict=True)
    pieces = [piece for firsts, lasts in both for piece in zip(firsts, lasts, strict=True)]
    assert all(first % 16 == 0 and last % 16 == 15 for first, last in pieces)
    return {address for first, last in pieces for address in range(first, last, 16)}


@pytest.mark.interpret
@pytest.mark.parametrize("case", SMALL_CASES)
def test_what_is_prefetched_is_what_a_step_reads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights that every step reads, of the experts the chosen ones alone, and nothing else."""
    backend, start = small(case, 16)
    assert all(phase.num_items <= 16 for phase in backend.plan.phases if phase.work.weight_bytes), "first items are all"
    found = fetched(backend, lambda: outcome(backend, start, 2), monkeypatch)
    every, some = set[int](), set[int]()
    for phase, binding in zip(backend.plan.phases, backend.bindings, strict=True):
        if phase.work.expert_bytes:
            tensors = binding.pointers[3:5]
            some |= {a for t in tensors for a in range(t.data_ptr() // 16 * 16, t.data_ptr() + t.nbytes, 16)}
        elif phase.work.weight_bytes and phase.op != "embed":
            tensors = (binding.pointers[2 if phase.op in ("o_proj", "dense_down") else 3],)
            if phase.op != "router" and binding.constants.FP8_ROWS:
                tensors += (binding.pointers[-1],)
            for tensor in tensors:
                last = tensor.data_ptr() + tensor.nbytes - 15
                every |= set(range(tensor.data_ptr() // 16 * 16, last, 16))
    assert every <= found <= every | some
    assert found & some if some else found == every
    if case == "mimo":
        assert len(found & some) < len(some), "an expert that nobody chose was fetched"


@pytest.mark.interpret
def test_features_reach_the_drafter(tiny_model_dir: Path, tiny_drafter_dir: Path) -> None:
    """Its proposals are the reference backend's; a drafter that comes later, and more rows than a step holds."""
    from speedstack.dflash.checkpoint import load_drafter
    from speedstack.quant.checkpoint import load_checkpoint
    from speedstack.runtime.backends.base import DraftRequest
    from speedstack.runtime.model.families.registry import spec_from_config
    from speedstack.runtime.model.weights import read_weights

    checkpoint = load_checkpoint(tiny_model_dir)
    spec = spec_from_config(checkpoint.config)
    weights = read_weights(spec, dict(checkpoint.tensors), torch.float32, torch.device("cpu"), tied=False)
    drafter = load_drafter(tiny_drafter_dir)
    reference = ReferenceBackend(weights, drafter, 1, 32)
    resident = ResidentBackend(weights, None, 1, 32, num_rows=4, split_size=SPLIT)
    resident.set_drafter(drafter)
    rows = Rows([5, 6, 7, 8, 9], [0] * 5, list(range(5)))
    logits, best = zip(*[backend.step(rows, [0, 4]) for backend in (reference, resident)], strict=True)
    # float32 sums of up to 96 terms in another order, through three layers of logits up to about 20
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert best[0] == best[1]
    drafts = [backend.draft([DraftRequest(best[0][1], 0, 5)], 7)[0] for backend in (reference, resident)]
    assert drafts[0].tokens == drafts[1].tokens


@pytest.mark.interpret
def test_engine_writes_the_same_text(tmp_path: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = make_tiny_model(num_hidden_layers=1, layer_types=["sliding_attention"], mlp_layer_types=["sparse"])
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    check_text(tmp_path, "resident")


@pytest.mark.interpret
def test_too_many_kinds_of_phases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from speedstack.runtime.backends.gpu import task_table

    monkeypatch.setattr(task_table, "MAX_VARIANTS", 5)
    with pytest.raises(ValueError, match=r"'resident' compiles every kind of phase .* takes 5 at most; .* make 12"):
        small("qwen3-mxfp4", 3)


@not_interpreted
def test_refused_by_name_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = CASES["qwen3-mxfp4"]()
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match=r"'resident' runs on a GPU; on a CPU .* TRITON_INTERPRET=1"):
            make_backend("resident", weights, None, 1, 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'resident' needs Triton, which is not installed"):
        make_backend("resident", weights, None, 1, 32)


def test_older_gpus_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from speedstack.runtime.backends.gpu.resident import _multiprocessors, _target_of

    properties = SimpleNamespace(major=8, minor=0, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(ValueError, match=r"compute capability 9\.0; this one has 8\.0: use backend='graph'"):
        _multiprocessors(_target_of(torch.device("cuda")))
    properties.major = 9
    assert _multiprocessors(_target_of(torch.device("cuda"))) == 108
