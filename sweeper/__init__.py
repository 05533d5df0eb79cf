"""Sweeps: every choice of a training run as an axis, its trials run here or on SLURM and compared when they have ended.

Hydra hands a command with `-m` to `sweeper.grid`, which reads top to bottom: plan, submit, watch, collect, compare. Of
`tuner` it uses the public functions alone. Launchers know nothing of trials: they are plain Hydra launchers.
"""
