"""Llama 1 to 3.2, Code Llama and SmolLM2 (Touvron et al., arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783)."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.models.config import ATTENTION, ModelConfig


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """See `ModelConfig`.

    Args:
        attention_bias: biases on q, k, v and o.
        mlp_bias: biases in the MLP.
    """

    attention_bias: bool
    mlp_bias: bool

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    absent = {  # noqa: RUF012
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }

    @property
    def biases(self) -> tuple[str, ...]:
        attention = ATTENTION if self.attention_bias else ()
        return attention + (("gate_proj", "up_proj", "down_proj") if self.mlp_bias else ())
