"""Where what can be made again is kept: converted models, small tokenizers, prepared data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TUNER_CACHE`, else `$XDG_CACHE_HOME/tuner`, else `~/.cache/tuner`."""
    if moved := os.environ.get("TUNER_CACHE"):
        return Path(moved).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "tuner"
