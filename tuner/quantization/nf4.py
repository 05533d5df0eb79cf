"""4-bit NormalFloat weights (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): levels that are each as
likely for normally distributed weights."""

from __future__ import annotations

from tuner.quantization.four_bit import FourBit, FourBitLinear


class NF4Linear(FourBitLinear):
    """Of the 16 levels of 4-bit NormalFloat."""

    levels = "nf4"


class NF4(FourBit):
    """See `FourBit`."""

    name = "nf4"
    layer = NF4Linear
