"""What an experiment says of a method that the words replace: it says nothing of the new one.

Hydra merges an experiment last, so `experiment=llama2/7B_lora_single_device peft=full` would give full training a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from omegaconf import DictConfig, open_dict

from tuner.config.checking import INSTRUCTIONS
from tuner.config.folder import conf_dir
from tuner.config.groups import EXPERIMENT
from tuner.config.signatures import signature_of


def without_keys_of_replaced(config: DictConfig, words: Sequence[str]) -> DictConfig:
    """A run's configuration without the keys that belong to other members of the groups that words choose.

    Only keys that another member of the group has are taken out: what none has is a typo, and stays to be refused. Keys
    that the new member has too, as `optimizer.lr`, keep what the experiment says.

    Args:
        config: composed from `words`; changed in place.
        words: the overrides.
    """
    said = dict(word.lstrip("+").partition("=")[::2] for word in words if "=" in word)
    if EXPERIMENT not in said:
        return config
    for group in said.keys() & set(config):
        node = config[group]
        if not isinstance(node, DictConfig) or not str(node.get("_target_", "")).startswith("tuner."):
            continue
        signature = signature_of(node._target_)
        others = set(node) - signature.keys.keys() - INSTRUCTIONS.keys() if not signature.is_open else set()
        with open_dict(node):
            for key in others & _keys_of_members(str(group)):
                if f"{group}.{key}" not in said:
                    del node[key]
    return config


@cache
def _keys_of_members(group: str) -> frozenset[str]:
    """Every key that a member of a group has."""
    files: list[Path] = sorted((conf_dir() / group).glob("*.yaml"))
    return frozenset(key for file in files for key in yaml.safe_load(file.read_text(encoding="utf-8")))
