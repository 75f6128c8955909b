"""Text files as people have them: UTF-8 or marked UTF-16, json lines, csv by any separator, parquet; a bad row is named."""

import ast
import codecs
import csv
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from train.rows import MAX_TEXT, BadRowError, check_text, is_image, printable

MAX_LINE = 64 * 2**20  # characters of a line that are read; a longer one is counted as bad
MAX_LINES = 1000  # of one csv record, within quotes
SEPARATORS = ",;\t|"


class Line(NamedTuple):
    """A line of a file, counted from 1, with its end; or what is wrong with it."""

    number: int
    text: str
    problem: BadRowError | None = None


class Record(NamedTuple):
    """A row of a table: where it is, as text, and its values by column or what is wrong with it."""

    where: str
    values: dict[str, Any] | BadRowError


def read_lines(path: Path) -> Iterator[Line]:
    """
    The lines of a UTF-8 file or of a UTF-16 one with a mark; a mark in front is no part of the first line.

    A line that is not of that encoding (`not_utf8`) or longer than `MAX_LINE` (`long_line`) comes with its problem.

    Raises:
        ValueError: UTF-32, or UTF-16 without a mark.
    """
    with path.open("rb") as file:
        start = file.read(4)
    encoding = "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if b"\0" in start and (encoding != "utf-16" or start == codecs.BOM_UTF32_LE):
        raise ValueError(f"{path} is neither UTF-8 nor UTF-16 with a mark: save it as UTF-8")
    # What is not of the encoding comes as half characters, which neither encoding holds otherwise.
    errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"
    with path.open(encoding=encoding, errors=errors, newline="") as lines:
        number = 0
        try:
            while text := lines.readline(MAX_LINE):
                number += 1
                yield Line(number, text, _line_problem(text, lines))
        except UnicodeDecodeError as error:  # only of UTF-16
            yield Line(number + 1, "", BadRowError("not_utf8", f"not UTF-16 ({error}): save the file as UTF-8"))


def _line_problem(text: str, lines: Any) -> BadRowError | None:
    if len(text) == MAX_LINE and not text.endswith(("\n", "\r")):
        while len(rest := lines.readline(MAX_LINE)) == MAX_LINE and not rest.endswith(("\n", "\r")):
            pass
        return BadRowError("long_line", f"more than {MAX_LINE:,} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRowError("not_utf8", f"not UTF-8 at character {error.start}: save the file as UTF-8")
    return None


def read_table(path: Path) -> Iterator[Record]:
    """
    The rows of a `.jsonl`, `.csv`, `.tsv` (with a header) or `.parquet` file, a bad one with its problem.

    Raises:
        ValueError: the file is not parquet, or of an encoding that is not read.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet_rows(path)
    return _csv_rows(path) if ending in (".csv", ".tsv") else read_json_lines(path)


def read_json_lines(path: Path) -> Iterator[Record]:
    """One object a line; blank lines are none. Reasons of bad ones: `not_json`, and those of [`read_lines`]."""
    for line in read_lines(path):
        if line.problem is not None or line.text.strip():
            yield Record(f"{path}, line {line.number}", _json_object(line))


def _json_object(line: Line) -> dict[str, Any] | BadRowError:
    if line.problem is not None:
        return line.problem
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return BadRowError("not_json", f"not JSON ({error}); expected one object a line")
    if not isinstance(value, dict):
        return BadRowError("not_json", f"expected an object, got a {type(value).__name__}")
    return value


def _parquet_rows(path: Path) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
        row = 0
        for batch in file.iter_batches(1000):
            for values in batch.to_pylist():
                row += 1
                yield Record(f"{path}, row {row}", values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}): write it again") from error


# csv


def _csv_rows(path: Path) -> Iterator[Record]:
    lines = read_lines(path)
    first = next((line for line in lines if line.text.strip()), None)
    if first is None:
        return
    if first.problem is not None:
        raise ValueError(f"{path}, line {first.number}: the header is {first.problem}")
    separator = max(SEPARATORS, key=first.text.count)
    header = next(csv.reader([first.text], delimiter=separator))
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: the header has a duplicate column: {', '.join(header)}")
    for line, values in _csv_records(lines, separator, header):
        yield Record(f"{path}, line {line.number}", values)


def _csv_records(
    lines: Iterator[Line], separator: str, header: list[str]
) -> Iterator[tuple[Line, dict[str, Any] | BadRowError]]:
    """
    Records by their first line. A quote that is not closed takes in the lines after it; where that shows, its line alone is
    bad and those after it are read again by themselves.
    """
    csv.field_size_limit(MAX_TEXT)
    waiting: deque[Line] = deque()
    while True:
        taken: list[Line] = []
        reader = csv.reader(_feed(waiting, lines, taken), delimiter=separator, strict=True)
        try:
            fields = next(reader)
            problem = _record_problem(fields, taken, separator, header)
        except StopIteration:
            return
        except csv.Error as error:
            fields, problem = [], BadRowError("broken_row", f"{error}: is a quote not closed?")
        if problem is not None:
            waiting.extendleft(reversed(taken[1:]))
            yield taken[0], problem
        elif fields:
            yield taken[0], dict(zip(header, fields, strict=True))


def _feed(waiting: deque[Line], lines: Iterator[Line], taken: list[Line]) -> Iterator[str]:
    while len(taken) < MAX_LINES:
        line = waiting.popleft() if waiting else next(lines, None)
        if line is None:
            return
        taken.append(line)
        yield line.text


def _record_problem(fields: list[str], taken: list[Line], separator: str, header: list[str]) -> BadRowError | None:
    if taken[0].problem is not None:
        return taken[0].problem
    if not fields:
        return None
    for line in taken[1:]:  # a line that is a row by itself is no part of a caption
        parts = line.text.rstrip("\r\n").split(separator)
        if line.problem is not None or (len(parts) == len(header) and any(map(is_image, parts))):
            return BadRowError("broken_row", "a quote is not closed, or only on another line")
    if len(fields) != len(header):
        return BadRowError(
            "broken_row", f"{len(fields)} fields where the header has {len(header)}: is a {separator!r} not quoted?"
        )
    return None


def listed(value: Any, name: str) -> Any:
    """
    A list that a table holds as text, as JSON or as Python writes it, as that list; anything else as it is.

    Raises:
        BadRowError: `bad_caption`: brackets that hold no list.
    """
    text = value.strip() if isinstance(value, str) else ""
    if not (text.startswith("[") and text.endswith("]")):
        return value
    check_text(text, name)
    for read in (json.loads, ast.literal_eval):
        try:
            parsed = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, list):
            return parsed
    raise BadRowError("bad_caption", f"{name} has the brackets of a list and is none: {printable(text[:80])!r}")
