"""A model and its batches on fake tensors: all that a run has, but for the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tuner.build import MemoryTechniques, build_model
from tuner.models.config import ModelConfig
from tuner.models.decoder import Decoder
from tuner.models.new_rows import add_rows
from tuner.types import Batch, DeviceType, FrozenLinear, Peft, Precision, Quantization

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """What a run is made of, as far as it decides how much memory a step takes.

    Attributes:
        model: with the shape that its folder states.
        new_tokens: ids of tokens that the model learns.
        quantization, peft, precision, memory: members of their groups.
        offloads_activations: whether the host holds what backward needs, which `memory` leaves to whoever traces.
        make_optimizer: over the parameters of a model that train.
        rows: of a batch.
        tokens: of a row.
        document_tokens: of packed rows, the longest document; None where each row is one text.
        accumulates: whether a step has several batches.
        may_be_cut: a model of fewer layers can be built the same way; not where an adapter in a folder names them.
        clip_grad_norm: as for `training_steps`.
        last_apart: as many of the last layers are not like the others.
    """

    model: ModelConfig
    new_tokens: Sequence[int]
    quantization: Quantization
    peft: Peft
    precision: Precision
    memory: MemoryTechniques
    offloads_activations: bool
    make_optimizer: MakeOptimizer
    rows: int
    tokens: int
    document_tokens: int | None
    accumulates: bool
    may_be_cut: bool
    clip_grad_norm: float | None
    last_apart: int = 0

    def of(self, *, depth: int | None = None, rows: int | None = None, tokens: int | None = None) -> Plan:
        """The same with fewer layers, or other batches."""
        model = self.model if depth is None else _with_depth(self.model, depth)
        return replace(self, model=model, rows=rows or self.rows, tokens=tokens or self.tokens)


def _with_depth(model: ModelConfig, depth: int) -> ModelConfig:
    types = getattr(model, "layer_types", None)
    return replace(model, num_hidden_layers=depth, **({} if types is None else {"layer_types": types[:depth]}))


def adapted(plan: Plan) -> Decoder:
    """The model on the meta device, quantized and adapted as `load_base` and `build_model` do."""
    with torch.device("meta"):
        model = plan.model.build().to(getattr(torch, plan.precision.held))
        plan.quantization.quantize(model)
        model.tie()
        add_rows(model, plan.new_tokens)
        model.requires_grad_(False)
        plan.peft.adapt(model)
    return model


def ready(model: Decoder, plan: Plan, device_type: DeviceType) -> Decoder:
    """An `adapted` model ready to train, with the kernels of `device_type` and with storages in the place of weights.

    To be called within a `FakeTensorMode`.
    """
    give_storages(model)
    model.use_kernels(device_type)
    return build_model(model, _Adapted(), plan.precision, plan.memory)


class _Adapted:
    """A `Peft` of what is adapted already."""

    name = "adapted"

    def adapt(self, model: nn.Module) -> None:
        pass


def give_storages(model: nn.Module) -> None:
    """Replace what is on the meta device by tensors that have a storage, shared where it was shared, in place."""
    given: dict[int, Tensor] = {}

    def same(tensor: Tensor) -> Tensor:
        if id(tensor) not in given:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            given[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return given[id(tensor)]

    held: list[dict[str, Any]] = [own for module in model.modules() for own in (module._parameters, module._buffers)]
    before = [tensor for own in held for tensor in own.values()]  # kept, so that no two have one id
    for own in held:
        own.update({name: same(tensor) for name, tensor in own.items() if tensor is not None})
    del before


def weights_by_kind(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer with the component that its bytes are counted to."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            is_scale = isinstance(module, FrozenLinear) and name not in ("weight", "bias")
            kind = "trainable_weights" if tensor.requires_grad else "frozen_weights"
            yield "quantization_scales" if is_scale else kind, tensor


@dataclass(frozen=True)
class FakeBatches:
    """Endless windows of batches in which every position is a real, trained token."""

    rows: int
    tokens: int
    document_tokens: int | None
    accumulates: bool
    at_epoch_end: bool = False
    epochs_done: int = 0

    @classmethod
    def of(cls, plan: Plan) -> FakeBatches:
        return cls(plan.rows, plan.tokens, plan.document_tokens, plan.accumulates)

    def __next__(self) -> Sequence[Batch]:
        return [self._batch() for _ in range(2 if self.accumulates else 1)]  # a third adds nothing to the second

    def _batch(self) -> Batch:
        tokens, labels = (torch.zeros(self.rows, self.tokens, dtype=torch.int64) for _ in range(2))
        return Batch(tokens, labels, documents=self._documents())

    def _documents(self) -> Sequence[Sequence[int]] | None:
        """Rows full of the longest documents, whose attention takes most."""
        if (longest := self.document_tokens) is None:
            return None
        rest = self.tokens % longest
        return [[longest] * (self.tokens // longest) + [rest] * (rest > 0)] * self.rows

    def described(self) -> Mapping[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
