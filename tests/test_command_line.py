"""The commands themselves: which verb is meant, what is printed where, exit codes, what is left on disk."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

import tuner
from tuner.__main__ import VERBS, dispatch, reported
from tuner.config import conf_dir
from tuner.errors import CheckpointError, Interrupted

HYDRAS_SWEEPER = "hydra/sweeper=basic"
"""It calls the command for each point in this process, where a test can listen; ours runs frozen folders."""

METHODS = sorted(file.stem for file in (conf_dir() / "peft").glob("*.yaml"))


def tuner_command(*words: str, debug: bool = False) -> int:
    return reported(lambda: dispatch(words), debug)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of its own, nearly: no files yet, and the log handlers Hydra adds are taken away again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(tuner.__file__).parents[1]))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class Runs(list[tuple[DictConfig, list[str]]]):
    """What reached `tuner.train.run`; `then` is called in its place."""

    then: Callable[[DictConfig], Any] = staticmethod(lambda cfg: "trained")

    def run(self, cfg: DictConfig, overrides: Sequence[str]) -> Any:
        self.append((cfg, list(overrides)))
        return self.then(cfg)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Training replaced by a record of what it was asked."""
    runs = Runs()
    module = types.ModuleType("tuner.train")
    module.run = runs.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tuner.train", module)
    return runs


@pytest.mark.parametrize("verb", [[], ["run"]], ids=["unsaid", "said"])
def test_a_run_gets_its_frozen_configuration_words_and_folder(
    verb: list[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuner_command(*verb, "model=tiny", "seed=3", "hydra.verbose=false") == 0
    ((cfg, words),) = runs
    assert words == ["model=tiny", "seed=3", "hydra.verbose=false"]
    assert (cfg.seed, cfg.model.hidden_size) == (3, 64)
    assert isinstance(cfg.train.num_threads, int)
    assert Path(cfg.out).is_dir()
    assert Path(cfg.out).is_relative_to(tmp_path / "outputs")
    assert list(Path(cfg.out).iterdir()) == [], "Hydra leaves no files of its own"
    assert capsys.readouterr() == ("trained\n", "")
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("word", ["out=mine", "hydra.run.dir=mine"])
def test_the_run_folder_is_where_the_person_says(word: str, runs: Runs, tmp_path: Path) -> None:
    assert tuner_command("model=tiny", word) == 0
    assert runs[0][0].out == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_a_sweep_gives_each_trial_its_own_folder(runs: Runs, tmp_path: Path) -> None:
    assert tuner_command("-m", HYDRAS_SWEEPER, "model=tiny", "seed=1,2", "hydra.sweep.dir=sweep") == 0
    assert [(cfg.seed, cfg.out) for cfg, _ in runs] == [(1, f"{tmp_path}/sweep/0"), (2, f"{tmp_path}/sweep/1")]
    assert runs[1][1] == ["model=tiny", "seed=2"]


def test_hydra_mode_sweeps_like_the_switch(runs: Runs) -> None:
    assert tuner_command("hydra.mode=MULTIRUN", HYDRAS_SWEEPER, "model=tiny", "seed=1,2") == 0
    assert len(runs) == 2
    sweeps = {Path(cfg.out).parent for cfg, _ in runs}
    assert len(sweeps) == 1


WRONG = [
    (["peft.lora_rnk=4"], "peft.lora_rnk=4: no such key; did you mean lora_rank"),
    (["run", "peft.lora_rank=0"], "peft.lora_rank=0: expected a whole number > 0"),
    (["optimizer=adamww"], "optimizer=adamww: no such option; did you mean adamw"),
    (["peft=qlora", "quantization=none"], "say peft=lora"),
    (["rum"], "rum: no such verb; did you mean run? valid: convert, cp, data, download"),
    (["seed=1,2"], "To sweep over it, add --multirun"),
    (["-m", "seed=1,2", "out=mine"], "out=... together with --multirun"),
    (["-m", "seed=1,2", "peft.lora_rnk=4"], "peft.lora_rnk=4: no such key; did you mean lora_rank"),
    (["generate", "-m", "prompt=a,b"], "--multirun: only training runs are swept"),
    (["generate"], "say prompt=TEXT, or prompts=FILE"),
    (["generate", "prompt=a", "temperature=-1"], "temperature=-1: expected a number >= 0"),
    (["generate", "prompt=a", "peft=lora"], "peft=lora: no such key"),
    (["merge", "dest=a", "merge_into=both"], "merge_into=both: expected one of dequantized, original"),
    (["export", "dest=a", "merged=yes please"], "merged=yes please: expected true or false"),
    (["--cfg", "job", "seeed=1"], "seeed=1: no such key; did you mean seed or sweep?"),
    (["--cfg", "job", "--multirun"], "--multirun --cfg: only one of these at a time"),
    (["--shell-completion"], "say install=SHELL, uninstall=SHELL or query=SHELL"),
    (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
    (["ls", "optimizers"], "ls optimizers: no such group; did you mean optimizer?"),
    (["cp", "lora"], "cp takes [--from-torchtune] NAME DEST; given: lora"),
    (["cp", "lorra", "here.yaml"], "cp lorra: no such config file"),
    (["cp", "default", "here.yaml"], "several files have this name; say one of checkpoint/default, memory/default"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_wrong_input_is_one_line_and_leaves_nothing(
    words: list[str], sentence: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuner_command(*words) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert runs == []
    assert list(tmp_path.iterdir()) == []


def fail(error: BaseException) -> Callable[[DictConfig], Any]:
    def then(cfg: DictConfig) -> Any:
        raise error

    return then


def test_a_persons_error_while_training_is_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.then = fail(CheckpointError("no room"))
    assert tuner_command("model=tiny") == 2
    assert capsys.readouterr() == ("", "error: no room\n")


@pytest.mark.slow
def test_an_error_before_anything_was_written_leaves_no_folder(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    runs.then = fail(CheckpointError("no room"))
    assert tuner_command("model=tiny") == 2
    assert tuner_command("model=tiny", "out=mine") == 2
    assert tuner_command("model=tiny", "out=mine/a/b") == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"], "what was there stays"


def test_an_error_later_leaves_what_was_written(runs: Runs, tmp_path: Path) -> None:
    def then(cfg: DictConfig) -> None:
        (Path(cfg.out) / "config.yaml").write_text("seed: 0\n")
        raise CheckpointError("no room")

    runs.then = then
    assert tuner_command("model=tiny", """out="it's, (mine)" """.strip()) == 2
    assert [path.name for path in (tmp_path / "it's, (mine)").iterdir()] == ["config.yaml"]


def test_debug_shows_its_traceback(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.then = fail(CheckpointError("no room"))
    assert tuner_command("model=tiny", debug=True) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("error: no room\n")


def test_a_persons_error_inside_a_constructor_is_taken_out(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = InstantiationException("Error in call to target")
    wrapped.__cause__ = CheckpointError("no room")
    runs.then = fail(wrapped)
    assert tuner_command("model=tiny") == 2
    assert capsys.readouterr().err == "error: no room\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), InstantiationException("a bug")], ids=["any", "hydra"])
def test_a_bug_is_raised_as_it_is(error: Exception, runs: Runs) -> None:
    runs.then = fail(error)
    with pytest.raises(type(error), match="a bug"):
        tuner_command("model=tiny")


@pytest.mark.parametrize(
    ("error", "line"), [(KeyboardInterrupt(), "interrupted\n"), (Interrupted("stopped at 3"), "stopped at 3\n")]
)
def test_interrupted_is_130(error: BaseException, line: str, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.then = fail(error)
    assert tuner_command("model=tiny") == 130
    assert capsys.readouterr().err == line


def test_a_sweep_whose_trial_fails_says_why_after_the_others(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("-m", HYDRAS_SWEEPER, "model=tiny", "seed=-1,1") == 2
    assert [cfg.seed for cfg, _ in runs] == [1]
    assert "error: seed=-1: expected a whole number >= 0\n" in capsys.readouterr().err


def test_ctrl_c_in_a_trial_ends_the_sweep(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(cfg: DictConfig) -> None:
        raise Interrupted(f"stopped in seed {cfg.seed}\nresume: so")

    runs.then = stopped
    assert tuner_command("-m", HYDRAS_SWEEPER, "model=tiny", "seed=1,2,3") == 130
    assert [cfg.seed for cfg, _ in runs] == [1]
    assert capsys.readouterr().err == "stopped in seed 1\nresume: so\n"


def test_a_second_ctrl_c_in_a_trial_ends_the_sweep(runs: Runs) -> None:
    def stopped(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    runs.then = stopped
    assert tuner_command("-m", HYDRAS_SWEEPER, "model=tiny", "seed=1,2,3") == 130
    assert [cfg.seed for cfg, _ in runs] == [1]
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.slow
def test_switches_that_compose_are_among_the_words(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "mine" / "schedule").mkdir(parents=True)
    (tmp_path / "mine" / "schedule" / "own.yaml").write_text("defaults: [cosine, _self_]\nwarmup_steps: 9\n")
    (tmp_path / "mine" / "primary.yaml").write_text("defaults: [config, _self_]\nseed: 5\n")
    switches = ["--config-dir", "mine", "--config-name", "primary"]
    assert tuner_command(*switches, "model=tiny", "schedule=own") == 0
    assert tuner_command(*switches, "-m", HYDRAS_SWEEPER, "model=tiny", "schedule=own,constant") == 0
    first = ["--config-dir=mine", "--config-name=primary", "model=tiny"]
    assert [words for _, words in runs] == [[*first, f"schedule={name}"] for name in ("own", "own", "constant")]
    assert tuner_command(*runs[0][1]) == 0, "the words compose the same again"
    assert (runs[3][0].seed, runs[3][0].schedule) == (5, runs[0][0].schedule)


def test_help_says_the_verbs_the_groups_and_hydras_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in VERBS)
    assert f"peft: {', '.join(METHODS)}" in " ".join(text.split())
    assert "--hydra-help" in text


def test_help_of_a_verb_shows_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("generate", "--help") == 0
    assert "temperature: 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("switch", ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"])
def test_hydras_info(switch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("--info", switch) == 0
    assert len(capsys.readouterr().out) > 100
    assert list(tmp_path.iterdir()) == []


def test_tab_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMP_LINE", "tuner optimizer=paged_adam")
    assert tuner_command("-sc", "query=bash") == 0
    assert capsys.readouterr().out.split() == ["optimizer=paged_adamw", "optimizer=paged_adamw8bit"]


def test_cfg_of_a_verb_and_of_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("generate", "--cfg", "job", "prompt=hi") == 0
    assert "prompt: hi\n" in capsys.readouterr().out
    assert tuner_command("--cfg", "job", "--resolve", "--package", "schedule") == 0
    assert "warmup_ratio: 0.08\n" in capsys.readouterr().out


def test_groups_of_ones_own_by_config_dir_and_searchpath(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "conf" / "schedule").mkdir(parents=True)
    (tmp_path / "conf" / "schedule" / "mine.yaml").write_text("defaults: [cosine, _self_]\nwarmup_steps: 9\n")
    assert tuner_command("--config-dir", "conf", "schedule=mine", "model=tiny") == 0
    assert tuner_command(f"hydra.searchpath=[file://{tmp_path}/conf]", "schedule=mine", "model=tiny") == 0
    assert [cfg.schedule.warmup_steps for cfg, _ in runs] == [9, 9]


def test_ls_names_every_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("ls") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    assert lines["peft"].split() == METHODS
    assert tuner_command("ls", "peft") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == METHODS
    assert {"adapter", "dora", "full", "lora", "qlora"} < set(lines)
    assert all(len(line) > 10 for line in lines.values())


def test_cp_copies_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("cp", "peft/lora", "mine/lora.yaml") == 0
    assert (tmp_path / "mine/lora.yaml").read_text() == (conf_dir() / "peft/lora.yaml").read_text()
    (tmp_path / "mine/lora.yaml").write_text("edited")
    assert tuner_command("cp", "lora", "mine") == 2
    assert "mine/lora.yaml exists" in capsys.readouterr().err
    assert (tmp_path / "mine/lora.yaml").read_text() == "edited"


TINY = """hidden_size=64 intermediate_size=160 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2
    head_dim=16 vocab_size=300 tie_word_embeddings=false"""
EMBEDDINGS, NORMS = 2 * 300 * 64, 64
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
ADAPTERS = 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))


@pytest.mark.parametrize(
    ("words", "total", "trainable"),
    [
        (["peft=full"], EMBEDDINGS + NORMS + 2 * LAYER, EMBEDDINGS + NORMS + 2 * LAYER),
        ([], EMBEDDINGS + NORMS + 2 * LAYER, 2 * ADAPTERS),
        (["peft=qlora"], EMBEDDINGS + NORMS + 2 * LAYER, 2 * ADAPTERS),
    ],
    ids=["full", "lora", "qlora"],
)
def test_validate_counts_a_tiny_model(
    words: list[str], total: int, trainable: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = [f"model.{word}" for word in TINY.split()]
    assert tuner_command("validate", "model=tiny", *shape, *words) == 0
    assert capsys.readouterr().out == f"total_params: {total}\ntrainable_params: {trainable}\n"


def test_validate_counts_a_large_model_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner_command("validate", "model=llama2_7b", "peft=full") == 0
    assert capsys.readouterr().out == "total_params: 6738415616\ntrainable_params: 6738415616\n"
    assert list(tmp_path.iterdir()) == []


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_showing_a_configuration_imports_nothing_heavy() -> None:
    done = python("-X", "importtime", "-m", "tuner", "--cfg", "job", "--resolve")
    assert done.returncode == 0
    assert "lora_rank: 8\n" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "numpy", "mlflow", "bitsandbytes", "transformers", "rich", "tokenizers"}


def test_the_shell_sees_the_exit_code_and_one_line() -> None:
    done = python("-m", "tuner", "train.batch_size=0", "train.epochs=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: train.batch_size=0: expected a whole number > 0 or auto",
        "error: train.epochs=0: expected a whole number > 0 or null",
    ]


@pytest.mark.slow
def test_full_error_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    full = python("-m", "tuner", "seed=a")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    debug = python("-m", "tuner", "--debug", "seed=a")
    for done in (full, debug):
        assert done.returncode == 2
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith("error: seed=a: expected a whole number >= 0\n")


def test_importing_tuner_imports_nothing() -> None:
    done = python("-c", "import sys, tuner; print({'torch', 'hydra', 'omegaconf', 'yaml'} & set(sys.modules))")
    assert done.stdout == "set()\n"
