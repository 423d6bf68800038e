"""The verbs that run one job: each takes its config, does the work through the package that owns it, and says where the
result lies. Anything longer than that belongs into the package.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from speedstack.eval.config import BenchConfig, EvalConfig, ReportConfig
from speedstack.train.config import DrafterConfig, PretrainConfig, QatConfig

if TYPE_CHECKING:
    from speedstack.train.loop import RunResult


def pretrain(config: PretrainConfig) -> None:
    """Train a model from scratch."""
    from speedstack.train.pretrain import pretrain as run

    _show_run(run(config))


def qat(config: QatConfig) -> None:
    """Quantization-aware training."""
    from speedstack.train.qat import qat as run

    _show_run(run(config))


def drafter(config: DrafterConfig) -> None:
    """Train a drafter."""
    from speedstack.train.drafter import train_drafter

    _show_run(train_drafter(config))


def evaluate(config: EvalConfig) -> None:
    """Quality of one model, against a teacher where one is given."""
    from speedstack.eval.quality import TASK_NAMES, heldout_windows, measure_quality
    from speedstack.eval.task_data import make_tasks
    from speedstack.heldout import heldout_texts
    from speedstack.runtime import Engine
    from speedstack.train.corpus import load_corpus

    def engine(target: Path, drafter_path: Path | None = None) -> Engine:
        return Engine.from_pretrained(
            target,
            drafter_path,
            backend=config.backend,
            device=config.device,
            dtype=None if config.dtype == "auto" else config.dtype,
            max_length=config.max_length,
            max_batch_size=config.max_batch_size,
        )

    corpus = load_corpus(config.corpus)
    engines = {"target": engine(config.target, config.drafter)}
    if config.teacher is not None:
        engines["teacher"] = engine(config.teacher)
    prefix_id = corpus.tokenizer.eos_token_id
    windows = heldout_windows(corpus.heldout["input_ids"], config.window, config.num_tokens, prefix_id)
    task_data = config.out / "tasks"
    if set(config.tasks) & set(TASK_NAMES):
        make_tasks(heldout_texts(corpus), task_data, seed=config.seed)
    teacher = "teacher" if config.teacher is not None else "target"
    result = measure_quality(engines, teacher, windows, task_data=task_data, tasks=config.tasks, limit=config.limit)
    path = result.save(config.out / "quality.json")
    for entry in result.methods:
        print(f"{entry.method}: {entry.nll_nats:.4f} nats a token, perplexity {entry.perplexity:.3f}")
        if entry.kl_to_teacher_nats is not None:
            agreement = "" if entry.top1_agreement is None else f", top-1 agreement {entry.top1_agreement:.4f}"
            print(f"  KL from the teacher {1e3 * entry.kl_to_teacher_nats:.3f} millinats a token{agreement}")
        for score in entry.tasks:
            stderr = "" if score.stderr is None else f" +- {score.stderr:.4f}"
            print(f"  {score.task} {score.metric} {score.value:.4f}{stderr} ({score.num_documents} documents)")
    _show_path(path)


def bench(config: BenchConfig) -> None:
    """Time the decode loop against peers; with a drafter, its acceptance too."""
    import torch

    from speedstack.eval.acceptance import measure_acceptance
    from speedstack.eval.peers import TimingSettings, measure_timing
    from speedstack.heldout import heldout_prompts
    from speedstack.runtime import Engine
    from speedstack.runtime.select import choose_device
    from speedstack.train.corpus import load_corpus

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    corpus = load_corpus(config.corpus)
    prompt_sets = heldout_prompts(corpus, config.num_prompts, config.num_prompt_tokens, config.seed)
    settings = TimingSettings(
        num_new_tokens=config.num_new_tokens,
        num_repeats=config.num_repeats,
        dtype=config.dtype,
        device=choose_device(config.device).type,
        backend=config.backend,
    )
    prompts = list(itertools.chain.from_iterable(prompt_sets.values()))
    timing = measure_timing(config.target, config.drafter, prompts, settings)
    paths = [timing.save(config.out / "timing.json")]
    for entry in timing.contestants:
        rate, first = entry.decode_tokens_per_second, entry.first_token_seconds
        print(
            f"{entry.name}: {rate.median:.1f} tokens/s ({rate.q1:.1f}-{rate.q3:.1f}), "
            f"first token after {1e3 * first.median:.1f} ms, prepared in {entry.prepare_seconds:.1f} s"
        )
    for absent in timing.unavailable:
        print(f"{absent.name}: not available ({absent.reason})")
    if config.drafter is not None:
        engine = Engine.from_pretrained(
            config.target, config.drafter, backend=config.backend, device=config.device, dtype=config.dtype
        )
        acceptance = measure_acceptance(engine, prompt_sets, config.num_new_tokens)
        print(f"acceptance: {acceptance.overall.acceptance_length:.2f} tokens a round")
        paths.append(acceptance.save(config.out / "acceptance.json"))
    for path in paths:
        _show_path(path)


def report(config: ReportConfig) -> None:
    """Write report.html and report.json."""
    from speedstack.eval.report import write_report
    from speedstack.gather import gather

    config.out.mkdir(parents=True, exist_ok=True)
    for path in write_report(gather(config.inputs, config.title), config.out):
        _show_path(path)


def _show_run(result: RunResult) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    for name, value in result.metrics.items():
        print(f"{name}: {value:.5g}")
    _show_path(result.path, "run")
    _show_path(result.export_path, "export")


def _show_path(path: Path, label: str = "written") -> None:
    print(f"{label}: {path}")
