"""The target as a drafter's training sees it: embedding, features of the tapped layers, LM head; all of it frozen.

Features are computed in every step (online), which is half of a step, or once and kept, in memory or on disk
(`features.py`). Kept ones are computed before the first step: on a CPU a product's bits depend on the rest of the
batch, and a resumed run must have the same bits.

The target reads each conversation of a window as a sequence of its own, from position 0, beside others of about its
length. That needs no family's mask and is what serving computes.

Shape suffixes: B windows, T positions, D hidden, V vocabulary, C = taps * hidden, A blocks, J proposals.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speedstack.quant.checkpoint import load_model
from speedstack.train.core.attention import enable_blockwise_attention
from speedstack.train.drafter.features import is_one_document, window_keys

_WINDOWS_AT_ONCE = 8


class Features(NamedTuple):
    """`taps_BTC`: outputs of the tapped layers. `final_BTD`: final, normed hidden states, or None."""

    taps_BTC: Tensor
    final_BTD: Tensor | None


def gather_final(final_BTD: Tensor | None, before_BAJ: Tensor) -> Tensor | None:
    """Final states [A, J, D] at the positions before the labels, over the blocks of all windows."""
    if final_BTD is None:
        return None
    window_B11 = torch.arange(len(final_BTD), device=final_BTD.device)[:, None, None]
    return final_BTD[window_B11, before_BAJ].flatten(0, 1)


class FrozenTarget:
    """The target of the model directory `path`, for features alone; `dtype` is of its products on `device`.

    Kept features stay on `device`. Raises ValueError as `load_model`.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        # Loaded in `dtype`, not cast to it: models that require float32 routers keep them.
        model: Any = load_model(path, dtype=dtype)
        enable_blockwise_attention(model, device)
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder().to(device).requires_grad_(False).eval()
        self.embedding_VD: Tensor = model.get_input_embeddings().weight.detach().to(device, torch.float32)
        self._heads_VD = {torch.float32: model.get_output_embeddings().weight.detach().to(device, torch.float32)}
        self._taps: dict[int, Tensor] = {}
        self._kept: Mapping[bytes, Tensor] = {}
        self.with_final = False

    def sharing(self) -> FrozenTarget:
        """Another target with the same weights and no taps. This one must have no taps yet."""
        assert not hasattr(self, "layer_ids"), "hooks of taps would be copied too"
        weights = [*self.decoder.parameters(), *self.decoder.buffers(), self.embedding_VD, *self._heads_VD.values()]
        return copy.deepcopy(self, {id(weight): weight for weight in weights})

    def tap(self, layer_ids: Sequence[int], with_final: bool = False) -> None:
        """Make `features` return these layers' outputs; without final states, drop the layers after the last."""
        self.layer_ids = tuple(layer_ids)
        self.with_final = with_final
        if not with_final:
            self.decoder.layers = self.decoder.layers[: max(layer_ids) + 1]
        for i in layer_ids:
            self.decoder.layers[i].register_forward_hook(self._catch(i))

    def _catch(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._taps[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @property
    def num_columns(self) -> int:
        """Values kept per position."""
        return (len(self.layer_ids) + self.with_final) * self.config.hidden_size

    def precompute(self, ids_BT: Tensor, max_bytes: int, documents_BT: Tensor | None = None) -> None:
        """Compute and keep these windows' features in memory; warns if only some fit into `max_bytes`."""
        bytes_a_window = ids_BT.shape[1] * self.num_columns * torch.float32.itemsize
        num_windows = min(len(ids_BT), max_bytes // bytes_a_window)
        if num_windows < len(ids_BT):
            warnings.warn(
                f"{num_windows} of {len(ids_BT)} windows have room for their features, of {bytes_a_window} bytes each; "
                "those of the others are computed in every epoch",
                stacklevel=2,
            )
        if not num_windows:
            self._kept = {}
            return
        ids_BT, documents_BT = ids_BT[:num_windows], None if documents_BT is None else documents_BT[:num_windows]
        self._kept = dict(zip(window_keys(ids_BT, documents_BT), self.compute(ids_BT, documents_BT), strict=True))

    def compute(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Features and, if asked for, final states side by side, float32 [B, T, num_columns]; see `features`."""
        parts = []
        for rows in torch.arange(len(ids_BT)).split(_WINDOWS_AT_ONCE):
            part_BT = ids_BT[rows].to(self.embedding_VD.device)
            parts.append(self._columns(part_BT, None if documents_BT is None else documents_BT[rows]))
        return torch.cat(parts)

    def keep(self, features: Mapping[bytes, Tensor]) -> None:
        """Use these features for their windows from now on."""
        self._kept = features

    def features(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Features:
        """Float32 features of these windows, taps concatenated in the order of `tap`.

        With int64 `documents_BT` a position sees its own document alone; padding is negative and gets zeros.
        """
        keys = window_keys(ids_BT, documents_BT) if self._kept else [b""] * len(ids_BT)
        missing = [place for place, key in enumerate(keys) if key not in self._kept]
        if len(missing) == len(keys):
            columns = self._columns(ids_BT, documents_BT)
        else:
            others = None if documents_BT is None else documents_BT[missing]
            found = dict(zip(missing, self._columns(ids_BT[missing], others), strict=True)) if missing else {}
            rows = [found[place] if place in found else self._kept[key] for place, key in enumerate(keys)]
            columns = torch.stack([row.to(ids_BT.device, torch.float32) for row in rows])
        if not self.with_final:
            return Features(columns, None)
        width = len(self.layer_ids) * self.config.hidden_size
        return Features(columns[..., :width], columns[..., width:])

    def _columns(self, ids_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        """`_forward` of each document alone, batched by similar length; float32 [B, T, num_columns]."""
        if documents_BT is None or bool(is_one_document(documents_BT).all()):
            return self._forward(ids_BT)
        spans = _document_spans(documents_BT)
        columns_BTC = torch.zeros(*ids_BT.shape, self.num_columns, device=ids_BT.device)
        for group in _of_similar_length(spans, ids_BT.numel()):
            length = max(end - start for _, start, end in group)
            rows = torch.zeros(len(group), length, dtype=torch.int64, device=ids_BT.device)
            for place, (row, start, end) in enumerate(group):
                rows[place, : end - start] = ids_BT[row, start:end]
            # Padding follows the document, where a causal model's earlier positions do not see it.
            for (row, start, end), columns in zip(group, self._forward(rows), strict=True):
                columns_BTC[row, start:end] = columns[: end - start]
        return columns_BTC

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor) -> Tensor:
        with torch.autocast(ids_BT.device.type, enabled=False):
            output = self.decoder(input_ids=ids_BT, use_cache=False)
        columns = [self._taps[i].float() for i in self.layer_ids]
        if self.with_final:
            columns.append(output.last_hidden_state.float())
        self._taps.clear()
        return torch.cat(columns, dim=-1)

    def head_VD(self, dtype: torch.dtype) -> Tensor:
        """The LM head in `dtype`, cast once."""
        if dtype not in self._heads_VD:
            self._heads_VD[dtype] = self._heads_VD[torch.float32].to(dtype)
        return self._heads_VD[dtype]


LoadTarget = Callable[[Path, torch.device, torch.dtype], FrozenTarget]


class SharedTarget:
    """A `LoadTarget` that reads a model once per dtype and device."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Path, torch.device, torch.dtype], FrozenTarget] = {}

    def __call__(self, path: Path, device: torch.device, dtype: torch.dtype) -> FrozenTarget:
        """See `FrozenTarget`."""
        key = path, device, dtype
        if key not in self._loaded:
            self._loaded[key] = FrozenTarget(path, device, dtype)
        return self._loaded[key].sharing()


def _document_spans(documents_BT: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of each document, without padding."""
    spans = []
    for row, documents in enumerate(documents_BT.tolist()):
        start = 0
        for end in range(1, len(documents) + 1):
            if end == len(documents) or documents[end] != documents[start]:
                if documents[start] >= 0:
                    spans.append((row, start, end))
                start = end
    return spans


def _of_similar_length(spans: list[tuple[int, int, int]], max_tokens: int) -> list[list[tuple[int, int, int]]]:
    """Groups of spans whose padded size is at most twice their tokens and at most `max_tokens`."""
    groups: list[list[tuple[int, int, int]]] = []
    longest = 0
    for span in sorted(spans, key=lambda span: span[1] - span[2]):
        length = span[2] - span[1]
        if not groups or 2 * length < longest or (len(groups[-1]) + 1) * longest > max_tokens:
            groups.append([])
            longest = length
        groups[-1].append(span)
    return groups
