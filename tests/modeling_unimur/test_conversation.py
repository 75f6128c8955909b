"""A conversation kept across turns is the dialogue embedded whole; it forgets its oldest turns when positions run out."""

import logging

import pytest
import torch

from tests.conftest import KINDS, picture

PARTS = [{"type": "text", "text": "and"}, {"type": "image", "image": picture(2)}, {"type": "text", "text": "?"}]
TURNS = ["look who i met!", picture(1), "wow", {"role": "user", "content": PARTS}, "show me."]


@pytest.mark.parametrize("kind", KINDS)
def test_each_turn_gives_what_the_whole_dialogue_gives(tiny, kind):
    model = tiny(kind)
    talk = model.conversation()
    for at, turn in enumerate(TURNS):
        whole = model.embed_dialogues([TURNS[: at + 1]])[0]
        assert torch.allclose(talk.say(turn).embed(), whole, atol=1e-5), at
        assert torch.allclose(talk.embed(), whole, atol=1e-5)  # asking twice changes nothing


def test_a_turn_costs_its_own_tokens_and_images(fresh):
    model = fresh()
    talk = model.conversation()
    seen, images = [], []
    model.language_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.clip.vision_model.register_forward_pre_hook(
        lambda module, args: images.append(len(args[0])), with_kwargs=False
    )
    talk.say("hello there").embed()
    talk.say(picture(1)).embed()
    talk.say("bye").embed()
    ids = [len(model.processor.contexts([t])["input_ids"][0]) for t in (["hello there"], ["hello there", picture(1)])]
    assert seen == [ids[0], ids[1] - ids[0] + 1, len("\nbye") + 1]
    assert images == [1]


def test_tokens_that_merge_across_turns_are_computed_again(fresh, monkeypatch):
    model = fresh()
    # As tokenizers that put a line break into the token before it.
    plain = model.processor._units

    def merging(turns):
        units, merged = plain(turns), []
        line = model.processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
        for unit in units:
            if unit == line and merged and isinstance(merged[-1], int):
                merged[-1] = 5
            else:
                merged.append(unit)
        return merged

    monkeypatch.setattr(model.processor, "_units", merging)
    talk = model.conversation()
    for at, turn in enumerate(TURNS):
        assert torch.allclose(talk.say(turn).embed(), model.embed_dialogues([TURNS[: at + 1]])[0], atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_the_next_answer_right(fresh, error):
    model = fresh()
    talk = model.conversation()
    talk.say("look who i met!").embed()

    def fail(*_):
        raise error

    talk.say(picture(1))
    # The first layer has added its keys and values by then.
    broken = model.language_model.base_model.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        talk.embed()
    broken.remove()
    talk.say("wow")
    whole = model.embed_dialogues([["look who i met!", picture(1), "wow"]])[0]
    assert torch.allclose(talk.embed(), whole, atol=1e-5)


def test_weights_that_are_no_numbers_are_named(fresh):
    model = fresh()
    talk = model.conversation().say("hello")
    with torch.no_grad():
        model.W_t2m.weight[0, 0] = float("nan")
    for ask in (talk.embed, lambda: model.embed_dialogues(["hello"])):
        with pytest.raises(ValueError, match=r"hold NaN or infinity; weights that do: .*W_t2m"):
            ask()


def test_the_oldest_turns_go_when_positions_run_out(tiny, caplog):
    model = tiny()
    talk = model.conversation()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for turn in range(30):
            talk.say(picture(turn) if turn % 5 == 0 else f"turn number {turn}")
            embedding = talk.embed()
            assert talk._cache.get_seq_length() < model.processor.max_length
    finally:
        logger.removeHandler(caplog.handler)
    assert 0 < talk.evicted < 30 and len(talk.turns) == 30 - talk.evicted
    assert "oldest turns were left out" in caplog.text
    kept = [{"role": "user", "content": [
        {"type": "text", "text": e} if isinstance(e, str) else {"type": "image", "image": e} for e in turn]}
        for turn in talk.turns]  # fmt: skip
    assert torch.allclose(embedding, model.embed_dialogues([kept])[0], atol=1e-5)


def test_it_retrieves_as_the_model_does(tiny):
    model = tiny()
    pool = model.build_pool(images=[picture(5)], texts=["a", "b"], show_progress_bar=False)
    talk = model.conversation().say("hello").say(picture(1))
    reply, whole = talk.retrieve(pool, top_k=3), model.retrieve(["hello", picture(1)], pool, top_k=3)
    assert [c.id for c in reply.candidates] == [c.id for c in whole.candidates]


def test_bad_turns_are_refused_and_leave_the_conversation_as_it_was(tiny):
    model = tiny()
    talk = model.conversation()
    with pytest.raises(ValueError, match="has no turn yet"):
        talk.embed()
    talk.say("hello")
    before = talk.embed()
    for turn, message in (("", "empty text"), (b"no image", "not an image"), ("x" * 200, "exceeds the LLM's 128")):
        with pytest.raises(ValueError, match=message):
            talk.say(turn)
    assert len(talk.turns) == 1 and torch.allclose(talk.embed(), before, atol=1e-6)
