"""What a stopped run prints continues it, however it was started; what is no continuation of it is refused."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import tuner
from tuner.checkpoint.lock import only_run_in
from tuner.errors import Interrupted
from tuner.measure import Speed

STEPS = 4


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    numbers = [f"train.max_steps={STEPS}", "train.val_every_steps=null", "train.num_samples=0", "train.num_threads=1"]
    return ["model=tiny", *shell.data, "logger=none", *numbers]


@contextmanager
def ctrl_c_at_the_second_step() -> Iterator[None]:
    """A signal to this process, as `inside` and the Python call run in it."""
    add, steps = Speed.add, []

    def counted(speed: Speed, tokens: int, seconds: float) -> None:
        add(speed, tokens, seconds)
        steps.append(tokens)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speed, "add", counted)
        yield


def resume_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("resume: ")]
    return line.removeprefix("resume: ")


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_printed_command_keeps_the_switches(shell: Any, words: list[str], resume: str) -> None:
    own = shell.folder / "own" / "schedule"
    own.mkdir(parents=True, exist_ok=True)
    (own / "mine.yaml").write_text("defaults: [cosine, _self_]\nwarmup_steps: 3\n")
    with ctrl_c_at_the_second_step():
        done = shell.inside(
            "--config-dir", "own", *words, "schedule=mine", f"checkpoint.resume={resume}", f"out=switched-{resume}"
        )
    assert done.code == 130
    command = shlex.split(resume_line(done.err))
    assert command[:4] == ["python", "-m", "tuner", "--config-dir=own"]
    resumed = shell.inside(*command[3:])
    assert (resumed.code, resumed.err) == (0, "")
    assert f"resumed at step 2 of {STEPS}" in resumed.out


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_python_call_is_continued_by_the_printed_python_call(
    shell: Any, words: list[str], resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    cfg = tuner.compose([*words, "seed=3", f"checkpoint.resume={resume}", f"out='{tmp_path / 'a run'}'"])
    with ctrl_c_at_the_second_step(), pytest.raises(Interrupted) as caught:
        tuner.run(cfg)
    call = resume_line(str(caught.value))
    assert call.startswith("tuner.run(OmegaConf.")
    monkeypatch.chdir("/")
    summary = eval(call, {"tuner": tuner, "OmegaConf": OmegaConf})
    torch.set_num_threads(threads)
    assert (summary.status, summary.steps, summary.out) == ("finished", STEPS, str(tmp_path / "a run"))


def test_a_folder_at_work_is_refused_before_anything_is_loaded(shell: Any, words: list[str]) -> None:
    folder = shell.folder / "busy"
    with only_run_in(folder):
        done = shell.inside(*words, "out=busy")
    line = f"error: {folder}: another process is at work on this run; wait for its end, or give another out\n"
    assert (done.code, done.out, done.err) == (2, "", line)


@pytest.mark.slow
def test_an_unfinished_run_of_other_data_or_fewer_steps_is_refused_in_a_line(shell: Any, words: list[str]) -> None:
    with ctrl_c_at_the_second_step():
        assert shell.inside(*words, "out=unfinished").code == 130
    fewer = shell.inside(*words, "train.max_steps=1", "out=unfinished")
    said = f"{shell.folder / 'unfinished'} has done 2 steps and 1 are asked for; say train.max_steps=2 or more"
    assert (fewer.code, fewer.err) == (2, f"error: {said}, or another out\n")

    file = shell.folder / "sums.jsonl"
    before = file.read_text()
    try:
        file.write_text(before.replace("It is", "That is"))
        other = shell.inside(*words, "out=unfinished")
    finally:
        file.write_text(before)
    assert other.code == 2
    assert other.err.startswith("error: the data is not what this run began with: its fingerprint was ")
    assert other.err.count("\n") == 1
    assert shell.inside(*words, "out=unfinished").code == 0


@pytest.fixture(scope="module")
def trunk(shell: Any, words: list[str]) -> Path:
    """A run with a checkpoint after each step."""
    assert shell.inside(*words, "checkpoint.every_steps=1", "checkpoint.keep_last=9", "out=trunk").code == 0
    return Path(shell.folder / "trunk")


@pytest.mark.slow
@pytest.mark.parametrize(("resume", "step"), [("trunk", STEPS), ("trunk@2", 2), ("trunk/checkpoints/step-00000003", 3)])
def test_a_run_begins_from_anothers_checkpoint(
    shell: Any, words: list[str], trunk: Path, resume: str, step: int
) -> None:
    """With the same settings it ends where the other did, bit for bit; what has changed is said."""
    longer = [word for word in words if "max_steps" not in word]
    same = shell.inside(*words, f"checkpoint.resume={resume}", f"out=branch-{step}")
    said = f"begun from {trunk}/checkpoints/step-{step:08d} at step {step} of {STEPS}; changed since: nothing"
    assert (same.code, said in " ".join(same.out.split())) == (0, True)
    assert [row["step"] for row in shell.rows(f"branch-{step}") if "train/loss" in row] == [*range(step + 1, STEPS + 1)]
    runs = (f"branch-{step}", "trunk")
    mine, theirs = (load_file(shell.folder / run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert all(mine[name].equal(theirs[name]) for name in theirs)

    other = ["train.max_steps=6", "optimizer.lr=0.01", f"checkpoint.resume={resume}", f"out=other-{step}"]
    done = shell.inside(*longer, *other)
    said = (
        f"at step {step} of 6; changed since: optimizer.lr was 0.001 and is 0.01, train.max_steps was {STEPS} and is 6"
    )
    assert (done.code, said in " ".join(done.out.split())) == (0, True)


@pytest.mark.slow
def test_a_branch_that_was_stopped_goes_on_from_its_own_checkpoint(shell: Any, words: list[str], trunk: Path) -> None:
    branch = [*words, "checkpoint.resume=trunk@1", "out=stopped branch"]
    with ctrl_c_at_the_second_step():
        stopped = shell.inside(*branch)
    assert (stopped.code, "after step 3" in stopped.err) == (130, True)
    resumed = shell.inside(*shlex.split(resume_line(stopped.err))[3:])
    assert (resumed.code, f"resumed at step 3 of {STEPS}" in resumed.out) == (0, True)
    assert [row["step"] for row in shell.rows("stopped branch") if "train/loss" in row] == [2, 3, 4]


WRONG = {
    "trunk@7": "trunk@7: no checkpoint of that step; there are 1, 2, 3, 4",
    "nowhere": "nowhere: no run folder with checkpoints and no checkpoint; say auto, never, RUN, RUN@STEP or RUN/",
    "nver": "nver: no run folder with checkpoints and no checkpoint; say auto, never, ",
    "trunk/checkpoints": "trunk/checkpoints: no run folder with checkpoints and no checkpoint; say auto, never, ",
}


@pytest.mark.slow
@pytest.mark.parametrize("resume", WRONG)
def test_a_checkpoint_that_is_not_there(shell: Any, words: list[str], trunk: Path, resume: str) -> None:
    done = shell.inside(*words, f"checkpoint.resume={resume}", "out=nothing")
    assert done.code == 2
    assert done.err.startswith(f"error: checkpoint.resume={shell.folder}/{WRONG[resume]}")
    assert done.err.count("\n") == 1
    assert not (shell.folder / "nothing").exists()


def test_an_earlier_step_of_the_same_folder_is_refused(shell: Any, words: list[str], trunk: Path) -> None:
    done = shell.inside(*words, "checkpoint.resume=trunk@2", "out=trunk", "train.max_steps=9")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a checkpoint of out=" in done.err
    assert "give another out" in done.err


def test_a_damaged_one_is_refused_where_it_was_chosen_and_left_out_where_it_was_not(
    shell: Any, words: list[str], trunk: Path
) -> None:
    copy = shutil.copytree(trunk, shell.folder / "damaged")
    frozen = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(frozen.replace(str(trunk), str(copy)))
    file = copy / "checkpoints" / f"step-{STEPS:08d}" / "training.pt"
    file.write_bytes(file.read_bytes()[:-1])
    chosen = shell.inside(*words, "checkpoint.resume=damaged", "out=from damaged")
    assert (chosen.code, chosen.err.count("\n")) == (2, 1)
    assert f"{file.parent}: damaged: training.pt: " in chosen.err
    (copy / "summary.json").unlink()
    done = shell.inside(*words, "out=damaged")
    out = " ".join(done.out.split())
    assert (done.code, f"resumed at step {STEPS - 1} of {STEPS}" in out) == (0, True)
    assert f"{file.parent}: damaged: training.pt: " in out
    assert f"it is left out, step-{STEPS - 1:08d} is whole" in out


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_summary_that_cannot_be_read_is_one_line(
    shell: Any, words: list[str], trunk: Path, tmp_path: Path, content: str
) -> None:
    copy = shutil.copytree(trunk, tmp_path / "run")
    frozen = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(frozen.replace(str(trunk), str(copy)))
    (copy / "summary.json").write_text(content)
    done = shell.inside(*words, f"out={copy}")
    said = f"error: {copy}/summary.json: damaged, so it does not say how the run ended; remove it to go on\n"
    assert (done.code, done.err) == (2, said)


@pytest.mark.slow
def test_another_base_is_refused(shell: Any, tmp_path: Path) -> None:
    """The folder's weights are exchanged under a run that was stopped."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuner.tokenizers.tiny import write_tiny_tokenizer

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=352, max_position_embeddings=512, **shape))
        model.save_pretrained(tmp_path / str(seed))
        write_tiny_tokenizer(tmp_path / str(seed))
    base = shutil.copytree(tmp_path / "0", tmp_path / "base")
    words = ["model=llama", f"model.path={base}", *shell.data, "logger=none", "train.num_samples=0"]
    words += ["train.max_steps=4", "train.num_threads=1", "out=on a base"]
    with ctrl_c_at_the_second_step():
        assert shell.inside(*words).code == 130
    shutil.copy(tmp_path / "1" / "model.safetensors", base)
    done = shell.inside(*words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "trained on another base: its fingerprint was " in done.err
    shutil.copy(tmp_path / "0" / "model.safetensors", base)
    assert shell.inside(*words).code == 0
