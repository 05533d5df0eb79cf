"""What the choices of different groups say about each other, as one table.

A rule reads facts by name and gets their values in that order. A fact is a key (`peft.lora_rank`), a group's member by
the name of its YAML (`quantization` is `nf4`), or one of `DERIVED`. A rule of which a fact is absent does not apply: a
configuration without an adapter has no rank. `check` and a sweep's plan judge by the same table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """One thing that cannot be.

    Attributes:
        name: what a sweep's table calls it.
        facts: what it reads.
        broken: whether these values break it.
        sentence: what is wrong and what to do, `{0}`, `{1}` being the values.
    """

    name: str
    facts: tuple[str, ...]
    broken: Callable[..., bool]
    sentence: str


RULES = (
    Rule(
        "out_is_named",
        ("out",),
        lambda out: isinstance(out, str) and not out.strip(),
        "out={0}: expected the name of a run folder",
    ),
    Rule(
        "qlora_needs_quantization",
        ("peft.name", "quantization"),
        lambda name, quantization: name == "qlora" and quantization == "none",
        "peft=qlora quantization={1}: QLoRA is LoRA over a quantized base; say peft=lora for weights as they are",
    ),
    Rule(
        "full_needs_dense_weights",
        ("peft", "quantization"),
        lambda peft, quantization: peft == "full" and quantization != "none",
        "peft=full quantization={1}: quantized weights cannot be trained; say peft=qlora, or quantization=none",
    ),
    Rule(
        "lora_adapts_something",
        ("peft.lora_attn_modules", "peft.apply_lora_to_mlp", "peft.apply_lora_to_output"),
        lambda attention, mlp, output: not (attention or mlp or output),
        "peft.lora_attn_modules=[] peft.apply_lora_to_mlp=false peft.apply_lora_to_output=false: LoRA on no module; "
        "name at least one of q_proj, k_proj, v_proj, output_proj, or set one of the two to true",
    ),
    Rule(
        "output_lora_on_tied_embeddings",
        ("peft.apply_lora_to_output", "model.tie_word_embeddings"),
        lambda output, tied: output and tied,
        "peft.apply_lora_to_output=true: this model's output layer is its embedding matrix "
        "(model.tie_word_embeddings), so an adapter on one would have to be merged into both; set it to false",
    ),
    Rule(
        "lora_rank_within_matrix",
        ("peft.lora_rank", "smallest adapted dimension"),
        lambda rank, smallest: rank > smallest,
        "peft.lora_rank={0}: larger than the smallest side of an adapted matrix, {1}; valid: 1 to {1}",
    ),
    Rule(
        "full_trains_what_it_computes_with",
        ("peft", "precision", "precision.trainable"),
        lambda peft, precision, trainable: peft == "full" and trainable not in ("auto", precision),
        "precision.trainable={2} precision={1} peft=full: full training computes with the very weights it trains; "
        "say precision={2}, or precision.trainable=auto",
    ),
    Rule(
        "warmup_within_run",
        ("schedule.warmup_steps", "train.max_steps"),
        lambda warmup, steps: None not in (warmup, steps) and warmup > steps,
        "schedule.warmup_steps={0}: longer than the run, train.max_steps={1}; say schedule.warmup_steps=0",
    ),
    Rule(
        "steps_or_epochs",
        ("train.max_steps", "train.epochs"),
        lambda steps, epochs: (steps is None) == (epochs is None),
        "train.max_steps={0} train.epochs={1}: the length of a run is one of the two; say train.max_steps=null "
        "train.epochs=N, or train.max_steps=N train.epochs=null",
    ),
    Rule(
        "sequence_within_context",
        ("data.max_seq_len", "model.max_position_embeddings"),
        lambda length, context: length is not None and length > context,
        "data.max_seq_len={0}: longer than the model's context, {1} tokens",
    ),
)


def broken_rules(facts: Mapping[str, Any]) -> Iterator[tuple[Rule, str]]:
    """The rules that `facts` break, each with its sentence."""
    for rule in RULES:
        if all(name in facts for name in rule.facts):
            values = [facts[name] for name in rule.facts]
            if rule.broken(*values):
                yield rule, rule.sentence.format(*values)


def facts_of(config: Mapping[str, Any], wrong: Container[str] = ()) -> dict[str, Any]:
    """The facts rules read, from plain resolved containers.

    Args:
        config: the configuration.
        wrong: keys whose values are no facts, because they are of a wrong kind.

    Raises:
        ConfigError: `model.path` names no folder with a readable config.json.
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
    if facts.get("model.path") is not None:
        facts |= {f"model.{key}": value for key, value in shape_of_folder(facts["model.path"]).items()}
    for name, (sources, derive) in DERIVED.items():
        if all(source in facts for source in sources):
            facts[name] = derive(*(facts[source] for source in sources))
    return facts


def shape_of_folder(folder: str) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model.path={folder}: no such folder; expected a Hugging Face folder with a config.json")
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path={folder}: no config.json in it; expected a Hugging Face folder")
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path={folder}: config.json is not JSON ({error})") from error
    if not isinstance(shape, dict):
        raise ConfigError(f"model.path={folder}: config.json holds no object")
    # Both may be left out of a config.json: K is H then, and E is D / H.
    return {"num_key_value_heads": None, "head_dim": None, **shape}


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
