"""The one training loop. A recipe says what is trained on which loss; everything else is here.

    for step: batch -> loss under autocast -> backward -> clipped update -> metrics -> checkpoint -> evaluation

Resume is exact: examples are numbered (`batches.py`), the learning rate is a function of the step, and the global
random generators are seeded from (seed, step), so a checkpoint is parameters, optimizer state and a few counters. A
resumed run has the same bits wherever the device's kernels are deterministic: on a CPU all are, except those for
gpt-oss's expert biases on several threads. One process runs plain PyTorch, several run DeepSpeed (`trainer.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from speedstack.eval.report.wandb_mirror import Mirror
from speedstack.eval.results.metrics import read_metrics
from speedstack.support.files import atomic_path
from speedstack.support.freed_memory import keep_freed_memory
from speedstack.train.config.recipes import JobConfig, config_hash
from speedstack.train.core.batches import generator
from speedstack.train.core.checkpoint import CheckpointStore
from speedstack.train.core.distributed import World, join_world
from speedstack.train.core.make_trainer import make_trainer
from speedstack.train.core.metrics import MetricsLog
from speedstack.train.core.optim import learning_rate_factor
from speedstack.train.core.precision import resolve_config, resolve_precision
from speedstack.train.core.rundir import add_inputs, open_run_directory
from speedstack.train.core.trainer import Trainer, load_recipe_tensors

OnStep = Callable[[int, int, dict[str, float]], None]


class Recipe(Protocol):
    """What distinguishes pretraining, quantization-aware training and drafter training, with default methods."""

    def inputs(self) -> dict[str, str]:
        """Digests of the weights the run starts from, by name; other digests make it another run.

        Called on the main process only. Raises ValueError for missing weights.
        """

    def read_inputs(self) -> dict[str, str]:
        """Digests of what `build` read besides; called after it, on the main process only."""
        return {}

    def build(self, world: World) -> nn.Module:
        """The float32 module to train, on `world.device`; `requires_grad` marks what is trained.

        Frozen companions (a teacher, a target) belong to the recipe, not to the module.
        """

    def set_training(self, module: nn.Module) -> None:
        """Put the module into the mode it is trained in."""
        module.train()

    def batch(self, indices: Sequence[int]) -> Any:
        """The training examples with these numbers, on the device, as `loss` takes them: a pure function."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss over the batch's examples, and scalar metrics that are means over them too.

        Call `model` itself, which may be a DeepSpeed engine, not its parts: gradients must flow through that call.
        """

    def evaluate(self, model: nn.Module) -> Mapping[str, float | None]:
        """Held-out metrics of this process's share of the data; the loop averages them over processes.

        Runs in evaluation mode without gradients or autocast. All processes give the same keys; None is no value.
        """

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the finished model to the directory `path`, which does not exist yet."""

    def after_step(self, num_steps_done: int) -> None:
        """Called on every process after every optimizer step, with gradients on."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors a resumed run needs besides the model and what `build` makes again; equal on all processes."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned at the checkpoint; called after `build`."""
        return None


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, its export, and the metrics of its last evaluation."""

    path: Path
    export_path: Path
    metrics: dict[str, float]


class DivergedError(ValueError):
    """The loss or the gradient is not finite; the newest checkpoint predates this step."""


@dataclass
class _Progress:
    """Counters that a checkpoint carries; `sums` adds up metrics since the last line in the log."""

    elapsed_seconds: float = 0.0
    num_summed: int = 0
    sums: dict[str, float] = field(default_factory=dict)


def run(recipe: Recipe, config: JobConfig, on_step: OnStep | None = None) -> RunResult:
    """Train `recipe` to the end of `config`, resuming an interrupted run; a finished run returns at once.

    `on_step(steps done, steps in all, metrics)` replaces the progress bar; the main process calls it after every step,
    and once when training starts, with the steps already done.

    Raises:
        ValueError: the run directory belongs to another configuration or model, the data, model and config do not fit
            together, or run.wandb_mode is online and wandb cannot be.
        DivergedError: the loss or the gradient norm is not finite.
        OSError: the run directory cannot be written; complete checkpoints stay complete.
    """
    with join_world(config) as world:
        return _run(recipe, world.on_main(lambda: resolve_config(config, world.device)), world, on_step)


def _run(recipe: Recipe, config: JobConfig, world: World, on_step: OnStep | None) -> RunResult:
    directory = world.on_main(lambda: open_run_directory(config, world.device, recipe.inputs()))
    export_path = directory / "export"
    if export_path.is_dir():
        return RunResult(directory, export_path, _last_evaluation(directory))
    mirror = Mirror()
    # First, because a recipe may write text or features for hours before it has a model to train.
    world.on_main(lambda: mirror.start(config.run.wandb_mode, directory, config.model_dump(mode="json")))
    with mirror:
        return _build_and_train(recipe, config, world, on_step, directory, export_path, mirror)


def _build_and_train(
    recipe: Recipe,
    config: JobConfig,
    world: World,
    on_step: OnStep | None,
    directory: Path,
    export_path: Path,
    mirror: Mirror,
) -> RunResult:
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.run.seed)
    module = recipe.build(world)
    world.on_main(lambda: add_inputs(directory, recipe.read_inputs()))
    recipe.set_training(module)
    trainer = make_trainer(module, config, world)
    store = CheckpointStore(
        directory / "checkpoints",
        num_kept=config.loop.keep_checkpoints,
        world_size=world.size,
        config_hash=config_hash(config),
    )
    manifest = world.on_main(store.newest)
    first_step, progress = 0, _Progress()
    if manifest is not None:
        first_step, progress = manifest.step, _Progress(**manifest.state)
        trainer.load(store.path(first_step))
        recipe.load_state(load_recipe_tensors(store.path(first_step)))

    log = MetricsLog(directory, mirror, resume_step=first_step) if world.is_main else None
    try:
        _train(recipe, config, world, trainer, store, log, first_step, progress, on_step)
        store.wait()
    finally:
        store.finish()
        if log is not None:
            log.close()
    with trainer.whole_parameters():
        world.on_main(lambda: _export(recipe, trainer.module, export_path))
    metrics = _last_evaluation(directory)
    trainer.close()
    return RunResult(directory, export_path, metrics)


def _train(
    recipe: Recipe,
    config: JobConfig,
    world: World,
    trainer: Trainer,
    store: CheckpointStore,
    log: MetricsLog | None,
    first_step: int,
    progress: _Progress,
    on_step: OnStep | None,
) -> None:
    loop = config.loop
    started = time.monotonic() - progress.elapsed_seconds
    interval_started, interval_step = time.monotonic(), first_step
    bar = tqdm(
        total=loop.num_steps,
        initial=first_step,
        desc=config.run.name,
        unit="step",
        dynamic_ncols=True,
        disable=not world.is_main or on_step is not None,
    )
    if on_step is not None and world.is_main:
        on_step(first_step, loop.num_steps, {})

    def is_evaluated(step: int) -> bool:
        return bool(loop.eval_every and step % loop.eval_every == 0) or step == loop.num_steps

    with bar:
        # At step 0; or at the checkpoint's step, if the run ended during that evaluation.
        if is_evaluated(first_step) and not world.on_main(
            lambda: log is not None and first_step in log.evaluated_steps
        ):
            _evaluate(recipe, world, trainer, log, first_step, started)
        for step in range(first_step, loop.num_steps):
            metrics = train_step(recipe, config, world, trainer, step)
            recipe.after_step(step + 1)
            done, is_last = step + 1, step + 1 == loop.num_steps
            for name, value in metrics.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            progress.num_summed += 1
            if done % loop.log_every == 0 or is_last:
                now = time.monotonic()
                num_tokens = (done - interval_step) * loop.batch_size * config.data.sequence_length
                line = {name: total / progress.num_summed for name, total in progress.sums.items()}
                line["learning_rate"] = learning_rate_factor(config.optim, step, loop.num_steps) * config.optim.lr
                line["tokens_per_second"] = num_tokens / (now - interval_started)
                line["elapsed_seconds"] = now - started
                if log is not None:
                    log.write("train", done, line)
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['tokens_per_second']:.0f} tok/s", refresh=False)
                progress.sums, progress.num_summed = {}, 0
                interval_started, interval_step = now, done
            bar.update()
            if on_step is not None and world.is_main:
                on_step(done, loop.num_steps, metrics)
            # Before the evaluation, so that a failure there loses no work.
            if is_last or (loop.save_every and done % loop.save_every == 0):
                progress.elapsed_seconds = time.monotonic() - started
                trainer.save(store, done, asdict(progress), recipe.state())
            if is_evaluated(done):
                evaluation_started = time.monotonic()
                _evaluate(recipe, world, trainer, log, done, started)
                # Throughput is of training alone.
                interval_started += time.monotonic() - evaluation_started


def train_step(recipe: Recipe, config: JobConfig, world: World, trainer: Trainer, step: int) -> dict[str, float]:
    """One optimizer step; returns loss, metrics and gradient norm, means over micro-batches and processes."""
    loop = config.loop
    # Randomness then does not depend on earlier steps, and no random state has to be saved.
    torch.manual_seed(generator(config.run.seed, step, world.rank).initial_seed())
    indices = world.share(range(step * loop.batch_size, (step + 1) * loop.batch_size))
    size = loop.micro_batch_size or len(indices)
    rows, names = [], ["loss"]
    for start in range(0, len(indices), size):
        batch = recipe.batch(indices[start : start + size])
        use_autocast = resolve_precision(config.run.precision, world.device) == torch.bfloat16
        with torch.autocast(world.device.type, torch.bfloat16, enabled=use_autocast):
            loss, extra = recipe.loss(trainer.model, batch)
        trainer.backward(loss)
        names = ["loss", *extra]
        rows.append(torch.stack([loss.detach().float(), *(value.detach().float() for value in extra.values())]))
    values = torch.stack(rows).mean(dim=0).tolist()
    metrics = world.mean(dict(zip(names, values, strict=True)))
    _check_finite("loss", metrics["loss"], step)
    metrics["grad_norm"] = trainer.step(learning_rate_factor(config.optim, step, loop.num_steps))
    _check_finite("gradient norm", metrics["grad_norm"], step)
    return metrics


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"{name} is {value} in step {step + 1}: lower optim.lr, or use run.precision float32")


def _evaluate(
    recipe: Recipe, world: World, trainer: Trainer, log: MetricsLog | None, step: int, started: float
) -> None:
    trainer.module.eval()
    with torch.no_grad():
        metrics = world.mean(recipe.evaluate(trainer.module))
    recipe.set_training(trainer.module)
    if log is not None:
        log.write("eval", step, {**metrics, "elapsed_seconds": time.monotonic() - started})


def _export(recipe: Recipe, module: nn.Module, export_path: Path) -> None:
    """Write the export, by rename: an export that exists is whole and marks the run as finished."""
    module.eval()
    try:
        with atomic_path(export_path) as partial:
            recipe.export(module, partial)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {export_path}: {getattr(error, 'strerror', None) or error}; "
            "training is complete, run the same command again to export"
        ) from error


def _last_evaluation(directory: Path) -> dict[str, float]:
    lines = [line for line in read_metrics(directory) if line["kind"] == "eval"]
    bookkeeping = {"kind", "step", "elapsed_seconds"}
    return {name: value for name, value in lines[-1].items() if name not in bookkeeping} if lines else {}
