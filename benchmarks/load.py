"""How much memory and time does loading a model take, beside transformers' `from_pretrained`?

Writes a Hugging Face folder of random weights in bf16 and one in fp32, several files each, and loads them in fresh
processes: into either dtype, and quantized to NF4 as they arrive. Memory is anonymous memory (RssAnon of
`/proc/self/status`; pages of the mapped files do not count) above the level after imports, sampled every 2 ms and each
time a module is complete. The bounds:

- dense: the model in the target dtype, the largest tensor in it, and 300 MiB;
- NF4: what the loaded model holds, twice the largest layer that is packed (as it arrives, and in fp32, in which it is
  quantized), the largest tensor that stays dense, and 300 MiB. It has to be below the model in full precision.

Both sides load into CPU memory, in turn, and every page of the weights is read once, because transformers leaves what
needs no cast in the mapped file (its memory is then no anonymous one). transformers quantizes to NF4 with the same
bitsandbytes.

    python benchmarks/load.py --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

SHAPES = {
    "0.6B": {"vocab_size": 49152, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 18},
    "80M": {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8},
}
MIB = 2**20
SLACK_MIB = 300
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Case:
    """A line of the table: dtype in the folder, dtype asked for, and whether it is quantized."""

    stored: str
    target: str
    nf4: bool

    @property
    def title(self) -> str:
        short = {"float32": "fp32", "bfloat16": "bf16"}
        return f"{short[self.stored]} to {'NF4, ' if self.nf4 else ''}{short[self.target]}"


FP32, BF16 = "float32", "bfloat16"
CASES = [
    *(Case(stored, target, False) for stored, target in ((FP32, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP32))),
    *(Case(stored, target, True) for stored, target in ((FP32, FP32), (BF16, BF16), (FP32, BF16))),
]


def write_folders(folder: Path, shape: str) -> None:
    """The same random weights in `float32/` and `bfloat16/`, in files of about a quarter of the model."""
    import torch

    import tuner.models.writing as writing
    from tuner.models.llama import LlamaConfig
    from tuner.models.random_weights import fill_with_random_weights
    from tuner.models.stored import stored_tensors

    sizes = SHAPES[shape]
    heads = sizes["hidden_size"] // 64
    keys = {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads // 4}
    config = LlamaConfig.from_hugging_face(keys, None)
    with torch.device("meta"):
        model = config.build()
    fill_with_random_weights(model, torch.float32, torch.device("cpu"), seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        writing.MAX_SHARD_BYTES = total // 4
        name = str(dtype).removeprefix("torch.")
        writing.save_weights(folder / name, config.to_hugging_face(), stored_tensors(model))


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


class Sampler:
    """The most anonymous memory while it is open, in MiB."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.look()
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        self.peak = max(self.peak, anonymous_mib())

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.look()


def ours(folder: Path, case: Case, look: Callable[[], None]) -> Callable[[], Any]:
    """A function that loads, with everything imported."""
    import torch

    from tuner import build
    from tuner.models.family import config_of_folder
    from tuner.quantization.nf4 import NF4, NF4Linear

    if case.nf4:  # imports bitsandbytes
        NF4Linear.from_linear(torch.nn.Linear(64, 64), block_size=64, double_quant=True)
    loading = build.load_weights

    def watched(*args: Any) -> None:
        *rest, arrived = args

        def look_and_hand_on(path: str) -> None:
            look()
            arrived(path)
            look()

        loading(*rest, look_and_hand_on)

    build.load_weights = watched
    quantization = NF4(block_size=64, double_quant=True) if case.nf4 else build.UNQUANTIZED
    dtype, cpu = getattr(torch, case.target), torch.device("cpu")
    return lambda: build.load_base(config_of_folder(folder), dtype, cpu, seed=0, quantization=quantization)


def theirs(folder: Path, case: Case, look: Callable[[], None]) -> Callable[[], Any]:
    """The same with transformers."""
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401 (else imported while loading)

    dtype = getattr(torch, case.target)
    quantization = None
    if case.nf4:
        import bitsandbytes  # noqa: F401

        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda: load(folder, dtype=dtype, quantization_config=quantization)


SIDES = {"tuner": ours, "transformers": theirs}


def sizes_mib(model: Any, target: Any) -> dict[str, float]:
    """What the bounds are made of, in MiB; `full` is the model in the target dtype."""
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    dense = [p.numel() * p.element_size() for p in model.parameters() if p.is_floating_point() and p.dim() > 1]
    packed = [m.in_features * m.out_features for m in model.modules() if hasattr(m, "absmax")]
    config = model.config
    full = 2 * config.vocab_size * config.hidden_size + config.num_hidden_layers * (
        2 * config.hidden_size * (config.num_attention_heads + config.num_key_value_heads) * 64
        + 3 * config.hidden_size * config.intermediate_size
    )
    return {
        "held": sum(held.values()) / MIB,
        "largest_dense": max(dense, default=0) / MIB,
        "largest_packed": max(packed, default=0) * (target.itemsize + 4) / MIB,
        "full": full * target.itemsize / MIB,
    }


def work(side: str, folder: Path, case: Case, threads: int) -> None:
    """A worker: loads once and prints what it took as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    import torch

    torch.set_num_threads(threads)
    sampler = Sampler()
    load = SIDES[side](folder, case, sampler.look)
    before, wall, cpu = anonymous_mib(), time.perf_counter(), time.process_time()
    with sampler:
        model = load()
        for parameter in model.parameters():  # a byte of each page: what is only mapped is read now
            parameter.detach().view(-1)[:: max(4096 // parameter.element_size(), 1)].sum()
    answer = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    answer |= {"before": before, "peak": sampler.peak - before, "after": anonymous_mib() - before}
    if side == "tuner":
        answer |= sizes_mib(model, getattr(torch, case.target))
    print(json.dumps(answer), file=answers, flush=True)


def ask(side: str, folder: Path, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """One load in a fresh process."""
    words = ["--worker", side, "--folder", folder / case.stored, "--case", CASES.index(case), "--threads", args.threads]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=None if args.verbose else subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{case.title}, {side}: failed; run with --verbose to see why")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def bound_mib(case: Case, sizes: dict[str, float]) -> float:
    """The most that loading may take; see the module's docstring."""
    packing = sizes["largest_packed"] if case.nf4 else 0.0
    return sizes["held"] + packing + sizes["largest_dense"] + SLACK_MIB


COLUMNS = ("", "after imports MiB", "peak above MiB", "bound MiB", "margin MiB", "target size MiB", "full size MiB")
COLUMNS += ("largest tensor MiB", "tuner s", "GB/s", "transformers s", "speed ratio", "CPU ratio", "its peak MiB")


def row(case: Case, folder: Path, args: argparse.Namespace) -> list[str]:
    """One line: the largest peak of all repeats, median times, medians of the ratios of neighbouring loads."""
    sides = ["tuner"] if args.alone else ["tuner", "transformers"]
    taken: dict[str, list[dict[str, float]]] = {"tuner": [], "transformers": []}
    for repeat in range(args.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):  # the second finds more of the files in memory
            taken[side].append(ask(side, folder, case, args))
    us, them = taken.values()
    sizes, peak = us[0], max(one["peak"] for one in us)
    bound, seconds = bound_mib(case, sizes), statistics.median(one["wall_s"] for one in us)
    if peak > bound or (case.nf4 and peak >= sizes["full"]):
        print(f"{case.title}: the bound does not hold", file=sys.stderr)
    stored = sum(file.stat().st_size for file in (folder / case.stored).glob("*.safetensors"))
    mebibytes = (us[-1]["before"], peak, bound, bound - peak, sizes["held"], sizes["full"], sizes["largest_dense"])
    cells = [case.title, *(f"{value:.0f}" for value in mebibytes), f"{seconds:.2f}", f"{stored / seconds / 1e9:.2f}"]
    if not them:
        return [*cells, *["-"] * 4]
    ratios = [statistics.median(b[key] / a[key] for a, b in zip(us, them, strict=True)) for key in ("wall_s", "cpu_s")]
    cells.append(f"{statistics.median(one['wall_s'] for one in them):.2f}")
    return [*cells, *(f"{ratio:.2f}" for ratio in ratios), f"{max(one['peak'] for one in them):.0f}"]


def preamble(args: argparse.Namespace) -> Iterator[str]:
    """Hardware, versions and command."""
    cpus = Path("/proc/cpuinfo")
    models = [line for line in cpus.read_text().splitlines() if "model name" in line] if cpus.is_file() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    yield f"- Hardware: {model}, {os.cpu_count()} cores, {args.threads} threads, {platform.system()}"
    packages = ("torch", "transformers", "safetensors", "bitsandbytes")
    yield f"- Versions: Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages)
    yield f"- Command: `python {shlex.join([os.path.relpath(__file__), *sys.argv[1:]])}`"
    yield f"- Shape: Llama, {args.shape}, {SHAPES[args.shape]}, untied, four files"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--cases", nargs="+", choices=("dense", "nf4"), default=["dense", "nf4"])
    parser.add_argument("--repeats", type=int, default=3, help="loads of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", choices=[*SIDES, "write"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = options().parse_args()
    if args.worker == "write":
        write_folders(Path(args.folder), args.shape)
        return
    if args.worker:
        work(args.worker, Path(args.folder), CASES[args.case], args.threads)
        return
    print("\n".join(preamble(args)) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        words = ["--worker", "write", "--folder", temporary, "--shape", args.shape]
        subprocess.run([sys.executable, __file__, *words], check=True)
        for case in [case for case in CASES if ("nf4" if case.nf4 else "dense") in args.cases]:
            print("| " + " | ".join(row(case, Path(temporary), args)) + " |", flush=True)


if __name__ == "__main__":
    main()
