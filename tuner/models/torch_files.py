"""Tensors in files that `torch.save` wrote: `.bin` of older Hugging Face folders, `.pth` of Meta's checkpoints.

Such a file is a pickle, which may run any code when it is read. It is read as tensors and nothing else, and its data
is mapped rather than read, so that a large file costs memory only as its tensors are used.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import ModelError


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU.

    Raises:
        ModelError: a pickle that would do more than make tensors, a damaged or truncated file, or something that is no
            dictionary of tensors by name.
    """
    if not file.stat().st_size:
        raise ModelError(f"{file}: empty")
    try:
        held = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"{named[1]}, which is not part of a tensor" if named else "more than tensors"
        raise ModelError(f"{file}: refused: its pickle asks for {wants}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ModelError(
            f"{file}: damaged or truncated, or not written by torch.save of 1.6 or later: {_one_line(error)}"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ModelError(f"{file}: no dictionary of tensors")
    return {str(name): tensor for name, tensor in held.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
