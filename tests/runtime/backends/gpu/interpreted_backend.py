"""A backend that executes plans with their semantics in PyTorch, under seeded schedules: engines without Triton.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
from speedstack.runtime.backends.base import DraftRequest, Rounds, Rows
from speedstack.runtime.backends.drafter_weights import read_drafter
from speedstack.runtime.backends.gpu.buffers import step_inbox
from speedstack.runtime.backends.gpu.multi_step import ResidentRounds
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.drafter_spec import DrafterSpec
from speedstack.runtime.model.weight_formats import WeightFormats
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.record_layout import FIRST_ROW, NUM_ROWS, OUTCOME
from speedstack.runtime.plan.step import build_plan
from speedstack.runtime.plan.verify.proof import prove
from speedstack.runtime.rounds.draft_length import IN_PYTORCH
from tests.runtime.plan.interpret import interpret


class InterpretedBackend:
    """`seed` is that of the first launch; later ones count on. num_slots: None is as many as rows."""

    name = "interpreted"
    prepare_seconds = 0.0
    has_measured_cost = False
    round_cost = IN_PYTORCH
    drafter: ModuleDrafter | None = None
    num_host_drafts = 0
    rows_a_step: int | None
    rounds: Rounds | None

    def __init__(
        self,
        weights: ModelWeights,
        max_length: int,
        num_rows: int = 8,
        num_programs: int = 3,
        seed: int = 0,
        num_slots: int | None = None,
        drafter: DFlashDraftModel | None = None,
    ) -> None:
        self.weights, self.max_length, self.num_rows, self.num_programs = weights, max_length, num_rows, num_programs
        self.seed, self.num_launches, self.rows_a_step = seed, 0, num_rows
        self.num_steps, self.num_slots = 0, num_slots  # steps that were made
        self.has_prompt_lookup, self.model = False, drafter
        self._rounds = ResidentRounds(self, num_rows)  # type: ignore[arg-type]
        self.rounds = self._rounds
        self.make_plan()

    def make_plan(self) -> None:
        self._planned = read_drafter(self.model, torch.float32, torch.float32) if self.model is not None else None
        self.plan = build_plan(
            self.weights.spec, WeightFormats(), self.num_programs, self.num_rows, self.max_length, 16,
            has_prompt_lookup=self.has_prompt_lookup, drafter=self.planned_drafter,
        )  # fmt: skip
        assert prove(self.plan).is_safe
        self.use(self.plan)

    def use(self, plan: Plan) -> None:
        """Executes this plan from now on, safe or not, with nothing in its buffers."""
        self.plan, self.state = plan, StepSemantics(plan, self.weights, self.num_slots, self._planned)
        self.drafter = None
        if self.model is not None:
            caches = self.state.caches[self.weights.spec.num_layers :]
            keys, values = (torch.stack(list(part)) for part in zip(*caches, strict=True))
            contexts = list(zip(keys.unbind(1), values.unbind(1), strict=True))
            self.state.caches[self.weights.spec.num_layers :] = zip(keys.unbind(0), values.unbind(0), strict=True)
            w = self.weights
            self.drafter = ModuleDrafter(
                self.model, w.embedding_VD, w.lm_head_VD, len(contexts), self.max_length, contexts
            )
        buffers = {"history": self.state.history_RL} if self.has_prompt_lookup else {}
        self.memory = SimpleNamespace(inbox=SimpleNamespace(copy_=self.state.set_inbox), buffers=buffers)
        self.counters, self.next_step = np.zeros(plan.num_counters, np.int64), 0

    def set_prompt_lookup(self, is_wanted: bool) -> None:
        if is_wanted != self.has_prompt_lookup:
            self.has_prompt_lookup = is_wanted
            self.make_plan()

    @property
    def planned_drafter(self) -> DrafterSpec | None:
        return None if self._planned is None else self._planned.spec

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        assert self.drafter is not None
        self.num_host_drafts += 1
        return self.drafter.draft(requests, num_drafts)

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        self.model = drafter
        self.make_plan()

    def launch(self, num_steps: int) -> list[list[int]]:
        state, semantics, R = self.state, self.state.semantics(), self.plan.rows
        reports = [[-1] * ((1 + OUTCOME) * R) for _ in range(num_steps)]
        accept, ends = semantics["accept"], set[int]()

        def reporting(phase: Any, index: tuple[int, ...], step: int) -> Any:
            report, (sequence,) = reports[step - self.next_step], index
            first, num_rows = state.rows_RF[sequence, [FIRST_ROW, NUM_ROWS]].tolist()
            rows = slice(first, first + num_rows)
            report[rows] = state.chosen_R[rows].tolist()
            yield from accept(phase, index, step) or ()
            report[R + OUTCOME * sequence : R + OUTCOME * (sequence + 1)] = state.outcome_RO[sequence].tolist()

        def is_over(step: int) -> bool:
            if state.is_over():
                ends.add(step)
            return state.is_over()

        semantics["accept"] = reporting
        interpret(self.plan, semantics, num_steps, self.seed, self.next_step, self.counters, is_over=is_over)
        assert len(ends) <= 1, "programs leave at one step"
        num_made = min(ends, default=self.next_step + num_steps) - self.next_step
        self.next_step += num_made
        self.num_steps += num_made
        self.num_launches += 1
        self.seed += 1
        return reports[:num_made]

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        self._rounds.forget(rows.slots)
        R, logits, best = self.plan.rows, list[torch.Tensor](), list[int]()
        for start in range(0, len(rows.tokens), R):
            cut = slice(start, start + R)
            draws = None if rows.draws is None else rows.draws[cut]
            part = Rows(rows.tokens[cut], rows.slots[cut], rows.positions[cut], draws=draws)
            self.state.set_inbox(step_inbox(part, R))
            self.launch(1)
            here = [row - start for row in logit_rows if start <= row < start + R]
            logits += [self.state.logits_RV[row].clone() for row in here]
            best += self.state.chosen_R[here].tolist()
        return torch.stack(logits) if logits else torch.empty(0, self.weights.spec.vocab_size), best
