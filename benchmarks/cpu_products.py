"""How fast are products in 16 bits on a CPU that has no instructions for them, beside PyTorch's own and fp32?

The shapes are those of SmolLM2-135M on 4 rows of 256 tokens: a projection forward, its two backward products, the head
on a chunk of tokens and on one token, and attention's. PyTorch's own loops are timed first, then the same products
after `tuner.precision.cpu_products.multiply_through_fp32()`, which stays for the process; each is the median of some
rounds on one thread. Where oneDNN multiplies in the format, nothing is replaced, and the script says so.

    python benchmarks/cpu_products.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

if TYPE_CHECKING:
    from torch import Tensor, dtype

D, INNER, V, TOKENS, HEADS, HEAD = 576, 1536, 49152, 1024, 36, 64
ROW = 256


def products() -> dict[str, Callable[[dtype], Callable[[], Tensor]]]:
    """By name, what makes operands of a dtype and gives the product to be timed."""
    import torch

    def of(a: tuple[int, ...], b: tuple[int, ...], *, a_t: bool = False, b_t: bool = False) -> Callable[..., object]:
        def made(dtype: dtype) -> Callable[[], Tensor]:
            left, right = torch.randn(*a).to(dtype), torch.randn(*b).to(dtype)
            left, right = left.mT if a_t else left, right.mT if b_t else right
            return lambda: left @ right

        return made

    def attention(dtype: dtype) -> Callable[[], Tensor]:
        q = torch.randn(TOKENS // ROW, HEADS // 4, ROW, HEAD).to(dtype).requires_grad_()
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return lambda: torch.autograd.grad(out, q, out, retain_graph=True)[0]

    return {
        f"[{TOKENS}, {D}] @ [{INNER}, {D}]^T, a projection": of((TOKENS, D), (INNER, D), b_t=True),
        f"[{TOKENS}, {INNER}] @ [{INNER}, {D}], the gradient of its input": of((TOKENS, INNER), (INNER, D)),
        f"[{TOKENS}, {INNER}]^T @ [{TOKENS}, {D}], that of its weight": of((TOKENS, INNER), (TOKENS, D), a_t=True),
        f"[{ROW}, {D}] @ [{V}, {D}]^T, the head on a chunk": of((ROW, D), (V, D), b_t=True),
        f"[{ROW}, {V}] @ [{V}, {D}], the gradient of its input": of((ROW, V), (V, D)),
        f"[1, {D}] @ [{V}, {D}]^T, the head on a token": of((1, D), (V, D), b_t=True),
        f"{HEADS} times [{ROW}, {HEAD}] @ [{ROW}, {HEAD}]^T, scores": of(
            (HEADS, ROW, HEAD), (HEADS, ROW, HEAD), b_t=True
        ),
        f"{HEADS} times [{ROW}, {ROW}] @ [{ROW}, {HEAD}]": of((HEADS, ROW, ROW), (HEADS, ROW, HEAD)),
        "fused attention backward": attention,
    }


def timed(call: Callable[[], object], rounds: int) -> float:
    """Median milliseconds."""
    call()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from tuner.precision.cpu_products import multiply_through_fp32, without_instructions

    torch.set_num_threads(1)
    formats = sorted(without_instructions(), key=str)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    if not formats:
        print("oneDNN multiplies in bfloat16 and float16 on this CPU: nothing is replaced")
        return
    made = products()
    fp32 = {name: timed(make(torch.float32), rounds) for name, make in made.items()}
    native = {(name, each): timed(make(each), rounds) for name, make in made.items() for each in formats}
    multiply_through_fp32()
    ours = {(name, each): timed(make(each), rounds) for name, make in made.items() for each in formats}
    print(
        "\n| product | format | fp32 ms | PyTorch ms | through fp32 ms | times as fast |\n|---|---|---:|---:|---:|---:|"
    )
    for (name, each), slow in native.items():
        fast = ours[name, each]
        kind = str(each).removeprefix("torch.")
        print(f"| {name} | {kind} | {fp32[name]:.1f} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} |")


if __name__ == "__main__":
    main()
