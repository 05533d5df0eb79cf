"""Configuration: composed from groups by Hydra, checked against our own signatures, frozen when a run begins."""

from tuner.config.composition import available_cpus, check, compose, conf_dir, freeze

__all__ = ["available_cpus", "check", "compose", "conf_dir", "freeze"]
