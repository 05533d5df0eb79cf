"""An adapter that PEFT made and saved: evaluated, generated from, merged and trained further by the commands."""

from __future__ import annotations

import json
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tuner.config import compose
from tuner.data.alpaca import Alpaca
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer

pytestmark = pytest.mark.slow

STEPS = ["train.max_steps=3", "train.num_samples=0", "train.num_threads=1", "logger=none", "optimizer.lr=0.01"]
LOSS = 1e-5  # of about 6: fp32 sums in another order


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tied Llama as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=352, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rsLoRA, a rank and an alpha pattern, norms and a head of its own on the tied base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 5},
        alpha_pattern={"1.self_attn.v_proj": 3},
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["lm_head", "norm"],
    )
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("made")
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(base: Path, shell: Any) -> Callable[..., float]:
    """The validation loss of a model of transformers, with an adapter as PEFT loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = compose(shell.data).data
    keys = {key: value for key, value in data.items() if not key.startswith("_")}
    samples = Alpaca(**keys).load(load_tokenizer(base)).validation

    @torch.no_grad()
    def loss(model: Path, adapter: Path | None = None) -> float:
        with warnings.catch_warnings(action="ignore"):
            found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            found = (PeftModel.from_pretrained(found, adapter) if adapter else found).eval()
        total, count = 0.0, 0
        for sample in samples:
            logits = found(torch.tensor([list(sample.tokens)])).logits[0, :-1]
            labels = torch.tensor(list(sample.labels))[1:]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
        return total / count

    return loss


def loss_of(done: Any) -> float:
    assert (done.code, done.err) == (0, "")
    (loss,) = re.findall(r"^val_loss: (.*)$", done.out, re.MULTILINE)
    return float(loss)


def trained(shell: Any, out: str, *words: str) -> dict[str, Any]:
    done = shell.inside(*shell.data, *STEPS, f"out={out}", *words)
    assert (done.code, done.err) == (0, "")
    summary: dict[str, Any] = json.loads((shell.folder / out / "summary.json").read_text())
    assert summary["status"] == "finished"
    return summary


@pytest.fixture(scope="module")
def run(shell: Any, made: Path) -> dict[str, Any]:
    """The summary of a run that started from the adapter."""
    return trained(shell, "run", f"adapter={made}", "logger=mlflow")


def test_evaluate(shell: Any, base: Path, made: Path, theirs: Callable[..., float]) -> None:
    assert loss_of(shell.inside("evaluate", f"adapter={made}", *shell.data)) == pytest.approx(
        theirs(base, made), abs=LOSS
    )
    assert abs(theirs(base, made) - theirs(base)) > 0.05


def test_generate(shell: Any, base: Path, made: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = [f"adapter={made}", "prompt=Add 3 to 4.", "chat=false", "max_new_tokens=12"]
    done = shell.inside("generate", *words)
    assert (done.code, done.err) == (0, "")
    tokenizer = load_tokenizer(base)
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made).eval()
    prompt = torch.tensor([tokenizer.encode("Add 3 to 4.")])
    ids = model.generate(
        input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0
    )
    text = tokenizer.decode(ids[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)
    assert text.strip() == done.out.strip() != ""


@pytest.mark.parametrize("words", [[], ["quantization=nf4"], ["quantization=nf4", "merge_into=original"]], ids=" ".join)
def test_merge(shell: Any, made: Path, tmp_path: Path, words: list[str], theirs: Callable[..., float]) -> None:
    done = shell.inside("merge", f"adapter={made}", f"dest={tmp_path}/merged", *words)
    assert (done.code, done.err) == (0, "")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    base = words[:1] if len(words) == 1 else []  # merged into the original, it is what it was without quantization
    expected = loss_of(shell.inside("evaluate", f"adapter={made}", *shell.data, *base))
    assert theirs(tmp_path / "merged") == pytest.approx(expected, abs=LOSS)


def test_a_run_starts_where_the_adapter_is_and_leaves_one_for_peft(
    shell: Any, run: dict[str, Any], base: Path, made: Path, theirs: Callable[..., float]
) -> None:
    evaluated = loss_of(shell.inside("evaluate", f"adapter={made}", *shell.data))
    assert run["val_loss_before"] == pytest.approx(evaluated, abs=1e-6)
    assert run["val_loss"] < run["val_loss_before"]
    adapter = shell.folder / "run" / "adapter"
    assert theirs(base, adapter) == pytest.approx(run["val_loss"], abs=LOSS)
    assert loss_of(shell.inside("evaluate", "run=run")) == pytest.approx(run["val_loss"], abs=1e-6)
    checkpoint = next((shell.folder / "run" / "checkpoints").glob("step-*"))
    assert loss_of(shell.inside("evaluate", f"checkpoint={checkpoint}")) == pytest.approx(run["val_loss"], abs=1e-6)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (made, adapter))
    assert before.keys() == after.keys()
    assert run["trainable_params"] == sum(tensor.numel() for tensor in before.values())
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.usefixtures("run")
def test_the_record_says_what_was_trained(shell: Any, base: Path, made: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = yaml.safe_load((shell.folder / "run" / "config.yaml").read_text())
    assert config["adapter"] == str(made)
    assert config["model"]["path"] == str(base)
    assert config["peft"] == {"_target_": "tuner.peft.adapter.FromAdapter", "name": "adapter", "path": str(made)}
    client = MlflowClient(config["logger"]["tracking_uri"])
    run_id = json.loads((shell.folder / "run" / "summary.json").read_text())["mlflow_run_id"]
    params = client.get_run(run_id).data.params
    assert {key: value for key, value in params.items() if key.startswith(("peft.", "adapter"))} == {
        "adapter": str(made),
        "peft._target_": "tuner.peft.adapter.FromAdapter",
        "peft.name": "adapter",
        "peft.path": str(made),
    }
    assert f"path {made}" in " ".join((shell.folder / "run" / "run.log").read_text().replace("│", " ").split())


@pytest.mark.parametrize("words", [[], ["quantization=nf4"]], ids=" ".join)
def test_validate_counts_what_will_train(shell: Any, run: dict[str, Any], made: Path, words: list[str]) -> None:
    done = shell.inside("validate", f"adapter={made}", *words)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"total_params: {run['total_params']}\ntrainable_params: {run['trainable_params']}\n"


def test_an_adapter_on_the_head_of_a_tied_model_trains(shell: Any, base: Path, theirs: Callable[..., float]) -> None:
    """Not begun here on a tied model, but continued: head and embedding are two then."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["lm_head"]))
        model.save_pretrained(shell.folder / "on head")
    summary = trained(shell, "head", "adapter='on head'")
    assert summary["val_loss"] < summary["val_loss_before"]
    assert theirs(base, shell.folder / "head" / "adapter") == pytest.approx(summary["val_loss"], abs=LOSS)
    done = shell.inside("merge", "run=head", "dest=merged head")
    assert (done.code, done.err) == (0, "")
    assert theirs(shell.folder / "merged head") == pytest.approx(summary["val_loss"], abs=LOSS)


def test_the_base_is_quantized_as_it_was_unless_the_words_say_otherwise(shell: Any, made: Path) -> None:
    first = trained(shell, "nf4", f"adapter={made}", "quantization=nf4", "quantization.block_size=32", "precision=bf16")
    assert first["trainable_dtype"] == "bfloat16+float32"  # the head and the norms are computed with as they are
    further = trained(shell, "nf4 again", "adapter=nf4/adapter")
    config = yaml.safe_load((shell.folder / "nf4 again" / "config.yaml").read_text())
    assert (config["quantization"]["block_size"], config["precision"]["_target_"]) == (32, "tuner.precision.bf16.bf16")
    assert further["val_loss_before"] == pytest.approx(first["val_loss"], abs=1e-6)
    other = trained(shell, "nf4 not again", "adapter=nf4/adapter", "quantization=none")
    assert other["val_loss_before"] != further["val_loss_before"]


def test_killed_and_continued_is_never_stopped(shell: Any, made: Path) -> None:
    words = [*shell.data, *STEPS[1:], "train.max_steps=50", "train.val_every_steps=null", f"adapter={made}"]
    assert shell.inside(*words, "out=whole").code == 0
    again = [*words, "out=killed", "checkpoint.every_steps=5"]
    assert shell.at_step(shell.start(*again), "killed", 6, [signal.SIGKILL]).code == -signal.SIGKILL
    resumed = shell.inside(*again)
    assert (resumed.code, "resumed at step " in resumed.out) == (0, True)
    whole, killed = (
        load_file(shell.folder / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())


def changed(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "no adapter_config.json, so this is no adapter folder"),
    "no settings": (without("adapter_config.json"), "no adapter_config.json, so this is no adapter folder"),
    "no weights": (without("adapter_model.safetensors"), "adapter_model.safetensors: "),
    "another kind": (changed(peft_type="LOHA"), "peft_type=LOHA is not supported; valid: LORA, IA3, LN_TUNING"),
    "(IA)³ with ranks": (changed(peft_type="IA3"), "r, rank_pattern, use_rslora cannot be loaded here"),
    "DoRA without magnitudes": (
        changed(use_dora=True),
        "layers.0.self_attn.v_proj.lora_magnitude_vector is missing, which use_dora wants",
    ),
    "biases": (changed(bias="all"), "bias=all is not supported; valid: none"),
    "base away": (changed(base_model_name_or_path="nowhere"), "its base nowhere is no folder here and no name on the"),
    "not its base": (
        changed(base_model_name_or_path=None),
        "its base None is no folder here and no name on the Hugging Face Hub; say model.path=FOLDER",
    ),
    "another rank": (changed(r=4), "model.layers.0.self_attn.v_proj has rank 16 where adapter_config.json says 4"),
    "fewer modules": (changed(modules_to_save=["norm"]), "lm_head.weight is of no module it could replace"),
}


@pytest.mark.parametrize("command", [[], ["evaluate"]], ids=["run", "evaluate"])
@pytest.mark.parametrize(("damage", "part"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_loaded(
    shell: Any, made: Path, tmp_path: Path, damage: Callable[[Path], None], part: str, command: list[str]
) -> None:
    folder = shutil.copytree(made, tmp_path / "adapter")
    damage(folder)
    words = ["out=never", *STEPS] if not command else []
    assert_refused(shell, shell.inside(*command, f"adapter={folder}", *shell.data, *words), str(folder), part)


def test_an_adapter_of_another_model(shell: Any, made: Path) -> None:
    words = [*shell.data, "out=never", *STEPS, "model=tiny"]
    done = shell.inside(*words, f"adapter={made}")
    parts = ("model.layers.1.mlp.down_proj is made for another size", "model.layers.0.self_attn.v_proj is made for")
    assert_refused(shell, done, "does not fit the model", *parts)


WORDS = [
    (["peft.lora_rank=4"], "peft.lora_rank=4 adapter={made}: the adapter brings its own"),
    (["++peft.more=1"], "++peft.more=1 adapter={made}: the adapter brings its own"),
    (["peft=full"], "peft=... adapter={made}: the adapter brings its own method"),
    (
        ["peft=qlora"],
        "peft=... adapter={made}: the adapter brings its own method; leave out peft=... ",
    ),
    (["precision=bf16", "precision.trainable=fp32"], "precision.trainable=fp32 precision=bf16 an adapter with modules"),
]


@pytest.mark.parametrize(("words", "said"), WORDS, ids=[" ".join(words) for words, _ in WORDS])
def test_words_that_do_not_go_with_an_adapter(shell: Any, made: Path, words: list[str], said: str) -> None:
    done = shell.inside(*shell.data, *STEPS, f"adapter={made}", "out=never", *words)
    assert_refused(shell, done, said.format(made=made))


def assert_refused(shell: Any, done: Any, *parts: str) -> None:
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert all(part in done.err for part in parts), done.err
    assert not (shell.folder / "never").exists()
