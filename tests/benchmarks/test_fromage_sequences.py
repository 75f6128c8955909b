"""The token sequences of FROMAGe's own code, written out: training rows, contexts, and what its scripts evaluate."""

import pytest
import torch

from benchmarks.baselines.fromage import Fromage, FromageModel
from benchmarks.baselines.fromage_processor import EVERY_TEXT, FIRST_TEXT, FromageProcessor
from benchmarks.baselines.fromage_train import FromageCollator, joined
from benchmarks.protocols import protocols
from benchmarks.schema import Dialogues
from benchmarks.tasks import answers, image
from tests.benchmarks.tiny_fromage import WORDS, ids_of, inputs_of, make, rows_of
from tests.conftest import picture
from tests.tiny import make_processor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Not to be changed by a test."""
    return make(tmp_path_factory.mktemp("fromage"))


def labels_of(model, *parts):
    return [-100 if i in ids_of(model, "image") else i for i in ids_of(model, *parts)]


def rows_in(part):
    sizes = part["attention_mask"].sum(1).tolist()
    return [row[:size].tolist() for row, size in zip(part["input_ids"], sizes, strict=True)]


def test_a_captioning_row_is_image_bos_caption(model):
    batch = inputs_of(model, 3)
    assert rows_in(batch["captions"]) == [ids_of(model, "image", "BOS", word) for word in WORDS[:3]]
    assert rows_in(batch["contexts"]) == [ids_of(model, "BOS", word, "RET") for word in WORDS[:3]]
    for labels, word in zip(batch["captions"]["labels"], WORDS, strict=False):
        expected = labels_of(model, "image", "BOS", word)
        assert labels.tolist() == expected + [-100] * (len(labels) - len(expected))  # BOS is labelled; no end of text


def test_joined_captioning_rows_keep_every_bos(model):
    batch = inputs_of(model, 5, concatenate=1.0)
    expected = [
        ["image", "BOS", WORDS[0], "image", "BOS", WORDS[1]], ["image", "BOS", WORDS[2], "image", "BOS", WORDS[3]],
        ["image", "BOS", WORDS[4]],
    ]  # fmt: skip
    assert rows_in(batch["captions"]) == [ids_of(model, *parts) for parts in expected]
    for labels, parts in zip(batch["captions"]["labels"], expected, strict=True):
        wanted = labels_of(model, *parts)
        assert labels.tolist() == wanted + [-100] * (len(labels) - len(wanted))
    assert batch["captions"]["image_indices"].tolist() == [0, 1, 2, 3, 4]
    assert len(batch["contexts"]["input_ids"]) == 5


def test_joining_is_drawn_with_its_probability_and_only_where_it_fits(model):
    rows = rows_of(2)
    collator = FromageCollator(model.processor, concatenate=0.5)
    drawn = []
    for collator.epoch in range(200):
        drawn.append(len(collator(rows)["captions"]["input_ids"]) == 1)
    assert 0.38 < sum(drawn) / 200 < 0.62
    assert joined([[1, 2], [3], [4]], 3) == [[1, 2, 3], [4]] and joined([[1, 2], [3]], 2) == [[1, 2], [3]]
    # "BOS a red fox RET" has 11 positions; behind its image, without [RET], the caption loses its end.
    short = FromageProcessor.like(make_processor(2, max_length=11))
    batch = FromageCollator(short, concatenate=1.0)(rows)
    assert rows_in(batch["captions"]) == [ids_of(model, "image", "BOS", words) for words in ("a red fo", "two dogs")]
    with pytest.raises(ValueError, match="probability"):
        FromageCollator(model.processor, concatenate=1.5)


def contexts_of(model, dialogue, bos=FIRST_TEXT, **arguments):
    processor = FromageProcessor.like(model.processor)
    processor.bos = bos
    return rows_in(processor.contexts([dialogue], **arguments))[0]


@pytest.mark.parametrize(
    ("dialogue", "first", "every"),
    [
        (["hi"], ["BOS", "hi"], ["BOS", "hi"]),
        ([picture(1), "hi"], ["image", "BOS", "\nhi"], ["image", "BOS", "\nhi"]),
        ([[picture(1), picture(2), "hi"]], ["image", "image", "BOS", "hi"], ["image", "image", "BOS", "hi"]),
        ([["hi", picture(1), "you"]], ["BOS", "hi", "image", "you"], ["BOS", "hi", "image", "BOS", "you"]),
        ([[picture(1)]], ["image", "BOS"], ["image", "BOS"]),
        ([["hi", picture(1)]], ["BOS", "hi", "image"], ["BOS", "hi", "image", "BOS"]),
    ],
)
def test_bos_comes_before_text(model, dialogue, first, every):
    dialogue = [
        turn if not isinstance(turn, list) else {"role": "user", "content": [
            {"type": "text", "text": e} if isinstance(e, str) else {"type": "image", "image": e} for e in turn]}
        for turn in dialogue
    ]  # fmt: skip
    assert contexts_of(model, dialogue) == ids_of(model, *first, "RET")
    assert contexts_of(model, dialogue, EVERY_TEXT) == ids_of(model, *every, "RET")
    assert contexts_of(model, dialogue, end_with_ret=False) == ids_of(model, *first)


def test_further_bos_count_towards_the_length(model):
    dialogue = ["x" * 116, picture(1), "y", picture(2), "z"]
    assert len(contexts_of(model, dialogue)) == 128  # all the LLM has; two more BOS and the oldest must go
    parts = ["image", "BOS", "\ny\n", "image", "BOS", "\nz", "RET"]
    assert contexts_of(model, dialogue, EVERY_TEXT) == ids_of(model, *parts)


def test_a_conversation_serialises_as_its_contexts_do(model):
    conversation = model.conversation()
    for turn in (picture(1), "how nice"):
        conversation.say(turn)
    whole = model.embed_dialogues([[picture(1), "how nice"]])[0]
    assert torch.allclose(conversation.embed(), whole, atol=1e-5)


def test_the_processor_is_fromages_however_the_model_came(model, tmp_path):
    assert type(model.processor) is FromageProcessor
    model.save_pretrained(tmp_path)
    assert type(FromageModel.from_pretrained(tmp_path).processor) is FromageProcessor


def test_a_protocol_places_bos_for_its_own_run_only(model):
    dialogue = [["a fox", picture(1), "a cat"]]
    system, once = Fromage(model), model.embed_dialogues(dialogue)
    assert not torch.allclose(system.embed_dialogues(dialogue, bos=EVERY_TEXT), once, atol=1e-3)
    assert torch.equal(system.embed_dialogues(dialogue), once)
    with pytest.raises(ValueError, match="dialogue 0"):
        system.embed_dialogues([[""]], bos=EVERY_TEXT)
    assert torch.equal(model.embed_dialogues(dialogue), once)


class Reads(Fromage):
    """Keeps the ids that the model reads."""

    def __init__(self, model):
        super().__init__(model)
        self.rows, self.sizes = [], []

    def embed_dialogues(self, dialogues, *, bos=FIRST_TEXT, **_):
        self.rows += [contexts_of(self.model, d, bos) for d in dialogues]
        self.sizes += [e.size for d in dialogues for t in d for e in images_in(t)]
        return torch.eye(12)[: len(dialogues)]

    def log_likelihoods(self, contexts, options, **score):
        self.rows += [contexts_of(self.model, c, end_with_ret=False) for c in contexts]
        self.sizes += [e.size for c in contexts for t in c for e in images_in(t)]
        self.score = score
        return [torch.arange(len(texts), dtype=torch.float) for texts in options]


def images_in(turn):
    return [part["image"] for part in turn["content"] if part["type"] == "image"]


def element(value):
    return {"type": "text" if " " in value else "image", "text": value, "image_id": value}


def items_of(turns, pool, gold):
    turns = [{"speaker": speaker, "elements": [element(v) for v in values]} for speaker, *values in turns]
    item = {"dialogue_id": "1", "turns": turns, "target_turn": len(turns), "pool": pool, "gold": gold}
    return Dialogues([item], {"t1": "no", "t2": "yes"}, {f"i{i}": picture(i) for i in range(1, 6)})


def compat(task):
    return next(p for p in protocols(task) if p.variant == "fromage-compat")


def test_fromages_visdial_answers(model):
    """`eval_visdial_generation.py`: image, BOS and the rounds by newlines, `A: `, each option with a BOS of its own."""
    system, texts = Reads(model), ["t1", "t2"]
    data = items_of(
        [("I", "i1"), ("Q", "is it"), ("A", "a cat"), ("Q", "and where")],
        {"text_ids": texts, "image_ids": []}, {"text_ids": ["t1"], "image_ids": []},
    )  # fmt: skip
    answers.run(system, data, compat("visdial_answers"))
    assert system.rows == [ids_of(model, "image", "BOS", "Q: is it?\nA: a cat\nQ: and where?\nA: ")]
    assert system.sizes == [(224, 224)]
    assert {"own_bos": True, "shift": False, "reduction": "sum", "scope": "candidate"}.items() <= system.score.items()


def test_fromages_stories(model):
    """`eval_vist_retrieval.py`: every caption tokenised on its own, nothing between, [RET] directly behind the last."""
    system = Reads(model)
    data = items_of(
        [("A", "a fox", "i1"), ("A", "the sea", "i2"), ("A", "at last")],
        {"text_ids": [], "image_ids": ["i1", "i2", "i3"]}, {"text_ids": [], "image_ids": ["i3"]},
    )  # fmt: skip
    hits = image.run(system, data, compat("vist"))
    assert system.rows == [ids_of(model, "BOS", "a fox", "image", "BOS", "the sea", "image", "BOS", "at last", "RET")]
    assert system.sizes == [(224, 224)] * 2 and hits["R@1"].value == 1  # two of three were seen
    story = next(p for p in protocols("vist") if p.variant == "story")
    system.rows = []
    image.run(system, data, story)
    assert system.rows == [ids_of(model, "BOS", "a fox", "image", "\nthe sea", "image", "\nat last", "RET")]


def test_fromages_dialogue_to_image(model):
    """`eval_visdial_retrieval.py`: one BOS, rounds by spaces, [RET] directly behind the last answer."""
    system = Reads(model)
    data = items_of(
        [("Q", "is it"), ("A", "a cat")],
        {"text_ids": [], "image_ids": ["i1", "i2"]}, {"text_ids": [], "image_ids": ["i2"]},
    )  # fmt: skip
    image.run(system, data, compat("visdial"))
    assert system.rows == [ids_of(model, "BOS", "Q: is it? A: a cat.", "RET")]


def test_fromages_conversations_generate_after_the_context(model, monkeypatch):
    """`generate_for_images_and_texts`: the LLM goes on from the prompts, which end in no [RET]."""
    read = []
    plain = model._generate_to_ret
    monkeypatch.setattr(model, "_generate_to_ret", lambda embeds, *rest: read.append(embeds) or plain(embeds, *rest))
    Fromage(model, max_new_tokens=1).image_replies([[picture(1), "show me"]])
    pooled, _ = model.encode_images(model.processor.pixels([picture(1)]))
    ids = torch.tensor([ids_of(model, "image", "BOS", "\nshow me")])
    assert torch.allclose(read[0], model.input_embeddings(ids, pooled))
