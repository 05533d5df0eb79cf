"""Training from a folder whose tokenizer is a `tokenizer.model`, and what it leaves."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tuner

_FILE = Path(__file__).parents[1] / "parity" / "tokenizer_folders.py"
_SPEC = importlib.util.spec_from_file_location("tokenizer_folders", _FILE)
assert _SPEC is not None and _SPEC.loader is not None  # noqa: PT018
kinds: Any = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = kinds
_SPEC.loader.exec_module(kinds)

STEPS = ["train.max_steps=2", "train.num_samples=0", "train.num_threads=1", "logger=none", "peft=full"]
LLAMA3_TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n"
KINDS = {
    "llama2": (kinds.sentencepiece_model, kinds.LLAMA, "<s>[INST] {content} [/INST]", " {content} </s>"),
    "gemma": (
        kinds.gemma_model,
        kinds.GEMMA,
        "<start_of_turn>user\n{content}<end_of_turn>\n",
        "<start_of_turn>model\n{content}<end_of_turn>\n",
    ),
    "llama3": (
        kinds.list_of_tokens,
        None,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>",
    ),
}


READERS: list[Any] = [tuner.load_tokenizer, tuner.load_tokenizer, AutoTokenizer.from_pretrained]


def template(user: str, reply: str) -> str:
    """Both turns as Jinja; a reply is asked for by what stands before its content."""
    turns = [json.dumps(turn).replace("{content}", '" + m.content + "') for turn in (user, reply)]
    opened = json.dumps(reply.split("{content}")[0])
    return (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ {turns[0]} }}}}{{% else %}}{{{{ {turns[1]} }}}}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {opened} }}}}{{% endif %}}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_what_it_saves(kind: str, shell: Any, tmp_path: Path) -> None:
    model, settings, user, reply = KINDS[kind]
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=700, max_position_embeddings=1024, **shape)).save_pretrained(tmp_path)
    kinds.write_folder(tmp_path, model(), settings)
    (tmp_path / "chat_template.jinja").write_text(template(user, reply))
    done = shell.inside("model=llama", f"model.path={tmp_path}", *shell.data, *STEPS, f"out={kind}")
    assert (done.code, done.err) == (0, "")
    saved = shell.folder / kind / "model"
    assert (saved / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    theirs, before, after = (
        AutoTokenizer.from_pretrained(saved),
        tuner.load_tokenizer(tmp_path),
        tuner.load_tokenizer(saved),
    )
    messages: list[Any] = [
        {"role": "user", "content": "Add  日本 to </s> 👩‍👩"},
        {"role": "assistant", "content": "It is"},
    ]
    ids = theirs.apply_chat_template(messages, return_dict=False, sanitize_control_tokens=True)
    assert before.apply_chat_template(messages) == after.apply_chat_template(messages) == ids
    assert before.encode_chat(messages) == after.encode_chat(messages)
    done = shell.inside("generate", f"run={shell.folder / kind}", "prompt=Add </s>", "max_new_tokens=3")
    assert (done.code, done.err) == (0, "")


def test_an_empty_file_is_one_line(shell: Any, tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    done = shell.inside("model=llama", f"model.path={tmp_path}", *shell.data, *STEPS, "out=empty")
    assert (done.code, done.err.strip()) == (2, f"error: {tmp_path}/tokenizer.model is empty")
    assert not (shell.folder / "empty").exists()
