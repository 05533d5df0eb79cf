"""The doorway through which Hydra finds what `sweeper` offers: it takes plugins only from modules under this name."""

from sweeper.grid import GridSweeper as Grid
from sweeper.launchers.local import LocalLauncher as Local
from sweeper.launchers.slurm import SlurmLauncher as Slurm


class GridSweeper(Grid):
    """`hydra/sweeper=grid`."""


class LocalLauncher(Local):
    """`hydra/launcher=local`."""


class SlurmLauncher(Slurm):
    """`hydra/launcher=slurm`."""
