"""The main job on a tiny model: what is on the screen, on the disk and in MLflow, and what the printed commands do."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tuner.types import Summary

STEPS = 6
WORDS = [
    "model=tiny",
    f"train.max_steps={STEPS}",
    "train.val_every_steps=3",
    "train.max_new_tokens=8",
    "out='my run, (first)'",
]


@pytest.fixture(scope="module")
def job(shell: Any) -> Any:
    """The job with everything at its default but the model and the length: data=pydoc, logger=mlflow."""
    done = shell(*WORDS)
    assert (done.code, done.err) == (0, "")
    return done


@pytest.fixture(scope="module")
def out(shell: Any, job: Any) -> Path:
    return Path(shell.folder / "my run, (first)")


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return loaded


def next_commands(text: str) -> dict[str, str]:
    """The rows of the closing block's `Next`."""
    _, _, block = text.partition("\nNext\n")
    return dict(line.strip().split("  ", 1) for line in block.strip().splitlines())


def test_the_screen_tells_the_whole_story_without_control_codes(job: Any, out: Path) -> None:
    assert "\x1b" not in job.out
    assert "\r" not in job.out
    order = [
        "model        random llama, 131,392 parameters",
        "method       lora, rank 8, alpha 16, quantization none",
        "trainable    17,920 parameters (13.64 %), kept in float32",
        "precision    fp32 on ",
        "optimizer    adamw, learning rate 0.001, schedule cosine",
        "data         pydoc: ",
        f"folder       {out}",
        "step 0  validation loss ",
        f"step 1/{STEPS}  loss ",
        f"step 3/{STEPS}  validation loss ",
        f"step {STEPS}/{STEPS}  loss ",
        f"step {STEPS}/{STEPS}  validation loss ",
        "true reply",
        "\nSaved\n",
        "\nNext\n",
    ]
    places = [job.out.find(text) for text in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    assert len(re.findall(r"^step \d+/6  loss .* tokens/s  peak .* GiB  eta ", job.out, re.MULTILINE)) == STEPS
    assert (out / "run.log").read_text() == job.out


def test_the_run_folder_is_complete(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "mlflow.json",
        "overrides.yaml",
        "run.log",
        "samples.json",
        "summary.json",
    ]
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert yaml.safe_load((out / "overrides.yaml").read_text()) == WORDS
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["out"] == str(out)
    assert config["train"]["num_threads"] == len(os.sched_getaffinity(0))
    assert config["logger"]["tracking_uri"] == f"sqlite:///{out.parent}/mlflow.db"
    assert "${" not in (out / "config.yaml").read_text()
    assert json.loads((out / "environment.json").read_text())["dataset"]["name"] == "pydoc"
    samples = json.loads((out / "samples.json").read_text())
    assert [set(sample) for sample in samples] == [{"prompt", "reply", "before", "after"}] * 2


def test_the_summary_says_how_it_ended(summary: dict[str, Any], shell: Any, job: Any) -> None:
    assert list(summary) == [field.name for field in fields(Summary)]
    rows = shell.rows("my run, (first)")
    validation = [row["val/loss"] for row in rows if "val/loss" in row]
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["trainable_params"], summary["total_params"]) == (STEPS, 17920, 131392)
    assert summary["val_loss_before"] == validation[0]
    assert summary["objective"] == summary["val_loss"] == validation[-1] < validation[0]
    assert summary["tokens"] == rows[-1]["tokens"]
    assert summary["train_loss"] == [row["train/loss"] for row in rows if "train/loss" in row][-1]
    assert (summary["precision"], summary["trainable_dtype"], summary["reason"]) == ("fp32", "float32", None)
    assert 0 < summary["seconds_to_first_step"] < summary["seconds"]
    assert summary["peak_memory_mib"] > 100 or summary["device"] != "cpu"


def test_metrics_have_one_line_a_step(shell: Any, job: Any) -> None:
    rows = shell.rows("my run, (first)")
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    keys = {"step", "time", "tokens", "train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s"}
    assert all(set(row) == keys | {"perf/padding_share", "memory/peak_mib"} for row in training)
    validation = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in validation] == [0, 3, STEPS]
    assert all(row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"])) for row in validation)


def test_mlflow_has_the_run(shell: Any, summary: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    from tuner.logging.mlflow_store import silent

    with silent():
        client = MlflowClient(f"sqlite:///{shell.folder / 'mlflow.db'}")
        run = client.get_run(summary["mlflow_run_id"])
        losses = client.get_metric_history(run.info.run_id, "train/loss")
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert run.info.status == "FINISHED"
    assert (run.data.params["peft.lora_rank"], run.data.params["optimizer.lr"]) == ("8", "0.001")
    assert [(one.step, one.value) for one in losses] == [
        (row["step"], row["train/loss"]) for row in shell.rows("my run, (first)") if "train/loss" in row
    ]
    assert run.data.metrics["val/loss"] == summary["val_loss"]
    assert run.inputs.dataset_inputs[0].dataset.name == "pydoc"
    assert {"config.yaml", "overrides.yaml", "samples.json", "adapter"} <= artifacts


@pytest.mark.slow
def test_the_printed_commands_work_as_printed(shell: Any, job: Any, out: Path, summary: dict[str, Any]) -> None:
    commands = next_commands(job.out)
    assert list(commands) == ["generate", "evaluate", "merge", "compare"]
    assert commands["compare"].strip() == f"mlflow ui --backend-store-uri sqlite:///{shell.folder}/mlflow.db"
    generated, evaluated, merged = (shell.line(commands[name]) for name in ("generate", "evaluate", "merge"))
    assert [one.code for one in (generated, evaluated, merged)] == [0, 0, 0]
    left_out = "warning: pydoc: samples left out: 1; cut at data.max_seq_len=256 tokens, nothing of them is left to"
    assert [one.err.partition(" train on")[0] for one in (generated, evaluated, merged)] == ["", left_out, ""]
    assert len(generated.out.strip()) > 0
    (loss,) = re.findall(r"^val_loss: (.*)$", evaluated.out, re.MULTILINE)
    # Equal batches on equal hardware; the order of the sums may differ with the number of threads only.
    assert float(loss) == pytest.approx(summary["val_loss"], rel=1e-6)
    assert f"merged: {out / 'merged'}" in merged.out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tuner

    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(tokens).logits
        ours = tuner.load_model(out / "merged", dtype=torch.float32)(tokens)
    # fp32, two implementations of the same sums
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out / "merged").decode(tokens[0, :3])


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_as_the_adapter_is(shell: Any, job: Any, out: Path, summary: dict[str, Any]) -> None:
    done = shell.inside("evaluate", f"checkpoint={out}/checkpoints/step-{STEPS:08d}")
    assert (done.code, done.err) == (0, "")
    (loss,) = re.findall(r"^val_loss: (.*)$", done.out, re.MULTILINE)
    assert float(loss) == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_run_without_a_logger_comes_into_mlflow_by_sync(shell: Any, job: Any) -> None:
    words = ["model=tiny", *shell.data, "train.max_steps=3", "train.num_samples=0", "train.num_threads=1"]
    quiet = shell.inside(*words, "logger=none", "out=unlogged")
    assert quiet.code == 0
    assert not (shell.folder / "unlogged" / "mlflow.json").exists()
    done = shell("sync", "unlogged")
    assert (done.code, done.err) == (0, "")
    (run_id,) = re.findall(r"is run (\w+) in sqlite:", done.out)

    from mlflow import MlflowClient

    from tuner.logging.mlflow_store import silent

    with silent():
        client = MlflowClient(f"sqlite:///{shell.folder / 'mlflow.db'}")
        run, losses = client.get_run(run_id), client.get_metric_history(run_id, "train/loss")
    assert run.info.status == "FINISHED"
    assert [one.value for one in losses] == [row["train/loss"] for row in shell.rows("unlogged") if "train/loss" in row]


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar(shell: Any) -> None:
    words = ["model=tiny", *shell.data, "train.max_steps=12", "logger=none", "train.num_samples=1", "out=on a tty"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner", *words], cwd=shell.folder, env=shell.env, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
    os.close(ours)
    assert process.wait(timeout=30) == 0
    text = seen.decode()
    assert "\x1b[?25l" in text, "the cursor is hidden while the bar moves"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "and comes back"
    assert "━" in text
    assert "12/12" in text
    assert "\x1b" not in (shell.folder / "on a tty" / "run.log").read_text()
