"""Random weights as Hugging Face initialises a decoder: for tests and trials."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuner.models.decoder import Decoder
from tuner.models.rms_norm import RMSNorm
from tuner.models.stored import replace_parameter

STANDARD_DEVIATION = 0.02


def fill_with_random_weights(
    model: Decoder,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    arrived: Callable[[str], None] = lambda path: None,
) -> None:
    """Replace the meta parameters of a model: normal(0, 0.02) matrices, norms that do nothing, zeros for biases.

    Drawn in fp32 on the CPU, so that every dtype and device starts from the same numbers.

    Args:
        model: built on the meta device.
        dtype, device: of the weights.
        seed: of the numbers.
        arrived: as for `load_weights`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        path = name.rpartition(".")[0]
        norm = model.get_submodule(path)
        value = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            value.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        elif isinstance(norm, RMSNorm) and not norm.zero_centered:
            value.fill_(1.0)
        module = replace_parameter(model, name, value.to(device=device, dtype=dtype))
        if not any(one.is_meta for one in module.parameters(recurse=False)):
            arrived(path)
