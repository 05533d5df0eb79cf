"""Hydra's conformance suites for launchers, parametrized as Hydra's own plugins are.

A test class is `FreshHydra` and a suite of `hydra.test_utils.launcher_common_tests`, under one of these decorators, and
nothing more. The applications in there are Hydra's: they know nothing of `tuner`, and find our launchers on the search
path.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra.core.singleton import Singleton
from hydra.version import VersionBase

from tuner.config import conf_dir

SEARCH_PATH = f"hydra.searchpath=[file://{conf_dir()}]"


class FreshHydra:
    """No `version_base` has been said, whatever tests have run before in this process.

    The suites count on it: without one, a job changes into its folder as in old versions of Hydra.
    """

    @pytest.fixture(autouse=True)
    def _unsaid(self) -> Iterator[None]:
        before = Singleton._instances.pop(VersionBase, None)
        yield
        Singleton._instances.pop(VersionBase, None)
        if before is not None:
            VersionBase.set_instance(before)


def jobs_by(launcher: str, *words: str) -> pytest.MarkDecorator:
    """For `LauncherTestSuite`: every sweep in there goes to this launcher, with these keys."""
    row = pytest.param(launcher, [SEARCH_PATH, *words], id=launcher)
    return pytest.mark.parametrize(("launcher_name", "overrides"), [row])


def batches_by(launcher: str, *words: str) -> pytest.MarkDecorator:
    """For `BatchedSweeperTestSuite`: two jobs at once, so that a launcher is called several times in one sweep."""
    return jobs_by(launcher, "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2", *words)


def applications_by(launcher: str, *words: str) -> pytest.MarkDecorator:
    """For `IntegrationTestSuite`: applications in processes of their own, whose configuration names the launcher."""
    row = pytest.param({"defaults": [{"override hydra/launcher": launcher}]}, ["-m", SEARCH_PATH, *words], id=launcher)
    return pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [row])
