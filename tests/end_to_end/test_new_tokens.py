"""`model.add_tokens` through the commands: train, evaluate, generate, merge, go on; and what others read of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tuner.config import compose
from tuner.data.alpaca import Alpaca
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Sample

pytestmark = pytest.mark.slow

NEW = "model.add_tokens=['<|tool|>','<|/tool|>']"
IDS = [343, 344]  # the tokenizer has 343 tokens and the model 344 rows: one is spare, one is added
STEPS = ["train.max_steps=4", "train.num_samples=0", "train.num_threads=1", "logger=none", "optimizer.lr=0.01"]
LONG = ["train.max_steps=40", "train.val_every_steps=null"]
LOSS = 1e-5  # of about 6: fp32 sums in another order


@pytest.fixture(scope="module")
def data(shell: Any) -> list[str]:
    """Sums that a tool does, as words that choose them."""
    rows = [
        {
            "instruction": f"Add {i} to {i % 7}. <|tool|> may help.",
            "input": "",
            "output": f"<|tool|>{i}+{i % 7}<|/tool|>",
        }
        for i in range(60)
    ]
    file = shell.folder / "tools.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=alpaca", f"data.path={file}", "data.val_fraction=0.1"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, shell: Any) -> Path:
    """A small Llama as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder: Path = shell.folder / ("tied" if request.param else "untied")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"vocab_size": 344, "tie_word_embeddings": request.param}
    LlamaForCausalLM(LlamaConfig(max_position_embeddings=512, initializer_range=0.1, **ends, **shape)).save_pretrained(
        folder
    )
    write_tiny_tokenizer(folder)
    return folder


def trained(shell: Any, out: Path | str, *words: str) -> dict[str, Any]:
    done = shell.inside(*STEPS, *words, f"out={out}")
    assert (done.code, done.err) == (0, "")
    summary: dict[str, Any] = json.loads((shell.folder / out / "summary.json").read_text())
    assert summary["status"] == "finished"
    return summary


@pytest.fixture(scope="module")
def out(shell: Any, base: Path, data: list[str]) -> Path:
    """The folder of a LoRA run."""
    folder: Path = shell.folder / f"run {base.name}"
    trained(shell, folder, f"model.path={base}", NEW, *data, *LONG)
    return folder


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def loss_of(done: Any) -> float:
    assert (done.code, done.err) == (0, "")
    (loss,) = re.findall(r"^val_loss: (.*)$", done.out, re.MULTILINE)
    return float(loss)


def samples(data: list[str], tokenizer: Path) -> list[Sample]:
    keys = {key: value for key, value in compose(data).data.items() if not key.startswith("_")}
    return list(Alpaca(**keys).load(load_tokenizer(tokenizer)).validation)


@torch.no_grad()
def loss_in_transformers(model: Any, data: list[str], tokenizer: Path) -> float:
    total, count = 0.0, 0
    for sample in samples(data, tokenizer):
        logits = model(torch.tensor([list(sample.tokens)])).logits[0, :-1]
        labels = torch.tensor(list(sample.labels))[1:]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_the_run_says_and_keeps_what_was_learnt(out: Path, base: Path, summary: dict[str, Any]) -> None:
    assert summary["val_loss"] < summary["val_loss_before"]
    said = " ".join((out / "run.log").read_text().split())
    assert "new tokens: <|tool|> = 343, <|/tool|> = 344; 1 in rows that were spare, 1 in added rows" in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"]["add_tokens"] == ["<|tool|>", "<|/tool|>"]
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    tied = base.name == "tied"
    assert settings["trainable_token_indices"] == {"embed_tokens": IDS} | ({} if tied else {"lm_head": IDS})
    rows = {k: v for k, v in load_file(out / "adapter" / "adapter_model.safetensors").items() if "token_adapter" in k}
    assert len(rows) == (1 if tied else 2)
    for tensor in rows.values():
        assert tensor.shape == (2, 64)
        assert not torch.equal(tensor[0], tensor[1])  # both began as the mean


def test_validate_counts_what_trained(shell: Any, base: Path, out: Path, summary: dict[str, Any]) -> None:
    for words in ([f"model.path={base}", NEW], [f"adapter={out}/adapter"]):
        done = shell.inside("validate", *words)
        assert (done.code, done.err) == (0, "")
        assert done.out == f"total_params: {summary['total_params']}\ntrainable_params: {summary['trainable_params']}\n"


def test_peft_loads_it_on_a_resized_base(out: Path, base: Path, data: list[str], summary: dict[str, Any]) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    assert tokenizer.convert_tokens_to_ids(["<|tool|>", "<|/tool|>"]) == IDS
    ours = load_tokenizer(out / "adapter")
    text = "<|tool|>1+1<|/tool|> 世界"
    assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)
    with warnings.catch_warnings(action="ignore"):
        resized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        resized.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(resized, out / "adapter").eval()
        # which resizes by itself to the tokenizer that it finds beside the adapter
        alone = AutoPeftModelForCausalLM.from_pretrained(out / "adapter", dtype=torch.float32).eval()
    for one in (model, alone):
        found = loss_in_transformers(one, data, out / "adapter")
        assert found == pytest.approx(summary["val_loss"], abs=LOSS)


def test_verbs_find_tokens_and_rows(
    shell: Any, out: Path, base: Path, data: list[str], summary: dict[str, Any]
) -> None:
    expected = pytest.approx(summary["val_loss"], abs=1e-6)
    checkpoint = next((out / "checkpoints").glob("step-*"))
    assert loss_of(shell.inside("evaluate", f"run={out}")) == expected
    assert loss_of(shell.inside("evaluate", f"checkpoint={checkpoint}")) == expected
    assert loss_of(shell.inside("evaluate", f"adapter={out}/adapter", *data)) == expected
    assert loss_of(shell.inside("evaluate", f"adapter={out}/adapter", f"model.path={base}", *data)) == expected


def test_generate_writes_new_tokens_and_shows_them(shell: Any, out: Path, base: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    prompt = "Add 4 to 4. <|tool|> may help."
    replies = set()
    for words in ([f"run={out}"], [f"adapter={out}/adapter"]):
        done = shell.inside("generate", *words, f"prompt={prompt}", "max_new_tokens=8")
        assert (done.code, done.err) == (0, "")
        replies.add(done.out)
    tokenizer = load_tokenizer(out / "adapter")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    assert 343 in ids
    with warnings.catch_warnings(action="ignore"):
        model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter", dtype=torch.float32).eval()
    given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    made = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=True)
    assert replies == {f"{expected.strip()}\n"}
    assert expected.startswith("<|tool|>")  # every reply that it saw does


@pytest.mark.parametrize("words", [[], ["quantization=nf4"]], ids=["dense", "nf4"])
def test_a_merged_model_stands_alone(
    words: list[str], shell: Any, out: Path, data: list[str], base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = loss_of(shell.inside("evaluate", f"adapter={out}/adapter", *data, *words))
    done = shell.inside("merge", f"adapter={out}/adapter", f"dest={tmp_path}/merged", *words)
    assert (done.code, done.err) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 345
    assert model.config.tie_word_embeddings is (base.name == "tied")
    assert loss_in_transformers(model, data, tmp_path / "merged") == pytest.approx(expected, abs=LOSS)
    assert loss_of(shell.inside("evaluate", f"model.path={tmp_path}/merged", *data)) == pytest.approx(
        expected, abs=LOSS
    )


def test_a_run_goes_on_from_the_adapter(
    shell: Any, out: Path, data: list[str], summary: dict[str, Any], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    further = trained(shell, tmp_path / "further", f"adapter={out}/adapter", *data, "optimizer.lr=0.001")
    assert further["val_loss_before"] == pytest.approx(summary["val_loss"], abs=1e-6)
    assert further["val_loss"] < summary["val_loss"]
    assert further["trainable_params"] == summary["trainable_params"]
    with warnings.catch_warnings(action="ignore"):
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "further" / "adapter", dtype=torch.float32).eval()
    found = loss_in_transformers(model, data, tmp_path / "further" / "adapter")
    assert found == pytest.approx(further["val_loss"], abs=LOSS)
    checkpoint = next((tmp_path / "further" / "checkpoints").glob("step-*"))
    expected = pytest.approx(further["val_loss"], abs=1e-6)
    assert loss_of(shell.inside("evaluate", f"checkpoint={checkpoint}")) == expected


def test_four_bits_and_bf16(shell: Any, base: Path, data: list[str], tmp_path: Path) -> None:
    words = ["peft=qlora", "precision=bf16", f"model.path={base}", NEW, *data]
    summary = trained(shell, tmp_path / "qlora", *words)
    assert summary["val_loss"] < summary["val_loss_before"]
    assert summary["trainable_dtype"] == "float32"
    evaluated = loss_of(shell.inside("evaluate", f"adapter={tmp_path}/qlora/adapter", *data))
    assert evaluated == pytest.approx(summary["val_loss"], abs=1e-6)


def test_full_training_leaves_a_grown_model(shell: Any, base: Path, data: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = trained(shell, tmp_path / "full", "peft=full", f"model.path={base}", NEW, *data)
    assert summary["total_params"] == summary["trainable_params"]
    folder = tmp_path / "full" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert summary["total_params"] == sum(p.numel() for p in model.parameters())
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == 345
    assert loss_in_transformers(model, data, folder) == pytest.approx(summary["val_loss"], abs=LOSS)
    expected = pytest.approx(summary["val_loss"], abs=1e-6)
    assert loss_of(shell.inside("evaluate", f"run={tmp_path}/full")) == expected
    checkpoint = next((tmp_path / "full" / "checkpoints").glob("step-*"))
    assert loss_of(shell.inside("evaluate", f"checkpoint={checkpoint}")) == expected


def test_the_tiny_model_learns_tokens_too(shell: Any, data: list[str], tmp_path: Path) -> None:
    summary = trained(shell, tmp_path / "tiny", "model=tiny", "model.vocab_size=343", NEW, *data)
    counted = shell.inside("validate", "model=tiny", "model.vocab_size=345")
    assert f"total_params: {summary['total_params']}\n" in counted.out
    assert loss_of(shell.inside("evaluate", f"run={tmp_path}/tiny")) == pytest.approx(summary["val_loss"], abs=1e-6)
    merged = shell.inside("merge", f"run={tmp_path}/tiny", f"dest={tmp_path}/merged")
    assert (merged.code, merged.err) == (0, "")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 345


def test_killed_and_continued_is_never_stopped(
    shell: Any, out: Path, base: Path, data: list[str], tmp_path: Path
) -> None:
    words = [*STEPS, *LONG, f"model.path={base}", NEW, *data, f"out={tmp_path}/killed", "checkpoint.every_steps=5"]
    stopped = shell.at_step(shell.start(*words), str(tmp_path / "killed"), 6, [signal.SIGKILL])
    assert stopped.code == -signal.SIGKILL
    assert shell.inside(*words).code == 0
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, tmp_path / "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_refused_before_anything_is_written(shell: Any, out: Path, base: Path, data: list[str]) -> None:
    before = sorted(path.name for path in shell.folder.iterdir())
    for words, said in (
        (
            ["out=never", "model.add_tokens=['<|tool|>','<|im_end|>']"],
            "model.add_tokens: '<|im_end|>' (id 2) is in the",
        ),
        ([f"out={out}", NEW.replace("/tool", "end")], "model.add_tokens was ['<|tool|>', '<|/tool|>'] and is"),
    ):
        done = shell.inside(*STEPS, f"model.path={base}", *data, *words)
        assert done.code == 2
        assert said in done.err
        assert sorted(path.name for path in shell.folder.iterdir()) == before


def test_tokens_of_a_run_are_not_said_again(shell: Any, out: Path) -> None:
    for words in ([f"run={out}"], [f"adapter={out}/adapter"]):
        done = shell.inside("generate", *words, "prompt=hi", NEW)
        assert done.code == 2
        assert "leave" in done.err
        assert "model.add_tokens=" in done.err


def test_without_the_tokenizer_beside_it_the_base_s_is_taken(
    shell: Any, out: Path, data: list[str], tmp_path: Path
) -> None:
    """As with an adapter whose maker did not save it: texts then hold no new token."""
    shutil.copytree(out / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    with_it, without = (
        loss_of(shell.inside("evaluate", f"adapter={folder}", *data))
        for folder in (out / "adapter", tmp_path / "adapter")
    )
    assert with_it != without
