"""PiSSA: LoRA that begins with the principal components of each weight (Meng et al., arXiv:2404.02948)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tuner.peft.residual import Factors, OverResidual, orthonormal
from tuner.types import Fraction, PositiveFloat, PositiveInt

MORE = 8
"""Directions beyond R that the iterations follow, since those at the edge converge slowest."""


class PiSSA(OverResidual):
    """Freeze what each weight is without its R principal components, and train these.

    Args:
        name: `pissa`.
        lora_rank: R, the inner dimension of `B A`.
        lora_alpha: the update is scaled by alpha / R.
        lora_dropout: probability of dropping an input feature of A while training.
        lora_attn_modules: attention projections to adapt.
        apply_lora_to_mlp: adapt the three projections of each MLP.
        apply_lora_to_output: adapt the output head.
        use_rslora: scale by alpha / sqrt(R) (arXiv:2312.03732).
        svd_iterations: of the randomized decomposition (Halko et al., arXiv:0909.4061); None decomposes exactly.
    """

    def __init__(
        self,
        name: Literal["pissa"],
        lora_rank: PositiveInt,
        lora_alpha: PositiveFloat,
        lora_dropout: Fraction,
        lora_attn_modules: list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]],
        apply_lora_to_mlp: bool,
        apply_lora_to_output: bool,
        use_rslora: bool,
        svd_iterations: PositiveInt | None,
    ) -> None:
        chosen = (lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output)
        super().__init__("lora", lora_rank, lora_alpha, lora_dropout, *chosen, use_rslora)
        self.name = name
        self.svd_iterations = svd_iterations

    def factors(self, weight: Tensor) -> Factors:
        """`A = √(S / scale) Vᵀ` and `B = U √(S / scale)`, so that scale · BA are the principal components."""
        U, S, Vt = principal_components(weight, self.rank, self.svd_iterations)
        roots = (S / self.scale).sqrt()
        return roots.unsqueeze(1) * Vt, U * roots


def principal_components(weight: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, R], S [R], Vᵀ [R, in] of the largest singular values of [out, in].

    The iterations start from numbers of a seed of their own, so that the same weight has the same components.
    """
    if iterations is None:
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank].contiguous(), S[:rank], Vt[:rank].contiguous()
    width = min(rank + MORE, *weight.shape)
    drawn = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(0))
    Q = orthonormal(weight @ drawn.to(weight))
    for _ in range(iterations):
        Q = orthonormal(weight @ orthonormal(weight.t() @ Q))
    U, S, Vt = torch.linalg.svd(Q.t() @ weight, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vt[:rank].contiguous()
