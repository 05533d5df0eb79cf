"""Gemma (arXiv:2403.08295): scaled embeddings, a GELU gate, norms whose weights are centred on zero, a tied head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tuner.models.config import ATTENTION, ModelConfig


@dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """See `ModelConfig`.

    Args:
        attention_bias: biases on q, k, v and o.
    """

    attention_bias: bool

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    # The first folders say `gelu` and mean its tanh form, as transformers reads them.
    activation_names: ClassVar[tuple[str, ...]] = ("gelu", "gelu_pytorch_tanh")
    neutral = {  # noqa: RUF012
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "use_bidirectional_attention": (None, False),
    }
    absent = {  # noqa: RUF012
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    zero_centered_norms = True

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size)

    @property
    def biases(self) -> tuple[str, ...]:
        return ATTENTION if self.attention_bias else ()
