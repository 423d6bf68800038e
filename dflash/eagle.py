"""An autoregressive draft head like EAGLE-3, the baseline for the block drafter.

One decoder layer reads, per committed position, the target's fused hidden states and the next token's embedding, and
predicts the token after that. Its own output then replaces hidden states not computed yet, one token per pass. Training
unrolls these passes on the true tokens ("training-time test"); a head that never saw its own states drafts badly.

It is trained at the block drafter's anchors, with the same labels, loss and knowledge (features below anchor a and the
token at a). Left out: branching proposals, its own vocabulary, and a decode backend; acceptance is simulated, which is
exact for greedy text.

Source: EAGLE-3 (arXiv 2503.01840), section 3, and its `Model.midlayer`: embedding and state are normed separately and
concatenated before the projections; the residual stream carries the state.

Shape suffixes: B windows, T context positions, A anchors a window, J drafted tokens, C = taps * D features, D hidden, N
query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speedstack.dflash.attention import rotary_tables, rotate
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashMLP, RMSNorm


class EagleHead(nn.Module):
    """One layer, run once per drafted token. Geometry from a `DFlashConfig`, except its number of layers."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.fc = nn.Linear(config.num_taps * hidden, hidden, bias=False)
        self.input_layernorm, self.hidden_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.q_proj = nn.Linear(2 * hidden, width, bias=False)
        self.k_proj = nn.Linear(2 * hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.post_attention_layernorm, self.norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.mlp = DFlashMLP(config)

    def init_weights(self, seed: int) -> None:
        """Random weights from `seed` alone: norms one, matrices N(0, 1 / (4 fan_in))."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * 0.5 * parameter.shape[1] ** -0.5)

    def forward(
        self, features_BTC: Tensor, embeds_BTD: Tensor, chain_BAJD: Tensor, anchors_BA: Tensor, visible_BAT: Tensor
    ) -> Tensor:
        """Final-normed hidden states [B, A, J, D] for the J tokens after each anchor.

        Args:
            features_BTC: the target's tapped hidden states.
            embeds_BTD: embeddings of the tokens at positions 1 .. T.
            chain_BAJD: embeddings of the tokens at a .. a + J - 1, drafted or (in training) true.
            anchors_BA: the anchors a, at least 1.
            visible_BAT: bool, context positions below a that the anchor reads, a - 1 among them.
        """
        positions_T = torch.arange(features_BTC.shape[1], device=features_BTC.device)
        state_BTD = self.fc(features_BTC)
        key_BTNH, value_BTNH = self._keys_values(self._inputs(embeds_BTD, state_BTD), positions_T.expand(1, -1))
        state_BAD = state_BTD.gather(1, (anchors_BA - 1)[..., None].expand(-1, -1, state_BTD.shape[-1]))
        chain: list[tuple[Tensor, Tensor]] = []
        outputs = []
        for step in range(chain_BAJD.shape[2]):
            position_BA = anchors_BA - 1 + step
            inputs = self._inputs(chain_BAJD[:, :, step], state_BAD)
            if step:  # the first pass uses a context position
                chain.append(self._keys_values(inputs, position_BA))
            query_BANH = rotate(
                self.q_proj(inputs).unflatten(-1, (-1, self.config.head_dim)), self._rotary(position_BA)
            )
            attended = _attend(query_BANH, key_BTNH, value_BTNH, visible_BAT, chain)
            state_BAD = state_BAD + self.o_proj(attended.flatten(2))
            state_BAD = state_BAD + self.mlp(self.post_attention_layernorm(state_BAD))
            outputs.append(self.norm(state_BAD))
        return torch.stack(outputs, dim=2)

    def _inputs(self, embeds: Tensor, state: Tensor) -> Tensor:
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(state)], dim=-1)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta, self.fc.weight.dtype)

    def _keys_values(self, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, ..., N, H], one copy per query head."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        key = rotate(self.k_proj(inputs).unflatten(-1, (-1, self.config.head_dim)), self._rotary(positions))
        value = self.v_proj(inputs).unflatten(-1, (-1, self.config.head_dim))
        return key.repeat_interleave(groups, -2), value.repeat_interleave(groups, -2)


def _attend(
    query_BANH: Tensor,
    key_BTNH: Tensor,
    value_BTNH: Tensor,
    visible_BAT: Tensor,
    chain: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Softmax attention [B, A, N, H] over the visible context and the anchor's drafted positions [B, A, N, H]."""
    query_BANH = query_BANH * query_BANH.shape[-1] ** -0.5
    scores = torch.einsum("banh,btnh->bant", query_BANH, key_BTNH).masked_fill(~visible_BAT[:, :, None], -torch.inf)
    own = [(query_BANH * key).sum(-1, keepdim=True) for key, _ in chain]
    weights = torch.cat([scores, *own], dim=-1).float().softmax(-1).to(value_BTNH.dtype)
    length = key_BTNH.shape[1]
    out_BANH = torch.einsum("bant,btnh->banh", weights[..., :length], value_BTNH)
    for i, (_, value) in enumerate(chain):
        out_BANH = out_BANH + weights[..., length + i : length + i + 1] * value
    return out_BANH
