"""The tasks on embeddings written by hand, with figures computed by hand; and every protocol on tiny models."""

import dataclasses
import math

import pytest
import torch
from PIL import Image

from benchmarks.baselines.chance import Chance
from benchmarks.baselines.clip import ClipBaseline
from benchmarks.load import UniMuR
from benchmarks.protocols import TASKS, paper, protocols, read
from benchmarks.run import compare, evaluate
from benchmarks.schema import Dialogues, Protocol, Questions
from benchmarks.systems import ImageReplies, ShownAs, System
from benchmarks.tables import markdown
from benchmarks.tasks import answers, image, response, vqa
from benchmarks.tasks.contexts import Contexts, Squashed, context_of
from tests.conftest import picture
from train.json_files import BadDataError


def text(words):
    return {"type": "text", "text": words, "image_id": None}


def image_element(name):
    return {"type": "image", "text": None, "image_id": name}


def dialogue(name, words, pool, texts=(), images=()):
    turns = [{"speaker": "A", "elements": [text(words)]}]
    return {"dialogue_id": name, "turns": turns, "target_turn": 1, "pool": pool,
            "gold": {"text_ids": list(texts), "image_ids": list(images)}}  # fmt: skip


class Table(System):
    """Embeddings looked up by what is embedded."""

    name = "table"

    def __init__(self, rows):
        self.rows = {
            key: torch.nn.functional.normalize(torch.tensor(v, dtype=torch.float), dim=0) for key, v in rows.items()
        }

    def _look(self, keys):
        return torch.stack([self.rows[k] for k in keys])

    def embed_texts(self, texts, **_):
        return self._look(texts)

    def embed_images(self, images, **_):
        return self._look(images)

    def embed_dialogues(self, dialogues, **_):
        return self._look([d[0]["content"][0]["text"] for d in dialogues])


POOL = {"text_ids": ["t1", "t2", "t3"], "image_ids": ["i1", "i2"]}
DATA = Dialogues(
    [
        # The best text is gold, and the gold image scores above the second text.
        dialogue("both gold", "q1", POOL, ["t1"], ["i1"]),
        # The best text is gold; the second best is a text, so no image is retrieved although the best one is gold.
        dialogue("no image", "q2", POOL, ["t2"], ["i2"]),
        # A text-only reply for which an image is retrieved, and the text is wrong.
        dialogue("unwanted image", "q3", POOL, ["t3"]),
        # The gold reply has images alone; the wrong one is retrieved.
        dialogue("wrong image", "q4", POOL, [], ["i1", "i2"]),
    ],
    {"t1": "T1", "t2": "T2", "t3": "T3"},
    {"i1": "I1", "i2": "I2"},
)
# One axis per candidate, so that a query's coordinates are its scores.
SYSTEM = Table({
    "T1": [1, 0, 0, 0, 0], "T2": [0, 1, 0, 0, 0], "T3": [0, 0, 1, 0, 0], "I1": [0, 0, 0, 1, 0], "I2": [0, 0, 0, 0, 1],
    "q1": [9, 1, 1, 8, 2], "q2": [8, 9, 1, 1, 7], "q3": [9, 1, 2, 1, 8], "q4": [9, 1, 1, 2, 8],
})  # fmt: skip
# By this CLIP, T1 and I1 are parallel, T1 and I2 opposite, T2 and I2 orthogonal.
CLIP = Table({"T1": [1, 0], "T2": [0, 1], "T3": [1, 1], "I1": [1, 0], "I2": [-1, 0]})


def protocol(task, **settings):
    first = protocols(task, miniature=True)[0]
    return dataclasses.replace(first, settings=first.settings | settings)


def test_a_reply_is_scored_as_in_section_3_4():
    measures = {k: m.value for k, m in response.run(SYSTEM, DATA, protocol("mmdialog"), CLIP).items()}
    assert measures["image retrieval rate"] == pytest.approx(2 / 3)  # q1 and q4 of q1, q2, q4
    assert measures["image retrieval rate on text-only turns"] == 1  # q3
    assert measures["image R@1"] == pytest.approx(1 / 3)  # q1; q4's first gold image is i1, i2 was retrieved
    assert measures["text R@1"] == pytest.approx(2 / 3)  # q1, q2 of q1, q2, q3
    assert measures["overall R@1"] == pytest.approx((1 + 2) / (3 + 3))
    assert measures["whole reply R@1"] == 1 / 4  # q1
    assert measures["CLIP-Sim"] == pytest.approx((1 - 1 - 1) / 3)  # q1: T1 I1; q3: T1 I2; q4: T1 I2


def test_a_system_may_decide_itself_which_replies_have_an_image():
    class Decides(Table):
        def image_replies(self, dialogues):
            # Queries of replies without an image are not used; q2's retrieves i1 instead of i2.
            return ImageReplies(torch.tensor([False, True, False, False]), self.rows["q1"].repeat(4, 1))

    decides = Decides({})
    decides.rows = SYSTEM.rows
    measures = {k: m.value for k, m in response.run(decides, DATA, protocol("mmdialog"), CLIP).items()}
    assert measures["image retrieval rate"] == pytest.approx(1 / 3) and measures["image R@1"] == 0
    assert measures["text R@1"] == pytest.approx(2 / 3)  # texts are ranked by the dialogue's own embedding
    assert measures["image retrieval rate on text-only turns"] == 0
    assert measures["CLIP-Sim"] == pytest.approx(0)  # q2: T2 I1

    decides.rows = SYSTEM.rows | {"q1": SYSTEM.rows["q2"]}  # now i2, which is gold
    measures = response.run(decides, DATA, protocol("mmdialog"), CLIP)
    assert measures["image R@1"].value == pytest.approx(1 / 3)
    assert measures["whole reply R@1"].value == 1 / 4  # q2

    # Another's retrieval under the same decision: q2 alone shows an image, now the right one.
    shown = ShownAs(SYSTEM, decides, "shown")
    measures = {k: m.value for k, m in response.run(shown, DATA, protocol("mmdialog"), CLIP).items()}
    assert measures["image retrieval rate"] == measures["image R@1"] == pytest.approx(1 / 3)
    assert measures["text R@1"] == pytest.approx(2 / 3) and measures["whole reply R@1"] == 1 / 4

    text_only = Dialogues([dialogue("right words", "q3", POOL, ["t1"])], DATA.texts, DATA.images)
    for shown in (False, True):
        decides.image_replies = lambda dialogues, shown=shown: ImageReplies(torch.tensor([shown]), SYSTEM.rows["q1"])
        whole = response.run(decides, text_only, protocol("mmdialog"), CLIP)["whole reply R@1"]
        assert whole.value == (not shown)  # an image that is not due spoils a reply


def test_any_image_of_a_turn_may_count_by_the_protocol():
    measures = response.run(SYSTEM, DATA, protocol("mmdialog", first_image=False), CLIP)
    assert measures["image R@1"].value == pytest.approx(2 / 3)  # the image retrieved for q4 is its second gold one


def test_texts_may_be_ranked_without_embeddings():
    class Prefers(Table):
        def text_scores(self, contexts, texts):
            return torch.tensor([[0.0, 0.0, 1.0]]).repeat(len(contexts), 1)

    prefers = Prefers({})
    prefers.rows = SYSTEM.rows
    assert response.run(prefers, DATA, protocol("mmdialog"), CLIP)["text R@1"].value == pytest.approx(1 / 3)  # q3


def test_a_bias_towards_images_retrieves_more_of_them():
    p = protocol("mmdialog")
    embedded = response.embed(SYSTEM, DATA, [context_of(d, DATA.images) for d in DATA.dialogues])
    clip = response.clip_embeddings(CLIP, DATA, embedded)
    rates = [
        response.score(embedded, DATA, p, clip, SYSTEM.similarity, image_bias=b)["image retrieval rate"].value
        for b in (-2, 0, 2)
    ]
    assert rates == pytest.approx([0, 2 / 3, 1])


def test_separate_pools_are_ranked_separately():
    few = {"text_ids": ["t1", "t3"], "image_ids": ["i1"]}
    data = Dialogues([dialogue("a", "q2", few, ["t1"], ["i1"]), DATA.dialogues[1]], DATA.texts, DATA.images)
    measures = response.run(SYSTEM, data, protocol("mmdialog"), CLIP)
    assert measures["text R@1"].values.tolist() == [1, 1]  # without t2 in its pool, q2's best text is t1
    assert image.run(SYSTEM, data, protocol("mmdialog_image"))["R@1"].values.tolist() == [1, 1]


VISDIAL = Dialogues(
    [dialogue("d1", "q1", pool := {"text_ids": [], "image_ids": ["i1", "i2"]}, images=["i1"]),
     dialogue("d2", "q2", pool, images=["i2"])],
    {}, {"i1": "I1", "i2": "I2"},
)  # fmt: skip
# Images per dialogue: q1 takes I1 (gold), q2 takes I1 (wrong). Dialogues per image: I1 takes q2 (wrong), I2 takes q2.
DIRECTED = Table({"I1": [1, 0], "I2": [0, 1], "q1": [1, 0.1], "q2": [1.2, 1]})


def test_the_direction_of_ranking_matters():
    DIRECTED.rows |= {"q1": torch.tensor([1.0, 0.1]), "q2": torch.tensor([1.2, 1.0])}  # not of one length
    forward, compat = (
        dataclasses.replace(p, settings=p.settings | {"squash": None}) for p in protocols("visdial", True)
    )
    assert (forward["direction"], compat["direction"]) == ("image per dialogue", "dialogue per image")
    assert image.run(DIRECTED, VISDIAL, forward)["R@1"].values.tolist() == [1, 0]
    assert image.run(DIRECTED, VISDIAL, compat)["R@1"].values.tolist() == [0, 1]


def test_ranking_dialogues_per_image_needs_one_pool():
    apart = Dialogues([{**d, "pool": dict(d["pool"])} for d in VISDIAL.dialogues], {}, VISDIAL.images)
    compat = protocols("visdial", True)[1]
    with pytest.raises(ValueError, match="one shared pool"):
        image.run(DIRECTED, apart, dataclasses.replace(compat, settings=compat.settings | {"squash": None}))


def test_squashed_images_lose_their_shape():
    few = Squashed([Image.new("RGB", (40, 10)), Image.new("RGB", (5, 9))], 8)
    assert [i.size for i in few[0:2]] == [(8, 8), (8, 8)] and len(few) == 2


def test_images_of_a_context_may_rank_last_by_the_protocol():
    first, second = (
        {**d, "turns": [{"speaker": "A", "elements": [text(q), image_element(i)]}]}
        for d, q, i in zip(VISDIAL.dialogues, ("q1", "q2"), ("i2", "i1"), strict=True)
    )
    # q2's best image is I1, which is in its context; again with the gold one there, and with one outside the pool.
    gold = {**second, "turns": [{"speaker": "A", "elements": [text("q2"), image_element("i2")]}]}
    other = {**second, "turns": [{"speaker": "A", "elements": [text("q2"), image_element("i3")]}]}
    data = Dialogues([first, second, gold, other], {}, VISDIAL.images | {"i3": "I3"})
    compat = next(p for p in protocols("vist") if p.variant == "fromage-compat")
    plain = dataclasses.replace(compat, settings=compat.settings | {"squash": None, "seen_images": "ranked"})
    last = dataclasses.replace(plain, settings=plain.settings | {"seen_images": "last"})
    assert image.run(DIRECTED, data, plain)["R@1"].values.tolist() == [1, 0, 0, 0]
    assert image.run(DIRECTED, data, last)["R@1"].values.tolist() == [1, 1, 0, 0]
    assert image.run(DIRECTED, data, last)["R@5"].values.tolist() == [1, 1, 1, 1]  # last, not removed


def test_relevances_count_for_the_next_round_where_the_protocol_has_that_defect():
    class Judges(System):
        def log_likelihoods(self, contexts, options, **_):
            return [torch.tensor(scores) for scores in ([3.0, 2, 1], [1.0, 2, 3], [1.0, 3, 2])]

    pool = {"text_ids": ["t1", "t2", "t3"], "image_ids": []}
    relevances = [[1.0, 0.5, 0], None, [1.0, 0, 0]]
    items = [{**dialogue(str(i), "q", pool, ["t1"]), "relevance": r} for i, r in enumerate(relevances)]
    data = Dialogues(
        [{k: v for k, v in i.items() if v is not None} for i in items], {t: t for t in pool["text_ids"]}, {}
    )
    corrected, compat = (
        dataclasses.replace(p, settings=p.settings | {"serialisation": {"A": "{text}"}, "squash": None})
        for p in protocols("visdial_answers")[:2]
    )
    assert (corrected["relevance"], compat["relevance"]) == ("own", "previous")
    ndcg = answers.run(Judges(), data, corrected)["NDCG"].values
    assert ndcg[0] == 1 and math.isnan(ndcg[1]) and ndcg[2] == 0
    # The first round's relevances meet the second's scores; the last round's are dropped, as FROMAGe's script does.
    ndcg = answers.run(Judges(), data, compat)["NDCG"].values
    worst = (0.5 / math.log2(3)) / (1 + 0.5 / math.log2(3))  # of the two best, t3 and t2, one is relevant
    assert math.isnan(ndcg[0]) and ndcg[1] == pytest.approx(worst) and math.isnan(ndcg[2])
    mrr = [answers.run(Judges(), data, p)["MRR"].values.tolist() for p in (corrected, compat)]
    assert mrr[0] == mrr[1]  # the answer itself is of its own round


TURNS = {
    "dialogue_id": "x", "target_turn": 3,
    "turns": [{"speaker": "I", "elements": [image_element("i1")]}, {"speaker": "Q", "elements": [text("is it old")]},
              {"speaker": "A", "elements": [text("no")]}, {"speaker": "Q", "elements": [text("the target")]}],
}  # fmt: skip


def test_contexts_are_serialised_by_the_protocol():
    templates = {"I": "{image}", "Q": "Q: {text}?", "A": "A: {text}", "join": "\n", "end": "\nA:"}
    (message,) = context_of(TURNS, {"i1": "PICTURE"}, templates)
    assert message["content"] == [
        {"type": "image", "image": "PICTURE"},
        {"type": "text", "text": "\nQ: is it old?\nA: no\nA:"},
    ]
    assert len(context_of(TURNS, {"i1": "PICTURE"})) == 3
    words = context_of(TURNS, {"i1": "PICTURE"}, context="text")
    assert [part["type"] for turn in words for part in turn["content"]] == ["text", "text"]
    last = context_of(TURNS, {"i1": "PICTURE"}, context="last")
    assert [turn["content"][0]["text"] for turn in last] == ["no"]
    with pytest.raises(ValueError, match="'x': no template for 'A'"):
        context_of(TURNS, {"i1": "PICTURE"}, {"I": "", "Q": "{text}"})


def test_contexts_squash_their_images_when_read():
    data = Dialogues([TURNS], {}, {"i1": Image.new("RGB", (40, 10))})
    contexts = Contexts(data, "turns", squash=8)
    assert len(contexts) == 1 and contexts[:1][0][0]["content"][0]["image"].size == (8, 8)
    assert Contexts(data, "turns")[0] == context_of(TURNS, data.images)


def test_a_turn_of_images_alone_may_have_its_own_separator():
    templates = {"I": "{image}", "Q": "{text}?", "A": "{text}", "image_join": "", "join": "|", "end": "!"}
    (message,) = context_of(TURNS, {"i1": "PICTURE"}, templates)
    assert [part.get("text") for part in message["content"]] == [None, "is it old?|no!"]


def test_fromages_serialisation_of_visdial():
    corrected = protocols("visdial")[1]
    (message,) = context_of(TURNS | {"turns": TURNS["turns"][1:], "target_turn": 2}, {}, corrected["serialisation"])
    assert message["content"] == [{"type": "text", "text": "Q: is it old? A: no."}]


@pytest.mark.parametrize("task", TASKS)
def test_every_protocol_file_is_complete(task):
    for miniature in (False, True):
        variants = protocols(task, miniature)
        assert variants and all(p.version >= 1 and p.about and p.miniature == miniature for p in variants)
    columns, rows = paper(task)
    assert all(len(values) == len(columns) for values in rows.values())


def test_an_unknown_field_of_a_protocol_is_named(tmp_path, monkeypatch):
    import benchmarks.protocols as module

    wrong = (module.FOLDER / "visdial.yaml").read_text().replace("squash: 224", "squash: 224\n    sqash: 1")
    (tmp_path / "visdial.yaml").write_text(wrong)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="sqash"):
        read("visdial")
    (tmp_path / "visdial.yaml").write_text(
        wrong.replace("ties: expected", "ties: first").replace("sqash: 1", "squash: 1")
    )
    with pytest.raises(ValueError, match="not 'first'"):
        read("visdial")
    with pytest.raises(ValueError, match="no task 'visdal'"):
        read("visdal")


def every_kind(tiny_images):
    """A handful of items of each kind of task."""
    pool = {"text_ids": ["t1", "t2", "t3"], "image_ids": list(tiny_images)}
    texts = {"t1": "a panda", "t2": "bamboo, of course", "t3": "no"}
    turns = [{"speaker": "Q", "elements": [text("what is it?"), image_element("i0")]},
             {"speaker": "A", "elements": [text("a cat")]}, {"speaker": "Q", "elements": [text("and where?")]}]  # fmt: skip
    items = [{"dialogue_id": str(i), "turns": turns, "target_turn": 3, "pool": pool, "relevance": [0.0, 1.0, 0.5],
              "gold": {"text_ids": ["t1"], "image_ids": [f"i{i}"]}} for i in range(3)]  # fmt: skip
    questions = [{"question_id": str(i), "image_id": "i1", "question": "what?", "answers": ["a panda"] * 9 + ["no"],
                  "answer_type": "other", "multiple_choice_answer": "panda"} for i in range(3)]  # fmt: skip
    return Dialogues(items, texts, tiny_images), Questions(questions, tiny_images)


@pytest.mark.parametrize("task", TASKS)
def test_every_protocol_runs_on_every_kind_of_system(tiny, task):
    model = tiny()
    dialogues, questions = every_kind({f"i{i}": picture(i) for i in range(3)})
    data = questions if task == "vqav2" else dialogues
    systems = [UniMuR(model), ClipBaseline(model), Chance()]
    for p in protocols(task, miniature=True):
        if "serialisation" in p.settings:
            p = dataclasses.replace(p, settings=p.settings | {"serialisation": "turns"})
        results = compare(systems, data, p, clip=systems[1], seed=3, second=True)
        for r in results:
            language = p.settings.get("by") in ("likelihood", "generation")
            assert r["applies"] == (r["system"] == "UniMuR" or not language)
            assert r["data"]["pool"] == data.pool_hash and r["seed"] == 3 and r["protocol"]["version"] == p.version
            for value in r["metrics"].values():
                assert value["value"] is None or value["low"] <= value["value"] <= value["high"]
        assert results[0]["metrics"] and "first_less_this" not in results[0]
        compared = [
            {place for place in ("first", "second") if f"{place}_less_this" in r} for r in results if r["applies"]
        ]
        assert compared == [set(), {"first"}, {"first", "second"}][: len(compared)]
        table = markdown(task, results, paper(task))
        assert all(f"| {s.name} |" in table for s in systems) and p.variant in table


def test_questions_without_answers_are_refused(tiny):
    _, questions = every_kind({"i1": picture(1)})
    bare = Questions([q | {"answers": []} for q in questions.questions], questions.images)
    with pytest.raises(BadDataError, match="have no answers"):
        vqa.run(UniMuR(tiny()), bare, protocols("vqav2", True)[0])


def test_no_gold_at_all_is_not_a_number():
    data = Dialogues([dialogue("a", "q1", POOL)], DATA.texts, DATA.images)
    measures = response.run(SYSTEM, data, protocol("mmdialog"), CLIP)
    assert all(
        math.isnan(measures[name].value) for name in ("image R@1", "text R@1", "overall R@1", "whole reply R@1")
    )
    assert measures["text R@1"].summary() == {"value": None, "low": None, "high": None, "n": 0}


def test_a_task_that_does_not_apply_is_none(tiny):
    dialogues, _ = every_kind({f"i{i}": picture(i) for i in range(3)})
    by_likelihood = protocols("visdial_answers", True)[0]
    by_likelihood = Protocol(
        **{**vars(by_likelihood), "settings": by_likelihood.settings | {"serialisation": "turns"}}
    )
    assert evaluate(Chance(), dialogues, by_likelihood) is None
    assert evaluate(UniMuR(tiny()), dialogues, by_likelihood)["R@1"].n == 3


def test_an_operation_that_a_device_lacks_is_an_error():
    class Broken(System):
        def embed_dialogues(self, dialogues, **kwargs):
            raise NotImplementedError("the operator is not implemented for this device")

    ranking = protocols("visdial", True)[0]
    assert evaluate(System(), VISDIAL, ranking) is None
    with pytest.raises(NotImplementedError, match="this device"):
        evaluate(Broken(), VISDIAL, ranking)
