"""The target as a drafter's training sees it: embedding, features of the tapped layers, LM head; all of it frozen.

Features are a function of a window alone, and a window comes back every epoch. Where memory allows they are kept: the
target's forward is otherwise half of a training step. A kept window passes through the target by itself, because on a
CPU the bits of a product depend on what else is in the batch, and a resumed run fills its cache in other company.

Left out: features on disk, thousands of times the size of the tokens.

Shape suffixes: B windows, T positions, D hidden, V vocabulary, C = taps * hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedstack.quant.checkpoint import load_model
from speedstack.train.attention import enable_blockwise_attention


class FrozenTarget:
    """Raises ValueError as `load_model`.

    Args:
        path: model directory.
        device: where its products run; kept features lie there too.
        dtype: of the features' products.
        cache_bytes: memory for features of windows seen before; 0 computes every batch anew.
    """

    def __init__(
        self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32, cache_bytes: int = 0
    ) -> None:
        # Loaded in `dtype`, not cast to it: routers keep in float32 what their model says they must.
        model: Any = load_model(path, dtype=dtype)
        enable_blockwise_attention(model, device)
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder().to(device).requires_grad_(False).eval()
        self.embedding_VD: Tensor = model.get_input_embeddings().weight.detach().to(device, torch.float32)
        self._heads_VD = {torch.float32: model.get_output_embeddings().weight.detach().to(device, torch.float32)}
        self._taps: dict[int, Tensor] = {}
        self._is_caching, self._free_cache_bytes = cache_bytes > 0, cache_bytes
        self._cached: dict[bytes, Tensor] = {}

    def tap(self, layer_ids: Sequence[int]) -> None:
        """Keep the outputs of these layers in every forward, and drop the layers after the last of them."""
        self.layer_ids = tuple(layer_ids)
        self.decoder.layers = self.decoder.layers[: max(layer_ids) + 1]
        for i in layer_ids:
            self.decoder.layers[i].register_forward_hook(self._keep(i))

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._taps[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def features(self, ids_BT: Tensor) -> Tensor:
        """Outputs of the tapped layers, float32 [B, T, C], concatenated in the order of `tap`."""
        if not self._is_caching:
            return self._forward(ids_BT)
        return torch.cat([self._cached_features(ids_1T) for ids_1T in ids_BT.split(1)])

    def _cached_features(self, ids_1T: Tensor) -> Tensor:
        key = ids_1T.cpu().numpy().tobytes()
        features_1TC = self._cached.get(key)
        if features_1TC is None:
            features_1TC = self._forward(ids_1T)
            if features_1TC.nbytes <= self._free_cache_bytes:
                self._free_cache_bytes -= features_1TC.nbytes
                self._cached[key] = features_1TC
        return features_1TC

    def _forward(self, ids_BT: Tensor) -> Tensor:
        with torch.autocast(ids_BT.device.type, enabled=False):
            self.decoder(input_ids=ids_BT, use_cache=False)
        features_BTC = torch.cat([self._taps[i].float() for i in self.layer_ids], dim=-1)
        self._taps.clear()
        return features_BTC

    def head_VD(self, dtype: torch.dtype) -> Tensor:
        """The LM head in `dtype`, cast once."""
        if dtype not in self._heads_VD:
            self._heads_VD[dtype] = self._heads_VD[torch.float32].to(dtype)
        return self._heads_VD[dtype]
