"""How fast are forward and backward of each family beside transformers, without adapters or an optimizer?

Each family's folder is written by transformers with random weights. Three workers load it, new ones for each
dtype, since what a process freed before decides how much memory it has to fetch again: ours, and transformers with its
default attention (`sdpa`; Gemma 2: `eager`) and with `eager`. They are asked for one step in turn, so that the
drift of a shared machine reaches all alike, and ours is compared with the faster of the other two. `train` is the
gradient of the mean loss by every parameter: `tuner.loop.backward`, and `model(tokens, labels=tokens).loss.backward()`.
`forward` is all logits without gradient. Before a row counts, the losses (for `forward`, the logits' mean magnitudes)
must agree. Threads that wait sleep (`OMP_WAIT_POLICY=passive`), so that CPU time is work.

    python benchmarks/model.py --families llama gemma2 --shapes small --steps 7
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

if TYPE_CHECKING:
    import torch

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "smaller": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 128},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 128, "query_pre_attn_scalar": 64},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
"""What each adds to the shape."""

SIDES = ("tuner", "default", "eager")
DTYPES = ("float32", "bfloat16")
MODES = ("train", "forward")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.01}
"""Relative difference of the losses: the same sums in another order."""


def write_model(family: str, shape: str, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    keys = {**SHAPES[shape], "max_position_embeddings": 2048, "pad_token_id": None, **FAMILIES[family]}
    config = transformers.AutoConfig.for_model(family, **keys)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def ours(folder: Path, dtype: torch.dtype) -> tuple[Any, Callable[[torch.Tensor], float]]:
    """The model and a function that adds the gradient and returns the loss."""
    import torch

    from tuner.build import load_base
    from tuner.loop import backward
    from tuner.models.family import config_of_folder
    from tuner.types import Batch

    model = load_base(config_of_folder(folder), dtype, torch.device("cpu"), seed=0).requires_grad_(True).train()
    return model, lambda tokens: backward(model, [Batch(tokens, tokens)])


def theirs(folder: Path, dtype: torch.dtype, attention: str) -> tuple[Any, Callable[[torch.Tensor], float]]:
    """The same with transformers."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=dtype, attn_implementation=None if attention == "default" else attention).train()

    def step(tokens: torch.Tensor) -> float:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    model.all_logits = logits
    return model, step


def one_step(side: str, model: Any, train: Callable[[Any], float], mode: str, tokens: torch.Tensor) -> dict[str, float]:
    """Take one step; wall and process CPU seconds, the most memory above the level before it, and what to compare."""
    import torch

    from tuner.measure import peak_memory_mib, reset_peak_memory

    cpu_device = torch.device("cpu")
    gc.collect()
    reset_peak_memory(cpu_device)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    before, wall, cpu = peak_memory_mib(cpu_device), time.perf_counter(), time.process_time()
    if mode == "train":
        value = train(tokens)
    else:
        with torch.no_grad():
            logits = model(tokens) if side == "tuner" else model.all_logits(tokens)
            value = float(logits[:, -1].float().abs().mean())
    taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "value": value}
    taken["mib"] = peak_memory_mib(cpu_device) - before
    taken["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    model.zero_grad(set_to_none=True)
    return taken


def work(side: str, threads: int) -> None:
    """A worker: one JSON line for each line read. `load` has a model loaded, `step` a step taken."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    torch.set_num_threads(threads)
    model: Any = None
    train: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, float] = {}
        if "load" in asked:
            del model, train
            folder, dtype = Path(asked["load"]), getattr(torch, asked["dtype"])
            model, train = ours(folder, dtype) if side == "tuner" else theirs(folder, dtype, side)
        else:
            generator = torch.Generator().manual_seed(1)
            tokens = torch.randint(0, asked["vocab"], (asked["batch"], asked["length"]), generator=generator)
            answer = one_step(side, model, train, asked["mode"], tokens)
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A side in a process of its own."""

    def __init__(self, side: str, args: argparse.Namespace) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", side, "--threads", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(args.threads),
                "OMP_WAIT_POLICY": "passive",
                "HF_HUB_OFFLINE": "1",
            },
        )

    def ask(self, **asked: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended before its answer: run with --verbose to see why")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Taken = dict[str, list[dict[str, float]]]


def measure(workers: dict[str, Worker], dtype: str, mode: str, asked: dict[str, Any], steps: int) -> Taken:
    """Steps of all sides in turn, the first of each not counted; the slower attention of transformers ends early."""
    first = {side: worker.ask(mode=mode, **asked)["value"] for side, worker in workers.items()}
    if any(abs(first[side] - first["tuner"]) > TOLERANCE[dtype] * abs(first["tuner"]) for side in workers):
        raise SystemExit(f"{asked}, {mode}, {dtype}: they compute different things: {first}")
    taken: Taken = {side: [] for side in workers}
    for count in range(steps):
        if count == 1:
            del taken[max(("default", "eager"), key=lambda side: min(step["cpu_s"] for step in taken[side]))]
        for side in taken:
            taken[side].append(workers[side].ask(mode=mode, **asked))
    return taken


def cells(taken: Taken) -> list[str]:
    """The columns after the ones that say what was measured; ratios above 1 are in our favour, below 1 in memory."""
    us, (side, them) = taken["tuner"], next((side, steps) for side, steps in taken.items() if side != "tuner")

    def median(steps: list[dict[str, float]], key: str) -> float:
        return statistics.median(step[key] for step in steps)

    def ratio(key: str) -> float:
        return statistics.median(b[key] / a[key] for a, b in zip(us, them, strict=True))

    milliseconds = [f"{1000 * median(steps, 'wall_s'):.0f}" for steps in (us, them)]
    mebibytes = [f"{median(steps, 'mib'):.0f}" for steps in (us, them)]
    faults = [f"{median(steps, 'faults') / 1000:.1f}" for steps in (us, them)]
    return [side, *milliseconds, f"{ratio('wall_s'):.2f}", f"{ratio('cpu_s'):.2f}", *mebibytes, *faults]


COLUMNS = ("family", "shape", "dtype", "tokens", "step", "transformers'", "tuner ms", "transformers ms")
COLUMNS += (
    "speed ratio",
    "CPU ratio",
    "tuner MiB",
    "transformers MiB",
    "tuner 1000 faults",
    "transformers 1000 faults",
)


def rows(args: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    for shape in args.shapes:
        for family in args.families:
            where = folder / f"{family}-{shape}"
            write_model(family, shape, where)
            for dtype in args.dtypes:
                workers = {side: Worker(side, args) for side in SIDES}
                for worker in workers.values():
                    worker.ask(load=str(where), dtype=dtype)
                for tokens in args.tokens:
                    batch, length = map(int, tokens.split("x"))
                    asked = {"vocab": SHAPES[shape]["vocab_size"], "batch": batch, "length": length}
                    for mode in args.modes:
                        taken = measure(workers, dtype, mode, asked, args.steps)
                        yield [family, shape, dtype, tokens, mode, *cells(taken)]
                for worker in workers.values():
                    worker.close()


def preamble(args: argparse.Namespace) -> Iterator[str]:
    """Hardware, versions and command."""
    cpus = Path("/proc/cpuinfo")
    models = [row for row in cpus.read_text().splitlines() if "model name" in row] if cpus.is_file() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    yield f"- Hardware: {model}, {os.cpu_count()} cores, {args.threads} threads, {platform.system()}"
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    yield f"- Versions: Python {platform.python_version()}, {packages}"
    yield f"- Command: `python {shlex.join([os.path.relpath(__file__), *sys.argv[1:]])}`"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", default=["4x256", "2x1024"], help="batch x length")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each side, at least 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = options().parse_args()
    if args.worker:
        work(args.worker, args.threads)
        return
    print("\n".join(preamble(args)) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * 6 + "|---:" * (len(COLUMNS) - 6) + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for row in rows(args, Path(temporary)):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
