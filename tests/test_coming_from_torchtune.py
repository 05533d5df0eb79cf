"""docs/coming_from_torchtune.md says what the commands say, and every word of ours in it composes."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

import tuner
from tuner.__main__ import VERBS
from tuner.config import check, compose
from tuner.config.folder import options_of
from tuner.config.torchtune.commands import RECIPES, command_problems
from tuner.config.torchtune.commands import VERBS as THEIR_VERBS
from tuner.config.torchtune.keys import KEYS, answer, row_of
from tuner.config.torchtune.words import as_said, value_of
from tuner.errors import ConfigError

PAGE = (Path(tuner.__file__).parents[1] / "docs" / "coming_from_torchtune.md").read_text(encoding="utf-8")
SPAN = re.compile(r"`([^`]+)`")


def rows(title: str) -> list[list[str]]:
    """The cells of the tables under a heading, without the heads."""
    section = re.split(r"\n## ", PAGE.partition(f"\n## {title}\n")[2])[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| torchtune |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


KEY_ROWS = [(SPAN.findall(row[0])[0], row) for row in rows("Keys")]
GROUPS = ("model", "data", "peft", "precision", "optimizer", "schedule", "logger")
NEEDS = {
    "optimizer.momentum": ["optimizer=sgd"],
    "optimizer.nesterov": ["optimizer=sgd"],
    "logger.project": ["logger=wandb"],
    "logger.entity": ["logger=wandb"],
    "logger.tags": ["logger=wandb"],
    "logger.mode": ["logger=wandb"],
    "data.path": ["data=alpaca"],
}
"""Keys that only another option of their group has."""


@cache
def composed(words: tuple[str, ...]) -> DictConfig:
    return compose(words)


@pytest.mark.parametrize(("word", "row"), KEY_ROWS, ids=[word for word, _ in KEY_ROWS])
def test_a_row_is_what_the_command_line_answers(word: str, row: list[str]) -> None:
    key, _, text = word.partition("=")
    found = answer(key, value_of(text))
    assert found is not None
    ours, note = row[1], row[2] if len(row) > 2 else ""
    assert (ours, note.rstrip("| ").strip()) == (f"`{as_said(found)}`" if found.words else "-", found.note)
    said = shlex.split(as_said(found))
    options = tuple(word for word in said if word.partition("=")[0] in GROUPS)
    assert all(option.partition("=")[2] in options_of(option.partition("=")[0]) for option in options)
    for name in (word.partition("=")[0] for word in said if word not in options):
        config = composed((*options, *NEEDS.get(name, [])))
        parent, _, last = name.rpartition(".")
        assert last in list(OmegaConf.select(config, parent) if parent else config), name


def test_the_page_has_every_row_of_the_table() -> None:
    shown = {row_of(word.partition("=")[0]) for word, _ in KEY_ROWS}
    assert shown == set(KEYS)


def test_what_the_page_shows_together_passes_every_check() -> None:
    """The words of rows that fit one run, in one run."""
    told = {word: answer(word.partition("=")[0], value_of(word.partition("=")[2])) for word, _ in KEY_ROWS}
    chosen = [
        f"model._component_={'torchtune.models.llama2.lora_llama2_7b'}",
        "model.lora_rank=16",
        "model.lora_alpha=32",
        "model.lora_dropout=0.05",
        "model.lora_attn_modules=[q_proj,v_proj]",
        "batch_size=4",
        "epochs=3",
        "gradient_accumulation_steps=8",
        "clip_grad_norm=null",
        "dtype=bf16",
        "dataset._component_=torchtune.datasets.alpaca_dataset",
        "dataset.data_files=mine.jsonl",
        "optimizer._component_=bitsandbytes.optim.PagedAdamW8bit",
        "optimizer.lr=3e-4",
        "optimizer.betas=[0.9,0.95]",
        "lr_scheduler.num_warmup_steps=100",
        "enable_activation_checkpointing=True",
        "tokenizer.max_seq_len=null",
        "metric_logger._component_=torchtune.training.metric_logging.WandBLogger",
        "metric_logger.project=mine",
        "log_every_n_steps=5",
        "save_every_n_steps=50",
        "output_dir=runs/one",
    ]
    words = [said for word in chosen for said in shlex.split(as_said(told[word]))]  # type: ignore[arg-type]
    check(compose(words))


CONFIG_ROWS = [(SPAN.findall(row[0])[0], SPAN.findall(row[1])[0]) for row in rows("Configs")]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "ours"), CONFIG_ROWS, ids=[config for config, _ in CONFIG_ROWS])
def test_a_config_is_an_experiment_or_the_words_beside_it(config: str, ours: str) -> None:
    (line,) = command_problems(["--config", config])
    is_experiment = config in options_of("experiment")
    assert f"say python -m tuner {f'experiment={config}' if is_experiment else ours} (" in line
    words = dict(word.split("=") for word in ours.split())
    assert all(option in options_of(group) for group, option in words.items())
    if is_experiment:
        theirs, mine = compose([f"experiment={config}"]), compose(ours.split())
        for group in words:
            assert theirs[group]._target_ == mine[group]._target_
        assert theirs.model.num_hidden_layers == mine.model.num_hidden_layers


def test_the_seeds_of_the_list_are_there() -> None:
    assert len(CONFIG_ROWS) >= 40
    for model in ("llama2/7B", "code_llama2/7B", "llama3/8B", "mistral/7B", "gemma/2B", "gemma/7B", "phi3/mini"):
        for method in ("lora", "qlora"):
            assert f"{model}_{method}_single_device" in dict(CONFIG_ROWS)


def test_the_page_names_every_recipe_and_command() -> None:
    recipes = {SPAN.findall(row[0])[0]: row[1] for row in rows("Recipes")}
    assert set(recipes) == set(RECIPES)
    assert all(recipes[name] == (why or "a run: `python -m tuner experiment=NAME`") for name, why in RECIPES.items())
    commands = [SPAN.findall(row[0])[0].split()[1] for row in rows("Commands")]
    assert set(commands) == {*THEIR_VERBS, "run"}


def our_commands() -> list[list[str]]:
    """Words of every command of ours on the page, in a code block or within a line."""
    block = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
    spans = [span for span in SPAN.findall(PAGE) if span.startswith(("python -m tuner", "tuner "))]
    return [shlex.split(line.removeprefix("python -m ").removeprefix("tuner")) for line in [*block, *spans]]


@pytest.mark.parametrize("words", our_commands(), ids=" ".join)
def test_a_command_of_ours_is_one(words: list[str]) -> None:
    """Its verb is one and its words compose, those apart that stand for what a person chooses."""
    if command_problems(words) or any(word.startswith("dtype=") for word in words):
        return  # shown as what is answered
    verb, rest = (words[0], words[1:]) if words[:1] and words[0] in VERBS else ("run", words)
    if verb in ("run", "validate"):
        keyed = [word for word in rest if "=" in word and "," not in word and not word.startswith(PLACEHOLDERS)]
        check(compose(keyed))


PLACEHOLDERS = ("experiment=", "key=")


def test_what_the_page_says_is_answered_is() -> None:
    shown = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")][:3]
    assert shown[0].startswith("python -m tuner dtype=bf16 ")
    with pytest.raises(ConfigError, match="torchtune's name"):
        compose(shlex.split(shown[0])[3:])
    for line in shown[1:]:
        assert command_problems(shlex.split(line.removeprefix("python -m "))[1:])
