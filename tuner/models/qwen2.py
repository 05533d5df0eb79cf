"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): a Llama with biases on q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.models.config import ModelConfig
from tuner.models.windows import LayerType, window_by_type
from tuner.types import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class Qwen2Config(ModelConfig):
    """See `ModelConfig`.

    Args:
        use_sliding_window: whether `sliding_window` counts at all.
        sliding_window: how many tokens a token sees in the layers that slide, itself included.
        max_window_layers: the first layer that slides, counted from 0.
        layer_types: `sliding_attention` or `full_attention` for each layer, in place of `max_window_layers`.
    """

    use_sliding_window: bool
    sliding_window: PositiveInt | None
    max_window_layers: NonNegativeInt
    layer_types: list[LayerType] | None

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    absent = {  # noqa: RUF012
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }

    @property
    def biases(self) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj")

    def window_of(self, layer: int) -> int | None:
        window = self.sliding_window if self.use_sliding_window else None
        return window_by_type(self, window, self.layer_types, layer, slides=layer >= self.max_window_layers)
