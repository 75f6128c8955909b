"""
Every reader on damaged files: rows, counted reasons or a ValueError in words, never another exception.

`FUZZ_CASES` in the environment sets how many damages of each file are tried.
"""

import io
import json
import os
import tarfile
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.benchmarks.layouts import sentence
from tests.train.test_data import add, png
from train.data import load_pairs
from train.dialogue_files import load_dialogues
from train.rows import FEATURES

MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": "1.png"}, "é?"]},
    {"role": "assistant", "content": "a <image>"},
]


def archive(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name in ("a.0", "a.1", "b"):
            add(tar, f"{name}.png", png(1))
            add(tar, f"{name}.txt", b"words")
            add(tar, f"{name}.json", b'{"caption": "x"}')
    return buffer.getvalue()


PAIRS = {
    "metadata.jsonl": "\n".join(
        json.dumps({"file_name": f"{i}.png", "captions": ["é", "b"]}) for i in range(3)
    ).encode(),
    "metadata.csv": 'file_name;captions\n1.png;"a; ""b"""\n2.png;"[""x"", ""y""]"\n'.encode("utf-16"),
    "pairs.tsv": b"caption\timage\na\tb.png\nc\thttp://x/1.png\n",
    "0.tar": archive("w"),
    "0.tgz": archive("w:gz"),
}
CHATS = {
    "chats.jsonl": "\n".join(json.dumps({"id": i, "messages": MESSAGES, "images": ["1.png"]}) for i in range(3)).encode(),
    "chats.json": json.dumps([{"messages": MESSAGES, "images": ["1.png"]}]).encode(),
    "conversations.json": json.dumps([{"conversation_id": 1, "conversation": [{"turn": [{"__TEXT__": "a"}]}] * 2}]).encode(),
    "visdial_1.0_train.json": json.dumps({"data": {"questions": ["q"], "answers": ["a"], "dialogs": [
        {"image_id": 7, "dialog": [{"question": 0, "answer": 0}]}]}}).encode(),
    "train.story-in-sequence.json": json.dumps({"annotations": [sentence("1", i, str(i)) for i in range(5)]}).encode(),
    "0.tar": archive("w"),
}  # fmt: skip
DAMAGE = st.lists(
    st.tuples(st.sampled_from(("flip", "cut", "insert", "repeat")), st.floats(0, 1), st.binary(min_size=1, max_size=6)),
    min_size=1, max_size=4,
)  # fmt: skip
CASES = int(os.environ.get("FUZZ_CASES", "25"))
QUICK = settings(max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def damaged(data, damage):
    for kind, where, value in damage:
        at = int(where * len(data))
        data = {
            "flip": data[:at] + value + data[at + len(value) :], "cut": data[:at], "insert": data[:at] + value + data[at:],
            "repeat": data[:at] + data[at // 2 :],
        }[kind]  # fmt: skip
    return data


@contextmanager
def scratch():
    """A folder for one case, gone after it: of ten thousand each next one would be slower to make."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def outcome(read):
    try:
        return read()
    except ValueError as error:
        assert str(error)
        return []


@pytest.mark.parametrize("name", PAIRS)
@QUICK
@given(damage=DAMAGE)
def test_damaged_pairs(name, damage):
    with scratch() as folder:
        (folder / name).write_bytes(damaged(PAIRS[name], damage))
        path = folder / name if name == "pairs.tsv" else folder
        for row in outcome(lambda: list(load_pairs(path, folder))):
            assert row.keys() == FEATURES.keys() and (
                row["problem"] is None or row["problem"].partition(":")[0].isidentifier()
            )


@pytest.mark.parametrize("name", CHATS)
@QUICK
@given(damage=DAMAGE)
def test_damaged_dialogues(name, damage):
    with scratch() as folder:
        (folder / name).write_bytes(damaged(CHATS[name], damage))
        documents = outcome(lambda: load_dialogues(folder / name))
        for row in (documents[i] for i in range(len(documents))):
            assert "problem" in row or (row["context"] and (row["text"] or row["image"]))


WORDS = st.sampled_from(("user", "assistant", "image", "text", "<image>"))
KEYS = st.sampled_from(("role", "content", "type", "text", "image", "index", "from", "value"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
CHAT = st.dictionaries(st.sampled_from(("id", "messages", "images", "image", "conversations")), JSON)
ROW = st.dictionaries(st.sampled_from(("file_name", "captions", "caption", "text", "url")), JSON)


@QUICK
@given(rows=st.lists(CHAT, max_size=4))
def test_any_json_as_chats(rows):
    with scratch() as folder:
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        documents = outcome(lambda: load_dialogues(folder / "chats.jsonl"))
        [documents[i] for i in range(len(documents))]


@QUICK
@given(rows=st.lists(ROW, max_size=4))
def test_any_json_as_metadata(rows):
    with scratch() as folder:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        outcome(lambda: list(load_pairs(folder)))
