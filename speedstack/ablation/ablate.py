"""The `ablate` verb: a grid over number format, modules, method, drafter and temperature; one table and its plots.

    OUT/results.json  results.csv  results.md   rewritten whenever a row is complete
    OUT/plots/                                  at the end
    OUT/steps/<kind>-<hash>/                    results of steps, by the hash of their inputs
    OUT/logs/worker-<n>.log                     output of the workers

The same command does what is missing; a changed config reuses the steps it still shares. Steps made with other versions
of torch, transformers, lm-eval or speedstack are named and made anew. A failed row keeps its reason, and the others go
on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from speedstack.ablation.config import AblateConfig, Grids

if TYPE_CHECKING:
    from speedstack.ablation.step_pool import Place
    from speedstack.eval.results.ablation import AblationGrid, AblationRow
    from speedstack.support.steps import Step

RUNNER = "speedstack.ablation.steps:run_step"


def ablate(config: AblateConfig | Grids) -> int:
    """Run the grid, or several one after the other; 1 when a row has failed, else 0.

    Raises ValueError, before anything runs, for problems visible in config, checkpoint and corpus, and for a directory
    in use; OSError if it cannot be written.
    """
    grids = config.grids if isinstance(config, Grids) else (config,)
    checked = [Ablation(grid) for grid in grids]
    return max(1 if ablation.run().num_failed else 0 for ablation in checked)


class Ablation:
    """One grid, checked; raises ValueError as `ablate`."""

    def __init__(self, config: AblateConfig) -> None:
        from speedstack.ablation.check import check
        from speedstack.ablation.plan import Planner
        from speedstack.support.steps import StepStore

        check(config)
        self.config = config
        self.planner = Planner(config)
        self.rows = self.planner.rows()
        self.store = StepStore(config.out.resolve() / "steps")
        self.places = worker_places(config, self.planner.device)
        self._finished: dict[str, AblationRow] = {}
        self._failures: dict[str, str] = {}

    def run(self) -> AblationGrid:
        """Make what is missing, write the files, and print where they are."""
        from tqdm import tqdm

        from speedstack.ablation.step_pool import run_steps
        from speedstack.support.files import exclusive

        steps = {step.name: step for row in self.rows for each in row.steps() for step in each.closure()}
        with exclusive(self.config.out):
            num_done = len(steps) - len(self.store.missing(steps.values()))
            print(f"{len(self.rows)} rows, {len(steps)} steps, {num_done} of them done before")
            self._warn_of_other_software(list(steps.values()))
            with tqdm(total=len(steps), initial=num_done, unit="step", desc="ablate", dynamic_ncols=True) as bar:

                def on_step(step: Step, failure: str | None) -> None:
                    bar.set_postfix_str(step.name, refresh=False)
                    bar.update()
                    if failure is not None:
                        self._failures[step.name] = failure
                        tqdm.write(f"{step.name} failed: {failure}", file=sys.stderr)
                    self._save_finished()

                logs = self.config.out / "logs"
                run_steps(self.store, list(steps.values()), RUNNER, self.places, logs, on_step)
            self._save_finished()
            grid = self._write()
            self._draw(grid)
        for row in grid.rows:
            if row.error is not None:
                print(f"failed: {row.name}: {row.error}", file=sys.stderr)
        for path in ("results.json", "results.csv", "results.md", "plots"):
            print(f"written: {self.config.out / path}")
        return grid

    def _warn_of_other_software(self, steps: Sequence[Step]) -> None:
        found = self.store.other_software(steps)
        packages = dict.fromkeys(difference for differences in found.values() for difference in differences)
        if packages:
            print(
                f"{len(found)} steps are there of other software ({'; '.join(packages)}): made anew, so that all rows "
                "are of one; with those versions installed they are found again",
                file=sys.stderr,
            )

    def _save_finished(self) -> None:
        """Rewrite the results if a row has become complete."""
        from speedstack.ablation.rows import make_row

        is_new = False
        for row in self.rows:
            if row.spec.name in self._finished:
                continue
            if all(step.name in self._failures or self.store.is_done(step) for step in row.steps()):
                self._finished[row.spec.name] = make_row(row, self.planner, self.store, self._failures)
                is_new = True
        if is_new:
            self._write()

    def _write(self) -> AblationGrid:
        from speedstack.ablation.rows import make_grid

        finished = [self._finished[row.spec.name] for row in self.rows if row.spec.name in self._finished]
        grid = make_grid(self.planner, len(self.places), finished)
        grid.save(self.config.out / "results.json")
        grid.save_csv(self.config.out / "results.csv")
        grid.save_markdown(self.config.out / "results.md")
        return grid

    def _draw(self, grid: AblationGrid) -> None:
        from speedstack.eval.report.ablation_figures import ablation_figures

        directory = self.config.out / "plots"
        directory.mkdir(exist_ok=True)
        for name, figure in ablation_figures(grid).items():
            for suffix in ("png", "svg"):
                figure.savefig(directory / f"{name}.{suffix}")


def worker_places(config: AblateConfig, device: str) -> list[Place]:
    """The workers' places: a GPU each, or a share of the CPU's threads. Raises ValueError for more jobs than GPUs."""
    import torch

    from speedstack.ablation.step_pool import Place

    if device == "cpu":
        num_jobs = config.jobs or 1
        num_threads = max(1, torch.get_num_threads() // num_jobs)
        return [Place({"CUDA_VISIBLE_DEVICES": ""}, num_threads)] * num_jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    num_jobs = config.jobs or len(gpus)
    if num_jobs > len(gpus):
        raise ValueError(f"{num_jobs} jobs need a GPU each, and there are {len(gpus)}: lower jobs")
    num_threads = max(1, torch.get_num_threads() // num_jobs)
    return [Place({"CUDA_VISIBLE_DEVICES": gpu}, num_threads) for gpu in gpus[:num_jobs]]
