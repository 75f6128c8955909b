"""The miniature in the place of every data set; where scenes are asked about, pictures are left undrawn."""

import random
import re
from collections import Counter

import pytest

from benchmarks.data import miniature, miniature_language
from benchmarks.data.miniature import READERS, mmdialog, mmdialog_image, visdial, visdial_answers, vist, vqav2
from benchmarks.data.miniature_language import VALUES, read_sentences, scenes_of, value_of, wordings
from benchmarks.metrics import visdial_per_item, vqa_accuracy_per_item
from benchmarks.miniature import load_split
from benchmarks.protocols import TASKS
from train.json_files import BadDataError
from train.miniature import dialogues as train_dialogues
from train.miniature import sentences as said_sentences
from train.miniature.world import CAPTIONS, captions, splits

SPLITS = ("validation", "test")


@pytest.fixture
def undrawn(monkeypatch):
    """Tables of images hold scenes."""
    for module in (miniature, miniature_language):
        monkeypatch.setattr(module, "pictures", lambda images, seed: dict(images))


def lines(dialogue):
    return [e["text"] for turn in dialogue["turns"] for e in turn["elements"] if e["type"] == "text"]


def pixels(images):
    return {name: image.tobytes() for name, image in images.items()}


def targets(name, data):
    """The scene each item is about."""
    if name == "vqav2":
        return [data.images[q["image_id"]] for q in data.questions]
    if name == "visdial_answers":
        return [data.images[d["turns"][0]["elements"][0]["image_id"]] for d in data.dialogues]
    return [data.images[i] for d in data.dialogues for i in d["gold"]["image_ids"]]


def test_a_reader_for_every_task_and_only_held_out_splits():
    assert set(READERS) == set(TASKS)
    for read in READERS.values():
        with pytest.raises(BadDataError, match="'train': expected 'validation' or 'test'"):
            read("train")


@pytest.mark.parametrize("name", READERS)
def test_every_picture_is_of_the_split_and_a_target_once(undrawn, name):
    for split in SPLITS:
        data = READERS[name](split)
        own = set(splits()[split])
        assert set(data.images.values()) <= own
        scenes = targets(name, data)
        assert len(scenes) == len(set(scenes)) >= 250 and set(scenes) <= own
    assert not own & set(splits()["validation"])


@pytest.mark.parametrize("name", ["mmdialog", "mmdialog_image", "visdial", "visdial_answers", "vist"])
def test_pools_hold_the_gold_once_and_everything_is_in_the_tables(undrawn, name):
    data = READERS[name]("test")
    for d in data.dialogues:
        assert d["gold"]["text_ids"] or d["gold"]["image_ids"]
        for kind, table in (("text_ids", data.texts), ("image_ids", data.images)):
            assert all(d["pool"][kind].count(i) == 1 for i in d["gold"][kind])
            assert all(i in table for i in d["pool"][kind])
        context = d["turns"][: d["target_turn"]]
        context_images = [e["image_id"] for turn in context for e in turn["elements"] if e["type"] == "image"]
        assert all(i in data.images for i in context_images) and not set(context_images) & set(d["gold"]["image_ids"])


@pytest.mark.parametrize("name", ["mmdialog_image", "visdial_answers", "vist"])
def test_no_picture_is_drawn_that_no_item_needs(undrawn, name):
    data = READERS[name]("validation")
    needed = {i for d in data.dialogues for i in d["pool"]["image_ids"]}
    needed |= {e["image_id"] for d in data.dialogues for t in d["turns"] for e in t["elements"] if e["image_id"]}
    assert set(data.images) == needed


def test_the_same_every_time():
    for name, sizes in (("mmdialog", 40), ("visdial", 20), ("visdial_answers", 20), ("vist", 20), ("vqav2", 30)):
        one, two, other = (READERS[name](split, sizes) for split in ("test", "test", "validation"))
        items = "questions" if name == "vqav2" else "dialogues"
        assert getattr(one, items) == getattr(two, items) != getattr(other, items)
        assert len(one) == sizes and pixels(one.images) == pixels(two.images) != pixels(other.images)


def test_dialogues_are_those_of_load_split():
    split, responses, questions = load_split("validation"), mmdialog("validation"), visdial("validation")
    assert responses.dialogues == split.responses.dialogues and responses.texts == split.responses.texts
    for data in (responses, questions):
        drawn = pixels(data.images)
        assert drawn == pixels({i: split.images[i] for i in drawn})
    assert len({id(d["pool"]["image_ids"]) for d in responses.dialogues}) == 1
    speakers = ["Q", "A"] * 6 + ["I"]
    for dialogue, expected in zip(questions.dialogues, split.visdial.dialogues, strict=True):
        assert [t["speaker"] for t in dialogue["turns"]] == speakers and dialogue["target_turn"] == 12
        assert [t["elements"] for t in dialogue["turns"]] == [t["elements"] for t in expected["turns"]]
        assert {k: v for k, v in dialogue.items() if k != "turns"} == {
            k: v for k, v in expected.items() if k != "turns"
        }


def test_image_replies_are_those_of_mmdialog():
    every, some = mmdialog("test"), mmdialog_image("test")
    assert some.dialogues == [d for d in every.dialogues if d["wants_image"]] and len(some) == 420
    assert some.pool_hash == mmdialog("test").first(420).pool_hash
    assert pixels(some.images).items() < pixels(every.images).items()


# Answers


def test_sentences_are_read_from_the_dialogues():
    sentences, uninformative = read_sentences(train_dialogues.visdial(splits()["train"], 300))
    expected = {q: (a, s) for a, pairs in said_sentences.QUESTIONS.items() for q, s in pairs}
    placeholders = {"animal": "an_a", "hat": "an_h", "activity": "v", "place": "p"}
    assert sentences == {q: (a, s.replace(f"{{{placeholders[a]}}}", "{}")) for q, (a, s) in expected.items()}
    assert uninformative == sorted({answer for _, answer in said_sentences.IDLE_QUESTIONS})


def test_answers_after_the_image_and_the_rounds_before(undrawn):
    data, source = visdial_answers("test"), train_dialogues.visdial(scenes_of("test"), 250, 7, name="answers")
    asked = Counter()
    for d, whole in zip(data.dialogues, source.dialogues, strict=True):
        n = d["target_turn"]
        assert n == len(d["turns"]) and n % 2 == 0
        assert [t["speaker"] for t in d["turns"]] == ["I", *(["Q", "A"] * 6)[: n - 1]]
        assert d["turns"][0]["elements"][0]["image_id"] == whole["gold"]["image_ids"][0]
        assert lines(d) == lines(whole)[: n - 1]
        assert data.texts[d["gold"]["text_ids"][0]] == lines(whole)[n - 1]
        asked[lines(d)[-1]] += 1
    assert set(asked) == {q for pairs in said_sentences.QUESTIONS.values() for q, _ in pairs}


def test_a_hundred_options_and_their_relevance(undrawn):
    data = visdial_answers("test")
    sentences, uninformative = read_sentences(train_dialogues.visdial(splits()["test"], 300))
    assert len(set(data.texts.values())) == len(data.texts)
    unmarked, places = 0, []
    for d in data.dialogues:
        options = [data.texts[i] for i in d["pool"]["text_ids"]]
        assert len(set(options)) == len(options) == len(d["relevance"]) == 100 and set(uninformative) <= set(options)
        graded = dict(zip(options, d["relevance"], strict=True))
        scene = data.images[d["turns"][0]["elements"][0]["image_id"]]
        gold = data.texts[d["gold"]["text_ids"][0]]
        attribute, sentence = sentences[lines(d)[-1]]
        (other,) = {s for a, s in sentences.values() if a == attribute} - {sentence}
        phrases = wordings(attribute, value_of(scene, attribute))
        assert gold in {sentence.format(words) for words in phrases}
        expected = {other.format(words): 0.4 for words in phrases} | {sentence.format(words): 0.8 for words in phrases}
        marked = graded[gold] > 0
        unmarked += not marked
        expected[gold] = 1.0 if marked else 0.0
        assert {t: graded[t] for t in expected} == expected
        assert all(value == 0 for text, value in graded.items() if text not in expected)
        assert sum(value > 0 for value in graded.values()) >= 1
        rivals = {
            sentence.format(w)
            for v in VALUES[attribute]
            if v != value_of(scene, attribute)
            for w in wordings(attribute, v)
        }
        assert len(rivals & set(options)) >= 10
        places.append(options.index(gold))
    assert unmarked == 25
    # Shuffled: the mean place of 250 draws from 0..99 has a standard deviation of 1.8.
    assert abs(sum(places) / len(places) - 49.5) < 6 and len(set(places)) > 60


def test_a_perfect_ranking_scores_one():
    d = visdial_answers("test", 20).dialogues[0]
    values = visdial_per_item(d["relevance"], d["pool"]["text_ids"].index(d["gold"]["text_ids"][0]), d["relevance"])
    assert values["NDCG"] == pytest.approx(1)


def test_options_of_a_dialogue_do_not_depend_on_how_many_there_are(undrawn):
    assert visdial_answers("test", 5).texts == visdial_answers("test", 50).texts


# Stories


def test_a_story_needs_its_pictures(undrawn):
    for split in SPLITS:
        data = vist(split)
        pool = [data.images[i] for i in data.dialogues[0]["pool"]["image_ids"]]
        assert len(data) == 400 and len(pool) == len(data.images) == 2000
        cells = Counter((s.verb, s.object, s.place) for s in pool)
        for d in data.dialogues:
            assert d["pool"] is data.dialogues[0]["pool"] and d["target_turn"] == len(d["turns"]) == 5
            assert [[e["type"] for e in t["elements"]] for t in d["turns"]] == [["text", "image"]] * 4 + [["text"]]
            (end,) = (data.images[i] for i in d["gold"]["image_ids"])
            story = [data.images[t["elements"][1]["image_id"]] for t in d["turns"][:4]] + [end]
            assert len(set(story)) == 5 and {(s.animal, s.hat) for s in story} == {(end.animal, end.hat)}
            assert cells[end.verb, end.object, end.place] >= 4
            assert pool.count(end) == 1


def test_the_last_caption_has_activity_and_place_and_the_others_neither(undrawn):
    data = vist("test", 100)
    for d in data.dialogues:
        *first, last = lines(d)
        scene = data.images[d["gold"]["image_ids"][0]]
        for attribute in ("activity", "place"):
            for caption, wanted in (*((c, []) for c in first), (last, [value_of(scene, attribute)])):
                values = [
                    v
                    for v in VALUES[attribute]
                    if any(re.search(rf"\b{w}\b", caption) for w in wordings(attribute, v))
                ]
                assert values == wanted
        words = set(re.findall(r"\w+", " ".join(lines(d))))
        assert not words & {*VALUES["animal"], *VALUES["hat"], *miniature_language.HAT_NOUNS}


def test_stories_come_in_fours():
    with pytest.raises(ValueError, match="10 stories: expected a multiple of 4"):
        vist("test", 10)
    with pytest.raises(ValueError, match="1200 stories need scenes that share activity and place"):
        vist("test", 1200)


# Questions


def test_questions_and_the_humans(undrawn):
    data = vqav2("test")
    kinds, scores = Counter(), Counter()
    for q in data.questions:
        scene, answers, main = data.images[q["image_id"]], q["answers"], q["multiple_choice_answer"]
        kinds[q["answer_type"], q["question_type"]] += 1
        assert q["question"].startswith(q["question_type"]) and len(answers) == 10 and len(set(answers)) > 1
        assert Counter(answers).most_common(1)[0][0] == main and answers.count(main) >= 5
        assert vqa_accuracy_per_item(main, answers) == 1 and vqa_accuracy_per_item("a bicycle bell", answers) == 0
        scores.update(round(vqa_accuracy_per_item(a, answers), 2) for a in set(answers) - {main})
        if q["answer_type"] == "yes/no":
            asked = q["question"].removeprefix("is it ").removesuffix("?")
            true = any(asked in wordings(a, value_of(scene, a)) for a in ("animal", "activity", "place"))
            assert main == ("yes" if true else "no")
            kinds[main] += 1
        else:
            gold = {"what animal": scene.animal, "what colour": scene.hat}
            gold["what is it doing"] = wordings("activity", (scene.verb, scene.object))[0]
            gold["where is"] = wordings("place", scene.place)[0]
            assert main == gold[q["question_type"]]
    assert kinds == {("other", "what animal"): 120, ("other", "what colour"): 120, ("other", "what is it doing"): 120,
                     ("other", "where is"): 120, ("yes/no", "is it"): 120, "yes": 60, "no": 60}  # fmt: skip
    assert set(scores) == {0.3, 0.6, 0.9}  # of other words and wrong values: 1, 2 and 3 of ten
    assert all(scores[value] > 20 for value in scores)


def test_questions_need_scenes():
    with pytest.raises(ValueError, match="1801 questions need as many scenes, validation has 1800"):
        vqav2("validation", 1801)


def test_words_are_those_of_the_towers_training(undrawn):
    scenes = splits()["train"]
    trained = [
        d for make in (train_dialogues.responses, train_dialogues.visdial) for d in make(scenes, 2000).dialogues
    ]
    known = {w for d in trained for line in lines(d) for w in re.findall(r"\w+", line)}
    rng = random.Random(0)
    known |= {w for s in scenes[:500] for c in captions(s, rng, len(CAPTIONS)) for w in re.findall(r"\w+", c)}
    texts = [line for d in vist("test").dialogues for line in lines(d)]
    texts += [text for q in vqav2("test").questions for text in (q["question"], *q["answers"])]
    texts += visdial_answers("test").texts.values()
    assert {w for line in texts for w in re.findall(r"\w+", line)} <= known
