"""The model card: facts in, README out, nothing made up."""

import dataclasses
import json

import pytest

from speedstack.dflash import card
from speedstack.dflash.checkpoint import save_drafter

FACTS = {
    "target": "runs/demo/qad/export",
    "corpus_sha256": "c" * 64,
    "acceptance": {"held-out": 3.8412, "humaneval": 2.5},
    "training": {"loss": "dpace", "learning_rate": 6e-4, "steps": 800},
}


def test_a_card_says_what_it_was_told(draft_config, drafter, tmp_path):
    drafter.config = dataclasses.replace(draft_config, target_sha256="a" * 64)
    save_drafter(drafter, tmp_path / "drafter", card=FACTS)
    text = (tmp_path / "drafter" / "README.md").read_text()
    for line in ("| held-out | 3.841 |", "| humaneval | 2.500 |", "| learning_rate | 0.0006 |", "| steps | 800 |"):
        assert line in text
    assert "a" * 64 in text and "c" * 64 in text
    assert '"num_speculative_tokens": 3' in text and "--speculative-num-draft-tokens 4" in text
    assert 'Engine.from_pretrained("runs/demo/qad/export"' in text
    assert json.loads((tmp_path / "drafter" / "card.json").read_text()) == FACTS | {"target_sha256": "a" * 64}
    assert card.read(tmp_path / "drafter") == FACTS | {"target_sha256": "a" * 64}


def test_a_card_without_facts_claims_none(drafter, tmp_path):
    save_drafter(drafter, tmp_path / "drafter")
    text = (tmp_path / "drafter" / "README.md").read_text()
    assert "Acceptance" not in text and "## Training" not in text and "None" not in text
    assert "## Serving" in text


def test_servers_that_cannot_are_not_advertised(draft_config):
    options = dataclasses.replace(draft_config, markov_rank=4, sample_from_anchor=True)
    ours, theirs = (card.render({}, options, name) for name in ("speedstack", "speculators"))
    assert "they refuse this directory" in ours and "vllm serve" not in ours
    assert "markov_rank 4" in ours and "4 proposals a round" in ours
    assert "vllm serve DRAFTER" in theirs
    anchor = dataclasses.replace(draft_config, sample_from_anchor=True)
    assert "vLLM cannot serve" in card.render({}, anchor, "speculators")
    assert "MuseGlimmerAssistantModel" in card.render({}, draft_config, "transformers")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tau": 3.0}, "no place for 'tau'"),
        ({"acceptance": 3.0}, "acceptance must be a mapping"),
        ({"notes": {"a": 1}}, "notes must be text"),
    ],
)
def test_facts_without_a_place_are_refused(drafter, tmp_path, facts, message):
    with pytest.raises(ValueError, match=message):
        save_drafter(drafter, tmp_path / "drafter", card=facts)
    assert not any(tmp_path.iterdir())


def test_a_broken_card_is_one_line(tmp_path):
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        card.read(tmp_path)
    (tmp_path / "card.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        card.read(tmp_path)
