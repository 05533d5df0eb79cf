"""Configuration: composed from groups by Hydra, checked against our own signatures, frozen when a run begins."""

from tuner.config.composition import check, compose, conf_dir, freeze

__all__ = ["check", "compose", "conf_dir", "freeze"]
