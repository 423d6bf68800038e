"""Our drafter as transformers' DFlash class, as a test oracle and a peer: same weights, other code.

transformers (5.15 and later) has MuseGlimmerAssistantModel and a generation mode for it (see
`dflash.formats.transformers`). This call proposes what this package proposes:

    target.generate(ids, assistant_model=to_transformers(model, target), speculation_type="dflash", do_sample=False)
"""

from __future__ import annotations

from typing import Any

import torch

from speedstack.dflash.checkpoint import check_target
from speedstack.dflash.formats.format import Target
from speedstack.dflash.formats.transformers import TRANSFORMERS
from speedstack.dflash.model import DFlashDraftModel


def to_transformers(model: DFlashDraftModel, target: Any) -> Any:
    """MuseGlimmerAssistantModel with `model`'s weights and dtype, on `target`'s device, in eval mode.

    `target`: the transformers causal LM. If its last layer is tapped, its config is set to return that layer's output,
    not the final-normed one. Raises ValueError for another target's shapes or an unsupported option.
    """
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    config, text_config = model.config, target.config.get_text_config()
    check_target(config, None, text_config.hidden_size, text_config.num_hidden_layers, text_config.vocab_size)
    TRANSFORMERS.refuse_options(config)
    if text_config.num_hidden_layers - 1 in config.target_layer_ids:
        text_config.tie_last_hidden_states = False
    raw = TRANSFORMERS.to_json(config, "float32", Target())
    ids = {name: getattr(text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device("cpu"):
        peer: Any = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**(raw | ids)))
    peer.load_state_dict(TRANSFORMERS.to_tensors(model.state_dict(), config, Target()))
    return peer.to(device=target.device, dtype=model.fc.weight.dtype).eval()
