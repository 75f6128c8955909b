"""The sentence-transformers module gives the embeddings of `embed_*`, through all that library's verbs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.processes import FORKS

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is optional: pip install 'modeling-unimur[embed]'"
)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentence")
    tiny().save_pretrained(folder, with_towers=True)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return UniMuRModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def same(theirs, ours):
    assert np.abs(np.asarray(theirs) - ours.numpy()).max() < 1e-5


def turn_of(image, text=None):
    parts = [{"type": "image", "image": image}] + ([{"type": "text", "text": text}] if text else [])
    return [{"role": "user", "content": parts}]


def test_each_kind_of_input_is_what_embed_gives(encoder, model):
    one, two = picture(1), picture(2)
    same(encoder.encode(["a", "a panda in a hat"]), model.embed_texts(["a", "a panda in a hat"]))
    same(encoder.encode([one, two]), model.embed_images([one, two]))
    same(encoder.encode([{"image": one, "text": "look"}]), model.embed_dialogues([turn_of(one, "look")]))
    same(
        encoder.encode([{"text": "a"}, {"image": two}]),
        torch.cat([model.embed_texts(["a"]), model.embed_images([two])]),
    )
    chats = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}], turn_of(one, "and?")]
    same(encoder.encode(chats), model.embed_dialogues(chats))
    same(encoder.encode(chats[0]), model.embed_dialogues([chats[0]])[0])  # one conversation is one input


def test_mixed_inputs_keep_their_order(encoder, model):
    one = picture(3)
    mixed = ["first", one, turn_of(one, "hm"), "fourth"]
    ours = [model.embed_texts(["first"]), model.embed_images([one]), model.embed_dialogues([turn_of(one, "hm")]),
            model.embed_texts(["fourth"])]  # fmt: skip
    same(encoder.encode(mixed), torch.cat(ours))


@pytest.mark.parametrize("space", ["ret", "clip_text", "last_output"])
def test_a_query_is_a_dialogue_and_a_document_a_candidate(tiny, tmp_path, space):
    model = tiny()
    model.save_pretrained(tmp_path, with_towers=True)
    encoder = sentence_transformers.SentenceTransformer(
        str(tmp_path), trust_remote_code=True, device="cpu", model_kwargs={"text_candidates": space}
    )
    here = UniMuRModel.from_pretrained(tmp_path, text_candidates=space)
    same(encoder.encode_query(["show me"]), here.embed_dialogues(["show me"]))
    same(encoder.encode_query([picture(1)]), here.embed_dialogues([[picture(1)]]))
    same(encoder.encode_document(["show me"]), here.embed_texts(["show me"]))
    alike = np.allclose(encoder.encode_query(["show me"]), encoder.encode_document(["show me"]), atol=1e-5)
    assert alike is (space == "ret")


def test_prompts_lead(encoder, model):
    same(encoder.encode(["a panda"], prompt="find: "), model.embed_texts(["find: a panda"]))
    same(encoder.encode_query(["a panda"], prompt="find"), model.embed_dialogues([["find", "a panda"]]))
    with pytest.raises(ValueError, match="image, which takes no prompt"):
        encoder.encode([picture(1)], prompt="find: ")


def test_batches_change_nothing(encoder):
    texts = [f"text {'x' * (i % 7)} {i}" for i in range(9)]
    assert np.abs(encoder.encode(texts, batch_size=1) - encoder.encode(texts, batch_size=9)).max() < 1e-5


def test_similarity_is_the_cosine(encoder):
    a, b = encoder.encode(["a", "b"]), encoder.encode(["c"])
    assert torch.allclose(encoder.similarity(a, b), torch.from_numpy(a @ b.T), atol=1e-5)


def test_truncation_and_quantisation_are_that_librarys(encoder):
    full = torch.from_numpy(encoder.encode(["a", "b"]))
    short = encoder.encode(["a", "b"], truncate_dim=8, normalize_embeddings=True)
    assert np.abs(short - F.normalize(full[:, :8], dim=-1).numpy()).max() < 1e-5
    bits = encoder.encode(["a", "b"], precision="ubinary")
    assert bits.dtype == np.uint8
    assert np.array_equal(np.unpackbits(bits, axis=1)[:, :24], (full.numpy() > 0).astype(np.uint8))
    assert encoder.encode([f"t{i}" for i in range(120)], precision="int8").dtype == np.int8


def test_a_pool_of_processes_gives_the_same(encoder, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: FORKS)  # with torch imported already
    texts = [f"text {i}" for i in range(6)]
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    try:
        there = encoder.encode(texts, pool=pool, chunk_size=2)
    finally:
        encoder.stop_multi_process_pool(pool)
    assert np.abs(there - encoder.encode(texts)).max() < 1e-5


def test_saved_by_that_library_and_loaded_by_both(encoder, model, tmp_path):
    encoder.save(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    same(again.encode(["a"]), model.embed_texts(["a"]))
    same(UniMuRModel.from_pretrained(tmp_path).embed_texts(["a"]), model.embed_texts(["a"]))
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize(
    ("item", "message"),
    [({"audio": [0.0]}, "audio"), ({"image": None}, "expected 'image', 'text'"), ("", "empty")],
)
def test_bad_inputs_are_named(encoder, item, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode([item])


def test_the_models_own_encode_gives_the_same(encoder, model):
    mixed = ["first", picture(3), {"image": picture(1), "text": "look"}, "fourth"]
    same(encoder.encode(mixed), torch.from_numpy(model.encode(mixed)))
    same(encoder.encode_query(mixed[:2]), torch.from_numpy(model.encode_query(mixed[:2])))
    same(encoder.encode("one"), torch.from_numpy(model.encode("one")))


def test_the_length_can_be_set(encoder, model):
    before = encoder.max_seq_length
    try:
        encoder.max_seq_length = 12
        assert encoder.max_seq_length == encoder[0].model.processor.max_length == 12
        same(encoder.encode_query(["b" * 50]), model.embed_dialogues(["b" * 10]))
        with pytest.raises(ValueError, match="max_length='long'"):
            encoder.max_seq_length = "long"
    finally:
        encoder.max_seq_length = before


def test_what_would_not_be_read_is_refused(folder):
    for arguments, message in (
        ({"backend": "onnx"}, "backend='onnx': UniMuR runs on torch alone"),
        ({"config_kwargs": {"text_candidates": "clip_text"}}, "config_kwargs=.* is not read"),
        ({"processor_kwargs": {"max_length": 9}}, "processor_kwargs=.* is not read"),
    ):
        with pytest.raises(ValueError, match=message):
            sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **arguments)
