"""Every combination of techniques trains and goes on bit for bit, or is refused by a rule before anything is built.

Method, quantization and precision meet in full, and with them everything in pairs. What has to be refused is said here
a second time, by the names of the rules, so that neither a rule too many nor one too few goes by.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import tuner.train
from tests.checkpoint.bitwise import assert_bitwise
from tests.pairwise import Conflict, Row, all_pairs, covering, is_possible, pairs
from tuner import compose, run
from tuner.checkpoint.folder import checkpoints_of
from tuner.config import conf_dir
from tuner.config.checking import problems_of
from tuner.errors import ConfigError
from tuner.fit import Parts
from tuner.peft.token_rows import TokenRows

STEPS = 4
WHOLE = ("full", "last_layers")
WITHOUT_B = (*WHOLE, "ia3", "layernorm")
NO_ROWS = ("ia3", "layernorm")

METHODS = {
    "full": ["peft=full"],
    "lora": ["peft=lora"],
    "rslora": ["peft=rslora", "peft.lora_dropout=0.1"],
    "qlora": ["peft=qlora"],
    "dora": ["peft=dora"],
    "pissa": ["peft=pissa"],
    "olora": ["peft=olora"],
    "ia3": ["peft=ia3"],
    "layernorm": ["peft=layernorm"],
    "last_layers": ["peft=last_layers", "peft.num_layers=1"],
    "adapter": ["adapter={adapter}"],
}
QUANTIZATIONS = {name: [f"quantization={name}"] for name in ("none", "nf4", "fp4", "int8")}
PRECISIONS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "bf16_stochastic": ["precision=bf16_stochastic"],
    "amp_bf16": ["precision=amp_bf16"],
    "amp_fp16": ["precision=amp_fp16", "precision.initial_loss_scale=1024"],
}
RATES = {
    "adafactor": 0.01,
    "adam8bit": 0.003,
    "adamw": 0.003,
    "adamw8bit": 0.003,
    "ademamix8bit": 0.001,
    "custom": 0.003,
    "lion8bit": 0.001,
    "muon": 0.003,
    "paged_adamw": 0.003,
    "paged_adamw8bit": 0.003,
    "paged_ademamix8bit": 0.001,
    "paged_lion8bit": 0.001,
    "sgd": 0.1,
}
CUSTOM = ["optimizer._target_=torch.optim.NAdam"]
SMALLER = ["model.hidden_size=64", "model.intermediate_size=160", "model.num_hidden_layers=2"]
SMALLER += ["model.num_attention_heads=4", "model.num_key_value_heads=2"]
CHOICES: dict[str, dict[str, list[str]]] = {
    "method": METHODS,
    "quantization": QUANTIZATIONS,
    "precision": PRECISIONS,
    "trainable": {name: [f"precision.trainable={name}"] for name in ("auto", "bf16", "fp32")},
    "optimizer": {
        name: [f"optimizer={name}", f"optimizer.lr={lr}", *(CUSTOM if name == "custom" else [])]
        for name, lr in RATES.items()
    },
    "memory": {
        "default": ["memory=default"],
        "low": ["memory=low"],
        "selective": ["memory.activation_checkpointing=selective"],
        "full": ["memory.activation_checkpointing=true"],
        "in backward": ["memory.optimizer_in_bwd=true"],
        "both": ["memory=low", "memory.optimizer_in_bwd=true"],
        "activations on the host": ["memory.activation_offloading=true"],
        "optimizer on the host": ["memory.offload_optimizer=true"],
        "products on the host": ["memory.activation_offloading=true", "memory.activation_checkpointing=selective"],
    },
    "clipping": {
        "whole": ["train.clip_grad_norm=1.0"],
        "each": ["train.clip_grad_norm=null", "train.clip_grad_norm_per_parameter=1.0"],
        "none": ["train.clip_grad_norm=null"],
        "twice": ["train.clip_grad_norm=1.0", "train.clip_grad_norm_per_parameter=1.0"],
    },
    "accumulation": {str(n): [f"train.gradient_accumulation_steps={n}"] for n in (1, 2)},
    "not finite": {name: [f"train.on_nonfinite={name}"] for name in ("stop", "skip")},
    "rows": {"padded": [], "packed": ["data.packing=pack"]},
    "groups": {
        "one": [],
        "loraplus": ["optimizer.loraplus_lr_ratio=2"],
        "no_decay": ["optimizer.no_decay=[norms,biases,embeddings]"],
    },
    "tokens": {"known": [], "new": ["model.add_tokens=['<|tool|>']"]},
    "family": {
        "llama": ["model=tiny"],
        "qwen2": ["model=qwen2_0_5b", "+scale=tiny", *SMALLER],  # biases, a tied head
        # capped scores, alternating windows, norms behind blocks
        "gemma2": ["model=gemma2_2b", "+scale=tiny", *SMALLER, "model.head_dim=16", "model.query_pre_attn_scalar=16"],
    },
}
PAGED = [name for name in RATES if name.startswith("paged")]
PACKED = [name for name in QUANTIZATIONS if name != "none"]
ADAPTERS = [name for name in METHODS if name not in WHOLE]
IN_BACKWARD = ("in backward", "both")
CONFLICTS = (
    Conflict("full_needs_dense_weights", {"method": ["full"], "quantization": PACKED}),
    Conflict("last_layers_need_dense_weights", {"method": ["last_layers"], "quantization": PACKED}),
    Conflict("qlora_needs_quantization", {"method": ["qlora"], "quantization": ["none"]}),
    Conflict("full_trains_what_it_computes_with", {"method": WHOLE, "precision": ["fp32"], "trainable": ["bf16"]}),
    Conflict("full_trains_what_it_computes_with", {"method": WHOLE, "precision": ["bf16"], "trainable": ["fp32"]}),
    Conflict("something_is_rounded", {"method": ADAPTERS, "precision": ["bf16_stochastic"], "trainable": ["auto"]}),
    Conflict(
        "numbers_around_one_are_in_fp32",
        {"method": NO_ROWS, "precision": ["fp32", "bf16"], "trainable": ["bf16"]},
    ),
    Conflict("precision.trainable", {"precision": ["bf16_stochastic"], "trainable": ["fp32"]}),
    Conflict("precision.trainable", {"precision": ["amp_bf16", "amp_fp16"], "trainable": ["bf16"]}),
    Conflict("activations_are_moved_from_a_gpu", {"memory": ["activations on the host", "products on the host"]}),
    Conflict("state_is_moved_from_a_gpu", {"memory": ["optimizer on the host"]}),
    Conflict("pages_are_moved_already", {"memory": ["optimizer on the host"], "optimizer": PAGED}),
    Conflict("what_is_kept_is_moved", {"memory": ["products on the host"]}),
    Conflict("one_backward_pass_a_step", {"memory": IN_BACKWARD, "accumulation": ["2"]}),
    Conflict("global_norm_needs_all_gradients", {"memory": IN_BACKWARD, "clipping": ["whole", "twice"]}),
    Conflict("steps_in_backward_stand", {"memory": IN_BACKWARD, "not finite": ["skip"]}),
    Conflict("scale_is_taken_out_before_a_step", {"memory": IN_BACKWARD, "precision": ["amp_fp16"]}),
    Conflict("one_way_to_clip", {"clipping": ["twice"]}),
    Conflict("muon_needs_matrices", {"optimizer": ["muon"], "method": NO_ROWS}),
    Conflict("loraplus_needs_adapters", {"groups": ["loraplus"], "method": WITHOUT_B}),
    Conflict("rows_of_new_tokens_have_a_place", {"tokens": ["new"], "method": NO_ROWS}),
    Conflict("adapter_brings_its_tokens", {"tokens": ["new"], "method": ["adapter"]}),
)
GROUPS = {"method": "peft", "quantization": "quantization", "precision": "precision", "optimizer": "optimizer"}
NUMBERS = [f"train.max_steps={STEPS}", "train.val_every_steps=null", "train.num_samples=0", "train.num_threads=1"]
OFTEN = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", "logger=none", "device=cpu", "schedule=constant"]
FULLY = ("method", "quantization", "precision")


AXES = {axis: list(choices) for axis, choices in CHOICES.items()}
FULL = (dict(zip(FULLY, each, strict=True)) for each in itertools.product(*(AXES[axis] for axis in FULLY)))
ROWS = covering(AXES, CONFLICTS, FULL)

NORMS = r"norm\.weight$"
LORA = (r"\.adapters\.default\.[AB]$",)
MOVES = {
    "full": ("",),
    **dict.fromkeys(("lora", "rslora", "qlora", "pissa", "olora", "adapter"), LORA),
    "dora": (*LORA, r"\.adapters\.default\.magnitude$"),
    "ia3": (r"\.scaling\.vector$",),
    "layernorm": (NORMS, r"proj\.bias$", r"\.bias_part\.bias$"),
    "last_layers": (r"\.layers\.1\.", r"^model\.norm\.weight$"),
}
NEW_ROWS = (r"\.rows$",)


def expected(row: Row) -> set[str]:
    return {conflict.name for conflict in CONFLICTS if conflict.is_in(row)}


def named(row: Row) -> str:
    return "-".join(row[axis] for axis in CHOICES)


def words_of(row: Row, adapter: str) -> list[str]:
    return [word.format(adapter=adapter) for axis, choices in CHOICES.items() for word in choices[row[axis]]]


def test_every_member_is_a_choice() -> None:
    for axis, group in GROUPS.items():
        assert set(CHOICES[axis]) == {file.stem for file in (conf_dir() / group).glob("*.yaml")}, group


def test_what_can_go_together_meets_where_nothing_is_refused() -> None:
    met = {pair for row in ROWS if not expected(row) for pair in pairs(row)}
    assert met == {pair for pair in all_pairs(AXES) if is_possible(dict(pair), AXES, CONFLICTS)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"messages": [{"role": "user", "content": f"<|tool|> {i}."}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(20)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=messages", f"data.path={folder / 'sums.jsonl'}", "data.val_fraction=0.2", "train.batch_size=2"]
    return [*words, "data.max_seq_len=96", f"data.cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="module")
def adapters(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An adapter folder for a model of each family."""
    folder = tmp_path_factory.mktemp("adapters")
    for family, model in CHOICES["family"].items():
        run(compose([*model, *data, *NUMBERS, "logger=none", "train.max_steps=1", f"out={folder / family}"]))
    return {family: str(folder / family / "adapter") for family in CHOICES["family"]}


class Watched:
    """Runs, and what their models were like when they began.

    Attributes:
        before: parameters and buffers by name, of the last run.
        model: of the last run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare = tuner.train.prepare

        def noting(*args: Any) -> Parts:
            parts = prepare(*args)
            self.model = parts.state.model
            self.before = {name: tensor.detach().clone() for name, tensor in tensors_of(self.model)}
            return parts

        monkeypatch.setattr(tuner.train, "prepare", noting)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; of a matrix with rows of new tokens, which it has copies of, the others."""
    matrices = {f"{name}.weight": module.ids for name, module in model.named_modules() if isinstance(module, TokenRows)}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        yield name, tensor.index_fill(0, matrices[name], 0) if name in matrices else tensor


def trains(row: Row, name: str) -> bool:
    """Whether a parameter is one of those that the method of a row is said to train."""
    return any(re.search(pattern, name) for pattern in (*MOVES[row["method"]], *NEW_ROWS * (row["tokens"] == "new")))


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=named(row)) for row in ROWS])
def test_it_trains_and_goes_on_or_is_refused(
    row: Row, data: list[str], adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words_of(row, adapters[row["family"]]), *data, *NUMBERS, *OFTEN]
    if expected(row):
        assert_refused(row, [*words, f"out={tmp_path / 'out'}"], monkeypatch)
        return
    watched = Watched(monkeypatch)
    cfg = compose([*words, f"out={tmp_path / 'whole'}"])
    whole = run(cfg)
    assert whole.status == "finished"
    assert whole.val_loss < whole.val_loss_before
    after = dict(tensors_of(watched.model))
    moved = {name for name, tensor in watched.before.items() if not torch.equal(tensor, after[name])}
    trained = {name for name in watched.before if trains(row, name)}
    assert moved
    if whole.trainable_dtype == "bfloat16":
        assert moved <= trained  # small updates are lost, or not yet there
    else:
        assert moved == trained

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for gone in ("summary.json", "adapter", "model", "checkpoints/step-00000004"):
        forget(tmp_path / "again" / gone)
    cfg.out = str(tmp_path / "again")
    again = run(cfg)
    assert (again.val_loss, again.train_loss) == (whole.val_loss, whole.train_loss)
    assert_bitwise(saved_in(tmp_path / "again"), saved_in(tmp_path / "whole"))


def assert_refused(row: Row, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With just the reasons that are said here, before anything is built, and by `validate` too."""
    monkeypatch.setattr(tuner.train, "prepare", lambda *args: pytest.fail("built what is refused"))
    cfg = compose(words)
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    found = problems_of(config)
    assert {problem.rule or problem.sentence.partition("=")[0] for problem in found} == expected(row)
    with pytest.raises(ConfigError) as caught:
        run(cfg)
    assert caught.value.problems == [problem.sentence for problem in found]


def forget(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def saved_in(out: Path) -> dict[str, Any]:
    """All of its last checkpoint but the time that it took."""
    last = checkpoints_of(out)[-1]
    training = torch.load(last / "training.pt", weights_only=True)
    del training["seconds"]
    return {"training": training, "weights": load_file(last / "trainable.safetensors"), "name": last.name}
