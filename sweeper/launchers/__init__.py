"""Launchers: plain Hydra launchers over submitit, which know nothing of training runs."""
