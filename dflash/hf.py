"""A drafter of ours as transformers' own DFlash drafter, for comparison: same weights, somebody else's code.

transformers (5.15 and later) ships one DFlash drafter class, MuseGlimmerAssistantModel, and a generation mode for it.
The architectures agree when every drafter layer uses full attention; only the names of the fusion differ. With

    target.generate(ids, assistant_model=to_transformers(model, target), speculation_type="dflash", do_sample=False)

transformers proposes what this package proposes, which makes it an oracle in tests and a peer in benchmarks.
"""

from __future__ import annotations

from typing import Any

import torch

from speedstack.dflash.checkpoint import check_target
from speedstack.dflash.model import DFlashDraftModel

RENAMED = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}


def to_transformers(model: DFlashDraftModel, target: Any) -> Any:
    """MuseGlimmerAssistantModel with `model`'s weights and dtype, on `target`'s device, in eval mode.

    `target` is the transformers causal LM it will assist. When its last layer is tapped, `target`'s config is set to
    return that layer's own output as the last hidden state, not the final-normed one: id L means the output of layer L.
    Raises ValueError when the shapes are another target's.
    """
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    config, text_config = model.config, target.config.get_text_config()
    check_target(config, None, text_config.hidden_size, text_config.num_hidden_layers, text_config.vocab_size)
    if config.num_target_layers - 1 in config.target_layer_ids:
        text_config.tie_last_hidden_states = False
    peer_config = MuseGlimmerAssistantConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        layer_types=["full_attention"] * config.num_hidden_layers,
        block_size=config.block_size,
        mask_token_id=config.mask_token_id,
        target_layer_ids=list(config.target_layer_ids),
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        pad_token_id=text_config.pad_token_id,
    )
    with torch.device("cpu"):
        peer: Any = MuseGlimmerAssistantModel(peer_config)
    peer.load_state_dict({RENAMED.get(name, name): tensor for name, tensor in model.state_dict().items()})
    return peer.to(device=target.device, dtype=model.fc.weight.dtype).eval()
