"""The drafter in the CPU kernels: one program that extends its context after a step, one that drafts a block.

Compiled are z-lab's architecture, proposals from the anchor's slot and a pruned vocabulary. A drafter with another
option runs as the PyTorch module, beside the compiled target. Draft noise is added to the compiled logits in PyTorch.

Legend: R rows, C features, D hidden, U draft vocabulary, V vocabulary.
"""

from collections.abc import Sequence

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.tree import Draft
from speedstack.runtime.assemble import Assembler, Buffers
from speedstack.runtime.backend import DraftRequest
from speedstack.runtime.module_drafter import draft_scores
from speedstack.runtime.panels import LANES, panels
from speedstack.runtime.program import EMBED, LINEAR, Program, Runner, records_of
from speedstack.runtime.ring import MAX_ROWS, ring_length
from speedstack.runtime.spec import DenseSpec, LayerSpec
from speedstack.runtime.weights import read_drafter

COMPILED_OPTIONS = frozenset({"sample_from_anchor", "draft_vocab_size"})


def why_not_compiled(model: DFlashDraftModel) -> str | None:
    """What the kernels lack of a drafter, in a few words; None where they have all."""
    config = model.config
    missing = [name for name in config.options if name not in COMPILED_OPTIONS]
    if missing:
        return f"its kernels lack {', '.join(missing)}"
    for name, size in (("head", config.head_dim), ("intermediate", config.intermediate_size)):
        if size % LANES:
            return f"its kernels need a drafter {name} size that is a multiple of {LANES}, not {size}"
    return None


class CompiledDrafter:
    """`context` runs after every step of the target, whose taps it finds in `features_RC`."""

    def __init__(
        self,
        model: DFlashDraftModel,
        embedding_VD: torch.Tensor,
        lm_head_VD: torch.Tensor,
        features_RC: torch.Tensor,
        num_slots: int,
        max_length: int,
    ) -> None:
        self.model, config = model, model.config
        weights = read_drafter(model)
        layer = LayerSpec(weights.attention, DenseSpec(config.intermediate_size))
        self._buffers = b = Buffers.of(config.hidden_size, [layer], config.num_draft_tokens)
        self._target_ids_U = model.target_ids(torch.arange(config.num_draft_tokens))
        # A draft block is written behind the context, up to block_size - 1 positions past the last committed one.
        length = ring_length(None, max_length + config.block_size)
        eps, spec = weights.rms_norm_eps, weights.attention

        self.context = Program(part="drafter")
        assembler = Assembler(self.context, b, num_slots, max_length)
        caches = [assembler.new_cache(spec, length) for _ in weights.layers]
        self._caches = assembler.caches
        D, C = weights.fc_DC.shape
        self.context.add(LINEAR, [C, D, 0], (), [features_RC, panels(weights.fc_DC), b.context])
        for (attention, _), cache in zip(weights.layers, caches, strict=True):
            kv_OD = attention.qkv_OD[spec.num_heads * spec.qk_head_dim :]
            assembler.add_qkv(weights.hidden_norm_D, kv_OD, attention, spec, eps, cache, has_queries=False)

        # A block's keys and values lie past the context and are overwritten when rows commit.
        self._block = Program(part="drafter")
        assembler = Assembler(self._block, b, num_slots, max_length)
        self._block.add(EMBED, [D], (), [embedding_VD, b.hidden])
        for (attention, dense), cache in zip(weights.layers, caches, strict=True):
            assembler.add_qkv(attention.norm_D, attention.qkv_OD, attention, spec, eps, cache, has_queries=True)
            assembler.add_attention(attention, spec, cache)
            assembler.add_dense(dense, eps)
        # A draft reads every weight for a few rows, so bytes are its cost: the LM head is a copy in bfloat16.
        head = panels(model.draft_head(lm_head_VD).to(torch.bfloat16))
        assembler.add_head(weights.norm_D, head, config.num_draft_tokens, eps, b.probability)
        self._records = records_of(self._block)

    def weight_bytes(self) -> int:
        """Bytes of the matrices in both programs."""
        return self.context.weight_bytes["drafter"] + self._block.weight_bytes["drafter"]

    def cache_bytes(self) -> int:
        """Bytes of all contexts."""
        return sum(cache.nbytes for cache in self._caches)

    def draft(self, runner: Runner, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        """See `Backend.draft`."""
        config = self.model.config
        first = 0 if config.sample_from_anchor else 1
        block = num_drafts + first
        masks = [config.mask_token_id] * (block - 1)
        drafts: list[Draft] = []
        at_once = MAX_ROWS // block
        for start in range(0, len(requests), at_once):
            tokens: list[int] = []
            slots: list[int] = []
            positions: list[int] = []
            key_ends: list[int] = []
            for request in requests[start : start + at_once]:
                tokens += [request.anchor, *masks]
                slots += [request.slot] * block
                positions += range(request.position, request.position + block)
                key_ends += [request.position + block] * block  # a block is not causal
            wanted = [row for row in range(len(tokens)) if row % block >= first]
            runner.run(self._records, tokens, slots, positions, key_ends, wanted)
            for index, request in enumerate(requests[start : start + at_once]):
                drafts.append(self._read(request, slice(index * num_drafts, (index + 1) * num_drafts)))
        return drafts

    def _read(self, request: DraftRequest, rows: slice) -> Draft:
        best = self._buffers.best[rows].tolist()
        probabilities = self._buffers.probability[rows].tolist()
        # A proposal whose logits are not numbers is none, and neither is what follows it.
        count = next((i for i, token in enumerate(best) if token < 0), len(best))
        if request.noise is not None:
            for depth, logits_U in enumerate(self._buffers.logits[rows][:count]):
                logits_U = logits_U[: len(self._target_ids_U)]
                scores_U = draft_scores(logits_U, request, depth, self._target_ids_U)
                best[depth] = int(scores_U.argmax())
                probabilities[depth] = float(torch.softmax(scores_U, -1)[best[depth]])
        if self.model.d2t is not None:
            best = self._target_ids_U[best[:count]].tolist()
        return Draft.chain(best[:count], probabilities[:count])
