"""Every method that leaves an adapter, of each family, against Hugging Face PEFT: files both ways, and gradients."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor, nn

import tuner
from tuner.build import UNQUANTIZED, load_base
from tuner.config import compose, conf_dir
from tuner.loop import backward
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES, config_of_folder
from tuner.peft.adapted import adapted_layers
from tuner.peft.adapter import FromAdapter
from tuner.peft.adapter_folder import has_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.quantization.nf4 import NF4
from tuner.results import save_model
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Batch

FP32_LOGITS = 2e-4  # of logits up to 30: sums in another order, norms of rows computed another way
LEAVES_A_MODEL = ("adapter", "full", "last_layers")
METHODS = sorted({path.stem for path in (conf_dir() / "peft").glob("*.yaml")} - {*LEAVES_A_MODEL})
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 9},
    "gemma": {"head_dim": 14, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 14, "sliding_window": 9, "tie_word_embeddings": True},
    "phi3": {"num_key_value_heads": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 14},
}
EVERY_DAY = ("llama", "phi3")
TOKENS = torch.randint(0, 131, (3, 30), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS, TOKENS)

Folder = Callable[..., Path]
Reference = Callable[..., Any]
families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in EVERY_DAY else pytest.mark.slow) for name in FAMILIES]
)


def adapted(folder: Path, *words: str, quantization: Any = UNQUANTIZED, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model as after some training with the method that `words` choose."""
    peft = instantiate(compose(["quantization=nf4", *words]).peft)  # which qlora wants and no other method minds
    model = load_base(config_of_folder(folder), dtype, torch.device("cpu"), 0, quantization, peft=peft)
    torch.manual_seed(11)
    peft.adapt(model)
    return moved(model).eval()


def moved(model: Any) -> Any:
    """Each thing that trains is moved by a tenth of what it is, or of what such a thing may be."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_peft(base: Any, adapter: Path) -> Any:
    """PEFT's model, and what it said of tensors: of a bias alone, that the weight beside it is the base's."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter).eval()
    said = [str(w.message) for w in caught if "adapter keys" in str(w.message) or "not match" in str(w.message)]
    missing = [name for line in said for name in line.partition("[")[2].rstrip("].").split(", ")]
    assert all(name.endswith("proj.ln_tuning_layers.default.weight'") for name in missing), said
    assert not any("unexpected" in line for line in said)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out = model(TOKENS)
    return (out if isinstance(out, Tensor) else out.logits).float()


def merged_folder(model: Decoder, folder: Path) -> Path:
    write_tiny_tokenizer(folder / "tokenizer")
    save_model(model, load_tokenizer(folder / "tokenizer"), folder / "merged")
    return folder / "merged"


def test_the_methods_are_found() -> None:
    assert set(METHODS) >= {"lora", "qlora", "rslora", "dora", "pissa", "olora", "ia3", "layernorm"}


@pytest.mark.slow
@families
@pytest.mark.parametrize("method", METHODS)
def test_ours_loads_in_peft_and_back_here_and_merged_in_transformers(
    method: str, family: str, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    folder = family_folder(family, **SHAPES.get(family, {}))
    ours = adapted(folder, f"peft={method}")
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    base = reference(folder)
    without = logits(base)
    theirs = with_peft(base, tmp_path)
    assert (logits(theirs) - without).abs().max() > 0.05  # the adapter says something
    assert (logits(theirs) - logits(ours)).abs().max() <= FP32_LOGITS
    again = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
    assert (logits(again) - logits(ours)).abs().max() <= FP32_LOGITS
    assert [path for path, _ in adapted_layers(again)] == [path for path, _ in adapted_layers(ours)]
    save_adapter(again, tmp_path / "again", base=str(folder), extra={})
    first, second = (load_file(one / "adapter_model.safetensors") for one in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    settings = [json.loads((one / "adapter_config.json").read_text()) for one in (tmp_path, tmp_path / "again")]
    assert settings[0] == settings[1]
    expected = logits(ours)
    assert (logits(reference(merged_folder(ours, tmp_path))) - expected).abs().max() <= FP32_LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_it_is_pefts_to_the_rounding_of_bf16(
    method: str, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    """Both are compared with fp32, from which ours is not further than theirs is, but for chance."""
    folder = family_folder("llama", **SHAPES["llama"])
    ours = adapted(folder, f"peft={method}", dtype=torch.bfloat16)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    exact = logits(with_peft(reference(folder), tmp_path))
    theirs = logits(with_peft(reference(folder, torch.bfloat16), tmp_path))
    assert (logits(ours) - exact).norm() <= 1.5 * (theirs - exact).norm()
    assert (theirs - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_over_nf4_it_is_one_of_the_dense_weights_it_saw(
    method: str, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    """Methods that leave the base as it is: PEFT gives the same on the weights made dense again. Those that change it
    are as far from it there as the quantized residual is from the residual."""
    folder = family_folder("llama", **SHAPES["llama"])
    ours = adapted(folder, f"peft={method}", quantization=NF4(64, True))
    save_adapter(ours, tmp_path / "adapter", base=str(folder), extra={})
    expected = logits(ours)
    if method in ("pissa", "olora"):
        exact = adapted(folder, f"peft={method}")
        theirs = logits(with_peft(reference(folder), tmp_path / "adapter"))
        assert (theirs - logits(exact)).abs().max() <= FP32_LOGITS
    else:
        dense = load_base(config_of_folder(folder), torch.float32, torch.device("cpu"), 0, NF4(64, True))
        theirs = logits(with_peft(reference(merged_folder(dense, tmp_path)), tmp_path / "adapter"))
        assert (theirs - expected).abs().max() <= FP32_LOGITS
    peft = FromAdapter("adapter", str(tmp_path / "adapter"))
    again = load_base(config_of_folder(folder), torch.float32, torch.device("cpu"), 0, NF4(64, True), peft=peft)
    peft.adapt(again)
    assert torch.equal(logits(again), expected)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PLAIN = ["dora", "pissa", "olora", "ia3", "layernorm"]
KINDS = [*PLAIN, "dora, patterns, rslora, a module", "ia3, a pattern, a module", "layernorm, some"]
"""The names of `configs`, which imports PEFT."""


def configs(family: str) -> dict[str, Any]:
    from peft import IA3Config, LNTuningConfig, LoraConfig

    phi3 = family == "phi3"
    targets = STACKED if phi3 else ALL
    keyed = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10, "target_modules": targets}
    attention = "qkv_proj" if phi3 else "k_proj"
    return {
        "dora": LoraConfig(**keyed, use_dora=True),
        "dora, patterns, rslora, a module": LoraConfig(
            **keyed, use_dora=True, use_rslora=True, rank_pattern={attention: 5}, modules_to_save=["norm"]
        ),
        "pissa": LoraConfig(**keyed, init_lora_weights="pissa"),
        "olora": LoraConfig(**keyed, init_lora_weights="olora"),
        "ia3": IA3Config(
            task_type="CAUSAL_LM", target_modules=[attention, "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ia3, a pattern, a module": IA3Config(
            task_type="CAUSAL_LM",
            target_modules=r".*layers\.[12]\..*(o_proj|down_proj)",
            feedforward_modules=r".*down_proj",
            modules_to_save=["lm_head"],
        ),
        "layernorm": LNTuningConfig(
            task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
        ),
        "layernorm, some": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["model.norm", "1.input_layernorm"]),
    }


def test_every_kind_is_met() -> None:
    assert set(KINDS) == set(configs("llama"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning", "ignore:.*tie_word_embeddings=True.*")
@families
@pytest.mark.parametrize("kind", KINDS)
def test_theirs_loads_here(kind: str, family: str, family_folder: Folder, reference: Reference, tmp_path: Path) -> None:
    from peft import get_peft_model

    folder = family_folder(family, **SHAPES.get(family, {}))
    torch.manual_seed(3)
    theirs = get_peft_model(reference(folder), configs(family)[kind])
    keys = {}
    if kind in ("pissa", "olora"):  # as PEFT converts them for the original base
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "first")
        keys = {"path_initial_model_for_weight_conversion": str(tmp_path / "first")}
    moved(theirs).eval().save_pretrained(tmp_path / "theirs", **keys)
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path / "theirs")
    assert isinstance(ours, Decoder)
    expected = logits(theirs)
    assert (logits(ours) - logits(reference(folder))).abs().max() > 0.05
    assert (logits(ours) - expected).abs().max() <= FP32_LOGITS
    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    assert (logits(with_peft(reference(folder), tmp_path / "again")) - expected).abs().max() <= FP32_LOGITS
    if family != "phi3":  # whose stacked matrices are adapted one by one here and get a rank for each
        saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
        assert saved.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    assert (logits(reference(merged_folder(ours, tmp_path))) - expected).abs().max() <= FP32_LOGITS


def stored_name(name: str) -> str:
    """PEFT's name of a parameter that trains -> the name it has in a file."""
    return name.replace(".default", "").removesuffix(".weight" if "magnitude" in name else "-")


@pytest.mark.parametrize("kind", PLAIN)
def test_both_train_alike(kind: str, family_folder: Folder, reference: Reference, tmp_path: Path) -> None:
    """From one adapter: the same loss and, for each tensor, the same gradient."""
    from peft import PeftModel, get_peft_model

    folder = family_folder("llama", **SHAPES["llama"])
    torch.manual_seed(3)
    config = configs("llama")[kind]
    if kind in ("pissa", "olora"):
        config.init_lora_weights = True  # the gradients of a LoRA, whatever it began with
    moved(get_peft_model(reference(folder), config)).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(reference(folder), tmp_path, is_trainable=True).eval()
    loss = theirs(TOKENS, labels=TOKENS).loss
    loss.backward()
    expected = {stored_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    ours = tuner.load_model(folder, dtype=torch.float32)
    FromAdapter("adapter", str(tmp_path)).adapt(ours)
    assert backward(ours, [BATCH]) == pytest.approx(loss.item(), rel=1e-5)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            parameter.data = parameter.grad  # saved in its place, it has the name that PEFT gives it
    save_adapter(ours, tmp_path / "gradients", base=None, extra={})
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_begins_as_pefts_does(kind: str, rslora: bool, family_folder: Folder, reference: Reference) -> None:
    """What is taken from each weight, and what is left of it; singular vectors have a sign of their own in each."""
    from peft import LoraConfig, get_peft_model

    folder = family_folder("llama", **SHAPES["llama"])
    keys = {"r": 4, "lora_alpha": 10, "use_rslora": rslora}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=ALL, init_lora_weights=kind, **keys)
    theirs = get_peft_model(reference(folder), config)
    more = ["peft.svd_iterations=null"] if kind == "pissa" else []
    words = [f"peft={kind}", "peft.lora_rank=4", "peft.lora_alpha=10", f"peft.use_rslora={rslora}", *more]
    peft = instantiate(compose(words).peft)
    ours = load_base(config_of_folder(folder), torch.float32, torch.device("cpu"), 0, UNQUANTIZED, peft=peft)
    peft.adapt(ours)
    layers = dict(adapted_layers(ours))
    assert len(layers) == 21
    for path, layer in layers.items():
        mine: Any = layer
        other = theirs.get_submodule(f"base_model.model.{path}")
        assert (mine.base.weight - other.base_layer.weight).abs().max() <= 1e-5, path  # of weights up to 0.6
        assert (mine.adapters["default"].delta() - other.get_delta_weight("default")).abs().max() <= 1e-5, path
    iterated = instantiate(compose([*words[:4], "peft.svd_iterations=16"] if more else words).peft)
    weight = nn.Linear(48, 80).weight.detach()
    taken = [scaled(one.factors(weight), one.scale) for one in (peft, iterated)]
    assert (taken[0] - taken[1]).norm() <= 0.02 * taken[0].norm()


def scaled(factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    A, B = factors
    return scale * (B @ A)


def test_a_model_without_any_of_it_is_none() -> None:
    assert not has_adapter(instantiate(compose(["model=tiny"]).model).build())
