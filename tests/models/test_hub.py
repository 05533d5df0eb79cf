"""`model.source`: a model of the Hugging Face Hub, from a stand-in on loopback, by the real commands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tuner
from tests.models.hub_commands import NOWHERE, Command
from tests.models.hub_server import Files, HubServer, Repository, serving
from tuner.config import compose
from tuner.config.facts import facts_of
from tuner.errors import ConfigError, ModelError
from tuner.hub import is_commit
from tuner.hub_errors import hub_errors, is_repository
from tuner.tokenizers.tiny import write_tiny_tokenizer

FIRST, SECOND = "a" * 39 + "1", "b" * 39 + "2"
DECOYS = ("pytorch_model.bin", "weights.gguf", "modeling_tiny.py", "README.md", "onnx/model.safetensors", "model.pth")
"""Files that a repository holds too and that are never downloaded."""
SHORT = ["peft.lora_rank=2", "train.max_steps=2", "train.num_samples=0", "train.batch_size=2", "logger=none"]


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Two commits of one repository: the same shape, other weights; the second in several files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = {}
    for seed, (commit, shard) in enumerate({FIRST: "1GB", SECOND: "100KB"}.items()):
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=352, max_position_embeddings=512, **shape))
        folder = tmp_path_factory.mktemp("hub")
        model.save_pretrained(folder, max_shard_size=shard)
        write_tiny_tokenizer(folder)
        made[commit] = {file.name: file.read_bytes() for file in folder.iterdir()}
        made[commit] |= dict.fromkeys((*DECOYS, "consolidated.safetensors"), b"decoy")
    assert "model.safetensors" in made[FIRST]
    assert "model.safetensors.index.json" in made[SECOND]
    return made


@pytest.fixture
def hub(commits: dict[str, Files]) -> Iterator[HubServer]:
    with serving() as server:
        server.repositories["org/tiny"] = Repository(dict(commits), FIRST)
        yield server


@pytest.fixture
def command(hub: HubServer, tmp_path: Path) -> Command:
    return Command(hub, tmp_path / "hf")


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    file = tmp_path / "sums.jsonl"
    rows = [{"instruction": f"Add {i} to {i}.", "input": "", "output": f"{2 * i}"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=alpaca", f"data.path={file}", "data.val_fraction=0.2", *SHORT]


def snapshot_files(tmp_path: Path, commit: str) -> set[str]:
    folder = tmp_path / "hf/hub/models--org--tiny/snapshots" / commit
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def model_keys(out: str) -> dict[str, Any]:
    return dict(yaml.safe_load((Path(out) / "config.yaml").read_text())["model"])


def final_loss(out: str) -> float:
    return float(json.loads((Path(out) / "summary.json").read_text())["val_loss"])


@pytest.mark.slow
def test_a_run_is_pinned_and_repeats_itself_after_main_has_moved(
    hub: HubServer, command: Command, data: list[str], tmp_path: Path
) -> None:
    first = command("model.source=org/tiny", *data, "out=first")
    assert first.code == 0, first.err
    assert (model_keys("first")["source"], model_keys("first")["revision"]) == ("org/tiny", FIRST)
    assert f"org/tiny at commit {FIRST[:12]}" in (tmp_path / "first/run.log").read_text()

    hub.repositories["org/tiny"].main = SECOND
    again = command("--config-dir=first", "--config-name=config", "hydra.run.dir=again")
    assert again.code == 0, again.err
    assert model_keys("again")["revision"] == FIRST
    assert final_loss("again") == final_loss("first")

    moved = command("model.source=org/tiny", *data, "out=moved")
    assert moved.code == 0, moved.err
    assert model_keys("moved")["revision"] == SECOND
    assert final_loss("moved") != final_loss("first")
    assert "model-00001-of-" in " ".join(snapshot_files(tmp_path, SECOND))

    hub.requests.clear()
    longer = command("model.source=org/tiny", *data, "out=first", "train.max_steps=3")
    assert longer.code == 0, longer.err
    assert model_keys("first")["revision"] == FIRST, "a revision that is not said is that of the run folder"
    assert hub.requests == []
    changed = command("model.source=org/tiny", "model.revision=main", *data, "out=first")
    assert changed.code == 2
    assert changed.errors[0].startswith(f"error: {tmp_path}/first holds another run: model.revision was {FIRST}")


@pytest.mark.slow
def test_what_follows_a_run_needs_no_hub(hub: HubServer, command: Command, data: list[str], tmp_path: Path) -> None:
    done = command("model.source=org/tiny", *data, "out=run")
    assert done.code == 0, done.err
    adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", FIRST)

    hub.requests.clear()
    again = command("--config-dir=run", "--config-name=config", "hydra.run.dir=again", HF_ENDPOINT=NOWHERE)
    assert (again.code, final_loss("again")) == (0, final_loss("run")), again.err
    for words in (["run=run"], ["adapter=run/adapter"]):
        evaluated = command("evaluate", *words, *data[:3], HF_ENDPOINT=NOWHERE)
        assert evaluated.code == 0, evaluated.err
        assert float(evaluated.out.split("val_loss: ")[1].split()[0]) == pytest.approx(final_loss("run"), rel=1e-5)
    merged = command("merge", "adapter=run/adapter", "dest=merged", HF_HUB_OFFLINE="1")
    assert merged.code == 0, merged.err
    generated = command("generate", "model.source=org/tiny", "prompt=Hi", "max_new_tokens=2", HF_HUB_OFFLINE="1")
    assert generated.code == 0, generated.err
    assert hub.requests == []


@pytest.mark.slow
def test_download_takes_data_only_and_says_the_words(hub: HubServer, command: Command, tmp_path: Path) -> None:
    done = command("download", "org/tiny")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"folder: {tmp_path}/hf/hub/models--org--tiny/snapshots/{FIRST}",
        f"use: model.source=org/tiny model.revision={FIRST}",
    ]
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert snapshot_files(tmp_path, FIRST) == wanted == set(hub.gets())
    hub.requests.clear()
    assert command("download", "org/tiny", FIRST).out == done.out
    assert hub.requests == [], "a commit that is cached whole costs no request"
    assert command("download", "org/tiny", SECOND).code == 0


@pytest.mark.slow
def test_validate_and_cfg_ask_no_hub(hub: HubServer, command: Command, tmp_path: Path) -> None:
    shown = command("--cfg", "job", "model.source=org/tiny")
    assert (shown.code, "source: org/tiny\n" in shown.out, "revision: null\n" in shown.out) == (0, True, True)
    longer = "data.max_seq_len=9000"
    unknown = command("validate", "model.source=org/tiny", "model=llama2_7b", "peft=full", longer)
    assert (unknown.code, unknown.out) == (2, "")
    (line,) = unknown.err.splitlines()  # the context of another model is no fact
    assert line.startswith("error: model.source=org/tiny is not in the cache, so its shape is not known")
    assert "data.max_seq_len=9000: longer than" in command("validate", longer).err
    assert hub.requests == []
    assert not (tmp_path / "hf").exists()

    assert command("download", "org/tiny").code == 0
    hub.requests.clear()
    known = command("validate", "model.source=org/tiny", "peft=full")
    expected = 2 * 352 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert known.out.splitlines()[0] == f"total_params: {expected}"
    assert known.err == ""
    assert "longer than the model's context, 512" in command("validate", "model.source=org/tiny", longer).err
    assert hub.requests == []


@pytest.mark.slow
def test_a_rule_on_the_shape_is_judged_before_the_weights_are_downloaded(
    hub: HubServer, command: Command, data: list[str], tmp_path: Path
) -> None:
    done = command("model.source=org/tiny", *data, "peft.lora_rank=40", "out=mine")
    assert done.code == 2
    assert done.errors == [f"error: {done.errors[0][7:]}"]
    assert "peft.lora_rank=40: larger than the smallest side of an adapted matrix, 32" in done.errors[0]
    assert hub.gets() == ["config.json"]
    assert not (tmp_path / "mine").exists()


PRIVATE = "no such repository at http"
REFUSED = [
    ("org/nothing", "main", {}, PRIVATE),
    ("org/tiny", "v9", {}, "model.source=org/tiny model.revision=v9: no such revision"),
    ("org/tiny", "c" * 40, {}, "no such revision"),
    ("org/gated", "main", {}, "access to it is restricted; accept its conditions at http"),
    ("org/private", "main", {}, "a private one; check the name, and for a private one give a token: `hf auth login`"),
    ("org/forbidden", "main", {}, "refuses access (403); give a token"),
    ("org/ill", "main", {}, "answers with an error (503)"),
    ("org/pickle", "main", {}, "(its weights: pytorch_model.bin), and no other file of weights is downloaded; take a"),
    ("org/unknown", "main", {}, "no config.json in this repository"),
    ("org/tiny", "main", {"HF_ENDPOINT": NOWHERE}, "http://127.0.0.1:9 cannot be reached"),
    ("org/tiny", "main", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1 forbids to download it"),
    ("tiny", "main", {}, "model.source=tiny: expected ORG/NAME"),
    ("../org/tiny", "main", {}, "model.source=../org/tiny: expected ORG/NAME"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "revision", "env", "sentence"), REFUSED, ids=[row[3][-40:] for row in REFUSED])
def test_what_the_hub_does_not_give_is_one_line_and_leaves_nothing(
    source: str,
    revision: str,
    env: dict[str, str],
    sentence: str,
    hub: HubServer,
    command: Command,
    commits: dict[str, Files],
    tmp_path: Path,
) -> None:
    files = commits[FIRST]
    hub.repositories |= {
        "org/gated": Repository({FIRST: files}, FIRST, gated=True),
        "org/private": Repository({FIRST: files}, FIRST, token="secret"),
        "org/forbidden": Repository({FIRST: files}, FIRST, status=403),
        "org/ill": Repository({FIRST: files}, FIRST, status=503),
        "org/pickle": Repository({FIRST: {"config.json": b"{}", "pytorch_model.bin": b""}}, FIRST),
        "org/unknown": Repository({FIRST: {"model.safetensors": b""}}, FIRST),
    }
    done = command(f"model.source={source}", f"model.revision={revision}", "out=mine", **env)
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: model.source=")
    assert sentence in done.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []
    assert hub.gets() == []


def test_a_token_opens_a_private_repository(hub: HubServer, command: Command, commits: dict[str, Files]) -> None:
    hub.repositories["org/private"] = Repository({FIRST: commits[FIRST]}, FIRST, token="secret")
    done = command("download", "org/private", HF_TOKEN="secret")
    assert done.code == 0, done.err


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on(hub: HubServer, command: Command, data: list[str], tmp_path: Path) -> None:
    hub.breaks_at = "model.safetensors"
    done = command("model.source=org/tiny", *data, "out=mine")
    assert done.code == 2
    assert len(done.errors) == 1
    assert "the download broke off" in done.errors[0]
    assert "the same command goes on" in done.errors[0]
    assert not (tmp_path / "mine").exists()
    assert "model.safetensors" not in snapshot_files(tmp_path, FIRST)
    offline = command("model.source=org/tiny", *data, "out=mine", HF_HUB_OFFLINE="1")
    assert (offline.code, len(offline.errors)) == (2, 1)
    assert "HF_HUB_OFFLINE=1 forbids to download it" in offline.errors[0]

    hub.breaks_at = None
    hub.requests.clear()
    again = command("model.source=org/tiny", *data, "out=mine")
    assert again.code == 0, again.err
    assert "tokenizer.json" not in hub.gets(), "what is there is not downloaded again"
    assert hub.gets().count("model.safetensors") == 1


@pytest.mark.slow
def test_a_part_of_a_snapshot_is_not_taken_for_the_whole(hub: HubServer, command: Command, tmp_path: Path) -> None:
    """Only config.json is cached, as after a check that refused the run: no listing says what belongs to it."""
    assert command("model.source=org/tiny", "peft.lora_rank=40").code == 2
    assert snapshot_files(tmp_path, FIRST) == {"config.json"}
    for env, sentence in (
        ({"HF_HUB_OFFLINE": "1"}, "no weights in the cache"),
        ({"HF_ENDPOINT": NOWHERE}, "cannot be reached"),
    ):
        done = command("download", "org/tiny", FIRST, **env)
        assert (done.code, len(done.errors)) == (2, 1), done.err
        assert sentence in done.errors[0]


@pytest.mark.slow
def test_without_the_extra_it_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "absent/huggingface_hub").mkdir(parents=True)
    (tmp_path / "absent/huggingface_hub/__init__.py").write_text("raise ModuleNotFoundError(__name__)\n")
    path = os.pathsep.join([str(tmp_path / "absent"), os.environ["PYTHONPATH"]])
    for words in (["model.source=org/tiny"], ["download", "org/tiny"]):
        done = command(*words, PYTHONPATH=path)
        sentence = "model.source=org/tiny: needs huggingface_hub, 2.4 or newer: pip install 'tuner[hub]'"
        assert (done.code, done.err) == (2, f"error: {sentence}\n")
    assert command("validate", "model=tiny", PYTHONPATH=path).code == 0


@pytest.mark.slow
def test_every_trial_of_a_sweep_has_one_commit_also_when_it_goes_on(
    hub: HubServer, command: Command, data: list[str], tmp_path: Path
) -> None:
    words = ["-m", "model.source=org/tiny", *data[:3], *SHORT[1:], "hydra.sweep.dir=sweep"]
    away = command(*words, "peft.lora_rank=2,4", HF_ENDPOINT=NOWHERE)
    assert (away.code, len(away.errors)) == (2, 1), away.err
    assert not (tmp_path / "sweep").exists()

    first = command(*words, "peft.lora_rank=2,40")
    assert "peft.lora_rank=40: larger than the smallest side of an adapted matrix, 32" in first.out
    hub.repositories["org/tiny"].main = SECOND
    hub.requests.clear()
    done = command(*words, "peft.lora_rank=2,4")
    assert done.code == 0, done.err
    outs = [file.parent for file in (tmp_path / "sweep").glob("*/config.yaml")]
    assert len(outs) == 2
    assert {model_keys(str(out))["revision"] for out in outs} == {FIRST}
    assert hub.requests == []
    assert f"model.revision={FIRST}" in done.out, "the command of the best trial names the commit"


def test_the_words_that_continue_a_stopped_run_name_the_commit() -> None:
    from tuner.logging.header import resume_command

    config = {"checkpoint": {"resume": "auto"}, "model": {"source": "org/tiny", "revision": FIRST}, "data": {}}
    words = resume_command(Path("/mine"), config, ["model.source=org/tiny", "model.revision=main"])
    assert words == f"python -m tuner model.source=org/tiny model.revision={FIRST} out=/mine"


def test_a_shape_that_is_not_known_is_no_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tuner.config.facts.cached_config", lambda source, revision: None)
    facts = facts_of({"model": {"source": "org/tiny", "revision": None, "path": None, "hidden_size": 64}})
    assert set(facts) == {"model.source", "model.revision", "model.path"}


NAMES = ["org/tiny", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "_x/y_1.5", "a/b.gi", f"{96 * 'a'}/{96 * 'b'}"]
NO_NAMES = ["a/b/c", "./tiny", "../tiny", "~/tiny", "/b", "a/", "a--b/c", "a/b..c", "a/b.git", "a/b-", "-a/b", "a./b"]
NO_NAMES += ["\u00e4/b", "a b/c", "a/b\n", "", f"a/{97 * 'b'}"]


@pytest.mark.parametrize("name", [*NAMES, *NO_NAMES])
def test_names_are_judged_as_the_library_does(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    assert is_repository(name) == (name in NAMES)
    if name in NAMES:
        validate_repo_id(name)
    else:
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


def test_a_name_without_an_organization_is_refused() -> None:
    assert not is_repository("tiny")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("Data processing error"), r"the download broke off \(Data processing error\); the same command"),
        (OSError(28, "No space left on device"), r"the download broke off \(\[Errno 28\] No space left on device\)"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "answers with something else than a hub would"),
    ],
    ids=["xet", "disk", "proxy"],
)
def test_other_failures_are_one_line(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    line = rf"^model\.source=org/tiny model\.revision=main: .*{sentence}"
    with pytest.raises(ModelError, match=line), hub_errors("org/tiny", "main"):
        raise error


def test_an_empty_revision_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a branch, a tag or a commit"), hub_errors("org/tiny", " "):
        pass


def test_only_a_whole_hash_is_a_commit() -> None:
    assert is_commit(FIRST)
    assert not any(is_commit(other) for other in ("main", FIRST[:12], FIRST + "0", FIRST.upper(), None))


def test_freezing_a_pinned_configuration_changes_nothing(
    hub: HubServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.config.pinning.pinned", lambda source, revision: revision or SECOND)
    frozen = tuner.freeze(compose(["model.source=org/tiny", "out=mine"]))
    assert frozen.model.revision == SECOND
    assert tuner.freeze(frozen) == frozen
