"""The resident backend: a decode step as one persistent Triton kernel.

Programs synchronize on the plan's counters, which are proved safe first; there is no grid barrier. Counters are never
reset: each launch continues at the next step. All programs must be resident, so the driver (cooperative launch) refuses
more than fit instead of hanging.

A wait gives up after `max_polls` failed polls. The kernel then reports who waits for what, `step` raises RuntimeError,
counters restart at zero, and the step's sequences are lost.

`prefetch`: `own` lets each program load its first item's weights into L2 before it waits; `none` does not. The default
is a guess, not measured.

A launch runs one step of rows named by the host, or several rounds without it (`multi_step.py`).
"""

from typing import Any, Literal, get_args

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.base import PlanBackend, Target, check_supported
from speedstack.runtime.backends.gpu.buffers import FAILED, HEADER, NUM_MADE
from speedstack.runtime.backends.gpu.multi_step import ResidentRounds
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.step import MAX_ROWS, SPLIT_SIZE
from speedstack.runtime.plan.verify.proof import prove

Prefetching = Literal["own", "none"]

INTERPRETED_PROGRAMS = 3
# Attention, and the choice among 256 experts, need more registers than four warps have.
NUM_WARPS = 8
MAX_STEPS = 16  # of one launch
# Seconds if a poll takes a microsecond (a guess); a step takes milliseconds.
MAX_POLLS = 1 << 22
# For the prefetch and cooperative-launch instructions used, and 227 KiB of shared memory.
CAPABILITY = (9, 0)


class ResidentBackend(PlanBackend):
    """Runs plans as one persistent kernel.

    Args:
        num_rows, split_size, target: see `PlanBackend`.
        num_programs: None is one per multiprocessor, because a program takes more than half its registers. The driver
            refuses more than fit; the interpreter takes any number.
        prefetch: see the module.
        max_polls: failed polls after which a wait gives up.
        seed: of the interpreter's schedule for the first launch; later launches count up.
    """

    name = "resident"
    plans_drafters = True

    def __init__(
        self,
        weights: ModelWeights,
        drafter: DFlashDraftModel | None,
        num_slots: int,
        max_length: int,
        num_rows: int = MAX_ROWS,
        split_size: int = SPLIT_SIZE,
        num_programs: int | None = None,
        prefetch: Prefetching = "own",
        max_polls: int = MAX_POLLS,
        seed: int = 0,
        target: Target | None = None,
    ) -> None:
        assert prefetch in get_args(Prefetching)
        self._is_interpreted = check_supported(self.name, weights, target)
        self.prefetch, self.max_polls, self.seed = prefetch, max_polls, seed
        self.interpreter_options: dict[str, Any] = {}  # of `interpret_triton`
        if num_programs is None:
            num_programs = INTERPRETED_PROGRAMS
            if not self._is_interpreted:
                num_programs = _multiprocessors(target or _target_of(weights.embedding_VD.device))
        self.rounds = self._rounds = ResidentRounds(self, num_rows)
        super().__init__(weights, drafter, num_slots, max_length, num_rows, split_size, num_programs, MAX_STEPS, target)

    def _prepare(self) -> None:
        from speedstack.runtime.backends.gpu.bindings.layers import bind
        from speedstack.runtime.backends.gpu.kernels.sync import DUMP_RECORD
        from speedstack.runtime.backends.gpu.task_table import build_tasks, check_early_choices

        failure = prove(self.plan).failure
        assert failure is None, failure
        check_early_choices(self.plan)
        self.bindings = bind(self.plan, self.weights, self.memory, self._planned_drafter)
        self.tasks = build_tasks(self.plan, self.bindings, self.device)
        self.counters = torch.zeros(self.plan.num_counters, dtype=torch.int32, device=self.device)
        self.dump = torch.zeros(self._num_programs, DUMP_RECORD.value, dtype=torch.int32, device=self.device)
        self.next_step = 0

    def _start(self) -> None:
        self._launch(1)

    def _finish(self) -> None:
        self._reports(1)

    def _step_chunk(self, rows: Rows) -> None:
        self._rounds.forget(rows.slots)
        super()._step_chunk(rows)

    def set_prompt_lookup(self, is_wanted: bool) -> None:
        """See `Rounds.set_prompt_lookup`; it changes the plan and its tables."""
        if is_wanted != self._has_prompt_lookup:
            assert self.drafter is None or not is_wanted
            taps = () if self.drafter is None else tuple(self.drafter.model.config.target_layer_ids)
            with self._all_or_nothing():
                self._make_plan(taps, is_wanted)

    def launch(self, num_steps: int) -> list[list[int]]:
        """Reports (see `Memory`) of the steps made of `memory.inbox`, at most `num_steps`. Raises RuntimeError as
        `step`.
        """
        assert 1 <= num_steps <= MAX_STEPS
        with self._on_device():
            self._launch(num_steps)
            return self._reports(num_steps)

    def repeat(self, num_steps: int) -> None:
        """See `PlanBackend`; many steps per launch. Raises RuntimeError as `step`."""
        assert not self.memory.sequences.any(), "the newest step's rows are the host's"
        with self._on_device():
            for start in range(0, num_steps, MAX_STEPS):
                num_now = min(MAX_STEPS, num_steps - start)
                self._launch(num_now)
                self.next_step += num_now
        if self.memory.failed.item():
            self._give_up()

    def arguments(self, num_steps: int) -> dict[str, Any]:
        """Kernel arguments by parameter name."""
        return {
            "phases_ptr": self.tasks.phases,
            "num_phases": len(self.plan.phases),
            "num_programs": self.plan.num_programs,
            "PHASES": self.tasks.variants,
            "PREFETCHES": self.prefetch == "own",
            "counters_ptr": self.counters,
            "dump_ptr": self.dump,
            "failed_ptr": self.memory.failed,
            "num_made_ptr": self.memory.num_made,
            "sequences_ptr": self.memory.sequences,
            "first_step": (self.next_step + 2**31) % 2**32 - 2**31,  # wraps around as the counters do
            "num_steps": num_steps,
            "max_polls": self.max_polls,
        }

    def compile(self) -> list[Any]:
        from speedstack.runtime.backends.gpu.kernels.aot_compile import compile_kernel
        from speedstack.runtime.backends.gpu.kernels.resident import resident_kernel

        assert self.target is not None
        return [compile_kernel(resident_kernel, self.arguments(1), compile_options(), self.target.capability)]

    def _launch(self, num_steps: int) -> None:
        from speedstack.runtime.backends.gpu.kernels.ptxas_workaround import first_values
        from speedstack.runtime.backends.gpu.kernels.resident import resident_kernel

        num_programs, arguments = self._num_programs, self.arguments(num_steps)
        if self._is_interpreted:
            from speedstack.runtime.backends.gpu.interpreter import interpret_triton

            interpret_triton(resident_kernel, num_programs, arguments, self.seed, **self.interpreter_options)
            self.seed += 1
        else:
            with first_values():
                resident_kernel[(num_programs,)](**arguments, **compile_options())

    def _reports(self, num_steps: int) -> list[list[int]]:
        # The first copy from the GPU waits for the kernel.
        words = self.memory.report_words(num_steps).tolist()
        if words[FAILED]:
            self._give_up()
        num_made = words[NUM_MADE]
        self.next_step += num_made
        length = self.memory.reports.shape[1]
        return [words[HEADER + step * length :][:length] for step in range(num_made)]

    def _give_up(self) -> None:
        """Raises the dump as an error, with counters as before the first step."""
        from speedstack.runtime.backends.gpu.task_table import explain

        message = explain(self.plan, self.dump.cpu())
        for tensor in (self.dump, self.memory.failed, self.counters):
            tensor.zero_()
        self.next_step = 0
        self._rounds.forget(range(self.num_slots))
        raise RuntimeError(f"the resident kernel timed out:\n{message}")


def compile_options() -> dict[str, Any]:
    """Compile and launch options of the kernel."""
    return {"num_warps": NUM_WARPS, "enable_fp_fusion": True, "launch_cooperative_grid": True}


def _target_of(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    return Target((properties.major, properties.minor), properties.multi_processor_count)


def _multiprocessors(target: Target) -> int:
    if target.capability < CAPABILITY:
        raise ValueError(
            f"backend 'resident' needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}; this one has "
            f"{target.capability[0]}.{target.capability[1]}: use backend='graph'"
        )
    return target.num_sms
