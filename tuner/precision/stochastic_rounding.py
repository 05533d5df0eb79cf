"""Updates of bfloat16 parameters that are rounded at random, up or down, so that they are right on average.

A bfloat16 number is rounded to the nearest of its kind, which is itself wherever an update is smaller than about 1/512
of it: at small learning rates training stands still. Rounded up with the probability with which the exact value lies
between its two neighbours, small updates add up to what they should. Source: Zamirai et al., Revisiting BFloat16
Training (arXiv:2010.06192).

The optimizer steps a float32 copy of one parameter at a time, so that any optimizer will do whose parameters do not
know of each other. Its state is what it is for float32, two numbers of 4 bytes for AdamW, because bfloat16 moments
would lose their own small updates. Beyond that state it takes a copy of the largest parameter and of its gradient.

What is drawn is a hash of seed, step, parameter and place: nothing of it is kept, a run that was stopped draws what it
would have drawn, and neither the number of threads nor the device changes a bit of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuner.types import DeviceType, State

CHUNK: dict[DeviceType, int] = {"cpu": 2**18, "cuda": 2**24}
"""Numbers rounded at a time: 1 MiB, which stays in the cache of a CPU, and what keeps a GPU busy. It changes no bit."""

LOW = 0xFFFF
"""The bits of a float32 that a bfloat16 does not have."""


def round_updates(state: State, seed: int, device_type: DeviceType = "cpu") -> None:
    """Let `state.optimizer` round stochastically what it makes of its parameters, and load its state for them exactly.

    Args:
        state: its `step` decides with the seed what is drawn; all that trains is in bfloat16.
        seed: of the run.
        device_type: whose chunks it works in.
    """
    optimizer = state.optimizer
    plain_step, plain_load = optimizer.step, optimizer.load_state_dict

    def step() -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        optimizer.zero_grad(set_to_none=True)  # an optimizer steps what has a gradient
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if gradient is not None:
                with _exact_copy(parameter, key_of(seed, state.step, index), CHUNK[device_type]):
                    parameter.grad = gradient.float()
                    plain_step()
                    parameter.grad = None

    def load_state_dict(saved: Mapping[str, Any]) -> None:
        with _looking_exact([parameter for group in optimizer.param_groups for parameter in group["params"]]):
            plain_load(dict(saved))

    optimizer.step = step  # type: ignore[method-assign, assignment]
    optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]


def round_stochastically(exact: Tensor, key: int, out: Tensor, chunk: int = CHUNK["cpu"]) -> None:
    """Round float32 to one of its two bfloat16 neighbours, the nearer one the likelier, so that the mean is exact.

    Adding a random 16-bit number to the bits and cutting the lower 16 off carries with just that probability: a step of
    the upper bits is the distance to the next bfloat16 away from zero, over the end of a binade too. Values that are
    bfloat16 already, infinities and NaN stay.

    Args:
        exact: float32, contiguous; overwritten.
        key: 64 bits that decide what is drawn.
        out: bfloat16, contiguous, of the same shape.
        chunk: numbers rounded at a time, a multiple of 4.
    """
    values, rounded = exact.view(-1), out.view(-1)
    for start in range(0, values.numel(), chunk):
        part = values[start : start + chunk]
        is_nan = part.isnan()
        bits = part.view(torch.int32)
        bits.add_(random_bits(start, part.numel(), key, exact.device)).bitwise_and_(~LOW)
        rounded[start : start + chunk] = part.masked_fill_(is_nan, torch.nan)


def random_bits(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """Numbers `start` to `start + count` of the sequence of `key`: uniform 0 to 65,535, int32 [count].

    SplitMix64 (Steele et al., Fast Splittable Pseudorandom Number Generators, 2014) of a counter, each of whose 64-bit
    numbers gives four.

    Args:
        start: a multiple of 4.
        count: how many.
        key: of the sequence, signed 64 bits.
        device: where they are made.
    """
    counter = torch.arange(start // 4, -(-(start + count) // 4), device=device)
    z = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    z = _shifted_xor(z, 30).mul_(_signed(0xBF58476D1CE4E5B9))
    z = _shifted_xor(z, 27).mul_(_signed(0x94D049BB133111EB))
    return _shifted_xor(z, 31).view(torch.int16)[:count].to(torch.int32).bitwise_and_(LOW)


def _shifted_xor(z: Tensor, bits: int) -> Tensor:
    return z.bitwise_xor_((z >> bits).bitwise_and_(2 ** (64 - bits) - 1))  # `>>` keeps the sign, the mask takes it away


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def key_of(seed: int, step: int, parameter: int) -> int:
    """Signed 64 bits that are others for each seed, step and parameter."""
    digest = hashlib.blake2b(f"{seed} {step} {parameter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@contextmanager
def _exact_copy(parameter: nn.Parameter, key: int, chunk: int) -> Iterator[None]:
    """In the block the parameter is a float32 copy of itself, which is then rounded into its own place."""
    own = parameter.data
    parameter.data = own.float()
    yield
    round_stochastically(parameter.data, key, own, chunk)
    parameter.data = own


@contextmanager
def _looking_exact(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """In the block the parameters have float32's dtype and their own shape, and no values: one number stands for all.

    Optimizers cast the state that they load to the dtype of its parameter.
    """
    own = [(parameter, parameter.data) for parameter in parameters]
    for parameter, data in own:
        parameter.data = torch.empty(1, dtype=torch.float32, device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
