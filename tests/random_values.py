"""Random parameters for tiny models."""

import torch
from torch import nn


def randomize(model: nn.Module, seed: int) -> torch.Generator:
    """Draws every parameter, norms' weights near one and all others near zero; the generator, to draw what else is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    return generator
