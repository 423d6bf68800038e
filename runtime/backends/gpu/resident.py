"""The resident backend: a decode step as one persistent Triton kernel.

Programs wait for each other on the counters of the plan, which is proved safe before anything runs; there is no barrier
over all of them. Counters are never reset: every launch goes on from the step where the last one ended. All programs
have to be on the GPU at once, so there are as many as it holds, and the driver refuses a launch that would not fit
(cooperative launch) instead of letting it hang.

A wait gives up after so many polls that only a fault can be the reason. The kernel then says who waits for what, and
`step` raises that as a RuntimeError; counters start again from zero, and the sequences of that step are lost.

`prefetch` says who brings weights into the L2 cache before they are needed: `own`, every program those of its own first
item before it waits; `none`. The default is a guess that has not been measured.

A launch makes one step of rows that the host names, or several rounds without it, drafts and acceptance included (see
`rounds`); it ends when no sequence is left.
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
# Attention, and the choice among 256 experts, hold more in registers than four warps have.
NUM_WARPS = 8
MAX_STEPS = 16  # of one launch
# If a poll takes a microsecond, which is a guess, this is seconds, where a step takes milliseconds.
MAX_POLLS = 1 << 22
# The instructions of prefetching and of cooperative launches that are used here, and 227 KiB of shared memory.
CAPABILITY = (9, 0)


class ResidentBackend(PlanBackend):
    """See the module.

    Args:
        num_rows, split_size, target: see `PlanBackend`.
        num_programs: None is one a multiprocessor: a program takes more than half of its registers. The driver refuses
            more than fit; the interpreter takes any number.
        prefetch: see the module.
        max_polls: polls without success after which a wait gives up.
        seed: of the order in which the interpreter's programs take turns, for the first launch; later ones count on.
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
        """See `Rounds.set_prompt_lookup`: that is another plan, and other tables."""
        if is_wanted != self._has_prompt_lookup:
            assert self.drafter is None or not is_wanted
            taps = () if self.drafter is None else tuple(self.drafter.model.config.target_layer_ids)
            with self._all_or_nothing():
                self._make_plan(taps, is_wanted)

    def launch(self, num_steps: int) -> list[list[int]]:
        """The reports (see `Memory`) of up to so many steps of what `memory.inbox` says: of those that were made.

        Raises RuntimeError as `step` does.
        """
        assert 1 <= num_steps <= MAX_STEPS
        with self._on_device():
            self._launch(num_steps)
            return self._reports(num_steps)

    def repeat(self, num_steps: int) -> None:
        """See `PlanBackend`: many steps a launch. Raises RuntimeError as `step` does."""
        assert not self.memory.sequences.any(), "the newest step's rows are the host's"
        with self._on_device():
            for start in range(0, num_steps, MAX_STEPS):
                num_now = min(MAX_STEPS, num_steps - start)
                self._launch(num_now)
                self.next_step += num_now
        if self.memory.failed.item():
            self._give_up()

    def arguments(self, num_steps: int) -> dict[str, Any]:
        """The kernel's, by its parameters."""
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
        # The first copy from the GPU, which waits for the kernel.
        words = self.memory.report_words(num_steps).tolist()
        if words[FAILED]:
            self._give_up()
        num_made = words[NUM_MADE]
        self.next_step += num_made
        length = self.memory.reports.shape[1]
        return [words[HEADER + step * length :][:length] for step in range(num_made)]

    def _give_up(self) -> None:
        """Raises what the dump says, with everything as before the first step."""
        from speedstack.runtime.backends.gpu.task_table import explain

        message = explain(self.plan, self.dump.cpu())
        for tensor in (self.dump, self.memory.failed, self.counters):
            tensor.zero_()
        self.next_step = 0
        self._rounds.forget(range(self.num_slots))
        raise RuntimeError(f"the resident kernel timed out:\n{message}")


def compile_options() -> dict[str, Any]:
    """How the kernel is compiled and launched."""
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
