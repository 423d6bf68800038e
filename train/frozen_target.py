"""The target as a drafter's training sees it: embedding, features of the tapped layers, LM head; all of it frozen.

A window comes back every epoch, and its features do not change. They are computed in every step (online), or once and
kept, in memory or on disk (`features.py`): otherwise the target's forward is half of a training step. Kept ones are
computed before the first step and not when they are first needed: on a CPU the bits of a product depend on what else is
in the batch, and a resumed run must have the same ones.

Shape suffixes: B windows, T positions, D hidden, V vocabulary, C = taps * hidden.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speedstack.quant.checkpoint import load_model
from speedstack.train.attention import enable_blockwise_attention
from speedstack.train.features import window_keys

_WINDOWS_AT_ONCE = 8


class Features(NamedTuple):
    """`taps_BTC`: outputs of the tapped layers. `final_BTD`: the final, normed hidden states; None if not asked for."""

    taps_BTC: Tensor
    final_BTD: Tensor | None


class FrozenTarget:
    """A target that is only asked for features. Raises ValueError as `load_model` does.

    Args:
        path: model directory.
        device: where its products run; features kept in memory lie there too.
        dtype: of the features' products.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        # Loaded in `dtype`, not cast to it: routers keep in float32 what their model says they must.
        model: Any = load_model(path, dtype=dtype)
        enable_blockwise_attention(model, device)
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder().to(device).requires_grad_(False).eval()
        self.embedding_VD: Tensor = model.get_input_embeddings().weight.detach().to(device, torch.float32)
        self._heads_VD = {torch.float32: model.get_output_embeddings().weight.detach().to(device, torch.float32)}
        self._taps: dict[int, Tensor] = {}
        self._kept: Mapping[bytes, Tensor] = {}
        self.with_final = False

    def tap(self, layer_ids: Sequence[int], with_final: bool = False) -> None:
        """Make `features` the outputs of these layers; without the final states, drop the layers after the last."""
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
        """Values kept of a position."""
        return (len(self.layer_ids) + self.with_final) * self.config.hidden_size

    def precompute(self, ids_BT: Tensor, max_bytes: int) -> None:
        """Compute the features of these windows now, into memory; warns where only some fit into `max_bytes`."""
        bytes_a_window = ids_BT.shape[1] * self.num_columns * torch.float32.itemsize
        num_windows = min(len(ids_BT), max_bytes // bytes_a_window)
        if num_windows < len(ids_BT):
            warnings.warn(
                f"{num_windows} of {len(ids_BT)} windows have room for their features, of {bytes_a_window} bytes each; "
                "those of the others are computed in every epoch",
                stacklevel=2,
            )
        self._kept = dict(
            zip(window_keys(ids_BT[:num_windows]), self.compute(ids_BT[:num_windows]), strict=True)
            if num_windows
            else {}
        )

    def compute(self, ids_BT: Tensor) -> Tensor:
        """Features and, if asked for, final states of these windows side by side, float32 [B, T, num_columns]."""
        parts = [self._forward(part_BT.to(self.embedding_VD.device)) for part_BT in ids_BT.split(_WINDOWS_AT_ONCE)]
        return torch.cat(parts)

    def keep(self, features: Mapping[bytes, Tensor]) -> None:
        """Take the features of the windows in `features` from there from now on."""
        self._kept = features

    def features(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Features:
        """Float32 features of these windows, taps concatenated in the order of `tap`.

        `documents_BT`: number of each position's document, ascending. The target reads each document alone, as it will
        when it serves; None: a window is one document. Windows whose features are kept are one.
        """
        keys = window_keys(ids_BT) if self._kept else [b""] * len(ids_BT)
        missing = [place for place, key in enumerate(keys) if key not in self._kept]
        if len(missing) == len(keys):
            columns = self._forward_documents(ids_BT, documents_BT)
        else:
            documents = documents_BT[missing] if documents_BT is not None else None
            computed = [*self._forward_documents(ids_BT[missing], documents)] if missing else []
            found = dict(zip(missing, computed, strict=True))
            rows = [found[place] if place in found else self._kept[key] for place, key in enumerate(keys)]
            columns = torch.stack([row.to(ids_BT.device, torch.float32) for row in rows])
        if not self.with_final:
            return Features(columns, None)
        width = len(self.layer_ids) * self.config.hidden_size
        return Features(columns[..., :width], columns[..., width:])

    def _forward_documents(self, ids_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        """`_forward` of every document alone, those of one length together; float32 [B, T, num_columns]."""
        if documents_BT is None or bool((documents_BT[:, :1] == documents_BT).all()):
            return self._forward(ids_BT)
        columns = torch.empty(*ids_BT.shape, self.num_columns, device=ids_BT.device)
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for window, documents_T in enumerate(documents_BT):
            start = 0
            for length in documents_T.unique_consecutive(return_counts=True)[1].tolist():
                places[length].append((window, start))
                start += length
        for length, pieces in places.items():
            found = self._forward(torch.stack([ids_BT[window, start : start + length] for window, start in pieces]))
            for (window, start), columns_TC in zip(pieces, found, strict=True):
                columns[window, start : start + length] = columns_TC
        return columns

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
