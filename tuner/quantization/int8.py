"""8-bit weights with a scale for each row, as LLM.int8() has them (Dettmers et al., arXiv:2208.07339).

The bytes are those of bitsandbytes' `Int8Params`, which rounds to fp16 first. Its products are not used: they quantize
the activations too, except for columns with outliers, which is what the decomposition of the paper is for. Here weights
alone are quantized, so there are no outliers to take apart, the error is a row's rounding and no more, and gradients
are those of the dense weight. The price: nothing is faster than with dense weights, at half the memory of bf16.
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn

from tuner.quantization.packed_linear import PIECE_WEIGHTS, PackedLinear, quantize_blocks
from tuner.quiet import import_bitsandbytes


class Int8:
    """Replaces the linear layers inside the transformer blocks by `Int8Linear`; embeddings and output head stay."""

    name = "int8"

    def packed(self, linear: nn.Linear) -> Int8Linear:
        """A linear layer quantized, on its device."""
        return Int8Linear.from_linear(linear)

    def quantize(self, model: nn.Module) -> None:
        """Quantize in place.

        Raises:
            ModelError: if the model offers no layer to quantize.
        """
        quantize_blocks(model, self)


class Int8Linear(PackedLinear):
    """`W[i, j] = weight[i, j] * scale[i] / 127`; see `PackedLinear`.

    Attributes:
        weight: int8 [out_features * in_features], flattened.
        scale: float32 [out_features], the largest magnitude of each row.
        bias: [out_features] in the compute dtype, or None.
    """

    statistics = ("scale",)
    scale: nn.Parameter

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Quantize a linear layer on its device; one on the meta device gives the same shapes there."""
        dense, bias = linear.weight.detach(), linear.bias
        out_features, in_features = dense.shape
        weight, scale = _quantized(dense)
        return cls(
            in_features,
            out_features,
            compute_dtype=dense.dtype,
            weight=weight,
            scale=scale,
            bias=None if bias is None else bias.detach(),
        )

    def settled(self) -> None:
        import_bitsandbytes()  # whose operators `dense_weight` calls

    def dense_weight(self) -> Tensor:
        rows = self.weight.view(self.out_features, self.in_features)
        dense = torch.ops.bitsandbytes.int8_vectorwise_dequant(rows, self.scale)
        return cast(Tensor, dense.to(self.compute_dtype))


def _quantized(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and scale of [out, in]; rows are independent, so it is done by some at a time."""
    if dense.is_meta:
        return torch.empty(dense.numel(), dtype=torch.int8, device="meta"), torch.empty(len(dense), device="meta")
    import_bitsandbytes()
    pieces = [
        torch.ops.bitsandbytes.int8_vectorwise_quant(piece.contiguous().half())
        for piece in torch.split(dense, max(1, PIECE_WEIGHTS // dense.shape[1]))
    ]
    return torch.cat([piece[0].flatten() for piece in pieces]), torch.cat([piece[1] for piece in pieces])
