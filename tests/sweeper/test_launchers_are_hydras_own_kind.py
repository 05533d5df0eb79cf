"""Our launchers pass what Hydra asks of every launcher."""

from __future__ import annotations

import pytest
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from tests.sweeper.launcher_suites import FreshHydra, applications_by, batches_by, jobs_by


@pytest.mark.slow
@jobs_by("local", "hydra.launcher.max_parallel=2")
class TestLocalLauncher(FreshHydra, LauncherTestSuite):
    pass


@pytest.mark.slow
@batches_by("local", "hydra.launcher.max_parallel=2")
class TestLocalLauncherInBatches(FreshHydra, BatchedSweeperTestSuite):
    pass


@pytest.mark.slow
@applications_by("local")
class TestLocalLauncherInApplications(FreshHydra, IntegrationTestSuite):
    pass
