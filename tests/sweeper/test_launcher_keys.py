"""The words of a sweep that are not of a trial are checked like every other key, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.__main__ import dispatch
from tuner.errors import ConfigError, TunerError

LOCAL = "hydra/launcher=local"
SLURM = "hydra/launcher=slurm"
NOTHING = "no value to choose from"
REFUSED = [
    ([LOCAL, "hydra.launcher.max_parallel=two"], ["max_parallel=two: expected a whole number > 0 or null"]),
    ([LOCAL, "hydra.launcher.max_parallel=0"], ["max_parallel=0: expected a whole number > 0 or null"]),
    ([LOCAL, "hydra.launcher.gpus=-1"], ["gpus=-1: expected a whole number >= 0 or null"]),
    ([LOCAL, "hydra.launcher.time_min=1.5"], ["time_min=1.5: expected a whole number > 0 or null"]),
    (
        [LOCAL, "hydra.launcher.max_paralel=2"],
        ["max_paralel=2: no such key; did you mean max_parallel? valid: gpus, max_parallel, time_min"],
    ),
    (
        [LOCAL, "+hydra.launcher.max_paralel=2"],
        ["max_paralel=2: no such key; did you mean max_parallel? valid: gpus, max_parallel, time_min"],
    ),
    (
        [LOCAL, "hydra.launcher.max_parallel=two", "hydra.launcher.gpus=many", "+hydra.launcher.partition=gpu"],
        ["max_parallel=two: expected", "gpus=many: expected", "partition=gpu: no such key; valid: gpus, max_parallel"],
    ),
    (["hydra.launcher.max_parallel=2"], ["hydra.launcher.max_parallel=2: no such key"]),
    ([SLURM, "hydra.launcher.memory_gib=lots"], ["memory_gib=lots: expected a number > 0 or null"]),
    ([SLURM, "hydra.launcher.setup=module"], ["setup=module: expected a list"]),
    ([SLURM, "hydra.launcher.time=60"], ["time=60: no such key; did you mean time_min?"]),
    (["hydra/launcher=slrm"], ["hydra/launcher=slrm: no such option; did you mean slurm?"]),
    (["hydra/sweeper=gird"], ["hydra/sweeper=gird: no such option; did you mean grid?"]),
    (["+hydra.sweeper.max_batch_size=2"], ["hydra.sweeper.max_batch_size=2: no such key; valid: (nothing)"]),
    (["sweep.rerun=1"], ["sweep.rerun=1: expected one of none, failed, all"]),
    ([LOCAL, "hydra.launcher.gpus=0,1"], ["Sweeping over Hydra's configuration is not supported"]),
]
XFAIL = [
    pytest.param(["optimizer=glob(zzz*)"], [f"optimizer=glob(zzz*): {NOTHING}"]),
    pytest.param(["train.max_steps=range(4,1)"], [f"train.max_steps=range(4,1): {NOTHING}"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentences"), [*(pytest.param(*row, id=" ".join(row[0])) for row in REFUSED), *XFAIL]
)
def test_refused_before_anything_is_written(words: list[str], sentences: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        dispatch(["-m", "model=tiny", "seed=1,2", *words])
    problems = caught.value.problems
    assert len(problems) == len(sentences), problems
    for sentence in sentences:
        assert sum(sentence in problem for problem in problems) == 1, problems
    assert not any("\n" in problem for problem in problems)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_glob_is_an_axis_of_the_command(tmp_path: Path) -> None:
    """Shown by what a sweep refuses of its points, so that none is run."""
    with pytest.raises(TunerError) as caught:
        dispatch(["-m", "model=tiny", "peft=glob(*,exclude=adapter)", "quantization=nf4", "sweep.on_illegal=refuse"])
    assert str(caught.value).startswith("peft=full: peft=full quantization=nf4: quantized weights cannot be trained")
    assert list(tmp_path.iterdir()) == []


def test_sbatch_is_missed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        dispatch(["-m", "model=tiny", "seed=1,2", SLURM])
    assert caught.value.problems == [
        "hydra/launcher=slurm: no sbatch on the PATH; run this where jobs are submitted, or say hydra/launcher=local"
    ]
    assert list(tmp_path.iterdir()) == []
