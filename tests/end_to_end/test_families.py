"""Every family through the commands: trained, quantized, saved, merged, and read by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tuner
from tuner.models.family import FAMILIES
from tuner.tokenizers.tiny import write_tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 352,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    "phi3": {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "original_max_position_embeddings": 32,
    },
}
FP32_LOGITS = 1e-4  # as in tests/parity


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, shell_in: Callable[[Path], Any]) -> Any:
    return shell_in(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def folder_of(shell: Any) -> Callable[[str], Path]:
    """A small model of a family, as transformers saves it, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str) -> Path:
        folder: Path = shell.folder / family
        if not folder.exists():
            torch.manual_seed(4)
            config = AutoConfig.for_model(family, **{**SHAPE, **OWN.get(family, {})})
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            write_tiny_tokenizer(folder)
        return folder

    return make


def run(shell: Any, family: str, out: str, *words: str) -> dict[str, Any]:
    common = [f"model.path={family}", "train.max_steps=5", "train.num_samples=1", "logger=none", f"out={out}"]
    done = shell.inside(*common, *shell.data, "optimizer.lr=1e-3", *words)
    assert done.code == 0, done.err
    summary: dict[str, Any] = json.loads((shell.folder / out / "summary.json").read_text())
    assert summary["val_loss"] < summary["val_loss_before"]
    return summary


@torch.no_grad()
def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found: torch.Tensor = model(tokens).logits
    return found


@torch.no_grad()
def logits_here(folder: Path, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
    found: torch.Tensor = tuner.load_model(folder, dtype=torch.float32, **how)(tokens)
    return found


TOKENS = torch.randint(0, 352, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_leaves_a_folder_of_its_family(family: str, shell: Any, folder_of: Callable[[str], Path]) -> None:
    folder_of(family)
    run(shell, family, f"full-{family}", "peft=full")
    model = shell.folder / f"full-{family}" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == family
    stated = yaml.safe_load((shell.folder / f"full-{family}" / "config.yaml").read_text())["model"]
    assert stated["_target_"].startswith(f"tuner.models.{family}."), "the folder's family, not the preset's"
    assert {key: stated[key] for key in SHAPE if key in stated} == {key: SHAPE[key] for key in SHAPE if key in stated}
    assert stated["path"] == str(shell.folder / family)
    assert (logits_here(model, TOKENS) - logits_of_transformers(model, TOKENS)).abs().max() <= FP32_LOGITS
    assert "perplexity" in shell.inside("evaluate", f"run=full-{family}").out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_over_four_bits_is_merged_into_its_family(
    family: str, shell: Any, folder_of: Callable[[str], Path]
) -> None:
    base = folder_of(family)
    run(shell, family, f"qlora-{family}", "peft=qlora")
    assert shell.inside("generate", f"run=qlora-{family}", "prompt=Add 3 to 4.", "max_new_tokens=4").code == 0
    for merge_into in ("dequantized", "original"):
        dest = shell.folder / f"{merge_into}-{family}"
        done = shell.inside("merge", f"run=qlora-{family}", f"dest={dest}", f"merge_into={merge_into}")
        assert done.code == 0, done.err
        merged = logits_of_transformers(dest, TOKENS)
        assert (logits_here(dest, TOKENS) - merged).abs().max() <= FP32_LOGITS
    adapted = logits_here(base, TOKENS, adapter=shell.folder / f"qlora-{family}" / "adapter")
    assert (adapted - merged).abs().max() <= FP32_LOGITS
    assert (logits_here(base, TOKENS) - merged).abs().max() > FP32_LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_from_an_adapter_of_its_family(family: str, shell: Any, folder_of: Callable[[str], Path]) -> None:
    """It begins with the loss that the adapter's run ended with, over the same four bits."""
    folder_of(family)
    before = run(shell, family, f"first-{family}", "peft=qlora", "peft.lora_attn_modules=[q_proj,v_proj]")
    words = ["train.max_steps=3", "train.num_samples=0", "logger=none", f"out=second-{family}", *shell.data]
    done = shell.inside(f"adapter=first-{family}/adapter", *words)
    assert done.code == 0, done.err
    after = json.loads((shell.folder / f"second-{family}" / "summary.json").read_text())
    # What is stacked in a checkpoint is added in another order: an ulp of the loss.
    assert after["val_loss_before"] == pytest.approx(before["val_loss"], rel=1e-6)
    assert after["trainable_params"] == before["trainable_params"]
    assert after["val_loss"] < after["val_loss_before"]


PROMPTS = ("Add 3 to 4.", "Once upon a time there was", "a")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_file_are_continued_as_by_transformers(
    family: str, shell: Any, folder_of: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = folder_of(family), shell.folder / f"prompts-{family}.jsonl"
    file.write_text("\n".join(json.dumps({"id": number, "prompt": text}) for number, text in enumerate(PROMPTS)))
    words = [f"model.path={family}", f"prompts={file.name}", "chat=false", "max_new_tokens=64", "batch_size=2"]
    done = shell.inside("generate", *words)
    assert (done.code, done.err) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == list(enumerate(PROMPTS))
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        theirs = model.generate(
            ids, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
        )
        assert row["reply"] == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert len({row["reply"] for row in rows}) == len(PROMPTS)
