"""Every malformed file gives one line that says where, what was expected and what was found."""

import gzip
import json

import pytest

from minirlhf.data.jsonl import read_lines
from minirlhf.runs import InputError


def complaint(path) -> str:
    with pytest.raises(InputError) as raised:
        list(read_lines(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_objects_come_with_their_line_numbers_and_blank_lines_count(jsonl):
    path = jsonl({"a": 1}, "", {"a": 2})
    assert [(line.number, line.values) for line in read_lines(path)] == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_gzip_is_recognised_by_content_and_not_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}'))
    assert [line.values["a"] for line in read_lines(tmp_path / name)] == [1, 2]


def test_a_plain_file_may_be_called_gz(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b'{"a": 1}\n')
    assert [line.values["a"] for line in read_lines(tmp_path / "rows.jsonl.gz")] == [1]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\r"])
def test_only_a_line_feed_ends_a_line(jsonl, separator):
    text = f"one{separator}two"
    path = jsonl(
        json.dumps({"a": text}, ensure_ascii=False) if separator > "\x1f" else json.dumps({"a": text})
    )
    assert [line.values for line in read_lines(path)] == [{"a": text}]


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [line.values["a"] for line in read_lines(tmp_path / "a")] == [1, 2]


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ('{"a": 1', "a syntax error at column 8 (Expecting ',' delimiter)"),
        ("not json", "a syntax error at column 1 (Expecting value)"),
        ("[1, 2]", "a list"),
        ("null", "null"),
        ('"text"', "a string"),
        ("3", "a number"),
        ("true", "a boolean"),
        ('{"a": NaN}', "NaN, which is not JSON"),
        ('{"a": -Infinity}', "-Infinity, which is not JSON"),
        ('{"a": 1e999}', "a number too large for a float"),
        ('{"a": 1, "a": 2}', "the key 'a' twice in one object"),
        ('{"facts": {"b": 1, "b": 1}}', "the key 'b' twice in one object"),
        ("[" * 100_000, "nesting too deep to read"),
        ('{"a": 1} {"b": 2}', "a syntax error at column 10 (Extra data)"),
    ],
)
def test_a_malformed_line_is_named_with_what_was_found(jsonl, bad, found):
    told = complaint(path := jsonl({"a": 1}, bad))
    assert told.startswith(f"{path}:2: expected ") and told.endswith(f", found {found}")


def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n')
    assert (
        complaint(tmp_path / "a")
        == f"{tmp_path / 'a'}:2: expected UTF-8 text, found another encoding at byte 11"
    )


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert complaint(tmp_path / "a") == f"{tmp_path / 'a'}: expected JSON lines, found an empty file"


def test_a_missing_file_and_a_directory_are_errors(tmp_path):
    assert complaint(tmp_path / "gone").endswith("gone: no such file")
    assert "expected a readable file, found" in complaint(tmp_path)


def test_a_cut_gzip_file_is_an_error_and_not_a_shorter_file(tmp_path):
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(5000)))
    (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
    assert "expected a whole gzip file" in complaint(tmp_path / "a.gz")


def test_a_corrupt_gzip_file_is_an_error(tmp_path):
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 50))
    whole[12:20] = b"\xff" * 8
    (tmp_path / "a.gz").write_bytes(bytes(whole))
    assert "expected a whole gzip file" in complaint(tmp_path / "a.gz")
