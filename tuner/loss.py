"""Cross-entropy fused with the output head, in chunks of trained tokens.

The [tokens, vocabulary] matrix of logits is the largest tensor of a step for a small model with a large vocabulary.
Here it never exists: each chunk's logits, loss and gradient with respect to the hidden states are computed at once and
only the latter, of size [N, D], is kept. Positions that are not trained on cost nothing. Unlike recomputing the logits
in backward, chunking then costs no extra matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tuner.types import IGNORE

CHUNK_TOKENS = 256
"""Tokens a chunk: at V = 49,152 its bf16 logits take 24 MiB.

The gradient of a head that trains is summed over the chunks in the head's dtype. In bf16, 16 chunks put it 0.44 % from
the fp32 gradient (relative norm, 4,096 tokens) where one product puts it 0.17 %: less than bf16 activations do, and an
fp32 sum would take 2 V D bytes more."""

CPU_BLOCK_TOKENS = 32
"""Tokens whose fp32 log-probabilities exist at once on a CPU: few enough to stay in its cache, which makes the softmax
of a bf16 chunk several times as fast. A GPU takes a chunk in one go."""


def _blocks(logits_CV: Tensor, labels_C: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A chunk's logits and labels in the pieces that the softmax takes at a time: views."""
    tokens = CPU_BLOCK_TOKENS if logits_CV.device.type == "cpu" else CHUNK_TOKENS
    return zip(torch.split(logits_CV, tokens), torch.split(labels_C, tokens), strict=True)


def _loss_and_gradient_(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Summed cross-entropy in fp32; the logits become its gradient with respect to them, in place."""
    loss = torch.zeros((), dtype=torch.float32, device=logits_CV.device)
    for logits, labels in _blocks(logits_CV, labels_C):
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        picked = labels.unsqueeze(-1)
        loss -= log_probs.gather(-1, picked).sum()
        gradient = log_probs.exp_()
        gradient.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=gradient.dtype))
        logits.copy_(gradient)
    return loss


class _FusedCrossEntropy(torch.autograd.Function):
    """Loss of h_ND under `head`; gradients of h and of the head's trainable parameters are made in forward."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, labels_N: Tensor, head: nn.Module, *weights: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        grad_weights = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, h_ND.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            with torch.enable_grad():
                h_CD = h_ND[rows].detach().requires_grad_(grad_h is not None)
                logits = head(h_CD)
            # `.data`: no backward reads logits, yet autograd forbids changing those of an adapted head in place.
            grad_logits = logits.data
            loss += _loss_and_gradient_(grad_logits, labels_N[rows])
            inputs = [h_CD, *weights] if grad_h is not None else list(weights)
            if not inputs:
                continue
            parts = list(torch.autograd.grad(logits, inputs, grad_logits))
            if grad_h is not None:
                grad_h[rows] = parts.pop(0)
            for total, part in zip(grad_weights, parts, strict=True):
                total += part
        ctx.save_for_backward(*([] if grad_h is None else [grad_h]), *grad_weights)
        ctx.has_grad_h = grad_h is not None
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = [(grads[0] * tensor).to(tensor.dtype) for tensor in ctx.saved_tensors]
        grad_h = kept.pop(0) if ctx.has_grad_h else None
        return grad_h, None, None, *kept


def sum_cross_entropy(hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Module) -> Tensor:
    """Cross-entropy of each next token, summed over the trained positions: an fp32 scalar.

    Args:
        hidden_BTD: what the model gives for the tokens, [B, T, D].
        labels_BT: the tokens themselves where trained on and `IGNORE` elsewhere; position t predicts label t + 1.
        head: hidden states to logits.
    """
    targets = labels_BT[:, 1:]
    trained = targets != IGNORE
    h_ND, labels_N = hidden_BTD[:, :-1][trained], targets[trained]
    if not torch.is_grad_enabled():
        chunks = zip(torch.split(h_ND, CHUNK_TOKENS), torch.split(labels_N, CHUNK_TOKENS), strict=True)
        summed = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        for h_CD, labels_C in chunks:
            for logits, labels in _blocks(head(h_CD), labels_C):
                summed += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return summed
    weights = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = _FusedCrossEntropy.apply(h_ND, labels_N, head, *weights)  # type: ignore[no-untyped-call]
    return loss
