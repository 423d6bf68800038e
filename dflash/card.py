"""A drafter's model card: training data, results, how to serve it.

Facts that only the trainer knows are kept in card.json beside the README.md rendered from them and the config, so that
a converted drafter keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speedstack.dflash.config import DFlashConfig

FACTS_NAME = "card.json"
# A card's facts and their introductions. `acceptance`: tokens per round, bonus token included, by data set; `training`:
# settings by name; the others are text.
FACTS = {
    "target": "Target",
    "target_sha256": "SHA-256 of the target's weights",
    "corpus_sha256": "SHA-256 of the training corpus",
    "data": "Training data",
    "measured": "How acceptance was measured",
    "notes": "Notes",
    "acceptance": "Acceptance length",
    "training": "Training",
}
_TABLES = ("acceptance", "training")


def complete(facts: Mapping[str, Any], config: DFlashConfig, target: str | None) -> dict[str, Any]:
    """`facts`, checked, plus those from config and target. Raises ValueError naming an unknown fact."""
    for name, value in facts.items():
        if name not in FACTS:
            raise ValueError(f"a model card has no place for {name!r}; it has {', '.join(FACTS)}")
        if (name in _TABLES) != isinstance(value, Mapping):
            raise ValueError(f"model card: {name} must be {'a mapping' if name in _TABLES else 'text'}, got {value!r}")
    known: dict[str, Any] = {"target": target, "target_sha256": config.target_sha256} | dict(facts)
    return {name: known[name] for name in FACTS if known.get(name) is not None}


def read(path: str | Path) -> dict[str, Any]:
    """The facts of the drafter at `path`, empty without a card. Raises ValueError for invalid JSON."""
    file = Path(path) / FACTS_NAME
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is not a JSON object")
    return facts


def render(facts: Mapping[str, Any], config: DFlashConfig, format_name: str) -> str:
    """README.md in Markdown with the front matter of model hubs."""
    target = facts.get("target", "TARGET")
    lines = ["---", "library_name: speedstack", "tags: [speculative-decoding, dflash]"]
    if "target" in facts:
        lines.append(f"base_model: {json.dumps(target)}")
    lines += ["---", "", f"# DFlash drafter for {target}", "", _shape(config), ""]
    for name in ("target_sha256", "corpus_sha256", "data", "notes"):
        if name in facts:
            lines += [f"{FACTS[name]}: {facts[name]}", ""]
    if facts.get("acceptance"):
        lines += ["## Acceptance", "", "Tokens a round, the target's own included.", ""]
        if "measured" in facts:
            lines[-2] += f" {facts['measured']}"
        lines += _table("data set", "acceptance length", facts["acceptance"])
    if facts.get("training"):
        lines += ["## Training", "", *_table("setting", "value", facts["training"])]
    return "\n".join([*lines, "## Serving", "", *_serving(config, format_name, target)]).rstrip() + "\n"


def _shape(config: DFlashConfig) -> str:
    text = (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, reads the outputs of target layers "
        f"{', '.join(map(str, config.target_layer_ids))}, blocks of {config.block_size}, "
        f"{config.num_proposals} proposals a round."
    )
    options = ", ".join(f"{name} {value}" for name, value in config.options.items())
    return text + (f" Beyond plain DFlash: {options}." if options else "")


def _table(first: str, second: str, rows: Mapping[str, Any]) -> list[str]:
    def cell(value: Any) -> str:
        text = f"{value:.3f}" if isinstance(value, float) and abs(value) >= 0.1 else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return [f"| {first} | {second} |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items()), ""]


def _serving(config: DFlashConfig, format_name: str, target: str) -> list[str]:
    """How to start each server that supports this directory; others are named as unsupported."""
    lines = [
        "speedstack, with text that is bit for bit the text without the drafter:",
        "",
        "```python",
        "from speedstack.runtime import Engine",
        "",
        f'engine = Engine.from_pretrained("{target}", drafter="DRAFTER")',
        'print(engine.generate("def main():", max_new_tokens=64).text)',
        "```",
        "",
    ]
    vllm = json.dumps({"method": "dflash", "model": "DRAFTER", "num_speculative_tokens": config.num_proposals})
    if format_name == "transformers":
        return [*lines, "transformers 5.15 or newer:", "", "```python", *_TRANSFORMERS, "```", ""]
    if format_name == "speculators":
        if config.sample_from_anchor and not config.markov_rank:
            return [*lines, "vLLM cannot serve a DFlash drafter that proposes from the anchor's slot.", ""]
        return [*lines, "vLLM, which reads the rest from the drafter:", "", "```", "vllm serve DRAFTER", "```", ""]
    beyond = [name for name in ("sample_from_anchor", "markov_rank", "draft_vocab_size") if name in config.options]
    if beyond:
        lines.append(f"vLLM's and SGLang's DFlash loaders have no {', '.join(beyond)}; they refuse this directory.")
        return [*lines, ""]
    return [
        *lines,
        "vLLM:",
        "",
        "```",
        f"vllm serve {target} --speculative-config '{vllm}' --attention-backend flash_attn",
        "```",
        "",
        "SGLang:",
        "",
        "```",
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DFLASH \\",
        f"  --speculative-draft-model-path DRAFTER --speculative-num-draft-tokens {config.block_size}",
        "```",
        "",
    ]


_TRANSFORMERS = (
    "from transformers import MuseGlimmerAssistantModel",
    "",
    'drafter = MuseGlimmerAssistantModel.from_pretrained("DRAFTER")',
    'target.generate(ids, assistant_model=drafter, speculation_type="dflash", do_sample=False)',
)
