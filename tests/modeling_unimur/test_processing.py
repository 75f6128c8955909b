"""Dialogues in every form, long ones, and bad ones."""

import logging

import pytest
import torch

from modeling_unimur import processing_unimur
from modeling_unimur.dialogues_unimur import parse_dialogue
from tests.conftest import picture
from tests.tiny import SENTENCES, clip_tokenizer, image_processor, make_processor, text_tokenizer


def test_every_form_of_one_dialogue_gives_the_same_ids(tmp_path):
    processor = make_processor()
    picture(1).save(tmp_path / "a.png")
    forms = [
        ["look", picture(1), "who?"],
        [tmp_path / "a.png", "x"],
        [{"role": "user", "content": "look"}, {"role": "assistant", "content": [{"type": "image", "image": picture(1)}]},
         {"role": "user", "content": [{"type": "text", "text": "who?"}]}],
        [{"role": "user", "content": "look"}, {"role": "user", "content": [{"type": "image", "path": str(tmp_path / "a.png")}]},
         "who?"],
    ]  # fmt: skip
    ids = [processor.contexts([form])["input_ids"].tolist() for form in forms]
    assert ids[0] == ids[2] == ids[3] != ids[1]


def test_serialisation():
    processor = make_processor(n_visual_tokens=2)
    ids = processor.contexts([["ab", picture(1), "c"]])["input_ids"][0].tolist()
    t = processor.tokenizer.convert_tokens_to_ids
    image, ret = processor.image_token_id, processor.ret_token_id
    assert ids == [2, t("a"), t("b"), t("Ċ"), image, image, t("Ċ"), t("c"), ret]


def test_text_that_spells_special_tokens_is_text():
    processor = make_processor()
    ids = processor.contexts(["a [RET] b <image> </s>"])["input_ids"][0].tolist()
    assert ids.count(processor.ret_token_id) == 1 and processor.image_token_id not in ids
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_text_that_spells_clips_special_tokens_is_text():
    processor = make_processor()
    words = processor.clip_tokenizer
    ids = processor.clip_texts(["a <|endoftext|> panda <|startoftext|>"])["clip_input_ids"][0].tolist()
    assert ids[0] == words.bos_token_id and ids[-1] == words.eos_token_id
    assert words.bos_token_id not in ids[1:] and words.eos_token_id not in ids[:-1]
    for text in SENTENCES:
        assert processor.clip_texts([text])["clip_input_ids"][0].tolist() == words(text)["input_ids"]


def test_no_bos_where_the_tokenizer_puts_none():
    from modeling_unimur import UniMuRProcessor

    processor = UniMuRProcessor(image_processor(), text_tokenizer(bos=False), clip_tokenizer())
    assert processor.contexts(["a"])["input_ids"][0].tolist()[0] == processor.tokenizer.convert_tokens_to_ids("a")


def test_a_long_dialogue_loses_its_oldest_turns_first(caplog):
    processor = make_processor(max_length=12)
    with caplog.at_level(logging.WARNING):
        ids = processor.contexts([["aaaa", picture(1), "bbbb", "ccc"]])
    row = ids["input_ids"][0].tolist()
    t = processor.tokenizer.convert_tokens_to_ids
    assert row == [2, *[t("b")] * 4, t("Ċ"), *[t("c")] * 3, processor.ret_token_id]
    assert "pixel_values" not in ids  # the image went with its turn
    assert "2 oldest turns" in caplog.text


def test_a_long_last_turn_keeps_its_end_and_ret(caplog):
    processor = make_processor(max_length=8)
    with caplog.at_level(logging.WARNING):
        row = processor.contexts([["x", "abcdefghij"]])["input_ids"][0].tolist()
    assert len(row) == 8 and row[-1] == processor.ret_token_id
    assert row[1:-1] == processor.tokenizer.convert_tokens_to_ids(list("efghij"))
    assert "1 oldest turns and 4 tokens" in caplog.text


def test_cutting_a_long_turn_reads_each_token_a_few_times(monkeypatch):
    read = []
    length = processing_unimur._length
    monkeypatch.setattr(processing_unimur, "_length", lambda units: read.append(len(units)) or length(units))
    make_processor(max_length=12).contexts(["x" * 3000])
    assert sum(read) < 4 * 3000


def test_images_of_a_long_turn_are_cut_whole():
    processor = make_processor(n_visual_tokens=3, max_length=7)
    parts = [{"type": "text", "text": "ab"}, *({"type": "image", "image": picture(i)} for i in (1, 2))]
    ids = processor.contexts([[{"role": "user", "content": parts}]])
    assert ids["input_ids"][0].tolist() == [2, *[processor.image_token_id] * 3, processor.ret_token_id]
    assert len(ids["pixel_values"]) == 1


def test_a_dialogue_that_fits_exactly_is_whole(caplog):
    processor = make_processor(max_length=6)
    row = processor.contexts([["ab", "c"]])["input_ids"][0].tolist()
    assert len(row) == 6 and not caplog.text


def test_caption_batch():
    processor = make_processor(n_visual_tokens=1)
    batch = processor.pairs([picture(1), picture(2)], ["ab", "c"])
    t = processor.tokenizer.convert_tokens_to_ids
    assert batch["captions"]["input_ids"][0].tolist() == [2, processor.image_token_id, t("a"), t("b"), 2]
    assert batch["captions"]["labels"].tolist() == [[-100, -100, t("a"), t("b"), 2], [-100, -100, t("c"), 2, -100]]
    assert batch["targets"]["image_indices"].tolist() == batch["captions"]["image_indices"].tolist() == [0, 1]
    assert batch["contexts"]["image_indices"].tolist() == []


def test_interleaved_batch():
    processor = make_processor(n_visual_tokens=1)
    item = {"caption": None, "context": [["a", 1], ["b"]], "image": 0, "text": None}
    other = {"caption": (1, "c"), "context": [["c"]], "image": None, "text": "d"}
    batch = processor.documents([item, other], [picture(1), picture(2)])
    t = processor.tokenizer.convert_tokens_to_ids
    assert batch["captions"]["labels"].tolist() == [[-100, -100, t("c"), 2]]
    image, ret = processor.image_token_id, processor.ret_token_id
    assert batch["contexts"]["input_ids"].tolist() == [
        [2, t("a"), image, t("Ċ"), t("b"), ret],
        [2, t("c"), ret, 1, 1, 1],
    ]
    assert "captions" not in processor.documents([item], [picture(1), picture(2)])
    assert batch["captions"]["image_indices"].tolist() == batch["contexts"]["image_indices"].tolist() == [1]
    assert batch["targets"]["image_rows"].tolist() == batch["targets"]["image_indices"].tolist() == [0]
    assert batch["targets"]["text_rows"].tolist() == [1] and len(batch["targets"]["input_ids"]) == 1


def test_a_reply_is_predicted_after_its_context(caplog):
    def captions(context, text, **fields):
        items = [{"caption": (None, text), "context": context, "image": None, "text": text}]
        return make_processor(n_visual_tokens=1, **fields).documents(items, [picture(1)], pack=True)["captions"]

    processor = make_processor(n_visual_tokens=1)
    a, b, c, line = processor.tokenizer.convert_tokens_to_ids(["a", "b", "c", "Ċ"])
    image = processor.image_token_id
    part = captions([["a", 0], ["b"]], "ca")
    assert part["input_ids"].tolist() == [[2, a, image, line, b, line, c, a, 2]]
    assert part["labels"].tolist() == [[-100] * 6 + [c, a, 2]] and part["label_positions"].tolist() == [6, 7, 8]
    assert part["image_indices"].tolist() == [0] and not caplog.text
    cut = captions([["bb"], ["aa", 0]], "ca", max_length=7)
    assert cut["input_ids"].tolist() == [[2, a, image, line, c, a, 2]]
    assert "its 1 oldest turns and 1 tokens or images of the next were left out" in caplog.text
    long = captions([["look", 0]], "c" * 20, max_length=8)  # its beginning, and one position of the context
    assert long["labels"].tolist() == [[-100, -100] + [c] * 6] and long["input_ids"][0, 1] == line
    assert "exceeds the LLM's 8 positions; its beginning is kept" in caplog.text


def test_a_text_is_a_dialogue_of_one_turn(caplog):
    processor = make_processor(max_length=12)
    processor.tokenizer.model_max_length = 12  # by which a tokenizer warns on its own
    texts = ["a", "a [RET] b", "abc" * 9, "ab c"]
    with caplog.at_level(logging.WARNING):
        together = processor.texts(texts)
    assert "item 2 exceeds" in caplog.text and caplog.text.count("exceeds") == 1
    assert "indexing errors" not in caplog.text  # there are none: what is too long is left out
    for row, mask, text in zip(together["input_ids"], together["attention_mask"], texts, strict=True):
        assert row[mask.bool()].tolist() == processor.contexts([text])["input_ids"][0].tolist()


def test_long_texts_for_clip_are_cut_and_counted(caplog):
    processor = make_processor()
    with caplog.at_level(logging.WARNING):
        ids = processor.clip_texts(["a" * 200, "b"])["clip_input_ids"]
    assert ids.shape[1] == 77 and ids[0, -1] == processor.clip_tokenizer.eos_token_id
    assert "1 of 2 texts" in caplog.text


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        ([], "empty"),
        (["hi", " "], "turn 1 is an empty text"),
        ([{"role": "user", "content": []}], "turn 0"),
        ([{"role": "user", "content": [{"type": "video", "video": 1}]}], "'video'"),
        ([{"role": "user", "content": [{"type": "image", "image": "https://example.org/a.png"}]}], "is a URL"),
        ([3], "turn 0: expected a string, an image"),
        (3.5, "a dialogue is a string"),
        ({"content": 3}, "turn 0: 'content' must be"),
        ({"text": "hi"}, "got dict"),
        ([["hi"]], "turn 0: expected a string, an image .* got list"),
        (["hi", "hello \ud800"], r"turn 1 has half a character, '\\ud800', at 6"),
    ],
)
def test_bad_dialogues_say_what_is_wrong(dialogue, message):
    with pytest.raises(ValueError, match=message):
        parse_dialogue(dialogue)


def test_a_bad_dialogue_of_a_batch_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"dialogue 1: .*broken\.png"):
        make_processor().contexts(["hi", ["see", tmp_path / "broken.png"]])


@pytest.mark.parametrize("texts", [["a", ""], ["a", "  "], ["a", None]])
def test_empty_texts_are_named(texts):
    with pytest.raises(ValueError, match="text 1 is"):
        make_processor().texts(texts)


def test_half_a_character_is_named():
    processor = make_processor()
    for read in (processor.texts, processor.clip_texts):
        with pytest.raises(ValueError, match="text 1 has half a character"):
            read(["a", "hello \ud800"])
    with pytest.raises(ValueError, match="dialogue 1: turn 0 has half a character"):
        processor.contexts(["a", "hello \ud800"])


def test_saved_equals_loaded(tmp_path):
    from modeling_unimur import UniMuRProcessor

    processor = make_processor(n_visual_tokens=3, max_length=77)
    processor.save_pretrained(tmp_path)
    again = UniMuRProcessor.from_pretrained(tmp_path)
    assert (again.n_visual_tokens, again.max_length, again.ret_token_id) == (3, 77, processor.ret_token_id)
    assert again.fingerprint == processor.fingerprint
    a, b = (p.contexts([["hi", picture(1)]]) for p in (processor, again))
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["pixel_values"], b["pixel_values"])


def test_a_checkpoint_without_clips_tokenizer_is_refused(tmp_path):
    import shutil

    from modeling_unimur import UniMuRProcessor

    make_processor().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "clip_tokenizer")
    with pytest.raises(ValueError, match="clip_tokenizer/"):
        UniMuRProcessor.from_pretrained(tmp_path)


def test_what_the_processor_cannot_read_is_named():
    processor = make_processor()
    for arguments, message in (
        ({"texts": []}, "no texts given"),
        ({"images": []}, "no images given"),
        ({"dialogues": []}, "no dialogues given"),
        ({"images": 0}, "expected a list of images, got int"),
        ({"texts": 0.0}, "expected a list of texts, got float"),
        ({"texts": ["a"], "padding": True}, "exactly one"),
        ({}, "exactly one"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)
    assert processor(texts="ab")["input_ids"].tolist() == processor(texts=["ab"])["input_ids"].tolist()


def test_an_image_of_a_dialogue_is_decoded_once(monkeypatch, tmp_path):
    picture(1).save(tmp_path / "a.png")
    decoded = []
    real = processing_unimur.decode_image
    monkeypatch.setattr(
        processing_unimur, "decode_image", lambda image, **bounds: decoded.append(image) or real(image, **bounds)
    )
    make_processor().contexts([["look", tmp_path / "a.png"], [tmp_path / "a.png", picture(2)]])
    assert len(decoded) == 3


def test_words_that_name_an_image_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("a.png")
    for dialogue in ("a.png", ["look", "a.png"]):
        with pytest.raises(ValueError, match=r"'a.png', names an image file, .*pathlib.Path\('a.png'\) shows"):
            parse_dialogue(dialogue)
    assert parse_dialogue(["b.png"]) == [["b.png"]]  # no such file: words
    assert parse_dialogue([{"role": "user", "content": "a.png"}]) == [["a.png"]]
    assert parse_dialogue([{"role": "user", "content": [{"type": "text", "text": "a.png"}]}]) == [["a.png"]]


def test_another_length_is_another_preprocessing():
    processor = make_processor()
    before = processor.fingerprint
    processor.set_max_length(10)
    assert processor.contexts(["a" * 50])["input_ids"].shape[1] == 10 and processor.fingerprint != before
    processor.set_max_length(128)
    assert processor.fingerprint == before
    for length in (0, 2, 2.5, "9", True):
        with pytest.raises(ValueError, match=r"max_length=|leave no room"):
            processor.set_max_length(length)
