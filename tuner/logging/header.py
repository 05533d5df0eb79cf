"""The words at the beginning and at the end of a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.types import Summary

RESULTS = {
    "adapter": "adapter",
    "model": "model",
    "epochs": "epochs",
    "checkpoints": "checkpoints",
    "metrics.jsonl": "metrics",
    "samples.json": "samples",
    "summary.json": "summary",
    "run.log": "log",
}


PLAIN = re.compile(r"[\w./:@%+ -]+")
"""Values that Hydra reads as they are; a comma would be a sweep."""


def header(config: Mapping[str, Any], summary: Summary, dataset: Mapping[str, Any], total_steps: int) -> dict[str, str]:
    """What is being trained, a line each."""
    train, peft = config["train"], config["peft"]
    rows = train["batch_size"] * train["gradient_accumulation_steps"]
    share = 100 * summary.trainable_params / summary.total_params
    shown = ("lora_rank", "lora_alpha", "path")
    keys = [f"{key.removeprefix('lora_')} {value}" for key, value in peft.items() if key in shown]
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in dataset["counts"].items() if value)
    return {
        "model": f"{_model(config['model'])}, {summary.total_params:,} parameters",
        "method": ", ".join([peft["name"], *keys, f"quantization {_member(config['quantization'])}"]),
        "trainable": f"{summary.trainable_params:,} parameters ({share:.2f} %), kept in {summary.trainable_dtype}",
        "precision": f"{summary.precision} on {summary.device}",
        "optimizer": f"{_member(config['optimizer'])}, learning rate {config['optimizer']['lr']}, "
        f"schedule {_member(config['schedule'])}",
        "data": f"{dataset['name']}{_commit(config['data'])}: {counts}",
        **_packing(dataset),
        "steps": f"{total_steps} steps of {rows} {'rows' if 'rows' in dataset else 'samples'} ({train['batch_size']} x "
        f"{train['gradient_accumulation_steps']}), about {rows * _row_tokens(dataset):,.0f} tokens a step",
        "fingerprint": str(dataset["fingerprint"])[:16],
        "folder": summary.out,
    }


def in_few_words(config: Mapping[str, Any]) -> tuple[str, str]:
    """The model, by the last part of its place, and the method, for a line of a table."""
    model, peft, quantization = config["model"], config["peft"], _member(config["quantization"])
    place = model["path"] or model["source"] or model["package"]
    rank = f" rank {peft['lora_rank']}" if "lora_rank" in peft else ""
    name = str(place).rstrip("/").rpartition("/")[2] if place else _model(model)
    return name, f"{peft['name']}{rank}{'' if quantization == 'none' else f' {quantization}'}"


def _packing(dataset: Mapping[str, Any]) -> dict[str, str]:
    """How samples are put together, where they are."""
    if "rows" not in dataset:
        return {}
    full = f"{100 * dataset['efficiency']:.1f} % full"
    return {"packing": f"{dataset['rows']:,} rows of {dataset['row_tokens']} tokens, {full}"}


def _row_tokens(dataset: Mapping[str, Any]) -> float:
    """Tokens of a row on average, padding excluded."""
    packed = "rows" in dataset
    return float(dataset["efficiency"] * dataset["row_tokens"] if packed else dataset["mean_tokens"])


def saved_in(out: Path) -> dict[str, str]:
    """Where everything is."""
    return {title: str(out / name) for name, title in RESULTS.items() if (out / name).exists()}


def next_commands(out: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What to do with a finished run."""
    run = _run(out, config)
    commands = {
        "generate": f'python -m tuner generate {run} prompt="..."',
        "evaluate": f"python -m tuner evaluate {run}",
    }
    if (out / "adapter").is_dir() and not (out / "model").is_dir():
        commands["merge"] = f"python -m tuner merge {run} {shlex.quote(f'dest={out}/merged')}"
    if uri := config["logger"].get("tracking_uri"):
        server = uri.startswith(("http://", "https://"))
        commands["compare"] = f"open {uri}" if server else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return commands


def export_command(out: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What makes an adapter or a model of the last checkpoint of a run that was stopped, if it has one."""
    if not any((out / "checkpoints").glob("step-*")):
        return {}
    return {"export": f"python -m tuner export {_run(out, config)} {shlex.quote(f'dest={out}/export')}"}


def _run(out: Path, config: Mapping[str, Any]) -> str:
    """The words that name a run to a verb."""
    return shlex.join([f"run={out}", *trust_words(config)])


def trust_words(config: Mapping[str, Any]) -> list[str]:
    """What a command over a run's folder says again, since a folder gives itself no trust; [] where nothing is trusted.

    Args:
        config: of the run, as it was frozen.
    """
    trusted = config.get("trust_targets")
    return [f"trust_targets=[{','.join(trusted)}]"] if trusted else []


def resume_command(out: Path, config: Mapping[str, Any], overrides: Sequence[str] | None) -> str:
    """What continues a run that was stopped: its command, from the folder it was started in, or its Python call.

    Args:
        out: its run folder.
        config: its resolved configuration.
        overrides: the words it was started with, switches among them; None where Python code started it.
    """
    refuses = config["checkpoint"]["resume"] == "never"
    if overrides is None:
        frozen = f"OmegaConf.load({str(out / 'config.yaml')!r})"
        resuming = "{'checkpoint': {'resume': 'auto'}}"
        return f"tuner.run({f'OmegaConf.merge({frozen}, {resuming})' if refuses else frozen})"
    # A branch may name another commit by then.
    pinned = [group for group in ("model", "data") if config[group].get("source") is not None]
    revisions = [f"{group}.revision=" for group in pinned]
    changed = ["out=", "hydra.run.dir=", *["checkpoint.resume="] * refuses, *revisions]
    words = [word for word in overrides if not word.lstrip("+").startswith(tuple(changed))]
    words += ["checkpoint.resume=auto"] * refuses
    words += [f"{group}.revision={config[group]['revision']}" for group in pinned]
    folder = str(out)
    if not PLAIN.fullmatch(folder):
        folder = "'" + folder.replace("'", "\\'") + "'"
    return shlex.join(["python", "-m", "tuner", *words, f"out={folder}"])


def _member(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).split(".")[-2 if str(node["_target_"]).startswith("tuner.") else -1]


def _model(node: Mapping[str, Any]) -> str:
    if node["path"]:
        return str(node["path"])
    if node["source"]:
        return _commit(node).removeprefix(", ")
    return str(node["package"] or f"random {_member(node)}")


def _commit(node: Mapping[str, Any]) -> str:
    """Where on the hub something is from, behind a comma; empty where it is not from there."""
    return f", {node['source']} at commit {node['revision'][:12]}" if node.get("source") else ""
