"""transformers' own DFlash drafter as the oracle: same proposals, same text."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from speedstack.dflash.accept import accept
from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.hf import to_transformers
from speedstack.dflash.model import DFlashDraftModel, DraftContext
from speedstack.dflash.tree import Draft

PROMPT = [5, 77, 31, 9, 9, 100]
NUM_NEW_TOKENS = 40


def tapped_features(target: Any, ids: list[int], layers: tuple[int, ...]) -> torch.Tensor:
    """The named layers' outputs by forward hooks: independent of any library's hidden-state indexing."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, args, output: outputs.__setitem__(layer, output)

    handles = [target.model.layers[i].register_forward_hook(keep(i)) for i in layers]
    target(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.cat([outputs[i][0] for i in layers], dim=-1)


def our_rounds(
    drafter: DFlashDraftModel, target: Any, prompt: list[int], num_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Draft and verify by hand, recomputing the target from scratch each round. Returns (proposals a round, text)."""
    config = drafter.config
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    context = DraftContext(drafter, 256)
    tokens = [*prompt, int(target(torch.tensor([prompt])).logits[0, -1].argmax())]
    rounds = []
    while len(tokens) < len(prompt) + num_new_tokens:
        anchor = len(tokens) - 1
        context.write(drafter, tapped_features(target, tokens[:anchor], config.target_layer_ids), start=0)
        block = torch.tensor([tokens[-1]] + [config.mask_token_id] * config.num_proposals)
        hidden = context.draft_hidden(drafter, F.embedding(block, embedding), anchor)
        drafts = (hidden @ head.T).argmax(-1).tolist()
        rounds.append(drafts)
        logits = target(torch.tensor([tokens + drafts])).logits[0, anchor:]
        sampled = logits.argmax(-1).tolist()
        tokens += accept(Draft.chain(drafts), lambda node, sampled=sampled: sampled[node + 1])[1]  # type: ignore[misc]
    return rounds, tokens[: len(prompt) + num_new_tokens]


@pytest.mark.parametrize("layers", [(0, 2), (0, 1)], ids=["last layer tapped", "inner layers"])
def test_proposals_and_text_are_transformers(target, monkeypatch, layers):
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    config = DFlashConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        mask_token_id=2,
        target_layer_ids=layers,
        num_target_layers=3,
        block_size=4,
        rope_theta=1e4,
    )
    drafter = DFlashDraftModel(config).eval()
    drafter.init_weights(seed=1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)  # for proposals that differ from round to round
    peer_rounds: list[list[int]] = []
    propose = DFlashTokenCandidateGenerator.get_candidates

    def recorded(self, input_ids, *args, **kwargs):
        candidates, logits = propose(self, input_ids, *args, **kwargs)
        if logits is not None:
            peer_rounds.append(candidates[0, input_ids.shape[1] :].tolist())
        return candidates, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recorded)
    options = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = target.generate(prompt, **options)[0].tolist()
        assisted = target.generate(
            prompt, assistant_model=to_transformers(drafter, target), speculation_type="dflash", **options
        )[0].tolist()
        rounds, text = our_rounds(drafter, target, PROMPT, NUM_NEW_TOKENS)
    assert assisted == plain
    assert text == plain
    assert len({token for drafts in rounds for token in drafts}) > 10, "proposals too uniform to compare anything"
    shared = min(len(rounds), len(peer_rounds))
    assert shared >= NUM_NEW_TOKENS // 4
    assert rounds[:shared] == peer_rounds[:shared]


def test_a_drafter_of_another_shape_is_refused(target, draft_config):
    import dataclasses

    drafter = DFlashDraftModel(dataclasses.replace(draft_config, hidden_size=32))
    with pytest.raises(ValueError, match="another target"):
        to_transformers(drafter, target)
