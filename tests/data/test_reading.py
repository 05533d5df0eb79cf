"""Files of every kind as rows: the same rows whatever the kind, and the place of each thing that is wrong."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuner.data import json_files
from tuner.data.csv_files import csv_rows
from tuner.data.files import KINDS, FileRows, files_of
from tuner.data.json_files import json_rows
from tuner.data.parquet_files import parquet_rows
from tuner.data.records import MAX_ROW_BYTES, Record, Row
from tuner.errors import DataError

Fields = dict[str, str]
TEXTS = [
    "",
    " ",
    "plain",
    'a "quoted" word',
    "two\nlines",
    "comma, and; more",
    "\\ud83d",
    "🙂 Ωß中",
    "[{]}",
    "\u2028",
    "x" * 3000,
]


def write_lines(file: Path, rows: list[Fields], **options: Any) -> None:
    file.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")


def write_array(file: Path, rows: list[Fields], **options: Any) -> None:
    file.write_text(json.dumps(rows, **options), encoding="utf-8")


def write_csv(file: Path, rows: list[Fields]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: list[Any], **options: Any) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file, **options)


WRITERS: dict[str, Callable[..., None]] = {
    ".jsonl": write_lines,
    ".json": write_array,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def some_rows(number: int) -> list[Fields]:
    draw = random.Random(number)
    return [{"a": draw.choice(TEXTS), "b": draw.choice(TEXTS)} for _ in range(number)]


def fields(rows: Any) -> list[Any]:
    return [dict(row.fields) if isinstance(row, Record) else str(row) for row in rows]


def test_every_kind_has_a_writer_here() -> None:
    assert set(WRITERS) == set(KINDS)


@pytest.mark.parametrize("number", [1, 7, 2000])
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_are_what_was_written_and_counted_from_one(kind: str, number: int, tmp_path: Path) -> None:
    file, rows = tmp_path / f"data{kind}", some_rows(number)
    WRITERS[kind](file, rows)
    read: list[Row] = list(FileRows("data.path", str(file)))
    assert fields(read) == rows
    origins = [row.origin for row in read if isinstance(row, Record)]
    if kind == ".csv":
        ends = [sum(text.count("\n") for text in row.values()) for row in rows]
        assert origins == [f"{file}:{2 + i + sum(ends[:i])}" for i in range(number)]
    else:
        place = {".jsonl": ":", ".json": ": item ", ".parquet": ": row "}[kind]
        assert origins == [f"{file}{place}{i + 1}" for i in range(number)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 18])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_the_same_wherever_reading_pauses(
    chunk: int, ascii_only: bool, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    file = tmp_path / "data.json"
    rows = [{**row, "n": [1, -2.5e3, True, None, {"deep": [i]}]} for i, row in enumerate(some_rows(20))]
    write_array(file, rows, ensure_ascii=ascii_only, indent=indent)  # type: ignore[arg-type]
    assert fields(json_rows(file)) == rows
    file.write_text("[1, 23 , 456,\n-7]")
    assert fields(json_rows(file)) == [
        f"{file}: item {i}: a number, not a JSON object such as {{...}}" for i in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1},\n{"a" 2}]', ":2: not valid JSON: Expecting ':' delimiter at column 6"),
        (b'[{"a": 1}\n{"a": 2}]', ":2: not valid JSON: Expecting ',' or ']' at column 1"),
        (b'[{"a": 1},\n]', ":2: not valid JSON: Expecting value at column 1"),
        (b'[{"a": 1},\n\n {"a": "open', ":3: not valid JSON: Unterminated string starting at at column 8"),
        (b'[{"a": 1}', ":1: not valid JSON: Expecting ',' or ']' at column 10"),
        (b"[", ":1: not valid JSON: Expecting value at column 2"),
        (b'[{"a": 1}]\n{"a": 2}', ":2: not valid JSON: Extra data behind the array at column 1"),
        (b"[]]", ":1: not valid JSON: Extra data behind the array at column 3"),
        (b'[{"a": 1}, \0]', ":1: not valid JSON: a NUL byte at column 12"),
        (b'[{"a": 1},\n\xff{}]', ":2: not UTF-8 text (byte 0xff)"),
        (b"\xff\xfe[\0]\0", ":1: UTF-16 text; save the file as UTF-8"),
    ],
)
def test_what_ends_an_array(
    content: bytes, said: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    file = tmp_path / "data.json"
    file.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(json_rows(file))
    assert str(raised.value) == f"{file}{said}"


BAD_LINES = [
    (b"{'a': 1}", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"a": 1}{"a": 2}', "not valid JSON: Extra data at column 9"),
    (b'{"a": "\xff"}', "not UTF-8 text (byte 0xff)"),
    (b'{"a": "\xf0\x9f"}', "not UTF-8 text (byte 0xf0)"),
    (b'{"a": "\0"}', "not valid JSON: a NUL byte at column 8"),
    (b'{"a": "\\ud83d"}', "holds half of a surrogate pair, which is no text"),
    (b'{"a": "\\uDE42"}', "holds half of a surrogate pair, which is no text"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    (b"[" * 100_000, "nested too deeply"),
    (b"null", "null, not a JSON object such as {...}"),
    (b'["a"]', "a list, not a JSON object such as {...}"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[said[:40] for _, said in BAD_LINES])
def test_a_bad_line_is_one_row_of_many(line: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"a": "1"}\n\n' + line + b'\r\n \n{"a": "2"}')
    before, bad, behind = json_rows(file)
    assert isinstance(bad, DataError)
    assert str(bad).startswith(f"{file}:3: {said}")
    assert [before, behind] == [Record({"a": "1"}, f"{file}:1"), Record({"a": "2"}, f"{file}:5")]


def test_a_bad_text_within_an_array_is_one_item(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(b'[{"a": "\xff\xfe"}, {"a": "\\ud83d"}, {"a": "\\ud83d\\ude42"}, 3]')
    assert fields(json_rows(file)) == [
        f"{file}: item 1: not UTF-8 text (byte 0xff)",
        f"{file}: item 2: holds half of a surrogate pair, which is no text",
        {"a": "🙂"},
        f"{file}: item 4: a number, not a JSON object such as {{...}}",
    ]


def test_a_row_may_be_as_long_as_the_limit_and_no_longer(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    longest = {"a": "x" * (MAX_ROW_BYTES - len('{"a": ""}'))}
    with file.open("w") as stream:
        for row in (longest, {"a": longest["a"] + "x"}, {"a": "short"}):
            stream.write(json.dumps(row) + "\n")
    first, second, third = json_rows(file)
    assert fields([first, third]) == [longest, {"a": "short"}]
    assert str(second) == f"{file}:2: a row of more than 16 MiB; are there line ends in this file?"


LONG = 100_000_000


def long_line(file: Path) -> None:
    file.write_bytes(b'{"a": "' + b"x" * LONG + b'"}')


def long_item(file: Path) -> None:
    file.write_bytes(b'[{"a": "' + b"x" * LONG + b'"}]')


def long_list(file: Path) -> None:
    file.write_bytes(b"[[" + b"1," * (LONG // 2) + b"1]]")


def long_cell(file: Path) -> None:
    file.write_bytes(b'a,b\n1,2\n3,"' + b"x" * LONG + b"\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "kind", "place"),
    [
        (long_line, ".jsonl", ":1"),
        (long_item, ".json", ": item 1"),
        (long_list, ".json", ": item 1"),
        (long_cell, ".csv", ":3"),
    ],
)
def test_a_row_of_100_megabytes_is_refused_in_little_memory_and_time(
    write: Callable[[Path], None], kind: str, place: str, tmp_path: Path
) -> None:
    file = tmp_path / f"data{kind}"
    write(file)
    start = time.monotonic()
    said, peak_mib = read_alone(file)
    assert f"{file}{place}: a row of more than 16 MiB" in said
    assert peak_mib < 260  # 8 million numbers take what they take
    assert time.monotonic() - start < 10


READ_ALONE = """
import re, sys
from pathlib import Path
from tuner.data.files import FileRows
from tuner.errors import DataError
number = 0
try:
    for row in FileRows("data.path", sys.argv[1]):
        if isinstance(row, DataError):
            print(row)
        number += 1
except DataError as error:
    print(error)
print(number, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def read_alone(file: Path) -> tuple[str, float]:
    """What a process says that reads all rows and does nothing else, and its peak memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ALONE, str(file)], capture_output=True, text=True, check=True, timeout=120
    )
    said, _, last = done.stdout.rstrip().rpartition("\n")
    number, peak = last.split()
    return said or number, float(peak)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """300 MB, within 200 MiB; pyarrow alone takes 60."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    rows = [{"a": " ".join(draw.choices(words, k=200)), "b": str(i)} for i in range(1000)]
    file = tmp_path / f"data{kind}"
    if kind == ".parquet":
        table = pa.Table.from_pylist(rows)
        with pq.ParquetWriter(file, table.schema) as writer:
            for _ in range(20):
                writer.write_table(pa.concat_tables([table] * 10), row_group_size=10_000)
        expected = 200_000
    else:
        WRITERS[kind](file, rows)
        once, head, tail = file.read_bytes(), b"", b""
        if kind == ".json":
            head, once, tail = b"[", once[1:-1] + b", ", b'{"a": "", "b": ""}]'
        elif kind == ".csv":
            names, _, once = once.partition(b"\n")
            head = names + b"\n"
        times = 300_000_000 // len(once) + 1
        with file.open("wb") as stream:
            stream.write(head)
            for _ in range(times):
                stream.write(once)
            stream.write(tail)
        expected = times * 1000 + (kind == ".json")
    number, peak_mib = read_alone(file)
    assert int(number) == expected
    assert peak_mib < 200


ONE, THREE = (f"{n} where the first line names 2" for n in ("1 column", "3 columns"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"a,b\n1,2\n3\n4,5\n", [{"a": "1", "b": "2"}, f":3: {ONE}", {"a": "4", "b": "5"}]),
        (b"a,b\n1\n\n2,3,4\n", [f":2: {ONE}", f":4: {THREE}"]),
        (b'a,b\n\n1,"x\ny"\n3\n', [{"a": "1", "b": "x\ny"}, f":5: {ONE}"]),
        (b"\xef\xbb\xbfa,b\r\n007,NULL\r\n", [{"a": "007", "b": "NULL"}]),
        (b"a,b\n1,\xff\n,\n", [":2: not UTF-8 text (byte 0xff)", {"a": "", "b": ""}]),
        (b"a,b\n1,2\x003\n4,5", [":2: holds a NUL byte", {"a": "4", "b": "5"}]),
        (b"a\n1\n\n2\n", [{"a": "1"}, {"a": "2"}]),
        (b'a,b\n5" tall,x\n"say ""x""",y', [{"a": '5" tall', "b": "x"}, {"a": 'say "x"', "b": "y"}]),
        (b'a,b\n"1"2,3\n4,5\n', [""":2: not valid CSV: ',' expected after '"'""", {"a": "4", "b": "5"}]),
        (b'a,b\n1,2\n3,"open\n4,5\n', [{"a": "1", "b": "2"}, ":3: not valid CSV: unexpected end of data"]),
    ],
)
def test_rows_of_a_csv_file(content: bytes, found: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(content)
    assert fields(csv_rows(file)) == [one if isinstance(one, dict) else f"{file}{one}" for one in found]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.csv", b"a,a\n1,2\n", "FILE: two columns are called 'a'"),
        ("data.csv", b"a,\xff\n1,2\n", "FILE:1: not UTF-8 text (byte 0xff)"),
        ("data.csv", b"\xff\xfea\0,\0b\0", "FILE:1: UTF-16 text; save the file as UTF-8"),
        ("data.csv", b"", "FILE: the file holds no examples"),
        ("data.csv", b"a,b\n", "FILE: the file holds no examples"),
        ("data.csv", b"a,b", "FILE: the file holds no examples"),
        ("data.json", b"[]", "FILE: the file holds no examples"),
        ("data.jsonl", b"\n\n", "FILE: the file holds no examples"),
        ("data.parquet", b"", "FILE: cannot be read as Parquet: "),
        ("data.parquet", b"PAR1, or so it says PAR1", "FILE: cannot be read as Parquet: "),
        ("data.txt", b"{}", "data.path: FILE: of no known kind; its name has to end in .jsonl, .json, .csv, .parquet"),
        ("data", b"{}", "data.path: FILE: of no known kind; its name has to end in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(FileRows("data.path", str(file)))
    assert said.replace("FILE", str(file)) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_parquet_file_says_how_far_it_was_read(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    rows = [{"a": f"{i} " * 50} for i in range(2000)]
    write_parquet(file, rows, row_group_size=1000, use_dictionary=False)
    content = bytearray(file.read_bytes())
    second = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content[second : second + 40] = b"\xff" * 40
    file.write_bytes(content)
    read: list[Row] = []
    with pytest.raises(DataError, match=r"data\.parquet: behind row \d+: cannot be read as Parquet: ") as raised:
        read.extend(parquet_rows(file))
    assert f"behind row {len(read)}:" in str(raised.value)
    assert fields(read) == rows[: len(read)]
    assert 0 < len(read) <= 1000


def test_parquet_that_is_no_text_is_one_row(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    cells = pa.array([b"good", b"b\xffd", b"fine"]).view(pa.binary()).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, cells.buffers())
    pq.write_table(pa.table({"a": broken}), file)
    assert fields(parquet_rows(file)) == [{"a": "good"}, f"{file}: row 2: not UTF-8 text (byte 0xff)", {"a": "fine"}]


def test_parquet_columns_of_other_types_have_a_name() -> None:
    import datetime

    row = Record({"day": datetime.date(2020, 1, 1), "raw": b"x", "x": 1.5}, "FILE: row 1")
    for column, held in {"day": "a value of type date", "raw": "a value of type bytes", "x": "a number"}.items():
        with pytest.raises(DataError, match=f"FILE: row 1: column '{column}' holds {held}, not a text"):
            row.text(column)


def test_a_folder_and_a_pattern_are_files_in_sorted_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a", "c"):
        write_lines(tmp_path / f"{name}.jsonl", [{"name": name}])
    for ignored in (".hidden.jsonl", "_SUCCESS"):
        (tmp_path / ignored).write_text("")
    (tmp_path / "deeper").mkdir()
    assert fields(FileRows("data.path", str(tmp_path))) == [{"name": name} for name in "abc"]
    assert capsys.readouterr().err == ""
    assert fields(FileRows("data.path", f"{tmp_path}/[bc].jsonl")) == [{"name": "b"}, {"name": "c"}]
    assert fields(FileRows("data.path", f"{tmp_path.parent}/**/?.jsonl"))[:3] == [{"name": name} for name in "abc"]
    (tmp_path / "README.md").write_text("# Data")
    assert len(files_of("data.path", str(tmp_path))) == 3
    assert capsys.readouterr().err == (
        f"data.path: {tmp_path}: left out, being none of .jsonl, .json, .csv, .parquet: README.md\n"
    )


def test_a_name_that_looks_like_a_pattern_is_a_file_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "a[1].jsonl", [{"a": "1"}])
    write_lines(tmp_path / "a1.jsonl", [{"a": "2"}])
    assert fields(FileRows("data.path", f"{tmp_path}/a[1].jsonl")) == [{"a": "1"}]


def test_paths_that_name_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "mixed").mkdir()
    write_lines(tmp_path / "mixed" / "a.jsonl", [{"a": "1"}])
    write_csv(tmp_path / "mixed" / "b.csv", [{"a": "1"}])
    kinds = r"\.jsonl, \.json, \.csv, \.parquet"
    for path, said in {
        "empty": rf"empty is a folder without any {kinds} file; it holds no file$",
        "other": rf"other is a folder without any {kinds} file; it holds notes\.txt$",
        "nowhere.csv": r"nowhere\.csv does not exist \(looked for /.*nowhere\.csv\); give a",
        "*.parquet": r"\*\.parquet fits no file \(looked in /",
        "mixed": r"mixed holds files of different kinds: \.csv \(b\.csv\), \.jsonl \(a\.jsonl\); name one kind, as",
        "mixed/*": r"mixed/\* holds files of different kinds: \.csv",
        "other/*": rf"notes\.txt: of no known kind; its name has to end in {kinds}",
    }.items():
        with pytest.raises(DataError, match=rf"^data\.val_path: .*{said}"):
            files_of("data.val_path", f"{tmp_path}/{path}")


def test_one_empty_file_of_many_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"a": "1"}])
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl: the file holds no examples"):
        list(FileRows("data.path", str(tmp_path)))


def test_the_digest_is_of_what_is_in_the_files_and_their_order(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return FileRows("data.path", str(path)).content_digest()

    one, two = tmp_path / "one", tmp_path / "two"
    for folder, names in ((one, "abc"), (two, "xyz")):
        folder.mkdir()
        for i, name in enumerate(names):
            write_lines(folder / f"{name}.jsonl", [{"a": str(i)}])
    assert digest(one) == digest(two) == digest(one)
    assert digest(one / "a.jsonl") == digest(two / "x.jsonl") != digest(one / "b.jsonl")
    (one / "a.jsonl").rename(one / "d.jsonl")
    assert digest(one) != digest(two)
    assert digest(one / "b.jsonl") != digest((one / "b.jsonl").rename(one / "b.json"))


def test_an_array_is_taken_for_one_exactly_where_python_s_decoder_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays with a character replaced, left out or put in, read in small pieces."""
    draw, file = random.Random(11), tmp_path / "data.json"
    accepted = refused = 0
    for _ in range(400):
        rows = [{"a": draw.choice(["x", '"', "\\", "ü", "\n"]) * 2, "n": [draw.random(), None]} for _ in range(2)]
        text = json.dumps(rows, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 0]))
        at = draw.randrange(1, len(text))
        text = text[:at] + draw.choice(["", *'"\\{}[],: 1eu\n']) + text[at + draw.randrange(2) :]
        file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(json_files, "CHUNK", draw.randrange(1, 30))
        try:
            expected = json.loads(text)
        except ValueError:
            refused += 1
            with pytest.raises(DataError):
                list(json_rows(file))
        else:
            accepted += 1
            assert [row for row in fields(json_rows(file)) if isinstance(row, dict)] == [
                item for item in expected if isinstance(item, dict)
            ]
    assert min(accepted, refused) > 50
