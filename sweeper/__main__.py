"""The command line: `sweeper trial DIR` runs one trial of a sweep, `sweeper status DIR` compares what is there."""

from __future__ import annotations

import sys
from pathlib import Path

from tuner.__main__ import reported
from tuner.errors import ConfigError, nearest

VERBS = {"trial": "run one trial's folder as it was frozen", "status": "the table of a sweep folder"}


def main() -> None:
    """The console script."""
    sys.exit(reported(lambda: dispatch(sys.argv[1:]), debug="--debug" in sys.argv))


def dispatch(words: list[str]) -> None:
    """Call the verb that `words` begin with.

    Raises:
        TunerError: as the verb does; ConfigError for a word that is no verb.
    """
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print("\n".join(["sweeper VERB DIR", "", *(f"  {name} DIR  {text}" for name, text in VERBS.items())]))
        return
    name, *rest = words
    if name not in VERBS:
        raise ConfigError(f"{name}: no such verb; {nearest(name, VERBS)}")
    if len(rest) != 1:
        raise ConfigError(f"{name} takes DIR; given: {' '.join(rest) or 'nothing'}")
    {"trial": trial, "status": status}[name](Path(rest[0]).absolute())


def trial(out: Path) -> None:
    """Run one trial here, in the foreground; it reaches MLflow whoever was to bring it there."""
    from sweeper.tracking import publish
    from sweeper.trial import CONFIG, run_trial

    if not (out / CONFIG).is_file():
        raise ConfigError(f"{out} is not a trial's folder: it has no {CONFIG}")
    try:
        run_trial(out)
    finally:
        if problem := publish(out):
            print(f"warning: MLflow: {problem}", file=sys.stderr)


def status(path: Path) -> None:
    """Compare what the trials of a sweep folder have found so far."""
    from sweeper.folder import SweepFolder
    from sweeper.results import RESULTS, rows_of
    from sweeper.table import show

    folder = SweepFolder(path)
    entries = folder.entries()
    objective = folder.read()["objective"]
    show(rows_of(folder, entries, objective), path / RESULTS, objective, [])


if __name__ == "__main__":
    main()
