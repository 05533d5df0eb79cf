"""torchtune's commands: `tune run RECIPE --config NAME key=value ...` and its other verbs, in our words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath

from tuner.config.folder import options_of
from tuner.config.torchtune.components import model_name
from tuner.config.torchtune.keys import answer
from tuner.config.torchtune.words import rendered, said, value_of
from tuner.errors import nearest

TUNER = "python -m tuner"
SEVERAL_DEVICES = "trains on several devices; what is here trains on one, as the single_device recipes do"
PREFERENCES = "preference tuning and reinforcement learning are not what this is for"
RECIPES = {
    "lora_finetune_single_device": "",
    "full_finetune_single_device": "",
    "lora_finetune_distributed": SEVERAL_DEVICES,
    "full_finetune_distributed": SEVERAL_DEVICES,
    "lora_dpo_single_device": PREFERENCES,
    "lora_dpo_distributed": PREFERENCES,
    "full_dpo_distributed": PREFERENCES,
    "ppo_full_finetune_single_device": PREFERENCES,
    "dev/grpo_full_finetune_distributed": PREFERENCES,
    "qat_single_device": "there is no quantization-aware training; peft=qlora trains over 4-bit weights",
    "qat_distributed": "there is no quantization-aware training; peft=qlora trains over 4-bit weights",
    "qat_lora_finetune_distributed": "there is no quantization-aware training; peft=qlora trains over 4-bit weights",
    "knowledge_distillation_single_device": "there is no distillation",
    "knowledge_distillation_distributed": "there is no distillation",
    "generate": f'say {TUNER} generate run=FOLDER prompt="..."',
    "dev/generate_v2": f'say {TUNER} generate run=FOLDER prompt="..."',
    "eleuther_eval": f"loss and perplexity: {TUNER} evaluate run=FOLDER; benchmarks run on what {TUNER} merge writes",
    "quantize": "weights are quantized as they are loaded, quantization=nf4; no quantized file is written",
}
"""torchtune's recipes: empty where one is a run here, else what to say."""

VERBS = {
    "ls": f"say {TUNER} ls; the recipes are {TUNER} ls experiment",
    "cp": f"say {TUNER} cp NAME DEST; a YAML of torchtune's: {TUNER} cp --from-torchtune FILE DEST",
    "cat": f"say {TUNER} --cfg job experiment=NAME",
    "download": f"say {TUNER} download ORG/NAME, and train with model.source=ORG/NAME",
    "validate": f"say {TUNER} validate experiment=NAME",
}
"""torchtune's commands besides `run`."""

CONFIG_NAME = re.compile(r"(?P<family>\w+)/(?P<size>[\w.]+?)_(?P<method>q?lora|q?dora|full)(?P<rest>_\w+)?")
ONE_DEVICE = (None, "_single_device", "_low_memory", "_single_device_low_memory")
DOWNLOADS = ("--output-dir", "--output-dir-use-symlinks", "--ignore-patterns", "--hf-token", "--source")


def command_problems(words: Sequence[str]) -> list[str]:
    """What to say in place of a command line in torchtune's form, nothing for one of ours.

    Args:
        words: after the name of the program.
    """
    first, *rest = words or [""]
    if first == "tune":
        if rest[:1] == ["run"]:
            return _run("tune run", TUNER, rest[1:])
        verb = rest[0] if rest else ""
        return [f"tune {verb}: torchtune's command; {VERBS.get(verb) or 'here they are those of `tuner --help`'}"]
    if first == "download" and any(word.partition("=")[0] in DOWNLOADS for word in rest):
        org = next((word for word in rest if not word.startswith("-")), "ORG/NAME")
        return [f"download --...: no switches; say {TUNER} download {org}; HF_TOKEN=... before it, for a gated model"]
    is_recipe = first in RECIPES and first != "generate"  # which is a verb here too
    if first == "run" and (_is_name(rest) or _switch(rest) is not None):
        return _run("run", TUNER, rest)
    if first == "validate" and _switch(rest) is not None:
        return _run("validate", f"{TUNER} validate", rest)
    if is_recipe or _switch(words) is not None:
        return _run("--config", TUNER, words)
    if first == "validate" and any(word.endswith((".yaml", ".yml")) and "=" not in word for word in rest):
        return [f"validate FILE: a config is said by its words; {TUNER} validate experiment=NAME"]
    return []


def _is_name(words: Sequence[str]) -> bool:
    """The first word after `run` is a recipe's name: neither key=value nor a switch."""
    return bool(words) and "=" not in words[0] and words[0][:1] not in "-+~"


def _run(command: str, ours: str, words: Sequence[str]) -> list[str]:
    """The one line that does the same, `ours` with our words, and a line for every word that has no counterpart."""
    recipe, config, overrides = _parts(words)
    why_not = RECIPES.get(recipe, f"{recipe}: no recipe of torchtune's known here") if recipe else ""
    if why_not:
        return [f"{command} {recipe}: torchtune's recipe; {why_not}"]
    if config is None:
        return [f"{command} {recipe}: torchtune's command; say {ours} experiment=NAME; {TUNER} ls experiment"]
    chosen, problem = _config_words(config)
    kept, problems = _override_words(overrides)
    if problem:
        then = f"; then add {' '.join(kept)}" if kept else ""
        return [f"{command} {config}: {problem}{then}", *problems]
    line = " ".join([ours, chosen, *kept])
    has_weights = any(word.lstrip("'").startswith(("model.path=", "model.source=")) for word in kept)
    weights = "" if has_weights else " (weights: model.path=FOLDER, or model.source=ORG/NAME of the hub)"
    return [f"{command} {config}: torchtune's command; say {line}{weights}", *problems]


def _parts(words: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Recipe, config and overrides; torchrun's switches before the recipe are passed over with their values."""
    switch = _switch(words)
    config = None
    rest = list(words)
    if switch is not None:
        _, equals, config = rest[switch].partition("=")
        taken = 1 if equals else 2
        config = config if equals else next(iter(rest[switch + 1 : switch + 2]), None)
        rest = rest[:switch] + rest[switch + taken :]
    names = [word for word in rest if "=" not in word and not word.startswith("-")]
    recipe = next((name for name in names if name in RECIPES), names[-1] if names else "")
    return recipe, config, [word for word in rest if "=" in word and not word.startswith("-")]


def _switch(words: Sequence[str]) -> int | None:
    """Where `--config` stands, which Hydra would take for one of several switches of its own."""
    return next((i for i, word in enumerate(words) if word == "--config" or word.startswith("--config=")), None)


def _config_words(name: str) -> tuple[str, str]:
    """The words for one of torchtune's configs, or what keeps it from having any."""
    if name.endswith((".yaml", ".yml")):
        stem = PurePath(name).stem
        copy = f"{TUNER} cp --from-torchtune {shlex.quote(name)} experiment/{shlex.quote(stem)}.yaml"
        return "", f"a YAML of torchtune's is translated first: {copy}"
    name = name.strip("/")
    if name in options_of("experiment"):
        return f"experiment={name}", ""
    found = CONFIG_NAME.fullmatch(name)
    model = model_name(f"{found['family']}_{found['size']}".lower().replace(".", "_")) if found else None
    if found is None or model is None or found["rest"] not in ONE_DEVICE:
        return "", f"no experiment here; {nearest(name, options_of('experiment'))}"
    method = "dora quantization=nf4" if found["method"] == "qdora" else found["method"]
    return f"model={model} peft={method} precision=bf16", ""


def _override_words(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our words for torchtune's key=value words, one for each key, and a sentence for each that has no plain one."""
    kept: dict[str, str] = {}
    problems = []
    # A limit of steps holds over epochs, in whichever order they are said.
    for word in sorted(overrides, key=lambda word: word.startswith("max_steps_per_epoch=")):
        key, _, text = word.partition("=")
        found = answer(key, value_of(text))
        if found is None:
            kept[key] = shlex.quote(word)  # of ours, or it is refused by name there
            continue
        kept |= {ours: shlex.quote(rendered(ours, value)) for ours, value in found.words}
        if found.note:
            problems.append(f"{word}: {said(found)}")
    return list(kept.values()), problems
