"""A drafter's weights in the target's structures, so that one set of kernels serves both.

Legend: D hidden, C tapped features, V vocabulary, U draft vocabulary, R rank of the Markov head.
"""

from dataclasses import dataclass

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.model.drafter_spec import DrafterSpec, drafter_spec
from speedstack.runtime.model.weights import AttentionWeights, DenseWeights, Layers, LayerWeights


@dataclass
class DrafterWeights(Layers):
    """A DFlash drafter: every layer is attention with QK-norm and a dense SwiGLU.

    `markov_w1_VR`, `markov_w2_UR`: the Markov head, None without one.
    """

    spec: DrafterSpec
    fc_DC: torch.Tensor
    hidden_norm_D: torch.Tensor
    layers: list[LayerWeights]
    norm_D: torch.Tensor
    mask_embedding_D: torch.Tensor | None = None
    markov_w1_VR: torch.Tensor | None = None
    markov_w2_UR: torch.Tensor | None = None

    def joined_bytes(self) -> int:
        """Bytes of matrices that were copied to join them; attention's are also kept sorted."""
        dense = [layer.mlp.gate_up_FD for layer in self.layers if isinstance(layer.mlp, DenseWeights)]
        return sum(matrix.nbytes for matrix in dense) + 2 * sum(layer.attention.qkv_OD.nbytes for layer in self.layers)


def read_drafter(
    model: DFlashDraftModel, matrices: torch.dtype = torch.bfloat16, vectors: torch.dtype = torch.float32
) -> DrafterWeights:
    """A drafter's parameters in these dtypes, for a backend with its own kernels.

    Drafters are stored in bfloat16, which this keeps. Rounding any other dtype may change proposals and speed, never
    the text.
    """
    config = model.config
    tensors = {name: tensor.detach().to(vectors) for name, tensor in model.state_dict().items()}

    def rows(*names: str) -> torch.Tensor:
        parts = [tensors[f"{name}.weight"] for name in names]
        together = torch.cat(parts) if len(parts) > 1 else parts[0]  # cat of a single tensor would copy it
        return together.to(matrices) if together.dim() == 2 else together

    layers = []
    for i in range(config.num_hidden_layers):
        at, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        attention = AttentionWeights(
            norm_D=tensors[f"layers.{i}.input_layernorm.weight"],
            qkv_OD=rows(at + "q_proj", at + "k_proj", at + "v_proj"),
            output_DO=rows(at + "o_proj"),
            q_norm_H=rows(at + "q_norm"),
            k_norm_H=rows(at + "k_norm"),
            sinks_N=tensors.get(at + "attention_sink_bias"),
        )
        dense = DenseWeights(
            norm_D=tensors[f"layers.{i}.post_attention_layernorm.weight"],
            gate_up_FD=rows(mlp + "gate_proj", mlp + "up_proj"),
            down_DF=rows(mlp + "down_proj"),
        )
        layers.append(LayerWeights(attention, dense))
    has_markov = config.markov_rank > 0
    return DrafterWeights(
        spec=drafter_spec(config),
        fc_DC=rows("fc"),
        hidden_norm_D=tensors["hidden_norm.weight"],
        layers=layers,
        norm_D=tensors["norm.weight"],
        mask_embedding_D=tensors.get("mask_embedding"),
        # Read a row at a time like the embedding, so its bytes do not matter.
        markov_w1_VR=tensors["markov_head.markov_w1.weight"] if has_markov else None,
        markov_w2_UR=rows("markov_head.markov_w2") if has_markov else None,
    )
