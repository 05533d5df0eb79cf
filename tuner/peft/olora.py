"""OLoRA: LoRA that begins with the orthonormal first part of each weight's QR decomposition (Büyükakyüz,
arXiv:2406.01775)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tuner.peft.residual import Factors, OverResidual, orthonormal
from tuner.types import Fraction, PositiveFloat, PositiveInt


class OLoRA(OverResidual):
    """Freeze what each weight W is without `scale · QR`, and train that: B = Q, A = R.

    Args:
        name: `olora`.
        lora_rank: R, the inner dimension of `B A`.
        lora_alpha: the update is scaled by alpha / R.
        lora_dropout: probability of dropping an input feature of A while training.
        lora_attn_modules: attention projections to adapt.
        apply_lora_to_mlp: adapt the three projections of each MLP.
        apply_lora_to_output: adapt the output head.
        use_rslora: scale by alpha / sqrt(R) (arXiv:2312.03732).
    """

    def __init__(
        self,
        name: Literal["olora"],
        lora_rank: PositiveInt,
        lora_alpha: PositiveFloat,
        lora_dropout: Fraction,
        lora_attn_modules: list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]],
        apply_lora_to_mlp: bool,
        apply_lora_to_output: bool,
        use_rslora: bool,
    ) -> None:
        chosen = (lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output)
        super().__init__("lora", lora_rank, lora_alpha, lora_dropout, *chosen, use_rslora)
        self.name = name

    def factors(self, weight: Tensor) -> Factors:
        """The first columns of Q and rows of R: of a whole decomposition too they depend on W's first columns alone."""
        Q = orthonormal(weight[:, : self.rank])
        return Q.t() @ weight, Q
