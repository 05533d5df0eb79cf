"""The decoder that all families share: RMSNorm, rotary positions, grouped queries, a gated MLP, in residual layers.

What differs between families is chosen by a `ModelConfig` and stands here as a part that is there or not. Parameter
names are those of Hugging Face checkpoints; where a checkpoint fuses what is apart here, `ModelConfig.fused` says so.
Letters as in `tuner.types`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tuner.models.attention import (
    EVERYTHING_BEFORE,
    AttentionFn,
    OneText,
    Scoring,
    Visible,
    attention_for,
    cached_attention,
    visible_keys,
)
from tuner.models.cache import KVCache, LayerCache
from tuner.models.config import ModelConfig
from tuner.models.documents import Documents, Lengths
from tuner.models.glu import ACTIVATIONS
from tuner.models.linear import Linear
from tuner.models.rms_norm import RMSNorm
from tuner.models.rope import apply_rope, rope_table
from tuner.types import DeviceType, LinearSlot

ATTENTION_ROLES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
MLP_ROLES = ("gate_proj", "up_proj", "down_proj")


def _norm(config: ModelConfig, size: int) -> RMSNorm:
    return RMSNorm(size, config.rms_norm_eps, config.zero_centered_norms)


class Attention(nn.Module):
    """Self-attention of one layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.size_of_head
        self.window = config.window_of(layer)
        self.scoring = Scoring(config.attention_scale, config.softcaps[0])
        hidden, biases = config.hidden_size, config.biases
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(hidden, queries, bias="q_proj" in biases)
        self.k_proj = Linear(hidden, keys, bias="k_proj" in biases)
        self.v_proj = Linear(hidden, keys, bias="v_proj" in biases)
        self.o_proj = Linear(queries, hidden, bias="o_proj" in biases)
        normed = config.norms_of_queries_and_keys
        self.q_norm = _norm(config, self.head_dim) if normed else None
        self.k_norm = _norm(config, self.head_dim) if normed else None
        self.attention: AttentionFn = attention_for("cpu")

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible: Visible, cache: LayerCache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(B, T, -1, self.head_dim)
        k = self.k_proj(x_BTD).view(B, T, -1, self.head_dim)
        v = self.v_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q.transpose(1, 2), *rope), apply_rope(k.transpose(1, 2), *rope)
        if cache is None:
            out = visible.attend(q, k, v, self.scoring, self.attention)
        else:
            out = cached_attention(q, *cache.append(k, v), self.scoring, self.window, cache.padding)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated feed-forward network of one layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width, biases = config.hidden_size, config.intermediate_size, config.biases
        self.gate_proj = Linear(hidden, width, bias="gate_proj" in biases)
        self.up_proj = Linear(hidden, width, bias="up_proj" in biases)
        self.down_proj = Linear(width, hidden, bias="down_proj" in biases)
        self.activation = ACTIVATIONS[config.activation_names[-1]]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD), self.up_proj(x_BTD)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalised input and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = _norm(config, config.hidden_size)
        self.post_attention_layernorm = _norm(config, config.hidden_size)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible = EVERYTHING_BEFORE,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, visible, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))  # type: ignore[no-any-return]


class SandwichLayer(DecoderLayer):
    """As `DecoderLayer`, with what is added normalised too (Gemma 2).

    Checkpoints call the norm behind attention `post_attention_layernorm`, which elsewhere stands before the MLP.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.pre_feedforward_layernorm = _norm(config, config.hidden_size)
        self.post_feedforward_layernorm = _norm(config, config.hidden_size)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible = EVERYTHING_BEFORE,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BTD), rope, visible, cache)
        x_BTD = x_BTD + self.post_attention_layernorm(attended)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD)))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Embeddings, layers and the last norm: what checkpoints call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layer_of = SandwichLayer if config.norms_after_blocks else DecoderLayer
        # `nn.Embedding(V, D)` would draw numbers, which on the meta device imports PyTorch's compiler: 1 s, 60 MiB.
        embeddings_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings_VD, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(layer_of(config, index) for index in range(config.num_hidden_layers))
        self.norm = _norm(config, config.hidden_size)


class Decoder(nn.Module):
    """A decoder with its output head.

    Args:
        config: family and shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        self.tied = config.tie_word_embeddings
        self.fused = config.fused
        self.logit_softcap = config.softcaps[1]
        self.new_tokens: tuple[int, ...] = ()
        self.device_type: DeviceType = "cpu"
        self.compute_dtype: torch.dtype | None = None
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def tie(self) -> None:
        """Make the head the embedding matrix where the model says so; needed again after weights were replaced."""
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None, documents: Lengths | None = None) -> Tensor:
        """The normalised last hidden states [B, T, D] of tokens [B, T].

        Args:
            tokens_BT: token ids.
            cache: which the tokens continue, where one is given.
            documents: of packed rows, the lengths of each row's documents; the tokens of one see no other's and count
                their positions from its first, and what is behind the last is padding. None for one text a row.
        """
        x_BTD = self.embedded(tokens_BT)
        (B, T), device, config = tokens_BT.shape, tokens_BT.device, self.config
        packed = None if documents is None else Documents(documents, (B, T), device, self.device_type)
        if cache is not None:
            positions = cache.positions(T, device)
        else:
            positions = torch.arange(T, device=device) if packed is None else packed.positions
        rope = rope_table(positions, config.size_of_head, config.rope_theta, config.rope_scaling, x_BTD.dtype)
        visible = self._visible(T, packed, self.compute_dtype or x_BTD.dtype, device) if cache is None else {}
        for index, layer in enumerate(self.layers):
            seen = visible.get(config.window_of(index), EVERYTHING_BEFORE)
            x_BTD = layer(x_BTD, rope, seen, cache.layers[index] if cache else None)
        return self.model.norm(x_BTD)  # type: ignore[no-any-return]

    def _visible(
        self, T: int, packed: Documents | None, dtype: torch.dtype, device: torch.device
    ) -> dict[int | None, Visible]:
        """What layers see, by their window."""
        config = self.config
        windows = {config.window_of(layer) for layer in range(len(self.layers))}
        if packed is None:
            return {window: OneText(visible_keys(T, window, device)) for window in windows}
        scoring = Scoring(config.attention_scale, config.softcaps[0])
        return {window: packed.visible(window, dtype, scoring, config.size_of_head) for window in windows}

    def embedded(self, tokens_BT: Tensor) -> Tensor:
        """The embeddings [B, T, D] that the first layer gets."""
        x_BTD: Tensor = self.model.embed_tokens(tokens_BT)
        if (scale := self.config.embedding_scale) != 1.0:
            x_BTD = x_BTD * float(torch.tensor(scale, dtype=x_BTD.dtype, device="cpu"))  # rounded as the reference does
        return x_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        logits: Tensor = self.lm_head(hidden_BTD)
        return logits if self.logit_softcap is None else softcapped(logits, self.logit_softcap)

    def forward(self, tokens_BT: Tensor, documents: Lengths | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; `documents` as for `hidden`."""
        return self.logits(self.hidden(tokens_BT, documents=documents))

    def linears(self) -> Iterator[LinearSlot]:
        """Every linear layer with the role that configuration keys name it by."""
        yield from self.quantizable()
        yield LinearSlot("output", self, "lm_head", "lm_head")

    def quantizable(self) -> Iterator[LinearSlot]:
        """The linear layers of the blocks; embeddings and head keep their precision, as in the QLoRA paper."""
        for index, layer in enumerate(self.layers):
            path = f"model.layers.{index}"
            for name, role in ATTENTION_ROLES.items():
                yield LinearSlot(role, layer.self_attn, name, f"{path}.self_attn.{name}")  # type: ignore[arg-type]
            for name in MLP_ROLES:
                yield LinearSlot("mlp", layer.mlp, name, f"{path}.mlp.{name}")  # type: ignore[arg-type]

    def compute_in(self, dtype: torch.dtype) -> None:
        """Give all linear layers, and so attention, inputs of `dtype`; weights and residual stream keep theirs.

        It is the norms that do it: every linear layer's input comes from one, or from linear layers by way of
        attention or the activation, and a linear layer computes in the dtype of its input.
        """
        self.compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.out_dtype = dtype

    def compile_layers(self) -> None:
        """Compile each layer with `torch.compile`; one compilation serves all, since their code is the same."""
        for layer in self.layers:
            layer.compile()

    def use_kernels(self, device_type: DeviceType) -> None:
        """Choose what is computed differently on `cpu` and `cuda`: attention, and in what pieces the loss is taken.

        A choice of its own and not that of the tensors' device, so that memory on a GPU can be predicted without one.
        """
        self.device_type = device_type
        for layer in self.layers:
            layer.self_attn.attention = attention_for(device_type)  # type: ignore[union-attr]


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """`cap * tanh(logits / cap)`, in the place of the logits where no gradient is wanted."""
    if torch.is_grad_enabled():
        return torch.tanh(logits / cap) * cap
    return logits.div_(cap).tanh_().mul_(cap)
