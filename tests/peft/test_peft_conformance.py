"""Every member of the peft group, over every member of the quantization group that it is not refused over."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from tests.merging import plain_model
from tuner.build import cast_trainable, load_base
from tuner.checkpoint.snapshot import put_weights, trainable
from tuner.config import check, compose, conf_dir
from tuner.errors import ConfigError
from tuner.loop import backward
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.peft.adapted import AdapterPart
from tuner.peft.adapter import FromAdapter
from tuner.peft.adapter_folder import has_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.types import Batch, ChangesWeights, Precision


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


METHODS = [name for name in options("peft") if name != "adapter"]  # which is any of those that leave an adapter
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
TOKENS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
BATCH = Batch(TOKENS, TOKENS)
MOVED = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Of logits up to 40. fp32: a weight that was taken apart and put together again. bf16: that, rounded to 2⁻⁹ in each of
21 layers, as are the two parts and the sum of what they make of an input."""
ROUNDED = {torch.float32: 2e-5, torch.bfloat16: 0.3}
"""A sum in another order; in bf16 an output rounded once more, before its bias is added."""


@cache
def chosen(method: str, quantization: str) -> Any:
    """The composed run; None where a rule refuses it."""
    config = compose([f"peft={method}", f"quantization={quantization}"])
    try:
        check(config)
    except ConfigError:
        return None
    return config


REFUSED = {
    "full": {"fp4", "int8", "nf4"},
    "last_layers": {"fp4", "int8", "nf4"},
    "qlora": {"none"},
}
PAIRS = [(m, q) for m in METHODS for q in options("quantization") if q not in REFUSED.get(m, ())]
EVERY_DAY = ("none", "nf4")
"""Quantizations that are met by every method in each run of the tests; the others in the slow ones."""


def over(methods: list[tuple[str, str]]) -> pytest.MarkDecorator:
    rows = [pytest.param(*pair, marks=[] if pair[1] in EVERY_DAY else pytest.mark.slow) for pair in methods]
    return pytest.mark.parametrize(("method", "quantization"), rows, ids=["-".join(pair) for pair in methods])


pairs = over(PAIRS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def base_of(quantization: Any, dtype: torch.dtype = torch.float32, peft: Any = None) -> Decoder:
    """Random weights beyond the range where a layer is nearly linear, and biases and norms that do something."""

    class Enlarged:
        name = "enlarged"

        def packed(self, linear: nn.Linear) -> nn.Module:
            return quantization.packed(linear)  # type: ignore[no-any-return]

        def quantize(self, model: nn.Module) -> None: ...

    class First:
        """Enlarges a layer before the method sees it."""

        def before_packing(self, model: nn.Module, slot: Any) -> None:
            generator = torch.Generator().manual_seed(len(slot.path))
            with torch.no_grad():
                slot.module.weight.mul_(5)
                if slot.module.bias is not None:
                    slot.module.bias.normal_(generator=generator)
            if isinstance(peft, ChangesWeights):
                peft.before_packing(model, slot)

    config = LlamaConfig.from_hugging_face(SHAPE, None)
    return load_base(config, dtype, torch.device("cpu"), 3, Enlarged(), peft=First())  # type: ignore[arg-type]


def built(method: str, quantization: str, dtype: torch.dtype = torch.float32, seed: int = 7) -> Decoder:
    config = chosen(method, quantization)
    peft = instantiate(config.peft)
    model = base_of(instantiate(config.quantization), dtype, peft)
    torch.manual_seed(seed)
    peft.adapt(model)
    cast_trainable(model, Precision("bf16" if dtype == torch.bfloat16 else "fp32", str(dtype).split(".")[1]))
    return model


def trained(model: Decoder, steps: int = 2) -> Decoder:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for _ in range(steps):
        backward(model, [BATCH])
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(TOKENS)
    assert isinstance(out, Tensor)
    return out.float()


def test_all_members_are_found() -> None:
    assert set(METHODS) >= {
        "lora",
        "qlora",
        "rslora",
        "dora",
        "pissa",
        "olora",
        "ia3",
        "layernorm",
        "last_layers",
        "full",
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_is_met_over_everything_that_it_is_not_refused_over(method: str) -> None:
    assert {q for q in options("quantization") if chosen(method, q) is None} == REFUSED.get(method, set())


@pairs
@dtypes
def test_it_starts_as_the_identity(method: str, quantization: str, dtype: torch.dtype) -> None:
    model = built(method, quantization, dtype)
    if not isinstance(instantiate(chosen(method, quantization).peft), ChangesWeights):
        before = logits(base_of(instantiate(chosen(method, quantization).quantization), dtype))
        assert (logits(model) - before).abs().max() <= (ROUNDED[dtype] if method == "dora" else 0)
        assert (logits(model.train()) - before).abs().max() <= (ROUNDED[dtype] if method == "dora" else 0)
    else:  # over a residual, of the weights as they were; the residual is what quantization rounds
        before, q = logits(base_of(instantiate(compose(["quantization=none"]).quantization), dtype)), quantization
        error = (logits(base_of(instantiate(chosen("lora", q).quantization), dtype)) - before).norm()
        off = (logits(model) - before).norm()
        if (q, dtype) == ("int8", torch.bfloat16):  # whose own rounding is as large as that of 8 bits
            error += (logits(built(method, "none", dtype)) - before).norm()
        assert off <= (MOVED[dtype] * before.numel() ** 0.5 if q == "none" else error)


@pairs
def test_only_what_is_declared_trains(method: str, quantization: str) -> None:
    model = built(method, quantization)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    declared = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert declared
    parts = [part for part in model.modules() if isinstance(part, AdapterPart)]
    assert all(parameter.requires_grad for part in parts for parameter in part.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first step moves B only, for its gradient alone is not zero
        backward(model, [BATCH])
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # A bias of keys moves all scores of a query alike, which softmax does not see.
    unseen = {name for name in declared - changed if "k_proj" in name and name.endswith("bias")}
    assert changed | unseen == declared
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in declared)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.slow
@pairs
def test_it_learns(method: str, quantization: str) -> None:
    model = built(method, quantization).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        losses.append(backward(model, [BATCH]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pairs
@dtypes
def test_what_trains_is_kept_in_the_dtype_it_needs(method: str, quantization: str, dtype: torch.dtype) -> None:
    """Fp32 for what an adapter is made of; weights of the model in the dtype it computes in."""
    model = trained(built(method, quantization, dtype))
    wanted = torch.float32 if has_adapter(model) else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
    assert model(TOKENS).dtype == dtype


@pairs
def test_merged_is_unmerged(method: str, quantization: str) -> None:
    model = trained(built(method, quantization))
    before, merged = logits(model), plain_model(model, torch.float32)
    assert all(isinstance(slot.module, nn.Linear) for slot in merged.linears())
    assert not has_adapter(merged)
    assert (logits(merged) - before).abs().max() <= MOVED[torch.float32]
    assert torch.equal(logits(model), before)


@pairs
def test_a_run_that_is_built_again_goes_on_from_what_trained(method: str, quantization: str) -> None:
    """What a checkpoint holds, over a base made anew, is the same model to the bit; and so is the next step."""
    model = trained(built(method, quantization))
    again = built(method, quantization, seed=99)
    put_weights({name: tensor.clone() for name, tensor in trainable(model).items()}, again, Path("checkpoint"))
    assert torch.equal(logits(again), logits(model))
    after, later = trainable(trained(model, 1)), trainable(trained(again, 1))
    assert all(torch.equal(later[name], tensor) for name, tensor in after.items())


ADAPTERS = [(m, q) for m, q in PAIRS if m not in ("full", "last_layers")]


@over(ADAPTERS)
def test_a_saved_adapter_is_loaded_as_it_was_and_goes_on(method: str, quantization: str, tmp_path: Path) -> None:
    model = trained(built(method, quantization))
    save_adapter(model, tmp_path / "one", base=None, extra={})
    peft = FromAdapter("adapter", str(tmp_path / "one"))
    again = base_of(instantiate(chosen(method, quantization).quantization), peft=peft)
    peft.adapt(again)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again).keys() == trainable(model).keys()
    after, later = trainable(trained(model, 1)), trainable(trained(again, 1))
    assert all(torch.equal(later[name], tensor) for name, tensor in after.items())


def test_members_that_leave_a_model_are_those_that_train_its_weights() -> None:
    for method, quantization in PAIRS:
        target = yaml.safe_load((conf_dir() / "peft" / f"{method}.yaml").read_text()).get("_target_", "")
        leaves_a_model = not has_adapter(built(method, quantization))
        assert leaves_a_model is target.startswith(("tuner.peft.full.", "tuner.peft.last_layers."))
