"""The `eval` verb: a suite of lm-eval tasks, or without one, held-out perplexity and divergence from a teacher.

    OUT/<suite>.json    lm-eval's result with our block; OUT/answers/ lets a killed evaluation continue
    OUT/quality.json    without a suite
    OUT/tasks/          data of our own tasks, made from the held-out part of a corpus

Under torchrun every process runs this verb; the main one evaluates, the others answer its requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedstack.eval.config import EvalConfig
from speedstack.support.config import load_config_of

if TYPE_CHECKING:
    from speedstack.runtime import Engine


def load_eval_config(path: Path | None, overrides: Sequence[str]) -> EvalConfig:
    """The verb's config; a model directory in place of the YAML file becomes `target`."""
    return load_config_of(EvalConfig, "target", path, overrides)


def evaluate(config: EvalConfig) -> None:
    """Run a suite of tasks, or measure a model's quality, against a teacher if given."""
    if config.suite is not None:
        _evaluate_suite(config, config.suite)
    else:
        _evaluate_heldout(config)


def _evaluate_suite(config: EvalConfig, name: str) -> None:
    from speedstack.eval.lm_eval.processes import join_processes
    from speedstack.eval.lm_eval.request_cache import RequestCache
    from speedstack.eval.lm_eval.suite import SuiteSettings, cache_directory, load_suite, run_suite
    from speedstack.eval.lm_eval.task_loading import TEACHER_TASK_NAMES
    from speedstack.eval.lm_eval.worker import Worker

    name, suite = load_suite(name)
    _check_models(config)
    with join_processes() as processes:
        engine = _eval_engine(config, config.target, config.drafter)
        cache = cache_directory(config.out / "answers", engine, config.target)
        if not processes.is_main:
            processes.serve(Worker(engine, RequestCache(cache, processes.rank), progress=False))
            return
        try:
            if config.teacher is None and (left_out := [t.task for t in suite.tasks if t.task in TEACHER_TASK_NAMES]):
                print(f"left out, for want of --teacher: {', '.join(left_out)}")
                suite = suite.without(left_out)
            make_task_data(config, {task.task for task in suite.tasks})
            settings = SuiteSettings(
                limit=config.limit,
                task_data=config.out / "tasks",
                data=config.data,
                include_path=config.include_path,
                cache=cache,
                seed=config.seed,
                chat_template=config.chat_template,
                chat_template_kwargs=config.chat_template_kwargs,
                think_end_token=config.think_end_token,
                max_gen_toks=config.max_gen_toks,
                allow_code=config.allow_code,
            )
            result = run_suite(engine, config.target, config.drafter, name, suite, settings, processes)
        finally:
            processes.dismiss()
    path = result.save(config.out / f"{name}.json")
    for entry in result.block.headline:
        for task, metric, value in result.scores(entry.task, entry.metric):
            stderr = result.stderr(task, metric)
            print(f"{task} {metric}: {value:.4f}{'' if stderr is None else f' +- {stderr:.4f}'}")
    num_requests = sum(counts.num_requests for counts in result.block.requests.values())
    num_cached = sum(counts.num_cached for counts in result.block.requests.values())
    print(f"{num_requests} requests, {num_cached} of them answered before, in {result.block.seconds:.1f} s")
    print(f"written: {path}")
    result.check_headline()


def make_task_data(config: EvalConfig, tasks: set[str]) -> None:
    """Write the data of those of `tasks` that are ours, from held-out text, into `config.out`/tasks."""
    from speedstack.eval.data.task_data import NUM_SAME_TEXT, SUITE_SIZES, make_same_text, make_tasks
    from speedstack.eval.lm_eval.adapter import EngineLM
    from speedstack.eval.lm_eval.task_loading import TASK_NAMES, TEACHER_TASK_NAMES, generation_settings
    from speedstack.train.data.corpus import load_corpus
    from speedstack.train.data.heldout import heldout_texts

    if not tasks & {*TASK_NAMES, *TEACHER_TASK_NAMES}:
        return
    texts = heldout_texts(load_corpus(config.corpus))
    make_tasks(texts, config.out / "tasks", config.seed, SUITE_SIZES, tasks & set(TASK_NAMES))
    if tasks & set(TEACHER_TASK_NAMES):
        assert config.teacher is not None
        teacher = EngineLM(
            _eval_engine(config, config.teacher),
            chat_template_kwargs=config.chat_template_kwargs,
            think_end=config.think_end_token,
            max_gen_toks=config.max_gen_toks,
        )

        def write(contexts: list[str]) -> list[str]:
            """Ask the teacher in the same way as the models compared with it."""
            if config.chat_template:
                contexts = [teacher.apply_chat_template([{"role": "user", "content": text}]) for text in contexts]
            return teacher.write(contexts, generation_settings("same_text"))

        make_same_text(texts, write, config.out / "tasks", NUM_SAME_TEXT, config.seed)


def _check_models(config: EvalConfig) -> None:
    """Raise ValueError for a model that the engine cannot decode, before another one is loaded."""
    from speedstack.runtime.model.loading import check_decodable

    for model in (config.target, config.teacher):
        if model is not None:
            check_decodable(model)


def _eval_engine(config: EvalConfig, target: Path, drafter_path: Path | None = None) -> Engine:
    from speedstack.runtime import Engine

    device: str = config.device
    if device != "cpu" and (rank := os.environ.get("LOCAL_RANK")) is not None:
        import torch

        device = f"cuda:{rank}" if torch.cuda.is_available() else device
    return Engine.from_pretrained(
        target,
        drafter_path,
        backend=config.backend,
        device=device,
        dtype=None if config.dtype == "auto" else config.dtype,
        max_length=config.max_length,
        max_batch_size=config.batch_size,
    )


def _evaluate_heldout(config: EvalConfig) -> None:
    from speedstack.eval.data.task_data import make_tasks
    from speedstack.eval.lm_eval.task_loading import TASK_NAMES
    from speedstack.eval.quality.heldout import corpus_windows
    from speedstack.eval.quality.measure import measure_quality
    from speedstack.train.data.corpus import load_corpus
    from speedstack.train.data.heldout import heldout_texts

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "only suites are shared by several processes: name one with --suite, or start without torchrun"
        )
    _check_models(config)
    corpus = load_corpus(config.corpus)
    models = [config.target] if config.teacher is None else [config.teacher, config.target]
    for model in models:
        windows = corpus_windows(config.corpus, model, config.window, config.num_tokens)
    task_data = config.out / "tasks"
    ours = None if config.tasks is None else set(config.tasks) & set(TASK_NAMES)
    made = make_tasks(heldout_texts(corpus), task_data, config.seed, tasks=ours)
    tasks = tuple(made) if config.tasks is None else config.tasks
    engines = {"target": _eval_engine(config, config.target, config.drafter)}
    teacher = "target"
    if config.teacher is not None:
        teacher = "teacher"
        engines[teacher] = _eval_engine(config, config.teacher)
    result = measure_quality(
        engines,
        teacher,
        windows,
        task_data=task_data if tasks else None,
        tasks=tasks,
        limit=config.limit,
        include_path=config.include_path,
    )
    path = result.save(config.out / "quality.json")
    for entry in result.methods:
        print(f"{entry.method}: {entry.nll_nats:.4f} nats a token, perplexity {entry.perplexity:.3f}")
        if entry.kl_to_teacher_nats is not None:
            agreement = "" if entry.top1_agreement is None else f", top-1 agreement {entry.top1_agreement:.4f}"
            print(f"  KL from the teacher {1e3 * entry.kl_to_teacher_nats:.3f} millinats a token{agreement}")
        for score in entry.tasks:
            stderr = "" if score.stderr is None else f" +- {score.stderr:.4f}"
            print(f"  {score.task} {score.metric} {score.value:.4f}{stderr} ({score.num_documents} documents)")
    print(f"written: {path}")
