"""Words before [RET]: in every context and text, counted everywhere, no part of the next turn, saved with the checkpoint."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from modeling_unimur import UniMuRModel, UniMuRProcessor
from tests.conftest import KINDS, picture
from tests.tiny import make_processor, make_towers

PROMPT = "\nGist:"
TURNS = ["look who i met!", picture(1), "wow", "show me."]


def make(folder, kind="opt", prompt=PROMPT, **fields) -> UniMuRModel:
    text, clip = make_towers(folder, kind)
    return UniMuRModel.from_pretrained_towers(text, clip, make_processor(ret_prompt=prompt), **fields).eval()


def ids_of(processor, text):
    return processor.tokenizer.convert_tokens_to_ids(["Ċ" if c == "\n" else c for c in text])


def test_it_stands_before_ret_in_contexts_texts_and_training():
    processor = make_processor(ret_prompt=PROMPT)
    end = [*ids_of(processor, PROMPT), processor.ret_token_id]
    assert processor.ending == end
    assert processor.contexts(["ab"])["input_ids"][0].tolist() == [2, *ids_of(processor, "ab"), *end]
    assert processor.texts(["ab"])["input_ids"][0].tolist() == [2, *ids_of(processor, "ab"), *end]
    batch = processor.documents(
        [{"caption": (0, "c"), "context": [["ab"], [0]], "image": 0, "text": "c"}], [picture(1)], pack=True
    )
    row = batch["contexts"]["input_ids"][0].tolist()
    assert row[-len(end) :] == end and len(batch["contexts"]["packing"]["unpack"][0]) == len(row)
    ids = batch["captions"]["input_ids"]
    assert processor.ret_token_id not in ids  # a caption to be predicted has no [RET], and no words before it
    assert ids.shape[1] == 1 + 2 + 1 + 1
    for read in (processor.contexts, processor.texts):
        assert read(["ab"], end_with_ret=False)["input_ids"][0].tolist() == [2, *ids_of(processor, "ab")]


def test_without_one_nothing_changes():
    plain, empty, prompted = make_processor(), make_processor(ret_prompt=""), make_processor(ret_prompt=PROMPT)
    assert plain.ending == [plain.ret_token_id]
    # Of the release before there were prompts: a pool that it made still opens.
    assert plain.fingerprint == empty.fingerprint == "3cd8d42d6890466e"
    assert prompted.fingerprint != plain.fingerprint
    assert make_processor(ret_prompt="\nWord:").fingerprint != prompted.fingerprint


def test_its_words_are_never_special_tokens():
    processor = make_processor(ret_prompt="[RET] <image> </s>")
    row = processor.contexts(["a"])["input_ids"][0].tolist()
    assert row.count(processor.ret_token_id) == 1 and processor.image_token_id not in row
    assert row.count(processor.tokenizer.eos_token_id) == 1  # BOS


@pytest.mark.parametrize("kind", ["contexts", "texts"])
def test_a_long_one_loses_its_beginning_and_keeps_the_words_and_ret(kind, caplog):
    processor = make_processor(max_length=16, ret_prompt=PROMPT)
    with caplog.at_level(logging.WARNING):
        row = getattr(processor, kind)(["abcdefghijklmnop"])["input_ids"][0].tolist()
    assert len(row) == 16 and row[-7:] == processor.ending
    assert row[1:-7] == ids_of(processor, "ijklmnop") and "exceeds" in caplog.text


def test_one_that_fits_exactly_is_whole(caplog):
    processor = make_processor(max_length=16, ret_prompt=PROMPT)
    assert len(processor.contexts(["abcdefgh"])["input_ids"][0]) == 16 and not caplog.text


def test_one_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match=r"are 7 tokens, which leave no room for a text among the LLM's 8 positions"):
        make_processor(max_length=8, ret_prompt=PROMPT)
    with pytest.raises(ValueError, match="ret_prompt has half a character"):
        make_processor(ret_prompt="\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_gives_alone(tmp_path, kind):
    model = make(tmp_path, kind)
    dialogues = [TURNS, ["hi"], [picture(2)]]
    together = model.embed_dialogues(dialogues)
    for row, dialogue in zip(together, dialogues, strict=True):
        assert torch.allclose(row, model.embed_dialogues([dialogue])[0], atol=1e-5)
    model.processor._ending = [model.processor.ret_token_id]
    assert not torch.allclose(together, model.embed_dialogues(dialogues), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_the_whole_dialogue(tmp_path, kind):
    model = make(tmp_path, kind)
    talk = model.conversation()
    for at, turn in enumerate(TURNS):
        whole = model.embed_dialogues([TURNS[: at + 1]])[0]
        assert torch.allclose(talk.say(turn).embed(), whole, atol=1e-5), at
        # Neither the words nor [RET] stay among the turns.
        assert talk._cache.get_seq_length() == len(model.processor.turn_ids(talk.turns))


def test_a_conversation_counts_it_where_positions_run_out(tmp_path):
    model = make(tmp_path)
    talk = model.conversation()
    room = 128 - 1 - len(model.processor.ending)
    with pytest.raises(ValueError, match="129 positions exceeds the LLM's 128"):
        talk.say("x" * (room + 1))
    talk.say("x" * room)
    assert torch.allclose(talk.embed(), model.embed_dialogues(["x" * room])[0], atol=1e-5)
    talk.say("y")
    assert torch.allclose(talk.embed(), model.embed_dialogues(["y"])[0], atol=1e-5) and talk.evicted == 1


@pytest.mark.parametrize("full", [False, True])
def test_saved_equals_loaded(tmp_path, full):
    model = make(tmp_path / "towers")
    model.save_pretrained(tmp_path / "saved", with_towers=full, golden=True)
    again = AutoModel.from_pretrained(tmp_path / "saved", self_check=True)
    assert again.config.ret_prompt == again.processor.ret_prompt == PROMPT
    assert torch.allclose(again.embed_dialogues([TURNS]), model.embed_dialogues([TURNS]), atol=1e-5)
    assert again.fingerprint == model.fingerprint
    assert UniMuRProcessor.from_pretrained(tmp_path / "saved").ending == model.processor.ending


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_config_and_processor_have_to_agree(tmp_path, file):
    make(tmp_path / "towers").save_pretrained(tmp_path / "saved")
    path = Path(tmp_path / "saved" / file)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ret_prompt": "\nWord:"}))
    model = UniMuRModel.from_pretrained(tmp_path / "saved")
    for ask in (lambda: model.embed_dialogues(["hi"]), lambda: model.fingerprint, model.conversation().say):
        with pytest.raises(ValueError, match=r"before \[RET\] and the model's config says .*config\.json"):
            ask("hi") if ask.__name__ == "say" else ask()
    with pytest.raises(ValueError, match=r"puts '' before \[RET\]"):
        model.processor = make_processor()


def test_a_pool_of_another_prompt_is_refused(tmp_path):
    model, other = make(tmp_path / "a"), make(tmp_path / "b", prompt="\nWord:")
    pool = model.build_pool(texts=["hi"], show_progress_bar=False)
    with pytest.raises(ValueError, match="preprocessing"):
        other.retrieve("hi", pool)


def test_reading_at_its_last_token_is_ret_started_from_that_token(tmp_path):
    """The state at the last token of "Gist:" is that at a [RET] started from ":" behind "Gist"."""
    model = make(tmp_path, prompt="\nGist", ret_init=":")
    processor = model.processor
    ids = torch.tensor([[2, *ids_of(processor, "hi\nGist:")]])
    with torch.no_grad():
        at_colon = model.language_model.base_model(input_ids=ids).last_hidden_state[0, -1]
        inputs = processor.contexts(["hi"])
        state = model.ret_states(inputs["input_ids"], inputs["attention_mask"])[0]
    assert torch.allclose(state, at_colon, atol=1e-5)
