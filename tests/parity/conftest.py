"""Random models made and saved by transformers, and texts and batches to run both implementations on."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.types import IGNORE, Batch

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "initializer_range": 0.15,  # large enough that attention and gates leave their linear range
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices of 48 columns gain nothing from threads, and on a busy machine they wait for each other for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`family_folder("gemma", hidden_size=40, ...)`: a folder that transformers wrote, with changed keys of SHAPE."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def folder(family: str, **changed: Any) -> Path:
        key = f"{family} {sorted(changed.items())!r}"
        if key not in made:
            torch.manual_seed(zlib.crc32(key.encode()))  # the same weights, whichever tests run
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **changed}))
            with torch.no_grad():  # zero biases and norms of one would hide whether they are used at all
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def llama_folder(family_folder: Callable[..., Path]) -> Callable[..., Path]:
    """`llama_folder(hidden_size=40, ...)`."""
    return partial(family_folder, "llama")


@pytest.fixture(scope="session")
def reference() -> Callable[..., Any]:
    """transformers' model of a folder, with its plainest attention."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()

    return load


@pytest.fixture(scope="session")
def padded() -> Callable[..., tuple[Batch, Tensor]]:
    """Rows of different lengths, right-padded, some labels ignored; with transformers' attention mask."""

    def make(vocab_size: int, lengths: tuple[int, ...] = (33, 7, 21, 1), seed: int = 5) -> tuple[Batch, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths))
        tokens = torch.randint(0, vocab_size, shape, generator=generator)
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        prompt = torch.rand(shape, generator=generator) < 0.3
        labels = tokens.masked_fill(~mask | prompt, IGNORE)
        return Batch(tokens, labels, lengths), mask

    return make
