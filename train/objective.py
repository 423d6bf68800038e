"""Losses over next-token distributions, and the held-out windows they are measured on.

These are what gradients flow through: logits are reduced in float32 whatever their dtype. Held-out figures come from
`speedstack.eval.divergence`, the code that evaluation reports with. Position t predicts token t + 1, so a window of T
tokens has T - 1 predictions; KL, which needs no label, is taken over all T positions.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from speedstack.train.config import JobConfig
from speedstack.train.data import PackedWindows
from speedstack.train.distributed import World


def next_token_cross_entropy(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token in nats, a float32 scalar."""
    return F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten())


def forward_kl(teacher_logits_BTV: torch.Tensor, student_logits_BTV: torch.Tensor) -> torch.Tensor:
    """Mean over positions of KL(teacher || student) at temperature 1 in nats, a float32 scalar."""
    teacher_log_probs = F.log_softmax(teacher_logits_BTV.float().flatten(0, 1), dim=-1)
    student_log_probs = F.log_softmax(student_logits_BTV.float().flatten(0, 1), dim=-1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)


def heldout_batches(windows: PackedWindows, config: JobConfig, world: World) -> Iterator[torch.Tensor]:
    """This process's share of the evaluation windows, int64 [B, T] on the device.

    They are spread evenly over the held-out split, and batches are as large as training's micro-batches.
    """
    num_windows = min(config.data.eval_sequences, len(windows))
    num_windows = max(world.size, num_windows - num_windows % world.size)
    places = world.share([index * len(windows) // num_windows for index in range(num_windows)])
    size = config.loop.micro_batch_size or config.loop.batch_size // world.size
    for start in range(0, len(places), size):
        yield torch.stack([windows.window(place) for place in places[start : start + size]]).to(world.device)
