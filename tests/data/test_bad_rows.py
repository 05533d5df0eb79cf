"""Bad rows: every one is named, none is left out unless it was said how many may be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from tuner.data import bad_rows
from tuner.data.bad_rows import CheckedExamples
from tuner.data.dataset import Example
from tuner.data.records import Record, Row
from tuner.errors import DataError


class Given:
    """Rows by letter: `.` is good, `x` one that the reader refuses, `o` one that the layout refuses, `!` ends it."""

    def __init__(self, letters: str) -> None:
        self.letters = letters
        self.read = 0

    def __iter__(self) -> Iterator[Row]:
        for number, letter in enumerate(self.letters, start=1):
            self.read = number
            if letter == "!":
                raise DataError(f"FILE:{number}: the end")
            origin = f"FILE:{number}"
            yield DataError(f"{origin}: unreadable") if letter == "x" else Record({"letter": letter}, origin)

    def content_digest(self) -> str:
        return self.letters


def example_of(record: Record) -> Example:
    if record.fields["letter"] == "o":
        raise DataError(f"{record.origin}: nothing in it")
    return Example([], record.origin, record.origin)


def read(letters: str, allowed: int) -> tuple[CheckedExamples, list[str]]:
    examples = CheckedExamples("rows", Given(letters), example_of, allowed)
    return examples, [example.origin for example in examples]


def refusal(letters: str, allowed: int) -> list[str]:
    with pytest.raises(DataError) as raised:
        read(letters, allowed)
    return str(raised.value).splitlines()


def places(letters: str, wanted: str) -> list[str]:
    return [f"FILE:{i + 1}" for i, letter in enumerate(letters) if letter in wanted]


@pytest.mark.parametrize("letters", ["....", "x...", ".o.x..x", "oooo", "o"])
def test_as_many_as_allowed_are_left_out_aloud_once(letters: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = places(letters, "xo")
    examples, origins = read(letters, len(bad))
    assert origins == places(letters, ".")
    assert len(examples.bad_rows) == len(bad)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == bad
    heads = [f"left out, bad row {i} of data.max_bad_rows={len(bad)}" for i in range(1, len(bad) + 1)]
    assert [line.split(": ")[0] for line in said] == heads
    assert [example.origin for example in examples] == origins
    assert len(examples.bad_rows) == len(bad)
    assert capsys.readouterr().err == ""


def test_what_a_pass_that_stopped_early_has_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    examples = CheckedExamples("rows", Given("x.o."), example_of, 2)
    assert next(iter(examples)).origin == "FILE:2"
    assert list(examples) == list(examples)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_one_bad_row_is_one_line() -> None:
    assert refusal("..x..", 0) == ["FILE:3: unreadable"]
    assert refusal("..o", 0) == ["FILE:3: nothing in it"]


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_one_more_than_allowed_refuses_and_lists_them_all(allowed: int) -> None:
    assert refusal("x.o.x.", allowed) == [
        f"rows: 3 bad rows in 6 rows, more than data.max_bad_rows={allowed}:",
        "  FILE:1: unreadable",
        "  FILE:3: nothing in it",
        "  FILE:5: unreadable",
    ]


@pytest.mark.parametrize("number", [20, 21, 500])
def test_twenty_are_listed_and_the_others_counted(number: int) -> None:
    head, *listed = refusal("." + "x" * number, 0)
    assert head == f"rows: {number} bad rows in {number + 1} rows, more than data.max_bad_rows=0:"
    assert [line.split(":")[1] for line in listed[:20]] == [str(i) for i in range(2, 22)]
    assert listed[20:] == ([f"  and {number - 20} more"] if number > 20 else [])


def test_the_look_for_more_of_them_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_rows, "LOOK", 100)
    rows = Given(".x" + "o." * 1000)
    with pytest.raises(DataError, match="rows: 51 bad rows in the first 102 rows, more than"):
        list(CheckedExamples("rows", rows, example_of, 0))
    assert rows.read == 102


def test_what_ends_a_file_is_told_with_the_others() -> None:
    assert refusal("..!", 5) == ["FILE:3: the end"]
    assert refusal(".x.!", 0)[1:] == ["  FILE:2: unreadable", "  FILE:4: the end"]


def test_examples_come_as_they_are_asked_for() -> None:
    rows = Given("." * 10)
    some = list(islice(CheckedExamples("rows", rows, example_of, 0), 3))
    assert ([example.origin for example in some], rows.read) == (["FILE:1", "FILE:2", "FILE:3"], 3)
