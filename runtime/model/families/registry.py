"""The families with a class in transformers, and the spec of their configs."""

from typing import Any

from speedstack.runtime.model.families.gpt_oss import GPT_OSS
from speedstack.runtime.model.families.mimo_v2_flash import MIMO_V2_FLASH
from speedstack.runtime.model.families.qwen3_moe import QWEN3_MOE
from speedstack.runtime.model.spec import ModelSpec

FAMILIES = {family.model_type: family for family in (GPT_OSS, MIMO_V2_FLASH, QWEN3_MOE)}


def spec_from_config(config: Any) -> ModelSpec:
    """The spec of a transformers `PreTrainedConfig`. Raises ValueError for an unsupported family or setting."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the runtime cannot decode model type {config.model_type!r}; it can decode {', '.join(sorted(FAMILIES))}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"activation {config.hidden_act!r} is not supported by the runtime, only silu is")
    eos = config.eos_token_id
    try:
        return ModelSpec(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            layers=FAMILIES[config.model_type].layers(config),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"a field of this {config.model_type} configuration must be wrong or is missing: "
            f"{type(error).__name__}: {error}"
        ) from error
