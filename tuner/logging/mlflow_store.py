"""A store of MLflow's: opened safely by several processes, quietly, and given up on after a while."""

from __future__ import annotations

import logging
import math
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MIGRATION_S = 300.0
"""How long to wait for another process that is creating the store (its migrations take seconds, more on a network)."""

_CHATTY = ("mlflow", "alembic", "sqlalchemy.engine", "urllib3.connectionpool")


@contextmanager
def silent() -> Iterator[None]:
    """Keep what MLflow and the libraries under it log off the terminal; every failure reaches us as an exception."""
    with _environment(MLFLOW_DISABLE_TELEMETRY="true"):  # fine-tuning a model calls nobody; a user's own setting wins
        import mlflow  # noqa: F401  # sets the handlers that are silenced here

    loggers = [logging.getLogger(name) for name in _CHATTY]
    places: list[logging.Filterer] = [*loggers, *(handler for logger in loggers for handler in logger.handlers)]
    for place in places:
        place.addFilter(_nothing)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(_nothing)


def patient(timeout_s: float) -> AbstractContextManager[None]:
    """Let a server have so many seconds for each answer, and ask once, except where the user has set it otherwise."""
    return _environment(
        MLFLOW_HTTP_REQUEST_TIMEOUT=str(max(1, math.ceil(timeout_s))),
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
    )


def store_errors() -> tuple[type[Exception], ...]:
    """What a store that cannot be used raises (errors of `requests` and of the file lock are `OSError`s)."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, sqlite3.Error, OSError


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of a `sqlite:///` address; null for any other store, and for one in memory."""
    found = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", tracking_uri)
    return Path(found[1]) if found and found[1] != ":memory:" else None


def without_password(tracking_uri: str) -> str:
    """The address as it may be shown: user and password of `scheme://user:password@host` starred out."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", tracking_uri)


def open_store(tracking_uri: str, experiment: str, timeout_s: float) -> tuple[MlflowClient, str]:
    """A client of the store and the id of the experiment; both are made if they are not there.

    A fresh SQLite store that several processes open at once crashes some of them in its migrations, so the file is
    opened under a lock next to it. Its artifacts lie next to it as well, not in the folder a process happens to be in.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    file = sqlite_file(tracking_uri)
    location = None
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{file}.lock").touch()  # fails at once where the lock would try for minutes
        location = (file.resolve().parent / "mlartifacts" / re.sub(r"[^\w\-.]", "_", experiment)).as_uri()
    with nullcontext() if file is None else FileLock(f"{file}.lock", timeout=_MIGRATION_S):
        if file is not None:
            _check_writable(file, timeout_s)
        client = MlflowClient(tracking_uri)
        return client, _experiment_id(client, experiment, location)


def _check_writable(file: Path, timeout_s: float) -> None:
    """Fail at once and with SQLite's own words; MLflow would try a bad file ten times over a minute and a half."""
    connection = sqlite3.connect(file, timeout=timeout_s)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    finally:
        connection.close()


def _experiment_id(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another run may have made it in between
        if found is None:
            raise
        return str(found.experiment_id)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for as long as the block lasts, except where the user has set them: MLflow reads its limits from
    the environment only."""
    mine = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _nothing(record: logging.LogRecord) -> bool:
    return False
