"""What every verb takes, and what it answers to the rest."""

import logging

import datasets
import numpy as np
import pytest
import torch
from transformers.pipelines.pt_utils import KeyDataset

from modeling_unimur import retrieval_unimur
from modeling_unimur.inputs_unimur import MANY_TURNS, as_dialogues, as_items, batches
from modeling_unimur.pipeline_unimur import MultimodalRetrievalPipeline
from tests.conftest import picture

TEXTS = ["a panda", "b", "what does it look like?"]


class Numbered:
    """A data set as torch knows it: a length, and rows by number alone."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            raise TypeError("rows have numbers")
        return self.rows[i]


def forms_of(rows):
    pandas = pytest.importorskip("pandas")
    table = datasets.Dataset.from_dict({"text": rows})
    yield from (list(rows), tuple(rows), np.array(rows), np.array(rows, object), pandas.Series(rows, index=[5, 3, 1]))
    yield from (table["text"], KeyDataset(table, "text"), table.data.column("text"), Numbered(rows), (r for r in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, of which one in a sub-folder, beside what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("b.PNG", "a.jpg", "c/d.webp", ".hidden.png", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (folder / name).write_text("no picture")
        else:
            picture(ord(name[0])).save(folder / name)
    return folder


def test_every_collection_of_texts_is_taken(tiny):
    model = tiny()
    texts, dialogues = model.embed_texts(TEXTS), model.embed_dialogues(TEXTS)
    pool = model.build_pool(texts=TEXTS)
    for form in forms_of(TEXTS):
        assert torch.equal(model.embed_texts(form, batch_size=32), texts), type(form)
    for form in forms_of(TEXTS):
        assert torch.equal(model.embed_dialogues(form), dialogues), type(form)
    for form in forms_of(TEXTS):
        built = model.build_pool(texts=form)
        assert built.search(dialogues)[0].candidates == pool.search(dialogues)[0].candidates, type(form)


def test_a_column_is_many_dialogues_and_a_list_is_one(tiny):
    model = tiny()
    pool = model.build_pool(texts=TEXTS)
    expected = [reply.candidates for reply in model.retrieve([[text] for text in TEXTS], pool)]
    pipe = MultimodalRetrievalPipeline(model, model.processor)
    for form in list(forms_of(TEXTS))[2:-1]:
        assert [reply.candidates for reply in model.retrieve(form, pool)] == expected, type(form)
        assert [[c["id"] for c in reply["candidates"]] for reply in pipe(form, pool=pool, batch_size=2)] == [
            [c.id for c in candidates] for candidates in expected
        ]
    (query,) = model.embed_dialogues([TEXTS])
    assert model.retrieve(TEXTS, pool) == model.retrieve(tuple(TEXTS), pool) == pool.search(query[None])[0]
    assert model.retrieve((text for text in ()), pool) == []


def test_every_collection_of_images_is_taken(tiny, folder):
    model = tiny()
    pictures = [picture(i, (8, 8)) for i in range(3)]
    expected = model.embed_images(pictures)
    arrays = [np.asarray(image) for image in pictures]
    column = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    undecoded = column.cast_column("image", datasets.Image(decode=False))
    for form in (arrays, np.stack(arrays), column["image"], undecoded["image"], Numbered(pictures), iter(pictures)):
        assert torch.equal(model.embed_images(form), expected), type(form)
    files = [folder / "a.jpg", folder / "b.PNG", folder / "c" / "d.webp"]
    expected = model.embed_images(files)
    for form in (folder, str(folder), sorted(folder.rglob("[abd].*")), (file for file in files)):
        assert torch.equal(model.embed_images(form), expected)
    pool = model.build_pool(images=folder)
    assert len(pool) == 3 and model.retrieve("a", pool, modality="image").image is not None
    assert len(model.build_pool(images=folder.glob("a.*"))) == 1


def test_one_item_is_answered_with_one_vector(tiny, folder):
    model = tiny()
    for verb, one in (
        (model.embed_texts, "a"),
        (model.embed_images, picture(1)),
        (model.embed_images, str(folder / "a.jpg")),
        (model.embed_images, (folder / "a.jpg").read_bytes()),
        (model.embed_images, np.asarray(picture(1))),
        (model.embed_dialogues, "a"),
        (model.embed_dialogues, picture(1)),
    ):
        assert verb(one).shape == (24,) and torch.equal(verb(one), verb([one])[0])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert torch.equal(model.embed_dialogues(chat), model.embed_dialogues([["a", "b"]])[0])
    assert torch.equal(model.embed_dialogues(chat[0]), model.embed_dialogues("a"))
    pool = model.build_pool(texts=TEXTS)
    assert model.retrieve({"content": "a"}, pool) == model.retrieve("a", pool) == model.retrieve(["a"], pool)
    for verb in (model.embed_texts, model.embed_images, model.embed_dialogues):
        assert verb([]).shape == (0, 24)


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("embed_texts", 3, "expected a list of texts, got int"),
        ("embed_texts", None, "expected a list of texts, got NoneType"),
        ("embed_texts", {"a": 1}, "expected a list of texts, got dict"),
        ("embed_texts", {"a", "b"}, "expected a list of texts, got set"),
        ("embed_texts", b"ab", "expected a list of texts, got bytes"),
        ("embed_texts", np.zeros((2, 2)), "cannot be an array of float64"),
        ("embed_texts", ["a", float("nan")], "text 1 is float"),
        ("embed_images", torch.zeros(1, 3, 8, 8), "cannot be a tensor"),
        ("embed_images", np.zeros((2, 8, 8, 3)), r"pixels are uint8|image 0: an image as an array is uint8"),
        ("embed_images", np.zeros((8, 8, 2), np.uint8), r"image 0: an image as an array is uint8"),
        ("embed_images", [3], "image 0: expected a path, bytes, PIL.Image or uint8 array, got int"),
        ("embed_dialogues", {"text": "a"}, "expected a list of dialogues, got dict"),
        ("embed_dialogues", ["a", []], "dialogue 1: the dialogue is empty"),
        ("embed_dialogues", 3.5, "expected a list of dialogues, got float"),
        ("encode", ["a", None], "input 1: expected a text, an image, chat messages"),
        ("encode", [{"audio": 1}], r"input 0: a dict of \['audio'\]"),
        ("encode", ["a", picture(1), " "], "of the inputs 0, 2: text 1 is empty"),
    ],
)
def test_what_is_no_input_is_answered_in_words(tiny, verb, given, message):
    with pytest.raises(ValueError, match=message):
        getattr(tiny(), verb)(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": ["a", "b"]}, r"pool is a list: model.build_pool"),
        ({"pool": "folder"}, r"pool='folder' is a path: CandidatePool.load_from_disk"),
        ({"dialogue": []}, "the dialogue is empty"),
        ({"dialogue": ["hi", ["a"]]}, "turn 1: expected a string"),
        ({"dialogue": {"text": "a"}}, "expected a list of dialogues, got dict"),
        ({"top_k": "5"}, "top_k='5' must be a whole number"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"top_k": True}, "top_k=True"),
        ({"image_bias": "x"}, "image_bias='x' must be finite"),
        ({"image_bias": 10**400}, "image_bias="),
        ({"image_bias": None}, "image_bias=None"),
        ({"exclude": float("nan")}, "exclude=nan is of type float: give a list"),
        ({"exclude": [None]}, "exclude: the id None is of type NoneType"),
        ({"exclude": [1.5]}, r"exclude: the id 1\.5 is of type float"),
        ({"modality": ["image"]}, r"modality=\['image'\]"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
    ],
)
def test_what_is_no_search_is_answered_in_words(tiny, arguments, message):
    pool = tiny().build_pool(texts=TEXTS)
    with pytest.raises(ValueError, match=message):
        tiny().retrieve(**{"dialogue": "hi", "pool": pool, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no candidates"),
        ({"texts": ["a"], "text_ids": 3}, "text_ids=3 is of type int: give a list"),
        ({"texts": ["a"], "text_ids": "a"}, "text_ids='a' is one string"),
        ({"texts": ["a"], "text_ids": [None]}, "text_ids: the id None is of type NoneType"),
        ({"images": [picture(1)], "image_ids": 3}, "image_ids=3 is of type int: give a list"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size=0"),
        ({"images": datasets.Dataset.from_dict({"image": ["a"]})}, r"a whole table .*table\['name'\]"),
        ({"images": []}, "no candidates"),
    ],
)
def test_what_is_no_pool_is_answered_in_words(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().build_pool(**arguments)


def test_ids_are_strings_whatever_they_were(tiny):
    model = tiny()
    pool = model.build_pool(texts=TEXTS, text_ids=np.arange(105, 108))
    for exclude in ([105], np.array([105]), {"105"}, (str(i) for i in [105])):
        assert {c.id for c in model.retrieve("a", pool, exclude=exclude).candidates} == {"106", "107"}


def test_a_folder_without_images_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="holds no image file"):
        tiny().build_pool(images=tmp_path)


def test_an_item_is_named_by_its_place_among_all(tiny):
    texts = ["a"] * 5 + [""]
    for verb, message in (("embed_texts", "^text 5 is empty"), ("embed_dialogues", "^dialogue 5: turn 0 is an empty")):
        with pytest.raises(ValueError, match=message):
            getattr(tiny(), verb)(texts, batch_size=2)
    with pytest.raises(ValueError, match=r"^image 3: "):
        tiny().embed_images([picture(1)] * 3 + ["gone.png"], batch_size=2)


def test_a_likely_other_meaning_is_warned_of(tiny, caplog):
    model = tiny()
    with caplog.at_level(logging.WARNING):
        model.embed_dialogues(["hello", "hi"])
        as_dialogues(["hello"] * MANY_TURNS)
        assert not caplog.text
        model.embed_dialogues(["look", picture(1)])
        assert "embedded as so many dialogues" in caplog.text
        as_dialogues(["hello"] * (MANY_TURNS + 1))
        assert "is read as one dialogue of so many turns" in caplog.text


def test_batches_are_read_when_they_are_needed():
    class Column(Numbered):
        read = 0

        def __getitem__(self, i):
            Column.read += 1
            return super().__getitem__(i)

    items, single = as_items("images", Column(list(range(10))))
    steps = batches(items, 4)
    assert next(steps) == (0, [0, 1, 2, 3]) and Column.read == 4 and not single
    assert list(steps) == [(4, [4, 5, 6, 7]), (8, [8, 9])]


def test_encode_answers_as_sentence_transformers_do(tiny):
    model = tiny()
    one, two = model.encode("a panda"), model.encode(["a panda", "b"])
    assert isinstance(one, np.ndarray) and one.shape == (24,) and two.shape == (2, 24) and one.dtype == np.float32
    assert np.array_equal(model.encode_document(["a panda", "b"]), two)
    assert torch.equal(model.encode(["b"], convert_to_numpy=False), model.embed_texts(["b"]))
    assert np.array_equal(model.embed_texts(["b"], convert_to_numpy=True), model.embed_texts(["b"]).numpy())
    query = model.encode_query(["a", picture(1)], convert_to_numpy=False)
    assert torch.allclose(query, model.embed_dialogues([["a"], [picture(1)]]), atol=1e-6)
    assert model.encode([]).shape == (0, 24)
    mixed = ["a", picture(1), "b", [{"role": "user", "content": "c"}], {"image": picture(1), "text": "d"}]
    alone = np.stack([model.encode([item])[0] for item in mixed])
    assert np.allclose(model.encode(mixed, batch_size=2), alone, atol=1e-5)


def test_similarity_is_the_cosine_of_each_pair(tiny):
    model = tiny()
    a, b = model.encode(["a", "b"]), model.embed_texts(["a", "c", "d"])
    assert torch.allclose(model.similarity(a, b), torch.from_numpy(a) @ b.T, atol=1e-6)
    assert model.similarity(a[0], b[0]).shape == (1, 1) and model.similarity([[3.0, 4.0]], [[3.0, 4.0]]).item() == 1
    for x, y, message in (
        (a, a[:, :5], "of width 24, b of 5"),
        ("a", b, "a holds no embeddings"),
        (a[None], b, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model.similarity(x, y)


@pytest.mark.parametrize(
    ("patience", "asked", "expected"),
    [(2.0, None, False), (0.0, None, True), (0.0, False, False), (2.0, True, True)],
)
def test_one_rule_of_progress_bars(tiny, capsys, monkeypatch, patience, asked, expected):
    monkeypatch.setattr(retrieval_unimur, "PATIENCE", patience)
    tiny().embed_texts(TEXTS, batch_size=2, show_progress_bar=asked)
    tiny().encode(TEXTS, batch_size=2, show_progress_bar=asked)
    tiny().build_pool(texts=TEXTS, batch_size=2, show_progress_bar=asked)
    assert capsys.readouterr().err.count("| 2/2 [") == 3 * expected


def test_the_pipeline_refuses_in_words(tiny):
    model = tiny()
    pipe = MultimodalRetrievalPipeline(model, model.processor)
    for arguments, message in (
        ({"pool": ["a"]}, "pool is a list"),
        ({"pool": {"texts": ["a"]}, "batch_size": 0}, "batch_size=0"),
        ({"pool": {"texts": ["a"]}, "top_k": "5"}, "top_k='5'"),
        ({"pool": {"text": ["a"]}}, "not text"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("hi", **arguments)
    with pytest.raises(ValueError, match=r"^dialogue 2: turn 0 is an empty text"):
        pipe([["a"], ["b"], [""]], pool={"texts": ["a"]}, batch_size=2)


def test_the_pipeline_reads_its_arguments_once(tiny, monkeypatch):
    model = tiny()
    pipe = MultimodalRetrievalPipeline(model, model.processor)
    built = []
    real = type(model).build_pool
    monkeypatch.setattr(type(model), "build_pool", lambda self, **given: built.append(given) or real(self, **given))
    answers = pipe(
        [["a"], ["b"], ["c"]], pool={"texts": TEXTS}, batch_size=1, exclude=(id_ for id_ in ["text-0"]), top_k=5
    )
    assert [{c["id"] for c in answer["candidates"]} for answer in answers] == [{"text-1", "text-2"}] * 3
    assert len(built) == 1
