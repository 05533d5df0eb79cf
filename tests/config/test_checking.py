"""What is refused, in the words a person reads: each row is words and the sentences they get."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tuner.config import check, compose
from tuner.config.composition import config_loader, load, plain, without_hydra
from tuner.config.facts import facts_of
from tuner.config.rules import RULES, broken_rules
from tuner.errors import ConfigError

UNKNOWN_LORA = "peft.lora_rnk=4: no such key; did you mean lora_rank"
RADAM = ["optimizer=custom", "optimizer._target_=torch.optim.RAdam"]
REFUSED: list[tuple[list[str], list[str]]] = [
    (["peft.lora_rnk=4"], [UNKNOWN_LORA]),
    (["+peft.lora_rnk=4"], [UNKNOWN_LORA]),
    (["optimzer=adamw"], ["optimzer=adamw: no such key; did you mean optimizer?"]),
    (["optimizer=adamww"], ["optimizer=adamww: no such option; did you mean adamw"]),
    (["train.max_step=1"], ["train.max_step=1: no such key; did you mean max_steps?"]),
    (["+train.max_step=1"], ["train.max_step=1: no such key; did you mean max_steps?"]),
    (["+a.b=1"], ['a={"b": 1}: no such key; valid: adapter, checkpoint, data']),
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
    (["model.add_tokens=<|a|>"], ["model.add_tokens=<|a|>"]),
    (["model.add_tokens=a"], ["model.add_tokens=a: expected a list, each item text"]),
    (["model.add_tokens=[1]"], ["model.add_tokens=[1]: expected a list, each item text"]),
    (["seed=a"], ["seed=a: expected a whole number >= 0"]),
    (
        ["data=alpaca"],
        ["data.path: needs a value, as data.path=FILE, a file, a folder or a pattern"],
    ),
    (["optimizer=custom"], ["optimizer._target_=???: needs a value"]),
    (
        ["optimizer.no_decay=[gates]"],
        ['optimizer.no_decay=["gates"]: expected a list, each item one of norms, biases, e'],
    ),
    (
        [*RADAM, "optimizer.loraplus_lr_ratio=0", "optimizer.no_decay=norms", "optimizer.lr=fast"],
        [
            "optimizer.lr=fast: expected a number > 0",
            "optimizer.loraplus_lr_ratio=0: expected a number > 0 or null",
            "optimizer.no_decay=norms: expected a list, each item one of norms, biases, embeddings",
        ],
    ),
    (["out=${nowhere}"], ["out: Interpolation key 'nowhere' not found"]),
    (["seed=[1"], ["seed=[1: cannot be read as key=value"]),
    (["seed=1,2"], ["Ambiguous value for argument 'seed=1,2'"]),
    (["memory.activation_checkpointing=half"], ["expected true or false or one of none, selective, full"]),
    # every problem of one command is shown at once, those of composing and those of the check
    (
        ["peft.lora_rnk=4", "optimizer=adamww", "optimizer.lr=-1", "seed=true"],
        [UNKNOWN_LORA, "optimizer=adamww: no such option", "optimizer.lr=-1: expected", "seed=true: expected"],
    ),
    (["model.path=/nowhere"], ["model.path=/nowhere: no such folder"]),
]
RULE_ROWS = [
    ("out_is_named", ["out="], "expected the name of a run folder"),
    ("adapter_brings_its_method", ["model=tiny", "adapter=mine", "peft=full"], "peft=... adapter=mine: the adapter"),
    ("adapter_is_named", ["peft=adapter"], "peft=adapter: the adapter needs a value, as adapter=FOLDER"),
    (
        "adapter_is_said_once",
        ["model=tiny", "adapter=mine", "peft=adapter", "peft.path=other"],
        "peft.path=other adapter=mine: two adapters",
    ),
    (
        "one_place_of_weights",
        ["model.path=/nowhere", "model.source=org/tiny"],
        "model.path=/nowhere model.source=org/tiny: a model is in a folder or on the Hugging Face Hub; give one",
    ),
    (
        "random_weights_have_a_tokenizer",
        ["model=tiny", "model.random_tokenizer=null"],
        "random weights need one of the packaged tokenizers",
    ),
    ("source_is_a_repository", ["model.source=a/b/c"], "model.source=a/b/c: expected ORG/NAME"),
    ("revision_of_a_source", ["model.revision=main"], "model.revision=main: of which repository"),
    ("qlora_needs_quantization", ["peft=qlora", "quantization=none"], "say peft=lora for"),
    ("full_needs_dense_weights", ["peft=full", "quantization=nf4"], "cannot be trained; say peft=qlora"),
    (
        "last_layers_need_dense_weights",
        ["peft=last_layers", "quantization=int8"],
        "peft=last_layers quantization=int8: the blocks that train would be packed, which do not train",
    ),
    (
        "last_layers_are_there",
        ["peft=last_layers", "peft.num_layers=31"],
        "peft.num_layers=31: more than the model's 30 blocks; valid: 1 to 30",
    ),
    (
        "ia3_scales_something",
        ["peft=ia3", "peft.attn_modules=[]", "peft.apply_to_mlp=false"],
        "(IA)³ on no module; name at least one of q_proj",
    ),
    (
        "rows_of_new_tokens_have_a_place",
        ["peft=ia3", "model.add_tokens=['<|a|>']"],
        "peft=ia3 model.add_tokens=['<|a|>']: an adapter of this kind has no place for rows of tokens",
    ),
    ("lora_adapts_something", ["peft.lora_attn_modules=[]", "peft.apply_lora_to_mlp=false"], "name at least one of"),
    (
        "output_lora_on_tied_embeddings",
        ["peft=dora", "peft.apply_lora_to_output=true"],
        "peft.apply_lora_to_output=true: this model's output layer is its embedding matrix",
    ),
    (
        "chat_template_is_one",
        ["model.chat_template=chatlm"],
        "model.chat_template=chatlm: valid: null (the model's own)",
    ),
    ("new_tokens_show", ["model.add_tokens=['<|a|>',' ']"], "a token of no characters or of blanks alone"),
    ("new_tokens_differ", ["model.add_tokens=['<|a|>','<|b|>','<|a|>']"], "a token is named twice; name each once"),
    (
        "adapter_brings_its_tokens",
        ["model=tiny", "adapter=mine", "model.add_tokens=['<|a|>']"],
        "model.add_tokens=['<|a|>'] adapter=mine: an adapter's layers and rows",
    ),
    (
        "output_lora_on_new_rows",
        ["model=llama2_7b", "peft.apply_lora_to_output=true", "model.add_tokens=['<|a|>']"],
        "model.add_tokens=['<|a|>']: new rows of the output head train themselves",
    ),
    (
        "packed_rows_hold_a_sample",
        ["data.packing=pack", "data.pack_len=255"],
        "data.pack_len=255 data.max_seq_len=256: a sample is never cut",
    ),
    ("length_of_packed_rows", ["data.pack_len=512"], "data.pack_len=512 data.packing=none: rows have a length"),
    ("lora_rank_within_matrix", ["peft.lora_rank=193"], "side of an adapted matrix, 192; valid: 1 to 192"),
    ("full_trains_what_it_computes_with", ["peft=last_layers", "precision.trainable=bf16"], "say precision=bf16, or"),
    (
        "something_is_rounded",
        ["peft=qlora", "precision=bf16_stochastic", "precision.trainable=auto"],
        "precision=bf16_stochastic peft=lora: precision.trainable=auto keeps adapters in fp32, so there is no update",
    ),
    (
        "numbers_around_one_are_in_fp32",
        ["peft=ia3", "precision.trainable=bf16"],
        "precision.trainable=bf16 peft=ia3: what trains begins at about 1, where bf16 has no number nearer than 1/256",
    ),
    (
        "compiled_layers_choose_themselves",
        ["memory.activation_checkpointing=selective", "train.compile=true"],
        "torch.compile itself chooses what a layer keeps",
    ),
    (
        "activations_are_moved_from_a_gpu",
        ["memory.activation_offloading=true", "device=cpu"],
        "memory.activation_offloading=True device=cpu: activations are in the CPU's memory already",
    ),
    (
        "what_is_kept_is_moved",
        ["memory.activation_offloading=true", "memory.activation_checkpointing=selective"],
        "the products that selective keeps would stay on the GPU",
    ),
    (
        "state_is_moved_from_a_gpu",
        ["memory.offload_optimizer=true", "device=cpu"],
        "memory.offload_optimizer=True device=cpu: the optimizer's state is in the CPU's memory already",
    ),
    (
        "pages_are_moved_already",
        ["memory.offload_optimizer=true", "optimizer=paged_adamw8bit"],
        "memory.offload_optimizer=True optimizer._target_=tuner.optimizers.paged_adamw8bit.paged_adamw8bit: a paged",
    ),
    (
        "one_backward_pass_a_step",
        ["memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "train.gradient_accumulation_steps=2"],
        "memory.optimizer_in_bwd=True train.gradient_accumulation_steps=2: each backward pass steps and frees",
    ),
    (
        "global_norm_needs_all_gradients",
        ["memory.optimizer_in_bwd=true"],
        "memory.optimizer_in_bwd=True train.clip_grad_norm=1.0: the norm of the whole gradient is known when",
    ),
    (
        "steps_in_backward_stand",
        ["memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "train.on_nonfinite=skip"],
        "memory.optimizer_in_bwd=True train.on_nonfinite=skip: a gradient that is not finite may be found when",
    ),
    (
        "what_was_stepped_is_not_done_again",
        ["memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "train.on_oom=retry"],
        "memory.optimizer_in_bwd=True train.on_oom=retry: memory that runs out in backward does so when some",
    ),
    (
        "scale_is_taken_out_before_a_step",
        ["memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "precision=amp_fp16"],
        "memory.optimizer_in_bwd=True precision=amp_fp16: whether the scale of the loss was too large",
    ),
    (
        "one_way_to_clip",
        ["train.clip_grad_norm_per_parameter=0.1"],
        "train.clip_grad_norm=1.0 train.clip_grad_norm_per_parameter=0.1: two ways to clip",
    ),
    (
        "something_is_left",
        ["checkpoint.save_adapter=false"],
        "checkpoint.save_adapter=false checkpoint.save_merged=false peft=lora: the run would leave neither an adapter",
    ),
    (
        "loraplus_needs_adapters",
        ["peft=full", "optimizer.loraplus_lr_ratio=16"],
        "optimizer.loraplus_lr_ratio=16 peft=full: LoRA+ gives the matrices B of adapters another learning rate",
    ),
    (
        "muon_needs_matrices",
        ["peft=layernorm", "optimizer=muon"],
        "optimizer=muon peft=layernorm: Muon steps matrices of blocks and adapters, and none trains",
    ),
    ("warmup_within_run", ["schedule.warmup_steps=61"], "61: longer than the run, train.max_steps=60"),
    ("steps_or_epochs", ["train.epochs=3"], "say train.max_steps=null train.epochs=N, or"),
    (
        "early_stopping_is_before_the_end",
        ["train.early_stopping_patience=3", "train.val_every_steps=null", "train.max_steps=null", "train.epochs=1"],
        "the only evaluation is at the end, so there is nothing to stop early; say train.early_stopping_patience=null",
    ),
    (
        "streaming_counts_steps",
        ["data.streaming=true", "train.max_steps=null", "train.epochs=1"],
        "train.max_steps=None: nobody knows how long an epoch is before it has been read",
    ),
    ("streaming_takes_all", ["data.streaming=true", "data.max_samples=9"], "say data.max_samples=null, with train.max"),
    ("streaming_packs_nothing", ["data.streaming=true", "data.packing=pack"], "say data.packing=none, or data.str"),
    ("data_is_somewhere", ["data=text"], "data.path: needs a value, as data.path=FILE"),
    (
        "one_place_of_data",
        ["data=text", "data.path=a.csv", "data.source=org/texts"],
        "data.path=a.csv data.source=org/texts: data is in files or on the Hugging Face Hub; give one of them",
    ),
    ("data_source_is_a_repository", ["data=text", "data.source=texts"], "data.source=texts: expected ORG/NAME"),
    (
        "one_place_of_validation",
        ["data=text", "data.source=org/texts", "data.val_path=a.csv", "data.val_split=test"],
        "data.val_path=a.csv data.val_split=test: two places to validate on",
    ),
    ("parts_of_a_source", ["data=text", "data.path=a.csv", "data.val_split=test"], "of which dataset? say data.source"),
    ("sequence_within_context", ["data.max_seq_len=8193"], "longer than the model's context, 8192 tokens"),
]
ACCEPTED = [
    [],
    ["peft=qlora"],
    ["peft=qlora", "quantization=nf4"],
    ["peft=full"],
    ["peft=lora", "quantization=nf4"],
    ["peft=qlora", "quantization=int8"],
    ["peft=dora", "quantization=fp4"],
    ["peft=pissa", "peft.svd_iterations=null", "peft.use_rslora=true"],
    ["peft=olora", "quantization=nf4"],
    ["peft=ia3", "quantization=int8"],
    ["peft=layernorm", "model=llama2_7b"],  # a family without biases
    ["peft=last_layers", "peft.num_layers=30", "peft.train_output=true"],
    ["peft=last_layers", "model.add_tokens=['<|a|>']"],
    ["optimizer=paged_adamw8bit"],
    ["peft.lora_rank=192"],
    ["peft.lora_rank=193", "peft.lora_attn_modules=[q_proj]"],
    ["peft.apply_lora_to_output=true", "model=llama2_7b"],
    ["model.add_tokens=['<|a|>','<|/a|>']", "peft=full"],
    ["model.add_tokens=['<|a|>']", "model=llama2_7b"],
    ["checkpoint.save_adapter=false", "checkpoint.save_merged=true"],
    ["checkpoint.save_adapter=false", "peft=full"],
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
    ["train.early_stopping_patience=3", "train.val_every_steps=null"],  # how many epochs 60 steps are is not known
    ["train.early_stopping_patience=3", "train.val_every_steps=null", "train.max_steps=null", "train.epochs=2"],
    ["train.early_stopping_patience=3", "train.max_steps=null", "train.epochs=1"],
    ["data.packing=group"],
    ["data.packing=pack"],
    ["data.packing=pack", "data.pack_len=16384"],  # longer than the context: positions begin again in each document
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


@pytest.fixture
def _adapter(tmp_path: Path) -> None:
    """The settings of an adapter in the folder `mine`."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')


@pytest.mark.usefixtures("_adapter")
@pytest.mark.parametrize(("name", "words", "sentence"), RULE_ROWS, ids=[row[0] for row in RULE_ROWS])
def test_rule(name: str, words: list[str], sentence: str) -> None:
    config = compose(words)
    assert [rule.name for rule, _ in broken_rules(facts_of(plain(config)))] == [name]
    with pytest.raises(ConfigError) as caught:
        check(config)
    (problem,) = caught.value.problems
    assert sentence in problem


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["memory.offload_optimizer=true", "optimizer=custom", "optimizer._target_=bitsandbytes.optim.PagedLion"],
            "memory.offload_optimizer=True optimizer._target_=bitsandbytes.optim.PagedLion: a paged optimizer moves",
        ),
        (["precision=amp_bf16", "precision.trainable=bf16"], "precision.trainable=bf16: expected one of auto, fp32"),
        (["precision=amp_fp16", "precision.trainable=bf16"], "precision.trainable=bf16: expected one of auto, fp32"),
        (["precision=bf16_stochastic", "precision.trainable=fp32"], "expected one of auto, bf16"),
        (["precision=amp_fp16", "precision.initial_loss_scale=0"], "precision.initial_loss_scale=0: expected"),
    ],
)
def test_a_precision_trains_in_the_dtypes_that_it_lists(words: list[str], sentence: str) -> None:
    (problem,) = problems(words)
    assert sentence in problem


@pytest.mark.parametrize(
    "words",
    [
        ["peft=full", "precision=amp_bf16", "precision.trainable=fp32"],
        ["peft=qlora", "precision=amp_fp16"],
        ["peft=full", "precision=bf16_stochastic", "optimizer=adamw8bit"],
        ["peft=full", "precision=bf16_stochastic", "precision.trainable=auto"],
        ["peft=lora", "precision=bf16_stochastic"],
    ],
    ids=" ".join,
)
def test_precisions_go_with_methods(words: list[str]) -> None:
    check(compose(words))


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
    start = time.process_time()
    for _ in range(10):
        check(config)
    assert (time.process_time() - start) / 10 < 0.05, "about 5 ms on a quiet machine"


@pytest.mark.parametrize("data", ["messages", "alpaca", "instruct", "sharegpt", "text"])
def test_the_tiny_model_takes_every_dataset_s_default_length(data: str) -> None:
    check(compose(["model=tiny", f"data={data}", "data.path=some.jsonl"]))
