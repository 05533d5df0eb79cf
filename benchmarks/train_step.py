"""How fast and how large is a training step beside a minimal Hugging Face PEFT loop?

Each row runs two workers, ours and PEFT's, on the same random weights of SmolLM2-135M's shape and the same tokens. Both
stay alive and are asked for one step in turn, so that the drift of a shared machine reaches both; the peak resident set
is that of each worker. Threads that wait sleep (`OMP_WAIT_POLICY=passive`), so that CPU time is work. Before a row
counts, the losses of both first steps must agree.

Ours is what `python -m tuner` runs: `load_base`, `NF4`, `LoRA`, `cast_trainable` and `training_steps`. Theirs is
transformers and PEFT with the adapters in the weights' dtype (`autocast_adapter_dtype=False`), its faster setting, and
QLoRA through `BitsAndBytesConfig`.

    python benchmarks/train_step.py --steps 10 --rows bf16-all bf16-qlora
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

if TYPE_CHECKING:
    import torch
    from torch import nn

RANK, ALPHA, LR, CLIP_GRAD_NORM = 8, 16, 1e-4, 1.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LOSS_TOLERANCE = 0.02
"""Relative difference of the first losses: 30 layers of bf16 sums in another order; 4-bit weights are equal."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        dtype: of weights and activations, as torch names it.
        modules: which layers are adapted, in Hugging Face's names.
        quantized: the blocks' weights in NF4 with doubly quantized scales.
        title: what the table calls it.
    """

    dtype: str
    modules: tuple[str, ...]
    quantized: bool
    title: str
    dora: bool = False


ROWS = {
    "fp32-qv": Row("float32", ("q_proj", "v_proj"), False, "LoRA, q and v, fp32"),
    "fp32-all": Row("float32", ATTENTION + MLP, False, "LoRA, all linears, fp32"),
    "bf16-qv": Row("bfloat16", ("q_proj", "v_proj"), False, "LoRA, q and v, bf16"),
    "bf16-all": Row("bfloat16", ATTENTION + MLP, False, "LoRA, all linears, bf16"),
    "bf16-qlora": Row("bfloat16", ATTENTION + MLP, True, "QLoRA, all linears, bf16"),
    "bf16-dora": Row("bfloat16", ATTENTION + MLP, False, "DoRA, all linears, bf16", dora=True),
    "bf16-qdora": Row("bfloat16", ATTENTION + MLP, True, "DoRA over NF4, all linears, bf16", dora=True),
}


@dataclass(frozen=True)
class Measured:
    """One side of a row: wall and process CPU time of each counted step, and the peak resident set of its process."""

    wall_s: list[float]
    cpu_s: list[float]
    peak_rss_mib: float


def tokens_of(args: argparse.Namespace) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 49152, (args.batch, args.sequence), generator=generator)


def write_model(folder: Path, dtype: str) -> None:
    """SmolLM2-135M's shape with random weights as a Hugging Face folder in the row's dtype."""
    import torch

    from tuner.models.llama import LlamaConfig
    from tuner.models.random_weights import fill_with_random_weights
    from tuner.models.stored import stored_tensors
    from tuner.models.writing import save_weights

    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig.from_hugging_face(shape, None)
    with torch.device("meta"):
        model = config.build()
    fill_with_random_weights(model, getattr(torch, dtype), torch.device("cpu"), seed=0)
    model.tie()  # the head is still the matrix that was replaced
    save_weights(folder, config.to_hugging_face(), stored_tensors(model))


def ours(row: Row, folder: Path, args: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    import torch

    from tuner.build import build_model, load_base
    from tuner.loop import training_steps
    from tuner.memory.default import MemoryTechniques
    from tuner.models.family import config_of_folder
    from tuner.optimizers.adamw import adamw
    from tuner.optimizers.groups import trained
    from tuner.peft.dora import DoRA
    from tuner.peft.lora import LoRA
    from tuner.quantization.nf4 import NF4
    from tuner.quantization.none import NoQuantization
    from tuner.types import Batch, Precision, State

    class SameBatch:
        at_epoch_end = False

        def __next__(self) -> list[Batch]:
            return [Batch(tokens, tokens)]

        def state_dict(self) -> dict[str, int]:
            raise NotImplementedError

        def load_state_dict(self, state: Any) -> None:
            raise NotImplementedError

    class FullRate:
        def factor(self, step: int, total_steps: int) -> float:
            return 1.0

    tokens, cpu = tokens_of(args), torch.device("cpu")
    roles: list[Any] = [name.replace("o_proj", "output_proj") for name in row.modules if name in ATTENTION]
    quantization = NF4(block_size=64, double_quant=True) if row.quantized else NoQuantization()
    chosen = (RANK, ALPHA, 0.0, roles, "down_proj" in row.modules, False, False)
    peft = DoRA("dora", *chosen) if row.dora else LoRA("lora", *chosen)
    model = build_model(
        load_base(config_of_folder(folder), getattr(torch, row.dtype), cpu, 0, quantization),
        peft,
        Precision(row.dtype, row.dtype, args.trainable),
        MemoryTechniques("none", False, False, False),
    )
    optimizer = adamw(trained(model), LR, [0.9, 0.999], 1e-8, 0.0, fused=True, loraplus_lr_ratio=None, no_decay=[])
    state = State(model, optimizer, SameBatch())
    steps = training_steps(state, FullRate(), total_steps=10**9, clip_grad_norm=CLIP_GRAD_NORM, device=cpu)
    return lambda: next(steps).loss


def theirs(row: Row, folder: Path, args: argparse.Namespace) -> Callable[[], float]:
    """The same with transformers and PEFT."""
    import peft
    import torch
    import transformers

    dtype = getattr(torch, row.dtype)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization if row.quantized else None
    )
    keys = {"lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": list(row.modules), "use_dora": row.dora}
    lora = peft.LoraConfig(r=RANK, **keys)
    model: nn.Module = peft.get_peft_model(base, lora, autocast_adapter_dtype=False).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # over packed weights PEFT leaves them in fp32
        parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    tokens = tokens_of(args)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


SIDES = {"ours": ours, "peft": theirs}


def work(args: argparse.Namespace) -> None:
    """A worker: one JSON line for each line read, `peak_rss_mib` at the end of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = SIDES[args.worker](ROWS[args.rows[0]], Path(args.folder), args)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "loss": loss}
        print(json.dumps(taken), file=answers, flush=True)
    print(json.dumps({"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}), file=answers)


class Worker:
    """A side of a row in a process of its own."""

    def __init__(self, side: str, row: str, folder: Path, args: argparse.Namespace) -> None:
        own = ["--worker", side, "--rows", row, "--folder", str(folder), "--trainable", args.trainable]
        shape = ["--threads", args.threads, "--batch", args.batch, "--sequence", args.sequence]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *own, *map(str, shape)],
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

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def peak_rss_mib(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._answer()["peak_rss_mib"]

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended before its answer: run with --verbose to see why")
        answer: dict[str, float] = json.loads(line)
        return answer


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Measured]:
    """Both sides of a row, step by step in turn; warm-up steps are not counted."""
    workers = {side: Worker(side, name, folder, args) for side in SIDES}
    first = {side: worker.step()["loss"] for side, worker in workers.items()}
    if abs(first["ours"] - first["peft"]) > LOSS_TOLERANCE * first["peft"]:
        raise SystemExit(f"{name}: the two compute different things: first losses {first}")
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for _ in range(args.warmup - 1 + args.steps):
        for side, worker in workers.items():
            taken[side].append(worker.step())
    return {
        side: Measured(
            [step["wall_s"] for step in taken[side][-args.steps :]],
            [step["cpu_s"] for step in taken[side][-args.steps :]],
            worker.peak_rss_mib(),
        )
        for side, worker in workers.items()
    }


def line(name: str, sides: dict[str, Measured], tokens: int) -> str:
    """One row of the table; ratios above 1 are in our favour in speed, below 1 in memory."""
    us, them = sides["ours"], sides["peft"]
    wall = {side: statistics.median(measured.wall_s) for side, measured in sides.items()}
    cpu = {side: statistics.median(measured.cpu_s) for side, measured in sides.items()}
    paired = statistics.median(b / a for a, b in zip(us.wall_s, them.wall_s, strict=True))
    cells = [
        ROWS[name].title,
        f"{tokens / wall['ours']:.0f}",
        f"{tokens / wall['peft']:.0f}",
        f"{paired:.2f}",
        f"{cpu['ours']:.2f}",
        f"{cpu['peft']:.2f}",
        f"{cpu['peft'] / cpu['ours']:.2f}",
        f"{us.peak_rss_mib:.0f}",
        f"{them.peak_rss_mib:.0f}",
        f"{us.peak_rss_mib / them.peak_rss_mib:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "",
    "tuner tokens/s",
    "PEFT tokens/s",
    "speed ratio",
    "tuner CPU s/step",
    "PEFT CPU s/step",
    "CPU ratio",
    "tuner peak MiB",
    "PEFT peak MiB",
    "memory ratio",
)


def preamble(args: argparse.Namespace) -> Iterator[str]:
    """Hardware, versions and command."""
    cpus = Path("/proc/cpuinfo")
    models = [row for row in cpus.read_text().splitlines() if "model name" in row] if cpus.is_file() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    yield f"- Hardware: {model}, {os.cpu_count()} cores, {args.threads} threads, {platform.system()}"
    yield f"- Versions: Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages)
    yield f"- Command: `python {shlex.join([os.path.relpath(__file__), *sys.argv[1:]])}`"
    yield f"- Shape: SmolLM2-135M, {args.batch} x {args.sequence} tokens, all trained, rank {RANK}, AdamW (fused)"
    yield f"- Trainable parameters: tuner `{args.trainable}` (auto: fp32), PEFT in the weights' dtype"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each side")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--trainable", choices=("auto", "bf16", "fp32"), default="auto", help="our precision.trainable")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = options().parse_args()
    if args.worker:
        work(args)
        return
    print("\n".join(preamble(args)) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.rows:
            folder = Path(temporary) / ROWS[name].dtype
            if not folder.is_dir():
                write_model(folder, ROWS[name].dtype)
            print(line(name, measure(name, folder, args), args.batch * args.sequence), flush=True)


if __name__ == "__main__":
    main()
