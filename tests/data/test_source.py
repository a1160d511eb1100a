"""One function reads rows, whatever they stand in; a path is a path, and never a name to look up."""

import datetime
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minirlhf.data import hub
from minirlhf.data.source import fingerprint, is_local, read_rows
from minirlhf.runs import InputError, sha256_of

ROWS = [{"prompt": f"p{i}", "facts": {"n": i, "tags": ["a", None]}} for i in range(7)]


def complaint(source: Path | str) -> str:
    with pytest.raises(InputError) as raised:
        list(read_rows(source))
    return str(raised.value)


def parquet(path: Path, table: dict, **options: Any) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table(table), path, **options)
    return path


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(wanted: hub.Wanted) -> None:
        raise AssertionError(f"the hub was asked for {wanted}")

    monkeypatch.setattr(hub, "_open_hub", asked)


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text", "unit"),
    [
        ("a.jsonl", LINES, "line"),
        ("a.jsonl.gz", LINES, "line"),
        ("a.json", LINES, "line"),  # the hub's own .json files often hold lines
        ("a.json", "\n " + json.dumps(ROWS, indent=1) + "\n", "element"),
        ("a.JSON", json.dumps(ROWS), "element"),
        ("a.json.gz", json.dumps(ROWS), "element"),
    ],
)
def test_the_same_rows_are_read_from_lines_and_from_an_array(tmp_path, name, text, unit):
    lines = list(read_rows(write(tmp_path / name, text)))
    assert [line.values for line in lines] == ROWS
    assert [(line.number, line.unit) for line in lines] == [(i, unit) for i in range(1, 8)]


def test_rows_of_parquet_are_read_group_by_group_and_named_by_their_number(tmp_path):
    table = {"prompt": [row["prompt"] for row in ROWS], "facts": [row["facts"] for row in ROWS]}
    path = parquet(tmp_path / "a.parquet", table, row_group_size=3)
    lines = list(read_rows(str(path)))
    assert [line.values for line in lines] == ROWS
    assert lines[6].place == f"{path}, row 7"


def test_values_that_json_lacks_become_text_or_stop_with_their_column(tmp_path):
    when = datetime.datetime(2024, 2, 1, 12, 30, tzinfo=datetime.UTC)
    path = parquet(tmp_path / "a.parquet", {"at": [when, None], "day": [when.date(), None]})
    assert [line.values for line in read_rows(path)] == [
        {"at": "2024-02-01T12:30:00+00:00", "day": "2024-02-01"},
        {"at": None, "day": None},
    ]
    nested = parquet(tmp_path / "b.parquet", {"a": [1, 2], "image": [{"bytes": None}, {"bytes": b"x"}]})
    assert complaint(nested) == (
        f'{nested}, row 2: expected "image" to hold what JSON can (text, numbers, lists), found a value of '
        "type bytes"
    )
    nan = parquet(tmp_path / "c.parquet", {"score": [[1.0], [float("nan")]]})
    assert complaint(nan).endswith(
        'row 2: expected "score" to hold what JSON can (text, numbers, lists), found nan'
    )


def test_a_damaged_and_an_empty_parquet_file_are_errors(tmp_path):
    whole = parquet(tmp_path / "a.parquet", {"a": ["x" * 99] * 99}).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    assert "cut.parquet: expected a whole parquet file, found a damaged one" in complaint(
        tmp_path / "cut.parquet"
    )
    assert complaint(parquet(tmp_path / "none.parquet", {"a": []})).endswith("found an empty parquet file")


def test_without_the_libraries_the_command_that_installs_them_is_said(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"a": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (path, tmp_path):
        assert complaint(source).endswith("is not installed: pip install 'minirlhf[data]'")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[", "element 1: expected strict JSON, found a syntax error (Expecting value)"),
        ("[]", "an array of at least one object, found an empty one"),
        ('[{"a": 1}', "the array's end after element 1, found neither"),
        ('[{"a": 1} {"a": 2}]', "the array's end after element 1, found neither"),
        ('[{"a": 1}] {', "expected nothing after the array, found something"),
        ('[{"a": 1},]', "element 2: expected strict JSON, found a syntax error (Expecting value)"),
        (
            '[{"a": 1}, {"b": "c',
            "element 2: expected strict JSON, found a syntax error (Unterminated string starting at)",
        ),
        ('[{"a": NaN}]', "element 1: expected strict JSON, found NaN, which is not JSON"),
        ('[{"a": 1, "a": 1}]', "element 1: expected strict JSON, found the key 'a' twice in one object"),
        ('[{"a": 1}, ["b"]]', "element 2: expected one JSON object, found a list"),
        ('[{"a": ' + "[" * 100_000, "element 1: expected one JSON object, found nesting too deep to read"),
    ],
)
def test_a_bad_array_is_named_with_its_element(tmp_path, text, found):
    told = complaint(write(tmp_path / "a.json", text))
    assert told.startswith(f"{tmp_path / 'a.json'}") and told.endswith(found)


def test_an_array_is_read_in_the_memory_of_a_piece_of_it(tmp_path):
    import tracemalloc

    rows = [{"instruction": "é" * 400, "output": "x" * 400}] * 12_000
    path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))
    assert path.stat().st_size > 14e6
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 12_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_elements_of_every_length_are_read_across_the_borders_of_pieces(tmp_path):
    rows = [{"a": "é" * n, "b": n} for n in (0, 1, 900_000, 3, 2_000_000, 5)]
    path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False, indent=2))
    assert [line.values for line in read_rows(path)] == rows


@pytest.mark.parametrize(
    "source",
    [
        "./org/name",
        "../name",
        "/org/name",
        "~/name",
        "a/b/c",
        "org/name.jsonl",
        "org/rows.json.gz",
        "x.PARQUET",
    ],
)
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    assert complaint(source) == f"{source}: no such file"


def test_a_single_word_and_a_name_in_a_folder_that_is_here_are_not_looked_up_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complaint("imdb") == "imdb: no such file, and no name of a data set on the hub, which is ORG/NAME"
    (tmp_path / "data").mkdir()
    told = "data/pairs:train: no such file; as data is a folder here, the hub was not asked for it"
    assert complaint("data/pairs:train") == told
    assert not is_local("org/name")
    with pytest.raises(AssertionError, match="the hub was asked for org/name:en:test"):
        next(read_rows(Path("org/name:en:test")))


def test_the_manifest_gets_the_digest_of_what_is_here(tmp_path):
    file = write(tmp_path / "a.jsonl", LINES)
    assert fingerprint(file) == {"path": str(file), "sha256": sha256_of(file)}
    assert fingerprint(f"{tmp_path}:train") == {"path": f"{tmp_path}:train", "sha256": sha256_of(tmp_path)}
    with pytest.raises(InputError, match="b.jsonl: no such file"):
        fingerprint(tmp_path / "b.jsonl")
