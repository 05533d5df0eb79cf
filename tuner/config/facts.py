"""What is true of a configuration, by names, for the rules to judge: its keys, its members, the shape of its model.

Of a model in a folder or on the hub it is `config.json` that says the shape, and not the keys of a preset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from tuner.config.signatures import constant_of, definitions, signature_of
from tuner.errors import ConfigError
from tuner.hub import cached_config
from tuner.hub_errors import is_repository

PLACES = ("model.path", "model.source", "model.revision", "model.add_tokens", "model.chat_template")
"""Facts that say where a model is and what it learns, and not what it is."""


def facts_of(config: Mapping[str, Any], wrong: Container[str] = ()) -> dict[str, Any]:
    """The facts rules read, from plain resolved containers.

    Args:
        config: the configuration.
        wrong: keys whose values are no facts, because they are of a wrong kind.

    Raises:
        ConfigError: `model.path` names no folder with a readable config.json; or there is a `model.source`, and the
            extra `hub` is not installed.
    """
    facts: dict[str, Any] = {}
    for group, node in config.items():
        if isinstance(node, Mapping) and group not in wrong:
            facts |= {f"{group}.{key}": value for key, value in node.items()}
            if isinstance(target := node.get("_target_"), str):
                facts[group] = target.split(".")[-2] if "." in target else target
        elif group not in wrong:
            facts[group] = node
    facts = {name: value for name, value in facts.items() if name not in wrong}
    if facts.get("model.path") is not None and facts.get("model.source") is None:
        facts |= {f"model.{key}": value for key, value in shape_of_folder(facts["model.path"]).items()}
    elif facts.get("model.source") is not None:
        facts = {name: value for name, value in facts.items() if not name.startswith("model.") or name in PLACES}
        facts |= {f"model.{key}": value for key, value in shape_of_source(facts).items()}
    for name, (sources, derive) in DERIVED.items():
        if all(source in facts for source in sources):
            facts[name] = derive(*(facts[source] for source in sources))
    return facts


def shape_of_source(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of `model.source`, empty where it is not in the cache: a check asks no hub.

    The shape keys of a configuration say nothing about it, so rules about the shape are judged once it is cached, which
    freezing a run sees to.
    """
    source, revision = facts["model.source"], facts.get("model.revision")
    is_there = is_repository(source) and facts.get("model.path") is None
    found = cached_config(source, revision) if is_there else None
    return shape_of_folder(str(found.parent)) if found else {}


def shape_of_folder(folder: str) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "a file" if path.exists() else "no such folder"
        raise ConfigError(f"model.path={folder}: {what}; expected a Hugging Face folder with a config.json")
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path={folder}: no config.json in it; expected a Hugging Face folder")
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path={folder}: config.json is not JSON ({error})") from error
    if not isinstance(shape, dict):
        raise ConfigError(f"model.path={folder}: config.json holds no object")
    _require_kinds(file, shape)
    # Both may be left out of a config.json: K is H then, and E is D / H.
    return {"num_key_value_heads": None, "head_dim": None, **absent_of(shape.get("model_type")), **shape}


def absent_of(model_type: Any) -> dict[str, Any]:
    """What keys mean that a `config.json` of this family leaves out; nothing for a family that is not known."""
    family = _family_of(model_type)
    return {} if family is None else dict(constant_of(family, "absent"))


def _family_of(model_type: Any) -> str | None:
    """The class that reads a `config.json` of this family, None for one that is not known."""
    if not isinstance(model_type, str) or not model_type.isidentifier():
        return None
    try:
        families = definitions(f"tuner.models.{model_type}")
    except LookupError:
        return None
    name = next((name for name in families if name.lower() == f"{model_type}config"), None)
    return None if name is None else f"tuner.models.{model_type}.{name}"


def _require_kinds(file: Path, shape: Mapping[str, Any]) -> None:
    """Refuse values of another type or out of bounds; K may be null and is H then.

    Raises:
        ConfigError: naming all of them.
    """
    family = _family_of(shape.get("model_type"))
    keys = {} if family is None else signature_of(family).keys
    wrong = [
        f"{file}: {key}={value!r}: expected {keys[key].text}"
        for key, value in shape.items()
        if key in keys and key != "rope_scaling" and not keys[key].accepts(value)
        if not (key == "num_key_value_heads" and value is None)
    ]
    if wrong:
        raise ConfigError(wrong)


def smallest_adapted_dimension(
    hidden: int,
    intermediate: int,
    vocab: int,
    heads: int,
    key_value_heads: int | None,
    head_dim: int | None,
    modules: list[str],
    mlp: bool,
    output: bool,
) -> int:
    """The smallest side of the matrices LoRA adapts: the largest rank a product B @ A can have there."""
    size = head_dim or hidden // heads
    key_value = (key_value_heads or heads) * size
    sides = {"q_proj": heads * size, "k_proj": key_value, "v_proj": key_value, "output_proj": heads * size}
    adapted = [sides[name] for name in modules if name in sides]
    return min([hidden, *adapted, *[intermediate] * mlp, *[vocab] * output])


DERIVED: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "smallest adapted dimension": (
        (
            "model.hidden_size",
            "model.intermediate_size",
            "model.vocab_size",
            "model.num_attention_heads",
            "model.num_key_value_heads",
            "model.head_dim",
            "peft.lora_attn_modules",
            "peft.apply_lora_to_mlp",
            "peft.apply_lora_to_output",
        ),
        smallest_adapted_dimension,
    )
}
