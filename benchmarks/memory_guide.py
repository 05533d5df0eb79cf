"""What does each memory technique save, and what does it cost? The tables of docs/memory.md.

Each technique is said in words beside those of a base configuration, and compared with it. Predicted is the peak of a
step of Llama 3 8B on an H100, as `python -m tuner estimate` predicts it. Measured is a step of SmolLM2-135M's shape
(random weights) on one thread of a CPU: the peak by the allocator's own events, as `benchmarks/estimate.py` takes it,
and the CPU time of a step. A technique is stepped in turn with its base, so that the drift of a machine reaches both.
Published figures stand beside what is predicted for their settings.

    python benchmarks/memory_guide.py             # predict, and write the tables with the measurements that are there
    python benchmarks/memory_guide.py --measure   # measure anew first: benchmarks/memory_guide.json
    python benchmarks/memory_guide.py --print     # print the tables and leave the guide as it is

A new technique is a `Row` of the part of `PARTS` that it belongs to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

if TYPE_CHECKING:
    from tuner.estimating.predicting import Peak

GUIDE = ROOT / "docs" / "memory.md"
MEASURED = ROOT / "benchmarks" / "memory_guide.json"
MIB, GIB = 2**20, 2**30

TOGETHER = 3
"""Configurations that are stepped in turn with their base, all in memory at once."""


@dataclass(frozen=True)
class Setting:
    """A model and its batches; `tokens` are those of a row."""

    model: str
    device: str
    rows: int
    tokens: int

    @property
    def words(self) -> tuple[str, ...]:
        batches = (f"train.batch_size={self.rows}", f"data.max_seq_len={self.tokens}")
        return (f"model={self.model}", f"estimate.device={self.device}", *batches)


LARGE = Setting("llama3_8b", "h100", 2, 2048)
SMALL = Setting("smollm2_135m", "cpu", 2, 64)
LONGER = replace(SMALL, tokens=256)
"""Where activations are what is saved."""
SHORT = replace(SMALL, tokens=8)
"""Where products are in 16 bits, for which many CPUs have no instructions: there a step of 256 tokens takes minutes."""


@dataclass(frozen=True)
class Row:
    """A technique.

    Attributes:
        words: that turn it on; `{tokens}` and `{quarter}` are the tokens of a row and a quarter of them.
        measured: whether it is measured too; not what only a GPU does, or does in 16 bits (Muon).
    """

    words: tuple[str, ...] = ()
    measured: bool = True

    @property
    def title(self) -> str:
        """Its words, without those that set sizes."""
        return " ".join(word for word in self.words if "{" not in word)


@dataclass(frozen=True)
class Part:
    """Techniques that are compared with one configuration.

    Attributes:
        name: of its table in the guide.
        base: words of that configuration, which is the table's first line.
        rows: the others.
        small: what is measured; in fp32, a CPU's own precision, unless a row is of another.
    """

    name: str
    base: tuple[str, ...]
    rows: tuple[Row, ...]
    small: Setting = SMALL


FULL = ("peft=full", "precision=bf16")
LORA = ("peft=lora", "precision=bf16")
IN_BACKWARD = ("memory.optimizer_in_bwd=true", "train.clip_grad_norm=null")
CHECKPOINTED = "memory.activation_checkpointing=full"

PARTS = (
    Part(
        "precision",
        FULL,
        tuple(Row((f"precision={name}",)) for name in ("fp32", "amp_bf16", "amp_fp16", "bf16_stochastic")),
        SHORT,
    ),
    Part(
        "methods",
        FULL,
        tuple(Row((f"peft={name}",)) for name in ("last_layers", "dora", "lora", "qlora", "ia3", "layernorm")),
    ),
    Part("quantization", LORA, tuple(Row((f"quantization={name}",)) for name in ("int8", "nf4", "fp4"))),
    Part(
        "activations",
        LORA,
        (
            Row(("memory.activation_checkpointing=selective",)),
            Row((CHECKPOINTED,)),
            Row(("memory.activation_offloading=true",), measured=False),
            Row((CHECKPOINTED, "memory.activation_offloading=true"), measured=False),
        ),
        LONGER,
    ),
    Part(
        "batches",
        LORA,
        (
            Row(("train.batch_size=1", "train.gradient_accumulation_steps=2")),
            Row(("data.packing=pack", "data.max_seq_len={quarter}", "data.pack_len={tokens}")),
        ),
        LONGER,
    ),
    Part(
        "optimizers",
        FULL,
        (
            *(Row((f"optimizer={name}",)) for name in ("adamw8bit", "lion8bit", "ademamix8bit")),
            *(Row((f"optimizer={name}",)) for name in ("adafactor", "sgd")),
            Row(("optimizer=sgd", "optimizer.momentum=0")),
            Row(("optimizer=muon",), measured=False),
            *(Row((f"optimizer=paged_{name}",), measured=False) for name in ("adamw", "adamw8bit", "lion8bit")),
        ),
    ),
    Part(
        "in_backward",
        FULL,
        (
            Row(IN_BACKWARD),
            Row((CHECKPOINTED,)),
            Row((CHECKPOINTED, *IN_BACKWARD)),
            Row(("memory=low",)),
            Row(("memory=low", *IN_BACKWARD)),
            Row(("memory.offload_optimizer=true",), measured=False),
            Row((CHECKPOINTED, "memory.offload_optimizer=true"), measured=False),
            Row((CHECKPOINTED, "memory.offload_optimizer=true", *IN_BACKWARD), measured=False),
        ),
    ),
)

NO_ROW = {
    "peft=adapter": "the method that the adapter in the folder is of",
    "peft=rslora": "lora with another scale",
    "peft=pissa": "lora with another start",
    "peft=olora": "lora with another start",
    "optimizer=adam8bit": "adamw8bit without weight decay",
    "optimizer=paged_ademamix8bit": "ademamix8bit whose state is paged, as that of the paged ones with a row",
    "optimizer=custom": "any other class",
}
"""Members of groups that have no row, and why."""


@dataclass(frozen=True)
class Published:
    """A figure of others.

    Attributes:
        name: of the configuration.
        gib: of the figure.
        words: the same here.
        ours: settings that are not stated, as chosen here.
        why: the two differ, where they do.
        source: key of `SOURCES`.
    """

    name: str
    gib: float
    words: tuple[str, ...]
    source: str
    ours: str = ""
    why: str = ""


SOURCES = {
    "flags": "[torchtune's README](https://github.com/pytorch/torchtune#optimization-flags), optimization flags: "
    "one A100, bf16, batch 2, sequence 4096, Alpaca; each line on top of the one before, LoRA and QLoRA with PyTorch's "
    "AdamW and not in backward",
    "speed": "[torchtune's README](https://github.com/pytorch/torchtune#memory-and-training-speed), memory and "
    "training speed: one RTX 4090, batch 2, packed to 2048, compiled, without accumulation",
    "tutorial": "[torchtune's QLoRA tutorial](https://pytorch.org/torchtune/stable/tutorials/qlora_finetune.html): "
    "Llama 2 7B, its `7B_lora_single_device` and `7B_qlora_single_device`; what the allocator had reserved, 1 GB = 1e9",
    "other": "figures of torchtune for Llama 2 7B whose settings are not known here",
    "paper": "[QLoRA](https://arxiv.org/abs/2305.14314): 65B parameters on one GPU of 48 GB",
}

_3B = ("model=llama3_2_3b", "estimate.device=a100_80", "train.batch_size=2", "precision=bf16")
_3B_FULL = (*_3B, "peft=full", "train.clip_grad_norm=null")
_PACKED = ("data.packing=pack", "data.max_seq_len=512", "data.pack_len=4096")
_3B_PACKED = (*_3B_FULL, *_PACKED)
_BF16_ADAPTER = ("precision.trainable=bf16", "train.clip_grad_norm=null", CHECKPOINTED)
_3B_ADAPTER = (
    *_3B,
    *_PACKED,
    *_BF16_ADAPTER,
    "peft.lora_rank=64",
    "peft.lora_attn_modules=[q_proj,v_proj,output_proj]",
)
_8B = ("model=llama3_1_8b", "estimate.device=rtx4090", "train.batch_size=2", "precision=bf16", "data.packing=pack")
_8B_PACKED = (*_8B, "data.max_seq_len=512", "data.pack_len=2048")
_7B = ("model=llama2_7b", "estimate.device=rtx4090", "train.batch_size=2", "data.max_seq_len=512", "precision=bf16")
_7B_ADAPTER = (*_7B, *_BF16_ADAPTER, "train.gradient_accumulation_steps=16")
_65B = (
    "model=llama2_7b",
    "model.hidden_size=8192",
    "model.intermediate_size=22016",
    "model.num_hidden_layers=80",
    "model.num_attention_heads=64",
    "model.num_key_value_heads=64",
    "estimate.device=l40s",
    "precision=bf16",
    "optimizer=paged_adamw",
    "train.batch_size=1",
    "train.gradient_accumulation_steps=16",
    "data.max_seq_len=512",
)
_LOGITS = "their logits of 8,192 tokens are there as a whole, 2 GiB in bf16 and as much of gradients; here never"
_EAGER = "their logits as a whole, 12 GiB in bf16, fp32 and gradients, and what eager norms, rotation and SwiGLU keep"
_SAMPLES = "samples of at most 512 tokens"

PUBLISHED = (
    Published("Llama 3.2 3B: baseline", 25.5, (*_3B_FULL, "data.max_seq_len=512"), "flags", "longest row: 512 tokens"),
    Published("+ packed", 60.0, _3B_PACKED, "flags", _SAMPLES, _EAGER),
    Published(
        "+ compile",
        51.0,
        _3B_PACKED,
        "flags",
        _SAMPLES,
        "their logits as a whole, in fp32 too; here nothing is compiled",
    ),
    Published("+ chunked cross-entropy", 42.9, _3B_PACKED, "flags", _SAMPLES, _LOGITS),
    Published("+ activation checkpointing", 24.9, (*_3B_PACKED, CHECKPOINTED), "flags", _SAMPLES),
    Published(
        "+ optimizer in backward", 23.1, (*_3B_PACKED, CHECKPOINTED, *IN_BACKWARD), "flags", _SAMPLES, "as above"
    ),
    Published(
        "+ activation offloading",
        21.8,
        (*_3B_PACKED, CHECKPOINTED, *IN_BACKWARD, "memory.activation_offloading=true"),
        "flags",
        _SAMPLES,
    ),
    Published(
        "+ 8-bit AdamW",
        17.6,
        (*_3B_PACKED, CHECKPOINTED, *IN_BACKWARD, "memory.activation_offloading=true", "optimizer=adamw8bit"),
        "flags",
        _SAMPLES,
        "as above",
    ),
    Published(
        "LoRA",
        8.5,
        (*_3B_ADAPTER, "peft=lora", "memory.activation_offloading=true"),
        "flags",
        f"{_SAMPLES}; rank 64 on q, v, output and MLP, as in later configs",
    ),
    Published(
        "QLoRA",
        4.6,
        (*_3B_ADAPTER, "peft=qlora", "memory.activation_offloading=true"),
        "flags",
        f"{_SAMPLES}; rank 64 on q, v, output and MLP, as in later configs",
    ),
    Published(
        "Llama 3.1 8B: full",
        18.9,
        (*_8B_PACKED, "peft=full", "optimizer=paged_adamw8bit", CHECKPOINTED, *IN_BACKWARD),
        "speed",
        f"{_SAMPLES}; checkpointing, paged 8-bit AdamW in backward, as in its config",
        "as above, of 4,096 tokens",
    ),
    Published(
        "Llama 3.1 8B: LoRA",
        16.2,
        (*_8B_PACKED, "peft=lora", *_BF16_ADAPTER),
        "speed",
        f"{_SAMPLES}; rank 8 on all layers, checkpointing",
    ),
    Published(
        "Llama 3.1 8B: QLoRA",
        7.4,
        (*_8B_PACKED, "peft=qlora", *_BF16_ADAPTER),
        "speed",
        f"{_SAMPLES}; rank 8 on all layers, checkpointing",
    ),
    Published(
        "Llama 2 7B: LoRA",
        15.57e9 / GIB,
        (*_7B_ADAPTER, "peft=lora"),
        "tutorial",
        "longest row: 512 tokens; rank 8 on all layers",
        "reserved is more than what is alive",
    ),
    Published(
        "Llama 2 7B: QLoRA",
        9.29e9 / GIB,
        (*_7B_ADAPTER, "peft=qlora"),
        "tutorial",
        "longest row: 512 tokens; rank 8 on all layers",
        "theirs is the peak of loading, 9.13 GB before the first step: weights are there dense before they are packed, "
        "and here one at a time",
    ),
    Published(
        "Llama 2 7B: LoRA",
        17.2,
        (*_7B_ADAPTER, "peft=lora"),
        "other",
        "as the line of source 3",
        "batch, sequence and checkpointing are not known",
    ),
    Published(
        "LLaMA 65B: QLoRA fits",
        48e9 / GIB,
        (*_65B, *_BF16_ADAPTER, "peft=qlora", "peft.lora_rank=64"),
        "paper",
        "one row of 512 tokens at a time, rank 64 on all layers, checkpointing, AdamW with paged state",
        "theirs is the size of the GPU and not a peak",
    ),
)


def merged(words: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """All of both, the later one where both say the same key."""
    keys = {word.partition("=")[0] for word in others}
    return (*(word for word in words if word.partition("=")[0] not in keys), *others)


def words_of(part: Part, row: Row, setting: Setting) -> tuple[str, ...]:
    """The command line of a row, with the setting's sizes."""
    sizes = {"tokens": setting.tokens, "quarter": setting.tokens // 4}
    own = [word.format(**sizes) if word.startswith("data.") else word for word in row.words]
    return merged(merged(setting.words, part.base), own)


def measured_words(part: Part, row: Row) -> tuple[str, ...]:
    """Those of what is measured."""
    words = words_of(part, row, part.small)
    return words if part.small is SHORT else merged(words, ("precision=fp32",))


def lines_of(part: Part) -> tuple[Row, ...]:
    """The rows of a part's table, of which the base is the first."""
    return (Row(), *part.rows)


@cache
def predicted(words: tuple[str, ...]) -> Peak:
    """The peak of a run of these words on their `estimate.device`."""
    import tuner
    from tuner.estimating.predicting import Predictor
    from tuner.verbs.estimate import device_for, plan_of

    cfg = tuner.freeze(tuner.compose([*words, "logger=none"]))
    tuner.check(cfg)
    _, device = device_for(cfg)
    return Predictor(plan_of(cfg, device), device).peak()


def available(name: str) -> int:
    """Bytes of a device that are there for a run."""
    from tuner.estimating.devices import device_named

    device = device_named(name)
    return device.memory_bytes - device.reserved_bytes


HEAD = (
    "| words | 135M: MiB | | tokens/s | time | 8B: GiB | | weights | gradients | state | activations | rest |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
COLUMNS = {
    "weights": ("frozen_weights", "quantization_scales", "trainable_weights"),
    "gradients": ("gradients",),
    "state": ("optimizer_state",),
    "activations": ("activations",),
    "rest": ("logits", "temporary"),
}
"""Of the prediction, by component of `tuner estimate`."""


def table(part: Part, measured: Mapping[str, Any]) -> str:
    return "\n".join([*HEAD, *(line(part, row, measured) for row in lines_of(part))])


def line(part: Part, row: Row, measured: Mapping[str, Any]) -> str:
    """A line of a part's table."""
    title = f"`{row.title}`" if row.words else f"the base: `{' '.join(part.base)}`"
    of_part = measured["parts"][part.name]
    small = measured_cells(of_part.get(row.title), of_part[""], part.small.rows * part.small.tokens)
    peak, base = (predicted(words_of(part, each, LARGE)) for each in (row, Row()))
    sizes = [gib(sum(peak.by_kind.get(kind, 0) for kind in kinds)) for kinds in COLUMNS.values()]
    if paged := peak.by_kind.get("paged_state", 0):
        sizes[2] += f", {gib(paged)} paged"
    too_large = " (too large)" if peak.total > available(LARGE.device) else ""
    total = f"{gib(peak.total)}{too_large}"
    return "| " + " | ".join([title, *small, total, change(peak.total / base.total), *sizes]) + " |"


def measured_cells(found: Mapping[str, float] | None, base: Mapping[str, float], tokens: int) -> list[str]:
    """Peak, change, tokens a second and the time of a step as a multiple of the base's."""
    if found is None:
        return ["", "", "", ""]
    peak, rate = found["peak_mib"], tokens / found["cpu_s_a_step"]
    return [f"{peak:,.0f}", change(peak / base["peak_mib"]), f"{rate:.3g}", f"{found['time_of_base']:.2f}"]


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def change(ratio: float) -> str:
    """Against the base, in percent; nothing where there is none."""
    return "" if abs(ratio - 1) < 0.005 else f"{100 * (ratio - 1):+.0f} %"


def published_table() -> str:
    """Published figures beside predictions, by source."""
    head = ["| published | GiB | predicted, GiB | ratio | not stated; chosen here | where they differ |"]
    lines = [*head, "|---|---:|---:|---:|---|---|"]
    for number, source in enumerate(SOURCES, 1):
        lines += [published_line(one, number) for one in PUBLISHED if one.source == source]
    notes = [f"{number}. {text}." for number, text in enumerate(SOURCES.values(), 1)]
    return "\n".join([*lines, "", *notes])


def published_line(one: Published, source: int) -> str:
    total = predicted(one.words).total
    numbers = [f"{one.gib:.1f}", gib(total), f"{total / GIB / one.gib:.2f}"]
    return "| " + " | ".join([f"{one.name} ({source})", *numbers, one.ours, one.why]) + " |"


def settings_text(measured: Mapping[str, Any]) -> str:
    """How the numbers came about, for the guide."""
    run = measured["run"]
    versions = ", ".join(f"{name} {run[name]}" for name in ("python", "torch", "bitsandbytes"))
    return "\n".join(
        [
            f"- **135M**: measured {run['date']}, one thread of a CPU ({run['hardware']}; {versions}), "
            f"`{' '.join(SMALL.words)}`, random weights, in fp32; rows of {LONGER.tokens} tokens in the tables of "
            f"activations and batches, and of {SHORT.tokens} in that of precisions. Tokens are those of a second of "
            f"CPU time, the median of {run['rounds']} steps; `time` is that of a step in the base's.",
            f"- **8B**: predicted, `{' '.join(LARGE.words)}`. The components are those of the moment of the peak; "
            "`rest` is logits and temporaries.",
            "- Percentages are against the base, the first line of each table.",
        ]
    )


def blocks(measured: Mapping[str, Any]) -> dict[str, str]:
    """What is generated, by the name of its place in the guide."""
    tables = {part.name: table(part, measured) for part in PARTS}
    return {"settings": settings_text(measured), **tables, "published": published_table()}


def begin(name: str) -> str:
    return f"<!-- generated by benchmarks/memory_guide.py: {name} -->"


def end(name: str) -> str:
    return f"<!-- end of {name} -->"


def in_guide(text: str, name: str) -> str:
    """What is between the markers of this name.

    Raises:
        ValueError: they are not there, each once.
    """
    if text.count(begin(name)) != 1 or text.count(end(name)) != 1:
        raise ValueError(f"{GUIDE}: expected the lines {begin(name)} and {end(name)}, each once")
    return text.partition(begin(name))[2].partition(end(name))[0].strip("\n")


def rewritten(text: str, generated: Mapping[str, str]) -> str:
    """The guide with other text between its markers.

    Raises:
        ValueError: a marker is missing, or one is there of which nothing is generated.
    """
    there = re.findall(re.escape(begin("NAME")).replace("NAME", "(.*)"), text)
    if unknown := set(there) - set(generated):
        raise ValueError(f"{GUIDE}: nothing is generated for {', '.join(sorted(unknown))}")
    for name, block in generated.items():
        in_guide(text, name)
        before, _, rest = text.partition(begin(name))
        text = f"{before}{begin(name)}\n{block}\n{end(name)}{rest.partition(end(name))[2]}"
    return text


def measure(names: Sequence[str], rounds: int) -> dict[str, Any]:
    """These parts on this machine, the others as they were measured.

    Raises:
        ValueError: others were measured elsewhere.
    """
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    machine = {
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
        "bitsandbytes": version("bitsandbytes"),
        "rounds": rounds,
    }
    before = {} if len(names) == len(PARTS) else json.loads(MEASURED.read_text())
    if before and any(before["run"][key] != value for key, value in machine.items()):
        raise ValueError(f"{MEASURED}: measured with {before['run']}; measure all parts")
    found = {part.name: measured_part(part, rounds) for part in PARTS if part.name in names}
    run = {"date": date.today().isoformat(), **machine}
    return {"run": run, "parts": {**before.get("parts", {}), **found}}


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def measured_part(part: Part, rounds: int) -> dict[str, dict[str, float]]:
    """Peak and time of each row by its title; that of the base is empty.

    The base's time is taken beside every few of the others, and each is compared with those beside it.
    """
    rows = [row for row in part.rows if row.measured]
    found: dict[str, dict[str, float]] = {}
    of_base: list[float] = []
    for first in range(0, len(rows), TOGETHER):
        few = (Row(), *rows[first : first + TOGETHER])
        seconds, peaks = stepped_in_turn([measured_words(part, row) for row in few], rounds)
        of_base += seconds[0]
        for row, times, peak in zip(few, seconds, peaks, strict=True):
            ratio = statistics.median(times) / statistics.median(seconds[0])
            found[row.title] = {"peak_mib": round(peak / MIB, 1), "cpu_s_a_step": round(statistics.median(times), 3)}
            found[row.title]["time_of_base"] = round(ratio, 3)
            print(f"{part.name}: {row.title or 'base'}: {found[row.title]}", file=sys.stderr, flush=True)
    found[""]["cpu_s_a_step"] = round(statistics.median(of_base), 3)
    return found


def stepped_in_turn(configurations: Sequence[tuple[str, ...]], rounds: int) -> tuple[list[list[float]], list[int]]:
    """CPU seconds of some steps and bytes at the peak of one, of each configuration."""
    import torch

    import tuner
    from benchmarks.estimate import peak_of_step, run_of
    from tuner.verbs.estimate import device_for, plan_of

    runs: list[Iterator[Any]] = []
    peaks = []
    for words in configurations:
        cfg = tuner.freeze(tuner.compose([*words, "logger=none"]))
        tuner.check(cfg)
        state, steps = run_of(plan_of(cfg, device_for(cfg)[1]), torch.device("cpu"), rounds + 2)
        next(steps)  # the first, which makes the optimizer's state
        peaks.append(peak_of_step(state, steps, torch.device("cpu"))[1])
        runs.append(steps)
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for steps, times in zip(runs, seconds, strict=True):
            started = time.process_time()
            next(steps)
            times.append(time.process_time() - started)
    return seconds, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--measure",
        nargs="*",
        choices=names,
        metavar="PART",
        help=f"measure anew, all parts or these ({', '.join(names)}), and write {MEASURED.name}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="steps of each configuration whose time counts")
    parser.add_argument("--print", action="store_true", help="print the tables and leave the guide as it is")
    args = parser.parse_args()
    if args.measure is not None:
        MEASURED.write_text(json.dumps(measure(args.measure or names, args.rounds), indent=2) + "\n")
    measured = json.loads(MEASURED.read_text())
    generated = blocks(measured)
    if args.print:
        print("\n\n".join(generated.values()))
    else:
        GUIDE.write_text(rewritten(GUIDE.read_text(), generated))


if __name__ == "__main__":
    main()
