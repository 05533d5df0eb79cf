"""Folders with a `tokenizer.model` and no `tokenizer.json`: ids, text and masks of transformers reading the same."""

from __future__ import annotations

import base64
import copy
import importlib.util
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

import tuner
from tuner.types import Message

_SPEC = importlib.util.spec_from_file_location("tokenizer_folders", Path(__file__).parent / "tokenizer_folders.py")
assert _SPEC is not None and _SPEC.loader is not None  # noqa: PT018
kinds: Any = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = kinds
_SPEC.loader.exec_module(kinds)

TEXTS = [
    *kinds.CORPUS[:4],
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    " The",
    "  leading,  repeated   and trailing   ",
    "\t tabs\tand\r\nline ends\r",
    "1234567890 12,345.67 0x1F 1e-10 v2.0.1",
    "isn't it's I'll we've they'd I'm you're DON'T",
    "日本語のテキスト 한국어 עברית العربية ไทย हिन्दी",
    "👩‍👩‍👧‍👦 flags 🇫🇷🇯🇵 skin 👍🏽",
    "zero\u200bwidth, no\u00a0break, \ufeffmark, e\u0301",
    "control \x00\x01\x07\x1b\x7f\x85 characters",
    "▁ the letter that stands for a space ▁▁",
    "<0x41> is no byte",
    "a" * 100,
    "∑ᵢ xᵢ² ≤ ∞ → ℝⁿ; α β γ",
    " ".join(kinds.CORPUS) * 5,
    "</s>",
    "a</s>b </s> c  </s>\n<s><unk>",
    "<bos>x<eos><pad>  <start_of_turn>user\nhi<end_of_turn>\n\n\n<table>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|> <|reserved_special_token_7|>",
    "<|user|>\n hi <|user|> x<|end|>\n<|assistant|>\n\t<think> a</think>a<placeholder> <placeholder>!<|endoftext|> ",
]
BEGIN_IS_OURS = {"llama of Meta", "llama 3"}
"""Where transformers has no file that says what a text begins with."""
UNMARKED = {"gemma", "phi3 with added_tokens.json"}
"""Whose marks of a turn are control tokens here, and not special for transformers, as the folder does not say so."""
CONTROL = [
    "</s>",
    "<s>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|user|>",
    "<|end|>",
    "<|assistant|>",
]


def _folders(root: Path) -> Iterator[tuple[str, Path, Callable[[Path], Any]]]:
    llama, gemma = kinds.sentencepiece_model(), kinds.gemma_model()
    size = sentencepiece.SentencePieceProcessor(model_proto=llama).get_piece_size()
    auto = AutoTokenizer.from_pretrained
    # AutoTokenizer takes no class for some and leaves out the space that their tokenizer.model asks for
    named = LlamaTokenizer.from_pretrained

    def write(name: str, model: bytes, settings: dict[str, Any] | None, **files: Any) -> Path:
        folder: Path = kinds.write_folder(root / name.replace(" ", "_"), model, settings, **files)
        return folder

    def llama_with(name: str, **settings: Any) -> tuple[str, Path, Callable[[Path], Any]]:
        return name, write(name, llama, {**kinds.LLAMA, **settings}), auto

    yield llama_with("llama", legacy=False, add_bos_token=True)
    yield llama_with("llama, legacy", legacy=True)
    yield llama_with("llama, no space before a text", add_prefix_space=False)
    yield llama_with("code llama", tokenizer_class="CodeLlamaTokenizer")
    yield "llama of Meta", write("meta", llama, None, config={"model_type": "llama"}), named
    yield "gemma", write("gemma", gemma, kinds.GEMMA), auto
    mistral = {**kinds.LLAMA, "legacy": True}
    yield "mistral", write("mistral", llama, mistral, config={"model_type": "mistral"}), named
    added = kinds.phi3_added(size)
    phi3 = {**kinds.LLAMA, "eos_token": "<|endoftext|>", "legacy": False, "added_tokens_decoder": added}
    yield "phi3", write("phi3", llama, phi3, config={"model_type": "phi3"}), named
    older: dict[str, Any] = {"special_tokens_map": kinds.LLAMA}
    older["added_tokens"] = {token: size + k for k, token in enumerate(kinds.PHI3_ADDED)}
    of_old = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "pad_token": "<|endoftext|>"}
    yield "phi3 with added_tokens.json", write("phi3 older", llama, of_old, **older), named


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    found = {name: (folder, read(folder)) for name, folder, read in _folders(tmp_path_factory.mktemp("folders"))}
    return {**found, "llama 3": _llama3(tmp_path_factory.mktemp("llama3"))}


def _llama3(folder: Path) -> tuple[Path, Any]:
    """transformers' conversion of such a list, for which it would read the file with the `tiktoken` library."""
    from transformers import PreTrainedTokenizerFast

    from tuner.tokenizers.tiktoken import LLAMA3

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(file: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(file).read_bytes().splitlines())
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    kinds.write_folder(folder, kinds.list_of_tokens(), config={"model_type": "llama"})
    converted = Converter(str(folder / "tokenizer.model"), extra_special_tokens=LLAMA3).converted()
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return folder, PreTrainedTokenizerFast(tokenizer_object=converted, **roles)


NAMES = [
    *("llama", "llama, legacy", "llama of Meta", "llama, no space before a text", "code llama", "gemma", "mistral"),
    *("phi3", "phi3 with added_tokens.json", "llama 3"),
]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_are_those_of_transformers(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, theirs = folders[name]
    ours = tuner.load_tokenizer(folder)
    alone = [ours.encode(token, control_tokens=True) for token in CONTROL]
    control = {ids[0] for ids in alone if len(ids) == 1}
    assert control
    drawn = random.Random(0)
    parts = [*"aetTé日👩.\n\t", "  ", " ", " the", "in", *CONTROL]
    for text in [*TEXTS, *("".join(drawn.choices(parts, k=drawn.randrange(40))) for _ in range(300))]:
        expected = theirs.encode(text, add_special_tokens=False)
        ids = ours.encode(text, control_tokens=True)
        assert ids == expected, text
        if name not in BEGIN_IS_OURS:
            assert ours.encode(text, control_tokens=True, add_special_tokens=True) == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(expected, skip_special_tokens=skip)
        plain = ours.encode(text)
        if name not in UNMARKED or not any(token in text for token in CONTROL):
            assert plain == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
            assert ours.decode(plain) == theirs.decode(plain)
        assert control.isdisjoint(plain), text
    assert (ours.eos_id, theirs.pad_token_id in (None, ours.pad_id)) == (theirs.eos_token_id, True)
    assert ours.vocab_size == len(theirs) - (name == "gemma") - 5 * (name == "code llama")


LLAMA2_CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' }}{% generation %}{{ m.content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def turns(opened: str, closed: str, before: str = "") -> str:
    """A template that writes OPENED role CLOSED content END for each message."""
    begin, role, end = opened.split("|role|")[0], "m.role", closed
    return (
        f"{{{{ '{before}' }}}}{{% for m in messages %}}{{{{ '{begin}' + {role} + '{opened.split('|role|')[1]}' }}}}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '" + end + "' }}{% endgeneration %}"
        "{% else %}{{ m.content + '" + end + "' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}"
        f"{{{{ '{begin}assistant{opened.split('|role|')[1]}' }}}}{{% endif %}}"
    )


PHI3_CHAT = turns("<||role||>\\n", "<|end|>")
CHATS = {
    **dict.fromkeys(("llama", "llama, legacy", "llama, no space before a text", "mistral"), LLAMA2_CHAT),
    "gemma": turns("<start_of_turn>|role|\\n", "<end_of_turn>", "<bos>"),
    **dict.fromkeys(("phi3", "phi3 with added_tokens.json"), PHI3_CHAT),
    "llama 3": turns("<|start_header_id|>|role|<|end_header_id|>\\n\\n", "<|eot_id|>", "<|begin_of_text|>"),
}
ENDS = ("eos_token", "<end_of_turn>", "<|end|>", "<|eot_id|>")
ALL_ENDS = "</s> <|end|>\n<end_of_turn> <|eot_id|><start_of_turn>"
QUESTIONS = ["Who?", "  the  capital\n", "日本 👩\u200d👩", "", "\n\n", f"What of {ALL_ENDS}?"]
REPLIES = ["Paris.", " the\n\tSeine  ", "👩\u200d👩 é", "é", f"{ALL_ENDS}in"]


@pytest.mark.parametrize("name", CHATS)
def test_chats_and_masks_are_those_of_transformers(
    name: str, folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """By the `tokenizer.json` that transformers saves of it, too."""
    folder, theirs = folders[name]
    (folder / "chat_template.jinja").write_text(CHATS[name], encoding="utf-8")
    ours = tuner.load_tokenizer(folder)
    theirs.chat_template = CHATS[name]
    theirs.save_pretrained(tmp_path)
    of_json = tuner.load_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    compared = 0
    for question, reply in itertools.product(QUESTIONS, REPLIES):
        messages: list[Message] = [
            *({"role": role, "content": text} for role, text in (("user", question), ("assistant", reply))),
            *({"role": role, "content": text} for role, text in (("user", reply), ("assistant", question or "x"))),
        ]
        for prompt in (False, True):
            told = {"add_generation_prompt": prompt, "return_dict": False}
            expected = theirs.apply_chat_template(messages, sanitize_control_tokens=True, **told)
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected, messages
        ids, mask = ours.encode_chat(messages)
        assert of_json.encode_chat(messages) == (ids, mask), messages
        unmarked = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if name == "phi3" and (question[:1].isspace() or reply[0].isspace()):
            pass  # transformers takes <|assistant|>, to which the spaces behind it belong, for a part of the reply
        elif ids == unmarked["input_ids"]:
            compared += 1
            assert mask == [bool(trained) for trained in unmarked["assistant_masks"]], messages
        else:
            assert any(token in question + reply for token in CONTROL)
        trained = ours.decode([id_ for id_, is_reply in zip(ids, mask, strict=True) if is_reply])
        end = next(end for end in ENDS if end in CHATS[name])
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert "".join(trained.split()) == "".join(end.join([*said, ""]).replace("eos_token", "</s>").split())
    assert compared >= 9


@pytest.mark.parametrize(("name", "begin"), [("llama of Meta", "<s>"), ("llama 3", "<|begin_of_text|>")])
def test_metas_texts_begin_with_their_token(name: str, begin: str, folders: dict[str, tuple[Path, Any]]) -> None:
    ours = tuner.load_tokenizer(folders[name][0])
    begun = ours.encode("Paris </s>", add_special_tokens=True)
    assert begun == [*ours.encode(begin, control_tokens=True), *ours.encode("Paris </s>")]


LEARNT = ["<|tool|>", "<|/tool|>", "日本", "a b", "[[x]]"]
OF_LEARNT = [
    *("", "<|tool|>", "say <|tool|> {'q': 1}<|/tool|>\n", " <|tool|><|tool|>x<|/tool|", "\t日本語!日 本 a b ab a  b"),
    *("[[x]]</s> <|tool|><end_of_turn>", "<|user|> hi <|tool|> <|end|>x", "The capital <|tool|> of  France [[x]] "),
]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_learnt_as_transformers_learns_them(
    name: str, folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, theirs = folders[name][0], copy.deepcopy(folders[name][1])
    ours = tuner.load_tokenizer(folder)
    before = ours.vocab_size
    ids = ours.add_tokens(LEARNT)
    assert theirs.add_tokens([AddedToken(token, normalized=False) for token in LEARNT]) == len(LEARNT)
    assert ids == list(range(before, before + len(LEARNT)))
    # Their classes for Gemma and Code Llama have tokens of their own, which these small vocabularies lack
    number = dict(zip(theirs.convert_tokens_to_ids(LEARNT), ids, strict=True))
    assert name in ("gemma", "code llama") or list(number) == ids
    ours.save(tmp_path)
    again = tuner.load_tokenizer(tmp_path)
    assert again.vocab_size == ours.vocab_size == before + len(LEARNT)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in OF_LEARNT:
        expected = [number.get(id_, id_) for id_ in theirs.encode(text, add_special_tokens=False)]
        for one in (ours, again):
            assert one.encode(text, control_tokens=True) == expected
            assert one.decode(expected) == ours.decode(expected)
            assert one.encode(text).count(ids[0]) == text.count(LEARNT[0])  # in a message, too, they are tokens
        assert saved.encode(text, add_special_tokens=False) == expected
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(list(number), skip_special_tokens=True)
