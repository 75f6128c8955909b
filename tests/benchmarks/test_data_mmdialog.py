"""The MMDialog reader."""

import json
import shutil

import pytest

from benchmarks.data.mmdialog import read_mmdialog
from benchmarks.schema import ABSENT, TooMuchMissingError
from tests.benchmarks.layouts import CONVERSATION, media, mmdialog, stand_ins, text, text_id, turn_texts
from train.json_files import BadDataError


@pytest.mark.parametrize("lines", [False, True])
def test_mmdialog(tmp_path, lines):
    other = {**CONVERSATION, "conversation_id": "six", "conversation": CONVERSATION["conversation"][1:]}
    data = read_mmdialog(mmdialog(tmp_path, [CONVERSATION, other], lines=lines), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["5-1", "5-2", "six-1"] and data.missing.seen == 3
    first, second, third = data.dialogues
    assert (
        turn_texts(first) == [("A", "/-12", "look"), ("B", "nice", "/3", "/-4", "more")] and first["target_turn"] == 1
    )
    assert turn_texts(second)[2:] == [("A", "thanks")] and second["target_turn"] == 2
    assert turn_texts(third)[1:] == [("B", "thanks")]
    assert first["gold"] == {"text_ids": [text_id("nice"), text_id("more")], "image_ids": ["3", "-4"]}
    assert first["pool"]["image_ids"] == sorted(["3", "-4", "9", "-8"])
    assert first["pool"]["text_ids"] == sorted(map(text_id, ["nice", "more", "thanks", "no"]))
    # The reply "thanks" is also a negative: one candidate, not two of the same words.
    assert second["pool"]["text_ids"] == sorted(map(text_id, ["thanks", "no"]))
    assert second["pool"]["image_ids"] == ["-8", "9"] and second["gold"]["image_ids"] == []
    assert data.texts[text_id("thanks")] == "thanks" and data.images["-12"] == tmp_path / "test" / "-12.jpg"


def test_mmdialog_pool_of_the_split(tmp_path):
    data = read_mmdialog(mmdialog(tmp_path), pool="split", progress=False)
    pool = data.dialogues[0]["pool"]
    assert pool is data.dialogues[1]["pool"] and pool["image_ids"] == sorted(["-12", "3", "-4"])
    assert pool["text_ids"] == sorted(map(text_id, ["look", "nice", "more", "thanks"]))
    assert data.pool_hash == read_mmdialog(tmp_path, pool="split", progress=False).pool_hash
    assert data.pool_hash != read_mmdialog(tmp_path, progress=False).pool_hash
    with pytest.raises(ValueError, match="'all': expected one of conversation, split"):
        read_mmdialog(tmp_path, pool="all", progress=False)


def test_mmdialog_absent_images(tmp_path):
    mmdialog(tmp_path)
    whole = read_mmdialog(tmp_path, progress=False)
    (tmp_path / "test" / "9.jpg").unlink()
    thinned = read_mmdialog(tmp_path, progress=False)
    assert len(thinned) == 2 and thinned.dialogues[1]["pool"]["image_ids"] == ["-8"]
    assert not thinned.missing.counts and thinned.missing.candidates.counts == {ABSENT: 1}
    assert thinned.missing.candidates.seen == 10 and "1 of 10 candidates left out (10.0%)" in str(thinned.missing)
    assert thinned.pool_hash != whole.pool_hash
    with pytest.raises(TooMuchMissingError, match=r"9\.jpg"):
        thinned.missing.check()
    # Two conversations that name the same absent image lack one candidate, not two.
    mmdialog(tmp_path, [CONVERSATION, {**CONVERSATION, "conversation_id": 6}], keys=())
    assert read_mmdialog(tmp_path, progress=False).missing.candidates.counts == {ABSENT: 1}
    mmdialog(tmp_path, keys=())
    (tmp_path / "test" / "3.jpg").unlink()
    no_reply = read_mmdialog(tmp_path, progress=False)
    assert not len(no_reply) and no_reply.missing.seen == 2
    assert no_reply.missing.counts == {f"{ABSENT} in the reply": 1, f"{ABSENT} in the context": 1}


def test_mmdialog_blank_texts_and_empty_turns(tmp_path):
    turns = [[text("a")], [], [text("b")], [text(" ")], [text("c")]]
    odd = {**CONVERSATION, "conversation": [{"turn": t} for t in turns]}
    first_empty = {**CONVERSATION, "conversation_id": 6, "conversation": [{"turn": t} for t in turns[1:3]]}
    data = read_mmdialog(mmdialog(tmp_path, [odd, first_empty]), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["5-2"] and data.missing.seen == 5
    assert data.missing.counts == {
        "nothing in the reply": 1, "blank text in the reply": 1, "blank text in the context": 1,
        "context without content": 1,
    }  # fmt: skip


def test_mmdialog_splits(tmp_path):
    mmdialog(tmp_path, split="val")
    assert len(read_mmdialog(tmp_path, "valid", progress=False)) == 2
    train = {k: v for k, v in CONVERSATION.items() if not k.startswith("negative")}
    mmdialog(tmp_path, [train], "train")
    assert len(read_mmdialog(tmp_path, "train", "split", progress=False)) == 2
    with pytest.raises(BadDataError, match=r"conversation 0: no 'negative_candidate_texts'.*pool='split'"):
        read_mmdialog(tmp_path, "train", progress=False)
    with pytest.raises(BadDataError, match=r"looked for is there: test/conversations.json"):
        read_mmdialog(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversation_id": None}, "conversation 0: the field 'conversation_id' is NoneType, expected int or str"),
        ({"conversation": {}}, "conversation 0: the field 'conversation' is dict"),
        ({"conversation": [{"turns": []}]}, "turn 0: expected the field 'turn'"),
        ({"conversation": [{"turn": [{"__VIDEO__": "x"}]}]}, "turn 0, element 0: expected the field '__TEXT__'"),
        ({"conversation": [{"turn": [{**text("a"), **media("3")}]}]}, "element 0: expected one of __TEXT__"),
        ({"conversation": [{"turn": [media(3)]}]}, "element 0: the field '__MEDIA__' is int, expected str"),
        ({"negative_candidate_media_keys": ["9", -8]}, r"negative_candidate_media_keys\[1\] is int, expected str"),
    ],
)
def test_mmdialog_of_the_wrong_shape(tmp_path, change, message):
    mmdialog(tmp_path, [{**CONVERSATION, **change}])
    with pytest.raises(BadDataError, match=message):
        read_mmdialog(tmp_path, progress=False)


def test_mmdialog_sample(samples, tmp_path):
    shutil.copytree(samples / "mmdialog_stub", tmp_path, dirs_exist_ok=True)
    conversations = json.loads((tmp_path / "test" / "conversations.json").read_text())
    keys = {e["__MEDIA__"] for c in conversations for t in c["conversation"] for e in t["turn"] if "__MEDIA__" in e}
    keys |= {k for c in conversations for k in c["negative_candidate_media_keys"]}
    stand_ins(samples, tmp_path / "test", [f"{key}.jpg" for key in keys])
    data = read_mmdialog(tmp_path, progress=False)
    assert len(data) == 2 * len(conversations) and not data.missing.counts and set(data.images) == keys
    assert data.dialogues[0]["gold"]["image_ids"] == ["78499"]
    assert len(data.dialogues[0]["pool"]["image_ids"]) == 21
    assert all(set(d["gold"][k]) <= set(d["pool"][k]) for d in data.dialogues for k in ("text_ids", "image_ids"))
