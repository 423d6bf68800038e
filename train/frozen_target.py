"""The target as a drafter's training sees it: embedding, features of the tapped layers, LM head; all of it frozen.

A window comes back every epoch, and its features do not change. Where memory allows they are computed once: otherwise
the target's forward is half of a training step. That is done before the first step and not when they are first needed:
on a CPU the bits of a product depend on what else is in the batch, and a resumed run must have the same ones.

Left out: features on disk, thousands of times the size of the tokens.

Shape suffixes: B windows, T positions, D hidden, V vocabulary, C = taps * hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedstack.quant.checkpoint import load_model
from speedstack.train.attention import enable_blockwise_attention

_WINDOWS_AT_ONCE = 8


class FrozenTarget:
    """A target that is only asked for features. Raises ValueError as `load_model` does.

    Args:
        path: model directory.
        device: where its products run; kept features lie there too.
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
        self._computed: dict[bytes, Tensor] = {}

    def tap(self, layer_ids: Sequence[int]) -> None:
        """Make `features` the outputs of these layers, and drop the layers after the last of them."""
        self.layer_ids = tuple(layer_ids)
        self.decoder.layers = self.decoder.layers[: max(layer_ids) + 1]
        for i in layer_ids:
            self.decoder.layers[i].register_forward_hook(self._catch(i))

    def _catch(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._taps[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def precompute(self, ids_BT: Tensor, max_bytes: int) -> None:
        """Compute the features of these windows now; warns where only some fit into `max_bytes`."""
        bytes_a_window = ids_BT.shape[1] * len(self.layer_ids) * self.config.hidden_size * torch.float32.itemsize
        num_windows = min(len(ids_BT), max_bytes // bytes_a_window)
        if num_windows < len(ids_BT):
            warnings.warn(
                f"{num_windows} of {len(ids_BT)} windows have room for their features, of {bytes_a_window} bytes each; "
                "those of the others are computed in every epoch",
                stacklevel=2,
            )
        for start in range(0, num_windows, _WINDOWS_AT_ONCE):
            part_BT = ids_BT[start : min(start + _WINDOWS_AT_ONCE, num_windows)]
            features_BTC = self._forward(part_BT.to(self.embedding_VD.device))
            self._computed |= zip(_keys(part_BT), features_BTC, strict=True)

    def features(self, ids_BT: Tensor) -> Tensor:
        """Outputs of the tapped layers, float32 [B, T, C], concatenated in the order of `tap`."""
        keys = _keys(ids_BT) if self._computed else [b""] * len(ids_BT)
        missing = [place for place, key in enumerate(keys) if key not in self._computed]
        if len(missing) == len(keys):
            return self._forward(ids_BT)
        found = dict(zip(missing, self._forward(ids_BT[missing]), strict=True)) if missing else {}
        return torch.stack([found[place] if place in found else self._computed[key] for place, key in enumerate(keys)])

    @torch.no_grad()
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


def _keys(ids_BT: Tensor) -> list[bytes]:
    assert ids_BT.dtype == torch.int64, "equal windows have equal bytes in one dtype only"
    return [ids_T.tobytes() for ids_T in ids_BT.cpu().numpy()]
