"""Tokens that a model learns, against transformers' `resize_token_embeddings` and PEFT's `trainable_token_indices`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tuner
from tests.merging import plain_model
from tuner.errors import ModelError
from tuner.loop import backward
from tuner.models.decoder import Decoder
from tuner.models.linear import Linear
from tuner.models.new_rows import add_rows
from tuner.peft.adapter import FromAdapter
from tuner.peft.adapter_folder import load_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.peft.lora import LoRA
from tuner.peft.token_rows import row_layers
from tuner.results import save_model
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Batch

V = 131
SPARE_AND_BEYOND = [129, 130, 131, 132, 133]  # two rows that the matrices have, three that they get
FP32_LOGITS = 1e-4  # of logits up to 20, as in test_adapters_equal_peft
FAMILIES = [
    pytest.param(family, {"tie_word_embeddings": tied, **keys}, id=f"{family}, {'tied' if tied else 'untied'}")
    for family, tied, keys in (
        ("llama", True, {}),
        ("llama", False, {}),
        ("gemma", True, {"head_dim": 8}),  # embeddings are scaled
        ("gemma2", True, {"head_dim": 8}),  # logits are capped
        ("phi3", False, {}),  # matrices of checkpoints are joined
        ("qwen2", False, {}),
    )
]

Folder = Callable[..., Path]
Reference = Callable[..., Any]
Padded = Callable[..., tuple[Batch, Tensor]]


def base_of(folder: Path, tokens: list[int]) -> Decoder:
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
    add_rows(model, tokens)
    return model


def learning(folder: Path, tokens: list[int] = SPARE_AND_BEYOND) -> Decoder:
    """A model with an adapter and new rows as after some training."""
    model = base_of(folder, tokens)
    torch.manual_seed(7)
    lora().adapt(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.3 if name.endswith("rows") else 0.1) * torch.randn_like(parameter))
    return model.eval()


def lora() -> LoRA:
    return LoRA("lora", 4, 10.0, 0.0, ["q_proj", "v_proj"], True, False, False)


def resized(reference: Reference, folder: Path, size: int) -> Any:
    model = reference(folder)
    with warnings.catch_warnings(action="ignore"):
        model.resize_token_embeddings(size)
    return model


def in_peft(reference: Reference, folder: Path, adapter: Path, size: int, *, trained: bool = False) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(resized(reference, folder, size), adapter, is_trainable=trained).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def texts(padded: Padded, size: int = V + 3) -> Tensor:
    """Tokens [4, 33], every fifth of them a new one."""
    tokens = padded(size)[0].tokens.clone()
    tokens[:, ::5] = torch.tensor(SPARE_AND_BEYOND).repeat(4, 2)[:, : tokens[:, ::5].shape[1]]
    return tokens


@pytest.mark.parametrize(("family", "shape"), FAMILIES)
def test_new_rows_are_what_transformers_draws_around(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference
) -> None:
    folder = family_folder(family, **shape)
    ours, theirs = base_of(folder, [V, V + 1]), resized(reference, folder, V + 2)
    assert ours.vocab_size == ours.config.vocab_size == theirs.config.vocab_size == V + 2
    pairs = ((ours.model.embed_tokens, theirs.get_input_embeddings()), (ours.lm_head, theirs.get_output_embeddings()))
    for mine, other in pairs:
        assert mine.weight.shape == other.weight.shape
        assert torch.equal(mine.weight[:V], other.weight[:V])
        deviation = other.weight[:V].std(dim=0).max() * 1e-9**0.5  # it draws with the covariance times 1e-9
        assert (mine.weight[V:] - other.weight[V:]).abs().max() < 6 * deviation
        assert torch.equal(mine.weight[V], mine.weight[:V].mean(dim=0))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is shape["tie_word_embeddings"]


def test_spare_rows_are_used_first_and_start_as_the_mean_too(llama_folder: Folder) -> None:
    folder = llama_folder(tie_word_embeddings=False)
    before, after = base_of(folder, []), base_of(folder, [129, 130])
    assert after.vocab_size == V
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before.get_parameter(name), after.get_parameter(name)
        assert torch.equal(new[:129], old[:129])
        assert torch.equal(new[129:], old.mean(dim=0).expand(2, -1))


@pytest.mark.parametrize(("family", "shape"), FAMILIES)
def test_our_adapter_loads_in_peft(
    family: str,
    shape: dict[str, Any],
    family_folder: Folder,
    reference: Reference,
    padded: Padded,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    folder = family_folder(family, **shape)
    ours = learning(folder)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    tokens = texts(padded)
    theirs = in_peft(reference, folder, tmp_path, V + 3)
    assert not [w for w in recwarn if "adapter" in str(w.message) or "missing" in str(w.message)]
    expected = logits(theirs, tokens)
    assert expected.shape == (*tokens.shape, V + 3)
    assert (logits(ours, tokens) - expected).abs().max() <= FP32_LOGITS
    assert (logits(resized(reference, folder, V + 3), tokens) - expected).abs().max() > 0.1
    # A base of which transformers has cut off what is beyond the tokenizer's tokens is one that works as well
    again = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
    assert torch.equal(logits(again, tokens), logits(ours, tokens))


@pytest.mark.parametrize(("family", "shape"), FAMILIES)
def test_both_train_alike(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    folder = family_folder(family, **shape)
    ours = learning(folder)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    batch, mask = padded(V + 3)
    tokens = texts(padded)
    labels = torch.where(batch.labels >= 0, tokens, batch.labels)
    loss = backward(ours.train(), [Batch(tokens, labels, batch.lengths)])
    theirs = in_peft(reference, folder, tmp_path, V + 3, trained=True)
    expected = theirs(tokens, attention_mask=mask.long(), labels=labels).loss
    expected.backward()
    assert abs(loss - float(expected.detach())) <= 1e-5
    found = {name: p.grad for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name}
    assert len(found) == (1 if shape["tie_word_embeddings"] else 2)
    layers = dict(row_layers(ours))
    assert len(layers) == len(found)
    for path, layer in layers.items():
        gradient = found[f"base_model.model.{path}.token_adapter.trainable_tokens_delta.default"]
        assert layer.rows.grad is not None
        assert gradient.abs().max() > 1e-4
        assert torch.allclose(layer.rows.grad, gradient, atol=1e-5, rtol=1e-3)
    a_matrix = next(
        p.grad for name, p in theirs.named_parameters() if name.endswith("0.mlp.down_proj.lora_A.default.weight")
    )
    mine = ours.get_parameter("model.layers.0.mlp.down_proj.adapters.default.A").grad
    assert mine is not None
    assert torch.allclose(mine, a_matrix, atol=1e-5, rtol=1e-3)


def made_by_peft(reference: Reference, folder: Path, adapter: Path, size: int, **settings: Any) -> Any:
    """An adapter that PEFT made on a base of `size` rows and saved."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **settings)
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(resized(reference, folder, size), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(adapter)
    return model.eval()


THEIRS = {
    "tied, new rows": (True, V + 3, [133, 131, 132]),
    "tied, new rows and padding": (True, V + 13, [131, 132]),
    "tied, rows there were": (True, V, [3, 130, 17]),
    "untied, both": (False, V + 2, {"embed_tokens": [132, 131], "lm_head": [131, 132]}),
    "untied, the embedding's alone": (False, V + 2, [131, 132]),
    "untied, other tokens": (False, V, {"embed_tokens": [5], "lm_head": [7, 9]}),
    "tied, named twice": (True, V + 1, {"embed_tokens": [131], "lm_head": [131]}),
}


@pytest.mark.parametrize(("tied", "size", "tokens"), THEIRS.values(), ids=THEIRS)
def test_an_adapter_of_peft_loads_here(
    tied: bool, size: int, tokens: Any, llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    folder = llama_folder(tie_word_embeddings=tied)
    theirs = made_by_peft(reference, folder, tmp_path / "theirs", size, trainable_token_indices=tokens)
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path / "theirs")
    inputs = padded(size)[0].tokens
    expected = logits(theirs, inputs)
    assert (logits(ours, inputs) - expected).abs().max() <= FP32_LOGITS
    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    again = in_peft(reference, folder, tmp_path / "again", size)
    difference = (logits(again, inputs) - expected).abs()
    assert difference[..., : V + 3].max() <= FP32_LOGITS
    ours = plain_model(ours, torch.float32)
    assert (logits(ours, inputs) - expected).abs().max() <= FP32_LOGITS


def test_a_merged_model_loads_in_transformers(
    llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    for tied in (True, False):
        folder = llama_folder(tie_word_embeddings=tied)
        ours = learning(folder)
        tokens = texts(padded)
        expected = logits(ours, tokens)
        plain = plain_model(ours, torch.float32)
        assert type(plain.model.embed_tokens) is nn.Embedding
        assert type(plain.lm_head) in (nn.Linear, Linear)
        write_tiny_tokenizer(tmp_path / "tokenizer")
        save_model(ours, load_tokenizer(tmp_path / "tokenizer"), tmp_path / f"merged {tied}")
        theirs = reference(tmp_path / f"merged {tied}")
        assert theirs.config.vocab_size == V + 3
        assert theirs.config.tie_word_embeddings is tied
        assert (logits(theirs, tokens) - expected).abs().max() <= FP32_LOGITS


def test_an_adapter_is_trained_further_as_it_is(llama_folder: Folder, padded: Padded, tmp_path: Path) -> None:
    folder = llama_folder(tie_word_embeddings=False)
    first = learning(folder)
    save_adapter(first, tmp_path, base=str(folder), extra={})
    second = base_of(folder, list(range(V, V + 3)))
    FromAdapter("adapter", str(tmp_path)).adapt(second)
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in first.named_parameters() if p.requires_grad}
    assert {"model.embed_tokens.rows", "lm_head.rows"} <= trained
    assert torch.equal(logits(second, texts(padded)), logits(first, texts(padded)))


def broken(adapter: Path, **changed: Any) -> None:
    """Change settings of an adapter, or (names with a dot) its tensors."""
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, **{k: v for k, v in changed.items() if k != "tensors"}}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed_tensors = {f"base_model.model.{name}": tensor for name, tensor in changed.get("tensors", {}).items()}
    kept = {name: tensor for name, tensor in {**tensors, **changed_tensors}.items() if tensor is not None}
    save_file(kept, adapter / "adapter_model.safetensors")


ROWS = "token_adapter.trainable_tokens_delta"
BROKEN: dict[str, tuple[bool, dict[str, Any], str]] = {
    "no row": (True, {"tensors": {f"model.embed_tokens.{ROWS}": None}}, f"model.embed_tokens.{ROWS} is missing"),
    "not named": (False, {"trainable_token_indices": {"embed_tokens": SPARE_AND_BEYOND}}, f"lm_head.{ROWS} is there"),
    "other count": (True, {"trainable_token_indices": [131, 132]}, f"model.embed_tokens.{ROWS} is [5, 48]"),
    "other width": (
        True,
        {"tensors": {f"model.embed_tokens.{ROWS}": torch.zeros(5, 7)}},
        f"model.embed_tokens.{ROWS} is [5, 7] and should be [5, 48]",
    ),
    "other base": (
        True,
        {"tensors": {"model.embed_tokens.token_adapter.base_layer.weight": torch.zeros(134, 48)}},
        "the whole model.embed_tokens has other rows than the base",
    ),
    "other tokens in one matrix": (
        True,
        {"trainable_token_indices": {"embed_tokens": SPARE_AND_BEYOND, "lm_head": [1]}},
        "names other tokens for lm_head",
    ),
    "another module": (True, {"trainable_token_indices": {"q_proj": [1]}}, "valid: embed_tokens, lm_head"),
    "no numbers": (True, {"trainable_token_indices": ["a"]}, "expected lists of whole numbers"),
    "twice": (True, {"trainable_token_indices": [4, 4]}, "names a token twice"),
    "matrix of more rows": (
        True,
        {"tensors": {"lm_head.token_adapter.base_layer.weight": torch.zeros(140, 48)}},
        "the whole lm_head is [140, 48], and the matrix of the model is [134, 48]",
    ),
    "the whole module too": (True, {"modules_to_save": ["embed_tokens"]}, "together with trainable_token_indices"),
}


@pytest.mark.parametrize(("tied", "changed", "said"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_named(
    tied: bool, changed: dict[str, Any], said: str, llama_folder: Folder, tmp_path: Path
) -> None:
    folder = llama_folder(tie_word_embeddings=tied)
    save_adapter(learning(folder), tmp_path, base=str(folder), extra={})
    broken(tmp_path, **changed)
    with pytest.raises(ModelError) as error:
        load_adapter(base_of(folder, [131, 132, 133]), tmp_path)
    assert said in str(error.value)


def test_a_base_that_has_not_grown(llama_folder: Folder, tmp_path: Path) -> None:
    folder = llama_folder(tie_word_embeddings=True)
    save_adapter(learning(folder), tmp_path, base=str(folder), extra={})
    with pytest.raises(ModelError, match=r"model\.embed_tokens has no row for token 133: the model has 131"):
        load_adapter(base_of(folder, []), tmp_path)
