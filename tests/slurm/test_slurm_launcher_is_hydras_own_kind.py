"""Hydra's own suite for launchers, on a real cluster."""

from __future__ import annotations

import pytest
from hydra.test_utils.launcher_common_tests import LauncherTestSuite

from tests.slurm.cluster import Cluster
from tests.sweeper.launcher_suites import FreshHydra, jobs_by


@pytest.fixture(autouse=True)
def submitted_from_here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)


@jobs_by("slurm", "hydra.launcher.poll_s=0.5")
class TestSlurmLauncher(FreshHydra, LauncherTestSuite):
    pass
