"""How far one model's predictions are from another's, a token at a time; training and evaluation share these.

float64 inside: reported divergences are about 1e-3 nats, a difference of numbers near 10, and float32 would leave three
digits.
"""

import torch


def token_nll(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each target id (int64 [T]) under float logits [T, V]; float64 [T]."""
    return torch.nn.functional.cross_entropy(logits_TV.double(), targets_T, reduction="none")


def token_kl(teacher_TV: torch.Tensor, student_TV: torch.Tensor) -> torch.Tensor:
    """Forward divergence KL(teacher || student) in nats at each position of float logits [T, V]; float64 [T], >= 0."""
    teacher_logprobs = torch.log_softmax(teacher_TV.double(), dim=-1)
    student_logprobs = torch.log_softmax(student_TV.double(), dim=-1)
    kl_T = torch.nn.functional.kl_div(student_logprobs, teacher_logprobs, log_target=True, reduction="none").sum(-1)
    return kl_T.clamp_min(0.0)


def top1_matches(teacher_TV: torch.Tensor, student_TV: torch.Tensor) -> torch.Tensor:
    """Whether both models would decode the same token greedily at each position; bool [T]."""
    return teacher_TV.argmax(-1) == student_TV.argmax(-1)


def check_numbers(logits_TV: torch.Tensor, model: str) -> torch.Tensor:
    """The same logits. Raises ValueError, naming the model, for NaN."""
    if bool(torch.isnan(logits_TV).any()):
        raise ValueError(f"the logits of {model} are NaN; its checkpoint is broken or its dtype overflows")
    return logits_TV
