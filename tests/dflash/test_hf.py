"""transformers' own DFlash drafter as the oracle: same proposals, same text."""

import dataclasses
from typing import Any

import pytest
import torch

from speedstack.dflash.checkpoint import save_drafter
from speedstack.dflash.hf import to_transformers
from speedstack.dflash.model import DFlashDraftModel, DraftContext

PROMPT = [5, 77, 31, 9, 9, 100]


def run_target(target: Any, ids: list[int], layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the named layers' outputs by forward hooks: independent of any library's hidden-state indexing."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, args, output: outputs.__setitem__(layer, output)

    handles = [target.model.layers[i].register_forward_hook(keep(i)) for i in layers]
    logits = target(torch.tensor([ids])).logits[0]
    logits[:, target.config.eos_token_id] = float("-inf")  # what min_new_tokens does
    for handle in handles:
        handle.remove()
    return logits, torch.cat([outputs[i][0] for i in layers], dim=-1)


def our_rounds(
    drafter: DFlashDraftModel, target: Any, prompt: list[int], num_new_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Draft and verify by hand; the target sees all of the text in each round. Returns (proposals a round, text)."""
    config = drafter.config
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    context = DraftContext(drafter, 512)
    logits, features = run_target(target, prompt, config.target_layer_ids)
    tokens = [*prompt, int(logits[-1].argmax())]
    rounds = []
    while len(tokens) < len(prompt) + num_new_tokens:
        anchor = len(tokens) - 1
        context.write(drafter, features[:anchor], start=0)
        block = torch.tensor([tokens[-1]] + [config.mask_token_id] * config.num_proposals)
        hidden = context.draft_hidden(drafter, drafter.embed_block(block, embedding), anchor)
        drafts = drafter.logits(hidden, None, head).argmax(-1).tolist()
        rounds.append(drafts)
        logits, features = run_target(target, tokens + drafts, config.target_layer_ids)
        sampled = logits[anchor:].argmax(-1).tolist()
        wrong = [i for i, draft in enumerate(drafts) if draft != sampled[i]]
        tokens += sampled[: min(wrong, default=len(drafts)) + 1]
    return rounds, tokens[: len(prompt) + num_new_tokens]


@pytest.mark.parametrize(
    ("options", "num_new_tokens", "num_rounds"),
    [
        ({}, 235, 200),
        ({"target_layer_ids": (0, 1)}, 40, 20),
        ({"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 9}, 60, 40),
        ({"layer_types": ("sliding_attention",) * 2, "sliding_window": 3}, 40, 20),
    ],
    ids=["last layer tapped", "inner layers", "windows", "windows narrower than a block"],
)
def test_proposals_and_text_are_transformers(
    target, draft_config, monkeypatch, tmp_path, options, num_new_tokens, num_rounds
):
    from transformers import MuseGlimmerAssistantModel
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    config = dataclasses.replace(draft_config, rope_theta=1e4, sliding_is_causal=False, **options)
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
    generation = {"max_new_tokens": num_new_tokens, "min_new_tokens": num_new_tokens, "do_sample": False}
    prompt = torch.tensor([PROMPT])
    peer = to_transformers(drafter, target)
    with torch.no_grad():
        plain = target.generate(prompt, **generation)[0].tolist()
        assisted = target.generate(prompt, assistant_model=peer, speculation_type="dflash", **generation)[0].tolist()
        rounds, text = our_rounds(drafter, target, PROMPT, num_new_tokens)
    assert assisted == plain
    assert text == plain
    assert len({token for drafts in rounds for token in drafts}) > 10, "proposals too uniform to compare anything"
    shared = min(len(rounds), len(peer_rounds))
    assert shared >= num_rounds
    assert rounds[:shared] == peer_rounds[:shared]
    # What is written to disk is the same model to transformers itself.
    save_drafter(drafter, tmp_path / "drafter", to="transformers")
    loaded: Any = MuseGlimmerAssistantModel.from_pretrained(tmp_path / "drafter")
    assert loaded.config.layer_types == peer.config.layer_types
    assert loaded.config.sliding_window == peer.config.sliding_window
    assert loaded.state_dict().keys() == peer.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in peer.state_dict().items())


def test_a_drafter_of_another_shape_is_refused(target, draft_config):
    drafter = DFlashDraftModel(dataclasses.replace(draft_config, hidden_size=32))
    with pytest.raises(ValueError, match="another target"):
        to_transformers(drafter, target)


def test_options_that_transformers_lacks_are_refused(target, draft_config):
    drafter = DFlashDraftModel(dataclasses.replace(draft_config, attention_sinks=True))
    with pytest.raises(ValueError, match="transformers' drafter class cannot express attention_sinks"):
        to_transformers(drafter, target)
