"""Loggers whose library is an extra of the package say so before anything is loaded, not in the middle of a run."""

from __future__ import annotations

from importlib.util import find_spec

from tuner.errors import TunerError


def require(module: str, logger: str) -> None:
    """Raise unless `module` is installed.

    Raises:
        TunerError: with the command that installs it; the extra has the module's name.
    """
    if find_spec(module) is None:
        raise TunerError(
            f"logger={logger} needs the package {module}, which is not installed: pip install 'tuner[{module}]'"
        )
