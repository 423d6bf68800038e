"""The autoregressive head against itself without shortcuts: one token a pass, over the whole sequence."""

import pytest
import torch

from speedstack.dflash.attention import rotary_tables, rotate
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.eagle import EagleHead

# The same float32 sums in another order.
TOLERANCE = 1e-5


@pytest.fixture
def head(draft_config: DFlashConfig) -> EagleHead:
    model = EagleHead(draft_config)
    model.init_weights(0)
    return model.eval()


def plain_states(head: EagleHead, embeds_TD: torch.Tensor, state_TD: torch.Tensor) -> torch.Tensor:
    """The layer over a whole sequence with causal attention, a query and a head at a time."""
    config, length = head.config, len(embeds_TD)
    inputs = torch.cat([head.input_layernorm(embeds_TD), head.hidden_norm(state_TD)], dim=-1)
    tables = rotary_tables(torch.arange(length), config.head_dim, config.rope_theta, torch.float32)
    q = rotate(head.q_proj(inputs).view(length, -1, config.head_dim), tables)
    k = rotate(head.k_proj(inputs).view(length, -1, config.head_dim), tables)
    v = head.v_proj(inputs).view(length, -1, config.head_dim)
    groups = config.num_attention_heads // config.num_key_value_heads
    rows = []
    for t in range(length):
        heads = []
        for n in range(config.num_attention_heads):
            scores = k[: t + 1, n // groups] @ q[t, n] * config.head_dim**-0.5
            heads.append(scores.softmax(-1) @ v[: t + 1, n // groups])
        rows.append(torch.cat(heads))
    state_TD = state_TD + head.o_proj(torch.stack(rows))
    return state_TD + head.mlp(head.post_attention_layernorm(state_TD))


@torch.no_grad()
def test_the_chain_is_one_token_a_pass_over_the_whole_sequence(head):
    config = head.config
    generator = torch.Generator().manual_seed(0)
    length, num_drafted = 12, 3
    features = torch.randn(1, length, config.num_taps * config.hidden_size, generator=generator)
    tokens = torch.randn(length + 1, config.hidden_size, generator=generator)  # embeddings of positions 0 .. T
    anchors = torch.tensor([[1, 5, 8]])
    chain = torch.stack([tokens[a : a + num_drafted] for a in anchors[0].tolist()])[None]
    visible = (torch.arange(length) < anchors[..., None]).expand(1, -1, -1)
    found = head(features, tokens[None, 1:], chain, anchors, visible)
    fused = head.fc(features[0])
    for place, anchor in enumerate(anchors[0].tolist()):
        states = fused[:anchor]
        for step in range(num_drafted):
            # Context positions see the token after each; states of drafted positions are the head's own.
            after = tokens[1 : anchor + 1 + step]
            states_now = plain_states(head, after, states)
            expected = head.norm(states_now[-1])
            torch.testing.assert_close(found[0, place, step], expected, rtol=TOLERANCE, atol=TOLERANCE)
            states = torch.cat([states, states_now[-1:]])


def test_every_weight_is_trained_and_later_features_are_not_read(head):
    config = head.config
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 9, config.num_taps * config.hidden_size, generator=generator, requires_grad=True)
    embeds = torch.randn(1, 9, config.hidden_size, generator=generator)
    anchors = torch.tensor([[4]])
    visible = (torch.arange(9) < 4)[None, None]
    head(
        features, embeds, torch.randn(1, 1, 3, config.hidden_size, generator=generator), anchors, visible
    ).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    assert features.grad is not None
    assert (features.grad[0, :4].abs().sum(-1) > 0).all() and not features.grad[0, 4:].any()
