"""The fused cross-entropy against torch's on the whole matrix of logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tuner import loss as fused
from tuner.loss import CHUNK_TOKENS, sum_cross_entropy
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.types import IGNORE

V, D = 77, 12


def inputs(batch: int, tokens: int, ignored: float = 0.4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(batch, tokens, D, generator=generator).to(dtype)
    labels = torch.randint(0, V, (batch, tokens), generator=generator)
    return hidden, labels.masked_fill(torch.rand(batch, tokens, generator=generator) < ignored, IGNORE)


def head_of(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(D, V, bias=bias).to(dtype)


def composed(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    logits = head(hidden)[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def value_and_gradients(function: object, hidden: Tensor, labels: Tensor, head: nn.Module) -> list[Tensor]:
    head.zero_grad()
    leaf = hidden.detach().clone().requires_grad_()
    value = function(leaf, labels, head)  # type: ignore[operator]
    (value * 0.37).backward()  # a factor, as of the mean over a window
    return [value.detach(), leaf.grad, *(p.grad.clone() for p in head.parameters() if p.grad is not None)]  # type: ignore[list-item]


def assert_close(ours: list[Tensor], theirs: list[Tensor], off: float) -> None:
    assert len(ours) == len(theirs)
    for found, exact in zip(ours, theirs, strict=True):
        assert found.shape == exact.shape
        assert (found.float() - exact.float()).abs().max() <= off * exact.float().abs().max()


FP32 = 2e-6  # of the largest entry: sums of some hundred terms in another order


@pytest.mark.parametrize("tokens", [2, 9, CHUNK_TOKENS, CHUNK_TOKENS + 1, CHUNK_TOKENS + 2, 2 * CHUNK_TOKENS + 5])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_of_a_trained_head(tokens: int, ignored: float, bias: bool) -> None:
    hidden, labels = inputs(1, tokens, ignored)
    labels[0, -1] = 3  # at least one
    head = head_of(bias=bias)
    ours = value_and_gradients(sum_cross_entropy, hidden, labels, head)
    assert len(ours) == 3 + bias
    assert_close(ours, value_and_gradients(composed, hidden, labels, head), FP32)


def test_batches_and_ignored_positions() -> None:
    hidden, labels = inputs(5, 33)
    ours = value_and_gradients(sum_cross_entropy, hidden, labels, head_of())
    assert_close(ours, value_and_gradients(composed, hidden, labels, head_of()), FP32)
    assert ours[1][:, -1].abs().max() == 0  # the last position predicts nothing
    untrained = labels[:, 1:] == IGNORE
    assert ours[1][:, :-1][untrained].abs().max() == 0


def test_the_first_label_is_nobodys_target() -> None:
    hidden, labels = inputs(2, 8, ignored=0.0)
    other = labels.clone()
    other[:, 0] = IGNORE
    head = head_of()
    assert torch.equal(sum_cross_entropy(hidden, labels, head), sum_cross_entropy(hidden, other, head))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, labels = inputs(2, 20)
    head = head_of().requires_grad_(False)
    ours = value_and_gradients(sum_cross_entropy, hidden, labels, head)
    assert len(ours) == 2
    assert_close(ours, value_and_gradients(composed, hidden, labels, head), FP32)


def test_an_adapted_head() -> None:
    torch.manual_seed(2)
    adapter = Adapter(D, V, rank=3, alpha=6, dropout=0.0, use_rslora=False)
    nn.init.normal_(adapter.B)
    head = LoRALinear(head_of().requires_grad_(False), {"default": adapter})
    hidden, labels = inputs(2, CHUNK_TOKENS)
    ours = value_and_gradients(sum_cross_entropy, hidden, labels, head)
    assert len(ours) == 4  # value, hidden, A, B
    assert_close(ours, value_and_gradients(composed, hidden, labels, head), FP32)


def test_a_head_tied_to_the_embedding_gets_the_sum_of_both_gradients() -> None:
    tokens = torch.randint(0, V, (3, 50), generator=torch.Generator().manual_seed(0))

    def gradient(function: object) -> Tensor:
        head = head_of()
        embedding = nn.Embedding(V, D, _weight=head.weight)
        embedding.weight = head.weight
        function(torch.tanh(embedding(tokens)), tokens, head).backward()  # type: ignore[operator]
        assert head.weight.grad is not None
        return head.weight.grad

    assert_close([gradient(sum_cross_entropy)], [gradient(composed)], FP32)


def test_hidden_states_that_need_no_gradient() -> None:
    hidden, labels = inputs(2, 20)
    gradients = []
    for function in (sum_cross_entropy, composed):
        head = head_of()
        function(hidden, labels, head).backward()
        gradients.append(head.weight.grad)
    assert_close(gradients[:1], gradients[1:], FP32)  # type: ignore[arg-type]


def test_bf16_is_as_close_to_fp32_as_the_composed_form() -> None:
    hidden, labels = inputs(3, CHUNK_TOKENS, dtype=torch.bfloat16)
    exact = value_and_gradients(composed, hidden.float(), labels, head_of(torch.bfloat16).float())
    ours = value_and_gradients(sum_cross_entropy, hidden, labels, head_of(torch.bfloat16))
    theirs = value_and_gradients(composed, hidden, labels, head_of(torch.bfloat16))
    assert ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:]] == [torch.bfloat16, torch.bfloat16]
    for found, composed_form, truth in zip(ours, theirs, exact, strict=True):
        off, theirs_off = (found.float() - truth).norm(), (composed_form.float() - truth).norm()
        # the head's gradient is a sum over chunks that is rounded after each: one more rounding than the composed form
        assert off <= 2 * theirs_off + 1e-6 * truth.norm()
        assert off <= 1e-2 * truth.norm()  # ulp of bf16: 7.8e-3


def test_nothing_trained_is_zero_with_zero_gradients() -> None:
    hidden, labels = inputs(2, 9, ignored=1.1)
    value, *gradients = value_and_gradients(sum_cross_entropy, hidden, labels, head_of())
    assert value == 0
    assert [g.shape for g in gradients] == [hidden.shape, (V, D)]
    assert all((g == 0).all() for g in gradients)
    with torch.no_grad():
        assert sum_cross_entropy(hidden, labels, head_of()) == 0


@pytest.mark.parametrize("tokens", [2, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 5])
def test_without_gradients_the_value_is_the_same(tokens: int) -> None:
    hidden, labels = inputs(2, tokens, ignored=0.0)
    with_gradient = sum_cross_entropy(hidden, labels, head_of())
    with torch.no_grad():
        torch.testing.assert_close(sum_cross_entropy(hidden, labels, head_of()), with_gradient, rtol=1e-6, atol=0)


def test_no_chunk_is_larger_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Head(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            seen.append(h.shape[0])
            return super().forward(h)

    monkeypatch.setattr(fused, "CHUNK_TOKENS", 10)
    hidden, labels = inputs(1, 36, ignored=0.0)
    sum_cross_entropy(hidden, labels, Head(D, V)).backward()
    assert seen == [10, 10, 10, 5]


def test_numerical_gradient_of_the_hidden_states() -> None:
    """The value is fp32 by design, so the difference is wide (1e-2) and the bound that of a central difference."""
    hidden, labels = inputs(1, 5, ignored=0.0)
    head = head_of()
    gradient = value_and_gradients(sum_cross_entropy, hidden, labels, head)[1] / 0.37
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8))
    step = 1e-2
    up, down = (sum_cross_entropy(hidden + sign * step * direction, labels, head).detach() for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=1e-3)


def test_its_gradient_is_taken_once() -> None:
    hidden, labels = torch.randn(1, 4, 32, requires_grad=True), torch.randint(0, 50, (1, 4))
    loss = sum_cross_entropy(hidden, labels, nn.Linear(32, 50, bias=False))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()
