"""Configuration: composed from groups by Hydra, checked against our own signatures, frozen when a run begins."""

from tuner.config.composition import as_word, available_cpus, check, compose, conf_dir, freeze, load_point, quoted

__all__ = ["as_word", "available_cpus", "check", "compose", "conf_dir", "freeze", "load_point", "quoted"]
