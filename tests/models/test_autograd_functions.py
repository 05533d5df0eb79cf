"""The functions with a backward of their own, against the composed forms that autograd differentiates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.models.attention import (
    EXPLICIT_MAX_TOKENS,
    AttentionFn,
    OneText,
    Scoring,
    Visible,
    attention_for,
    cached_attention,
    cpu_attention,
    explicit_attention,
    sdpa_attention,
    visible_keys,
)
from tuner.models.buckets import BUCKET_TOKENS, Buckets, similar
from tuner.models.documents import Documents, Varlen
from tuner.models.glu import geglu, swiglu
from tuner.models.rms_norm import RMSNorm
from tuner.models.rope import apply_rope, rope_table

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


def our_zero_centered_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = RMSNorm(x.shape[-1], 1e-5, zero_centered=True)
    del norm.weight
    norm.weight = weight
    return norm(x)


@dtypes
@pytest.mark.parametrize("shape", [(2, 7, 48), (1, 1, 33), (5, 16)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = 3 * random(*shape, dtype=dtype), 1 + 0.3 * random(shape[-1], seed=1)
    assert_equal_to_composed(our_rms_norm, composed_rms_norm, x, weight.to(dtype))
    around_zero = (0.3 * random(shape[-1], seed=1)).to(dtype)
    assert_equal_to_composed(our_zero_centered_norm, lambda x, w: composed_rms_norm(x, 1 + w), x, around_zero)


def test_a_new_norm_scales_by_one() -> None:
    x = random(3, 8)
    assert torch.equal(RMSNorm(8, 1e-5)(x), RMSNorm(8, 1e-5, zero_centered=True)(x))


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


@dtypes
def test_geglu(dtype: torch.dtype) -> None:
    gate, up = 4 * random(3, 5, 40, dtype=dtype), random(3, 5, 40, dtype=dtype, seed=1)
    assert_equal_to_composed(geglu, lambda g, u: F.gelu(g, approximate="tanh") * u, gate, up)


SCORINGS = {
    "plain": Scoring(8**-0.5),
    "scaled": Scoring(0.9),
    "capped": Scoring(0.9, softcap=1.5),  # low enough that tanh bends
}
DOCUMENTS = [[7, 11], [2, 1, 16]]
WINDOWS = {"causal": None, "window": 4, "window of one": 1}
"""Of two rows of 19 tokens: the lengths of documents, the first row with a token of padding; and windows."""


def number_of(documents: list[list[int]] | None, row: int, place: int) -> int:
    """Which document of its row a token belongs to."""
    return 0 if documents is None else sum(place >= end for end in itertools.accumulate(documents[row]))


def sees(window: int | None, documents: list[list[int]] | None, row: int, query: int, key: int) -> bool:
    """Said once more, one pair at a time."""
    same = number_of(documents, row, query) == number_of(documents, row, key)
    return bool(key <= query and same and (window is None or query - key < window))


def composed_attention(
    scoring: Scoring, window: int | None = None, documents: list[list[int]] | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        groups = q_BHTE.shape[1] // k_BKTE.shape[1]
        k, v = k_BKTE.repeat_interleave(groups, 1), v_BKTE.repeat_interleave(groups, 1)
        scores = q_BHTE @ k.transpose(-1, -2) * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        B, T = q_BHTE.shape[0], q_BHTE.shape[2]
        seen = [[[sees(window, documents, b, i, j) for j in range(T)] for i in range(T)] for b in range(B)]
        hidden = ~torch.tensor(seen).unsqueeze(1)
        return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v

    return attend


HEADS = [(6, 6), (6, 2), (6, 1), (1, 1)]
attentions = pytest.mark.parametrize("attention", [explicit_attention, sdpa_attention, cpu_attention])
scorings = pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)


@dtypes
@attentions
@scorings
@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one text", "documents"])
def test_attention(
    dtype: torch.dtype,
    attention: AttentionFn,
    scoring: Scoring,
    heads: int,
    key_heads: int,
    window: int | None,
    documents: list[list[int]] | None,
) -> None:
    inputs = [random(2, count, 19, 8, dtype=dtype, seed=i) for i, count in enumerate((heads, key_heads, key_heads))]
    composed = composed_attention(scoring, window, documents)
    cpu = torch.device("cpu")
    visible: Visible = OneText(visible_keys(19, window, cpu))
    if documents is not None:
        visible = Documents(documents, (2, 19), cpu).visible(window, dtype, scoring, 8)
    texts = documents or [[19], [19]]
    real = torch.tensor([[number_of(texts, b, t) < len(texts[b]) for t in range(19)] for b in range(2)])

    def of_texts(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Without what stands in padding, where anything may."""
        return lambda q, k, v: attend(q, k, v).transpose(1, 2)[real]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return visible.attend(q, k, v, scoring, attention)

    if window == 1:  # softmax of one score: q and k have no gradient to compare sizes with
        expected = inputs[2].repeat_interleave(heads // key_heads, 1).transpose(1, 2)[real]
        assert torch.equal(of_texts(ours)(*inputs), expected)
        return
    assert_equal_to_composed(of_texts(ours), of_texts(composed), *inputs)
    as_projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_equal_to_composed(of_texts(ours), of_texts(composed), *as_projected)


@dtypes
@attentions
@scorings
def test_attention_of_one_token(dtype: torch.dtype, attention: AttentionFn, scoring: Scoring) -> None:
    q, k, v = (random(2, count, 1, 8, dtype=dtype) for count in (6, 2, 2))
    assert torch.equal(attention(q, k, v, scoring, None), v.repeat_interleave(3, 1))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_what_the_kernel_for_texts_of_varying_length_is_told(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is a GPU's. Here a function does what its documentation says, from the arguments that it would get."""

    def told(
        q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, cuts_k: Tensor, longest: int, longest_k: int, **more: Any
    ) -> Tensor:
        assert (cuts.dtype, cuts_k is cuts, longest_k, more["enable_gqa"]) == (torch.int32, True, longest, True)
        ends = cuts.tolist()
        assert (ends[0], ends[-1]) == (0, q.shape[0])
        assert longest == max(end - begin for begin, end in itertools.pairwise(ends))
        before, after = more["window_size"]
        outs = []
        for begin, end in itertools.pairwise(ends):
            i, j = torch.arange(end - begin)[:, None], torch.arange(end - begin)
            seen = (j <= i + after) & ((j >= i - before) if before >= 0 else torch.ones_like(j, dtype=torch.bool))
            parts = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=more["scale"], enable_gqa=True)
            outs.append(out.transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", told)
    documents, scoring = Documents(DOCUMENTS, (2, 19), torch.device("cpu")), Scoring(0.9)
    inputs = [random(2, 19, count, 8, seed=i).transpose(1, 2) for i, count in enumerate((6, 2, 2))]
    expected = composed_attention(scoring, window, DOCUMENTS)(*inputs)
    found = Varlen(documents, window).attend(*inputs, scoring, sdpa_attention)
    for row, texts in enumerate(DOCUMENTS):
        torch.testing.assert_close(found[row, :, : sum(texts)], expected[row, :, : sum(texts)])


def test_the_way_to_documents_is_chosen_by_device_dtype_and_model() -> None:
    plain, capped = Scoring(0.9), Scoring(0.9, softcap=1.5)
    gpu, cpu = (Documents([[3, 4]], (1, 8), torch.device(name)) for name in ("cuda", "cpu"))
    assert isinstance(gpu.visible(None, torch.bfloat16, plain, 64), Varlen)
    for documents, dtype, scoring, head_dim in (
        (cpu, torch.bfloat16, plain, 64),
        (gpu, torch.float32, plain, 64),
        (gpu, torch.bfloat16, capped, 64),
        (gpu, torch.bfloat16, plain, 264),
        (gpu, torch.bfloat16, plain, 14),
    ):
        assert isinstance(documents.visible(None, dtype, scoring, head_dim), Buckets)


def test_a_bound_on_buckets_changes_nothing_but_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [[5, 6, 1, 6], [6, 5, 6, 1], [20]]
    scoring, inputs = Scoring(0.9), [random(3, 20, count, 8, seed=i) for i, count in enumerate((6, 2, 2))]
    found = []
    for bound, sizes in ((None, [(1, 20), (4, 6), (2, 5), (2, 1)]), (12, [(1, 20), (2, 6), (2, 6), (2, 5), (2, 1)])):
        monkeypatch.setitem(BUCKET_TOKENS, torch.float32, bound)
        documents = Documents(lengths, (3, 20), torch.device("cpu"))
        visible = documents.visible(None, torch.float32, scoring, 8)

        def attend(*qkv: Tensor, visible: Visible = visible) -> Tensor:
            out = visible.attend(*(x.transpose(1, 2) for x in qkv), scoring, cpu_attention)
            return torch.cat([out[b, :, : sum(row)].flatten() for b, row in enumerate(lengths)])

        assert documents.bucketing(bound).sizes == sizes
        found.append(output_and_gradients(attend, *inputs))
    for bounded, free in zip(*found, strict=True):
        torch.testing.assert_close(bounded, free)


@pytest.mark.parametrize("bound", [None, 1, 100, 1024])
@pytest.mark.parametrize("lengths", [[7], [100, 99, 85, 84, 1, 1, 300], list(range(1, 200))], ids=len)
def test_buckets_hold_each_document_once_and_are_of_about_one_length(lengths: list[int], bound: int | None) -> None:
    groups = similar(np.array(lengths), bound)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert all(lengths[index] >= 0.85 * longest for index in group)
        assert bound is None or len(group) == 1 or len(group) * longest <= bound


def test_what_hides_nothing_is_no_mask() -> None:
    cpu = torch.device("cpu")
    assert visible_keys(19, None, cpu) is None
    assert visible_keys(19, 19, cpu) is None
    assert visible_keys(19, 18, cpu) is not None


@scorings
@pytest.mark.parametrize("window", [None, 4, 30])
@pytest.mark.parametrize(("heads", "key_heads"), HEADS)
def test_cached_attention_is_the_last_rows_of_the_whole(
    heads: int, key_heads: int, window: int | None, scoring: Scoring
) -> None:
    q, k, v = random(2, heads, 13, 8), random(2, key_heads, 13, 8, seed=1), random(2, key_heads, 13, 8, seed=2)
    whole = composed_attention(scoring, window)(q, k, v)
    for new in (1, 4, 13):
        cached = cached_attention(q[:, :, -new:], k, v, scoring, window, None)
        torch.testing.assert_close(cached, whole[:, :, -new:])


@scorings
@pytest.mark.parametrize("window", [None, 4])
def test_cached_attention_does_not_see_padding(window: int | None, scoring: Scoring) -> None:
    q, k, v = random(2, 6, 13, 8), random(2, 2, 13, 8, seed=1), random(2, 2, 13, 8, seed=2)
    out = cached_attention(q, k, v, scoring, window, torch.tensor([0, 5]))
    alone = composed_attention(scoring, window)(q[1:, :, 5:], k[1:, :, 5:], v[1:, :, 5:])
    torch.testing.assert_close(out[1:, :, 5:], alone)
    torch.testing.assert_close(out[:1], composed_attention(scoring, window)(q[:1], k[:1], v[:1]))
    assert out.isfinite().all()


@scorings
def test_no_token_sees_a_later_one(scoring: Scoring) -> None:
    q, k, v = (random(1, 2, 9, 4, seed=i) for i in range(3))
    before = explicit_attention(q, k, v, scoring)
    k[:, :, 5:], v[:, :, 5:] = 1e4, float("nan")
    after = explicit_attention(q, k, v.nan_to_num(7.0), scoring)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_the_kernel_of_a_device() -> None:
    assert attention_for("cpu") is cpu_attention
    assert attention_for("cuda") is sdpa_attention


def bytes_kept(attention: AttentionFn, tokens: int) -> int:
    """What autograd keeps of one call, in bytes."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        q, k, v = (random(1, 2, tokens, 8, seed=i).requires_grad_() for i in range(3))
        attention(q, k, v, Scoring(0.3), None)
    return sum(kept)


def test_long_sequences_keep_no_probabilities() -> None:
    """With [T, T] a layer kept, 8 sequences of 1024 tokens would take 9 GiB in a model of 30 layers."""
    assert {torch.float32: 128, torch.bfloat16: 512} == EXPLICIT_MAX_TOKENS
    assert bytes_kept(cpu_attention, 128) >= 2 * 128 * 128 * 4
    for tokens in (129, 513, 1024):
        assert bytes_kept(cpu_attention, tokens) < 2 * tokens * 100 * 4


def rope_of(x: Tensor) -> Tensor:
    return apply_rope(x, *rope_table(torch.arange(4), 6, 100.0, None, torch.float64))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (rope_of, [(2, 3, 4, 6)]),
        (swiglu, [(3, 4), (3, 4)]),
        (geglu, [(3, 4), (3, 4)]),
        (lambda q, k, v: explicit_attention(q, k, v, Scoring(0.6)), [(1, 4, 5, 3), (1, 2, 5, 3), (1, 2, 5, 3)]),
        (lambda q, k, v: explicit_attention(q, k, v, Scoring(0.6, 1.0)), [(1, 4, 5, 3), (1, 2, 5, 3), (1, 2, 5, 3)]),
    ],
)
def test_numerical_gradient(function: Function, shapes: list[tuple[int, ...]]) -> None:
    """RMSNorm is not here: it computes in fp32 whatever comes, and finite differences need more."""
    inputs = [random(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)


def test_silu_is_pytorchs() -> None:
    gate = random(100, dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate, torch.ones_like(gate)), F.silu(gate))
