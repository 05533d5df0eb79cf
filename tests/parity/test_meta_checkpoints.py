"""Meta's checkpoints, converted: the weights of transformers' model they were laid out from, to the bit."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import tuner
from tuner.__main__ import dispatch
from tuner.errors import ModelError
from tuner.models.family import config_of_folder

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3_LINES = 100_100
"""More tokens than a Llama before 3 has; the embedding has some hundred rows more for special ones."""

NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
Folder = Callable[..., Path]
Reference = Callable[..., Any]


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Hugging Face's order of rows to Meta's."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def sliced(weight: Tensor, rank: int, ranks: int, dimension: int | None) -> Tensor:
    return weight if dimension is None else weight.chunk(ranks, dimension)[rank].clone()


def laid_out(folder: Path, rank: int, ranks: int, embedding_dimension: int) -> dict[str, Tensor]:
    """What a rank's file holds."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    file: dict[str, Tensor] = {}
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, weight in tensors.items():
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            meta, dimension = NAMES[part]
            last = part.split(".")[-1]
            weight = permuted(weight, heads[last]) if last in heads else weight
            file[f"layers.{layer}.{meta}.weight"] = sliced(weight, rank, ranks, dimension)
    file["norm.weight"] = tensors["model.norm.weight"]
    file["output.weight"] = sliced(tensors["lm_head.weight"], rank, ranks, 0)
    file["tok_embeddings.weight"] = sliced(tensors["model.embed_tokens.weight"], rank, ranks, embedding_dimension)
    file["rope.freqs"] = torch.ones(8)
    return file


def write_meta(folder: Path, target: Path, ranks: int = 1, embedding_dimension: int = 1, **params: Any) -> Path:
    """A folder of Meta's, with a tokenizer that was written before."""
    config = json.loads((folder / "config.json").read_text())
    target.mkdir(exist_ok=True)
    base = {
        **{"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "multiple_of": 256},
        **{"n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"]},
        **{"norm_eps": config["rms_norm_eps"], "vocab_size": -1},
    }
    (target / "params.json").write_text(json.dumps({**base, **params}))
    for rank in range(ranks):
        torch.save(laid_out(folder, rank, ranks, embedding_dimension), target / f"consolidated.{rank:02d}.pth")
    return target


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    words = iter(["the small words of a tokenizer", "and some other words"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(prefix), vocab_size=30, model_type="bpe", minloglevel=2
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokens = [*(bytes([byte]) for byte in range(256)), *(str(rank).encode() for rank in range(256, LLAMA3_LINES))]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    file.write_text("\n".join(lines) + "\n")
    return file


def convert(source: Path, dest: Path, *words: str) -> str:
    return str(dispatch(["convert", f"source={source}", f"dest={dest}", *words]))


def assert_same(folder: Path, dest: Path, reference: Reference) -> None:
    """Weights to the bit, and logits by both implementations."""
    expected, found = load_file(folder / "model.safetensors"), load_file(dest / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokens = torch.randint(0, 131, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = reference(folder)(tokens).logits
        assert torch.equal(reference(dest)(tokens).logits, logits)
        assert (tuner.load_model(dest, dtype=torch.float32)(tokens) - logits).abs().max() <= 1e-4


def assert_same_tokenizer(dest: Path, id_: int, token: str) -> None:
    """By both implementations, and with the special token that the model has."""
    ours, theirs = tuner.load_tokenizer(dest), AutoTokenizer.from_pretrained(dest)
    text = f"some other words{token} of a tokenizer"
    ids = ours.encode(text, control_tokens=True)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ids.count(id_) == 1
    assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("heads", [2, 4])
def test_llama_2(
    ranks: int, heads: int, family_folder: Folder, reference: Reference, sentencepiece_file: Path, tmp_path: Path
) -> None:
    """The tokenizer lies beside the folder of the weights, as Meta's download puts it."""
    folder = family_folder("llama", **{**SHAPE, "num_key_value_heads": heads, "max_position_embeddings": 4096})
    source = write_meta(folder, tmp_path / "llama-2", ranks)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    if heads == 4:  # the smaller ones do not say it
        params = json.loads((source / "params.json").read_text())
        del params["n_kv_heads"]
        (source / "params.json").write_text(json.dumps(params))
    assert "source: Meta checkpoint, model_type=llama" in convert(source, tmp_path / "dest")
    assert_same(folder, tmp_path / "dest", reference)
    written = json.loads((tmp_path / "dest/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["dtype"]) == (1, 2, "float32")
    ours, theirs = config_of_folder(tmp_path / "dest"), config_of_folder(folder)
    assert ours.to_hugging_face() == theirs.to_hugging_face()
    assert (tmp_path / "dest/tokenizer.model").read_bytes() == sentencepiece_file.read_bytes()
    assert_same_tokenizer(tmp_path / "dest", 2, "</s>")


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, tuple[dict[str, Any], bool, dict[str, Any], int]] = {
    "3": ({}, False, {"rope_type": "default"}, 8192),
    "3.1": ({"use_scaled_rope": True}, False, {**LLAMA3, "factor": 8.0}, 131072),
    "3.2": ({"use_scaled_rope": True}, True, {**LLAMA3, "factor": 32.0}, 131072),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_3(
    kind: str, ranks: int, family_folder: Folder, reference: Reference, tiktoken_file: Path, tmp_path: Path
) -> None:
    params, tied, rope, context = KINDS[kind]
    first = {"original_max_position_embeddings": 8192} if tied or kind == "3.1" else {}
    shape = {**SHAPE, "vocab_size": LLAMA3_LINES + 156, "tie_word_embeddings": tied, "max_position_embeddings": context}
    folder = family_folder("llama", **shape, rope_parameters={**rope, **first, "rope_theta": 500000.0})
    source = write_meta(folder, tmp_path / "llama", ranks, embedding_dimension=0, rope_theta=500000.0, **params)
    (source / "tokenizer.model").write_bytes(tiktoken_file.read_bytes())
    convert(source, tmp_path / "dest")
    assert_same(folder, tmp_path / "dest", reference)
    assert config_of_folder(tmp_path / "dest").to_hugging_face() == config_of_folder(folder).to_hugging_face()
    written = json.loads((tmp_path / "dest/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (LLAMA3_LINES, LLAMA3_LINES + 1)
    assert (tmp_path / "dest/tokenizer.model").read_bytes() == tiktoken_file.read_bytes()
    assert_same_tokenizer(
        tmp_path / "dest", LLAMA3_LINES + (8 if params else 9), "<|eom_id|>" if params else "<|eot_id|>"
    )


@pytest.fixture
def source(family_folder: Folder, sentencepiece_file: Path, tmp_path: Path) -> Path:
    source = write_meta(family_folder("llama", **SHAPE), tmp_path / "meta", ranks=2)
    (source / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    return source


def test_the_checkpoints_dtype_is_kept_or_another_written(source: Path, tmp_path: Path) -> None:
    for file in source.glob("*.pth"):
        held = torch.load(file, weights_only=True)
        torch.save({name: tensor.bfloat16() for name, tensor in held.items()}, file)
    for said, dtype in (("auto", torch.bfloat16), ("fp16", torch.float16)):
        convert(source, tmp_path / said, f"dtype={said}")
        assert {tensor.dtype for tensor in load_file(tmp_path / said / "model.safetensors").values()} == {dtype}


def refusal(source: Path, tmp_path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "dest")
    assert not [path for path in tmp_path.iterdir() if "dest" in path.name]
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_rank_is_named(lost: int, source: Path, tmp_path: Path) -> None:
    (source / f"consolidated.0{lost}.pth").unlink()
    assert f"missing consolidated.0{lost}.pth" in refusal(source, tmp_path)


def test_no_weights_at_all(source: Path, tmp_path: Path) -> None:
    for file in source.glob("*.pth"):
        file.unlink()
    assert "missing consolidated.00.pth" in refusal(source, tmp_path)


def test_a_truncated_rank_is_named(source: Path, tmp_path: Path) -> None:
    torn = source / "consolidated.01.pth"
    torn.write_bytes(torn.read_bytes()[:-1000])
    assert f"{torn}: damaged or truncated" in refusal(source, tmp_path)


def test_a_pickle_that_would_run_code_is_refused(source: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"norm.weight": Code()}, source / "consolidated.01.pth")
    assert "refused: its pickle asks for" in refusal(source, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layers": 4}, "tensors of 2 files do not fit params.json: missing model.layers.3."),
        ({"dim": 128}, "missing consolidated.02.pth, consolidated.03.pth"),
        ({"dim": "64"}, "params.json: dim='64' is no number"),
        ({"dim": 48.5}, "params.json: dim=48.5 is no whole number > 0"),
        ({"dim": 0}, "params.json: dim=0 is no whole number > 0"),
        ({"n_kv_heads": "x"}, "params.json: n_kv_heads='x' is no whole number > 0"),
        ({"n_heads": 3}, "num_key_value_heads=2 does not divide num_attention_heads=3"),
        ({"moe": {"num_experts": 8}}, "params.json: moe is of no Llama 2 or 3; known: dim, "),
    ],
)
def test_parameters_that_are_not_those_of_the_weights(
    change: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**params, **change}))
    assert said in refusal(source, tmp_path)


def test_damaged_parameters_are_named(source: Path, tmp_path: Path) -> None:
    for content, said in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "lacks dim, n_layers, n_heads, norm_"),
    ):
        (source / "params.json").write_text(content)
        assert said in refusal(source, tmp_path)


def test_a_tensor_of_another_model_is_named(source: Path, tmp_path: Path) -> None:
    file = source / "consolidated.00.pth"
    torch.save({**torch.load(file, weights_only=True), "layers.0.feed_forward.w4.weight": torch.ones(2, 2)}, file)
    assert "Meta's tensor layers.0.feed_forward.w4.weight belongs to neither Llama 2 nor 3" in refusal(source, tmp_path)


def test_a_tokenizer_is_needed_and_is_one(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"\x00\x01 nothing")
    assert "neither a sentencepiece model nor a list of tokens for tiktoken" in refusal(source, tmp_path)
    (source / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model is empty" in refusal(source, tmp_path)
    (source / "tokenizer.model").unlink()
    assert "no tokenizer.model, neither there nor in the folder above" in refusal(source, tmp_path)
