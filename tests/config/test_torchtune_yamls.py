"""A torchtune YAML translated into an experiment: it composes, it means the same, and every key is accounted for."""

from __future__ import annotations

import importlib
import inspect
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from tuner.config import check, compose
from tuner.config.torchtune.components import OPTIMIZERS
from tuner.config.torchtune.keys import KEYS, LEAVES
from tuner.config.torchtune.writing import translate
from tuner.errors import ConfigError
from tuner.quiet import import_bitsandbytes
from tuner.verbs.from_torchtune import copy_or_translate

YAMLS = Path(__file__).parent / "torchtune"
NAMES = sorted(file.stem for file in YAMLS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tree_of(name: str) -> dict[str, Any]:
    return dict(OmegaConf.to_container(OmegaConf.load(YAMLS / f"{name}.yaml")))  # type: ignore[arg-type]


def leaves(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, Mapping) or not node:
        return [path]
    return [leaf for key, child in node.items() for leaf in leaves(child, f"{path}.{key}" if path else str(key))]


def translated(tree: Mapping[str, Any], *words: str) -> tuple[DictConfig, str, str]:
    """What a YAML of this content composes to with `words`, the text of the preset and what was printed."""
    Path("theirs.yaml").write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    Path("experiment/ours.yaml").unlink(missing_ok=True)
    printed = translate("theirs.yaml", "experiment/ours.yaml")
    composed = compose(["experiment=ours", *words], config_dir=".")
    check(composed)
    return composed, Path("experiment/ours.yaml").read_text(), printed


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """A YAML with keys set, dots written as two underscores; None takes a key away."""
    node = OmegaConf.create(tree_of(name))
    for key, value in changes.items():
        if value is None:
            parent, _, last = key.replace("__", ".").rpartition(".")
            (OmegaConf.select(node, parent) if parent else node).pop(last)
        else:
            OmegaConf.update(node, key.replace("__", "."), value, merge=False)
    return dict(OmegaConf.to_container(node))  # type: ignore[arg-type]


EXPECTED = {
    "llama2_7B_lora": {
        "model.num_hidden_layers": 32,
        "model.path": None,
        "peft.name": "lora",
        "peft.lora_rank": 16,
        "peft.lora_alpha": 32,
        "peft.lora_dropout": 0.05,
        "peft.lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "peft.apply_lora_to_mlp": True,
        "quantization._target_": "tuner.quantization.none.NoQuantization",
        "precision._target_": "tuner.precision.bf16.bf16",
        "optimizer._target_": "tuner.optimizers.adamw.adamw",
        "optimizer.lr": 3e-4,
        "schedule._target_": "tuner.schedules.cosine.Cosine",
        "schedule.warmup_steps": 100,
        "memory.activation_checkpointing": "full",
        "memory.activation_offloading": True,
        "data._target_": "tuner.data.alpaca.Alpaca",
        "data.path": "alpaca-cleaned.jsonl",
        "data.max_seq_len": 2048,
        "train.batch_size": 2,
        "train.gradient_accumulation_steps": 8,
        "train.epochs": 3,
        "train.max_steps": None,
        "checkpoint.save_merged": True,
        "train.clip_grad_norm": None,
        "train.log_every_steps": 5,
        "train.val_every_steps": None,
        "logger._target_": "tuner.logging.none.NoLogger",
        "out": "/tmp/torchtune/llama2_7B/lora_single_device",
        "seed": 42,
        "device": "cuda",
    },
    "gemma2_2B_qlora": {
        "model._target_": "tuner.models.gemma2.Gemma2Config",
        "peft.name": "qlora",
        "peft.lora_rank": 64,
        "peft.apply_lora_to_mlp": False,
        "peft.lora_dropout": 0.0,
        "quantization._target_": "tuner.quantization.nf4.NF4",
        "optimizer._target_": "tuner.optimizers.paged_adamw8bit.paged_adamw8bit",
        "data._target_": "tuner.data.messages.Messages",
        "data.path": "chats.json",
        "data.max_seq_len": 8192,
        "train.max_steps": 40,
        "train.epochs": None,
        "train.clip_grad_norm": 0.5,
        "checkpoint.save_merged": False,
        "schedule.warmup_steps": 40,
        "logger._target_": "tuner.logging.wandb.WandbLogger",
        "logger.project": "gemma",
        "seed": 0,
        "device": "cpu",
    },
    "llama3_2_1B_full": {
        "model.hidden_size": 2048,
        "model.rope_scaling.factor": 32.0,
        "peft._target_": "tuner.peft.full.Full",
        "precision._target_": "tuner.precision.fp32.fp32",
        "optimizer._target_": "tuner.optimizers.sgd.sgd",
        "optimizer.momentum": 0.0,
        "schedule._target_": "tuner.schedules.constant.Constant",
        "data.path": "data/mine.jsonl",
        "data.max_seq_len": 131072,
        "train.compile": True,
        "checkpoint.save_merged": True,
        "train.clip_grad_norm": None,
        "memory.activation_checkpointing": "none",
        "memory.optimizer_in_bwd": True,
        "logger._target_": "tuner.logging.tensorboard.TensorBoardLogger",
    },
    "strange": {
        "model.hidden_size": 1536,
        "peft.name": "qlora",
        "optimizer._target_": "torch.optim.NAdam",
        "optimizer.momentum_decay": 0.004,
        "data.path": "samsum.jsonl",
        "device": "auto",
        "out": "runs/strange",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_means_the_same_here(name: str) -> None:
    composed, _, _ = translated(tree_of(name))
    found = {key: OmegaConf.select(composed, key) for key in EXPECTED[name]}
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_the_yaml_is_named_in_the_preset(name: str) -> None:
    _, text, _ = translated(tree_of(name))
    for key in leaves(tree_of(name)):
        shown = next((known for known in (*LEAVES, "profiler") if key.startswith(f"{known}.")), key)
        assert f"{shown}: " in text, key


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_is_in_the_terminal_and_in_the_file(name: str) -> None:
    _, text, printed = translated(tree_of(name))
    listed = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert listed
    assert all(f"#   {line}\n" in text for line in listed)


def test_nothing_strange_is_dropped_in_silence() -> None:
    _, _, printed = translated(tree_of("strange"))
    for key in (
        "model.flux_capacitor",
        "tokenizer.path",
        "tokenizer.prompt_template",
        "checkpointer._component_",
        "checkpointer.adapter_checkpoint",
        "checkpointer.output_dir",
        "resume_from_checkpoint",
        "dataset._component_",
        "dataset.source",
        "dataset.split",
        "dataset.column_map",
        "shuffle",
        "lr_scheduler._component_",
        "lr_scheduler.teeth",
        "loss._component_",
        "loss.gamma",
        "device",
        "metric_logger._component_",
        "metric_logger.workspace",
        "profiler",
        "warp_factor",
    ):
        assert f"  {key}: " in printed, key


def test_known_keys_are_all_found_in_one_yaml_or_another() -> None:
    """The test inputs hold most of the table; what they do not is in the page's table, which has a test of its own."""
    used = {key for name in NAMES for key in leaves(tree_of(name))}
    assert len(used & set(KEYS)) > 50


@pytest.mark.slow
def test_the_commands_are_those_that_find_it(tmp_path: Path) -> None:
    places = {
        "conf/experiment/mine.yaml": ["--config-dir", "conf", "experiment=mine"],
        "experiment/llama/mine.yaml": ["--config-dir", ".", "experiment=llama/mine"],
        "sub/mine.yaml": ["--config-dir", ".", "+sub=mine"],
        "sub/experiment/my 2.5B.yaml": ["--config-dir", "sub", "experiment=my 2.5B"],
    }
    (tmp_path / "inside").mkdir()
    places["inside"] = ["--config-dir", ".", "+inside=llama2_7B_lora"]
    for dest, words in places.items():
        file, validate, run, *_ = copy_or_translate(
            "--from-torchtune", str(YAMLS / "llama2_7B_lora.yaml"), dest
        ).splitlines()
        assert Path(file).is_file()
        assert shlex.split(validate) == ["check:", "python", "-m", "tuner", "validate", *words]
        assert shlex.split(run) == ["run:", "python", "-m", "tuner", *words, "model.path=/tmp/Llama-2-7b-hf"]
        check(compose(words[2:], config_dir=words[1]))


def folder(**config: Any) -> Path:
    """A Hugging Face folder as far as its config.json."""
    path = Path("weights")
    path.mkdir(exist_ok=True)
    shape = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    (path / "config.json").write_text(json.dumps(shape | config))
    return path


def test_a_folder_that_is_here_is_in_the_preset() -> None:
    tree = changed("llama2_7B_lora", checkpointer__checkpoint_dir=str(folder()), tokenizer__max_seq_len=None)
    composed, _, printed = translated(tree)
    assert composed.model.path == "weights"
    assert composed.data.max_seq_len == 512, "the context of the folder, not of the named model"
    assert printed.splitlines()[2] == "run:   python -m tuner --config-dir . experiment=ours"


def test_a_size_without_a_config_needs_its_folder() -> None:
    tree = changed("llama2_7B_lora", model___component_="torchtune.models.llama2.lora_llama2_70b")
    with pytest.raises(ConfigError, match="lora_llama2_70b -- no config for this size"):
        translated(tree)
    tree["checkpointer"]["checkpoint_dir"] = str(folder())
    tree["tokenizer"]["max_seq_len"] = 256
    assert translated(tree)[0].model.path == "weights"


def test_metas_files_are_to_be_converted() -> None:
    Path("meta").mkdir()
    Path("meta/params.json").write_text("{}")
    _, _, printed = translated(changed("llama2_7B_lora", checkpointer__checkpoint_dir="meta"))
    assert "python -m tuner convert source=meta dest=NEW, and model.path=NEW" in printed


def test_torchtunes_defaults_hold_where_nothing_is_said() -> None:
    least = {
        "model": {"_component_": "torchtune.models.mistral.lora_mistral_7b", "lora_attn_modules": ["q_proj"]},
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"},
        "optimizer": {"_component_": "torch.optim.SGD"},
        "epochs": 1,
    }
    composed, _, printed = translated(least)
    assert OmegaConf.to_container(composed.peft) == {
        "_target_": "tuner.peft.lora.LoRA",
        "name": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_attn_modules": ["q_proj"],
        "apply_lora_to_mlp": False,
        "apply_lora_to_output": False,
        "use_rslora": False,
    }
    assert (composed.optimizer.lr, composed.optimizer.momentum) == (1e-3, 0.0)
    assert (composed.train.clip_grad_norm, composed.data.max_seq_len) == (None, 32768)
    assert "checkpointer.checkpoint_dir -- not said" in printed


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in OPTIMIZERS if not target.startswith("torchao.")])
def test_defaults_of_an_optimizer_are_those_of_its_class(target: str) -> None:
    """Where none is said: of every key that both have and that the class does not leave open."""
    composed, _, _ = translated(changed("llama2_7B_lora", optimizer={"_component_": target}))
    module, _, name = target.rpartition(".")
    import_bitsandbytes()
    theirs = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    ours = OmegaConf.to_container(composed.optimizer)
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in ours.items()}
    shared = {key for key in said.keys() & theirs.keys() if theirs[key].default is not None}
    assert {key: said[key] for key in shared} == {key: theirs[key].default for key in shared}
    assert shared >= {"lr", "weight_decay"}
    assert said.get("adjust_lr_fn", "original") == "original"  # what the class's null stands for


def test_an_offloaded_optimizer_is_adamw_with_its_state_on_the_host() -> None:
    target = "torchao.prototype.low_bit_optim.CPUOffloadOptimizer"
    optimizer = {"_component_": target, "lr": 1e-4, "offload_gradients": True, "minimal_size": 1024}
    composed, _, printed = translated(changed("llama3_2_1B_full", optimizer=optimizer, device="cuda"))
    assert composed.optimizer._target_ == "tuner.optimizers.adamw.adamw"
    assert composed.optimizer.lr == 1e-4
    assert composed.memory.offload_optimizer is composed.memory.optimizer_in_bwd is True
    assert "CPUOffload" not in printed


def test_of_two_keys_that_differ_the_one_that_is_not_taken_is_listed() -> None:
    composed, text, printed = translated(changed("llama2_7B_lora", dataset__max_seq_len=512))
    assert composed.data.max_seq_len == 512
    assert "  tokenizer.max_seq_len: 2048 -- dataset.max_seq_len: 512 is taken" in printed.splitlines()
    composed, text, printed = translated(changed("llama2_7B_lora", checkpointer__output_dir="elsewhere"))
    assert composed.out == "/tmp/torchtune/llama2_7B/lora_single_device"
    assert "checkpointer.output_dir: elsewhere -- the one run folder is out=" in printed
    assert "elsewhere" in text


def test_a_component_that_is_null_is_none() -> None:
    tree = tree_of("llama2_7B_lora") | {"lr_scheduler": None, "profiler": None}
    composed, text, printed = translated(tree)
    assert composed.schedule._target_ == "tuner.schedules.constant.Constant"
    assert "#   lr_scheduler: null -- none there\n" in text
    assert "lr_scheduler" not in printed
    assert "profiler" not in printed


def test_arguments_of_another_optimizer_are_listed() -> None:
    composed, _, printed = translated(changed("llama2_7B_lora", optimizer__amsgrad=True))
    assert "amsgrad" not in composed.optimizer
    assert "optimizer.amsgrad: true -- optimizer=adamw has no such key" in printed


def test_code_of_another_package_is_trusted_by_the_command_and_not_by_the_file() -> None:
    tree = changed("llama2_7B_lora", optimizer={"_component_": "torchao.optim.AdamW4bit", "lr": 1e-4})
    _, text, printed = translated(tree, "trust_targets=[torchao]")
    assert "'trust_targets=[torchao]'" in printed.splitlines()[1]
    assert "trust_targets" not in yaml.safe_load(text)
    with pytest.raises(ConfigError, match=r"torchao\.optim\.AdamW4bit: not among the classes"):
        check(compose(["experiment=ours"], config_dir="."))


ENDS_OF_LINES = ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0b"]


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS_OF_LINES, ids=[f"U+{ord(end):04X}" for end in ENDS_OF_LINES])
def test_no_text_of_a_yaml_becomes_a_line_of_the_preset(end: str) -> None:
    evil = f"x{end}trust_targets: [os]{end}"
    tree = changed("llama2_7B_lora", output_dir=evil, unknown=evil, tokenizer__path=evil, optimizer__command=evil)
    tree[f"key{evil}"] = 1
    tree["optimizer"][f"lr: 1{end}trust_targets"] = ["os"]
    composed, text, printed = translated(tree)
    assert composed.trust_targets == []
    assert composed.out == evil
    assert set(yaml.safe_load(text)) <= {*composed, "defaults"}
    assert not any(line.startswith("trust") for line in [*text.splitlines(), *printed.splitlines()])


def test_an_interpolation_in_a_text_stays_text() -> None:
    composed, _, _ = translated(changed("llama2_7B_lora", output_dir="runs/\\${seed}"))
    assert composed.out == "runs/${seed}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "quantization"),
    [
        ({}, "none"),
        ({"model__quantize_base": True}, "nf4"),
        ({"model___component_": "torchtune.models.llama2.qlora_llama2_7b"}, "nf4"),
    ],
    ids=["dora", "quantize_base", "qdora"],
)
def test_dora_is_a_method_over_the_base_that_is_asked_for(changes: dict[str, Any], quantization: str) -> None:
    for before in (True, False):  # whichever of the keys stands first
        tree = changed("llama2_7B_lora", **changes)
        model = tree["model"]
        tree["model"] = {"use_dora": True, **model} if before else {**model, "use_dora": True}
        composed, _, printed = translated(tree)
        assert composed.peft._target_ == "tuner.peft.dora.DoRA"
        assert composed.peft.lora_rank == 16
        assert composed.quantization._target_.split(".")[-2] == quantization
        assert "use_dora" not in printed


REFUSED = [
    ({"custom_sharded_layers": ["tok_embeddings"]}, "trains on several devices"),
    ({"fsdp_cpu_offload": False}, "trains on several devices"),
    ({"tensor_parallel_dim": 2}, "trains on several devices"),
    ({"loss___component_": "torchtune.rlhf.loss.DPOLoss"}, "preference tuning"),
    ({"dataset___component_": "torchtune.datasets.stack_exchange_paired_dataset"}, "preference tuning"),
    ({"ppo_epochs": 2}, "reinforcement learning"),
    ({"quantizer": {"_component_": "torchtune.training.quantization.Q"}}, "no quantization-aware training"),
    ({"teacher_model": {"_component_": "torchtune.models.qwen2.qwen2_7b"}}, "no distillation"),
    ({"dataset": [{"_component_": "torchtune.datasets.alpaca_dataset"}]}, "dataset: several at once"),
    ({"dtype": "fp16"}, "dtype: fp16: precision is bf16 or fp32, or amp_fp16 over fp32 weights"),
    ({"optimizer": None}, "no optimizer._component_: no YAML of torchtune's recipes"),
    ({"model___component_": "torchtune.models.llama3_2_vision.lora_llama3_2_vision_11b"}, "no such model here"),
    ({"model___component_": "torchtune.models.mistral.mistral_classifier_7b"}, "no such model here"),
    ({"batch_size": 0}, "train.batch_size=0: expected a whole number > 0"),
    ({"model__lora_rank": 100000}, "larger than the smallest side of an adapted matrix"),
    ({"model__lora_attn_modules": ["wq"]}, "expected a list, each item one of q_proj"),
    ({"output_dir": "${nowhere}"}, "output_dir: Interpolation key 'nowhere' not found"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_cannot_be_translated_is_refused_and_nothing_written(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        translated(changed("llama2_7B_lora", **changes))
    assert all(problem.startswith("theirs.yaml: ") for problem in raised.value.problems)
    assert why in str(raised.value)
    assert not Path("experiment").exists()


DAMAGED = [b"", b"a: [", b"\xff\xfe\x00", b"- 1\n- 2\n", b"just a text", b"a: 1\na: 2\n", b"a: ${b\n", b"\x00"]


@pytest.mark.parametrize("content", DAMAGED, ids=[str(content) for content in DAMAGED])
def test_a_damaged_yaml_is_refused_by_name(content: bytes) -> None:
    Path("theirs.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^theirs\.yaml: "):
        translate("theirs.yaml", "experiment/ours.yaml")
    assert not Path("experiment").exists()


@pytest.mark.parametrize(
    ("dest", "why"),
    [
        ("taken.yaml", "exists and is left as it is"),
        ("mine.yml", "the preset's name ends in .yaml"),
        ("model/mine.yaml", "say model/experiment/mine.yaml"),
        ("my confs/mine.yaml", "say my confs/experiment/mine.yaml"),
        ("taken.yaml/experiment/mine.yaml", "cannot be written"),
    ],
)
def test_a_place_where_it_would_not_be_found_is_refused(dest: str, why: str) -> None:
    Path("taken.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=why):
        translate(str(YAMLS / "llama2_7B_lora.yaml"), dest)
    assert [path.name for path in Path().iterdir()] == ["taken.yaml"]
    assert Path("taken.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "words", [["--from-torchtune", "a.yaml"], ["--from-tortune", "a.yaml", "b.yaml"], ["a", "b", "c"]]
)
def test_cp_says_what_it_takes(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="cp takes NAME DEST, or --from-torchtune FILE DEST"):
        copy_or_translate(*words)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        translate("none.yaml", "experiment/mine.yaml")
