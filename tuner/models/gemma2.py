"""Gemma 2 (arXiv:2408.00118): a Gemma with capped scores and logits, alternating windows, norms behind each block."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.models.gemma import GemmaConfig
from tuner.models.windows import LayerType, window_by_type
from tuner.types import PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """See `ModelConfig`.

    Args:
        query_pre_attn_scalar: attention scores are divided by its root.
        attn_logit_softcapping: largest magnitude of a score; None leaves them.
        final_logit_softcapping: largest magnitude of a logit; None leaves them.
        sliding_window: how many tokens a token sees in the layers that slide; None for all before it.
        layer_types: `sliding_attention` or `full_attention` for each layer; None alternates, the first one sliding.
    """

    query_pre_attn_scalar: PositiveFloat
    attn_logit_softcapping: PositiveFloat | None
    final_logit_softcapping: PositiveFloat | None
    sliding_window: PositiveInt | None
    layer_types: list[LayerType] | None

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    activation_key = "hidden_activation"
    activation_names = ("gelu_pytorch_tanh",)
    neutral = {"use_bidirectional_attention": (None, False)}  # noqa: RUF012
    absent = {  # noqa: RUF012
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    }
    norms_after_blocks = True

    @property
    def attention_scale(self) -> float:
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def softcaps(self) -> tuple[float | None, float | None]:
        return self.attn_logit_softcapping, self.final_logit_softcapping

    def window_of(self, layer: int) -> int | None:
        return window_by_type(self, self.sliding_window, self.layer_types, layer, slides=layer % 2 == 0)
