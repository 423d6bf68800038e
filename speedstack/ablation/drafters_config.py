"""Config of an ablation of drafters: rows of named options over one drafter config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from speedstack.support.config import Section, read_config, replaced
from speedstack.train.config.recipes import DrafterConfig

NGRAM: Literal["ngram"] = "ngram"
_PLAIN_RUN = {"run.wandb_mode": "disabled", "drafter.num_served_prompts": 0, "loop.eval_every": 0}


class AblationConfig(Section):
    """What is compared, on what, for how long."""

    out: Path = Field(Path("runs/drafter-ablation"), description="Directory of the ablation.")
    base: Path = Field(Path("configs/drafter/tiny.yaml"), description="Drafter config that every row starts from.")
    common: dict[str, Any] = Field({}, description="Fields changed in every row, by dotted name.")
    rows: dict[str, dict[str, Any]] = Field(
        {}, description="Rows: the fields that each changes, by dotted name; none for the row `ngram`."
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds of weights, order and anchors.")
    budget_seconds: float = Field(90.0, gt=0, description="Training time of every run.")
    num_timed_steps: int = Field(6, ge=2, description="Steps timed of every row; the first is left out.")
    num_prompts: int = Field(16, ge=1, description="Held-out prompts that are decoded.")
    num_new_tokens: int = Field(128, ge=2, description="Tokens decoded after each prompt.")
    code_prompts: Path | None = Field(None, description="A .jsonl with a field `prompt`: code prompts to decode too.")
    num_code_prompts: int = Field(16, ge=1, description="Code prompts, the first ones that fit into a window.")
    ngram_size: int = Field(4, ge=1, description="Longest run of tokens that prompt lookup looks for.")

    def row_config(self, row: str, seed: int, num_steps: int = 1) -> DrafterConfig:
        """The drafter config of a run. Raises ValueError for a field that does not exist or fit."""
        base = read_config(DrafterConfig, self.base)
        shared = {
            "run.out": self.out / "runs",
            "run.name": f"{row}-seed-{seed}",
            "run.seed": seed,
            "loop.num_steps": num_steps,
            "loop.save_every": max(1, num_steps // 2),
            "drafter.text": self.out / "text",
            "drafter.text_seed": base.run.seed,
            "drafter.features": "disk",
            "drafter.features_path": self.out / "features",
        }
        try:
            config = replaced(base, {**_PLAIN_RUN, **shared, **self.common, **self.rows[row]})
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
        if config.drafter.prompts.source is not None:
            raise ValueError(f"row {row}: an ablation has pieces of the corpus as prompts: leave drafter.prompts out")
        return config
