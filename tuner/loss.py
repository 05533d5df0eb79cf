"""Cross-entropy fused with the output head, in chunks of trained tokens.

The [tokens, vocabulary] matrix of logits is the largest tensor of a step for a small model with a large vocabulary.
Here it never exists: each chunk's logits, loss and gradient with respect to the hidden states are computed at once and
only the latter, of size [N, D], is kept. Positions that are not trained on cost nothing. Unlike recomputing the logits
in backward, chunking then costs no extra matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tuner.models.linear import Linear
from tuner.types import IGNORE, DeviceType

CHUNK_TOKENS = 256
"""Tokens a chunk: at V = 49,152 its bf16 logits take 24 MiB.

The gradient of a head that trains is summed over the chunks in the head's dtype. In bf16, 16 chunks put it 0.44 % from
the fp32 gradient (relative norm, 4,096 tokens) where one product puts it 0.17 %: less than bf16 activations do, and an
fp32 sum would take 2 V D bytes more."""

CPU_BLOCK_ELEMENTS = 400 * 1024
"""fp32 probabilities that exist at once on a CPU: 1.6 MiB, few enough to stay in its cache, which at V = 49,152 makes
the softmax of a chunk half as long. A GPU takes a chunk in one go."""


def _blocks(logits_CV: Tensor, labels_C: Tensor, device_type: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A chunk's logits and labels in the pieces that the softmax takes at a time: views."""
    of_cpu = max(1, CPU_BLOCK_ELEMENTS // logits_CV.shape[1])
    tokens = of_cpu if device_type == "cpu" else CHUNK_TOKENS
    return zip(torch.split(logits_CV, tokens), torch.split(labels_C, tokens), strict=True)


def _loss_and_gradient_(logits_CV: Tensor, labels_C: Tensor, weight: float, device_type: str) -> Tensor:
    """Summed cross-entropy in fp32; the logits become `weight` times its gradient with respect to them, in place.

    The exponentials are taken once: log(sum(exp(logits))) is the largest logit minus the logarithm of its probability,
    which is at least 1 / V, so nothing is lost.
    """
    loss = torch.zeros((), dtype=torch.float32, device=logits_CV.device)
    for logits, labels in _blocks(logits_CV, labels_C, device_type):
        gradient = torch.softmax(logits, dim=-1, dtype=torch.float32)
        picked = labels.unsqueeze(-1)
        log_sum_exp = logits.amax(-1, keepdim=True).float() - gradient.amax(-1, keepdim=True).log()
        loss += (log_sum_exp - logits.gather(-1, picked).float()).sum()
        gradient.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=gradient.dtype))
        logits.copy_(gradient.mul_(weight))
    return loss


class _FusedCrossEntropy(torch.autograd.Function):
    """`weight` times the loss of h_ND under `head`; gradients of h and of what trains of the head are made in forward.

    All is computed in the dtype of h; a plain head of another one is cast to it once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        labels_N: Tensor,
        head: nn.Module,
        softcap: float | None,
        weight: float,
        device_type: str,
        *parameters: Tensor,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        plain = type(head) in (nn.Linear, Linear) and head.bias is None
        weight_VD = cast(Tensor, head.weight).detach().to(h_ND.dtype) if plain else None
        for start in range(0, h_ND.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            part = None if grad_h is None else grad_h[rows]
            rest = (softcap, weight, device_type, part)
            if weight_VD is None:
                loss += _any_chunk(h_ND[rows], labels_N[rows], head, *rest, parameters, sums)
            else:
                loss += _plain_chunk(h_ND[rows], labels_N[rows], weight_VD, *rest, sums)
        ctx.kept = [grad_h, *sums]
        return loss.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None  # given away, so that a second copy of the head's gradient is never needed
        if kept is None:
            raise RuntimeError("the gradient of this loss was already taken; it cannot be taken twice")
        grad_h, *grad_weights = [None if tensor is None else tensor.mul_(grads[0]) for tensor in kept]
        return grad_h, None, None, None, None, None, *grad_weights


def _plain_chunk(
    h_CD: Tensor,
    labels_C: Tensor,
    weight_VD: Tensor,
    softcap: float | None,
    weight: float,
    device_type: str,
    grad_h: Tensor | None,
    sums: Sequence[Tensor],
) -> Tensor:
    """Loss of a chunk under a plain head; its gradients, times `weight`, go into `grad_h` and are added to `sums`."""
    logits = nn.functional.linear(h_CD.detach(), weight_VD)
    tanh = None if softcap is None else logits.div_(softcap).tanh_()
    if tanh is not None and softcap is not None:
        logits = tanh * softcap
    loss = _loss_and_gradient_(logits, labels_C, weight, device_type)
    if tanh is not None:
        logits.mul_(tanh.square_().neg_().add_(1.0))
    if grad_h is not None:
        torch.mm(logits, weight_VD, out=grad_h)
    for total in sums:  # one or none
        if total.dtype == logits.dtype:  # added within the product, without a second matrix of its size
            total.addmm_(logits.t(), h_CD.detach())
        else:
            total += logits.t() @ h_CD.detach()
    return loss


def _any_chunk(
    h_CD: Tensor,
    labels_C: Tensor,
    head: nn.Module,
    softcap: float | None,
    weight: float,
    device_type: str,
    grad_h: Tensor | None,
    parameters: Sequence[Tensor],
    sums: Sequence[Tensor],
) -> Tensor:
    """As `_plain_chunk`, for a head that only autograd knows, as an adapted one."""
    with torch.enable_grad():
        h_CD = h_CD.detach().requires_grad_(grad_h is not None)
        logits = _logits(h_CD, head, softcap)
    # `.data`: no backward reads logits, yet autograd forbids changing those of an adapted head in place.
    grad_logits = logits.data
    loss = _loss_and_gradient_(grad_logits, labels_C, weight, device_type)
    inputs = [h_CD, *parameters] if grad_h is not None else list(parameters)
    if not inputs:
        return loss
    parts = list(torch.autograd.grad(logits, inputs, grad_logits))
    if grad_h is not None:
        grad_h.copy_(parts.pop(0))
    for total, part in zip(sums, parts, strict=True):
        total += part
    return loss


def _logits(h_CD: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    logits: Tensor = head(h_CD)
    if softcap is None:
        return logits
    if torch.is_grad_enabled():
        return torch.tanh(logits / softcap) * softcap
    return logits.div_(softcap).tanh_().mul_(softcap)


def sum_cross_entropy(
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    head: nn.Module,
    softcap: float | None = None,
    weight: float = 1.0,
    device_type: DeviceType | None = None,
) -> Tensor:
    """Cross-entropy of each next token, summed over the trained positions, times `weight`: an fp32 scalar.

    Args:
        hidden_BTD: what the model gives for the tokens, [B, T, D].
        labels_BT: the tokens themselves where trained on and `IGNORE` elsewhere; position t predicts label t + 1.
        head: hidden states to logits.
        softcap: largest magnitude of a logit, as `CausalLM.logit_softcap`.
        weight: the gradient of the logits is multiplied with it before it is rounded to their dtype. A factor that is
            there to keep it from vanishing would come too late behind this function.
        device_type: in whose pieces the loss is taken, as `CausalLM.device_type`; None is that of the hidden states.
    """
    kernels = device_type or hidden_BTD.device.type
    targets = labels_BT[:, 1:]
    trained = targets != IGNORE
    h_ND, labels_N = hidden_BTD[:, :-1][trained], targets[trained]
    if not torch.is_grad_enabled():
        chunks = zip(torch.split(h_ND, CHUNK_TOKENS), torch.split(labels_N, CHUNK_TOKENS), strict=True)
        summed = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        for h_CD, labels_C in chunks:
            for logits, labels in _blocks(_logits(h_CD, head, softcap), labels_C, kernels):
                summed += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return summed * weight
    parameters = [p for p in head.parameters() if p.requires_grad]
    arguments = (h_ND, labels_N, head, softcap, weight, kernels, *parameters)
    loss: Tensor = _FusedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss
