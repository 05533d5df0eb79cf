"""Configuration: composed from groups by Hydra, checked against our own signatures, frozen when a run begins."""

from tuner.config.adapters import chooses_model, is_said
from tuner.config.composition import (
    as_word,
    available_cpus,
    check,
    compose,
    freeze,
    load_point,
    quoted,
    with_base_of_adapter,
)
from tuner.config.folder import conf_dir
from tuner.config.groups import EXPERIMENT, SCALE, group_and_option

__all__ = [
    "EXPERIMENT",
    "SCALE",
    "as_word",
    "available_cpus",
    "check",
    "chooses_model",
    "compose",
    "conf_dir",
    "freeze",
    "group_and_option",
    "is_said",
    "load_point",
    "quoted",
    "with_base_of_adapter",
]
