"""Writing merged weights holds one of them at a time: anonymous memory of a fresh process, pages of files aside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

WRITING = """
import json, sys, threading
from pathlib import Path

import torch

from tuner.build import UNQUANTIZED, load_base
from tuner.models.llama import LlamaConfig
from tuner.peft.lora import LoRA
from tuner.quantization.nf4 import NF4
from tuner.results import plain_tensors, save_model
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer

folder, dtype, quantized = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "nf4"
shape = {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
config = LlamaConfig.from_hugging_face({**shape, "num_attention_heads": 12, "num_key_value_heads": 4}, None)
quantization = NF4(block_size=64, double_quant=True) if quantized else UNQUANTIZED
model = load_base(config, dtype, torch.device("cpu"), 0, quantization)
LoRA("lora", 8, 16, 0.0, ["q_proj", "k_proj", "v_proj", "output_proj"], True, False, False).adapt(model)
write_tiny_tokenizer(folder / "tokenizer")
tokenizer = load_tokenizer(folder / "tokenizer")


def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def sample():
    while not ended.wait(0.001):
        seen.append(anonymous())


sizes = [part.shape.numel() * 4 / 2**20 for parts in plain_tensors(model).values() for part in parts]
seen, ended, before = [], threading.Event(), anonymous()
sampler = threading.Thread(target=sample, daemon=True)
sampler.start()
save_model(model, tokenizer, folder / "model")
ended.set()
sampler.join()
written = (folder / "model" / "model.safetensors").stat().st_size / 2**20
print(json.dumps({"peak": max(seen) - before, "largest": max(sizes), "written": written}))
"""


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "nf4")])
def test_anonymous_memory_of_writing_a_merged_model(dtype: str, quantization: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITING, str(tmp_path), dtype, quantization]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["written"] > 140
    assert found["peak"] <= found["largest"], found  # that of 16384 x 768 in fp32, 48 MiB
