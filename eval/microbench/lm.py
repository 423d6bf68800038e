"""lm-eval through the engine against lm-eval's own Hugging Face adapter: agreement and speed.

    python -m speedstack.eval.microbench.lm MODEL --task-data runs/eval/tasks [--drafter D] [--out results/x.json]

Both answer the same requests in one process, at one batch size and dtype, taking turns. The adapter uses its own cache
of logits, and the fastest experts implementation of transformers for each kind of request. `--task-data` is the
`tasks/` directory of `speedstack eval --suite offline`.

The adapter in float64 shows whose rounding a difference of log-likelihoods is. On whole texts it is the adapter's,
which sums thousands of nats in float32, with a resolution of 2e-4.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.eval.lm_eval.task_loading import TaskLoader
from speedstack.eval.microbench.harness import Stopwatch, available, in_turns
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import LM_ADAPTER as ADAPTER
from speedstack.eval.results.microbench import LmAgreement, LmBench, LmTask, LmTiming
from speedstack.eval.speed.harness import spread
from speedstack.quant.checkpoint import load_model
from speedstack.runtime import Engine
from speedstack.support.command import module_command, module_parser, show_result

# Task -> the kind of request it makes.
KINDS = {"next_line": "loglikelihood", "heldout_perplexity": "loglikelihood_rolling", "close_line": "generate_until"}
ENGINE, ENGINE_DRAFTER = "engine", "engine + drafter"
# What the adapter may run experts with. batched_mm copies an expert's weights for every token that it is sent: with one
# token a sequence it can be the fastest, on whole texts it takes minutes and gigabytes.
EXPERTS_IMPLEMENTATIONS = {
    "loglikelihood": ("grouped_mm", "eager"),
    "loglikelihood_rolling": ("grouped_mm", "eager"),
    "generate_until": ("grouped_mm", "batched_mm", "eager"),
}
NUM_TRIAL_REQUESTS = 4
Run = Callable[[list[Instance]], list[Any]]


def bench(
    target: Path,
    drafter: Path | None,
    task_data: Path,
    limit: int,
    batch_size: int,
    num_repeats: int,
    max_length: int,
    device: str = "cpu",
) -> LmBench:
    """Measure. Raises ValueError as the loaders do, and if no experts implementation runs the model."""
    dtype = torch.float32
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "max_batch_size": batch_size,
        "max_length": max_length,
    }
    engines = {ENGINE: Engine.from_pretrained(target, **options)}
    if drafter is not None:
        engines[ENGINE_DRAFTER] = Engine.from_pretrained(target, drafter, **options)
    adapter = _adapter(target, dtype, engines[ENGINE].tokenizer, max_length, batch_size, device)
    # Its log-probabilities and their sums are float64 as well.
    exact = _adapter(target, torch.float64, engines[ENGINE].tokenizer, max_length, batch_size, device)
    exact.model.set_experts_implementation("eager")  # the one that has no dtype of its own
    loader = TaskLoader(list(KINDS), task_data)
    tasks = []
    for name, kind in KINDS.items():
        (task,) = loader.load(name)
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        contestants: dict[str, Run] = {
            label: _fresh(engine, kind)
            for label, engine in engines.items()
            # A drafter has no part in scoring.
            if label == ENGINE or kind == "generate_until"
        }
        contestants[ADAPTER] = partial(getattr(adapter, kind), disable_tqdm=True)
        implementation = _fastest_experts(adapter.model, kind, contestants[ADAPTER], task.instances)
        adapter.model.set_experts_implementation(implementation)
        in_float64 = None if kind == "generate_until" else partial(getattr(exact, kind), disable_tqdm=True)
        tasks.append(_bench_task(name, kind, task, contestants, in_float64, implementation, num_repeats))
    return LmBench(
        target=str(target),
        drafter=None if drafter is None else str(drafter),
        device=device,
        dtype="float32",
        backend=engines[ENGINE].backend_name,
        batch_size=batch_size,
        num_threads=torch.get_num_threads(),
        tasks=tuple(tasks),
        environment=describe_environment(),
    )


def _adapter(target: Path, dtype: torch.dtype, tokenizer: Any, max_length: int, batch_size: int, device: str) -> HFLM:
    # Packed values are read as float32 and may then become any dtype.
    model: Any = load_model(target, dtype=torch.float32)
    return HFLM(
        pretrained=model.to(device, dtype).eval(),
        tokenizer=tokenizer,
        backend="causal",
        max_length=max_length,
        batch_size=batch_size,
    )


def _fresh(engine: Engine, kind: str) -> Run:
    """Answers from a new adapter each time, without a cache."""
    return lambda requests: getattr(EngineLM(engine, progress=False), kind)(requests, disable_tqdm=True)


def _fastest_experts(model: Any, kind: str, run: Run, requests: Sequence[Instance]) -> str:
    """The fastest experts implementation on a few requests."""
    few = list(requests[:NUM_TRIAL_REQUESTS])

    def tried_ms(name: str) -> float:
        model.set_experts_implementation(name)
        run(few[:1])
        with Stopwatch() as watch:
            run(few)
        return watch.wall_ms

    times_ms, _ = available({name: partial(tried_ms, name) for name in EXPERTS_IMPLEMENTATIONS[kind]})
    if not times_ms:
        raise ValueError("none of transformers' experts implementations runs this model")
    return min(times_ms, key=lambda name: times_ms[name])


def _bench_task(
    name: str,
    kind: Any,
    task: Any,
    contestants: dict[str, Run],
    in_float64: Run | None,
    implementation: str,
    num_repeats: int,
) -> LmTask:
    requests = list(task.instances)
    answers: dict[str, list[Any]] = {}

    def run(label: str, turn: int) -> float:
        with Stopwatch() as watch:
            answers[label] = contestants[label](requests)
        return watch.wall_ms / 1e3

    seconds = in_turns(contestants, run, num_repeats, orders=random.Random(0))
    spreads = {label: spread(values) for label, values in seconds.items()}
    ours = answers.get(ENGINE_DRAFTER, answers[ENGINE])
    assert ours == answers[ENGINE], "the drafter changed an answer"
    return LmTask(
        task=name,
        kind=kind,
        num_requests=len(requests),
        experts_implementation=implementation,
        agreement=_agreement(task, kind, ours, answers[ADAPTER], in_float64(requests) if in_float64 else None),
        timings=tuple(
            LmTiming(
                contestant=label,
                seconds=one,
                requests_per_second=len(requests) / one.median,
                speedup=spreads[ADAPTER].median / one.median,
            )
            for label, one in spreads.items()
        ),
    )


def _agreement(task: Any, kind: str, ours: list[Any], theirs: list[Any], exact: list[Any] | None) -> LmAgreement:
    """`exact` are answers in float64, None for generations."""
    a, b = _scores(task, ours), _scores(task, theirs)
    scores = {metric: (a[metric], b[metric]) for metric in a}
    if exact is None:
        return LmAgreement(
            num_equal=sum(one == other for one, other in zip(ours, theirs, strict=True)),
            max_difference_nats=None,
            max_relative_difference=None,
            engine_error_nats=None,
            adapter_error_nats=None,
            scores=scores,
        )
    num_equal = len(ours)
    if kind == "loglikelihood":
        num_equal = sum(one[1] == other[1] for one, other in zip(ours, theirs, strict=True))
        ours, theirs, exact = ([answer[0] for answer in answers] for answers in (ours, theirs, exact))
    differences = _distances(ours, theirs)
    return LmAgreement(
        num_equal=num_equal,
        max_difference_nats=max(differences),
        max_relative_difference=max(d / max(abs(other), 1e-9) for d, other in zip(differences, theirs, strict=True)),
        engine_error_nats=max(_distances(ours, exact)),
        adapter_error_nats=max(_distances(theirs, exact)),
        scores=scores,
    )


def _distances(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(a, b, strict=True)]


def _scores(task: Any, answers: list[Any]) -> dict[str, float]:
    """lm-eval's metrics of the answers: 'metric,filter' -> value."""
    for request, answer in zip(task.instances, answers, strict=True):
        request.resps, request.filtered_resps = [answer], {}
    task.apply_filters()
    by_document: dict[int, list[Instance]] = {}
    for request in task.instances:
        by_document.setdefault(request.doc_id, []).append(request)
    columns: dict[str, list[Any]] = {}
    for doc_requests in by_document.values():
        for filter_name in doc_requests[0].filtered_resps:
            responses = [request.filtered_resps[filter_name] for request in doc_requests]
            for metric, value in task.process_results(doc_requests[0].doc, responses).items():
                columns.setdefault(f"{metric},{filter_name}", []).append(value)
    aggregations = task.aggregation()
    return {key: float(aggregations[key.partition(",")[0]](values)) for key, values in columns.items()}


def show(result: LmBench) -> str:
    """The measurement as text."""
    lines = [
        f"{result.target}, {result.device}, {result.dtype}, batch {result.batch_size}, {result.num_threads} threads"
    ]
    for task in result.tasks:
        found = task.agreement
        lines.append(f"{task.task}: {task.num_requests} requests ({task.kind}), {task.experts_implementation} experts")
        lines.append(f"  {found.num_equal} equal answers")
        if found.max_difference_nats is not None:
            lines[-1] += (
                f", log-likelihoods within {found.max_difference_nats:.1e} nats; from float64 the engine's within "
                f"{found.engine_error_nats:.1e}, the adapter's within {found.adapter_error_nats:.1e}"
            )
        for metric, (a, b) in found.scores.items():
            lines.append(f"  {metric}: {a:.6g} and {b:.6g}{'' if math.isclose(a, b, rel_tol=1e-5) else ' DIFFER'}")
        for timing in task.timings:
            one = timing.seconds
            lines.append(
                f"  {timing.contestant}: {one.median:.2f} s ({one.q1:.2f}-{one.q3:.2f}), "
                f"{timing.requests_per_second:.1f} requests/s, {timing.speedup:.2f}x"
            )
    return "\n".join(lines)


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print the comparison, write JSON."""
    parser = module_parser(__spec__, __doc__)
    parser.add_argument("model", type=Path, help="target, a model directory")
    parser.add_argument("--drafter", type=Path, help="its drafter")
    parser.add_argument("--task-data", type=Path, required=True, help="directory of our tasks' data")
    parser.add_argument("--limit", type=int, default=40, help="documents a task (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of both (default: torch's own)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = bench(
        options.model,
        options.drafter,
        options.task_data,
        options.limit,
        options.batch_size,
        options.repeats,
        options.max_length,
        options.device,
    )
    show_result(result, show(result), options.out)


if __name__ == "__main__":
    sys.exit(main())
