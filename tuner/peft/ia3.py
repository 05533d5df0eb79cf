"""(IA)³: keys, values and the inner activations of the MLP, each feature times a number that trains (Liu et al.,
arXiv:2205.05638).

Of SmolLM2-135M 57,600 parameters, where LoRA of rank 8 has 2.4 million. They start as ones, so the model starts as it
was.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.peft.adapted import AdaptedLinear, AdapterPart, dense_weight
from tuner.types import CausalLM, LinearSlot


class IA3:
    """Freeze the model and scale what some of its linear layers give, or, of the MLP, what its last one gets.

    Args:
        name: `ia3`.
        attn_modules: attention projections whose outputs are scaled; `k_proj` and `v_proj` in the paper.
        apply_to_mlp: scale the inner activations of each MLP, which are the input of `down_proj`.
    """

    def __init__(
        self,
        name: Literal["ia3"],
        attn_modules: list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]],
        apply_to_mlp: bool,
    ) -> None:
        self.name = name
        self.roles = set(attn_modules)
        self.apply_to_mlp = apply_to_mlp

    def adapt(self, model: nn.Module) -> None:
        """Replace the chosen layers in place; afterwards only their vectors have `requires_grad`.

        Raises:
            ModelError: no layer is chosen, or the model has tokens to learn.
        """
        lm = cast(CausalLM, model)
        if lm.new_tokens:
            raise ModelError("peft=ia3: an adapter of this kind has no place for the rows of model.add_tokens")
        model.requires_grad_(False)
        slots = [slot for slot in lm.linears() if self._scales(slot)]
        if not slots:
            raise ModelError("(IA)³ matches no layer: peft.attn_modules=[] and peft.apply_to_mlp=false")
        for slot in slots:
            base, on_input = slot.module, slot.role == "mlp"
            size = int(base.in_features if on_input else base.out_features)  # type: ignore[arg-type]
            layer = IA3Linear(base, Scaling(torch.ones(size)), on_input=on_input)
            slot.replace(layer.to(next(base.parameters()).device).train(model.training))

    def _scales(self, slot: LinearSlot) -> bool:
        return slot.role in self.roles or (self.apply_to_mlp and slot.name == "down_proj")


class Scaling(AdapterPart):
    """A number for each feature, [n]."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n), multiplied in the wider of the two dtypes and rounded once."""
        return (x * self.vector).to(x.dtype)


class IA3Linear(AdaptedLinear):
    """`s · base(x)`, or `base(s · x)`, feature by feature.

    Args:
        base: the frozen layer, plain or packed.
        scaling: [out], or [in] where it is on the input.
        on_input: whether it is.
    """

    def __init__(self, base: nn.Module, scaling: Scaling, *, on_input: bool) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.on_input = on_input

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(self.scaling(x)) if self.on_input else self.scaling(self.base(x))
        return out

    def scaling_as_stored(self) -> Tensor:
        """[1, in] of an input, [out, 1] of an output, as PEFT tells them apart."""
        return self.scaling.vector.unsqueeze(0 if self.on_input else 1)

    def merged_weight(self) -> Tensor:
        """`W diag(s)` or `diag(s) W`, fp32 [out, in]."""
        return dense_weight(self.base).float() * self.scaling_as_stored().float()

    def merged_bias(self) -> Tensor | None:
        """Scaled with the output."""
        bias = cast(Tensor | None, self.base.bias)
        return bias if bias is None or self.on_input else bias.float() * self.scaling.vector.float()
