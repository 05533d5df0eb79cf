"""The functions with a backward of their own, against the composed forms that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.models.attention import (
    EXPLICIT_MAX_TOKENS,
    cached_attention,
    causal_attention_for,
    cpu_causal_attention,
    explicit_causal_attention,
    sdpa_causal_attention,
)
from tuner.models.rms_norm import RMSNorm
from tuner.models.rope import apply_rope, rope_table
from tuner.models.swiglu import swiglu

Function = Callable[..., Tensor]

OFF = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
"""Of the largest entry: some ulp, 1.2e-7 in fp32; in bf16, whose ulp is 7.8e-3, two roundings of one value."""

dtypes = pytest.mark.parametrize("dtype", OFF, ids=["fp32", "bf16"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def output_and_gradients(function: Function, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(random(*out.shape, seed=99).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_equal_to_composed(function: Function, composed: Function, *inputs: Tensor) -> None:
    """The composed form runs in fp32 from the same (rounded) inputs."""
    ours = output_and_gradients(function, *inputs)
    theirs = output_and_gradients(composed, *(x.float() for x in inputs))
    assert len(ours) == len(theirs) == 1 + len(inputs)
    for found, exact in zip(ours, theirs, strict=True):
        assert found.dtype == inputs[0].dtype
        assert (found.float() - exact).abs().max() <= OFF[found.dtype] * exact.abs().max()


def composed_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def our_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = RMSNorm(x.shape[-1], 1e-5)
    del norm.weight
    norm.weight = weight  # the leaf itself, so that its gradient is seen
    return norm(x)


@dtypes
@pytest.mark.parametrize("shape", [(2, 7, 48), (1, 1, 33), (5, 16)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = 3 * random(*shape, dtype=dtype), 1 + 0.3 * random(shape[-1], seed=1)
    assert_equal_to_composed(our_rms_norm, composed_rms_norm, x, weight.to(dtype))


def test_rms_norm_keeps_the_scale_of_tiny_and_huge_rows_in_bf16() -> None:
    """The mean square is taken in fp32: 1e25 squared would overflow even there, 1e15 overflows nothing."""
    rows = torch.tensor([1e-4, 1.0, 1e15])[:, None] * torch.sign(random(3, 64))
    out = RMSNorm(64, 1e-12).to(torch.bfloat16)(rows.bfloat16())
    assert torch.equal(out.abs(), torch.ones(3, 64, dtype=torch.bfloat16))


def test_rms_norm_of_a_frozen_input_trains_its_weight() -> None:
    norm, x = RMSNorm(8, 1e-5), random(3, 8)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    torch.testing.assert_close(norm.weight.grad, composed_rms_norm(x, torch.ones(8)).sum(0))


def rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


@dtypes
def test_rope(dtype: torch.dtype) -> None:
    """Against the rotate-half form; the table is exact in fp32 and rounded in bf16, for both sides alike."""
    cos, sin = rope_table(torch.arange(3, 14), 12, 10_000.0, None, dtype)

    def composed(x: Tensor) -> Tensor:
        return x * torch.cat((cos, cos), -1).float() + rotate_half(x) * torch.cat((sin, sin), -1).float()

    x = random(2, 5, 11, 12, dtype=dtype)
    assert_equal_to_composed(lambda x: apply_rope(x, cos, sin), composed, x)
    transposed = random(2, 11, 5, 12, dtype=dtype).transpose(1, 2)  # as it comes from a projection
    assert_equal_to_composed(lambda x: apply_rope(x, cos, sin), composed, transposed)


def test_rope_table_is_the_papers() -> None:
    cos, sin = rope_table(torch.tensor([0, 1, 1000]), 8, 500.0, None, torch.float32)
    for row, position in enumerate([0, 1, 1000]):
        for i in range(4):
            angle = torch.tensor(position * 500.0 ** (-2 * i / 8), dtype=torch.float64)
            # an angle of 1000 has an fp32 ulp of 6e-5
            assert cos[row, i].item() == pytest.approx(angle.cos().item(), abs=1e-4)
            assert sin[row, i].item() == pytest.approx(angle.sin().item(), abs=1e-4)


def test_rope_makes_scores_a_function_of_the_distance() -> None:
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)

    def score(i: int, j: int) -> float:
        rotated = [
            apply_rope(x, *rope_table(torch.tensor([at]), 16, 10_000.0, None, torch.float32))
            for x, at in ((q, i), (k, j))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@dtypes
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = 4 * random(3, 5, 40, dtype=dtype), random(3, 5, 40, dtype=dtype, seed=1)
    assert_equal_to_composed(swiglu, lambda g, u: g * torch.sigmoid(g) * u, gate, up)


def composed_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    groups = q_BHTE.shape[1] // k_BKTE.shape[1]
    k, v = k_BKTE.repeat_interleave(groups, 1), v_BKTE.repeat_interleave(groups, 1)
    scores = q_BHTE @ k.transpose(-1, -2) / q_BHTE.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ v


HEADS = [(6, 6), (6, 2), (6, 1), (1, 1)]


@dtypes
@pytest.mark.parametrize("attention", [explicit_causal_attention, sdpa_causal_attention, cpu_causal_attention])
@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
@pytest.mark.parametrize("tokens", [1, 19])
def test_attention(dtype: torch.dtype, attention: Function, heads: int, key_heads: int, tokens: int) -> None:
    if tokens == 1:  # softmax of one score: q and k have no gradient to compare sizes with
        q, k, v = (
            random(2, heads, 1, 8, dtype=dtype),
            random(2, key_heads, 1, 8, dtype=dtype),
            random(2, key_heads, 1, 8),
        )
        assert torch.equal(attention(q, k, v.to(dtype)), v.to(dtype).repeat_interleave(heads // key_heads, 1))
        return
    shapes = [(2, heads, tokens, 8), (2, key_heads, tokens, 8), (2, key_heads, tokens, 8)]
    inputs = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    assert_equal_to_composed(attention, composed_attention, *inputs)
    as_projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_equal_to_composed(attention, composed_attention, *as_projected)


@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
def test_cached_attention_is_the_last_rows_of_the_whole(heads: int, key_heads: int) -> None:
    q, k, v = random(2, heads, 13, 8), random(2, key_heads, 13, 8, seed=1), random(2, key_heads, 13, 8, seed=2)
    whole = composed_attention(q, k, v)
    for new in (1, 4, 13):
        torch.testing.assert_close(cached_attention(q[:, :, -new:], k, v), whole[:, :, -new:])


def test_no_token_sees_a_later_one() -> None:
    q, k, v = (random(1, 2, 9, 4, seed=i) for i in range(3))
    before = explicit_causal_attention(q, k, v)
    k[:, :, 5:], v[:, :, 5:] = 1e4, float("nan")
    after = explicit_causal_attention(q, k, v.nan_to_num(7.0))
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_the_kernel_of_a_device() -> None:
    assert causal_attention_for("cpu") is cpu_causal_attention
    assert causal_attention_for("cuda") is sdpa_causal_attention


def bytes_kept(attention: Function, tokens: int) -> int:
    """What autograd keeps of one call, in bytes."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        q, k, v = (random(1, 2, tokens, 8, seed=i).requires_grad_() for i in range(3))
        attention(q, k, v)
    return sum(kept)


def test_long_sequences_keep_no_probabilities() -> None:
    """With [T, T] a layer kept, 8 sequences of 1024 tokens would take 9 GiB in a model of 30 layers."""
    assert EXPLICIT_MAX_TOKENS == 512
    assert bytes_kept(cpu_causal_attention, 512) >= 2 * 512 * 512 * 4
    for tokens in (513, 1024):
        assert bytes_kept(cpu_causal_attention, tokens) < 2 * tokens * 100 * 4


def rope_of(x: Tensor) -> Tensor:
    return apply_rope(x, *rope_table(torch.arange(4), 6, 100.0, None, torch.float64))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (rope_of, [(2, 3, 4, 6)]),
        (swiglu, [(3, 4), (3, 4)]),
        (explicit_causal_attention, [(1, 4, 5, 3), (1, 2, 5, 3), (1, 2, 5, 3)]),
    ],
)
def test_numerical_gradient(function: Function, shapes: list[tuple[int, ...]]) -> None:
    """RMSNorm is not here: it computes in fp32 whatever comes, and finite differences need more."""
    inputs = [random(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)


def test_silu_is_pytorchs() -> None:
    gate = random(100, dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate, torch.ones_like(gate)), F.silu(gate))
