"""What can go wrong with the Hugging Face Hub, each as one line that names the key and says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from json import JSONDecodeError

from tuner.errors import ConfigError, DataError, ModelError, TunerError

PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?!.*(?:--|\.\.)){PART}/{PART}(?<!\.git)", re.ASCII)
"""The names that `huggingface_hub` takes, of those with an organization."""


@dataclass(frozen=True)
class Kind:
    """What models and datasets differ in.

    Attributes:
        group: of the configuration, whose `source` and `revision` name the repository.
        error: what is raised.
        needs: the module that reads such a repository, and what to install.
        example: what to say instead of a name that is none.
        folder: what its pages on the hub lie below.
        away: what helps while the hub is away.
        offline: what is missing where `HF_HUB_OFFLINE` is set.
    """

    group: str
    error: type[TunerError]
    needs: tuple[str, str]
    example: str
    folder: str
    away: str
    offline: str


MODEL = Kind(
    "model",
    ModelError,
    ("huggingface_hub", "huggingface_hub, 2.4 or newer: pip install 'tuner[hub]'"),
    "HuggingFaceTB/SmolLM2-135M-Instruct; a folder is model.path",
    "",
    "HF_HUB_OFFLINE=1 uses what was downloaded before",
    "not (or not wholly) in the cache, and HF_HUB_OFFLINE=1 forbids to download it; unset it once",
)
DATASET = Kind(
    "data",
    DataError,
    ("datasets", "the library datasets: pip install 'tuner[datasets]'"),
    "tatsu-lab/alpaca; a file or a folder is data.path",
    "datasets/",
    "data that was prepared before is used without it where data.revision is a commit, or with HF_HUB_OFFLINE=1",
    "not known or not prepared before, and HF_HUB_OFFLINE=1 forbids to ask for it; unset it once",
)


def is_repository(source: object) -> bool:
    """Whether this is a name of the form ORG/NAME."""
    return isinstance(source, str) and NAME.fullmatch(source) is not None


@contextmanager
def hub_errors(source: str, revision: str, kind: Kind = MODEL) -> Iterator[None]:
    """Raise what `huggingface_hub` raises inside as one line of ours.

    Raises:
        ConfigError: no such name is possible, or the extra that reads it is not installed.
        ModelError, DataError: by its kind, the hub cannot be reached or does not give it.
    """
    try:
        import httpx2
        from huggingface_hub import errors, get_cached_repo_tree  # noqa: F401 (older ones lack it)

        if find_spec(kind.needs[0]) is None:
            raise ModuleNotFoundError(kind.needs[0])
    except ImportError as error:
        raise ConfigError(f"{kind.group}.source={source}: needs {kind.needs[1]}") from error
    if not is_repository(source):
        raise ConfigError(f"{kind.group}.source={source}: expected ORG/NAME, as {kind.example}")
    if not revision.strip():
        raise ConfigError(f"{kind.group}.revision: expected a branch, a tag or a commit, or null for main")
    try:
        yield
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError, JSONDecodeError, RuntimeError) as error:
        # RuntimeError is how hf_xet, which moves large files, ends a transfer that failed.
        named = f"{kind.group}.source={source} {kind.group}.revision={revision}"
        raise kind.error(f"{named}: {_reason(error, source, kind)}") from error


def _reason(error: Exception, source: str, kind: Kind) -> str:
    """What happened and what to do, from one of the errors that `hub_errors` catches."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    page = f"{ENDPOINT}/{kind.folder}{source}"
    token = "give a token: `hf auth login`, or the environment variable HF_TOKEN"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"access to it is restricted; accept its conditions at {page} and {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision; {page}/commits/main shows what there is"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository at {ENDPOINT}, or a private one; check the name, and for a private one {token}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "no config.json in this repository, so it is no Hugging Face model"
    if status in (401, 403):
        return f"{ENDPOINT} refuses access ({status}); {token}"
    if status is not None:
        return f"{ENDPOINT} answers with an error ({status}); try again later"
    if isinstance(error, JSONDecodeError):
        return f"{ENDPOINT} answers with something else than a hub would; is a proxy in between?"
    if is_offline_mode():
        return kind.offline
    return _unreached(error, ENDPOINT, kind)


def _unreached(error: Exception, endpoint: str, kind: Kind) -> str:
    """A hub that is away from the beginning, or a download that broke off."""
    import httpx2

    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    said = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ReadTimeout):
        return f"{endpoint} cannot be reached ({said}); {kind.away}"
    return f"the download broke off ({said}); the same command goes on with the files that are missing"
