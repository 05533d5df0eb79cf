"""A run that is killed at random moments and started again, as often as it takes, is the run that nobody killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.bitwise import assert_bitwise, flat
from tuner.checkpoint.folder import checkpoints_of
from tuner.config import conf_dir

pytestmark = pytest.mark.slow

ZYGOTE = Path(__file__).with_name("zygote.py")
STEPS = 12
KILLS = 3
SAME_IN_ALL_RUNS = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "train/loss_scale")
SAME_IN_ALL_RUNS += ("val/loss", "val/perplexity")
CHOICES = {
    "method": {
        "full": ["peft=full"],
        "lora": ["peft=lora", "peft.lora_rank=32", "peft.lora_dropout=0.1"],
        "qlora": ["peft=qlora", "peft.lora_rank=32", "peft.lora_dropout=0.1"],
    },
    "optimizer": {
        "adamw": ["optimizer=adamw"],
        "adamw8bit": ["optimizer=adamw8bit"],
        "paged_adamw8bit": ["optimizer=paged_adamw8bit"],
        "sgd": ["optimizer=sgd", "optimizer.momentum=0.9"],
    },
    "precision": {
        "fp32": ["precision=fp32"],
        "bf16": ["precision=bf16"],
        "bf16_stochastic": ["precision=bf16_stochastic"],
        "amp_bf16": ["precision=amp_bf16"],
        # The scale falls in the first steps and rises later, so that both are on either side of a kill.
        "amp_fp16": ["precision=amp_fp16", "precision.initial_loss_scale=16777216", "precision.growth_interval=4"],
    },
    "data": {"unpacked": [], "packed": ["data.packing=pack"], "streaming": ["data.streaming=true"]},
    "accumulation": {str(n): [f"train.gradient_accumulation_steps={n}"] for n in (1, 3)},
}
OTHER_METHODS = {
    "dora": ["peft=dora", "quantization=nf4", "peft.lora_rank=32", "peft.lora_dropout=0.1"],
    "pissa": ["peft=pissa", "quantization=nf4", "peft.lora_rank=32"],
    "olora": ["peft=olora", "peft.lora_rank=32"],
    "ia3": ["peft=ia3", "quantization=int8"],
    "layernorm": ["peft=layernorm"],
    "last_layers": ["peft=last_layers", "peft.num_layers=1"],
}
OTHER_OPTIMIZERS = {
    "muon": ["optimizer=muon", "optimizer.no_decay=[norms,biases,embeddings]"],
    "ademamix8bit": ["optimizer=ademamix8bit", "optimizer.t_alpha=12", "optimizer.t_beta3=12"],
}
OTHERS = [
    ("full", "muon", "bf16", "packed", "3"),
    ("lora", "ademamix8bit", "amp_bf16", "streaming", "1"),
    ("dora", "adamw8bit", "bf16", "packed", "3"),
    ("pissa", "adamw", "fp32", "unpacked", "3"),
    ("olora", "paged_adamw8bit", "bf16", "streaming", "1"),
    ("ia3", "sgd", "bf16", "packed", "1"),
    ("layernorm", "adamw", "bf16", "unpacked", "1"),
    ("last_layers", "adamw8bit", "fp32", "streaming", "3"),
]
"""Once each: what they share with lora and full is met there with everything."""
# Matrices of at least 4096 elements: smaller ones bitsandbytes keeps in fp32.
SHAPE = ["model=tiny", "model.hidden_size=128", "model.intermediate_size=192"]
NUMBERS = [f"train.max_steps={STEPS}", "train.val_every_steps=5", "train.num_samples=0", "train.num_threads=1"]
LARGE = 36
"""A sample of the sixth step where two batches of four rows are one, and of the fifth where they are streamed."""
OFTEN = ["checkpoint.every_steps=2", "checkpoint.keep_last=2", "checkpoint.keep_best=1", "logger=none"]


def pairwise() -> list[tuple[str, ...]]:
    """Combinations in which every two choices of different groups meet, found greedily."""
    everything = list(itertools.product(*CHOICES.values()))
    missing = {pair for one in everything for pair in pairs(one)}
    chosen = []
    while missing:
        chosen.append(max(everything, key=lambda one: len(pairs(one) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def pairs(one: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(one), 2))


def test_every_two_choices_meet() -> None:
    chosen = pairwise()
    sizes = [len(options) for options in CHOICES.values()]
    assert len({pair for one in chosen for pair in pairs(one)}) == sum(
        a * b for a, b in itertools.combinations(sizes, 2)
    )
    assert 12 <= len(chosen) <= 22


def test_every_method_is_among_them() -> None:
    assert {choice for one in OTHERS for choice in one} >= {*OTHER_METHODS, *OTHER_OPTIMIZERS}
    others = {"rslora", "adapter"}  # lora with another number, and what goes on from an adapter
    assert {*CHOICES["method"], *OTHER_METHODS, *others} == {file.stem for file in (conf_dir() / "peft").glob("*.yaml")}


class Zygote:
    """Starts commands in forks; see zygote.py."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "output.txt"
        environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(ZYGOTE)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, words: list[str], out: Path, steps: int = 0, then_s: float = math.inf, *, large: int | None = None
    ) -> int:
        """The exit code, -9 where it came to a kill: `then_s` after so many lines of metrics were there.

        With `large` training has no memory for a batch of more than two rows with this sample.
        """
        line = {"words": [*words, f"out={out}"], "log": str(self.log), "large": large}
        pid = int(self._ask(json.dumps(line)))
        ended = threading.Event()

        def kill() -> None:
            metrics = out / "metrics.jsonl"
            while steps and not (metrics.exists() and metrics.read_bytes().count(b"\n") > steps):
                if ended.wait(0.002):
                    return
            if not ended.wait(then_s):
                with suppress(ProcessLookupError):  # it has ended this very moment
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        if then_s < math.inf:
            killer.start()
        code = int(self._ask("wait"))
        ended.set()
        return code

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    one = Zygote(tmp_path_factory.mktemp("killed"))
    yield one
    one.end()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"instruction": f"Add {i} to {i % 7}.", "input": "", "output": f"It is {i + i % 7}" + ", truly" * (i % 5)}
        for i in range(90)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=alpaca", f"data.path={file}", "data.val_fraction=0.1", "train.batch_size=2"]


def learned(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in SAME_IN_ALL_RUNS if key in row} for row in rows]


def killed_and_whole(words: list[str], zygote: Zygote, tmp_path: Path, large: int | None = None) -> dict[str, Any]:
    """See to it that a run that is killed again and again ends as one that is not; the training state of the latter."""
    run = partial(zygote.run, words, large=large)
    started = time.monotonic()
    assert run(tmp_path / "whole") == 0, zygote.log.read_text()[-3000:]
    whole_s = time.monotonic() - started

    out = tmp_path / "killed"
    codes = [run(out, random.randrange(1, STEPS - 1), random.uniform(0, 0.05))]
    codes += [run(out, then_s=whole_s * random.uniform(0.2, 0.9)) for _ in range(KILLS - 1)]
    codes += [run(out)]
    assert set(codes) <= {0, -signal.SIGKILL}, zygote.log.read_text()[-3000:]
    assert (codes[0], codes[-1]) == (-signal.SIGKILL, 0)

    assert learned(out) == learned(tmp_path / "whole")
    steps = [row["step"] for row in learned(out) if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    mine, theirs = (
        {str(file.relative_to(folder)): load_file(file) for file in folder.glob("*/*.safetensors")}
        for folder in (out, tmp_path / "whole")
    )
    assert mine
    assert_bitwise(mine, theirs)
    kept = [checkpoints_of(folder) for folder in (out, tmp_path / "whole")]
    assert [path.name for path in kept[0]] == [path.name for path in kept[1]]
    states = [torch.load(folders[-1] / "training.pt", weights_only=True) for folders in kept]
    for state in states:
        del state["seconds"]
    assert_bitwise(states[0], states[1])
    whole: dict[str, Any] = states[1]
    return whole


@pytest.mark.parametrize("one", [*pairwise(), *OTHERS], ids="-".join)
def test_killed_and_started_again_it_ends_bit_for_bit_the_same(
    one: tuple[str, ...], zygote: Zygote, data: list[str], tmp_path: Path
) -> None:
    others = {"method": OTHER_METHODS, "optimizer": OTHER_OPTIMIZERS}
    groups = [options | others.get(group, {}) for group, options in CHOICES.items()]
    chosen = [word for group, choice in zip(groups, one, strict=True) for word in group[choice]]
    words = [*SHAPE, *data, *chosen, *NUMBERS, *OFTEN, f"data.cache_dir={tmp_path / 'cache'}"]
    state = killed_and_whole(words, zygote, tmp_path)
    large = {v.dtype for v in flat(state["optimizer"]).values() if isinstance(v, torch.Tensor) and v.numel() > 4095}
    assert (torch.uint8 in large) is ("8bit" in one[1])


@pytest.mark.parametrize(("source", "whole_steps"), [("unpacked", 5), ("streaming", 4)])
def test_killed_about_a_halving_of_its_batches_it_ends_bit_for_bit_the_same(
    source: str, whole_steps: int, zygote: Zygote, data: list[str], tmp_path: Path
) -> None:
    """Memory runs out within a window, after dropout has drawn; that batches are halved is in the checkpoints."""
    words = [*SHAPE, *data, *CHOICES["method"]["lora"], *NUMBERS, *OFTEN, f"data.cache_dir={tmp_path / 'cache'}"]
    words += [*CHOICES["data"][source], "train.batch_size=4", "train.gradient_accumulation_steps=2"]
    words += ["train.on_oom=retry"]
    state = killed_and_whole(words, zygote, tmp_path, large=LARGE)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    at_once = [row.get("memory/rows_at_once") for row in rows if "train/loss" in row]
    assert at_once == [None] * whole_steps + [2] * (STEPS - whole_steps)
    assert state["rows"] == {"train_rows": 2, "val_rows": None}
