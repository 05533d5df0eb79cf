"""Products in 16 bits on a CPU without instructions for them: those of fp32, rounded once, a piece at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tuner.precision import cpu_products
from tuner.precision.cpu_products import KERNELS, PIECE, multiply_through_fp32, product_bytes

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SHAPES = [
    (64, 33, 70),
    (3, 500, 20),
    (70, 7, 1000),
    (1000, 7, 70),
    (16, 16, 16),
    (5, 1, 4),
    (4, 0, 3),
    (0, 0, 0),
    (0, 4, 3),
    (2, 40, 50),
]
LAYOUTS = ["nn", "nt", "tn", "tt"]


@pytest.fixture(params=SIXTEEN_BITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU with neither format, whatever this one is; PyTorch's kernels are back afterwards."""
    before = list(cpu_products._registered)
    for library in before:
        library._destroy()
    monkeypatch.setattr(cpu_products, "_registered", [])
    monkeypatch.setattr(cpu_products, "PIECE", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_products, "without_instructions", lambda: frozenset(SIXTEEN_BITS))
        multiply_through_fp32()
    assert len(cpu_products._registered) == 1
    yield
    cpu_products._registered[0]._destroy()
    monkeypatch.undo()
    cpu_products._registered.clear()
    if before:
        multiply_through_fp32()


def operands(shape: tuple[int, int, int], layout: str, dtype: torch.dtype, batch: int | None = None) -> list[Tensor]:
    """Matrices [M, K] and [K, N], or as many of each, `t` for one that is transposed in memory."""
    M, K, N = shape
    torch.manual_seed(0)
    made = []
    for (rows, columns), form in zip(((M, K), (K, N)), layout, strict=True):
        size = (rows, columns) if form == "n" else (columns, rows)
        matrix = torch.randn(*(() if batch is None else (batch,)), *size).to(dtype)
        made.append(matrix if form == "n" else matrix.transpose(-1, -2))
    return made


def same(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Equal to a product in fp64 that is rounded to `dtype` once: at most one unit in the last place apart, where the
    sum in fp32 is rounded to the other side."""
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [None, 3], ids=["one", "three"])
def test_a_product_is_that_of_fp32_rounded_once(
    shape: tuple[int, int, int], layout: str, dtype: torch.dtype, batch: int | None
) -> None:
    a, b = operands(shape, layout, dtype, batch)
    exact = a.double() @ b.double()
    same(a @ b, exact, dtype)
    out = torch.empty_like(exact, dtype=dtype)
    assert torch.matmul(a, b, out=out) is out
    same(out, exact, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [None, 3], ids=["one", "three"])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (2, 0.5), (0, 1)])
def test_what_is_added_is_added_before_it_is_rounded(
    shape: tuple[int, int, int], dtype: torch.dtype, batch: int | None, beta: float, alpha: float
) -> None:
    a, b = operands(shape, "nt", dtype, batch)
    added = torch.randn_like(a @ b)
    exact = beta * added.double() + alpha * (a.double() @ b.double())
    of_one, of_many = torch.addmm, torch.baddbmm
    call = of_one if batch is None else of_many
    same(call(added, a, b, beta=beta, alpha=alpha), exact, dtype)
    out = torch.empty_like(added)
    call(added, a, b, beta=beta, alpha=alpha, out=out)
    same(out, exact, dtype)
    found = (added.addmm_ if batch is None else added.baddbmm_)(a, b, beta=beta, alpha=alpha)
    assert found is added
    same(found, exact, dtype)


def test_nothing_of_what_is_added_counts_for_beta_zero(dtype: torch.dtype) -> None:
    a, b = operands((4, 5, 6), "nn", dtype)
    same(torch.addmm(torch.full((4, 6), torch.nan, dtype=dtype), a, b, beta=0), a.double() @ b.double(), dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_has_the_gradients_of_fp32(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    B, H, T, E = 2, 3, 40, 16
    grad_out, *tensors = (torch.randn(B, H, T, E).to(dtype) for _ in range(4))
    mask = torch.randn(T, T).to(dtype) if masked else None

    def gradients(as_dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(as_dtype).requires_grad_() for tensor in tensors]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(
                *leaves, attn_mask=None if mask is None else mask.to(as_dtype), is_causal=not masked
            )
        return list(torch.autograd.grad(out, leaves, grad_out.to(as_dtype)))

    for found, exact in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert found.dtype == dtype
        # What the forward pass kept is rounded to the format, a few units in the last place of the largest.
        assert (found.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_autograd_goes_through_it(dtype: torch.dtype) -> None:
    x, weight = (tensor.requires_grad_() for tensor in operands((40, 30, 20), "nt", dtype))
    bias = torch.randn(20).to(dtype).requires_grad_()
    out = F.linear(x, weight.t(), bias)
    out.backward(torch.ones_like(out))
    same(out, x.double() @ weight.double() + bias.double(), dtype)
    assert x.grad is not None
    assert weight.grad is not None
    same(x.grad, torch.ones(40, 20).double() @ weight.double().t(), dtype)
    same(weight.grad, x.double().t() @ torch.ones(40, 20).double(), dtype)


def test_other_formats_get_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64, torch.complex64):
        a, b = (tensor.to(dtype) for tensor in operands((40, 30, 20), "nn", torch.float64))
        found = a @ b
        cpu_products._registered[0]._destroy()
        assert torch.equal(found, a @ b)
        cpu_products._registered.clear()
        with monkeypatch.context() as patch:
            patch.setattr(cpu_products, "without_instructions", lambda: frozenset(SIXTEEN_BITS))
            multiply_through_fp32()


def test_what_cannot_be_multiplied_is_an_error(dtype: torch.dtype) -> None:
    square, others = torch.ones(4, 4, dtype=dtype), torch.ones(4, 4)
    for call in (
        lambda: torch.mm(square, others),
        lambda: torch.addmm(others, square, square),
        lambda: torch.mm(square, square, out=others),
        lambda: torch.mm(square, torch.ones(5, 4, dtype=dtype)),
        lambda: torch.mm(square, torch.ones(3, 4, dtype=dtype)),
        lambda: torch.bmm(square[None], torch.ones(1, 5, 4, dtype=dtype)),
        lambda: torch.bmm(square[None], square.expand(2, 4, 4)),
        lambda: torch.bmm(square.expand(2, 4, 4), square[None]),
        lambda: torch.ones(8, 4, dtype=dtype).addmm_(square, square, beta=0),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("shape", [(1024, 64, 4096), (4096, 64, 1024), (64, 9000, 300), (1, 64, 4096), (512, 512, 512)])
@pytest.mark.parametrize("batch", [None, 48], ids=["one", "many"])
@pytest.mark.parametrize("adds", [False, True])
def test_what_it_takes_is_what_is_said(
    shape: tuple[int, int, int], batch: int | None, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the allocator's own events."""
    monkeypatch.setattr(cpu_products, "PIECE", PIECE)
    for layout in ("nn", "nt"):
        a, b = operands(shape if batch is None else tuple(-(-n // 16) for n in shape), layout, torch.bfloat16, batch)
        added = torch.ones_like(a @ b)
        now = most = 0
        with torch.profiler.profile(profile_memory=True) as profile:
            out = (torch.addmm if batch is None else torch.baddbmm)(added, a, b) if adds else a @ b
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        assert now == out.nbytes
        assert most - out.nbytes == product_bytes(a, b)
        del out


SCRIPT = """
import torch, warnings
warnings.simplefilter("error")
from tuner.precision import cpu_products
before = torch.ops.mkldnn._is_mkldnn_bf16_supported()
cpu_products.without_instructions = lambda: frozenset([torch.bfloat16])
cpu_products.multiply_through_fp32()
cpu_products.multiply_through_fp32()
a = torch.randn(64, 64).bfloat16()
assert torch.equal(torch.mm(a, a), (a.float() @ a.float()).bfloat16())
"""


@pytest.mark.slow
def test_it_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_kernel_is_there() -> None:
    for name in KERNELS:
        assert torch.library.get_kernel(f"aten::{name}", "CPU")
