"""torchtune's words on our command line: each gets the words to use here, as one line, before anything is loaded."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from tuner.__main__ import VERBS, dispatch, reported
from tuner.config import check, compose, conf_dir
from tuner.config.folder import options_of
from tuner.config.torchtune.answers import Answer
from tuner.config.torchtune.commands import RECIPES, command_problems
from tuner.config.torchtune.keys import KEYS, answer
from tuner.config.torchtune.words import rendered, sentence_for, value_of
from tuner.errors import ConfigError

LLAMA = "torchtune.models.llama2"
SAID = [
    ("dtype=bf16", "precision=bf16"),
    ("dtype=fp32", "precision=fp32"),
    ("cudnn_deterministic_mode=warn", "train.deterministic=true"),
    ("cudnn_deterministic_mode=2", "train.deterministic=true"),
    ("batch_size=4", "train.batch_size=4"),
    ("+batch_size=4", "train.batch_size=4"),
    ("epochs=3", "train.epochs=3 train.max_steps=null"),
    ("gradient_accumulation_steps=8", "train.gradient_accumulation_steps=8"),
    ("compile=True", "train.compile=true"),
    ("clip_grad_norm=null", "train.clip_grad_norm=null"),
    ("output_dir=/tmp/a b", "'out=/tmp/a b'"),
    ("log_every_n_steps=5", "train.log_every_steps=5"),
    ("enable_activation_checkpointing=True", "memory.activation_checkpointing=full"),
    ("checkpointer.checkpoint_dir=/tmp/llama", "model.path=/tmp/llama"),
    ("tokenizer.max_seq_len=2048", "data.max_seq_len=2048"),
    ("dataset.packed=True", "data.packing=pack"),
    ("model.lora_rank=16", "peft.lora_rank=16"),
    ("model.lora_attn_modules=['q_proj','v_proj']", "'peft.lora_attn_modules=[q_proj,v_proj]'"),
    (f"model._component_={LLAMA}.lora_llama2_7b", "model=llama2_7b peft=lora"),
    (f"model._component_={LLAMA}.qlora_llama2_13b", "model=llama2_13b peft=qlora"),
    (f"model={LLAMA}.llama2_7b", "model=llama2_7b peft=full"),
    ("model._component_=torchtune.models.qwen3.lora_qwen3_0_6b_instruct", "model=qwen3_0_6b peft=lora"),
    ("model.quantize_base=True", "peft=qlora"),
    ("save_adapter_weights_only=True", "checkpoint.save_merged=false"),
    ("save_adapter_weights_only=False", "checkpoint.save_merged=true"),
    ("optimizer._component_=torch.optim.AdamW", "optimizer=adamw"),
    ("optimizer=torch.optim.SGD", "optimizer=sgd"),
    ("optimizer._component_=bitsandbytes.optim.PagedAdamW8bit", "optimizer=paged_adamw8bit"),
    ("optimizer._component_=torch.optim.Adafactor", "optimizer=adafactor"),
    ("optimizer._component_=bitsandbytes.optim.PagedLion8bit", "optimizer=paged_lion8bit"),
    ("optimizer._component_=torchao.optim.AdamW8bit", "optimizer=adamw8bit"),
    (
        "optimizer._component_=torchao.prototype.low_bit_optim.CPUOffloadOptimizer",
        "optimizer=adamw memory.offload_optimizer=true",
    ),
    ("optimizer.offload_gradients=True", "memory.optimizer_in_bwd=true"),
    ("optimizer._component_=torch.optim.RAdam", "optimizer=custom optimizer._target_=torch.optim.RAdam"),
    ("lr_scheduler.num_warmup_steps=100", "schedule.warmup_steps=100"),
    ("metric_logger=torchtune.training.metric_logging.WandBLogger", "logger=wandb"),
    ("dataset._component_=torchtune.datasets.alpaca_cleaned_dataset", "data=alpaca"),
    ("enable_activation_offloading=True", "memory.activation_offloading=true"),
    ("optimizer_in_bwd=True", "memory.optimizer_in_bwd=true"),
]
EXPLAINED = [
    ("resume_from_checkpoint=True", "the same command with out=FOLDER, the run folder, goes on"),
    ("profiler.wait_steps=5", "no profiler"),
    ("tokenizer.path=/tmp/tokenizer.model", "leave it out: the tokenizer is that of the model's folder"),
    ("loss._component_=torchtune.modules.loss.LinearCrossEntropyLoss", "leave it out: cross-entropy in chunks"),
    ("model._component_=torchtune.models.llama3_2_vision.lora_llama3_2_vision_11b", "no such model here"),
    ("device=mps", "no such device"),
]


@pytest.mark.parametrize(("word", "ours"), SAID, ids=[word for word, _ in SAID])
def test_a_word_with_a_counterpart_gets_it(word: str, ours: str) -> None:
    sentence = sentence_for(word)
    assert sentence is not None
    assert sentence.partition(" (")[0] == f"{word}: torchtune's name; say {ours}"
    for said in shlex.split(ours):
        assert sentence_for(said) is None, "ours is not answered as torchtune's"


@pytest.mark.parametrize(("word", "why"), EXPLAINED, ids=[word for word, _ in EXPLAINED])
def test_a_word_without_one_gets_the_reason(word: str, why: str) -> None:
    assert why in str(sentence_for(word))


def test_words_of_neither_are_left_to_the_other_checks() -> None:
    words = [
        "nonsense=1",
        "peft.lora_rank=4",
        "train.batch_size=4",
        "model=llama2_7b",
        "optimizer=adamw",
        "seed=3",
        "x",
    ]
    assert [sentence_for(word) for word in words] == [None] * len(words)
    assert sentence_for("epochs=3", {"model", "prompt"}.__contains__) is None, "a command without `train`"


@pytest.mark.parametrize(
    "value", ["", "[", "{a: ", "a: b: c", "'", "- 1", "&x", "*x", "!!python/object:os.system x", "0x", "~"]
)
def test_any_text_is_a_value(value: str) -> None:
    for key in KEYS:
        assert isinstance(answer(key, value_of(value)), Answer)


VALUES = [None, True, False, 0, 3, 0.5, "", "x", "torch.optim.Adam", [], ["a"], {}, {"a": 1}]


@pytest.mark.parametrize("key", KEYS)
def test_every_row_answers_every_value_with_something_to_read(key: str) -> None:
    for value in VALUES:
        found = answer(key, value)
        assert found is not None
        assert found.words or found.note, "an answer without words and without a reason says nothing"


def test_what_is_said_to_be_absent_is_absent() -> None:
    """When one of these comes to be a key here, its row has to name it."""
    ours = {key for file in conf_dir().rglob("*.yaml") for key in yaml.safe_load(file.read_text()) or {}}
    assert "activation_checkpointing" in ours
    assert not ours & {
        "train_on_input",
        "column_map",
    }


def test_all_problems_are_told_together_and_each_in_one_line() -> None:
    with pytest.raises(ConfigError) as raised:
        compose(["dtype=bf16", "batch_size=4", "nonsense=1", "optimizer._component_=torch.optim.AdamW"])
    assert [line.partition(":")[0] for line in raised.value.problems] == [
        "dtype=bf16",
        "batch_size=4",
        "nonsense=1",
        "optimizer._component_=torch.optim.AdamW",
    ]


COMMANDS = [
    ("tune run lora_finetune_single_device --config llama2/7B_lora_single_device", "llama2/7B_lora_single_device"),
    ("run lora_finetune_single_device --config=llama2/7B_qlora_single_device", "llama2/7B_qlora_single_device"),
    ("lora_finetune_single_device --config gemma/2B_lora_single_device", "gemma/2B_lora_single_device"),
    ("--config phi3/mini_qlora_single_device", "phi3/mini_qlora_single_device"),
    ("tune run full_finetune_single_device --config mistral/7B_full_low_memory", "mistral/7B_full_low_memory"),
    ("validate --config code_llama2/7B_lora_single_device", "code_llama2/7B_lora_single_device"),
    ("--config llama3_2/3B_lora_single_device", "llama3_2/3B_lora_single_device"),
]


@pytest.mark.parametrize(("line", "config"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_a_command_becomes_one_that_composes(line: str, config: str) -> None:
    extra = ["batch_size=4", "seed=5", "checkpointer.checkpoint_dir=FOLDER", "log_level=INFO"]
    first, second = command_problems([*line.split(), *extra])
    assert second.startswith("log_level=INFO: torchtune's name; no such key here")
    said = shlex.split(first.partition("say python -m tuner ")[2].removeprefix("validate "))
    assert said[-3:] == ["train.batch_size=4", "seed=5", "model.path=FOLDER"]
    assert ("experiment=" + config in said) == (config in options_of("experiment"))
    composed = compose(said[:-1])
    assert (composed.train.batch_size, composed.seed) == (4, 5)
    check(composed)


@pytest.mark.parametrize("lengths", [["epochs=2", "max_steps_per_epoch=10"], ["max_steps_per_epoch=10", "epochs=2"]])
def test_a_limit_of_steps_holds_over_epochs(lengths: list[str]) -> None:
    line, told = command_problems(["--config", "llama2/7B_lora_single_device", *lengths])
    words = shlex.split(line.partition("say python -m tuner ")[2].partition(" (")[0])
    assert words[-2:] == ["train.epochs=null", "train.max_steps=10"]
    assert "optimizer steps of the whole run, so times the epochs" in told


def test_every_experiment_is_found_by_its_name() -> None:
    for name in sorted(options_of("experiment")):
        (line,) = command_problems(["--config", name])
        assert f"say python -m tuner experiment={name} (" in line


REFUSED = [
    ("tune run --nproc_per_node 2 lora_finetune_distributed --config llama2/7B_lora", "trains on several devices"),
    ("tune run lora_dpo_single_device --config llama2/7B_lora_dpo_single_device", "preference tuning"),
    ("tune run qat_single_device --config llama2/1B_qat", "no quantization-aware training"),
    ("run knowledge_distillation_single_device --config x", "there is no distillation"),
    ("run eleuther_eval --config eleuther_evaluation", "python -m tuner evaluate run=FOLDER"),
    ("tune run generate --config generation", "python -m tuner generate run=FOLDER"),
    ("tune run my_recipe.py --config mine.yaml", "my_recipe.py: no recipe of torchtune's known here"),
    ("--config mine.yaml", "python -m tuner cp --from-torchtune mine.yaml experiment/mine.yaml"),
    ("--config llama2/70B_lora", "no experiment here"),
    ("--config", "say python -m tuner experiment=NAME"),
    ("run lora_finetune_single_device", "say python -m tuner experiment=NAME"),
    ("tune", "here they are those of `tuner --help`"),
    ("tune ls", "python -m tuner ls experiment"),
    ("tune cp llama2/7B_full ./mine.yaml", "python -m tuner cp NAME DEST"),
    ("tune validate mine.yaml", "python -m tuner validate experiment=NAME"),
    ("validate mine.yaml", "python -m tuner validate experiment=NAME"),
    ("tune download ORG/NAME --output-dir x", "model.source=ORG/NAME"),
    ("download meta-llama/Llama-2-7b-hf --output-dir x", "say python -m tuner download meta-llama/Llama-2-7b-hf"),
]


@pytest.mark.parametrize(("line", "why"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_command_that_is_no_run_says_what_to_do(line: str, why: str) -> None:
    (problem,) = command_problems(line.split())
    assert why in problem


def test_our_own_commands_are_not_taken_for_torchtunes() -> None:
    lines = [[verb] for verb in VERBS] + [
        ["run", "peft=lora"],
        ["run", "-m", "seed=1,2"],
        ["generate", "prompt=--config"],
        ["--config-dir", "x", "seed=1"],
        ["--config-name", "x"],
        ["validate", "experiment=x.yaml"],
        ["download", "ORG/NAME"],
        ["cp", "config", "mine.yaml"],
        [],
    ]
    assert [command_problems(line) for line in lines] == [[]] * len(lines)
    assert set(RECIPES) & set(VERBS) == {"generate"}


def command(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = reported(lambda: dispatch(words), False)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["batch_size=4"], "say train.batch_size=4"),
        (["--cfg", "job", "dtype=bf16"], "say precision=bf16"),
        (["validate", "dtype=bf16"], "say precision=bf16"),
        (["-m", "batch_size=2,4"], "say train.batch_size=2"),
        (["-m", "seed=1,2", "optimizer._component_=torch.optim.AdamW"], "say optimizer=adamw"),
        (["--config", "llama2/7B_lora_single_device"], "torchtune's command; say python -m tuner "),
        (["tune", "ls"], "torchtune's command"),
        (["generate", "prompt=a", "dtype=bf16"], "say precision=bf16"),
        (["generate", "prompt=a", "epochs=3"], "epochs=3: no such key"),
    ],
)
def test_the_command_line_answers(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_a_process_answers_without_importing_torch(tmp_path: Path) -> None:
    words = ["tune", "run", "lora_finetune_single_device", "--config", "llama2/7B_lora_single_device", "batch_size=4"]
    code = (
        "import sys\nsys.argv[1:] = {}\nfrom tuner.__main__ import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    for line in (words, ["dtype=bf16"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(line)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (done.returncode, done.stdout) == (2, "False\n")
        assert "train.batch_size=4" in done.stderr or "precision=bf16" in done.stderr


def test_a_value_is_rendered_as_hydra_reads_it_back() -> None:
    for key, value in [
        ("train.clip_grad_norm", None),
        ("peft.lora_attn_modules", ["q_proj", "v_proj"]),
        ("peft.apply_lora_to_mlp", True),
        ("optimizer.lr", 3e-4),
        ("out", "runs/a b: (c)"),
    ]:
        group, _, name = key.rpartition(".")
        composed = compose([rendered(key, value)])
        assert (composed[group][name] if group else composed[name]) == value
