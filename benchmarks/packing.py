"""How much faster is training on packed rows than on padded batches, and which attention should documents have?

`steps` trains one model of the real command (LoRA on `data=pydoc`) on windows of several kinds in turn, so that the
drift of a shared machine reaches all of them. A step costs what its positions cost, and batches differ in their padding
more than in that: so positions are timed, padding is counted over a whole epoch, and tokens that are no padding follow:

- padded: samples in random order, a batch padded to its longest, as peers make them
- grouped: `data.packing=group`
- packed: `data.packing=pack`, with rows of `data.pack_len`

`attention` runs one layer's attention over packed rows of such documents by each candidate, in turn: forward alone, and
forward and backward where the candidate has one. What has none says why, below the table.

    python benchmarks/packing.py steps --rounds 5 --precision bf16 fp32
    python benchmarks/packing.py attention
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.data.batches import Batches
    from tuner.loop import Step
    from tuner.train import Parts


@dataclass(frozen=True)
class Kind:
    """One way to make batches: keys of `data`, rows of a batch, and batches of a round."""

    keys: dict[str, Any]
    rows: int
    steps: int


KINDS = {
    "padded, 8 samples": Kind({"packing": "none"}, 8, 2),
    "padded, 16 samples": Kind({"packing": "none"}, 16, 1),
    "padded, 32 samples": Kind({"packing": "none"}, 32, 1),
    "grouped, 8 samples": Kind({"packing": "group"}, 8, 2),
    "packed, 1 row of 1024": Kind({"packing": "pack", "pack_len": 1024}, 1, 1),
    "packed, 2 rows of 1024": Kind({"packing": "pack", "pack_len": 1024}, 2, 1),
    "packed, 8 rows of 256": Kind({"packing": "pack"}, 8, 1),
}


@dataclass
class Taken:
    """What one round of a kind took."""

    tokens: int
    positions: float
    wall_s: float
    cpu_s: float


@dataclass
class Running:
    """A kind on its way.

    Attributes:
        steps: of the real loop; the model is one, the optimizer each kind's own.
        padding: share of an epoch's positions, counted over all of its batches.
        rounds: what each took.
    """

    steps: Iterator[Step]
    padding: float
    rounds: list[Taken]

    @property
    def tokens_per_cpu_s(self) -> float:
        return statistics.median(one.positions / one.cpu_s for one in self.rounds) * (1 - self.padding)

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(one.positions / one.wall_s for one in self.rounds) * (1 - self.padding)


def steps(args: argparse.Namespace) -> None:
    for precision in args.precision:
        kinds = measured(precision, args)
        padded = {name.removeprefix("padded, "): one for name, one in kinds.items() if name.startswith("padded")}
        heads = "".join(f" of padded, {name} |" for name in padded)
        print(f"\n{precision}, {args.threads} thread(s), {args.rounds} rounds, medians\n")
        print(f"| batches | padding | tokens/s | tokens/CPU s |{heads}\n|---|---:|---:|---:|{'---:|' * len(padded)}")
        for name, one in kinds.items():
            ratios = "".join(f" {one.tokens_per_cpu_s / other.tokens_per_cpu_s:.2f} |" for other in padded.values())
            print(f"| {name} | {one.padding:.1%} | {one.tokens_per_s:.0f} | {one.tokens_per_cpu_s:.1f} |{ratios}")


def measured(precision: str, args: argparse.Namespace) -> dict[str, Running]:
    import tuner
    from tuner.train import prepare

    words = [f"precision={precision}", f"model={args.model}", "logger=none", f"train.num_threads={args.threads}"]
    with tempfile.TemporaryDirectory() as folder:
        cfg = tuner.compose([*words, f"out={folder}/run"])
        parts = prepare(cfg, Path(folder) / "run")
    kinds = {name: running(KINDS[name], cfg, parts) for name in args.kinds}
    one_round(next(iter(kinds.values())).steps, 1)  # warms up
    for number in range(args.rounds):
        for name, one in kinds.items():
            one.rounds.append(one_round(one.steps, KINDS[name].steps))
            print(f"{precision} round {number}: {name}: {one.rounds[-1]}", file=sys.stderr, flush=True)
    return kinds


def running(kind: Kind, cfg: Any, parts: Parts) -> Running:
    from tuner.build import build_optimizer
    from tuner.loop import training_steps
    from tuner.optimizers.groups import trained
    from tuner.types import State

    optimizer = build_optimizer(cfg.optimizer, trained(parts.state.model), [])
    state = State(parts.state.model, optimizer, batches(kind, cfg, parts))
    running = training_steps(state, parts.schedule, total_steps=10**6, clip_grad_norm=1.0, device=parts.device)
    return Running(running, padding_of_epoch(batches(kind, cfg, parts)), [])


def batches(kind: Kind, cfg: Any, parts: Parts) -> Batches:
    from hydra.utils import instantiate

    from tuner.data.batches import Batches

    source = replace(instantiate(cfg.data), **kind.keys)
    order = source.order(parts.dataset, seed=0, window=kind.rows)
    return Batches(parts.dataset.train, order, batch_size=kind.rows, accumulation=1, pad_id=parts.tokenizer.pad_id)


def padding_of_epoch(batches: Batches) -> float:
    tokens = positions = 0
    for (batch,) in batches:
        tokens += batch.num_tokens
        positions += batch.tokens.numel()
        if batches.at_epoch_end:
            break
    return 1 - tokens / positions


def one_round(running: Iterator[Step], steps: int) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    done = list(itertools.islice(running, steps))
    taken = time.perf_counter() - wall, time.process_time() - cpu
    positions = sum(step.tokens / (1 - step.padding_share) for step in done)
    return Taken(sum(step.tokens for step in done), positions, *taken)


SHAPES = ((8, 256), (2, 1024), (1, 4096))
HEADS, KEY_HEADS, HEAD_DIM = 9, 3, 64  # of smollm2_135m


def attention(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    lengths = lengths_of_pydoc()
    why: dict[str, str] = {}
    print("| dtype | rows | documents | candidate | forward, CPU ms | and backward |\n|---|---|---:|---|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        for B, T in SHAPES:
            documents = packed(lengths, B, T)
            inputs = [projected(count, B, T, dtype) for count in (HEADS, KEY_HEADS, KEY_HEADS)]
            candidates = candidates_for(documents, T, inputs[0])
            why |= {name: said for name, attend in candidates.items() if (said := no_backward(attend, inputs))}
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
            for _ in range(args.rounds + 1):  # the first warms up
                for name, attend in candidates.items():
                    both = math.nan if name in why else forward_and_backward_ms(attend, inputs)
                    times[name].append((forward_ms(attend, inputs), both))
            for name, taken in times.items():
                forward, both = map(statistics.median, zip(*taken[1:], strict=True))
                shown = f"{name} | {forward:.1f} | {both:.1f}".replace("nan", "-")
                print(f"| {str(dtype)[6:]} | {B} x {T} | {sum(map(len, documents))} | {shown} |", flush=True)
    for name, said in why.items():
        print(f"\n{name}, backward: {said}")


def no_backward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> str | None:
    """What a candidate says that has none here."""
    import torch

    try:
        forward_and_backward_ms(attend, inputs)
    except NotImplementedError as error:
        torch.compiler.reset()  # else the forward alone would not be compiled any more either
        return str(error)
    return None


def lengths_of_pydoc() -> list[int]:
    from hydra.utils import instantiate

    import tuner
    from tuner.models.family import located
    from tuner.vocabulary import vocabulary_of

    cfg = tuner.compose([])
    tokenizer = vocabulary_of(located(instantiate(cfg.model)), None).tokenizer
    return [len(sample.tokens) for sample in instantiate(cfg.data).load(tokenizer).train]


def packed(lengths: list[int], B: int, T: int) -> list[list[int]]:
    """The documents of B rows of T tokens."""
    from tuner.data.order import Packed

    rows = Packed(lengths, seed=0, fingerprint="", row_tokens=T).rows(0)
    return [[lengths[i] for i in row] for row in rows[:B]]


def projected(heads: int, B: int, T: int, dtype: Any) -> Tensor:
    """[B, heads, T, E], as it lies in memory behind a projection of each token."""
    import torch

    return torch.randn(B, T, heads, HEAD_DIM, dtype=dtype).transpose(1, 2).requires_grad_()


def candidates_for(documents: list[list[int]], T: int, q: Tensor) -> dict[str, Callable[..., Tensor]]:
    import torch
    import torch.nn.functional as F

    from tuner.models.attention import Scoring, cpu_attention
    from tuner.models.documents import Documents

    scoring = Scoring(HEAD_DIM**-0.5)

    visible = Documents(documents, (len(documents), T), q.device).visible(None, q.dtype, scoring, HEAD_DIM)
    number = torch.stack(
        [torch.tensor([i for i, n in enumerate([*row, T - sum(row)]) for _ in range(n)]) for row in documents]
    )
    seen = torch.ones(T, T, dtype=torch.bool).tril() & (number[:, None, :, None] == number[:, None, None, :])

    def buckets(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return visible.attend(q, k, v, scoring, cpu_attention)

    def each_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for b, row in enumerate(documents):
            pieces = [torch.split(x[b : b + 1], [*row, T - sum(row)], 2)[: len(row)] for x in (q, k, v)]
            rows.append(torch.cat([cpu_attention(*one, scoring, None) for one in zip(*pieces, strict=True)], 2))
        return torch.cat([F.pad(out, (0, 0, 0, T - out.shape[2])) for out in rows])

    def dense_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scoring.scale, enable_gqa=True)

    return {
        "buckets": buckets,
        "each document": each_document,
        "mask over rows (SDPA)": dense_mask,
        "FlexAttention, compiled": flex_over(number, scoring.scale),
    }


def flex_over(number: Tensor, scale: float) -> Callable[..., Tensor]:
    """PyTorch's FlexAttention with a block mask of documents, compiled for this shape.

    Args:
        number: of the document that each token is of, [B, T].
        scale: of scores.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return (number[b, q] == number[b, key]) & (q >= key)

    B, T = number.shape
    block_mask = create_block_mask(seen, B, None, T, T, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)
        return out

    return flex


def forward_ms(attend: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """CPU time of one layer's forward pass, which keeps nothing for backward."""
    import torch

    with torch.no_grad():
        started = time.process_time()
        attend(*[x.detach() for x in inputs])
        return 1000 * (time.process_time() - started)


def forward_and_backward_ms(attend: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """CPU time of one layer; index tensors and masks are made once a forward pass for all layers and not counted."""
    started = time.process_time()
    attend(*inputs).sum().backward()
    taken = time.process_time() - started
    for x in inputs:
        x.grad = None
    return 1000 * taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "attention"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait sleep, so that CPU time is work
    {"steps": steps, "attention": attention}[args.what](args)


if __name__ == "__main__":
    main()
