"""4-bit weights by bitsandbytes' kernels: 16 levels, two weights a byte, and a scale for each block of weights.

Every block of 64 consecutive weights is divided by its largest magnitude (`absmax`) and rounded to the nearest of the
levels. Doubly quantized, the block scales are themselves rounded to 8 bits in blocks of 256, after their mean was taken
off: 4.13 bits a weight in place of 4.5. Which levels these are is all that nf4 and fp4 differ in.

bitsandbytes keeps all this in one `Params4bit` tensor subclass with a `QuantState` at its side. Here the parts are
plain flat parameters instead, byte-equal to what it makes.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from tuner.errors import ConfigError
from tuner.quantization.packed_linear import PIECE_WEIGHTS, PackedLinear, quantize_blocks
from tuner.quiet import import_bitsandbytes
from tuner.types import PositiveInt

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' 4-bit kernels take."""

SCALE_BLOCK_SIZE = 256
"""Block scales that share one scale, doubly quantized; fixed in bitsandbytes."""


class FourBitLinear(PackedLinear):
    r"""`y = x W^T + b` with a frozen W of 4-bit levels: `W[i] = level[weight[i]] * absmax[i // block_size]`, i over the
    flattened [out_features, in_features].

    Made by `from_linear` or `empty`.

    Attributes, all frozen and, but for the bias, flat:
        weight: uint8 [ceil(n / 2)] for n weights, the first of each two in the high half.
        absmax: scale of each block, float32 [ceil(n / block_size)], or uint8 of the same shape if doubly quantized.
        absmax_scale: float32 [ceil(len(absmax) / 256)], only if doubly quantized.
        absmax_offset: float32 [1], mean of the scales, only if doubly quantized; a 0-dim tensor could not be sharded.
        bias: [out_features] in the compute dtype, or None.
    """

    levels: ClassVar[Literal["nf4", "fp4"]]
    """bitsandbytes' name of the 16."""
    statistics = ("absmax", "absmax_scale", "absmax_offset")

    absmax: nn.Parameter
    absmax_scale: nn.Parameter | None
    absmax_offset: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        compute_dtype: torch.dtype,
        **parts: Tensor | None,
    ) -> None:
        super().__init__(in_features, out_features, compute_dtype=compute_dtype, **parts)
        self.block_size = block_size

    def settled(self) -> None:
        _scale_code(self.weight.device)  # also imports bitsandbytes, whose operators `dense_weight` calls

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, block_size: int, double_quant: bool) -> Self:
        """Quantize a linear layer on its device; one on the meta device gives the same shapes there."""
        dense, bias = linear.weight.detach(), linear.bias
        out_features, in_features = dense.shape
        if dense.is_meta:
            return cls.empty(
                in_features,
                out_features,
                bias=bias is not None,
                block_size=block_size,
                double_quant=double_quant,
                compute_dtype=dense.dtype,
                device=dense.device,
            )
        return cls(
            in_features,
            out_features,
            block_size=block_size,
            compute_dtype=dense.dtype,
            bias=None if bias is None else bias.detach(),
            **_quantized(dense, cls.levels, block_size, double_quant),
        )

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        block_size: int,
        double_quant: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Self:
        """A layer of the right shapes and dtypes whose values are still to be loaded."""
        num_weights = in_features * out_features
        num_blocks = -(-num_weights // block_size)
        num_scales = -(-num_blocks // SCALE_BLOCK_SIZE)

        def flat(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return cls(
            in_features,
            out_features,
            block_size=block_size,
            compute_dtype=compute_dtype,
            weight=flat(-(-num_weights // 2), torch.uint8),
            absmax=flat(num_blocks, torch.uint8 if double_quant else torch.float32),
            absmax_scale=flat(num_scales, torch.float32) if double_quant else None,
            absmax_offset=flat(1, torch.float32) if double_quant else None,
            bias=flat(out_features, compute_dtype) if bias else None,
        )

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] in the compute dtype, made anew at each call."""
        # By rows: the CPU kernel runs one row a thread, and over one long row it takes twice the time.
        shape = (self.out_features, self.in_features)
        dense = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, self._block_scales(), self.block_size, self.levels, shape, self.compute_dtype
        )
        return cast(Tensor, dense)

    def _block_scales(self) -> Tensor:
        if self.absmax_scale is None or self.absmax_offset is None:
            return self.absmax
        code = _scale_code(self.absmax.device)
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.absmax_scale, code, SCALE_BLOCK_SIZE, torch.float32
        )
        return cast(Tensor, scales.add_(self.absmax_offset))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}, double_quant={self.absmax_scale is not None}"


class FourBit:
    """Replaces the linear layers inside the transformer blocks by packed ones; embeddings and output head stay.

    Args:
        block_size: weights that share one scale.
        double_quant: also quantize the scales.

    Raises:
        ConfigError: if bitsandbytes has no kernel for `block_size`.
    """

    name: str
    layer: type[FourBitLinear]

    def __init__(self, block_size: PositiveInt, double_quant: bool) -> None:
        if block_size not in BLOCK_SIZES:
            valid = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"quantization.block_size={block_size}: no such kernel; valid: {valid}")
        self.block_size = block_size
        self.double_quant = double_quant

    def packed(self, linear: nn.Linear) -> FourBitLinear:
        """A linear layer quantized, on its device."""
        return self.layer.from_linear(linear, block_size=self.block_size, double_quant=self.double_quant)

    def quantize(self, model: nn.Module) -> None:
        """Quantize in place.

        Raises:
            ModelError: if the model offers no layer to quantize.
        """
        quantize_blocks(model, self)


def _quantized(dense: Tensor, levels: str, block_size: int, double_quant: bool) -> dict[str, Tensor | None]:
    """The parts of a packed weight, but for the bias; byte-equal to quantizing all of it at once."""
    functional = import_bitsandbytes().functional
    pieces = [
        torch.ops.bitsandbytes.quantize_4bit(piece, block_size, levels, torch.uint8)
        for piece in torch.split(dense.reshape(-1), PIECE_WEIGHTS)
    ]
    weight, absmax = torch.cat([piece[0].flatten() for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    if not double_quant:
        return {"weight": weight, "absmax": absmax, "absmax_scale": None, "absmax_offset": None}
    offset = absmax.mean()
    scales, state = functional.quantize_blockwise(absmax - offset, blocksize=SCALE_BLOCK_SIZE)
    return {"weight": weight, "absmax": scales, "absmax_scale": state.absmax, "absmax_offset": offset.reshape(1)}


_SCALE_CODES: dict[torch.device, Tensor] = {}


def _scale_code(device: torch.device) -> Tensor:
    """The 256 levels of an 8-bit scale, float32 [256], one copy a device for all layers.

    Not a buffer: `to_empty` would leave nonsense in it. Not `functools.cache`: `torch.compile` looks through that.
    """
    if device not in _SCALE_CODES:
        with torch.device("cpu"):  # also while a model is built on the meta device
            code = import_bitsandbytes().functional.create_dynamic_map()
        _SCALE_CODES[device] = code.to(device)
    return _SCALE_CODES[device]
