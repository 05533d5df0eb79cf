"""Weights & Biases."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from tuner.logging.background import BackgroundLogger
from tuner.logging.disk import Row, write_json
from tuner.logging.extras import require
from tuner.logging.flat import numbers
from tuner.types import NonNegativeFloat, PositiveFloat, RunInfo

RECORD = "wandb.json"


class WandbLogger(BackgroundLogger):
    """One W&B run per run folder; `wandb.json` in it remembers the run, which a resumed run continues.

    Args:
        project: W&B project.
        entity: user or team; null for the account's default.
        run_name: null for the name of the run folder.
        tags: tags of the run.
        mode: `offline` writes files that `wandb sync` uploads, `online` uploads, `disabled` does nothing.
        flush_every_s: metrics are gathered this long and sent together.
        connect_timeout_s: how long W&B may take to begin the run.
        close_timeout_s: how long the end of a run waits for what is still to be sent.

    Raises:
        TunerError: if wandb is not installed.
    """

    backend: ClassVar[str] = "W&B"
    remedy: ClassVar[str] = "the run goes on; {out}/metrics.jsonl and `wandb sync {out}/wandb/*run-*` hold the rest"

    def __init__(
        self,
        project: str,
        entity: str | None,
        run_name: str | None,
        tags: list[str],
        mode: Literal["offline", "online", "disabled"],
        flush_every_s: PositiveFloat,
        connect_timeout_s: PositiveFloat,
        close_timeout_s: NonNegativeFloat,
    ) -> None:
        require("wandb", "wandb")
        super().__init__(flush_every_s, close_timeout_s)
        self.project = project
        self.entity = entity
        self.run_name = run_name
        self.tags = tags
        self.mode = mode
        self.connect_timeout_s = connect_timeout_s
        self._run: Any = None

    def open(self, run: RunInfo) -> dict[str, Any]:
        import wandb

        run.out.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(silent=True, console="off", init_timeout=self.connect_timeout_s)
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name or run.out.name,
            id=_run_id(run),
            resume="allow",
            tags=self.tags,
            config=dict(run.config),
            dir=run.out,
            mode=self.mode,
            settings=quiet,
        )
        wandb.termsetup(quiet, None)  # what it says outside of a run, as of every folder it takes
        self._run.define_metric("*", step_metric="step")  # W&B's own step refuses the replayed steps of a resumed run
        self._run.config.update({"dataset": dict(run.dataset)}, allow_val_change=True)
        return {"wandb_run_id": self._run.id}

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"step": row.step, **row.metrics})

    def keep(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type=path.stem)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def finish(self, status: str, summary: Mapping[str, Any], complete: bool) -> None:
        self._run.summary.update({**numbers(summary), "status": status})
        self._run.finish(exit_code=0 if status == "finished" else 1)


def _run_id(run: RunInfo) -> str:
    """The run's id at W&B: that of `wandb.json` where the run is resumed, else a new one."""
    record = run.out / RECORD
    if not (run.resumed and record.exists()):
        write_json(record, {"run_id": secrets.token_hex(4)})
    return str(json.loads(record.read_text(encoding="utf-8"))["run_id"])
