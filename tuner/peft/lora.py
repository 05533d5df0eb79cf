"""Low-rank adaptation: which layers get an adapter, and what trains."""

from __future__ import annotations

from typing import Literal, cast

from torch import nn

from tuner.errors import ModelError
from tuner.peft.lora_linear import Adapter, LoRALinear, scale_of
from tuner.peft.token_rows import train_new_tokens
from tuner.types import CausalLM, Fraction, LinearSlot, PositiveFloat, PositiveInt

ADAPTER = "default"


class LoRA:
    """Freeze the model and adapt its linear layers (Hu et al., arXiv:2106.09685; over a quantized base: QLoRA,
    arXiv:2305.14314).

    Args:
        name: `lora`, or `qlora` where the preset asks for a quantized base.
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
        name: Literal["lora", "qlora"],
        lora_rank: PositiveInt,
        lora_alpha: PositiveFloat,
        lora_dropout: Fraction,
        lora_attn_modules: list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]],
        apply_lora_to_mlp: bool,
        apply_lora_to_output: bool,
        use_rslora: bool,
    ) -> None:
        self.name: str = name
        self.rank, self.alpha, self.dropout, self.use_rslora = lora_rank, lora_alpha, lora_dropout, use_rslora
        self.scale = scale_of(lora_rank, lora_alpha, use_rslora)
        self.roles = set(lora_attn_modules)
        if apply_lora_to_mlp:
            self.roles.add("mlp")  # type: ignore[arg-type]
        if apply_lora_to_output:
            self.roles.add("output")  # type: ignore[arg-type]

    def adapt(self, model: nn.Module) -> None:
        """Replace the chosen layers in place; afterwards only adapters and rows of new tokens have `requires_grad`.

        Raises:
            ModelError: no layer matches, a rank above a layer's size, or an adapted head that is also the embedding or
                has new rows.
        """
        lm = cast(CausalLM, model)
        if "output" in self.roles and lm.tied:
            raise ModelError(
                "peft.apply_lora_to_output=true: the output head of this model is its embedding matrix "
                "(tie_word_embeddings), and an adapter on one of the two would untie them"
            )
        if "output" in self.roles and lm.new_tokens:
            raise ModelError(
                "peft.apply_lora_to_output=true: the output head gets rows for model.add_tokens, which train themselves"
            )
        model.requires_grad_(False)
        slots = [slot for slot in lm.linears() if slot.role in self.roles]
        if not slots:
            available = sorted({slot.role for slot in lm.linears()})
            raise ModelError(f"LoRA matches no layer: {sorted(self.roles)} chosen, the model has {available}")
        for slot in slots:
            base = slot.module
            self._require_room(slot)
            layer = LoRALinear(base, {ADAPTER: self.adapter(slot)})
            slot.replace(layer.to(next(base.parameters()).device).train(model.training).begin())
        train_new_tokens(model)

    def adapter(self, slot: LinearSlot) -> Adapter:
        """A new adapter of a layer."""
        return Adapter(*self.sizes(slot), self.rank, self.alpha, self.dropout, self.use_rslora)

    @staticmethod
    def sizes(slot: LinearSlot) -> tuple[int, int]:
        """Input and output features of a layer."""
        return int(slot.module.in_features), int(slot.module.out_features)  # type: ignore[arg-type]

    def _require_room(self, slot: LinearSlot) -> None:
        in_features, out_features = self.sizes(slot)
        if self.rank > min(in_features, out_features):
            raise ModelError(
                f"peft.lora_rank={self.rank} is larger than {slot.path} [{out_features} x {in_features}]: "
                f"at most {min(in_features, out_features)}"
            )
