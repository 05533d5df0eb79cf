"""Methods that train weights of the model itself: norms and biases, or the last blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tuner
from tests.merging import plain_model
from tuner.build import build_model, load_base
from tuner.errors import ModelError
from tuner.loop import backward
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES
from tuner.models.llama import LlamaConfig
from tuner.models.qwen3 import Qwen3Config
from tuner.peft.ia3 import IA3
from tuner.peft.last_layers import LastLayers
from tuner.peft.layernorm import LayerNorm
from tuner.quantization.nf4 import NF4
from tuner.results import Kept, save_results
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Batch, Precision

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
BATCH = Batch(TOKENS, TOKENS)
FP32, BF16 = Precision("fp32", "float32"), Precision("bf16", "bfloat16")


def base(family: Any = LlamaConfig, dtype: torch.dtype = torch.float32, new: Any = (), **changed: Any) -> Decoder:
    return load_base(family.from_hugging_face({**SHAPE, **changed}, None), dtype, CPU, 3, new_tokens=new)


def ready(model: Decoder, peft: Any, precision: Precision = FP32) -> Decoder:
    return build_model(model, peft, precision, MemoryTechniques("none", False, False, False))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(TOKENS)
    assert isinstance(out, Tensor)
    return out


def test_every_norm_trains_and_nothing_else_where_there_are_no_biases() -> None:
    for biases in (True, False):
        model = ready(base(), LayerNorm("layernorm", biases))
        assert len(trained(model)) == 2 * 3 + 1
        assert all(name.endswith("norm.weight") for name in trained(model))
    of_heads = trained(ready(base(Qwen3Config, head_dim=8), LayerNorm("layernorm", True)))
    assert {name.split(".")[-2] for name in of_heads} >= {"q_norm", "k_norm", "input_layernorm", "norm"}
    assert len(of_heads) == 4 * 3 + 1


@pytest.mark.parametrize("quantized", [False, True])
def test_biases_train_where_they_are_asked_for(quantized: bool) -> None:
    def fresh() -> Decoder:
        model = base(attention_bias=True)
        if quantized:
            NF4(64, double_quant=True).quantize(model)
        return model

    without, with_them = (ready(fresh(), LayerNorm("layernorm", biases)) for biases in (False, True))
    added = trained(with_them) - trained(without)
    assert len(added) == 4 * 3
    assert all(name.endswith("bias_part.bias") for name in added)
    backward(with_them, [BATCH])
    full = fresh().requires_grad_(False)
    for slot in full.linears():
        if slot.module.bias is not None:
            slot.module.bias.requires_grad_(not quantized)  # type: ignore[operator]
    if not quantized:
        backward(full, [BATCH])
        for slot in full.linears():
            if slot.module.bias is not None:
                mine = with_them.get_parameter(f"{slot.path}.bias_part.bias").grad
                assert torch.allclose(mine, slot.module.bias.grad, atol=1e-7)  # type: ignore[arg-type, union-attr]


def test_in_bf16_norms_are_kept_in_fp32_and_learn_what_bf16_would_lose() -> None:
    """1 + 2⁻¹² is 1 in bf16."""
    model = ready(base(dtype=torch.bfloat16), LayerNorm("layernorm", True), BF16)
    norm = model.model.norm
    assert norm.weight.dtype == torch.float32
    before = logits(model)
    norm.weight.data += 2.0**-12
    assert norm.weight.data[0] != 1.0
    assert before.dtype == logits(model).dtype == torch.bfloat16
    backward(model, [BATCH])
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32
    assert {p.dtype for p in plain_model(model, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("peft", [LayerNorm("layernorm", True), IA3("ia3", ["k_proj"], True)])
def test_an_adapter_without_a_place_for_rows_refuses_new_tokens(peft: Any) -> None:
    with pytest.raises(ModelError, match="has no place for the rows of"):
        peft.adapt(base(new=[61]))


def test_ia3_refuses_to_scale_nothing() -> None:
    with pytest.raises(ModelError, match="matches no layer"):
        IA3("ia3", [], False).adapt(base())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("norm", "output"), [(True, False), (False, False), (False, True), (True, True)])
def test_the_last_blocks_train_with_what_is_asked_for(norm: bool, output: bool, tied: bool) -> None:
    model = ready(base(tie_word_embeddings=tied), LastLayers("last_layers", 2, norm, output))
    names = trained(model)
    blocks = {name for name in names if name.startswith(("model.layers.1.", "model.layers.2."))}
    assert len(blocks) == 2 * 9
    head = {"model.embed_tokens.weight" if tied else "lm_head.weight"}  # one matrix has one name
    assert names - blocks == ({"model.norm.weight"} if norm else set()) | (head if output else set())


def test_no_gradient_goes_further_than_the_first_block_that_trains() -> None:
    model = ready(base(), LastLayers("last_layers", 1, True, False))
    seen: list[bool] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    backward(model, [BATCH])
    assert seen == [False, False, True]


def test_gradients_are_those_of_full_training() -> None:
    part, whole = ready(base(), LastLayers("last_layers", 2, True, True)), base().requires_grad_(True).train()
    assert backward(part, [BATCH]) == backward(whole, [BATCH])
    for name in trained(part):
        assert torch.equal(part.get_parameter(name).grad, whole.get_parameter(name).grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_leaves_a_model_with_the_tokens_that_it_learnt(output: bool, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = ready(base(new=[61, 62], tie_word_embeddings=tied), LastLayers("last_layers", 1, True, output))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tokens = torch.randint(0, 63, (3, 60), generator=torch.Generator().manual_seed(1))
    backward(model, [Batch(tokens, tokens)])
    optimizer.step()
    embeddings = model.model.embed_tokens.weight if output and tied else model.get_parameter("model.embed_tokens.rows")
    assert embeddings.requires_grad
    expected = model.eval()(tokens).detach()
    write_tiny_tokenizer(tmp_path / "tokenizer")
    kept = Kept(adapter=False, merged=True)
    save_results(model, load_tokenizer(tmp_path / "tokenizer"), tmp_path, kept, facts={}, run=tmp_path)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(tokens).logits
        ours = tuner.load_model(tmp_path / "model", dtype=torch.float32)(tokens)
    assert torch.equal(ours, expected)
    assert (theirs - expected).abs().max() <= 1e-4  # of logits up to 10; fp32
    after = model.state_dict()
    assert (after["model.embed_tokens.weight"][61:] != before["model.embed_tokens.weight"][61:]).any()
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_more_blocks_than_there_are_and_packed_ones_are_refused() -> None:
    with pytest.raises(ModelError, match=r"peft.num_layers=4: the model has 3 blocks"):
        LastLayers("last_layers", 4, True, False).adapt(base())
    quantized = base()
    NF4(64, double_quant=True).quantize(quantized)
    with pytest.raises(ModelError, match="packed weights do not train"):
        LastLayers("last_layers", 1, True, False).adapt(quantized)


def test_families_name_their_norms_as_norms() -> None:
    """What `LayerNorm` takes for norms is each vector of a weight that transformers counts as one."""
    for family in FAMILIES:
        words = [f"model={family}", "model.num_hidden_layers=2"] if family != "llama" else ["model=tiny"]
        with torch.device("meta"):
            from hydra.utils import instantiate

            model = instantiate(tuner.compose(words).model).build()
        LayerNorm("layernorm", False).adapt(model)
        assert trained(model) == {name for name, _ in model.named_parameters() if name.endswith("norm.weight")}
