"""What `adapter_config.json` says of an adapter: the settings of Hugging Face PEFT that are applied here.

Read where a configuration is composed, so that an adapter that cannot be loaded is refused before a model is, and where
it is loaded: hence a module of the bottom, without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuner.errors import ModelError

CONFIG = "adapter_config.json"
LORA, IA3, LN_TUNING = "LORA", "IA3", "LN_TUNING"
UNDERSTOOD_OF_ALL = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("target_modules", "exclude_modules", "modules_to_save", "inference_mode", "runtime_config"),
}
UNDERSTOOD = {
    LORA: {
        *("r", "layers_to_transform", "layers_pattern", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
        *("ensure_weight_tying", "trainable_token_indices", "bias", "use_rslora", "use_dora", "init_lora_weights"),
        *("megatron_core", "qalora_group_size"),
    },
    IA3: {"feedforward_modules", "init_ia3_weights"},
    LN_TUNING: set(),
}
"""Kinds of adapters with the settings of PEFT which are applied here, or say nothing about what a saved adapter
computes. Any other that is set is refused: a setting that were ignored would give another model in silence."""

MATRICES = ("model.embed_tokens", "lm_head")
"""The matrices that have a row for each token."""

CAUSAL_LM, ALL_LINEAR = "CAUSAL_LM", "all-linear"
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` under which PEFT changes the base weights too."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one adapter.

    Attributes:
        kind: `peft_type`, a key of `UNDERSTOOD`; what is said of ranks and scales is of LoRA alone.
        base: `base_model_name_or_path`: a folder, or a name on the Hugging Face Hub.
        revision: of that name.
        rank, alpha: of the layers that no pattern names.
        dropout: `lora_dropout`.
        use_rslora: the scale is alpha / sqrt(rank).
        rank_pattern, alpha_pattern: regular expressions of layer names, the first that matches holds.
        target_modules: ends of the names of adapted layers, or a regular expression of whole names; None: not said.
        layers_to_transform: numbers of the blocks that are adapted where `target_modules` are ends of names; none: all.
        modules_to_save: ends of the names of modules whose full weights are saved along.
        ensure_weight_tying: embedding and head of a tied model stay one matrix when they are saved along.
        token_rows: ids of the tokens whose rows are saved along, by the name of the matrix: of `MATRICES`.
        use_dora: each layer has magnitudes beside its matrices.
        feedforward_modules: of (IA)³, ends of names of layers whose inputs are scaled, or one regular expression.
    """

    kind: str
    base: str | None
    revision: str | None
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str | None
    layers_to_transform: tuple[int, ...]
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    token_rows: Mapping[str, tuple[int, ...]]
    use_dora: bool
    feedforward_modules: tuple[str, ...] | str

    def rank_of(self, path: str) -> int:
        """R of the layer of this name in the checkpoint."""
        return _matching(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Alpha of the layer of this name in the checkpoint."""
        return _matching(self.alpha_pattern, path, self.alpha)

    def is_target(self, path: str) -> bool:
        """Whether PEFT adapts the layer of this name (`check_target_module_exists`); others it leaves out."""
        if self.target_modules is None or self.target_modules == ALL_LINEAR:
            return True
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return _names(self.target_modules, path)
        block = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        is_in_block = not self.layers_to_transform or (block is not None and int(block[1]) in self.layers_to_transform)
        return is_in_block and _names(self.target_modules, path)

    def is_feedforward(self, path: str) -> bool:
        """Whether it is the input of the layer of this name that (IA)³ scales; PEFT compares ends of names."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, path) is not None
        return path.endswith(self.feedforward_modules)

    def is_saved(self, path: str) -> bool:
        """Whether the module of this name, or one it is part of, is saved whole; PEFT compares ends of names."""
        parts = path.split(".")
        wholes = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(whole.endswith(name) for whole in wholes for name in self.modules_to_save)


Value = TypeVar("Value")


def _matching(patterns: Mapping[str, Value], path: str, otherwise: Value) -> Value:
    """As `peft.utils.other.get_pattern_key` chooses."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, otherwise)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings of the adapter in `folder`.

    Raises:
        ModelError: no such file, not JSON, or of a kind or with a setting that cannot be loaded here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder}: no {CONFIG}, so this is no adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    if problem := _refusal(config) or _malformed(config):
        raise ModelError(f"{path}: {problem}")
    targets, feedforward = config.get("target_modules"), config.get("feedforward_modules") or ()
    return AdapterConfig(
        kind=config["peft_type"],
        base=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        rank=config.get("r") or 0,
        alpha=config.get("lora_alpha") or 0,
        dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        target_modules=targets if isinstance(targets, str | None) else tuple(targets),
        layers_to_transform=_numbers(config.get("layers_to_transform")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        token_rows={_matrix(name): tuple(ids) for name, ids in _tokens_by_name(config).items() if ids},
        use_dora=bool(config.get("use_dora")),
        feedforward_modules=feedforward if isinstance(feedforward, str) else tuple(feedforward),
    )


def _refusal(config: Mapping[str, Any]) -> str | None:
    """What of an adapter cannot be loaded here."""
    if (kind := config.get("peft_type")) not in UNDERSTOOD:
        return f"peft_type={kind} is not supported; valid: {', '.join(UNDERSTOOD)}"
    if used := [key for key, value in config.items() if value and key not in UNDERSTOOD_OF_ALL | UNDERSTOOD[kind]]:
        return f"{', '.join(used)} cannot be loaded here"
    if (task := config.get("task_type")) not in (None, CAUSAL_LM):
        return f"task_type={task} is not supported; valid: {CAUSAL_LM}"
    if str(init := config.get("init_lora_weights")).startswith(MOVES_THE_BASE):
        return f"init_lora_weights={init} changes the base weights too, which cannot be loaded here"
    if (bias := config.get("bias", "none")) != "none":
        return f"bias={bias} is not supported; valid: none"
    return None


def _tokens_by_name(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`trainable_token_indices` by the names it gives; a list alone is of the embedding."""
    given = config.get("trainable_token_indices") or {}
    return given if isinstance(given, dict) else {"embed_tokens": given}


def _matrix(name: str) -> str:
    """The full name of a matrix, of which PEFT takes an end."""
    return next((matrix for matrix in MATRICES if f".{matrix}".endswith(f".{name}")), "")


def _malformed_tokens(config: Mapping[str, Any]) -> str | None:
    tokens = _tokens_by_name(config)
    for name, ids in tokens.items():
        if not _matrix(name):
            return f"trainable_token_indices: {name} cannot be loaded here; valid: embed_tokens, lm_head"
        if not isinstance(ids, list) or not all(type(id_) is int and id_ >= 0 for id_ in ids):
            return f"trainable_token_indices: expected lists of whole numbers >= 0 and {name} has {ids}"
        if len(set(ids)) != len(ids):
            return f"trainable_token_indices: {name} names a token twice"
    modules = config.get("modules_to_save") or []
    if tokens and any(_matrix(name) for name in modules):
        return f"modules_to_save={modules} together with trainable_token_indices cannot be loaded here"
    return None


def _malformed(config: Mapping[str, Any]) -> str | None:
    """The first of the settings that is read and is not what it should be."""
    modules = config.get("modules_to_save") or []
    dropout = config.get("lora_dropout") or 0.0
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            return f"{key}={config[key]}: expected text"
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(config.get(key), bool | None):
            return f"{key}={config[key]!r}: expected true or false"
    is_lora = config["peft_type"] == LORA
    if is_lora and not _is_positive(config.get("r"), int):
        return f"r={config.get('r')}: expected a whole number > 0"
    if is_lora and not _is_positive(config.get("lora_alpha"), int | float):
        return f"lora_alpha={config.get('lora_alpha')}: expected a number > 0"
    if dropout and not (_is_positive(dropout, int | float) and dropout < 1):
        return f"lora_dropout={dropout}: expected a number >= 0 < 1"
    blocks = config.get("layers_to_transform")
    for key in ("target_modules", "feedforward_modules"):
        if not (isinstance(named := config.get(key), str | None) or _is_list_of(str, named)):
            return f"{key}={named}: expected names of layers or one regular expression"
        if isinstance(named, str) and not _is_expression(named):
            return f"{key}={named}: no regular expression"
    if not (isinstance(blocks, int | None) or _is_list_of(int, blocks)):
        return f"layers_to_transform={blocks}: expected numbers of blocks"
    if not (isinstance(modules, list) and all(isinstance(name, str) and name for name in modules)):
        return f"modules_to_save={modules}: expected a list of names"
    for key, pattern, number in zip(("rank_pattern", "alpha_pattern"), patterns, (int, int | float), strict=True):
        if not isinstance(pattern, dict) or not all(_is_positive(value, number) for value in pattern.values()):
            return f"{key}={pattern}: expected numbers > 0 by the names of layers"
        if wrong := [name for name in pattern if not _is_expression(name)]:
            return f"{key}: {wrong[0]} is no regular expression"
    return _malformed_tokens(config)


def _names(modules: str | tuple[str, ...], path: str) -> bool:
    """Whether a regular expression of whole names, or ends of names, name this one."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules)


def _numbers(given: int | list[int] | None) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given or ())


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _is_expression(text: str) -> bool:
    try:
        re.compile(f"({text})")
    except re.error:
        return False
    return True
