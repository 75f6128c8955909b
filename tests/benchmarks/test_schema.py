"""The schema's helpers: json read and checked, and what is missing counted."""

import pytest

from benchmarks.schema import Missing, TooMuchMissingError
from tests.benchmarks.layouts import dump
from train.json_files import BadDataError, read_items, read_json, require


def test_json_and_json_lines(tmp_path):
    separator = "a\u2028b"  # a line break to str.splitlines, but not to json
    for lines in (False, True):
        path = dump(tmp_path / "x.json", [{"t": separator}, {"t": "c"}], lines)
        assert read_json(path) == list(read_items(path)) == [{"t": separator}, {"t": "c"}]
    path.write_text('\ufeff{"a":\n 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
    path.write_text(" [ ] \n")
    assert list(read_items(path)) == []


@pytest.mark.parametrize(
    "content", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}] x', '{"a": 1}\n{"a"', ""]
)
def test_broken_json_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadDataError, match=r"x\.json"):
        list(read_items(path) if content else read_json(path))
    with pytest.raises(BadDataError, match=r"x\.json"):
        read_json(path)


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(BadDataError, match=r"x\.json: not UTF-8"):
        read_json(tmp_path / "x.json")


def test_a_bool_is_not_an_integer():
    assert require({"a": 1}, "a", int, "x") == 1 and require({"a": True}, "a", bool, "x") is True
    with pytest.raises(BadDataError, match="x: the field 'a' is bool, expected int or str"):
        require({"a": True}, "a", (int, str), "x")


def test_missing_without_candidates_reads_as_before():
    missing = Missing(seen=4)
    missing.add("absent", "one")
    assert str(missing) == "1 of 4 items left out (25.0%): absent: 1 (such as one)"
    missing.check(0.25)
    with pytest.raises(TooMuchMissingError, match=r"the 24\.0% allowed"):
        missing.check(0.24)
