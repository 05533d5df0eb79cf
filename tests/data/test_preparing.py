"""Preparing and its cache: the same data in every way of making it, and nothing that is damaged or half is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tuner.config import compose
from tuner.config.composition import plain
from tuner.data.alpaca import Alpaca
from tuner.data.cache import DESCRIPTION
from tuner.data.dataset import Example, Preparation
from tuner.data.messages import Messages
from tuner.data.preparing import CHUNK
from tuner.data.samples import FILES, fingerprint
from tuner.errors import DataError, ModelError
from tuner.tokenizers.huggingface import HuggingFaceTokenizer
from tuner.tokenizers.packaged import write_packaged_tokenizer
from tuner.tokenizers.sentencepiece import SentencePieceTokenizer
from tuner.types import IGNORE, Dataset, Sample

KEYS: dict[str, Any] = {
    "val_fraction": 0.2,
    "max_seq_len": 512,
    "too_long": "truncate",
    "max_samples": None,
    "max_val_samples": None,
    "train_on": "response",
    "cache": False,
    "cache_dir": None,
    "workers": 1,
    "streaming": False,
    "shuffle_buffer": 100,
    "packing": "none",
    "pack_len": None,
}
NUM_TASKS = 2 * CHUNK + 100
TASKS = [
    {"instruction": f"Add {i} to {i % 7}.", "input": "" if i % 3 else "quickly " * (i % 11), "output": f"It is {i}."}
    for i in range(NUM_TASKS)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    folder = tmp_path_factory.mktemp("smollm2")
    write_packaged_tokenizer("smollm2", folder)
    return HuggingFaceTokenizer(folder)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in [*TASKS, *TASKS[:9]]))
    return path


def keys_of(name: str, **keys: Any) -> dict[str, Any]:
    """All keys of a member of the group, those of its YAML where nothing else is said."""
    composed = plain(compose([f"data={name}"]))["data"]
    del composed["_target_"]
    return {**composed, **KEYS, **keys}


def load(file: Path, tokenizer: Any, **keys: Any) -> Dataset:
    return Alpaca(**keys_of("alpaca", path=str(file), **keys)).load(tokenizer)


def entry_in(cache: Path) -> Path:
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    return entry


@pytest.mark.slow
def test_cache_and_processes_change_nothing(file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    plain = load(file, tokenizer)
    assert len(plain.train) + len(plain.validation) == NUM_TASKS
    assert plain.counts["duplicates"] == 9
    assert plain.fingerprint == fingerprint(plain.train, plain.validation)
    assert plain.largest_token == max(max(sample.tokens) for sample in [*plain.train, *plain.validation])
    assert plain.num_tokens == sum(len(sample.tokens) for sample in plain.train)
    for workers in (1, 2):
        cached: dict[str, Any] = {"cache": True, "cache_dir": str(tmp_path / f"cache{workers}"), "workers": workers}
        assert load(file, tokenizer, **cached) == plain
        assert load(file, tokenizer, **cached) == plain
        entry_in(tmp_path / f"cache{workers}")


def test_the_second_time_nothing_is_read_or_tokenized(
    file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(file, tokenizer, cache=True, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(Alpaca, "example_of", lambda *_: pytest.fail("read again"))
    moved = file.rename(tmp_path / "moved.jsonl")
    assert load(moved, tokenizer, cache=True, cache_dir=str(tmp_path / "cache"), workers=2) == first


@pytest.mark.slow
def test_whatever_the_data_is_made_of_makes_another_entry(
    file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def entries(known: Any = tokenizer, **keys: Any) -> int:
        load(file, known, cache=True, cache_dir=str(cache), **keys)
        return len([path for path in cache.iterdir() if path.is_dir()])

    assert entries() == 1
    assert entries(workers=2) == 1
    other: list[dict[str, Any]] = [
        {"val_fraction": 0.3},
        {"max_seq_len": 200},
        {"too_long": "drop"},
        {"max_samples": 5},
        {"max_val_samples": 5},
        {"train_on": "all"},
    ]
    assert [entries(**keys) for keys in other] == [2, 3, 4, 5, 6, 7]
    more = HuggingFaceTokenizer(tokenizer.folder)
    more.add_tokens(["quickly"])
    assert entries(more) == 8
    shutil.copytree(tokenizer.folder, tmp_path / "other")
    template = tokenizer.chat_template.source
    (tmp_path / "other" / "chat_template.jinja").write_text("{# another #}" + template)
    assert entries(HuggingFaceTokenizer(tmp_path / "other")) == 9
    file.write_text(file.read_text().replace("Add 5 ", "Sum 5 "))
    assert entries() == 10


def test_every_key_that_is_no_place_is_part_of_what_data_is_made_of() -> None:
    from tuner.data.dataset import NO_CONTENT

    assert {field.name for field in fields(Preparation)} & set(NO_CONTENT) == {
        "cache",
        "cache_dir",
        "workers",
        "streaming",
        "shuffle_buffer",
        "packing",
        "pack_len",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, DESCRIPTION])
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_entry_is_said_and_made_anew(
    name: str, how: str, file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    keys: dict[str, Any] = {"cache": True, "cache_dir": str(cache), "max_samples": 20, "max_val_samples": 5}
    whole = load(file, tokenizer, **keys)
    damaged = entry_in(cache) / name
    content = damaged.read_bytes()
    damaged.unlink()
    if how != "missing":
        damaged.write_bytes(content[:-1] if how == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=rf"prepared data in .*: {name} is (damaged|missing); it is prepared again"):
        assert load(file, tokenizer, **keys) == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(file, tokenizer, **keys) == whole
    assert damaged.read_bytes() == content


def test_what_is_open_outlives_its_deletion(file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = load(file, tokenizer, cache=True, cache_dir=str(cache))
    shutil.rmtree(cache)
    assert data == load(file, tokenizer)
    assert load(file, tokenizer, cache=True, cache_dir=str(cache)) == data


def test_deleting_while_it_is_written_costs_time_alone(
    file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, times = tmp_path / "cache", []
    finish = "tuner.data.preparing.fingerprint_of_files"
    real: Callable[[Path], str] = __import__("tuner.data.samples").data.samples.fingerprint_of_files

    def deleting(folder: Path) -> str:
        times.append(folder)
        if len(times) == 1:
            shutil.rmtree(cache)
        return real(folder)

    monkeypatch.setattr(finish, deleting)
    assert load(file, tokenizer, cache=True, cache_dir=str(cache)) == load(file, tokenizer)
    assert len(times) == 3  # the second is the cached one made again, the third the one without a cache
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [""]


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed(file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load(file, tokenizer, cache=True, cache_dir=str(cache))
    entry = entry_in(cache)
    left = entry.rename(f"{entry}.77-abc.unfinished")
    assert load(file, tokenizer, cache=True, cache_dir=str(cache)) == load(file, tokenizer)
    assert entry.is_dir()
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_an_error(
    file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "blocked").write_text("")
    with pytest.raises(DataError, match=r"blocked/cache: the cache .* cannot be used .*name another folder as"):
        load(file, tokenizer, cache=True, cache_dir=str(tmp_path / "blocked" / "cache"))


SCRIPT = """
import sys
import tuner.data.dataset as dataset
from tuner.config import compose
from tuner.config.composition import plain
from tuner.data.alpaca import Alpaca
from tuner.tokenizers.huggingface import HuggingFaceTokenizer
from pathlib import Path
file, folder, cache, log, keys = sys.argv[1:]
prepare = dataset.prepare
def logged(*args):
    open(log, "a").write("prepared\\n")
    prepare(*args)
dataset.prepare = logged
sys.stdin.readline()
source = Alpaca(**{**eval(keys), "path": file, "cache": True, "cache_dir": cache})
data = source.load(HuggingFaceTokenizer(Path(folder)))
assert "torch" not in sys.modules
print(data.fingerprint, dataset.hashlib.sha256(repr([*data.train, *data.validation]).encode()).hexdigest())
"""


@pytest.mark.slow
def test_eight_processes_at_once_prepare_once(file: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [str(file), str(tokenizer.folder), str(tmp_path / "cache"), str(log), repr(keys_of("alpaca"))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    for process in processes:  # all of them have started when the first begins
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 8
    plain = load(file, tokenizer)
    shown = hashlib.sha256(repr([*plain.train, *plain.validation]).encode()).hexdigest()
    assert said == {f"{plain.fingerprint} {shown}\n"}
    assert log.read_text() == "prepared\n"
    assert entry_in(tmp_path / "cache").suffix == ""


@dataclass(frozen=True)
class Given(Preparation):
    """Data that a test makes."""

    name = "given"
    bad_rows = ()

    def examples(self) -> Any:
        return Listed(EXAMPLES)

    def validation_examples(self) -> Any:
        return Listed(VALIDATION) if VALIDATION else None


class Listed(list[Example]):
    name = "given"
    bad_rows = ()

    def content_digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


EXAMPLES: list[Example] = []
VALIDATION: list[Example] = []


@pytest.fixture(autouse=True)
def _no_examples() -> Iterator[None]:
    yield
    EXAMPLES.clear()
    VALIDATION.clear()


def example(number: int, *, text: str | None = None, chunk: bool = False, **turns: str) -> Example:
    said = {"user": f"question {number}", "assistant": f"answer {number}", **turns}
    messages: Any = [] if text is not None else [{"role": role, "content": words} for role, words in said.items()]
    return Example(messages, key=text or str(number), origin=f"given:{number}", text=text, chunk=chunk)


def test_the_split_is_by_digest_of_the_whole_key(tokenizer: HuggingFaceTokenizer) -> None:
    """The same choice as sorting by sha256, whatever is kept of it."""
    EXAMPLES.extend(example(number) for number in [*range(500), *range(0, 500, 3)])
    data = Given(**{**KEYS, "val_fraction": 0.1, "max_samples": 300, "max_val_samples": 30}).load(tokenizer)
    ranked = sorted(range(500), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    replies = [dialogue.reply for dialogue in data.dialogues]
    assert replies == [f"answer {i}" for i in ranked[:8]]
    assert texts(data.validation, tokenizer) == [f"answer {i}<|im_end|>" for i in ranked[:30]]
    assert texts(data.train, tokenizer) == [f"answer {i}<|im_end|>" for i in sorted(ranked[50:350])]


def texts(samples: Any, tokenizer: HuggingFaceTokenizer) -> list[str]:
    return [tokenizer.decode([label for label in sample.labels if label != IGNORE]) for sample in samples]


def test_validation_examples_of_their_own_are_not_trained_on(tokenizer: HuggingFaceTokenizer) -> None:
    EXAMPLES.extend(example(number) for number in range(20))
    VALIDATION.extend(example(number) for number in [*range(15, 30), 15])
    data = Given(**KEYS).load(tokenizer)
    assert texts(data.train, tokenizer) == [f"answer {i}<|im_end|>" for i in range(15)]
    ranked = sorted(range(15, 30), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    assert texts(data.validation, tokenizer) == [f"answer {i}<|im_end|>" for i in ranked]
    assert data.counts["duplicates"] == 6
    EXAMPLES[:] = [example(15), example(16)]
    with pytest.raises(DataError, match="given: no usable example to train on that is not validated on, of 18 read"):
        Given(**KEYS).load(tokenizer)


CHAT: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("response", "first<|im_end|>second<|im_end|>"),
        ("last_turn", "second<|im_end|>"),
        ("all", None),
    ],
)
def test_train_on_says_which_tokens_are_trained_on(
    train_on: str, trained: str | None, tokenizer: HuggingFaceTokenizer
) -> None:
    EXAMPLES.extend(Example(CHAT, key=str(number), origin="here:1") for number in range(2))
    data = Given(**{**KEYS, "train_on": train_on}).load(tokenizer)
    whole = tokenizer.apply_chat_template(CHAT)
    for sample in [*data.train, *data.validation]:
        assert list(sample.tokens) == whole
        assert texts([sample], tokenizer) == [tokenizer.render_chat(CHAT) if trained is None else trained]


def test_with_last_turn_an_earlier_reply_is_nothing_to_learn(tokenizer: HuggingFaceTokenizer) -> None:
    EXAMPLES.extend(example(number) for number in range(2))
    EXAMPLES.append(Example([*CHAT[:4], {"role": "assistant", "content": " "}], key="empty", origin="here:1"))
    counts = {on: Given(**{**KEYS, "train_on": on}).load(tokenizer).counts for on in ("response", "last_turn", "all")}
    assert {on: count["empty"] for on, count in counts.items()} == {"response": 0, "last_turn": 1, "all": 0}


def test_rows_cut_down_to_nothing_are_said(tokenizer: HuggingFaceTokenizer) -> None:
    EXAMPLES.extend(example(number) for number in range(10))
    EXAMPLES.extend(example(number, user="long " * 80) for number in range(10, 13))
    with pytest.warns(UserWarning, match=r"given: samples left out: 3; cut at data\.max_seq_len=60 tokens, nothing of"):
        data = Given(**{**KEYS, "max_seq_len": 60}).load(tokenizer)
    assert data.counts["nothing_trained"] == data.counts["truncated"] == 3
    assert len(data.train) + len(data.validation) == 10


def test_texts_are_trained_on_whole_and_cut_into_pieces(tokenizer: HuggingFaceTokenizer) -> None:
    words = [" ".join(f"word{number}x{k}" for k in range(40)) for number in range(6)]
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in words]
    EXAMPLES.extend(example(number, text=text) for number, text in enumerate(words))
    whole = Given(**{**KEYS, "max_seq_len": 2048}).load(tokenizer)
    samples = [*whole.train, *whole.validation]
    assert sorted(list(sample.tokens) for sample in samples) == sorted(ids)
    assert all(sample.labels == sample.tokens for sample in samples)
    assert whole.dialogues == []
    EXAMPLES[:] = [example(number, text=text, chunk=True) for number, text in enumerate(words)]
    pieces = Given(**{**KEYS, "max_seq_len": 50}).load(tokenizer)
    for side in ("train", "validation"):
        texts_ids = [list(sample.tokens) for sample in getattr(whole, side)]
        expected = [ids[at : at + 50] for ids in texts_ids for at in range(0, len(ids) - 1, 50)]
        assert [list(piece.tokens) for piece in getattr(pieces, side)] == expected
    assert pieces.counts["truncated"] == 0


def test_an_error_in_a_process_is_that_error(tokenizer: HuggingFaceTokenizer) -> None:
    EXAMPLES.extend(example(number) for number in range(CHUNK * 6))
    EXAMPLES[CHUNK * 3] = Example([{"role": "assistant", "content": "a\x00b"}], key="x", origin="given:x")
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('no question') }}{% endif %}" + (
        tokenizer.chat_template.source
    )
    folder = tokenizer.folder.with_name("raising")
    shutil.copytree(tokenizer.folder, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    for workers in (1, 2):
        with pytest.raises(ModelError, match="no question"):
            Given(**{**KEYS, "workers": workers}).load(HuggingFaceTokenizer(folder))


@pytest.mark.parametrize("kind", ["llama2", "gemma"])
def test_sentencepiece_in_processes_gives_the_same(kind: Any, tmp_path: Path) -> None:
    write_packaged_tokenizer(kind, tmp_path / kind)
    tokenizer = SentencePieceTokenizer(tmp_path / kind)
    tokenizer.add_tokens(["question"])
    EXAMPLES.extend(example(number) for number in range(40))
    assert Given(**{**KEYS, "workers": 2}).load(tokenizer) == Given(**KEYS).load(tokenizer)


def test_data_that_changes_while_it_is_read_is_an_error(
    file: Path, tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    example_of = Alpaca.example_of

    def growing(self: Alpaca, record: Any) -> Example:
        seen.append(record)
        if len(seen) == 10:
            with file.open("a") as opened:
                opened.write(json.dumps({"instruction": "new", "output": "new"}) + "\n")
        return example_of(self, record)

    monkeypatch.setattr(Alpaca, "example_of", growing)
    with pytest.raises(DataError, match="alpaca: the data has changed while it was read; start again"):
        load(file, tokenizer)


def test_samples_are_sequences_like_any_other(file: Path, tokenizer: HuggingFaceTokenizer) -> None:
    data = load(file, tokenizer)
    everything = list(data.train)
    assert data.train[3] == everything[3] == data.train[3 - len(everything)]
    assert data.train[5:50:3] == everything[5:50:3]
    assert data.train[::-1] == everything[::-1]
    assert data.train != everything[:-1]
    assert everything[7] in data.train
    assert Sample([1], [1]) not in data.train
    with pytest.raises(IndexError):
        data.train[len(everything)]


def test_conversations_need_no_file_in_the_working_folder(tmp_path: Path, tokenizer: HuggingFaceTokenizer) -> None:
    """A relative path is read by this process alone; the others get what was read."""
    os.chdir(tmp_path)
    Path("chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [*CHAT[:-1], {"role": "assistant", "content": str(i)}]}) + "\n" for i in range(9)
        )
    )
    keys = keys_of("messages", path="chats.jsonl")
    one, two = (Messages(**{**keys, "workers": workers}).load(tokenizer) for workers in (1, 2))
    assert one == two


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A file that may not grow stands for it: the same error of the system, at the same places."""
    rows = [{"instruction": f"Add {i}.", "output": f"It is {i}." * 20} for i in range(500)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from tuner.__main__ import main; main()"
    )
    words = ["model=tiny", "data=alpaca", "data.path=sums.jsonl", "data.cache_dir=kept", "logger=none", "out=run"]
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'kept'}: the cache of prepared data cannot be used (")
    assert line.endswith("name another folder as data.cache_dir, or say data.cache=false")
    assert [entry.suffix for entry in (tmp_path / "kept").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()
