"""A model as what is written of it with its adapter merged in, without a folder in between."""

from __future__ import annotations

import torch
from torch import nn

from tuner.models.decoder import Decoder
from tuner.models.stored import replace_parameter
from tuner.peft.merge import plain_parameter
from tuner.results import plain_twin


def plain_model(model: nn.Module, dtype: torch.dtype) -> Decoder:
    """A plain model of its own memory; `model` stays as it is."""
    assert isinstance(model, Decoder)
    twin = plain_twin(model)
    for name, _ in list(twin.named_parameters()):
        replace_parameter(twin, name, plain_parameter(model, name, dtype).clone())
    twin.tie()
    return twin.eval()
