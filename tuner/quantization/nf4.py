"""4-bit NormalFloat weights (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) by bitsandbytes' kernels.

Every block of 64 consecutive weights is divided by its largest magnitude (`absmax`) and rounded to the nearest of 16
levels, two weights a byte. Doubly quantized, the block scales are themselves rounded to 8 bits in blocks of 256, after
their mean was taken off: 4.13 bits a weight in place of 4.5.

bitsandbytes keeps all this in one `Params4bit` tensor subclass with a `QuantState` at its side. Here the parts are
plain flat parameters instead, byte-equal to what it makes: sharding, meta-device construction, safetensors and
distributed checkpoints then need no special case. The price is that its fused `matmul_4bit` is not used; that one helps
inference of a single token, while in training the dense weight is made once per product anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.errors import ConfigError, ModelError
from tuner.quiet import import_bitsandbytes
from tuner.types import FrozenLinear, PositiveInt

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' 4-bit kernels take."""

SCALE_BLOCK_SIZE = 256
"""Block scales that share one scale, doubly quantized; fixed in bitsandbytes."""

STATISTICS = ("absmax", "absmax_scale", "absmax_offset")


class Quantizable(Protocol):
    """A model that says which of its linear layers may be quantized: those inside the transformer blocks."""

    def quantizable(self) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
        """Parent module, name of the child in it, and the child."""


class NF4:
    """Replaces the linear layers inside the transformer blocks by `NF4Linear`; embeddings and output head stay.

    Args:
        block_size: weights that share one scale.
        double_quant: also quantize the scales.

    Raises:
        ConfigError: if bitsandbytes has no kernel for `block_size`.
    """

    name = "nf4"

    def __init__(self, block_size: PositiveInt, double_quant: bool) -> None:
        if block_size not in BLOCK_SIZES:
            valid = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(f"quantization.block_size={block_size}: no such kernel; valid: {valid}")
        self.block_size = block_size
        self.double_quant = double_quant

    def quantize(self, model: nn.Module) -> None:
        """Quantize in place, layer by layer, so that at no time two forms of more than one layer exist.

        Raises:
            ModelError: if the model offers no layer to quantize.
        """
        # Places only: a list of the layers would keep every dense weight alive until the last one is done.
        places = [(parent, name) for parent, name, _ in cast(Quantizable, model).quantizable()]
        if not places:
            raise ModelError(f"quantization=nf4: {type(model).__name__} has no linear layer to quantize")
        for parent, name in places:
            linear = getattr(parent, name)
            packed = NF4Linear.from_linear(linear, block_size=self.block_size, double_quant=self.double_quant)
            setattr(parent, name, packed)


class NF4Linear(nn.Module):
    r"""`y = x W^T + b` with a frozen W of 4-bit levels: `W[i] = level[weight[i]] * absmax[i // block_size]`, i over the
    flattened [out_features, in_features].

    Made by `from_linear` or `empty`. `(..., in_features) -> (..., out_features)`; the gradient reaches x, never W.

    Attributes, all frozen and, but for the bias, flat:
        weight: uint8 [ceil(n / 2)] for n weights, the first of each two in the high half.
        absmax: scale of each block, float32 [ceil(n / block_size)], or uint8 of the same shape if doubly quantized.
        absmax_scale: float32 [ceil(len(absmax) / 256)], only if doubly quantized.
        absmax_offset: float32 [1], mean of the scales, only if doubly quantized; a 0-dim tensor could not be sharded.
        bias: [out_features] in the compute dtype, or None.
        compute_dtype: of the dense weight; at first what the quantized weight was, and `.to(dtype)` changes it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        compute_dtype: torch.dtype,
        **parts: Tensor | None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.block_size = block_size
        self.compute_dtype = compute_dtype
        for name in ("weight", *STATISTICS, "bias"):
            part = parts[name]
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))
        _scale_code(self.weight.device)  # also imports bitsandbytes, whose operators `dense_weight` calls

    weight: nn.Parameter
    absmax: nn.Parameter
    absmax_scale: nn.Parameter | None
    absmax_offset: nn.Parameter | None
    bias: nn.Parameter | None

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
        functional = import_bitsandbytes().functional
        packed, state = functional.quantize_4bit(
            dense, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
        )
        return cls(
            in_features,
            out_features,
            block_size=block_size,
            compute_dtype=dense.dtype,
            weight=packed.flatten(),
            absmax=state.absmax,
            absmax_scale=state.state2.absmax if double_quant else None,
            absmax_offset=state.offset.reshape(1) if double_quant else None,
            bias=None if bias is None else bias.detach(),
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
            self.weight, self._block_scales(), self.block_size, "nf4", shape, self.compute_dtype
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

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _LinearWithFrozenWeight.apply(x, self))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(dtype)` means the compute dtype: the scales stay float32, or the levels would move."""
        # `.data`, because the parameter itself may be changed in place.
        before = {name: getattr(self, name).data for name in STATISTICS if getattr(self, name) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, statistic in before.items():
            moved = getattr(self, name)
            if moved.dtype != statistic.dtype:
                setattr(self, name, nn.Parameter(statistic.to(moved.device), requires_grad=False))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        _scale_code(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.absmax_scale is not None}"
        )


class _LinearWithFrozenWeight(torch.autograd.Function):
    """Makes the dense weight again for the backward pass, where `F.linear` would keep it alive until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dense_weight(), None


def quantization_error(dense: Tensor, linear: FrozenLinear) -> dict[str, float]:
    """How far the quantized weight is from the `dense` one [out_features, in_features] it was made of.

    Returns:
        `relative_error`: Frobenius norm of the difference over that of `dense`; `max_abs_error`: the largest one.
    """
    dense = dense.detach().float()
    difference = linear.dense_weight().float() - dense
    return {
        "relative_error": float(difference.norm() / dense.norm()),
        "max_abs_error": float(difference.abs().max()),
    }


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
