"""`tuner data`: what is shown is what the run trains on, and every number can be counted again."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

import tuner
from tuner.__main__ import dispatch
from tuner.data.order import Packed, Shuffled
from tuner.data.streamed_batches import StreamedBatches
from tuner.errors import DataError, ModelError
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.packaged import write_packaged_tokenizer
from tuner.types import IGNORE, Dataset, StreamPosition, Tokenizer
from tuner.verbs.shown_samples import stretches

WORDS = ["model=tiny", "data=alpaca", "data.path=sums.jsonl", "data.max_seq_len=200", "data.val_fraction=0.1"]
SHARED = ["data.max_val_samples=null", "train.batch_size=4", "train.gradient_accumulation_steps=3"]


@pytest.fixture
def _sums(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i} to 3.", "output": f"It is {i + 3}." + " So" * (i % 40)} for i in range(100)]
    rows.append(rows[5])
    rows[7]["output"] = "Brackets ]] and <|im_end|>\x1b[31m."
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _dataset(*words: str) -> tuple[Dataset, Tokenizer]:
    write_packaged_tokenizer("tiny", Path("tokenizer"))
    tokenizer = load_tokenizer("tokenizer")
    return _loaded(tokenizer, *WORDS, "data.max_val_samples=null", *words), tokenizer


def _loaded(tokenizer: Tokenizer, *words: str) -> Dataset:
    dataset: Dataset = instantiate(tuner.compose(words).data).load(tokenizer)
    return dataset


def _number(shown: str, name: str) -> int:
    found = re.search(rf"^  {name} +([\d,]+)", shown, re.M)
    assert found, shown
    return int(found[1].replace(",", ""))


@pytest.mark.usefixtures("_sums")
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_numbers_are_those_of_the_dataset(too_long: str) -> None:
    shown = dispatch(["data", *WORDS, *SHARED, f"data.too_long={too_long}"])
    dataset, _ = _dataset(f"data.too_long={too_long}")
    tokens = [len(sample.tokens) for sample in dataset.train]
    trained = [sum(label != IGNORE for label in sample.labels) for sample in dataset.train]
    assert _number(shown, "examples") == 101
    assert _number(shown, "duplicates") == 1
    assert _number(shown, "truncated" if too_long == "truncate" else "dropped") > 0
    for name, count in dataset.counts.items():
        assert not count or _number(shown, name.replace("_", " ")) == count
    assert _number(shown, "tokens") == sum(tokens)
    assert _number(shown, "trained tokens") == sum(trained)
    assert _number(shown, "steps") == -(-len(tokens) // 12)
    assert _number(shown, "validation tokens") == sum(len(sample.tokens) for sample in dataset.validation)
    bars = re.findall(r"^ +[\d,]+(?: to [\d,]+)? +([\d,]+) *█*$", shown, re.M)
    assert sum(int(bar.replace(",", "")) for bar in bars) == len(tokens)
    assert f"  all      min {min(tokens)}  median {sorted(tokens)[(len(tokens) - 1) // 2]}  p95 " in shown
    assert f"max {max(tokens)}  mean {sum(tokens) / len(tokens):.1f}" in shown
    assert dataset.fingerprint[:16] in shown


@pytest.mark.usefixtures("_sums")
def test_shown_samples_are_the_first_of_the_run_and_brackets_hold_what_trains() -> None:
    shown = dispatch(["data", *WORDS, *SHARED, "train.num_samples=90"])
    dataset, tokenizer = _dataset()
    lengths = [len(sample.tokens) for sample in dataset.train]
    order = [i for (i,) in Shuffled(lengths, seed=0, fingerprint=dataset.fingerprint).rows(0)]
    parts = re.split(r"^── sample \d+: (\d+) tokens, (\d+) trained ─+$", shown.split("\nExamples of")[0], flags=re.M)[
        1:
    ]
    samples = list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
    assert len(samples) == len(dataset.train)
    for (tokens, trained, text), i in zip(samples, order, strict=False):
        sample = dataset.train[i]
        reply = tokenizer.decode([label for label in sample.labels if label != IGNORE])
        assert (int(tokens), int(trained)) == (len(sample.tokens), sum(label != IGNORE for label in sample.labels))
        assert re.findall("⟦(.*)⟧", text, re.S) == [reply.replace("\x1b", "\\x1b")]
        whole = text.strip("\n").replace("↵", "").replace("⟦", "").replace("⟧", "")
        assert whole == tokenizer.decode(sample.tokens).replace("\x1b", "\\x1b").rstrip("\n")


@pytest.mark.parametrize("kind", ["tiny", "llama2", "gemma", "qwen"])
def test_stretches_are_the_whole_text_whatever_the_tokenizer(kind: str) -> None:
    write_packaged_tokenizer(kind, Path("tokenizer"))
    tokenizer = load_tokenizer("tokenizer")
    rows = [{"instruction": "Grüße  an 世界", "output": f" 👋🏽 x  y{i}\n\nz "} for i in range(2)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = _loaded(tokenizer, *WORDS, "data.max_seq_len=2000")
    (sample,) = dataset.train
    found = list(stretches(sample, tokenizer))
    assert "".join(stretch.text for stretch in found) == tokenizer.decode(sample.tokens)
    assert "".join(stretch.text for stretch in found if stretch.trained).strip().startswith("👋🏽 x  y")
    assert any(stretch.control and stretch.trained for stretch in found)


@pytest.mark.usefixtures("_sums")
def test_nothing_is_written_and_no_weights_are_needed(tmp_path: Path) -> None:
    """A folder with a config.json and a tokenizer, as it is before its weights have come."""
    write_packaged_tokenizer("tiny", tmp_path / "model")
    tuner_config = {"model_type": "llama", "vocab_size": 352, "hidden_size": 8, "intermediate_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**tuner_config, **layers}))
    before = sorted(tmp_path.rglob("*"))
    shown = dispatch(["data", *WORDS[1:], "model=llama2_7b", "model.path=model"])
    assert shown == dispatch(["data", *WORDS])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("_sums")
def test_what_is_wrong_is_what_the_run_would_say() -> None:
    with pytest.raises(DataError, match=r"tokens, more than data\.max_seq_len=200"):
        dispatch(["data", *WORDS, "data.too_long=refuse"])
    with pytest.raises(ModelError, match=r"model\.chat_template=phi3 writes"):
        dispatch(["data", *WORDS, "model.chat_template=phi3"])


@pytest.mark.slow
@pytest.mark.usefixtures("_sums")
def test_colour_on_a_terminal_and_letters_where_there_are_no_others() -> None:
    command = [sys.executable, "-m", "tuner", "data", *WORDS, "train.num_samples=1"]
    env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(Path(tuner.__file__).parents[1])}
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=follower)
    os.close(follower)
    seen = b""
    while True:
        try:
            read = os.read(leader, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not read:
            break
        seen += read
    assert process.wait() == 0
    assert "\x1b[1;7;32m<|im_end|>" in seen.decode()
    assert "⟦" not in seen.decode()
    plain = subprocess.run(command, env={**env, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True).stdout
    assert b"[[" in plain
    assert b"\x1b" not in plain
    plain.decode("ascii")


@pytest.mark.usefixtures("_sums")
def test_packed_rows_are_counted_as_the_run_steps() -> None:
    shown = dispatch(["data", *WORDS, *SHARED, "data.packing=pack", "data.pack_len=512", "train.batch_size=1"])
    dataset, _ = _dataset()
    rows = Packed([len(s.tokens) for s in dataset.train], seed=0, fingerprint=dataset.fingerprint, row_tokens=512)
    assert 1 < rows.num_rows < len(dataset.train)
    assert _number(shown, "steps") == -(-rows.num_rows // 3)


STREAMED = ["data.streaming=true", "data.max_samples=null", "data.shuffle_buffer=20", "train.epochs=null"]


def test_the_head_of_a_stream_is_shown_as_the_run_will_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.verbs.data.HEAD", 30)
    rows = [{"instruction": f"Add {i} to 3.", "output": f"It is {i + 3}." + " So" * (i % 40)} for i in range(300)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, *SHARED, *STREAMED, "train.max_steps=7", "data.cache=false"]
    shown = dispatch(["data", *words, "train.num_samples=5", "seed=3"])
    write_packaged_tokenizer("tiny", Path("tokenizer"))
    tokenizer = load_tokenizer("tokenizer")
    dataset = _loaded(tokenizer, *words)
    batches = StreamedBatches(dataset.stream, batch_size=1, accumulation=1, pad_id=0, seed=3)
    first = [next(batches)[0] for _ in range(30)]
    replies = [tokenizer.decode(batch.labels[batch.labels != IGNORE].tolist()) for batch in first]
    assert re.findall("⟦([^⟧]+)⟧", shown.split("\nExamples of")[0])[1:] == replies[:5]
    tokens = [batch.num_tokens for batch in first]
    assert "\nExamples of alpaca, streamed: read for its first 30 samples\n" in shown
    assert "\nTokens of a training sample, of the first 30 samples\n" in shown
    assert f"  all      min {min(tokens)}  median {sorted(tokens)[14]}  p95 " in shown
    assert 50 <= _number(shown, "examples") <= 200, "more, as some wait in the buffer or are read ahead, but not all"
    assert _number(shown, "validation") == len(dataset.validation)
    assert _number(shown, "tokens") == round(sum(tokens) / 30 * 12)
    assert _number(shown, "steps of this run") == 7
    assert f"about {sum(tokens) / 30 * 12 * 7:,.0f} tokens" in shown
    assert "  steps of an epoch  not known" in re.sub(" +(?=not known)", "  ", shown)
    assert dataset.fingerprint[:16] in shown


@pytest.mark.usefixtures("_sums")
def test_a_stream_that_ends_at_its_head_is_told_as_a_whole() -> None:
    words = [*WORDS, *SHARED, *STREAMED, "train.max_steps=7"]
    shown = dispatch(["data", *words])
    write_packaged_tokenizer("tiny", Path("tokenizer"))
    stream = _loaded(load_tokenizer("tokenizer"), *words).stream
    assert stream is not None
    tokens = [len(drawn.sample.tokens) for drawn in stream.samples(0, StreamPosition())]
    assert (_number(shown, "examples"), _number(shown, "duplicates")) == (101, 1)
    assert _number(shown, "tokens") == sum(tokens)
    assert _number(shown, "steps") == -(-len(tokens) // 12)
    assert _number(shown, "set aside") == 101 - 1 - len(tokens)
    assert "not known" not in shown


@pytest.mark.usefixtures("_sums")
def test_a_stream_without_a_sample_is_an_error() -> None:
    words = [*WORDS, *SHARED, *STREAMED, "train.max_steps=7", "data.val_path=short.jsonl", "data.too_long=drop"]
    Path("short.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    rows = [{"instruction": f"{i}", "output": "long " * 100} for i in range(5)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="alpaca, streamed: there is no sample to train on in all of the data"):
        dispatch(["data", *words, "data.path=long.jsonl"])
