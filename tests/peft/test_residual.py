"""PiSSA and OLoRA: what they begin with, what they leave, and that it can be made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.build import count_from_config, load_base
from tuner.errors import ModelError
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.peft.adapted import adapted_layers
from tuner.peft.adapter import FromAdapter
from tuner.peft.adapter_folder import load_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.peft.olora import OLoRA
from tuner.peft.pissa import PiSSA, principal_components
from tuner.peft.residual import OverResidual
from tuner.quantization.nf4 import NF4
from tuner.quantization.none import NoQuantization

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
CONFIG = LlamaConfig.from_hugging_face(SHAPE, None)
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
TOKENS = torch.arange(30)[None]


def pissa(iterations: int | None = 16, output: bool = False) -> PiSSA:
    return PiSSA("pissa", 8, 12, 0.0, ATTENTION, True, output, False, iterations)  # type: ignore[arg-type]


def olora(output: bool = False) -> OLoRA:
    return OLoRA("olora", 8, 12, 0.0, ATTENTION, True, output, True)  # type: ignore[arg-type]


METHODS = {"pissa": pissa, "pissa, exact": lambda output=False: pissa(None, output), "olora": olora}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def loaded(peft: Any, quantization: Any = NoQuantization(), dtype: torch.dtype = torch.float32) -> Decoder:  # noqa: B008
    model = load_base(CONFIG, dtype, torch.device("cpu"), 3, quantization, peft=peft)
    if peft is not None:
        peft.adapt(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(TOKENS)
    assert isinstance(out, Tensor)
    return out


def spectrum(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.double())


def test_pissa_takes_the_largest_singular_values_and_leaves_the_others() -> None:
    model, plain = loaded(pissa(None)), loaded(None)
    for path, layer in adapted_layers(model):
        whole = spectrum(plain.get_submodule(path).weight)  # type: ignore[arg-type]
        adapter: Any = layer.adapters["default"]  # type: ignore[union-attr, index]
        assert torch.allclose(spectrum(adapter.delta())[:8], whole[:8], rtol=1e-4)
        assert torch.allclose(spectrum(layer.base.weight)[:-8], whole[8:], rtol=1e-3, atol=1e-5)
        assert torch.allclose(adapter.A.norm(dim=1), adapter.B.norm(dim=0), rtol=1e-4)  # the roots are shared


@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (30, 9)])
def test_iterations_come_to_the_exact_components(shape: tuple[int, int]) -> None:
    """Of a spectrum that falls by a tenth at each value, 16 iterations leave 0.9^(8 x 33) of the directions beyond."""
    torch.manual_seed(0)
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, size)).Q for side in shape)
    weight = left * 0.9 ** torch.arange(size) @ right.t()
    (U, S, Vt), (u, s, vt) = (principal_components(weight, 8, iterations) for iterations in (None, 16))
    assert (u.shape, s.shape, vt.shape) == (U.shape, S.shape, Vt.shape) == ((shape[0], 8), (8,), (8, shape[1]))
    assert torch.allclose(s, S, rtol=1e-4)
    assert torch.allclose(u * s @ vt, U * S @ Vt, atol=1e-4)


def test_olora_begins_with_orthonormal_columns() -> None:
    for _, layer in adapted_layers(loaded(olora())):
        adapter: Any = layer.adapters["default"]  # type: ignore[union-attr, index]
        assert torch.allclose(adapter.B.t() @ adapter.B, torch.eye(8), atol=1e-5)


@methods
@pytest.mark.parametrize("output", [False, True])
def test_it_starts_as_the_model_was(method: Any, output: bool) -> None:
    plain = loaded(None)
    model = loaded(method(output=output))
    assert len(list(adapted_layers(model))) == 14 + output
    assert (logits(model) - logits(plain)).abs().max() <= 1e-5  # of logits up to 2; fp32
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if ".base." in name)


def test_over_nf4_the_error_is_smaller_than_without_it() -> None:
    """What the method is for: the residual is rounded, which is the smaller part where a spectrum falls."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 64)).Q for side in (128, 64))
    weight = left * 0.8 ** torch.arange(64) @ right.t()
    linear = nn.Linear(64, 128, bias=False)
    linear.weight.data = weight.clone()
    without = NF4(64, double_quant=True).packed(linear).dense_weight() - weight
    A, B = pissa().factors(weight)
    linear.weight.data = weight - 1.5 * B @ A
    with_it = NF4(64, double_quant=True).packed(linear).dense_weight() + 1.5 * B @ A - weight
    assert with_it.norm() < 0.4 * without.norm()


@methods
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_saved_adapter_has_its_residual_made_again_to_the_bit(
    method: Any, nf4: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    quantization = NF4(64, double_quant=True) if nf4 else NoQuantization()
    model = loaded(method(output=True), quantization, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_adapter(model, tmp_path, base=None, extra={})
    assert json.loads((tmp_path / "tuner.json").read_text()) == {"over_residual": 12}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
    again = loaded(FromAdapter("adapter", str(tmp_path)), quantization, dtype)
    assert torch.equal(logits(again), logits(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in again.parameters() if p.requires_grad)
    assert count_from_config(CONFIG, quantization, FromAdapter("adapter", str(tmp_path)), tmp_path)[1] == trained


def test_on_a_base_that_is_quantized_already_it_is_the_difference(tmp_path: Path) -> None:
    """Where the weights before quantization are gone, the adapter is what PEFT reads: a LoRA of twice the rank."""
    model = loaded(pissa(), NF4(64, double_quant=True))
    save_adapter(model, tmp_path, base=None, extra={})
    other = loaded(None, NF4(64, double_quant=True))
    plain = logits(other)
    load_adapter(other, tmp_path)
    assert {layer.adapters["default"].rank for _, layer in adapted_layers(other)} == {16}  # type: ignore[union-attr, index]
    assert (logits(other) - plain).abs().max() <= 1e-5  # it has not trained, so the difference is none
    with pytest.raises(ModelError, match=r"peft=pissa: model.layers.0.self_attn.q_proj is quantized already"):
        pissa().adapt(loaded(None, NF4(64, double_quant=True)))


def test_a_rank_that_is_no_double_is_refused(tmp_path: Path) -> None:
    save_adapter(loaded(pissa()), tmp_path, base=None, extra={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    cut = {name: (t[:15] if "lora_A" in name else t[:, :15]).contiguous() for name, t in tensors.items()}
    save_file(cut, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 15}))
    with pytest.raises(ModelError, match=r"tuner.json says over_residual, and rank 15 is no double of one"):
        load_adapter(loaded(None), tmp_path)
    (tmp_path / "tuner.json").write_text("{")
    with pytest.raises(ModelError, match=r"tuner\.json: not JSON"):
        load_adapter(loaded(None), tmp_path)


DIGEST = """
import hashlib, sys, torch
torch.set_num_threads(2)
from tuner.peft.olora import OLoRA
from tuner.peft.pissa import PiSSA
keys = (16, 16, 0.0, [], True, False, False)
weight = torch.randn(576, 300, generator=torch.Generator().manual_seed(1))
for peft in (PiSSA("pissa", *keys, None), PiSSA("pissa", *keys, 16), OLoRA("olora", *keys)):
    print(hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in peft.factors(weight))).hexdigest())
"""


@pytest.mark.slow
def test_another_process_finds_the_same_bits() -> None:
    """Which a resumed run relies on."""
    found = [subprocess.check_output([sys.executable, "-c", DIGEST], text=True).split() for _ in range(2)]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_a_method_says_what_it_takes() -> None:
    with pytest.raises(NotImplementedError):
        OverResidual("lora", 8, 12, 0.0, ATTENTION, True, False, False).factors(torch.zeros(3, 3))
