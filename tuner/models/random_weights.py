"""Random weights as Hugging Face initialises a Llama: for tests and trials."""

from __future__ import annotations

import torch
from torch import nn

STANDARD_DEVIATION = 0.02


def fill_with_random_weights(model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Replace the meta parameters of a model: normal(0, 0.02) matrices, ones for norms, zeros for biases.

    Drawn in fp32 on the CPU, so that every dtype and device starts from the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in list(model.named_parameters()):
        value = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            value.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        elif path.endswith("weight"):
            value.fill_(1.0)
        parent, _, name = path.rpartition(".")
        fresh = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False)
        setattr(model.get_submodule(parent), name, fresh)
