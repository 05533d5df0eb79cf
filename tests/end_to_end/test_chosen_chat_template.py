"""`model.chat_template` through the commands: a base model without a template gets one, which goes with its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from tests.end_to_end.conftest import Shell
from tuner.tokenizers.built_in_templates import BUILT_IN
from tuner.tokenizers.packaged import write_packaged_tokenizer

QUICK = ["logger=none", "train.max_steps=1", "train.num_samples=1", "train.max_new_tokens=2", "checkpoint=default"]
GENERATE = ["prompt=Hi", "max_new_tokens=3"]


@pytest.fixture(scope="module")
def base(shell: Shell) -> Path:
    """A model folder as base models are published: no template in it."""
    done = shell.inside("model=tiny", "peft=full", *shell.data, *QUICK, "out=maker")
    assert done.code == 0, done.err
    folder = shell.folder / "maker" / "model"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
def test_without_a_template_the_error_names_those_that_fit(shell: Shell, base: Path) -> None:
    done = shell.inside(f"model.path={base}", *shell.data, *QUICK, "out=never")
    assert done.code == 2
    assert "has no chat template" in done.err
    assert (
        "model.chat_template=NAME; of the built-in ones this vocabulary has the tokens of alpaca, chatml," in done.err
    )
    assert "gemma" not in done.err
    assert not (shell.folder / "never").exists()
    done = shell.inside(f"model.path={base}", "model.chat_template=llama3", *shell.data, *QUICK, "out=never")
    assert done.code == 2
    assert "model.chat_template=llama3 writes <|start_header_id|>, <|end_header_id|>, <|eot_id|>, which" in done.err
    assert "\"model.add_tokens=['<|start_header_id|>','<|end_header_id|>','<|eot_id|>']\"" in done.err
    done = shell.inside(f"model.path={base}", "model.chat_template=none.jinja", *shell.data, *QUICK, "out=never")
    assert done.code == 2
    assert f"model.chat_template={shell.folder}/none.jinja: cannot be read" in done.err


@pytest.mark.slow
def test_an_adapter_carries_what_was_chosen(shell: Shell, base: Path) -> None:
    """`generate`, `evaluate`, `merge` and another run on the adapter write as the run did, and a word overrules it."""
    done = shell.inside(f"model.path={base}", "model.chat_template=alpaca", *shell.data, *QUICK, "out=alpaca")
    assert done.code == 0, done.err
    kept = shell.folder / "alpaca" / "adapter" / "chat_template.jinja"
    assert kept.read_text() == BUILT_IN["alpaca"].source
    of_run = shell.inside("generate", "run=alpaca", *GENERATE)
    of_adapter = shell.inside("generate", "adapter=alpaca/adapter", *GENERATE)
    assert of_run.code == of_adapter.code == 0, of_run.err + of_adapter.err
    assert of_run.out == of_adapter.out
    before = shell.inside("evaluate", "run=alpaca", *shell.data)
    overruled = shell.inside("evaluate", "run=alpaca", "model.chat_template=chatml", *shell.data)
    assert before.code == overruled.code == 0, before.err + overruled.err
    assert before.out != overruled.out
    assert shell.inside("evaluate", "adapter=alpaca/adapter", *shell.data).out == before.out
    done = shell.inside("merge", "run=alpaca", "dest=merged")
    assert done.code == 0, done.err
    assert (shell.folder / "merged" / "chat_template.jinja").read_text() == BUILT_IN["alpaca"].source
    done = shell.inside("adapter=alpaca/adapter", *shell.data, *QUICK, "out=further")
    assert done.code == 0, done.err
    assert (shell.folder / "further" / "adapter" / "chat_template.jinja").read_text() == BUILT_IN["alpaca"].source


def test_a_file_of_ones_own_is_saved_with_the_model(shell: Shell, base: Path) -> None:
    turn = "{{ m.role + ': ' + m.content + eos_token }}"
    own = f"{{% for m in messages %}}{turn}{{% endfor %}}{{{{ 'assistant: ' if add_generation_prompt }}}}"
    (shell.folder / "own.jinja").write_text(own)
    words = [f"model.path={base}", "model.chat_template=own.jinja", "peft=full", *shell.data]
    done = shell.inside(*words, *QUICK, "out=own")
    assert done.code == 0, done.err
    (shell.folder / "own.jinja").unlink()
    model = shell.folder / "own" / "model"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    reference = AutoTokenizer.from_pretrained(model)
    assert reference.apply_chat_template(turns, tokenize=False) == "user: a<|im_end|>assistant: b<|im_end|>"
    done = shell.inside("generate", "run=own", *GENERATE)
    assert done.code == 0, done.err
    assert json.loads((model / "generation_config.json").read_text()) == {"eos_token_id": [reference.eos_token_id]}


def test_tokens_learnt_for_a_template_are_its_control_tokens(shell: Shell, base: Path) -> None:
    """They end replies, a user's letters make none, and others who read the folder stop at them."""
    tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [f"model.path={base}", "model.chat_template=phi3", f"model.add_tokens={tokens}"]
    done = shell.inside(*words, *shell.data, *QUICK, "out=phi")
    assert done.code == 0, done.err
    shown = shell.inside("data", *words, *shell.data, "train.num_samples=1")
    assert re_trained(shown.out).endswith("<|end|>")
    assert shell.inside("merge", "run=phi", "dest=merged_phi").code == 0
    folder = shell.folder / "merged_phi"
    reference = AutoTokenizer.from_pretrained(folder)
    assert "<|end|>" in reference.convert_ids_to_tokens(
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    )
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape()[0] >= len(reference)
    plain = shell.inside("data", f"model.path={folder}", *shell.data, "train.num_samples=1")
    assert re_trained(plain.out) == re_trained(shown.out)


def re_trained(shown: str) -> str:
    """What stands in the first brackets of `tuner data`."""
    return shown.partition("──")[2].partition("⟦")[2].partition("⟧")[0]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates_equal_transformers_and_train_replies_with_their_end(name: str, tmp_path: Path) -> None:
    from tuner.tokenizers import load_tokenizer

    kind = {"chatml": "smollm2", "alpaca": "llama2", "plain": "qwen"}.get(name, name)
    write_packaged_tokenizer(kind, tmp_path / "model")
    ours = load_tokenizer(tmp_path / "model")
    ours.use_chat_template(name)
    ours.save(tmp_path / "saved")
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}] * 2
    for messages, prompt in ((turns, False), (turns[:3], True)):
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
        )
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected  # type: ignore[arg-type]
    ids, mask = ours.encode_chat(turns)  # type: ignore[arg-type]
    assert load_tokenizer(tmp_path / "saved").encode_chat(turns) == (ids, mask)  # type: ignore[arg-type]
    last = [i for i, trained in enumerate(mask) if trained and not (mask[i + 1 :] or [False])[0]]
    assert len(last) == 2
    assert all(ids[i] in ours.reply_end_ids for i in last)
    assert ours.decode([id_ for id_, trained in zip(ids, mask, strict=True) if trained]).count("c d") == 2
