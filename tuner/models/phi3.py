"""Phi-3 mini (arXiv:2404.14219): a Llama whose checkpoints fuse q, k and v, and gate and up, each into one matrix.

Here the parts are layers of their own, so that each can be adapted by its name; loading takes the fused matrices apart
and saving puts them together, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuner.models.config import ModelConfig
from tuner.types import PositiveInt

LONGROPE_NAMES = ("su", "yarn", "longrope")
"""Earlier folders call the same scaling by the first two, as transformers reads them for this family."""


@dataclass(frozen=True)
class Phi3Config(ModelConfig):
    """See `ModelConfig`.

    Args:
        sliding_window: how many tokens a token sees, itself included; None for all before it.
    """

    sliding_window: PositiveInt | None

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    neutral = {"resid_pdrop": (0, None), "embd_pdrop": (0, None)}  # noqa: RUF012
    absent = {  # noqa: RUF012
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
    fused = {  # noqa: RUF012
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }

    @classmethod
    def rope_of(
        cls, config: Mapping[str, Any], where: str
    ) -> tuple[float, dict[str, float | str | list[float]] | None]:
        """As for every family; the first context stands beside the scaling and not in it."""
        theta, scaling = super().rope_of(config, where)
        if scaling is not None and scaling["rope_type"] in LONGROPE_NAMES:
            longest = config.get("max_position_embeddings", cls.absent["max_position_embeddings"])
            scaling["rope_type"] = "longrope"
            first = scaling.setdefault(
                "original_max_position_embeddings", config.get("original_max_position_embeddings", 4096)
            )
            scaling.setdefault("factor", longest / first)
        return theta, scaling

    def to_hugging_face(self) -> dict[str, Any]:
        first = (self.rope_scaling or {}).get("original_max_position_embeddings", self.max_position_embeddings)
        return {**super().to_hugging_face(), "original_max_position_embeddings": first}

    def window_of(self, layer: int) -> int | None:
        return self.sliding_window
