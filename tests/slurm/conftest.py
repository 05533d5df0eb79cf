"""A real SLURM cluster for the tests of this folder, one for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m 'not slow' selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short name, as the daemons make sockets in it, whose paths have 107 bytes at most."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="session")
def slurm() -> None:
    """SLURM is installed. CI installs it, so its absence there is a failure, not a reason to skip."""
    reason = missing()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes with 4 CPUs and 2 made-up GPUs each, partitions `main` and `high`. Tests share it: leave no job."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
