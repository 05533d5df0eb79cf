"""Every method by the command, over a base in 4 bits where it can: what a run leaves is what it evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tuner.config import conf_dir

METHODS = sorted(file.stem for file in (conf_dir() / "peft").glob("*.yaml") if file.stem != "adapter")
COMMON = ["train.max_steps=4", "train.num_samples=0", "train.num_threads=1", "logger=none", "optimizer.lr=0.01"]


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def evaluated(shell: Any, *words: str) -> float:
    done = shell.inside("evaluate", *words)
    assert done.code == 0, done.err
    return float(next(line for line in done.out.splitlines() if line.startswith("val_loss: ")).split()[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in a folder, with biases, so that transformers has the same."""
    from tuner.models.llama import LlamaConfig
    from tuner.models.random_weights import fill_with_random_weights
    from tuner.models.stored import stored_tensors
    from tuner.models.writing import save_weights
    from tuner.tokenizers.tiny import write_tiny_tokenizer

    folder = tmp_path_factory.mktemp("base")
    shape = {"vocab_size": 352, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False}
    config = LlamaConfig.from_hugging_face({**shape, **more}, None)
    with torch.device("meta"):
        model = config.build()
    fill_with_random_weights(model, torch.float32, torch.device("cpu"), seed=0)
    save_weights(folder, config.to_hugging_face(), stored_tensors(model))
    write_tiny_tokenizer(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:Unsupported layer type")
@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves_is_what_it_evaluated(method: str, shell: Any, base: Path, tmp_path: Path) -> None:
    """By `evaluate`, merged, gone on from as an adapter, and, without 4 bits, in PEFT."""
    out = tmp_path / "run"
    quantized = [] if method in ("full", "last_layers") else ["quantization=nf4"]
    words = [f"model.path={base}", *shell.data, *COMMON]
    done = shell.inside(*words, f"peft={method}", *quantized, f"out={out}")
    assert (done.code, done.err) == (0, "")
    loss = summary(out)["val_loss"]
    assert loss < summary(out)["val_loss_before"]
    assert evaluated(shell, f"run={out}") == loss
    if not quantized:
        assert not (out / "adapter").exists()
        return
    assert shell.inside("merge", f"run={out}", f"dest={tmp_path / 'merged'}").code == 0
    # The merged weights are those of the run to fp32's rounding, and so is the loss, which is near 5.
    merged = [f"model.path={tmp_path / 'merged'}", *shell.data]
    assert evaluated(shell, *merged) == pytest.approx(loss, abs=1e-4)
    further = shell.inside(*words, f"adapter={out / 'adapter'}", f"out={tmp_path / 'further'}")
    assert (further.code, further.err) == (0, "")
    assert summary(tmp_path / "further")["val_loss_before"] == loss
    assert summary(tmp_path / "further")["trainable_params"] == summary(out)["trainable_params"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:Unsupported layer type")
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("full", "last_layers", "qlora")])
def test_what_a_run_leaves_loads_in_peft(method: str, shell: Any, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = shell.inside(f"model.path={base}", *shell.data, *COMMON, f"peft={method}", f"out={tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    folder, tokens = tmp_path / "run" / "adapter", torch.arange(3, 60)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        expected = theirs.eval()(tokens).logits
        ours = tuner.load_model(base, dtype=torch.float32, adapter=folder)(tokens)
        plain = tuner.load_model(base, dtype=torch.float32)(tokens)
    assert (ours - expected).abs().max() <= 1e-4  # fp32, sums in another order
    assert (ours - plain).abs().max() > 1e-3
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
