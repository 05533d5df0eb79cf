"""What went wrong when Hydra refused to compose, as one sentence each and all of them at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from tuner.config.groups import SCALE, group_and_option
from tuner.config.torchtune.words import sentence_for
from tuner.errors import nearest

COMPOSE_ERRORS = (HydraException, ValueError)
"""What Hydra raises for words that do not compose; ValueError where it did not expect a value, as in `model=null`."""

UNKNOWN_KEY = re.compile(r"Could not override '(?P<key>[^']*)'")
WITH_A_PLUS = re.compile(rf"To append to your default list use \+(?P<word>{SCALE}=\S+)")
"""What Hydra says of an option of the group that no run has unless asked for."""
MERGE = re.compile(r"Error merging override (?P<word>.*)")


def explain(
    error: Exception, words: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]
) -> tuple[list[str], DictConfig | None]:
    """One sentence for every word that is wrong, and what the other words compose, where they do.

    Hydra stops at the first one, so each is taken out in turn until the rest composes.

    Args:
        error: what `compose(words)` raised.
        words: the overrides.
        compose: raises `COMPOSE_ERRORS` for words that do not compose.
    """
    problems: list[str] = []
    unknown: list[tuple[str, str]] = []
    remaining = list(words)
    while True:
        key, said = _read(error)
        culprits = [word for word in remaining if key is not None and _key_of(word) == key]
        if said is None and culprits:
            unknown += [(str(key), word) for word in culprits]
        elif said is None and (culprits := _by_trial(error, remaining, compose)):
            problems.append(f"{culprits[0]}: {one_line(error)}")
        else:
            problems.append(said or one_line(error))
        if not culprits:
            return problems + [f"{word}: no such key" for _, word in unknown], None
        remaining = [word for word in remaining if word not in culprits]
        try:
            config = compose(remaining)
        except COMPOSE_ERRORS as next_error:
            error = next_error
        else:
            return problems + [_no_such_key(config, key, word) for key, word in unknown], config


def unknown_key(error: Exception) -> str | None:
    """The key that does not exist, where that is what Hydra complains of."""
    found = UNKNOWN_KEY.search(str(error))
    return found["key"] if found else None


def _by_trial(error: Exception, words: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]) -> list[str]:
    """The first word without which this error does not occur."""
    for word in words:
        try:
            compose([other for other in words if other != word])
        except COMPOSE_ERRORS as other_error:
            if str(other_error) == str(error):
                continue
        return [word]
    return []


def _read(error: Exception) -> tuple[str | None, str | None]:
    """The key or group of the word that failed, and the sentence unless it is a key that does not exist."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        word = error.override
        return _key_of(
            word
        ), f"{word}: cannot be read as key=value; quote what holds special characters: key='\"value\"'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, option = group_and_option(error.missing_cfg_file)
        said = sentence_for(f"{group}={option}")
        return group, said or f"{group}={option}: no such option; {nearest(option, error.options)}"
    if found := WITH_A_PLUS.search(message):
        return _key_of(found["word"]), f"{found['word']}: chosen with a plus, as +{found['word']}"
    if found := UNKNOWN_KEY.search(message):
        return found["key"], None
    if found := MERGE.search(message):
        cause = str(error.__cause__).strip().splitlines()
        return _key_of(found["word"]), f"{found['word']}: {cause[0] if cause else 'cannot be set'}"
    return None, None


def sentence(error: Exception) -> str:
    """One sentence for one error, where there is nothing to compose again."""
    return _read(error)[1] or one_line(error)


def _key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0].removesuffix(":")


def _no_such_key(config: DictConfig, key: str, word: str) -> str:
    """What to say in place of a word whose key does not exist in what the other words compose."""
    return sentence_for(word, config.__contains__) or f"{word}: no such key; {_valid_beside(config, key)}"


def _valid_beside(config: DictConfig, key: str) -> str:
    """The valid names next to a key that does not exist, where its parent does."""
    parent, _, name = key.rpartition(".")
    while parent and not OmegaConf.is_dict(OmegaConf.select(config, parent)):
        parent, _, name = parent.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    names = [str(choice) for choice in node if not (parent == "" and choice == "hydra") and choice != "_target_"]
    return nearest(name, names)


def one_line(error: BaseException) -> str:
    """An exception and its cause without line breaks, without Hydra's links and advice."""
    text = str(error) if str(error) else str(error.__cause__ or type(error).__name__)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith(("See https://", "full_key:", "object_type=")))
