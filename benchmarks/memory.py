"""What does each value of `memory.activation_checkpointing` keep, and what does it cost?

Random weights of SmolLM2-135M's shape, LoRA on all linear layers or full training. Each value is asked for one step in
turn, so that the drift of a shared machine reaches all. `every_second` is `full` on half of the layers, which is no
value of the key. Losses and gradients must be those of `none`, bit for bit.

    OMP_WAIT_POLICY=passive python benchmarks/memory.py --method lora --dtype float32
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout this file is of, installed or not

from benchmarks.train_step import write_model
from tests.memory.live_bytes import LiveBytes
from tuner.build import build_model, load_base
from tuner.loop import add_gradients
from tuner.loss import sum_cross_entropy
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.family import config_of_folder
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.types import Batch, Precision

VALUES: tuple[Any, ...] = ("none", "selective", "every_second", "full")


def built(value: Any, folder: Path, args: argparse.Namespace) -> Decoder:
    base = load_base(config_of_folder(folder), getattr(torch, args.dtype), torch.device("cpu"), 0)
    torch.manual_seed(0)
    lora = LoRA("lora", 8, 16, 0.0, ["q_proj", "k_proj", "v_proj", "output_proj"], True, False, False)
    memory = MemoryTechniques("none" if value == "every_second" else value, False, False)
    peft = Full("full") if args.method == "full" else lora
    model = build_model(base, peft, Precision(args.dtype, args.dtype), memory)
    if value == "every_second":
        half: Any = SimpleNamespace(layers=torch.nn.ModuleList(list(model.layers)[::2]))
        MemoryTechniques("full", False, False).apply(half)
    return model


def kept_mib(model: Decoder, batch: Batch) -> float:
    """What is alive after the forward pass."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as counter:
        hidden = model.hidden(batch.tokens)
        loss = sum_cross_entropy(hidden, batch.labels, model.lm_head, model.logit_softcap)
        mib = counter.now / 2**20
    del hidden, loss
    return mib


def step_s(model: Decoder, batch: Batch) -> float:
    model.zero_grad()
    started = time.process_time()
    add_gradients(model, [batch])
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(0, 49152, (args.batch, args.sequence), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.dtype)
        models = {value: built(value, Path(folder), args) for value in VALUES}
    kept, gradients = {}, {}
    for value, model in models.items():
        kept[value] = kept_mib(model, batch)
        step_s(model, batch)  # the first is slower
        gradients[value] = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(map(torch.equal, gradients[value], gradients["none"])):
            raise SystemExit(f"{value}: other gradients than without")
    gradients.clear()
    seconds: dict[Any, list[float]] = {value: [] for value in VALUES}
    for _ in range(args.steps):
        for value, model in models.items():
            seconds[value].append(step_s(model, batch))
    print("| activation_checkpointing | kept after forward, MiB | CPU s a step |\n|---|---:|---:|")
    for value in VALUES:
        print(f"| {value} | {kept[value]:.0f} | {statistics.median(seconds[value]):.2f} |")


if __name__ == "__main__":
    main()
