"""`python -m tuner -m ...`: a grid of trials, top to bottom.

Hydra's own sweeper composes a point when its job begins, runs a point as often as it is named, and forgets what it
found. Here every point is composed, checked and frozen before the first one runs; how the trials run is the launcher's
affair, and what they found is read from their folders.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

import tuner
from sweeper import table, trial
from sweeper.errors import LOG_NOTE, SweepIncomplete
from sweeper.folder import SweepFolder
from sweeper.pins import pinned
from sweeper.plan import Trial, trials_of
from sweeper.results import Row, rows_of, write_results
from sweeper.tracking import MlflowSweep, NoTracking, Tracking, settings_of
from sweeper.watch import Watch
from tuner.config import as_word, load_point, quoted
from tuner.errors import ConfigError, Interrupted, TunerError

RERUN = {
    "none": ("stopped",),
    "failed": ("stopped", "failed"),
    "all": ("stopped", "failed", "finished"),
}
"""What is run again, by `sweep.rerun`; a trial that has not ended is run in any case."""


class GridSweeper(Sweeper):
    """Runs every combination of the values that words give with commas."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """The task is replaced by one that runs a frozen folder; of the given one only its `switches` are read."""
        self.context = hydra_context
        self.master = config
        self.switches: list[str] = list(getattr(task_function, "switches", []))
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=trial.run_submitted, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Plan, submit, watch, collect, compare.

        Args:
            arguments: the words without Hydra's own.

        Raises:
            TunerError: a word of any point is wrong, or the hub does not give a model, before anything is written.
            SweepIncomplete: not every point finished; what did is kept and was shown.
            Interrupted: by Ctrl-C; the trials that ran have saved.
        """
        folder = SweepFolder(Path(self.master.hydra.sweep.dir).absolute())
        asked = pinned(trials_of(arguments, self.context.config_loader, self.compose), folder)
        illegal = [one for one in asked if one.illegal is not None]
        if illegal and self.master.sweep.on_illegal == "refuse":
            raise ConfigError([f"{one.name}: {one.illegal}" for one in illegal])
        due = [one for one in asked if one.illegal is None and self.is_due(folder.out(one.id))]
        self.require_data(due)
        objective = next(str(one.config.train.objective) for one in asked if one.config is not None)
        with folder.held():
            entries = folder.record([*self.switches, *arguments], objective, asked)
            say(f"{len(asked)} trials, {len(due)} to run, {len(illegal)} illegal; folder {folder.path}")
            returns: list[Sequence[JobReturn]] = []
            interrupt: KeyboardInterrupt | None = None
            tracking = self.tracking(folder, asked, due)
            try:
                outs = [self.prepared(folder, one, tracking) for one in due]
                with Watch(list(zip(due, outs, strict=True)), tracking, say):
                    returns = [self.launch(folder, due)] if due else []
            except KeyboardInterrupt as error:
                interrupt = error
            finally:
                rows = rows_of(folder, entries, objective)
                results = write_results(rows, folder)
                address = self.close(tracking, rows)
        table.show(rows, results, objective, self.switches)
        if address is not None:
            say(f"compare  {address}")
        self.raise_unless_done(rows, {one.id for one in asked}, folder, interrupt)
        return returns

    def compose(self, words: Sequence[str]) -> DictConfig:
        """The configuration of one point."""
        return load_point(self.context.config_loader, self.master, words)

    def require_data(self, trials: Sequence[Trial]) -> None:
        """Find a file that is not there now, not in a process of each trial. Nodes of a cluster may see other files.

        Raises:
            ConfigError: naming all that are missing.
        """
        if getattr(self.launcher, "on_other_machines", False):
            return
        paths = [OmegaConf.select(one.config, "data.path") for one in trials if one.config is not None]
        given = [path for path in dict.fromkeys(paths) if path is not None]
        missing = [path for path in given if not Path(path).expanduser().exists()]
        if missing:
            raise ConfigError([f"data.path={path}: does not exist (looked in {Path.cwd()})" for path in missing])

    def is_due(self, out: Path) -> bool:
        """Whether a trial is to be run."""
        summary = trial.summary_of(out)
        return summary is None or summary["status"] in RERUN[self.master.sweep.rerun]

    def cleared(self, out: Path) -> None:
        """Take away what an earlier attempt left of a trial that is run from the beginning."""
        if self.master.sweep.rerun == "all":
            trial.clear(out)
        elif (summary := trial.summary_of(out)) is not None and summary["status"] == "failed":
            (out / trial.SUMMARY).unlink()
            (out / trial.LOG).unlink(missing_ok=True)

    def tracking(self, folder: SweepFolder, asked: Sequence[Trial], due: Sequence[Trial]) -> Tracking:
        """MLflow where the trials log there and it can be reached; a store that is away stops no trial."""
        settings = settings_of([tuner.freeze(one.config) for one in due if one.config is not None])
        if settings is None:  # also where nothing is to be run
            return NoTracking()
        in_this_process = str(self.master.hydra.launcher._target_).startswith("hydra._internal.")
        try:
            return MlflowSweep(folder, asked, settings, in_this_process)
        except TunerError as error:
            say(f"warning: MLflow: {error}; the trials run, each for itself")
            return NoTracking()

    def prepared(self, folder: SweepFolder, one: Trial, tracking: Tracking) -> Path:
        """The trial's run folder with its configuration as it is now, whatever is edited before the trial begins."""
        out = folder.out(one.id)
        assert one.config is not None  # an illegal point is never due
        config = one.config.copy()
        config.out = str(out)
        out.mkdir(parents=True, exist_ok=True)
        self.cleared(out)
        tracking.address(one, config, out)
        if config.train.num_threads is None:
            config.train.num_threads = getattr(self.launcher, "cpus_of_each", None)
        trial.prepare(out, tuner.freeze(config), [*self.switches, *one.words])
        return out

    def launch(self, folder: SweepFolder, due: Sequence[Trial]) -> Sequence[JobReturn]:
        """Hand the trials to the launcher; one that died without a summary gets one, and a link to its log."""
        place = as_word("hydra.sweep.dir", folder.path)  # absolute, wherever the job begins
        returns = self.launcher.launch([[*one.words, place, f"hydra.sweep.subdir={quoted(one.id)}"] for one in due], 0)
        for one, job in zip(due, returns, strict=True):
            if job.status is JobStatus.FAILED:
                error = job._return_value
                trial.record_death(folder.out(one.id), str(error) or type(error).__name__)
                for note in getattr(error, "__notes__", []):
                    if note.startswith(LOG_NOTE):
                        trial.link_log(folder.out(one.id), Path(note.removeprefix(LOG_NOTE)))
        return returns

    def close(self, tracking: Tracking, rows: Sequence[Row]) -> str | None:
        try:
            return tracking.close(rows)
        except TunerError as error:
            say(f"warning: MLflow: {error}")
            return None

    def raise_unless_done(
        self, rows: Sequence[Row], asked: set[str], folder: SweepFolder, interrupt: KeyboardInterrupt | None
    ) -> None:
        """The exit code of a sweep: 0 only if every point that was asked for finished."""
        task, hydra = self.master.hydra.overrides.task, self.master.hydra.overrides.hydra
        words = [word for word in [*self.switches, *task, *hydra] if not word.startswith("hydra.sweep.dir=")]
        words = [word for word in words if not word.startswith(("hydra.mode=", "sweep.rerun="))]
        again = shlex.join(["python", "-m", "tuner", "-m", *words, as_word("hydra.sweep.dir", folder.path)])
        if interrupt is not None:
            raise Interrupted(f"the sweep was interrupted\ncontinue: {again}") from interrupt
        missing = [row for row in rows if row.entry.id in asked and row.status != "finished"]
        if missing:
            kinds = ", ".join(f"{row.entry.id} {row.status}" for row in missing)
            statuses = {row.status for row in missing}
            if statuses - {"illegal"}:
                say(f"again    {again}{' sweep.rerun=failed' if 'failed' in statuses else ''}")
            raise SweepIncomplete(f"{len(missing)} of {len(asked)} trials did not finish: {kinds}")


def say(line: str) -> None:
    print(line, flush=True)
