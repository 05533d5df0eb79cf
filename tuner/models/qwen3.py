"""Qwen3 (arXiv:2505.09388): norms on the queries and keys of each head in place of Qwen2's biases."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.models.config import ATTENTION
from tuner.models.qwen2 import Qwen2Config


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """See `Qwen2Config`.

    Args:
        attention_bias: biases on q, k, v and o.
    """

    attention_bias: bool

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    absent = {  # noqa: RUF012
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "attention_bias": False,
    }
    norms_of_queries_and_keys = True

    @property
    def biases(self) -> tuple[str, ...]:
        return ATTENTION if self.attention_bias else ()
