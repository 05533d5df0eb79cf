"""From words with commas to trials: every point once, every mistake said before anything runs."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from sweeper.plan import ID_CHARACTERS, Trial, identity, swept_keys, trials_of
from tuner.config import compose, conf_dir
from tuner.config.composition import config_loader, load, load_point
from tuner.errors import ConfigError

Plan = Callable[..., list[Trial]]


@pytest.fixture(scope="module")
def loader() -> ConfigLoader:
    return config_loader()


@pytest.fixture(scope="module")
def plan(loader: ConfigLoader) -> Plan:
    """The trials of these words, composed as a sweep composes them; each point's composing is done once here."""
    master = load(loader, [])
    composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(words: Sequence[str]) -> DictConfig:
        point = tuple(words)
        if point not in composed:
            composed[point] = load_point(loader, master, words)
        return composed[point].copy()

    return lambda *words: trials_of(words, loader, compose)


@pytest.fixture(scope="module")
def plan_values(loader: ConfigLoader) -> Plan:
    """The same for words that only set keys, a hundred times as fast as Hydra composes."""
    base = compose(["model=tiny"])

    def composed(words: Sequence[str]) -> DictConfig:
        config = base.copy()
        for word in words:
            key, _, value = word.partition("=")
            OmegaConf.update(config, key, yaml.safe_load(value))
        return config

    return lambda *words: trials_of(words, loader, composed)


def points(trials: Sequence[Trial]) -> list[str]:
    return [" ".join(f"{key}={value}" for key, value in trial.values.items()) for trial in trials]


def refused(plan: Plan, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    return caught.value.problems


# ---- the points ----


EXPANSIONS = [
    ([], [""]),
    (["seed=4"], [""]),
    (["seed=2,1"], ["seed=2", "seed=1"]),
    (["seed=1,2", "train.max_steps=7,5"], [f"seed={s} train.max_steps={n}" for s in (1, 2) for n in (7, 5)]),
    (["train.max_steps=7,5", "seed=1,2"], [f"train.max_steps={n} seed={s}" for n in (7, 5) for s in (1, 2)]),
    (["seed=choice(3,1)"], ["seed=3", "seed=1"]),
    (["seed=range(1,4)"], ["seed=1", "seed=2", "seed=3"]),
    (["seed=range(3,0,-2)"], ["seed=3", "seed=1"]),
    (["optimizer.lr=range(0.1,0.3,0.1)"], ["optimizer.lr=0.1", "optimizer.lr=0.2"]),
    (["seed=sort(3,1,2)"], ["seed=1", "seed=2", "seed=3"]),
    (
        ["peft.lora_attn_modules=[q_proj],[q_proj,v_proj]"],
        ["peft.lora_attn_modules=[q_proj]", "peft.lora_attn_modules=[q_proj,v_proj]"],
    ),
    (["++seed=1,2"], ["seed=1", "seed=2"]),
]


@pytest.mark.parametrize(("words", "expected"), EXPANSIONS, ids=[" ".join(words) for words, _ in EXPANSIONS])
def test_the_last_word_changes_fastest(
    words: list[str], expected: list[str], plan: Plan, plan_values: Plan, request: pytest.FixtureRequest
) -> None:
    of = plan if words and words[0].startswith("++") else plan_values
    assert points(of(*words)) == expected


@pytest.mark.slow
def test_a_glob_is_every_option_of_its_group_that_is_not_left_out(plan: Plan) -> None:
    trials = plan("model=tiny", "peft=glob(*,exclude=*full)", "seed=1,2")
    others = sorted(file.stem for file in (conf_dir() / "peft").glob("*.yaml") if file.stem != "full")
    assert {"adapter", "lora", "qlora"} <= set(others)
    assert points(trials) == [f"peft={name} seed={seed}" for name in others for seed in (1, 2)]


def test_what_a_trial_holds(plan: Plan) -> None:
    first, second = plan("model=tiny", "peft.lora_rank=2,4", "optimizer=sgd")
    assert second.words == ("model=tiny", "peft.lora_rank=4", "optimizer=sgd")
    assert second.values == {"peft.lora_rank": "4"}
    assert second.name == "lora_rank=4"
    assert (first.config.peft.lora_rank, second.config.peft.lora_rank) == (2, 4)
    assert second.config.optimizer._target_ == "tuner.optimizers.sgd.sgd"
    assert "hydra" not in second.config
    assert re.fullmatch(f"t[0-9a-f]{{{ID_CHARACTERS}}}", second.id)
    assert swept_keys([first.values, {"seed": "1"}, second.values]) == ["peft.lora_rank", "seed"]


# ---- the same point ----


def test_a_value_that_is_named_twice_is_one_trial(plan_values: Plan) -> None:
    assert points(plan_values("seed=1,2,1", "train.max_steps=5,5")) == [
        "seed=1 train.max_steps=5",
        "seed=2 train.max_steps=5",
    ]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["peft=rslora,lora", "peft.use_rslora=true"], {"peft": "rslora"}),
        (["optimizer.lr=1e-3,0.001,0.0010"], {"optimizer.lr": "0.001"}),
        (["logger.live=true,True,TRUE"], {"logger.live": "True"}),
    ],
    ids=lambda value: " ".join(value),
)
def test_two_spellings_of_a_point_are_one_trial(words: list[str], values: dict[str, str], plan: Plan) -> None:
    (trial,) = plan("model=tiny", *words)
    assert trial.values == values


def test_the_words_of_a_preset_and_the_keys_it_sets_are_the_same_point(plan: Plan) -> None:
    (preset,) = plan("model=tiny", "peft=rslora")
    (keys,) = plan("model=tiny", "peft.use_rslora=true")
    assert preset.id == keys.id


@pytest.mark.slow
def test_the_number_of_trials_is_the_product_of_the_distinct_choices(plan_values: Plan) -> None:
    """Grids drawn at random, with values named twice; ranks above 32 and warm-ups above the steps are illegal."""
    draw = random.Random(0)
    choices = {
        "seed": range(50),
        "peft.lora_rank": [1, 2, 8, 32, 33, 300],
        "schedule.warmup_steps": [0, 3, 59, 60, 61, 500],
    }
    for _ in range(8):
        grid = {key: draw.choices(list(values), k=draw.randint(1, 4)) for key, values in choices.items()}
        words = [f"{key}={','.join(map(str, values))}" for key, values in grid.items()]
        trials = plan_values(*words)
        distinct = {key: set(values) for key, values in grid.items()}
        assert len(trials) == len({trial.id for trial in trials})
        assert len(trials) == len(distinct["seed"]) * len(distinct["peft.lora_rank"]) * len(
            distinct["schedule.warmup_steps"]
        ), words
        for trial in trials:
            config = trial.config
            broken = config.peft.lora_rank > 32 or config.schedule.warmup_steps > 60
            assert (trial.illegal is not None) == broken, trial.values


# ---- the identity of a point ----


SAME_AND_DIFFERENT = [
    (["out=here"], True),
    (["sweep.rerun=all", "sweep.on_illegal=refuse"], True),
    (["seed=0"], True),
    (["seed=1"], False),
    (["train.max_steps=61"], False),
    (["peft.lora_alpha=17.0"], False),
]


@pytest.mark.parametrize(("words", "same"), SAME_AND_DIFFERENT, ids=[" ".join(row[0]) for row in SAME_AND_DIFFERENT])
def test_the_id_is_of_what_a_run_computes(words: list[str], same: bool) -> None:
    assert (identity(compose(["model=tiny", *words])) == identity(compose(["model=tiny"]))) is same


def test_the_id_does_not_depend_on_the_order_of_the_words(plan: Plan) -> None:
    (one,) = plan("model=tiny", "seed=3", "peft.lora_rank=2")
    (other,) = plan("peft.lora_rank=2", "seed=3", "model=tiny")
    assert one.id == other.id


@pytest.mark.slow
def test_ids_are_the_same_in_every_process_and_folder(tmp_path: Path) -> None:
    points = [["model=tiny", "peft=qlora", "seed=1"], ["logger=many", "optimizer=sgd", "peft=full"]]
    script = (
        "import json, sys\n"
        "from sweeper.plan import identity\n"
        "from tuner.config import compose\n"
        "print(json.dumps([identity(compose([*words, 'out=elsewhere'])) for words in json.loads(sys.argv[1])]))\n"
    )
    seen = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", script, json.dumps(points)]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        seen.append(json.loads(subprocess.check_output(command, env=env, cwd=folder, text=True)))
    assert seen[0] == seen[1] == [identity(compose(words)) for words in points]


def test_words_about_the_sweep_are_no_part_of_a_trial(plan: Plan) -> None:
    (plain,) = plan("model=tiny")
    (trial,) = plan("model=tiny", "sweep.on_illegal=refuse", "sweep.rerun=failed")
    assert trial.words == ("model=tiny",)
    assert trial.id == plain.id


# ---- points that cannot work, and words that are wrong ----


def test_a_point_that_cannot_work_carries_the_rule_and_costs_the_others_nothing(plan_values: Plan) -> None:
    good, rank, both = plan_values("peft.lora_rank=32,33,34", "schedule.warmup_steps=60")
    assert good.illegal is None
    assert rank.illegal == ("peft.lora_rank=33: larger than the smallest side of an adapted matrix, 32; valid: 1 to 32")
    assert both.illegal is not None
    assert both.illegal.startswith("peft.lora_rank=34: ")


def test_every_broken_rule_of_a_point_is_said_in_one_line(plan_values: Plan) -> None:
    (trial,) = plan_values("peft.lora_rank=33", "schedule.warmup_steps=61")
    assert trial.illegal is not None
    first, second = trial.illegal.split("; schedule.")
    assert first.startswith("peft.lora_rank=33: ")
    assert second.startswith("warmup_steps=61: longer than the run, train.max_steps=60")


def test_choices_of_groups_that_exclude_each_other_are_illegal_and_no_error(plan: Plan) -> None:
    trials = plan("model=tiny", "peft=full,lora", "quantization=none,nf4")
    assert [(trial.name, trial.illegal is None) for trial in trials] == [
        ("peft=full quantization=none", True),
        ("peft=full quantization=nf4", False),
        ("peft=lora quantization=none", True),
        ("peft=lora quantization=nf4", True),
    ]
    assert trials[1].illegal is not None
    assert "say peft=qlora" in trials[1].illegal


def test_wrong_values_of_all_points_are_raised_together_and_once_each(plan_values: Plan) -> None:
    assert sorted(refused(plan_values, "peft.lora_rank=4,-1,x", "seed=1,a", "train.max_steps=60,61")) == [
        "peft.lora_rank=-1: expected a whole number > 0",
        "peft.lora_rank=x: expected a whole number > 0",
        "seed=a: expected a whole number >= 0",
    ]


@pytest.mark.slow
def test_what_is_wrong_with_every_value_is_said_once(plan: Plan, plan_values: Plan) -> None:
    (rank,) = refused(plan, "model=tiny", "peft.lora_rnk=4,8", "seed=1,2")
    assert rank.startswith("peft.lora_rnk=4,8: no such key; did you mean lora_rank")
    (added,) = refused(plan, "model=tiny", "+seeed=range(0,3)")
    assert added.startswith("seeed=range(0,3): no such key; did you mean seed")
    assert refused(plan_values, "peft.lora_rank=-1,x", "seed=0,-1") == [
        "peft.lora_rank=-1,x: expected a whole number > 0",
        "seed=-1: expected a whole number >= 0",
    ]


@pytest.mark.parametrize("word", ["optimizer.lr=interval(0.1,1)", "optimizer.lr=tag(log,interval(0.1,1))"])
def test_a_grid_has_no_intervals(word: str, plan_values: Plan) -> None:
    (problem,) = refused(plan_values, "seed=1,2", word)
    assert problem == f"{word}: a grid has no intervals; give values, as key=1,2,3 or range(1,4)"


@pytest.mark.parametrize("word", ["seed=range(4,1)", "optimizer=glob(zzz*)"])
def test_a_choice_of_nothing_is_refused(word: str, plan_values: Plan) -> None:
    assert refused(plan_values, "train.max_steps=1,2", word) == [f"{word}: no value to choose from"]


def test_options_that_do_not_exist_are_raised_together(plan: Plan) -> None:
    problems = refused(plan, "model=tiny", "optimizer=adamw,adamww,sgdd")
    assert [problem.partition(";")[0] for problem in problems] == [
        "optimizer=adamww: no such option",
        "optimizer=sgdd: no such option",
    ]


def test_a_key_that_one_of_the_choices_does_not_have_makes_that_point_illegal(plan: Plan) -> None:
    legal, illegal = plan("model=tiny", "peft=lora,full", "peft.lora_rank=4")
    assert (legal.illegal, illegal.values) == (None, {"peft": "full"})
    assert illegal.illegal is not None
    assert illegal.illegal.startswith("peft.lora_rank=4: no such key")


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """The settings of two adapters, without a base."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return tmp_path / "one", tmp_path / "two"


def test_adapters_to_start_from_are_an_axis(plan: Plan, adapters: tuple[Path, Path]) -> None:
    fresh, *others = plan("model=tiny", f"adapter=null,{adapters[0]},{adapters[1]}")
    assert [trial.illegal for trial in (fresh, *others)] == [None] * 3
    assert len({trial.id for trial in (fresh, *others)}) == 3
    assert [trial.config.peft.path for trial in others if trial.config] == [str(folder) for folder in adapters]
    assert fresh.config is not None
    assert fresh.config.peft.lora_rank == 8
    (again,) = plan("model=tiny", f"adapter={adapters[0]}")
    assert again.id == others[0].id


@pytest.mark.slow
def test_a_key_that_an_adapter_brings_makes_its_points_illegal(plan: Plan, adapters: tuple[Path, Path]) -> None:
    words = ["model=tiny", f"adapter=null,{adapters[0]}", "peft.lora_rank=2,4"]
    trials = plan(*words)
    assert [trial.illegal is None for trial in trials].count(True) == 2
    said = [trial.illegal for trial in trials if trial.illegal]
    assert said == [
        f"peft.lora_rank={rank} adapter={adapters[0]}: the adapter brings its own; say one of the two"
        for rank in (2, 4)
    ]
    method = plan("model=tiny", f"adapter={adapters[0]}", "peft=lora,full")
    assert all(trial.illegal and "brings its own method" in trial.illegal for trial in method)
    assert refused(plan, "model=tiny", f"adapter={adapters[0]}", "peft.lora_rank=2,4") == said


def test_a_method_that_needs_an_adapter_is_an_illegal_point_without_one(plan: Plan) -> None:
    trials = plan("model=tiny", "peft=adapter,lora")
    assert [trial.illegal for trial in trials] == ["peft=adapter: the adapter needs a value, as adapter=FOLDER", None]


def test_the_sweep_s_own_keys_cannot_be_swept(plan: Plan) -> None:
    assert "sweep.rerun=none,all" in refused(plan, "model=tiny", "sweep.rerun=none,all")[0]


def test_an_axis_that_another_word_replaces_is_refused(plan: Plan) -> None:
    assert "seed=1,2" in refused(plan, "model=tiny", "seed=1,2", "seed=3")[0]
