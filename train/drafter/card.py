"""What the model card of a trained drafter says about its training."""

from typing import Any

from speedstack.train.config.recipes import DrafterConfig, config_hash
from speedstack.train.data.packing import WrittenText
from speedstack.train.drafter.features import windows_sha256


def training_card(
    config: DrafterConfig,
    data_card: str,
    written: WrittenText | None,
    num_heldout: int,
    acceptance_length: float | None,
    by_document: bool,
) -> dict[str, Any]:
    """Facts for `dflash.checkpoint.save_drafter`.

    `data_card` is from `describe_text`; `written` is the target's text, or None if all is corpus. `acceptance_length`
    was simulated on `num_heldout` prompts, None without any. `by_document`: answers may end early.
    """
    section, optim, loop = config.drafter, config.optim, config.loop
    num_new = config.data.sequence_length - section.prompt_length
    text_sha256 = {"text SHA-256": windows_sha256(written.ids_NT, written.documents_NT)} if written is not None else {}
    measured: dict[str, Any] = {}
    if acceptance_length is not None:
        measured = {
            "measured": f"Greedy, {num_heldout} held-out prompts, {num_new} new tokens"
            f"{' at most' if by_document else ''}, simulated on the target's own text.",
            "acceptance": {"held-out": round(acceptance_length, 3)},
        }
    return {
        "target": str(section.target),
        "data": data_card,
        **measured,
        "training": {
            "steps": loop.num_steps,
            "windows a step": loop.batch_size,
            "anchors a window": section.num_anchors,
            "loss": f"{section.ce_weight} CE + {section.kl_weight} KL + {section.tv_weight} TV",
            "offset weights": section.weighting,
            "optimizer": f"{optim.name}, learning rate {optim.lr}, {optim.schedule}",
            "config SHA-256": config_hash(config),
            **text_sha256,
        },
    }
