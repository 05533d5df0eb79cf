"""The Llama family of decoders (Touvron et al., arXiv:2302.13971): RMSNorm, rotary positions, grouped queries, SwiGLU.

Parameter names are those of Hugging Face checkpoints, so a folder loads and saves without a map of names. Letters as in
`tuner.types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.models.attention import AttentionFn, cached_attention, causal_attention_for
from tuner.models.cache import KVCache, LayerCache
from tuner.models.rms_norm import RMSNorm
from tuner.models.rope import apply_rope, rope_table, scaling_problem
from tuner.models.swiglu import swiglu
from tuner.types import LinearSlot, PositiveFloat, PositiveInt

ATTENTION_ROLES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
MLP_ROLES = ("gate_proj", "up_proj", "down_proj")
REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class LlamaConfig:
    """Where a Llama's weights come from and, unless a folder says it, its shape.

    Args:
        path: a Hugging Face folder; its `config.json` then gives the shape.
        package: an installed package that carries the weights as a GGUF file, converted once into such a folder.
        random_weights: start from random weights and the small packaged tokenizer: for tests and trials.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: H.
        num_key_value_heads: K, a divisor of H.
        head_dim: E; None is D / H.
        max_position_embeddings: longest sequence the model was trained for.
        rms_norm_eps: epsilon of every norm.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched for a longer context, in the words of `config.json`: `rope_type` (`linear`
            or `llama3`), `factor` and, for llama3, `low_freq_factor`, `high_freq_factor` and
            `original_max_position_embeddings`; None leaves them as they are.
        tie_word_embeddings: whether the output head is the embedding matrix.
        attention_bias: biases on q, k, v and o.
        mlp_bias: biases in the MLP.
    """

    path: str | None
    package: str | None
    random_weights: bool
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt | None
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_scaling: dict[str, float | str] | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    def __post_init__(self) -> None:
        """Raises ModelError for a `rope_scaling` that is not one."""
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))  # plain, for config.json
            if problem := scaling_problem(self.rope_scaling):
                raise ModelError(f"model.rope_scaling: {problem}")

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], path: str | None) -> LlamaConfig:
        """The configuration a `config.json` of either generation describes.

        Raises:
            ModelError: a missing key, or a value that this family would otherwise ignore.
        """
        where = f"{path}/config.json" if path else "config.json"
        theta, scaling = _rope_of(config, where)
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ModelError(f"{where}: hidden_act={activation!r} is not supported; valid: silu")
        if missing := [key for key in REQUIRED_KEYS if key not in config]:
            raise ModelError(f"{where} lacks {', '.join(missing)}")
        heads = config["num_attention_heads"]
        return cls(
            path=path,
            package=None,
            random_weights=False,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim"),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The `config.json`, with the rotary settings in both spellings, that of transformers 4 and of 5."""
        shape = {k: v for k, v in asdict(self).items() if k not in ("path", "package", "random_weights")}
        return {
            **shape,
            "head_dim": self.size_of_head,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
        }

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def build(self) -> Llama:
        """The model with parameters as PyTorch initialises them, on the current default device."""
        return Llama(self)


def _rope_of(config: Mapping[str, Any], where: str) -> tuple[float, dict[str, float | str] | None]:
    """The base of the wavelengths and their scaling, from the keys of transformers 5 or of 4.

    Raises:
        ModelError: a scaling that is not supported or not whole.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {key: value for key, value in given.items() if value is not None}
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    oldest = rope.pop("type", "default")
    scaling = {"rope_type": rope.pop("rope_type", oldest), **rope}
    partial = scaling.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor={partial} is not supported; valid: 1.0")
    if scaling["rope_type"] == "default":
        return theta, None
    if problem := scaling_problem(scaling):
        raise ModelError(f"{where}: {problem}")
    return theta, scaling


class Attention(nn.Module):
    """Self-attention of one layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.size_of_head
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)
        self.attention: AttentionFn = causal_attention_for("cpu")

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        out = self.attention(q, k, v) if cache is None else cached_attention(q, *cache.append(k, v), cache.padding)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated feed-forward network of one layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalised input and added to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: what checkpoints call `model`."""

    def __init__(self, embed_tokens: nn.Embedding, layers: list[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class Llama(nn.Module):
    """A Llama decoder with its output head.

    Args:
        config: the shape.

    Raises:
        ModelError: if the heads do not divide.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % kv_heads:
            whose = f"{config.path}: " if config.path else "model."
            raise ModelError(f"{whose}num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
        if config.head_dim is None and config.hidden_size % heads:
            raise ModelError(f"hidden_size={config.hidden_size} is no multiple of {heads} heads: give model.head_dim")
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        self.tied = config.tie_word_embeddings
        self.model = Decoder(
            nn.Embedding(config.vocab_size, config.hidden_size),
            [DecoderLayer(config) for _ in range(config.num_hidden_layers)],
            RMSNorm(config.hidden_size, config.rms_norm_eps),
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def tie(self) -> None:
        """Make the head the embedding matrix where the model says so; needed again after weights were replaced."""
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised last hidden states [B, T, D] of tokens [B, T], which continue `cache` where one is given."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        T, device = tokens_BT.shape[1], tokens_BT.device
        positions = cache.positions(T, device) if cache else torch.arange(T, device=device)
        config = self.config
        rope = rope_table(positions, config.size_of_head, config.rope_theta, config.rope_scaling, x_BTD.dtype)
        for index, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rope, cache.layers[index] if cache else None)
        return self.model.norm(x_BTD)  # type: ignore[no-any-return]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        return self.lm_head(self.hidden(tokens_BT))  # type: ignore[no-any-return]

    def linears(self) -> Iterator[LinearSlot]:
        """Every linear layer with the role that configuration keys name it by."""
        for index, layer in enumerate(self.model.layers):
            path = f"model.layers.{index}"
            for name, role in ATTENTION_ROLES.items():
                yield LinearSlot(role, layer.self_attn, name, f"{path}.self_attn.{name}")  # type: ignore[arg-type]
            for name in MLP_ROLES:
                yield LinearSlot("mlp", layer.mlp, name, f"{path}.mlp.{name}")  # type: ignore[arg-type]
        yield LinearSlot("output", self, "lm_head", "lm_head")

    def quantizable(self) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
        """The linear layers of the blocks; embeddings and head keep their precision, as in the QLoRA paper."""
        for slot in self.linears():
            if slot.role != "output":
                yield slot.parent, slot.name, slot.module  # type: ignore[misc]

    def compile_layers(self) -> None:
        """Compile each layer with `torch.compile`; one compilation serves all, since their code is the same."""
        for layer in self.model.layers:
            layer.compile()

    def use_attention(self, device_type: str) -> None:
        """Choose the attention kernel for `cpu` or `cuda`."""
        for layer in self.model.layers:
            layer.self_attn.attention = causal_attention_for(device_type)  # type: ignore[union-attr]
