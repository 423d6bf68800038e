"""The drafter in the CPU kernels: one program extends its context after a step, another drafts a block.

Every drafter option is compiled. A Markov head needs the previous token, so the operations after the LM head run one
depth at a time; PyTorch adds draft noise between depths.

Legend: R rows, C features, D hidden, U draft vocabulary, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
from speedstack.runtime.backends.base import DraftRequest
from speedstack.runtime.backends.cpu.builder import Assembler, Buffers
from speedstack.runtime.backends.cpu.packed_layout import FLOAT32, LANES, Panels, panels, unpacked
from speedstack.runtime.backends.cpu.program import LINEAR, Program, Records, Runner, records_of
from speedstack.runtime.backends.drafter_weights import DrafterWeights, read_drafter
from speedstack.runtime.backends.torch_drafter import draft_scores
from speedstack.runtime.model.kv_ring import MAX_ROWS, ring_length
from speedstack.runtime.model.weights import DenseWeights


def why_not_compiled(model: DFlashDraftModel) -> str | None:
    """What the kernels lack for this drafter, in a few words; None if nothing."""
    config = model.config
    for name, size in (("head", config.head_dim), ("intermediate", config.intermediate_size)):
        if size % LANES:
            return f"its kernels need a drafter {name} size that is a multiple of {LANES}, not {size}"
    return None


class BlockRows(NamedTuple):
    """Rows of some blocks, for `Runner.run`; the wanted rows carry proposals."""

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    key_ends: list[int]
    wanted: list[int]


class CompiledDrafter:
    """`context` runs after every target step and reads the taps from `features_RC`."""

    def __init__(
        self,
        model: DFlashDraftModel,
        embedding_VD: torch.Tensor,
        lm_head: Panels,
        features_RC: torch.Tensor,
        num_slots: int,
        max_length: int,
        kv_dtype: torch.dtype,
    ) -> None:
        self.model, config = model, model.config
        self._kv_dtype = kv_dtype
        weights = read_drafter(model)
        self._buffers = Buffers.of(config.hidden_size, list(weights.spec.layers), config.num_draft_tokens)
        self._num_slots, self._max_length = num_slots, max_length
        self._target_ids_U = model.target_ids(torch.arange(config.num_draft_tokens))
        self._first_slot = 0 if config.sample_from_anchor else 1
        self.context, self._block = Program(part="drafter"), Program(part="drafter")
        self._caches: list[torch.Tensor] = []
        self._assemble(weights, embedding_VD, self._draft_head(lm_head), features_RC)
        self._set_markov(weights)
        self._block_records = records_of(self._block)
        self._whole: dict[int, Records] = {}  # by number of drafts
        self._parts: dict[int, list[tuple[Records, range]]] = {}

    def _draft_head(self, lm_head: Panels) -> Panels:
        """The target's LM head in bfloat16, or its rows for a pruned vocabulary; a draft reads it for few rows."""
        self._shared_bytes = 0
        if self.model.d2t is None and lm_head.format != FLOAT32:
            self._shared_bytes = lm_head.nbytes
            return lm_head
        head_UD = self.model.draft_head(unpacked(lm_head, self.model.config.vocab_size))
        return panels(head_UD.to(torch.bfloat16))

    def _assemble(
        self, weights: DrafterWeights, embedding_VD: torch.Tensor, head: Panels, features_RC: torch.Tensor
    ) -> None:
        config, b, eps = self.model.config, self._buffers, weights.spec.rms_norm_eps
        # A draft block is written after the context, up to block_size - 1 positions past the last committed one.
        length = ring_length(None, self._max_length + config.block_size)
        assembler = self._assembler(self.context)
        specs = [layer.attention for layer in weights.spec.layers]
        caches = [assembler.new_cache(spec, length) for spec in specs]
        self._caches = assembler.caches
        D, C = weights.fc_DC.shape
        self.context.add(LINEAR, [C, D, 0], (), [features_RC, panels(weights.fc_DC), b.context])
        for layer, spec, cache in zip(weights.layers, specs, caches, strict=True):
            attention = layer.attention
            assert isinstance(attention.qkv_OD, torch.Tensor), "drafters are stored in bfloat16"
            kv_OD = attention.qkv_OD[spec.num_heads * spec.qk_head_dim :]
            assembler.add_qkv(weights.hidden_norm_D, kv_OD, attention, spec, eps, cache, has_queries=False)

        # A block's keys and values lie after the context; committed rows overwrite them.
        assembler = self._assembler(self._block)
        assembler.add_embedding(embedding_VD, config.mask_token_id, weights.mask_embedding_D)
        for layer, spec, cache in zip(weights.layers, specs, caches, strict=True):
            attention, dense = layer.attention, layer.mlp
            assert isinstance(attention.qkv_OD, torch.Tensor) and isinstance(dense, DenseWeights)
            assembler.add_qkv(attention.norm_D, attention.qkv_OD, attention, spec, eps, cache, has_queries=True)
            assembler.add_attention(attention, spec, cache, spec.ahead)
            assembler.add_dense(dense, eps)
        assembler.add_head(weights.norm_D, head, eps)

    def _set_markov(self, weights: DrafterWeights) -> None:
        self._markov_w1_VR, self._markov_w2 = None, None
        self._draft_ids_U = self._target_ids_U.int() if self.model.d2t is not None else None
        if weights.markov_w1_VR is None or weights.markov_w2_UR is None:
            return
        odd = (0, weights.markov_w1_VR.shape[1] % 2)  # panels in bfloat16 hold pairs of columns
        self._markov_w1_VR = torch.nn.functional.pad(weights.markov_w1_VR, odd)
        self._markov_w2 = panels(torch.nn.functional.pad(weights.markov_w2_UR, odd))

    def _choosing(self, num_drafts: int) -> list[tuple[Program, range]]:
        """The parts that find proposals from the LM head's logits, each with its depths."""
        num_tokens = self.model.config.num_draft_tokens
        parts = []
        if self._markov_w1_VR is None or self._markov_w2 is None:
            program = Program(part="drafter")
            self._assembler(program).add_best(num_tokens, with_probability=True)
            return [(program, range(num_drafts))]
        for depth in range(num_drafts):
            program = Program(part="drafter")
            assembler, ids_U = self._assembler(program), self._draft_ids_U
            assembler.add_markov(self._markov_w1_VR, self._markov_w2, ids_U, depth, num_drafts, self._first_slot)
            assembler.add_best(num_tokens, with_probability=True, first=depth, step=num_drafts)
            parts.append((program, range(depth, depth + 1)))
        return parts

    def _prepare(self, num_drafts: int) -> None:
        """Builds the records of a whole draft, and of its parts after the block."""
        parts = self._choosing(num_drafts)
        self._whole[num_drafts] = records_of(self._block, *(program for program, _ in parts))
        self._parts[num_drafts] = [(records_of(program), depths) for program, depths in parts]

    def _assembler(self, program: Program) -> Assembler:
        return Assembler(program, self._buffers, self._num_slots, self._max_length, kv_dtype=self._kv_dtype)

    def weight_bytes(self) -> int:
        """Bytes of all matrices except the target's."""
        total = sum(sum(program.weight_bytes.values()) for program in (self.context, self._block)) - self._shared_bytes
        if self._markov_w1_VR is not None and self._markov_w2 is not None:
            total += self._markov_w1_VR.nbytes + self._markov_w2.nbytes
        return total

    def cache_bytes(self) -> int:
        """Bytes of all contexts."""
        return sum(cache.nbytes for cache in self._caches)

    def draft(self, runner: Runner, requests: Sequence[DraftRequest], num_drafts: int, num_threads: int) -> list[Draft]:
        """See `Backend.draft`."""
        drafts: list[Draft] = []
        if num_drafts not in self._whole:
            self._prepare(num_drafts)
        at_once = MAX_ROWS // (num_drafts + self._first_slot)
        for start in range(0, len(requests), at_once):
            group = requests[start : start + at_once]
            rows = self._rows(group, num_drafts)
            if any(request.noise is not None for request in group):
                self._sample(runner, rows, group, num_drafts, num_threads)
            else:
                runner.run(self._whole[num_drafts], *rows, num_threads)
            drafts += [self._read(slice(i * num_drafts, (i + 1) * num_drafts)) for i in range(len(group))]
        return drafts

    def _rows(self, requests: Sequence[DraftRequest], num_drafts: int) -> BlockRows:
        rows = BlockRows([], [], [], [], [])
        num_rows = num_drafts + self._first_slot
        for request in requests:
            first = len(rows.tokens) + self._first_slot
            rows.wanted.extend(range(first, first + num_drafts))
            rows.tokens.extend([request.anchor, *[self.model.config.mask_token_id] * (num_rows - 1)])
            rows.slots.extend([request.slot] * num_rows)
            rows.positions.extend(range(request.position, request.position + num_rows))
            rows.key_ends.extend([request.position + num_rows] * num_rows)  # a block is not causal
        return rows

    def _sample(
        self, runner: Runner, rows: BlockRows, requests: Sequence[DraftRequest], num_drafts: int, num_threads: int
    ) -> None:
        """Runs part by part: requests with noise sample each proposal before the next depth is corrected."""
        runner.run(self._block_records, *rows, num_threads)
        for records, depths in self._parts[num_drafts]:
            runner.run(records, *rows, num_threads)
            for depth in depths:
                for i, request in enumerate(requests):
                    if request.noise is not None:
                        self._draw(request, depth, i * num_drafts + depth)

    def _draw(self, request: DraftRequest, depth: int, row: int) -> None:
        b = self._buffers
        if b.best[row] < 0:
            return
        scores_U = draft_scores(b.logits[row, : len(self._target_ids_U)], request, depth, self._target_ids_U)
        best = int(scores_U.argmax())
        b.best[row], b.probability[row] = best, torch.softmax(scores_U, -1)[best]

    def _read(self, rows: slice) -> Draft:
        best = self._buffers.best[rows].tolist()
        # A NaN proposal and everything after it are dropped.
        count = next((i for i, token in enumerate(best) if token < 0), len(best))
        if self.model.d2t is not None:
            best = self._target_ids_U[best[:count]].tolist()
        return Draft(best[:count], self._buffers.probability[rows][:count].tolist())
