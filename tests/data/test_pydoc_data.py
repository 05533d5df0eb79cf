"""The standard library as data: what is read, and that nothing leaks from training into validation."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tuner.data.dataset import Example
from tuner.data.pydoc import PyDoc, normalised, read_examples
from tuner.errors import DataError
from tuner.tokenizers.huggingface import HuggingFaceTokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import IGNORE, Dataset, Sample

UNCACHED = ("response", False, None, None, False, 100, "none", None)
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

SOURCE = '''
"""The module's own."""
import sys

class Reader(Base, metaclass=Meta):
    """Reads a file of any kind,
    line by line.

    More about it.
    """

    async def next(self, /, n: int = 1, *names: str, flag: "yes | no" = r"\\d", **rest) -> list[str]:
        """Return the next lines of the file."""
        def inner():
            """Not a thing that anyone can call."""

    def _hidden(self):
        """Not a thing for others to call."""

    def short(self):
        """Too short."""

if sys.platform == "x":
    def only_there(a,
                   b=(1, 2)):
        """Defined on one platform only."""
else:
    try:
        def only_there(c):
            """Defined on all of the others."""
    except ImportError:
        raise
'''


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    return HuggingFaceTokenizer(folder)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return read_examples(LIBRARY)


@pytest.fixture(scope="module")
def dataset(tokenizer: HuggingFaceTokenizer) -> Dataset:
    """All of it, every validation pair included."""
    return PyDoc(0.1, 2048, "refuse", None, None, *UNCACHED).load(tokenizer)


def _reply(sample: Sample, tokenizer: HuggingFaceTokenizer) -> str:
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def test_pairs_of_a_source_file(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(SOURCE)
    for skipped in ("test", "site-packages", "_private", "config-3.11-x"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "module.py").write_text(SOURCE)
    (tmp_path / "_private.py").write_text(SOURCE)
    prompt = "Say in one paragraph what this Python {} does:\n\n{}"
    arguments = "self, /, n: int=1, *names: str, flag: 'yes | no'='\\\\d', **rest"
    expected = [
        ("class", "class package.Reader(Base, metaclass=Meta)", "Reads a file of any kind, line by line."),
        ("function", f"async def package.Reader.next({arguments}) -> list[str]", "Return the next lines of the file."),
        ("function", "def package.only_there(a, b=(1, 2))", "Defined on one platform only."),
        ("function", "def package.only_there(c)", "Defined on all of the others."),
    ]
    examples = read_examples(tmp_path)
    assert [tuple(m["content"] for m in example.messages) for example in examples] == [
        (prompt.format(kind, signature), reply) for kind, signature, reply in expected
    ]
    assert examples[0].origin == "package/__init__.py:5"


@pytest.mark.slow
def test_order_and_content_do_not_depend_on_where_the_library_is(tmp_path: Path, examples: list[Example]) -> None:
    for name in ("textwrap.py", "string.py", "json/decoder.py", "json/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((LIBRARY / name).read_bytes())
    copied = read_examples(tmp_path)
    files = {example.origin.split(":")[0] for example in copied}
    assert files == {"textwrap.py", "string.py", "json/decoder.py", "json/__init__.py"}
    assert copied == [example for example in examples if example.origin.split(":")[0] in files]


@pytest.mark.slow
def test_enough_pairs_of_one_line_each(examples: list[Example]) -> None:
    assert len(examples) > 4000
    assert len({example.key for example in examples}) > 4000
    for example in examples:
        question, reply = (message["content"] for message in example.messages)
        assert question.count("\n") == 2
        assert "\n" not in reply
        assert 20 <= len(reply) <= 400
        assert " at 0x" not in question


def test_no_validation_answer_occurs_in_training(dataset: Dataset, tokenizer: HuggingFaceTokenizer) -> None:
    train = {normalised(_reply(sample, tokenizer)) for sample in dataset.train}
    validation = {normalised(_reply(sample, tokenizer)) for sample in dataset.validation}
    assert len(train) == len(dataset.train)
    assert len(validation) == len(dataset.validation)
    assert not train & validation
    assert len(validation) == round(0.1 * (len(train) + len(validation)))


def test_only_reply_and_its_end_are_trained_on(dataset: Dataset, tokenizer: HuggingFaceTokenizer) -> None:
    for dialogue, sample in zip(dataset.dialogues, dataset.validation, strict=False):
        assert _reply(sample, tokenizer) == dialogue.reply + "<|im_end|>"
        prompt = tokenizer.apply_chat_template(dialogue.messages, add_generation_prompt=True)
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert set(sample.labels[: len(prompt)]) == {IGNORE}
    assert len(dataset.dialogues) == 8


@pytest.mark.slow
def test_counts_add_up(dataset: Dataset, tokenizer: HuggingFaceTokenizer) -> None:
    few = PyDoc(0.1, 100, "drop", 500, 96, *UNCACHED).load(tokenizer)
    assert few.counts["train"] == len(few.train)
    assert few.counts["validation"] == len(few.validation)
    unread = ("train_unused", "validation_unused", "duplicates", "empty", "dropped", "nothing_trained")
    for data in (dataset, few):
        left_out = sum(data.counts.get(name, 0) for name in unread)
        assert data.counts["examples"] == data.counts["train"] + data.counts["validation"] + left_out
    assert few.counts["train_unused"] == len(dataset.train) - 500
    assert few.counts["validation_unused"] == len(dataset.validation) - 96
    assert max(len(sample.tokens) for sample in [*few.train, *few.validation]) <= 100


@pytest.mark.slow
def test_chosen_samples_are_spread_over_the_library(dataset: Dataset, tokenizer: HuggingFaceTokenizer) -> None:
    few = PyDoc(0.1, 2048, "refuse", 300, 96, *UNCACHED).load(tokenizer)
    everything = [sample.tokens for sample in dataset.train]
    places = [everything.index(sample.tokens) for sample in few.train]
    assert places == sorted(places)
    assert places[0] < 0.1 * len(everything)
    assert places[-1] > 0.9 * len(everything)
    assert few.validation == dataset.validation[:96]


@pytest.mark.slow
def test_two_processes_give_one_fingerprint(dataset: Dataset, tokenizer: HuggingFaceTokenizer) -> None:
    code = (
        "from tuner.data.pydoc import PyDoc; from tuner.tokenizers import load_tokenizer;"
        f"data = PyDoc(0.1, 2048, 'refuse', None, None, *{UNCACHED});"
        f"print(data.load(load_tokenizer({str(tokenizer.folder)!r})).fingerprint)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    assert [process.communicate()[0].strip() for process in processes] == [dataset.fingerprint] * 2


def test_no_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documented Python sources"):
        read_examples(tmp_path)
    (tmp_path / "broken.py").write_text('"""x"""\n\ndef f(:\n')
    with pytest.raises(DataError, match=r"broken\.py:3: cannot be parsed"):
        read_examples(tmp_path)
