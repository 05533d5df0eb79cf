"""Mistral 7B (Jiang et al., arXiv:2310.06825): a Llama whose layers see a sliding window, where there is one."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.models.config import ModelConfig
from tuner.types import PositiveInt


@dataclass(frozen=True)
class MistralConfig(ModelConfig):
    """See `ModelConfig`.

    Args:
        sliding_window: how many tokens a token sees, itself included; None for all before it (from version 0.2 on).
    """

    sliding_window: PositiveInt | None

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    neutral = {"layer_types": (None,)}  # noqa: RUF012 (a Ministral, whose layers differ)
    absent = {  # noqa: RUF012
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    }

    def window_of(self, layer: int) -> int | None:
        return self.sliding_window
