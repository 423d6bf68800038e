"""Quality of models against a teacher, all through the runtime: held-out perplexity, divergence, lm-eval tasks.

Perplexity and divergence come from the same logits of the same windows. The teacher's logits are computed once a window
and dropped, so nothing of size tokens x vocabulary is kept; all models are in memory together.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from transformers import PreTrainedModel

from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.eval.lm_eval.own_tasks import read_own_tasks
from speedstack.eval.lm_eval.task_loading import PREFIX, TASK_NAMES, TaskLoader, leaf_tasks
from speedstack.eval.quality.divergence import check_numbers, token_kl, token_nll, top1_matches
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.quality import MethodQuality, QualityResult, TaskScore
from speedstack.eval.results.schema import to_plain
from speedstack.runtime import Engine

# Parts of lm-eval's output that a result keeps; the rest is every request and response.
LM_EVAL_KEYS = ("results", "versions", "n-samples", "n-shot", "higher_is_better", "lm_eval_version")


def heldout_windows(
    documents: Iterable[Sequence[int]], window: int, max_tokens: int, prefix_id: int
) -> list[list[int]]:
    """Windows of at most `window` ids, each within one document after `prefix_id`, up to `max_tokens` predictions.

    Documents take turns by window, so that a few long ones do not fill the budget. Raises ValueError for a window below
    2 or no token.
    """
    if window < 2:
        raise ValueError(f"a window of {window} tokens predicts none: use at least 2")
    queues = [list(document) for document in documents if len(document) > 0]
    windows: list[list[int]] = []
    num_predicted = 0
    while queues and num_predicted < max_tokens:
        remaining = []
        for ids in queues:
            taken = ids[: min(window - 1, max_tokens - num_predicted)]
            if not taken:
                break
            windows.append([prefix_id, *taken])
            num_predicted += len(taken)
            if len(ids) > window - 1:
                remaining.append(ids[window - 1 :])
        queues = remaining
    if not windows:
        raise ValueError("no held-out text: every document is empty, or max_tokens is 0")
    return windows


def measure_quality(
    engines: Mapping[str, Engine],
    teacher: str,
    windows: Sequence[Sequence[int]],
    task_data: str | Path | None = None,
    tasks: Sequence[str] = TASK_NAMES,
    limit: int | float | None = None,
    progress: bool = True,
    include_path: Path | None = None,
) -> QualityResult:
    """Held-out perplexity of each engine, its divergence from `engines[teacher]`, and the scores of `tasks`.

    `windows` have 2 or more ids; `task_data` is the directory of `make_tasks`, None for no tasks; `limit` caps
    documents a task, as a number or a share; `include_path` is a folder of more tasks. Raises ValueError for an unknown
    teacher, NaN logits, and as `run_tasks`.
    """
    if teacher not in engines:
        raise ValueError(f"teacher {teacher!r} is not among the engines: {', '.join(engines)}")
    own = None if include_path is None else read_own_tasks(include_path)
    # Unknown names are reported before anything is computed.
    loader = None if task_data is None else TaskLoader(tasks, Path(task_data), own=own)
    nll: dict[str, list[torch.Tensor]] = {name: [] for name in engines}
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in engines}
    matches: dict[str, list[torch.Tensor]] = {name: [] for name in engines}
    for window in windows:
        targets_T = torch.tensor(window[1:])
        # The last row predicts a token beyond the window.
        teacher_TV = check_numbers(engines[teacher].logits(list(window))[:-1].cpu(), teacher)
        for name, engine in engines.items():
            if name == teacher:
                logits_TV = teacher_TV
            else:
                logits_TV = check_numbers(engine.logits(list(window))[:-1].cpu(), name)
            nll[name].append(token_nll(logits_TV, targets_T))
            kl[name].append(token_kl(teacher_TV, logits_TV))
            matches[name].append(top1_matches(teacher_TV, logits_TV))
    raw: dict[str, dict[str, Any]] = {}
    scores: dict[str, tuple[TaskScore, ...]] = {name: () for name in engines}
    if loader is not None:
        for name, engine in engines.items():
            raw[name] = _run_tasks(engine, loader, tasks, limit, progress)
            scores[name] = task_scores(raw[name])
    methods = []
    for name in engines:
        mean_nll = float(torch.cat(nll[name]).mean())
        methods.append(
            MethodQuality(
                method=name,
                num_tokens=sum(len(part) for part in nll[name]),
                nll_nats=mean_nll,
                perplexity=math.exp(mean_nll),
                kl_to_teacher_nats=None if name == teacher else float(torch.cat(kl[name]).mean()),
                kl_stderr_nats=None
                if name == teacher
                else stderr_over_windows([float(part.sum()) for part in kl[name]], [len(part) for part in kl[name]]),
                top1_agreement=None if name == teacher else float(torch.cat(matches[name]).double().mean()),
                tasks=scores[name],
            )
        )
    return QualityResult(
        teacher=teacher,
        methods=tuple(methods),
        limit=limit,
        include_path=None if own is None else str(own.directory),
        include_path_sha256=None if own is None else own.sha256,
        lm_eval=raw,
        environment=describe_environment(),
    )


@torch.no_grad()
def model_quality(
    name: str, teacher: PreTrainedModel, student: PreTrainedModel | None, windows: Sequence[Sequence[int]]
) -> MethodQuality:
    """Held-out quality of `student` against `teacher`, transformers models on one device, or of the teacher alone.

    For families and formats that the engine lacks. `windows` have two or more ids. Raises ValueError for NaN logits.
    """
    sums: dict[str, list[float]] = {"nll": [], "kl": [], "matches": []}
    for window in windows:
        ids_BT = torch.tensor([list(window)], device=teacher.device)
        # The last row predicts a token beyond the window.
        teacher_TV, student_TV = (
            check_numbers(each(input_ids=ids_BT, use_cache=False).logits[0, :-1], label)
            for each, label in ((teacher, "the teacher"), (student or teacher, name))
        )
        sums["nll"].append(float(token_nll(student_TV, ids_BT[0, 1:]).sum()))
        sums["kl"].append(float(token_kl(teacher_TV, student_TV).sum()))
        sums["matches"].append(float(top1_matches(teacher_TV, student_TV).sum()))
    sizes = [len(window) - 1 for window in windows]
    nll = sum(sums["nll"]) / sum(sizes)
    return MethodQuality(
        method=name,
        num_tokens=sum(sizes),
        nll_nats=nll,
        perplexity=math.exp(nll),
        kl_to_teacher_nats=None if student is None else sum(sums["kl"]) / sum(sizes),
        kl_stderr_nats=None if student is None else stderr_over_windows(sums["kl"], sizes),
        top1_agreement=None if student is None else sum(sums["matches"]) / sum(sizes),
    )


def run_tasks(
    engine: Engine,
    task_data: str | Path,
    tasks: Sequence[str] = TASK_NAMES,
    limit: int | float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """lm-eval's results of `tasks`, ours on `task_data` or lm-eval's own, as plain JSON types.

    Raises ValueError for an unknown task or missing data of ours. lm-eval's own tasks may download data sets.
    """
    return _run_tasks(engine, TaskLoader(tasks, Path(task_data)), tasks, limit, progress)


def _run_tasks(
    engine: Engine, loader: TaskLoader, tasks: Sequence[str], limit: int | float | None, progress: bool
) -> dict[str, Any]:
    items = [item for name in tasks for item in loader.load(name)]
    lm = EngineLM(engine, progress=progress, tasks=[task for item in items for task in leaf_tasks(item)])
    output = lm_eval.simple_evaluate(
        model=lm,
        tasks=items,
        task_manager=loader.manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert output is not None  # other ranks of a distributed run would get None
    return to_plain({key: output[key] for key in LM_EVAL_KEYS if key in output})


def task_scores(results: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """One entry a metric from lm-eval's results, named with its filter only if a task has several.

    Shares get the standard error sqrt(p (1 - p) / (n - 1)).
    """
    scores = []
    for task, metrics in results["results"].items():
        if task not in results["n-samples"]:  # a group; its members are listed themselves
            continue
        num_documents = int(results["n-samples"][task]["effective"])
        found = {
            key: value
            for key, value in metrics.items()
            # Names without a filter: "alias" and the like.
            if "," in key and not key.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
        }
        num_filters = Counter(key.partition(",")[0] for key in found)
        for key, value in found.items():
            metric, _, _ = key.partition(",")
            stderr = None
            if metric in ("acc", "acc_norm", "exact_match") and num_documents > 1:
                stderr = math.sqrt(value * (1.0 - value) / (num_documents - 1))
            scores.append(
                TaskScore(
                    task=task.removeprefix(PREFIX),
                    metric=metric if num_filters[metric] == 1 else key,
                    value=value,
                    stderr=stderr,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    num_documents=num_documents,
                )
            )
    return tuple(scores)


def stderr_over_windows(sums: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Standard error of a mean over tokens, from each window's sum and size; None for one window.

    Windows are the independent draws, because tokens correlate.
    """
    num_windows, num_tokens = len(sums), sum(sizes)
    if num_windows < 2:
        return None
    mean = sum(sums) / num_tokens
    # Ratio estimator: residuals of the sums about mean x size.
    residuals = sum((part - mean * size) ** 2 for part, size in zip(sums, sizes, strict=True))
    return math.sqrt(residuals * num_windows / (num_windows - 1)) / num_tokens
