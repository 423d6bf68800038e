"""The CPU backend: the step as a program of fused C++ operations, run by one call a step.

The program is data, an array of operation records with pointers, built once from the model spec; the kernels walk it
with one thread team (see kernels/decode_cpu.cpp, which also says why a row's bits depend on nothing but the row). The
reference backend is its oracle. PyTorch calls cost microseconds each, hundreds of them a step: for a model whose
weights a CPU reads in a tenth of a millisecond that would be most of the time.

Left out: dtypes other than float32 (experts stay MXFP4), and sizes that are not multiples of 16 (32 for packed
experts' contraction axes); such models are refused by name.
"""

import ctypes
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backend import MAX_ROWS, POSITIONS_PER_BLOCK, Draft, Rows, ring_length
from speedstack.runtime.kernels.build import load_kernels
from speedstack.runtime.panels import LANES, MXFP4, Panels, panels
from speedstack.runtime.program import (
    ARGMAX,
    ATTENTION,
    EMBED,
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    GATE_UP,
    LINEAR,
    LM_HEAD,
    QKV,
    ROUTER,
    Op,
    Program,
    RowArrays,
)
from speedstack.runtime.reference import rotary_tables
from speedstack.runtime.spec import AttentionSpec, DenseSpec, LayerSpec, MoeSpec
from speedstack.runtime.weights import (
    AttentionWeights,
    DenseWeights,
    DrafterWeights,
    LayerWeights,
    ModelWeights,
    MoeWeights,
    read_drafter,
)


def check_supported(weights: ModelWeights, drafter: DFlashDraftModel | None) -> None:
    """Raises ValueError, naming the size, when the kernels cannot take the model."""
    spec = weights.spec
    for layer in spec.layers:
        absent = {
            "biases": layer.attention.has_bias or (isinstance(layer.mlp, MoeSpec) and layer.mlp.has_bias),
            "YaRN": layer.attention.yarn is not None,
            "clamped SwiGLU": isinstance(layer.mlp, MoeSpec) and layer.mlp.swiglu_limit is not None,
        }
        if any(absent.values()):
            named = ", ".join(name for name, is_asked in absent.items() if is_asked)
            raise ValueError(f"backend 'cpu' has no {named} (model type {spec.model_type}); use backend='reference'")
    multiples = [("hidden_size", spec.hidden_size, 32)]
    for layer in spec.layers:
        a = layer.attention
        multiples += [("query/key head size", a.qk_head_dim, LANES), ("value head size", a.v_head_dim, LANES)]
        size = 32 if isinstance(layer.mlp, MoeSpec) else LANES
        multiples.append(("intermediate size", layer.mlp.intermediate_size, size))
    if drafter is not None:
        multiples.append(("drafter head size", drafter.config.head_dim, LANES))
        multiples.append(("drafter intermediate size", drafter.config.intermediate_size, LANES))
    for name, value, multiple in multiples:
        if value % multiple:
            raise ValueError(f"backend 'cpu' needs a {name} that is a multiple of {multiple}, not {value}")
    if weights.embedding_VD.dtype != torch.float32 or weights.embedding_VD.device.type != "cpu":
        raise ValueError("backend 'cpu' computes in float32 on the CPU; use backend='reference' for other dtypes")


class _Buffers:
    """Activations of up to MAX_ROWS rows, shared by the target and the drafter."""

    def __init__(self, weights: ModelWeights, drafter: DFlashDraftModel | None) -> None:
        spec = weights.spec
        attentions = [layer.attention for layer in spec.layers]
        moes = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
        dense = [layer.mlp.intermediate_size for layer in spec.layers if isinstance(layer.mlp, DenseSpec)]
        num_q = [a.num_heads * a.qk_head_dim for a in attentions]
        num_o = [a.num_heads * a.v_head_dim for a in attentions]
        num_features = 0
        if drafter is not None:
            c = drafter.config
            num_q.append(c.num_attention_heads * c.head_dim)
            num_o.append(c.num_attention_heads * c.head_dim)
            dense.append(c.intermediate_size)
            num_features = c.num_taps * c.hidden_size

        def rows(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(MAX_ROWS, width, dtype=dtype)

        choices = max((m.top_k for m in moes), default=0)
        self.hidden, self.normed = rows(spec.hidden_size), rows(spec.hidden_size)
        self.query, self.attended = rows(max(num_q)), rows(max(num_o))
        self.dense = rows(max(dense, default=0))
        self.expert = rows(max((m.top_k * m.intermediate_size for m in moes), default=0))
        self.choice, self.choice_weight = rows(choices, torch.int32), rows(choices)
        self.features, self.context = rows(num_features), rows(spec.hidden_size)
        self.logits = rows(-(-spec.vocab_size // LANES) * LANES)
        self.best, self.probability = torch.zeros(MAX_ROWS, dtype=torch.int32), torch.zeros(MAX_ROWS)


class CpuBackend:
    """The compiled program for one model and drafter; see the module."""

    name = "cpu"

    def __init__(
        self, weights: ModelWeights, drafter: DFlashDraftModel | None, num_slots: int, max_length: int
    ) -> None:
        check_supported(weights, drafter)
        started = time.perf_counter()
        self._kernels = load_kernels()
        layout = ctypes.sizeof(Op) * 1000 + ctypes.sizeof(RowArrays)
        assert self._kernels.speedstack_layout() == layout, "kernels and records disagree about the layout of a program"
        self.spec, self.drafter = weights.spec, drafter
        self.num_slots, self.max_length = num_slots, max_length
        self._buffers = _Buffers(weights, drafter)
        self._caches: list[torch.Tensor] = []
        self._embedding = weights.embedding_VD.contiguous()
        self._target = self._target_program(weights)
        self._drafting: Program | None = None
        if drafter is not None:
            draft_weights = read_drafter(drafter)
            # A draft block is written behind the context, up to block_size - 1 positions past the last committed one.
            length = ring_length(None, max_length + drafter.config.block_size)
            self._draft_caches = [self._new_cache(draft_weights.attention, length) for _ in draft_weights.layers]
            self._add_draft_context(self._target, draft_weights)
            self._drafting = self._draft_program(draft_weights, weights.lm_head_VD)
        self._arrays = {
            name: np.zeros(MAX_ROWS, np.int32) for name in ("token", "slot", "position", "key_end", "logit_row")
        }
        self._rows = RowArrays(**{name: array.ctypes.data for name, array in self._arrays.items()})
        self.prepare_seconds = time.perf_counter() - started

    def weight_bytes(self) -> dict[str, int]:
        parts = dict(self._target.weight_bytes)
        parts["embedding and LM head"] += self._embedding.nbytes
        if self._drafting is not None:
            parts["drafter"] += self._drafting.weight_bytes["drafter"]
        return parts

    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        num_rows = len(rows.tokens)
        assert all(a < b for a, b in pairwise(logit_rows)), "logit rows have to ascend"
        if num_rows <= MAX_ROWS:
            return self._step_chunk(rows, logit_rows)
        parts = []
        for start in range(0, num_rows, MAX_ROWS):
            cut = slice(start, start + MAX_ROWS)
            chunk = Rows(rows.tokens[cut], rows.slots[cut], rows.positions[cut])
            here = [row - start for row in logit_rows if start <= row < start + MAX_ROWS]
            logits_WV, best = self._step_chunk(chunk, here)
            parts.append((logits_WV.clone(), best))
        return torch.cat([logits for logits, _ in parts]), [token for _, best in parts for token in best]

    def _step_chunk(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        num_logits = len(logit_rows)
        key_ends = [position + 1 for position in rows.positions]
        self._run(self._target, rows.tokens, rows.slots, rows.positions, key_ends, logit_rows)
        return self._buffers.logits[:num_logits, : self.spec.vocab_size], self._buffers.best[:num_logits].tolist()

    def draft(
        self, anchors: Sequence[int], slots: Sequence[int], positions: Sequence[int], num_drafts: int
    ) -> list[Draft]:
        assert self.drafter is not None
        assert self._drafting is not None
        block, masks = num_drafts + 1, [self.drafter.config.mask_token_id] * num_drafts
        drafts: list[Draft] = []
        at_once = MAX_ROWS // block
        for start in range(0, len(anchors), at_once):
            stop = min(start + at_once, len(anchors))
            tokens: list[int] = []
            slot_rows: list[int] = []
            position_rows: list[int] = []
            key_ends: list[int] = []
            for anchor, slot, position in zip(
                anchors[start:stop], slots[start:stop], positions[start:stop], strict=True
            ):
                tokens += [anchor, *masks]
                slot_rows += [slot] * block
                position_rows += range(position, position + block)
                key_ends += [position + block] * block  # a block is not causal
            wanted = [row for row in range(len(tokens)) if row % block]
            self._run(self._drafting, tokens, slot_rows, position_rows, key_ends, wanted)
            best = self._buffers.best[: len(wanted)].tolist()
            probabilities = self._buffers.probability[: len(wanted)].tolist()
            for at in range(0, len(wanted), num_drafts):
                # A proposal whose logits are not numbers is none, and neither is what follows it.
                count = next((i for i in range(num_drafts) if best[at + i] < 0), num_drafts)
                drafts.append(Draft(best[at : at + count], probabilities[at : at + count]))
        return drafts

    def _run(
        self,
        program: Program,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        key_ends: Sequence[int],
        logit_rows: Sequence[int],
    ) -> None:
        arrays, num_rows, num_logits = self._arrays, len(tokens), len(logit_rows)
        arrays["token"][:num_rows] = tokens
        arrays["slot"][:num_rows] = slots
        arrays["position"][:num_rows] = positions
        arrays["key_end"][:num_rows] = key_ends
        arrays["logit_row"][:num_logits] = logit_rows
        self._rows.num_rows, self._rows.num_logit_rows = num_rows, num_logits
        records = program.records
        status = self._kernels.speedstack_run(records, len(records), ctypes.byref(self._rows), torch.get_num_threads())
        assert status == 0, f"operation {status - 1} of the program has an unknown kind"

    def _target_program(self, weights: ModelWeights) -> Program:
        program, b, spec = Program(), self._buffers, weights.spec
        program.add(EMBED, [spec.hidden_size], (), [self._embedding, b.hidden])
        taps = self.drafter.config.target_layer_ids if self.drafter is not None else ()
        for index, (layer, layer_spec) in enumerate(zip(weights.layers, spec.layers, strict=True)):
            tap = None
            if index in taps:
                D = spec.hidden_size
                tap = b.features[:, taps.index(index) * D : (taps.index(index) + 1) * D]
            self._add_attention(program, layer.attention, layer_spec.attention, spec.rms_norm_eps)
            self._add_mlp(program, layer, layer_spec, spec.rms_norm_eps, tap)
        program.part = "embedding and LM head"
        self._add_head(program, weights.norm_D, weights.lm_head_VD, spec.rms_norm_eps)
        return program

    def _new_cache(self, spec: AttentionSpec, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        blocks = length // POSITIONS_PER_BLOCK
        keys = torch.zeros(self.num_slots, spec.num_kv_heads, blocks, spec.qk_head_dim, LANES)
        values = torch.zeros(self.num_slots, spec.num_kv_heads, length, spec.v_head_dim)
        self._caches += [keys, values]
        return keys, values, blocks

    def _add_attention(self, program: Program, weights: AttentionWeights, spec: AttentionSpec, eps: float) -> None:
        program.part = "attention"
        cache = self._new_cache(spec, ring_length(spec.window, self.max_length))
        self._add_qkv(program, weights.norm_D, weights.qkv_OD, weights, spec, eps, cache, has_queries=True)
        self._add_attend(program, weights, spec, cache)

    def _add_qkv(
        self,
        program: Program,
        norm_D: torch.Tensor,
        projection_OD: torch.Tensor,
        weights: AttentionWeights,
        spec: AttentionSpec,
        eps: float,
        cache: tuple[torch.Tensor, torch.Tensor, int],
        has_queries: bool,
    ) -> None:
        b, (keys, values, blocks) = self._buffers, cache
        cos, sin = rotary_tables(
            spec, blocks * POSITIONS_PER_BLOCK if spec.window is None else self.max_length, keys.device
        )
        heads = spec.num_heads if has_queries else 0
        program.add(
            QKV,
            [norm_D.shape[0], heads, spec.num_kv_heads, spec.qk_head_dim, spec.v_head_dim, 2 * cos.shape[-1], blocks],
            [eps, spec.value_scale],
            [
                b.hidden if has_queries else b.context,
                norm_D,
                panels(projection_OD),
                b.query,
                keys,
                values,
                weights.q_norm_H,
                weights.k_norm_H,
                cos.contiguous(),
                sin.contiguous(),
            ],
        )

    def _add_attend(
        self,
        program: Program,
        weights: AttentionWeights,
        spec: AttentionSpec,
        cache: tuple[torch.Tensor, torch.Tensor, int],
    ) -> None:
        b, (keys, values, blocks) = self._buffers, cache
        program.add(
            ATTENTION,
            [spec.num_heads, spec.num_kv_heads, spec.qk_head_dim, spec.v_head_dim, blocks, spec.window or 0],
            [spec.softmax_scale],
            [b.query, keys, values, weights.sinks_N, b.attended],
        )
        D, width = weights.output_DO.shape
        program.add(LINEAR, [width, D, 1, 0], (), [b.attended, panels(weights.output_DO), b.hidden])

    def _add_mlp(
        self, program: Program, layer: LayerWeights, spec: LayerSpec, eps: float, tap: torch.Tensor | None
    ) -> None:
        if isinstance(layer.mlp, DenseWeights):
            program.part = "dense MLP"
            self._add_dense(program, layer.mlp, eps, tap)
        else:
            assert isinstance(spec.mlp, MoeSpec)
            self._add_moe(program, layer.mlp, spec.mlp, eps, tap)

    def _add_dense(self, program: Program, mlp: DenseWeights, eps: float, tap: torch.Tensor | None) -> None:
        b, (D, F) = self._buffers, mlp.down_DF.shape
        gate_up = panels(mlp.gate_up_FD, is_gate_up=True)
        program.add(GATE_UP, [D, F], [eps], [b.hidden, mlp.norm_D, gate_up, b.dense])
        stride = tap.stride(0) if tap is not None else 0
        program.add(LINEAR, [F, D, 1, stride], (), [b.dense, panels(mlp.down_DF), b.hidden, tap])

    def _add_moe(self, program: Program, mlp: MoeWeights, spec: MoeSpec, eps: float, tap: torch.Tensor | None) -> None:
        b, D, E, K = self._buffers, mlp.norm_D.shape[0], spec.num_experts, spec.top_k
        size = spec.intermediate_size
        program.part = "norms and router"
        program.add(
            ROUTER,
            [D, E, K, int(spec.scoring == "softmax"), int(spec.renormalize)],
            [eps, spec.routed_scale],
            [
                b.hidden,
                mlp.norm_D,
                panels(mlp.router_ED),
                mlp.correction_bias_E,
                b.normed,
                b.choice,
                b.choice_weight,
            ],
        )
        gate_up, down = panels(mlp.gate_up_EID, is_gate_up=True), panels(mlp.down_EDI)
        program.part = "experts (MXFP4)" if gate_up.format == MXFP4 else "experts"
        program.add(EXPERT_GATE_UP, [D, size, E, K], (), [b.normed, b.expert, gate_up, b.choice])
        stride = tap.stride(0) if tap is not None else 0
        tensors: list[torch.Tensor | Panels | None] = [b.expert, b.hidden, down, b.choice, b.choice_weight, tap]
        program.add(EXPERT_DOWN, [size, D, E, K, stride], (), tensors)

    def _add_head(
        self,
        program: Program,
        norm_D: torch.Tensor,
        lm_head_VD: torch.Tensor,
        eps: float,
        probability: torch.Tensor | None = None,
    ) -> None:
        b, padded = self._buffers, self._buffers.logits.shape[1]
        program.add(LM_HEAD, [norm_D.shape[0], padded], [eps], [b.hidden, norm_D, panels(lm_head_VD), b.logits])
        program.add(ARGMAX, [self.spec.vocab_size, padded], (), [b.logits, b.best, probability])

    def _add_draft_context(self, program: Program, drafter: DrafterWeights) -> None:
        """Fuses the tapped features of every row and appends each drafter layer's keys and values."""
        b, spec, (D, C) = self._buffers, drafter.attention, drafter.fc_DC.shape
        program.part = "drafter"
        program.add(LINEAR, [C, D, 0, 0], (), [b.features, panels(drafter.fc_DC), b.context])
        for (attention, _), cache in zip(drafter.layers, self._draft_caches, strict=True):
            kv_OD = attention.qkv_OD[spec.num_heads * spec.qk_head_dim :]
            arguments = (drafter.hidden_norm_D, kv_OD, attention, spec, drafter.rms_norm_eps, cache)
            self._add_qkv(program, *arguments, has_queries=False)

    def _draft_program(self, drafter: DrafterWeights, lm_head_VD: torch.Tensor) -> Program:
        """One forward of a block. Its keys and values lie past the context and are overwritten when rows commit.

        A draft reads every weight for a few rows, so bytes are its cost: the LM head is a second copy in bfloat16.
        """
        program, b, spec, eps = Program(part="drafter"), self._buffers, drafter.attention, drafter.rms_norm_eps
        program.add(EMBED, [self.spec.hidden_size], (), [self._embedding, b.hidden])
        for (attention, dense), cache in zip(drafter.layers, self._draft_caches, strict=True):
            arguments = (attention.norm_D, attention.qkv_OD, attention, spec, eps, cache)
            self._add_qkv(program, *arguments, has_queries=True)
            self._add_attend(program, attention, spec, cache)
            self._add_dense(program, dense, eps, tap=None)
        self._add_head(program, drafter.norm_D, lm_head_VD.to(torch.bfloat16), eps, b.probability)
        return program
