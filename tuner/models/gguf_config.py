"""What the keys of a GGUF file say of the model, in the words of a `config.json`.

The keys are those that llama.cpp's converter writes (`conversion/` there, one module a family); where it leaves one out
because its own loader knows the value, the same value is meant here. A key that says something else than it does in
every model of these families is refused, not ignored. What is in no key cannot be read: the converter writes no window
for Mistral, so a file of version 0.1, whose window is 4096 tokens, is read as a model that sees all of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.errors import ModelError, nearest
from tuner.models.config import ModelConfig
from tuner.models.gemma import GemmaConfig
from tuner.models.gemma2 import Gemma2Config
from tuner.models.llama import LlamaConfig
from tuner.models.mistral import MistralConfig
from tuner.models.phi3 import Phi3Config
from tuner.models.qwen2 import Qwen2Config
from tuner.models.qwen3 import Qwen3Config
from tuner.models.rope import rope_frequencies

ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "llama": LlamaConfig,  # Mistral, SmolLM2 and Code Llama too
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
"""`general.architecture` to the family that reads it."""

REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Keys below the architecture's name that every file has, and what a `config.json` calls them."""

WINDOW = {"attention.sliding_window": "sliding_window"}
OF_FAMILY: dict[str, dict[str, str]] = {
    "llama": WINDOW,
    "gemma2": {
        **WINDOW,
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "phi3": WINDOW,
}
"""Further keys of one architecture, and what a `config.json` calls them."""

READ_HERE = (
    *("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor"),
)
COUNTS = (
    *("embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "rope.dimension_count"),
)
OF_LONG_ROPE = ("rope.scaling.original_context_length", "rope.scaling.attn_factor")

SAYS_NOTHING = ("vocab_size", "attention.value_length", "tensor_data_layout", "rope.scaling.finetuned")
"""The first two follow from shapes, which are held against the tensors; the others describe how the file was made."""

NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "pooling_type": 0, "attention.causal": True}
"""Keys of other models, with the value at which they do nothing."""

LAYERS_OF_GEMMA2_27B = 46
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What is the same in every Llama from 3.1 on; only the factor differs."""

ROUNDING = 1e-5
"""Relative: two orders of a handful of fp32 operations; another factor or context is off by far more."""


def config_of(
    meta: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope: Mapping[str, Tensor]
) -> ModelConfig:
    """The configuration of a GGUF file.

    Args:
        meta: value of each key of the file.
        shapes: of the tensors, by their names in the file, in PyTorch's order of dimensions.
        rope: the tensors that hold a number for each rotary frequency, by their names in the file.

    Raises:
        ModelError: another architecture, a key that is missing or would be ignored, or what the family refuses.
    """
    architecture = str(meta.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        known = nearest(architecture, ARCHITECTURES)
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; {known}")
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): plain(value) for key, value in meta.items() if key.startswith(prefix)}
    _refuse_unsupported(architecture, keys)
    names = REQUIRED | OF_FAMILY.get(architecture, {})
    config = {names[key]: value for key, value in keys.items() if key in names}
    config |= _shape(architecture, keys, shapes) | _rope(keys, rope, config)
    if "sliding_window" in config:
        config["sliding_window"] = config["sliding_window"] or None  # 0 is none
    slides = architecture == "llama" and config.get("sliding_window") is not None
    family = MistralConfig if slides else ARCHITECTURES[architecture]
    return family.from_hugging_face(config, None)


def _refuse_unsupported(architecture: str, keys: Mapping[str, Any]) -> None:
    needed = [*REQUIRED, *(WINDOW if architecture == "phi3" else ())]
    if missing := [key for key in needed if key not in keys]:
        raise ModelError(f"lacks {', '.join(f'{architecture}.{key}' for key in missing)}")
    long_rope = OF_LONG_ROPE if architecture == "phi3" else ()
    read = (*REQUIRED, *OF_FAMILY.get(architecture, {}), *READ_HERE, *long_rope, *SAYS_NOTHING)
    for key, value in keys.items():
        # Settings of a scaling that is not supported: what is said of its type says it all.
        if key in read or (key in NEUTRAL and value == NEUTRAL[key]) or key.startswith("rope.scaling."):
            continue
        raise ModelError(f"{architecture}.{key}={value!r} is not supported")
    for key, value in keys.items():
        if key in read and isinstance(value, list):
            raise ModelError(f"{architecture}.{key} has a value for each layer, which is not supported")
        if key in COUNTS and not (isinstance(value, int) and value > 0):
            raise ModelError(f"{architecture}.{key}={value!r} is no whole number > 0")


def _shape(architecture: str, keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What is left out of a file where it follows from the rest, or is told by the tensors."""
    heads = keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", keys["embedding_length"] // heads)
    rotated = keys.get("rope.dimension_count", head_dim)
    # As llama.cpp: the largest Gemma 2 divides by what the size of a head would be if all heads made up the width.
    scalar = keys["embedding_length"] // heads if keys["block_count"] == LAYERS_OF_GEMMA2_27B else head_dim
    if "token_embd.weight" not in shapes:
        raise ModelError("lacks the tensor token_embd.weight")
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "partial_rotary_factor": rotated / head_dim,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes and "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "query_pre_attn_scalar": scalar,
    }


def _rope(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    theta = keys.get("rope.freq_base", 10000.0)
    kind = keys.get("rope.scaling.type", "none")
    scaling: dict[str, Any] | None = None
    if "rope_factors_long.weight" in tensors:
        scaling = _long_rope(keys, tensors, config)
    elif "rope_freqs.weight" in tensors:
        head_dim = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
        scaling = llama3_scaling(tensors["rope_freqs.weight"], theta, head_dim)
    elif kind != "none":
        scaling = {"rope_type": kind, "factor": keys.get("rope.scaling.factor", 1.0)}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _long_rope(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    lists = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    if missing := [name for name in lists.values() if name not in tensors]:
        raise ModelError(f"lacks the tensor {missing[0]}")
    if (key := "rope.scaling.original_context_length") not in keys:
        raise ModelError(f"has rope_factors_long.weight and lacks {key}")
    scaling: dict[str, Any] = {key: [plain(value) for value in tensors[name].tolist()] for key, name in lists.items()}
    scaling |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
    }
    stretched = config["max_position_embeddings"] / keys["rope.scaling.original_context_length"]
    usual = math.sqrt(1 + math.log(stretched) / math.log(keys["rope.scaling.original_context_length"]))
    said = keys.get("rope.scaling.attn_factor", usual)
    if not math.isclose(said, usual, rel_tol=ROUNDING):
        scaling["attention_factor"] = said
    return scaling


def llama3_scaling(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The scaling of Llama 3.1 and later from what llama.cpp's converter makes of it.

    It stores, for each frequency, by how much it is divided: the lowest by `factor`, the highest by 1. The other
    settings are the same in all published models and are recognised by what they make of the frequencies between.

    Args:
        factors: fp32 [head_dim / 2], the fastest frequency first.
        theta: base of the wavelengths.
        head_dim: size of a head.

    Returns:
        `rope_scaling` of a `config.json`; None where nothing is divided.

    Raises:
        ModelError: factors that these settings do not make.
    """
    if bool((factors == 1).all()):
        return None
    scaling = {"rope_type": "llama3", "factor": plain(float(factors[-1])), **LLAMA3}
    plainly = rope_frequencies(head_dim, theta, None, None)
    if factors.shape != plainly.shape or not torch.allclose(
        factors, plainly / rope_frequencies(head_dim, theta, scaling, None), rtol=ROUNDING, atol=0.0
    ):
        raise ModelError(
            "rope_freqs.weight holds factors that are not those of Llama 3.1 and later (low_freq_factor=1, "
            "high_freq_factor=4, original_max_position_embeddings=8192), so the scaling cannot be told from them"
        )
    return scaling


def plain(value: Any) -> Any:
    """A key's value; an fp32 number as the shortest decimal that means it, 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
