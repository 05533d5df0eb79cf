"""What is refused, in the words a person reads: each row is words and the sentences they get."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tuner.config import check, compose
from tuner.config.composition import config_loader, load, plain, without_hydra
from tuner.config.rules import RULES, broken_rules, facts_of
from tuner.errors import ConfigError

UNKNOWN_LORA = "peft.lora_rnk=4: no such key; did you mean lora_rank"
REFUSED: list[tuple[list[str], list[str]]] = [
    (["peft.lora_rnk=4"], [UNKNOWN_LORA]),
    (["+peft.lora_rnk=4"], [UNKNOWN_LORA]),
    (["optimzer=adamw"], ["optimzer=adamw: no such key; did you mean optimizer?"]),
    (["optimizer=adamww"], ["optimizer=adamww: no such option; did you mean adamw"]),
    (["train.max_step=1"], ["train.max_step=1: no such key; did you mean max_steps?"]),
    (["+train.max_step=1"], ["train.max_step=1: no such key; did you mean max_steps?"]),
    (["+a.b=1"], ['a={"b": 1}: no such key; valid: checkpoint, data']),
    (["~peft.lora_rank"], ["peft.lora_rank: missing; expected a whole number > 0"]),
    (["~logger"], ["logger: missing; expected a member of a config group"]),
    (["model=null"], ["model=null: "]),
    (["train=3"], ["train=3: expected a group of keys"]),
    (["peft.lora_rank=0"], ["peft.lora_rank=0: expected a whole number > 0"]),
    (["peft.lora_rank=2.5"], ["peft.lora_rank=2.5: expected a whole number > 0"]),
    (["peft.lora_rank=true"], ["peft.lora_rank=true: expected a whole number > 0"]),
    (["peft.lora_attn_modules=[wq]"], ['peft.lora_attn_modules=["wq"]: expected a list, each item one of q_proj']),
    (["optimizer.lr=-1"], ["optimizer.lr=-1: expected a number > 0"]),
    (["optimizer.lr=fast"], ["optimizer.lr=fast: expected a number > 0"]),
    (["optimizer.lr=nan"], ["optimizer.lr=NaN: expected a number > 0"]),
    (["device=tpu"], ["device=tpu: expected one of auto, cpu, cuda"]),
    (["out=null"], ["out=null: expected text"]),
    (["seed=a"], ["seed=a: expected a whole number >= 0"]),
    (["data=alpaca"], ["data.path: needs a value, as data.path=...; expected text"]),
    (["optimizer=custom"], ["optimizer._target_=???: needs a value"]),
    (["out=${nowhere}"], ["out: Interpolation key 'nowhere' not found"]),
    (["seed=[1"], ["seed=[1: cannot be read as key=value"]),
    (["seed=1,2"], ["Ambiguous value for argument 'seed=1,2'"]),
    (["memory.activation_checkpointing=half"], ["expected true or false or one of none, full"]),
    # every problem of one command is shown at once, those of composing and those of the check
    (
        ["peft.lora_rnk=4", "optimizer=adamww", "optimizer.lr=-1", "seed=true"],
        [UNKNOWN_LORA, "optimizer=adamww: no such option", "optimizer.lr=-1: expected", "seed=true: expected"],
    ),
    (["model.path=/nowhere"], ["model.path=/nowhere: no such folder"]),
]
RULE_ROWS = [
    ("out_is_named", ["out="], "expected the name of a run folder"),
    ("qlora_needs_quantization", ["peft=qlora", "quantization=none"], "say peft=lora for"),
    ("full_needs_dense_weights", ["peft=full", "quantization=nf4"], "cannot be trained; say peft=qlora"),
    ("lora_adapts_something", ["peft.lora_attn_modules=[]", "peft.apply_lora_to_mlp=false"], "name at least one of"),
    ("output_lora_on_tied_embeddings", ["peft.apply_lora_to_output=true"], "is its embedding matrix"),
    ("lora_rank_within_matrix", ["peft.lora_rank=193"], "side of an adapted matrix, 192; valid: 1 to 192"),
    ("full_trains_what_it_computes_with", ["peft=full", "precision.trainable=bf16"], "say precision=bf16, or"),
    ("warmup_within_run", ["schedule.warmup_steps=61"], "61: longer than the run, train.max_steps=60"),
    ("steps_or_epochs", ["train.epochs=3"], "say train.max_steps=null train.epochs=N, or"),
    ("sequence_within_context", ["data.max_seq_len=8193"], "longer than the model's context, 8192 tokens"),
]
ACCEPTED = [
    [],
    ["peft=qlora"],
    ["peft=qlora", "quantization=nf4"],
    ["peft=full"],
    ["peft=lora", "quantization=nf4"],
    ["optimizer=paged_adamw8bit"],
    ["peft.lora_rank=192"],
    ["peft.lora_rank=193", "peft.lora_attn_modules=[q_proj]"],
    ["peft.apply_lora_to_output=true", "model=llama2_7b"],
    ["schedule.warmup_steps=60"],
    ["schedule.warmup_steps=61", "train.max_steps=null", "train.epochs=1"],
    ["optimizer.lr=1"],
    ["memory.activation_checkpointing=true"],
    ["memory.activation_checkpointing=full"],
    ["optimizer=custom", "optimizer._target_=torch.optim.RAdam", "+optimizer.eps=1e-7"],
    ["optimizer=custom", "optimizer._target_=bitsandbytes.optim.Lion8bit"],
    ["logger=many"],
    ["logger=many", "~logger.loggers.tensorboard"],
    ["train.clip_grad_norm=null", "train.val_every_steps=null"],
]


def problems(words: list[str]) -> list[str]:
    """As the command line finds them: those of composing together with those of the check."""
    with pytest.raises(ConfigError) as caught:
        check(without_hydra(load(config_loader(), words, command="Run")))
    return caught.value.problems


@pytest.mark.parametrize(("words", "sentences"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_refused(words: list[str], sentences: list[str]) -> None:
    found = problems(words)
    assert len(found) == len(sentences), found
    for sentence in sentences:
        assert sum(sentence in problem for problem in found) == 1, found
    assert not any("\n" in problem for problem in found)


@pytest.mark.parametrize("words", ACCEPTED, ids=" ".join)
def test_accepted(words: list[str]) -> None:
    check(compose(words))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.optim.optimizer.torch.os.system",
        "torch.optim.lr_scheduler",
        "tuner.__main__.main",
        "tuner.verbs.cp.cp",
        "tuner.train.run",
        "tuner.optimizers.adamw.torch",
        "tuner.optimizers.adamw.torch.os.system",
        "tuner.optimizers.nope.Nope",
        "hydra.utils.call",
    ],
)
def test_a_configuration_builds_nothing_that_is_not_allowed(target: str) -> None:
    config = plain(compose(["model=tiny"]))
    config["optimizer"]["_target_"] = target
    config["data"]["extra"] = [{"deep": [{"_target_": target, "command": "true"}]}]
    config["_target_"] = target
    with pytest.raises(ConfigError) as caught:
        check(config)
    for place in ("_target_", "optimizer._target_", "data.extra.0.deep.0._target_"):
        assert sum(problem.startswith(f"{place}={target}: ") for problem in caught.value.problems) == 1


def test_what_a_person_trusts_may_be_built() -> None:
    words = ["optimizer=custom", "optimizer._target_=my_package.optimizers.Mine"]
    assert any("trust_targets" in problem for problem in problems(words))
    check(compose([*words, "trust_targets=[my_package]"]))
    assert problems([*words, "trust_targets=[my_pack]"])


@pytest.mark.parametrize(("name", "words", "sentence"), RULE_ROWS, ids=[row[0] for row in RULE_ROWS])
def test_rule(name: str, words: list[str], sentence: str) -> None:
    assert [rule.name for rule, _ in broken_rules(facts_of(plain(compose(words))))] == [name]
    (problem,) = problems(words)
    assert sentence in problem


def test_every_rule_has_a_row() -> None:
    assert [row[0] for row in RULE_ROWS] == [rule.name for rule in RULES]


def test_a_rule_is_not_judged_by_values_that_are_wrong_in_themselves() -> None:
    assert len(problems(["schedule.warmup_steps=soon", "peft.lora_rank=many"])) == 2


def folder(tmp_path: Path, **changes: Any) -> str:
    shape = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps({**shape, **changes}))
    return f"model.path={tmp_path}"


def test_rules_read_the_shape_of_a_folder_and_not_the_keys_it_replaces(tmp_path: Path) -> None:
    check(compose([folder(tmp_path), "data.max_seq_len=128", "peft.lora_rank=32"]))
    assert "model's context, 128 tokens" in problems([folder(tmp_path), "data.max_seq_len=129"])[0]
    assert (
        "adapted matrix, 16;"
        in problems([folder(tmp_path, num_key_value_heads=2), "data.max_seq_len=9", "peft.lora_rank=17"])[0]
    )


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "no config.json in it" in problems([f"model.path={tmp_path}"])[0]
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in problems([f"model.path={tmp_path}"])[0]


def test_checking_takes_milliseconds() -> None:
    config = plain(compose())
    check(config)
    start = time.perf_counter()
    for _ in range(10):
        check(config)
    assert (time.perf_counter() - start) / 10 < 0.05, "about 5 ms on a quiet machine"


@pytest.mark.parametrize("data", ["messages", "alpaca"])
def test_the_tiny_model_takes_every_dataset_s_default_length(data: str) -> None:
    check(compose(["model=tiny", f"data={data}", "data.path=some.jsonl"]))
