"""The commits of a model and a dataset of the Hugging Face Hub, written into a configuration when it is frozen.

`main` moves; what a run trained on does not. A run that is continued, a trial that waits in a queue and a run that is
repeated from its config.yaml get the weights and the rows of the commits that are written there.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from tuner.errors import ConfigError
from tuner.hub import is_commit, pinned, pinned_dataset


def pin(config: DictConfig) -> None:
    """Replace `model.revision` and `data.revision` by the commits they name, in place; without a `source`, nothing.

    A revision that is not said is the commit of the run folder `out`, where that holds a run of this source.

    Raises:
        ConfigError: the extra `hub` or `datasets` is not installed, no such name is possible, or the run folder's
            config.yaml is damaged.
        ModelError, DataError: the hub cannot be reached or does not give it.
    """
    for group, commit_of in {"model": pinned, "data": pinned_dataset}.items():
        keys = (f"{group}.source", f"{group}.revision", f"{group}.path", "out")
        source, revision, path, out = (OmegaConf.select(config, key, throw_on_missing=False) for key in keys)
        if not isinstance(source, str) or not isinstance(revision, str | None) or path is not None:
            continue  # nothing to pin, or nothing that `check` lets pass
        if revision is None and isinstance(out, str):
            revision = _of_run(Path(out), group, source)
        OmegaConf.update(config, f"{group}.revision", commit_of(source, revision))


def _of_run(out: Path, group: str, source: str) -> str | None:
    """The commit that a run folder was pinned to; None where it holds no run of this source.

    What else is wrong with the folder, `tuner.checkpoint.continuation` says.
    """
    file = out / "config.yaml"
    if not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        source_before, revision = content[group].get("source"), content[group].get("revision")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a run's configuration: {' '.join(str(error).split())}") from error
    return revision if source_before == source and is_commit(revision) else None
