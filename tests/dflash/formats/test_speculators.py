"""The same weights propose the same tokens in vLLM's `speculators` library, whose code we did not write.

The exported directory is loaded by that library. Its forward runs anchored blocks over a sequence, as training does;
here it is given every anchor, and compared with the serving side of ours, one anchor at a time.
"""

import dataclasses
from typing import Any

import pytest
import torch

from speedstack.dflash.checkpoint import load_drafter, save_drafter
from speedstack.dflash.formats.format import Target
from speedstack.dflash.model import DFlashDraftModel, DraftContext

speculators = pytest.importorskip("speculators", reason="pip install --no-deps -r requirements-peers.txt")

LENGTH = 206
# Sums of a few hundred float32 terms of order one, in another order.
TOLERANCE = 1e-4


def peer_logits(
    path: Any, drafter: DFlashDraftModel, data: dict[str, torch.Tensor], anchors: torch.Tensor
) -> torch.Tensor:
    """Logits [anchors, K, U] of speculators' own forward."""
    from speculators.models.dflash import core

    config: Any = speculators.SpeculatorModelConfig.from_pretrained(str(path))
    config.transformer_layer_config._attn_implementation = "eager"  # its default compiles flex_attention
    model: Any = speculators.SpeculatorModel.from_pretrained(str(path), config=config)
    model.eval()
    assert type(model).__name__ == ("DSparkDraftModel" if drafter.config.markov_rank else "DFlashDraftModel")
    model.embed_tokens.weight.data.copy_(data["embedding"])
    if drafter.config.draft_vocab_size is None:
        model.lm_head.weight.data.copy_(data["head"])
    everything = torch.ones(len(anchors), dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "select_anchors", lambda *args: (anchors, everything))
        with torch.no_grad():
            _, logits, *_ = model._backbone_forward(
                data["features"][None],
                data["ids"][None],
                torch.ones(1, LENGTH, dtype=torch.long),
                torch.zeros(1, LENGTH, drafter.config.hidden_size),
                torch.zeros(1, LENGTH, dtype=torch.long),
                max_anchors=len(anchors),
            )
            logits = logits.view(len(anchors), drafter.config.block_size, -1)
            if drafter.config.markov_rank:
                previous = data["previous"][: len(anchors)]
                logits = logits + model.markov_head.block_bias(prev_token_ids=previous, hidden_states=logits)
    return logits


@pytest.mark.filterwarnings("ignore:this drafter reads the output of the target's last layer")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": LENGTH + 8},
        {"layer_types": ("sliding_attention",) * 2, "sliding_window": LENGTH + 8, "sliding_is_causal": False},
        {"draft_vocab_size": 50},
        {"sample_from_anchor": True, "markov_rank": 4},
        {"sample_from_anchor": True, "markov_rank": 4, "draft_vocab_size": 50},
    ],
    ids=["plain", "causal windows", "windows", "pruned", "dspark", "dspark, pruned"],
)
def test_speculators_proposes_the_same(make_drafter, tmp_path, options):
    generator = torch.Generator().manual_seed(0)
    drafter = make_drafter(**options)
    config = drafter.config
    data = {
        "ids": torch.randint(3, config.vocab_size, (LENGTH,), generator=generator),
        "features": torch.randn(LENGTH, config.num_taps * config.hidden_size, generator=generator),
        "embedding": torch.randn(config.vocab_size, config.hidden_size, generator=generator),
        "head": torch.randn(config.vocab_size, config.hidden_size, generator=generator),
        "previous": torch.randint(0, config.vocab_size, (LENGTH, config.block_size), generator=generator),
    }
    save_drafter(drafter, tmp_path / "drafter", to="speculators", target=Target(head_VD=data["head"]))
    anchors = torch.arange(1, LENGTH - config.block_size)
    theirs = peer_logits(tmp_path / "drafter", drafter, data, anchors)
    ours_model = load_drafter(tmp_path / "drafter")
    assert ours_model.config == dataclasses.replace(config)
    context = DraftContext(ours_model, LENGTH)
    context.write(ours_model, data["features"], start=0)
    masks = torch.full((config.block_size - 1,), config.mask_token_id)
    proposals = []
    for row, anchor in enumerate(anchors.tolist()):
        block = torch.cat((data["ids"][anchor : anchor + 1], masks))
        with torch.no_grad():
            hidden = context.draft_hidden(ours_model, ours_model.embed_block(block, data["embedding"]), anchor)
            logits = ours_model.logits(hidden, data["previous"][row, ours_model.hidden_slots], data["head"])
        expected = theirs[row, ours_model.hidden_slots]
        torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        proposals += ours_model.target_ids(logits.argmax(-1)).tolist()
    assert len(anchors) > 200 and len(set(proposals)) > 10, "too few, or too uniform, to compare anything"
