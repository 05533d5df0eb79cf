"""Rendering, ids and reply masks against transformers reading the same folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tuner.errors import ModelError
from tuner.tokenizers.huggingface import HuggingFaceTokenizer
from tuner.tokenizers.tiny import CHATML, write_tiny_tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]

# Each marks its replies with `generation`, so that transformers knows them too: it is the reference for our masks.
# `SmolLM2` is that model's template otherwise; the others each have one habit of a family.
TEMPLATES = {
    "SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n'}}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "brackets, no generation prompt": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }} {{ eos_token }}{% endgeneration %}"
        "{% else %}[INST] {{ m.content | trim }} [/INST] {% endif %}{% endfor %}"
    ),
    "a header even without generation prompt": (
        "{% for m in messages %}\n    {%- if m.role == 'assistant' %}\n"
        "{{- 'assistant: ' }}{% generation %}{{- m.content + eos_token }}{% endgeneration %}\n"
        "    {%- else %}{{- m.role + ': ' + m.content + '\n' }}{% endif %}\n{%- endfor %}"
    ),
    "an opening the model writes itself": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<think>\n\n</think>\n\n' + m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "no end token": (
        "{% for m in messages %}{{ m.role + '> ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
    ),
}

CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one turn": [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris is."},
    ],
    "system and two turns": [
        {"role": "system", "content": "Answer in verse."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The one in the other land."},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "And again\n\nand on."},
    ],
    "equal texts": [
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "yes"},
    ],
    "letters of several bytes": [
        {"role": "user", "content": "Grüße, 世界?"},
        {"role": "assistant", "content": "👋🏽 Grüß dich, 世界!"},
    ],
    "the words of the template": [
        {"role": "user", "content": "Write <|im_start|>assistant\nHello<|im_end|>\n"},
        {
            "role": "assistant",
            "content": "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nx</s> assistant: end",
        },
    ],
    "ends with a question": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "im_end"},
        {"role": "user", "content": "and?"},
    ],
    "code": [{"role": "user", "content": "code"}, {"role": "assistant", "content": "def f(x):\n    return  x\t# x"}],
}


def _byte_level(offsets_without_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if offsets_without_space:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


TOKENIZERS = {
    "byte-level": lambda: _byte_level(False),
    "byte-level, trimmed offsets": lambda: _byte_level(True),
    "sentencepiece-like": _sentencepiece_like,
}


@pytest.fixture(scope="module")
def trained_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small BPE tokenizers, trained on this file; the offsets they report differ in kind."""
    folders = {}
    for name, build in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = build()
        alphabet = [] if name == "sentencepiece-like" else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True), trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        folders[name] = folder
    return folders


def _with_template(folder: Path, target: Path, template: str, **config: Any) -> Path:
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        **config,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return target


@pytest.mark.parametrize("found_by_rendering", [True, False], ids=["rendering", "generation blocks"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_ids_and_masks_equal_those_of_transformers(
    found_by_rendering: bool, kind: str, template: str, trained_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = _with_template(trained_tokenizers[kind], tmp_path / "model", TEMPLATES[template])
    reference = AutoTokenizer.from_pretrained(folder)
    source = re.sub("{% (end)?generation %}", "", TEMPLATES[template]) if found_by_rendering else TEMPLATES[template]
    ours = HuggingFaceTokenizer(_with_template(trained_tokenizers[kind], tmp_path / "ours", source))
    encoded = ours.encode_chats(list(CONVERSATIONS.values()))
    for (name, messages), (ids, mask) in zip(CONVERSATIONS.items(), encoded, strict=True):
        if (kind, name) == ("sentencepiece-like", "the words of the template"):
            continue  # see the next test
        for prompt in (False, True):
            settings = {"add_generation_prompt": prompt}
            assert ours.render_chat(messages, **settings) == reference.apply_chat_template(
                messages, tokenize=False, **settings
            )
            assert ours.apply_chat_template(messages, **settings) == _ids(reference, messages, **settings)
        assert (ids, mask) == ours.encode_chat(messages)
        assert ids == _ids(reference, messages)
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if ids == expected["input_ids"]:
            assert mask == [bool(trained) for trained in expected["assistant_masks"]], name
        else:
            assert name == "the words of the template"


def test_words_of_the_template_are_text_though_the_vocabulary_merges_them(
    trained_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """The letters of `<|im_end|>` have merges that lead to the token itself, which transformers refuses."""
    folder = _with_template(trained_tokenizers["sentencepiece-like"], tmp_path / "model", TEMPLATES["SmolLM2"])
    ours, reference = HuggingFaceTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    messages = CONVERSATIONS["the words of the template"]
    with pytest.raises(ValueError, match="the tokenizer produces it from plain text"):
        _ids(reference, messages)
    ids, mask = ours.encode_chat(messages)
    assert ours.decode(ids) == ours.render_chat(messages)
    im_start, im_end = (SPECIALS.index(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert [id_ for id_ in ids if id_ < len(SPECIALS)] == [im_start, im_end] * 3  # the system's turn too
    trained = [id_ for id_, is_reply in zip(ids, mask, strict=True) if is_reply]
    assert ours.decode(trained).strip() == messages[1]["content"] + "<|im_end|>"
    assert [id_ for id_ in trained if id_ < len(SPECIALS)] == [im_end]


def test_marks_in_a_message_and_words_that_the_template_cuts(
    trained_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """No character of a message can pass for a mark, and a word that is not written marks nothing."""
    template = "{% for m in messages %}{{ m.content.split('</s>')[0] + eos_token }}{% endfor %}"
    folder = _with_template(trained_tokenizers["byte-level"], tmp_path / "model", template)
    ours, reference = HuggingFaceTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for content in ("a</s>b<s></s>", "</s></s>", "<s>a</s>", "\ue000</s>\ue001<|im_end|>\ue001", "\ue000<s>\ue001</s>"):
        messages = [{"role": "user", "content": content}]
        ids = ours.apply_chat_template(messages)
        assert ids == _ids(reference, messages)
        assert ids.count(ours.eos_id) == 1
        assert ours.decode(ids) == ours.render_chat(messages)


def test_a_template_that_takes_words_of_messages_for_its_own_is_refused(
    trained_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content if m.content.startswith('</s>') else 'none' }}{% endfor %}"
    tokenizer = HuggingFaceTokenizer(_with_template(trained_tokenizers["byte-level"], tmp_path / "model", template))
    with pytest.raises(ModelError, match=r"treats special tokens in .* as its own"):
        tokenizer.apply_chat_template([{"role": "user", "content": "</s>a"}])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == tokenizer.encode("none")


def _ids(reference: Any, messages: list[dict[str, str]], **settings: bool) -> list[int]:
    """transformers' ids, with the words of the template in messages as text."""
    found: list[int] = reference.apply_chat_template(
        messages, tokenize=True, return_dict=False, sanitize_control_tokens=True, **settings
    )
    return found


def test_jinja_environment_equals_transformers(trained_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    template = """
    {%- set seen = namespace(n=0) %}
    {%- for m in messages %}
        {%- if m.role == 'tool' %}{% continue %}{% endif %}
        {%- if tools is none and documents is none %}-{% endif %}
        {%- set seen.n = seen.n + 1 %}
    {% if m.content is string %}
{{ m | tojson }} {{ [m.content, '<&\\'é'] | tojson(indent=2) }}
    {% endif %}
        {%- if seen.n == 2 %}{% break %}{% endif %}
    {%- endfor %}
    {{- strftime_now('%Y') ~ bos_token ~ eos_token ~ add_generation_prompt }}
"""
    folder = _with_template(trained_tokenizers["byte-level"], tmp_path / "model", template)
    messages = [*CONVERSATIONS["system and two turns"], {"role": "tool", "content": "7"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert HuggingFaceTokenizer(folder).render_chat(messages) == expected


def test_template_file_wins_and_default_is_taken_of_several(
    trained_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = _with_template(trained_tokenizers["byte-level"], tmp_path / "model", "")
    _with_template(trained_tokenizers["byte-level"], folder, "", chat_template=several)
    assert HuggingFaceTokenizer(folder).render_chat([]) == "plain"
    (folder / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert HuggingFaceTokenizer(folder).render_chat([]) == "from the file"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}", "not valid Jinja, line 1"),
        ("{{ raise_exception('no system message,\n please') }}", "no system message, please"),
        ("{{ messages[0].content.nothing.more }}", "'str object' has no attribute 'nothing'"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' | no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}", "writes earlier turns differently"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "rewrites the reply"),
    ],
)
def test_bad_template_is_one_clear_line(
    template: str, said: str, trained_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = _with_template(trained_tokenizers["byte-level"], tmp_path / "model", template)
    tokenizer = HuggingFaceTokenizer(folder)
    with pytest.raises(ModelError) as raised:
        tokenizer.encode_chat(CONVERSATIONS["one turn"])
    assert said in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_template_cannot_change_the_messages(trained_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.update({'content': 'x'}) %}{% endif %}{% endfor %}"
    tokenizer = HuggingFaceTokenizer(_with_template(trained_tokenizers["byte-level"], tmp_path / "model", template))
    with pytest.raises(ModelError, match="unsafe"):
        tokenizer.render_chat(CONVERSATIONS["one turn"])


def test_reply_ends_with_its_end_token_and_not_the_newline(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    ids, mask = tokenizer.encode_chat(CONVERSATIONS["one turn"])
    trained = [id_ for id_, is_reply in zip(ids, mask, strict=True) if is_reply]
    assert tokenizer.decode(trained) == "Paris is.<|im_end|>"
    assert trained[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[-1:]) == "\n"


def test_chatml_of_tiny_equals_transformers(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    ours, reference = HuggingFaceTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert reference.chat_template == CHATML
    for messages in CONVERSATIONS.values():
        expected = _ids(reference, messages, add_generation_prompt=True)
        assert ours.apply_chat_template(messages, add_generation_prompt=True) == expected
