"""Cross-entropy fused with the output head, in chunks of trained tokens.

The [tokens, vocabulary] matrix of logits is the largest tensor of a step for a small model with a large vocabulary.
Here it never exists: each chunk's logits, loss and gradient with respect to the hidden states are computed at once and
only the latter, of size [N, D], is kept. Positions that are not trained on cost nothing. Unlike recomputing the logits
in backward, chunking then costs no extra matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tuner.types import IGNORE

CHUNK_TOKENS = 256
"""Tokens a chunk: at V = 49,152 its fp32 log-probabilities take 48 MiB."""


def _loss_and_gradient(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in fp32 and its gradient with respect to the logits, in their dtype."""
    log_probs = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    picked = labels_C.unsqueeze(-1)
    loss = -log_probs.gather(-1, picked).sum()
    gradient = log_probs.exp_()
    gradient.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=gradient.dtype))
    return loss, gradient.to(logits_CV.dtype)


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
            chunk_loss, grad_logits = _loss_and_gradient(logits.detach(), labels_N[rows])
            loss += chunk_loss
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
        losses = [nn.functional.cross_entropy(head(h).float(), y, reduction="sum") for h, y in chunks]
        return torch.stack(losses).sum() if losses else h_ND.new_zeros((), dtype=torch.float32)
    weights = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = _FusedCrossEntropy.apply(h_ND, labels_N, head, *weights)  # type: ignore[no-untyped-call]
    return loss
