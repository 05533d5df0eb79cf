"""DoRA: the direction of a weight adapted by LoRA, its magnitude a vector that trains (Liu et al., arXiv:2402.09353).

`W' = m / ‖V‖ · V` by rows, with `V = W + scale · B A` and m [out] at first the norms of W's rows, so that it starts as
the identity. As in the paper (section 4.3) and in PEFT, ‖V‖ counts as a constant in backward.

The norms need no V: `‖v‖² = ‖w‖² + 2 scale · b (A w) + scale² · b (A Aᵀ) bᵀ` for a row w of W and b of B, of which the
first is known beforehand and the second is one product with R as a side. Composed from modules, as in PEFT, a step
makes `B A` and V in each layer, twice a weight's size.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tuner.peft.adapted import dense_weight
from tuner.peft.lora import LoRA
from tuner.peft.lora_linear import Adapter, Products
from tuner.types import Fraction, LinearSlot, PositiveFloat, PositiveInt


class DoRA(LoRA):
    """Freeze the model and adapt directions and magnitudes of its linear layers.

    Args:
        name: `dora`.
        lora_rank: R, the inner dimension of `B A`.
        lora_alpha: the update of the direction is scaled by alpha / R.
        lora_dropout: probability of dropping an input feature of A while training.
        lora_attn_modules: attention projections to adapt.
        apply_lora_to_mlp: adapt the three projections of each MLP.
        apply_lora_to_output: adapt the output head.
        use_rslora: scale by alpha / sqrt(R) (arXiv:2312.03732).
    """

    def __init__(
        self,
        name: Literal["dora"],
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

    def adapter(self, slot: LinearSlot) -> Adapter:
        return DoRAAdapter(*self.sizes(slot), self.rank, self.alpha, self.dropout, self.use_rslora)


class _DoRAFunction(torch.autograd.Function):
    """`m / ‖V‖ · u + b` with `u = x Wᵀ + scale (x_a Aᵀ) Bᵀ`.

    For backward it keeps the input, its projection [N, R] and u [N, out], beside three vectors: the last is what DoRA
    takes more than LoRA, since the gradient of m is `Σ grad · u`. To compute u again would be a third more of the time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_a: Tensor | None, m: Tensor, adapter: DoRAAdapter, A: Tensor, B: Tensor, base: nn.Module
    ) -> Tensor:
        x_2d, weight = x.reshape(-1, x.shape[-1]), dense_weight(base)
        a_input = x_2d if x_a is None else x_a.reshape(-1, x.shape[-1])
        u, projected = Products.forward(x_2d, a_input, A, B, lambda: weight, None, adapter.scale)
        norms = adapter.norms(weight)
        factors = m.to(norms.dtype) / norms
        ctx.save_for_backward(a_input, projected, u, A, B, factors, norms)
        ctx.base, ctx.scale, ctx.shared, ctx.dtype = base, adapter.scale, x_a is None, m.dtype
        out = (u * factors).to(u.dtype)  # in fp32: bf16 has 256 steps an octave, fewer than a magnitude that trains
        if base.bias is not None:
            out += cast(Tensor, base.bias).to(out.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_input, projected, u, A, B, factors, norms = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_m = ((grad * u).sum(0, dtype=norms.dtype) / norms).to(ctx.dtype)
        grad_u = (grad * factors).to(grad.dtype)
        grad_A, grad_B, grad_projected = Products.backward(grad_u, a_input, projected, A, B, ctx.scale)
        shape = (*grads[0].shape[:-1], A.shape[1])
        inputs = Products.backward_to_inputs(ctx, grad_u, grad_projected, A, shape)
        return *inputs, grad_m, None, grad_A, grad_B, None


class DoRAAdapter(Adapter):
    """The matrices of an adapter and the magnitudes [out] of the rows that it makes.

    Dropout is on the input of A alone. (PEFT drops features of the base's product too, as far as m / ‖V‖ is not 1.)

    Args:
        in_features, out_features, rank, alpha, dropout, use_rslora: as for `Adapter`.
    """

    adds = False
    base_squares: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float, use_rslora: bool
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, use_rslora)
        self.magnitude = nn.Parameter(torch.ones(out_features))
        self.register_buffer("base_squares", torch.ones(out_features), persistent=False)

    @torch.no_grad()
    def begin(self, base: nn.Module) -> None:
        """Take the magnitudes from the rows of `base`, so that the layer computes what it did."""
        if next(base.parameters()).is_meta:
            return
        self.base_squares = row_squares(dense_weight(base))
        self.magnitude.data = self.base_squares.sqrt().to(self.magnitude.dtype)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        out: Tensor = _DoRAFunction.apply(x, self.dropped(x), self.magnitude, self, self.A, self.B, base)  # type: ignore[no-untyped-call]
        return out

    def norms(self, weight: Tensor) -> Tensor:
        """‖V‖ by rows, fp32 [out], for the dense weight [out, in]."""
        A, B = (matrix.detach().to(self.base_squares.dtype) for matrix in (self.A, self.B))
        crossed = (A.to(weight.dtype) @ weight.t()).t().to(B.dtype)
        added = (B * (2 * self.scale * crossed + self.scale**2 * (B @ (A @ A.t())))).sum(1)
        # A row of zeros has magnitude 0, and 0 / 0 is no number.
        return (self.base_squares + added).clamp_min_(torch.finfo(added.dtype).tiny).sqrt_()

    def adapted(self, weight: Tensor) -> Tensor:
        factors = self.magnitude.float() / self.norms(weight)
        return super().adapted(weight).mul_(factors.unsqueeze(1))


def row_squares(weight: Tensor) -> Tensor:
    """Sums of the squares of each row of [out, in], in fp32, or in fp64 for a weight of that."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)
