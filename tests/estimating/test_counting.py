"""What is alive is counted storage by storage, and what a fake tensor cannot answer is answered by the worst case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tuner.estimating.counting import PAGED, MemoryCount
from tuner.estimating.worst_case import WorstCase

KIB = 1024


@contextmanager
def counting(rounding: int = 1, **inside: int) -> Iterator[MemoryCount]:
    sizes = {torch.ops.aten.mm.default: lambda args, kwargs, out: inside["mm"]} if inside else {}
    count = MemoryCount(rounding, sizes)
    with FakeTensorMode(), count, WorstCase("cpu"):
        yield count


def peak(count: MemoryCount, *region: str) -> dict[str, int]:
    found = count.peaks(lambda made_in: "temporary")
    return {kind: size for kind, size in found[region or ("before",)].items() if size}


def test_a_storage_counts_until_its_last_tensor_is_dropped() -> None:
    with counting() as count:
        first = torch.empty(256, dtype=torch.float32)  # 1 KiB
        view = first.view(16, 16).t()
        del first
        second = view + 1
        assert peak(count) == {"temporary": 2 * KIB}
        del view
        third = second.mul_(2)  # in its place
        del second
        fourth = torch.cat([third, third])
        assert peak(count) == {"temporary": 3 * KIB}
        del third, fourth
        torch.empty(512, dtype=torch.bfloat16)
        assert peak(count) == {"temporary": 3 * KIB}


def test_parts_have_peaks_of_their_own_and_kinds_may_be_said_later() -> None:
    with counting() as count:
        weight = torch.empty(1024, dtype=torch.uint8)
        count.mark([weight], "frozen_weights")
        count.region = ("forward",)
        kept = weight.float()
        passing = kept * 2
        del passing
        count.mark_alive("activations", lambda region: region == ("forward",))
        with count.within(("loss",)):
            half = torch.empty(64, dtype=torch.float64)
        assert count.region == ("forward",)
        del kept, half
    assert peak(count, "before") == {"frozen_weights": KIB}
    assert peak(count, "forward") == {"frozen_weights": KIB, "activations": 4 * KIB, "temporary": 4 * KIB}
    assert peak(count, "loss") == {"frozen_weights": KIB, "activations": 4 * KIB, "temporary": 512}


class Sum(torch.autograd.Function):
    """Of two tensors; its backward pass adds in Python, where the operands live on until it returns."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return first.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = grad * 2
        total = total + grad.clone()
        return total, None


def test_autograd_adds_gradients_up_in_place_as_it_does_with_numbers() -> None:
    with counting() as count:
        weight = torch.empty(256, requires_grad=True)
        sums = (weight * 2).sum(), (weight * 3).sum()
        count.region = ("backward",)
        torch.autograd.backward(sums)
        del sums
        assert weight.grad is not None
    # The weight and two gradients, the sum in one of them; two losses and their gradients.
    assert peak(count, "backward") == {"temporary": 3 * KIB + 4 * 4}

    with counting() as count:
        weight = torch.empty(256, requires_grad=True)
        made = Sum.apply(weight, weight)  # type: ignore[no-untyped-call]
        count.region = ("backward",)
        made.backward(torch.empty(256))
    # The weight and its detached twin's, the gradient, and a sum beside both of its operands.
    assert peak(count, "backward") == {"temporary": 5 * KIB}


def test_sizes_are_rounded_up_as_the_allocator_does() -> None:
    with counting(rounding=512) as count:
        kept = [torch.empty(size, dtype=torch.uint8) for size in (1, 512, 513)]
    assert peak(count) == {"temporary": 512 + 512 + 1024}
    assert len(kept) == 3


def test_what_a_kernel_takes_inside_itself_is_there_beside_its_result() -> None:
    with counting(mm=5 * KIB) as count:
        square = torch.empty(16, 16)
        product = square @ square
        assert peak(count) == {"temporary": 7 * KIB}
        again = product.clone()
    assert peak(count) == {"temporary": 7 * KIB}
    assert again.shape == (16, 16)


def test_paged_state_takes_no_room() -> None:
    with counting() as count:
        state = torch.empty(4096, dtype=torch.uint8)
        count.mark([state], PAGED)
        small = torch.empty(256, dtype=torch.uint8)
        del small
        larger = torch.empty(512, dtype=torch.uint8)
    assert peak(count) == {PAGED: 4 * KIB, "temporary": 512}
    assert larger.numel() == 512


def test_every_number_is_one_and_every_mask_true_everywhere() -> None:
    with counting():
        x = torch.empty(4, 6, 8)
        mask = torch.empty(4, 6) > 0
        assert float(x.sum()) == 1.0
        assert int(mask.sum()) == 1
        assert x[mask].shape == (24, 8)
        assert x[:, mask[0]].shape == (4, 6, 8)
        assert mask.nonzero().shape == (24, 2)
        x[mask] = 0.0
        assert x.index_put((mask,), torch.empty(24, 8)).shape == (4, 6, 8)


def test_the_gradient_of_a_choice_by_mask_has_its_shape() -> None:
    with counting():
        x = torch.empty(4, 6, 8, requires_grad=True)
        x[torch.empty(4, 6) > 0].sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_without_the_answers_it_is_an_error() -> None:
    with FakeTensorMode(), pytest.raises(Exception, match="aten"):
        torch.empty(4, 6)[torch.empty(4) > 0]
