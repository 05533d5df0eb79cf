"""The command line: `sweeper trial DIR` runs one trial of a sweep, `sweeper status DIR` compares what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tuner.__main__ import reported
from tuner.errors import ConfigError, nearest

VERBS = {"trial": "run one trial's folder as it was frozen", "status": "the table of a sweep folder"}
TRUST = "trust_targets="


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
    trusts = name == "trial" and len(rest) == 2 and rest[1].startswith(TRUST)
    if len(rest) != 1 and not trusts:
        takes = f"DIR [{TRUST}[...]]" if name == "trial" else "DIR"
        raise ConfigError(f"{name} takes {takes}; given: {' '.join(rest) or 'nothing'}")
    folder = Path(rest[0]).absolute()
    if name == "status":
        status(folder)
    else:
        trial(folder, trusted_by(rest[1]) if trusts else [])


def trusted_by(word: str) -> list[str]:
    """What `trust_targets=[a,b]` lists.

    Raises:
        ConfigError: it is no list of words.
    """
    try:
        found = yaml.safe_load(word.removeprefix(TRUST))
    except yaml.YAMLError:
        found = None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ConfigError(f"{word}: no list of dotted prefixes, as {TRUST}[my_package]")
    return found


def trial(out: Path, trusted: list[str]) -> None:
    """Run one trial here, in the foreground; it reaches MLflow whoever was to bring it there."""
    from sweeper.tracking import publish
    from sweeper.trial import CONFIG, run_trial

    if not (out / CONFIG).is_file():
        raise ConfigError(f"{out} is not a trial's folder: it has no {CONFIG}")
    try:
        run_trial(out, trusted)
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
