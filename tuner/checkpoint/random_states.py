"""The random generators that a run draws from: seeded together, saved and put back.

What is drawn for the data (its order, the packing, the split) is a function of seed, epoch and the data's fingerprint
and has no state.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

_NUMPY_SEEDS = 2**32


def seed_all(seed: int) -> None:
    """Start Python's, NumPy's and torch's generators, on all devices, from `seed`."""
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Where the generators are, in what `torch.load(weights_only=True)` reads back."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators where `random_states` found them.

    The states of more GPUs than there are here are left out: each process has those of its own devices.
    """
    random.setstate(states["python"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["cpu"])
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
