"""The pool in Milvus (milvus-lite) answers as the pool on disk does."""

import base64
import builtins
import io
import json

import pytest
import torch

from modeling_unimur import CandidatePool, MilvusPool
from tests.conftest import picture
from tests.modeling_unimur.pools import MADE_BY, Q, unit

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
STRANGE = ['it\'s "quoted"', "back\\slash", "line\nbreak", "été ü 汉"]


@pytest.fixture(scope="module")
def pool():
    images = CandidatePool.empty(MADE_BY).append("image", [picture(i) for i in range(30)], unit(30, 1))
    texts = [*STRANGE, *(f"text {i}" for i in range(36))]
    return images.append("text", texts, unit(40, 2), ids=[*STRANGE, *(f"t{i}" for i in range(36))])


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "pool.db")


def same(mine, other):
    for a, b in zip(mine, other, strict=True):
        assert [(c.id, c.modality, c.rank) for c in a.candidates] == [(c.id, c.modality, c.rank) for c in b.candidates]
        assert [c.score for c in a.candidates] == pytest.approx([c.score for c in b.candidates], abs=1e-4)
        assert a.text == b.text and (a.image is None) == (b.image is None)
        assert a.image is None or a.image.tobytes() == b.image.tobytes()


def test_it_answers_as_the_pool_on_disk(pool, uri, monkeypatch):
    monkeypatch.setattr("modeling_unimur.pool_milvus.BATCH", 16)
    milvus, queries = pool.to_milvus(uri, show_progress_bar=False), unit(20, 3)
    assert len(milvus) == 70 and "70 candidates" in repr(milvus)
    for arguments in (
        {}, {"top_k": 1}, {"top_k": 100}, {"modality": "image"}, {"modality": "text", "top_k": 3},
        {"exclude": [*STRANGE, "image-3"]}, {"image_bias": 0.3}, {"calibrate": True}, {"calibrate": True, "image_bias": -1},
    ):  # fmt: skip
        same(milvus.search(queries, **arguments), pool.search(queries, **arguments))
    same(milvus.search(-pool_rows(pool), top_k=2), pool.search(-pool_rows(pool), top_k=2))
    milvus.close()
    again = MilvusPool(uri)
    assert again.made_by == MADE_BY
    same(again.search(queries), pool.search(queries))


def pool_rows(pool):
    return torch.tensor(pool.dataset["embedding"][:])


def test_the_best_text_is_the_reply_however_many_images_are_nearer(uri):
    near = torch.nn.functional.normalize(unit(1) + 0.01 * unit(12, 5), dim=-1)
    pool = CandidatePool.empty(MADE_BY).append("image", [picture(i) for i in range(12)], near)
    pool = pool.append("text", ["far", "farther"], torch.cat([unit(1, 7), -unit(1)]))
    milvus = pool.to_milvus(uri, show_progress_bar=False)
    same(milvus.search(unit(1), top_k=3), pool.search(unit(1), top_k=3))
    assert milvus.search(unit(1), top_k=3)[0].text == "far"


def test_statistics_are_estimated_from_a_spread_sample(pool, uri, monkeypatch):
    milvus = pool.to_milvus(uri, show_progress_bar=False)
    monkeypatch.setattr("modeling_unimur.pool_milvus.SAMPLE", 15)
    mean, _ = milvus.statistics("image")
    assert torch.allclose(torch.from_numpy(mean).float(), unit(30, 1)[::2].mean(0), atol=1e-5)


def test_an_interrupted_copy_goes_on_and_nothing_is_replaced(pool, uri, monkeypatch):
    monkeypatch.setattr("modeling_unimur.pool_milvus.BATCH", 16)
    milvus = MilvusPool.create(uri, "p", MADE_BY)
    insert, calls = milvus.client.insert, []

    def failing(*a):
        calls.append(a)
        if len(calls) == 3:
            raise ConnectionError("lost")
        return insert(*a)

    monkeypatch.setattr(milvus.client, "insert", failing)
    with pytest.raises(
        ConnectionError, match=r"lost after 32 of 70 candidates were inserted \(lost\).*skip_existing=True .* from"
    ):
        milvus.add(pool, show_progress_bar=False)
    assert len(milvus) == 32
    with pytest.raises(ValueError, match=r"duplicate id 'image-0'.*skip_existing"):
        milvus.add(pool, show_progress_bar=False)
    milvus.add(pool, skip_existing=True, show_progress_bar=False)
    same(milvus.search(unit(5)), pool.search(unit(5)))


def test_large_images_lie_beside_the_database(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_unimur.pool_milvus.IMAGE_BYTES", 100)
    buffer = io.BytesIO()
    picture(1, (64, 64)).save(buffer, "BMP")
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    images = [buffer.getvalue(), tmp_path / "b.png"]
    milvus = MilvusPool.create(uri, "p", MADE_BY)
    with pytest.raises(ValueError, match=r"'image-0' has \d+ bytes.*image_folder"):
        milvus.append("image", images, unit(2))
    assert len(milvus) == 0
    milvus.image_folder = tmp_path / "large"
    milvus.append("image", images, unit(2), ["large", "by path"])
    assert len(list((tmp_path / "large").iterdir())) == 1
    items = {c.id: c.item for c in milvus.search(unit(1))[0].candidates}
    assert all(items[i].tobytes() == picture(1, (64, 64)).tobytes() for i in ("large", "by path"))


def test_an_interrupted_append_goes_on_with_the_same_ids(uri, monkeypatch):
    monkeypatch.setattr("modeling_unimur.pool_milvus.BATCH", 4)
    milvus = MilvusPool.create(uri, "p", MADE_BY)
    insert, names, texts = milvus.client.insert, [f"n{i}" for i in range(10)], [f"text {i}" for i in range(10)]

    def failing(collection, rows):
        if rows[0]["id"] == "n4":
            raise pymilvus.MilvusException(message="connection reset\nand much more")
        return insert(collection, rows)

    with monkeypatch.context() as patch:
        patch.setattr(milvus.client, "insert", failing)
        with pytest.raises(
            ConnectionError, match=r"4 of 10 .*\(connection reset\): .*skip_existing=True .* from 'n4'$"
        ):
            milvus.append("text", texts, unit(10), names)
    milvus.append("text", texts, unit(10), names, skip_existing=True)
    assert milvus.ids == names and milvus[7].item == "text 7"
    assert milvus.search(unit(10)[7])[0].candidates[0].id == "n7"


def test_no_server_and_one_too_old_are_named(uri, monkeypatch):
    with pytest.raises(
        ConnectionError, match=r"no Milvus answers at http://127\.0\.0\.1:1 \(.*\): give a server's address"
    ):
        MilvusPool("http://127.0.0.1:1", timeout=2)
    monkeypatch.setattr(pymilvus.MilvusClient, "get_server_version", lambda *a, **k: "v2.2.16")
    with pytest.raises(ValueError, match=r"is v2\.2\.16: a pool needs 2\.3 or later"):
        MilvusPool.create(uri, "p", MADE_BY)
    for version in ("2.3.5-lite", "v2.6.1", "2.10"):
        monkeypatch.setattr(pymilvus.MilvusClient, "get_server_version", lambda *a, version=version, **k: version)
        MilvusPool.create(uri, f"p{version[1:3].strip('.')}{len(version)}", MADE_BY).close()


def test_a_server_that_is_lost_is_named(pool, uri, monkeypatch):
    milvus = pool.to_milvus(uri, show_progress_bar=False)

    def lost(*a, **k):
        raise pymilvus.MilvusException(message="server unavailable")

    for name in ("search", "query"):
        with monkeypatch.context() as patch:
            patch.setattr(milvus.client, name, lost)
            with pytest.raises(ConnectionError, match="does not answer as it should: server unavailable"):
                milvus.search(unit(1))
    with pytest.raises(ValueError, match="top_k=20000 is more than the 16384"):
        milvus.search(unit(1), top_k=20_000)


def test_no_field_is_null(pool, uri):
    """A server before 2.5 knows no null."""
    milvus = pool.to_milvus(uri, show_progress_bar=False)
    fields = milvus.client.describe_collection(milvus.collection)["fields"]
    assert not any(field.get("nullable") for field in fields)
    rows = milvus.client.query(milvus.collection, filter="row >= 0", output_fields=[f["name"] for f in fields])
    assert len(rows) == 70 and all(value is not None for row in rows for value in row.values())


def test_a_collection_of_the_former_layout_is_read_and_extended(pool, uri):
    client = pymilvus.MilvusClient(uri)
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=json.dumps(MADE_BY))
    schema.add_field("id", pymilvus.DataType.VARCHAR, is_primary=True, max_length=512)
    schema.add_field("modality", pymilvus.DataType.VARCHAR, max_length=8)
    schema.add_field("row", pymilvus.DataType.INT64)
    for name in ("text", "image_path", "image_base64"):
        schema.add_field(name, pymilvus.DataType.VARCHAR, max_length=65_535, nullable=True)
    schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=Q)
    indexes = client.prepare_index_params()
    indexes.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(
        "p", schema=schema, index_params=indexes, properties={"unimur.made_by": json.dumps(MADE_BY)}
    )
    encoded = base64.b64encode(pool.dataset[0]["image"]["bytes"]).decode()
    nothing = {"text": None, "image_path": None, "image_base64": None}
    rows = [
        {"id": "a", "modality": "text", "text": "hello"},
        {"id": "b", "modality": "image", "image_base64": encoded},
    ]
    vectors = unit(2).tolist()
    client.insert("p", [nothing | row | {"row": i, "embedding": vectors[i]} for i, row in enumerate(rows)])
    client.close()
    milvus = MilvusPool(uri, "p").append("text", ["bye"], unit(1, 3)).append("image", [picture(2)], unit(1, 4))
    assert milvus.ids == ["a", "b", "text-2", "image-3"] and [milvus[i].item for i in (0, 2)] == ["hello", "bye"]
    assert [milvus[i].item.tobytes() for i in (1, 3)] == [picture(0).tobytes(), picture(2).tobytes()]


def test_paths_of_a_database_stay_inside_the_image_folder(uri, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(1).save(tmp_path / "secret.png")
    picture(2).save(folder / "own.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    milvus = MilvusPool.create(uri, "p", MADE_BY, image_folder=folder)
    milvus.append("image", [folder / "own.png", tmp_path / "secret.png", folder / "link.png"], unit(3))
    rows = milvus.client.query("p", filter="row >= 0", output_fields=["id", "image_path", "source"])
    # What is in the folder is named, all else copied; no folder of this machine is in the database.
    assert sorted((r["id"], r["image_path"], r["source"]) for r in rows) == [
        ("link.png", "", "link.png"), ("own.png", "own.png", "own.png"), ("secret.png", "", "secret.png"),
    ]  # fmt: skip
    foreign = [str(tmp_path / "secret.png"), "../secret.png", "link.png", "/etc/hostname"]
    blank = {"modality": "image", "text": "", "image_base64": "", "source": ""}
    vectors = (-unit(4, 9)).tolist()
    for i, path in enumerate(foreign):
        row = {"id": f"f{i}", "row": 3 + i, "image_path": path, "embedding": vectors[i]}
        milvus.client.insert("p", [blank | row])
    for i in range(4):
        with pytest.raises(ValueError, match="is outside"):
            milvus[f"f{i}"]
    milvus.image_folder = None
    with pytest.raises(ValueError, match=r"'own\.png' is not in the database, which names 'own\.png'.*image_folder="):
        milvus["own.png"]


def test_the_model_builds_extends_and_retrieves(tiny, fresh, uri, monkeypatch):
    model = tiny()
    milvus = MilvusPool.create(uri, "p", model.fingerprint)
    images, texts = [picture(1), picture(2)], ["a dog on the beach", "a panda eats"]
    assert model.extend_pool(milvus, images, texts, show_progress_bar=False) is milvus
    pool = model.build_pool(images, texts, show_progress_bar=False)
    same([model.retrieve(["look", picture(1)], milvus)], [model.retrieve(["look", picture(1)], pool)])
    with monkeypatch.context() as patched:
        patched.setattr(model, "prepare", lambda *_: pytest.fail("embedded"))
        with pytest.raises(ValueError, match="duplicate id 'image-0'"):
            model.extend_pool(milvus, texts=["b"], text_ids=["image-0"])
    other = fresh("opt", seed=1)
    with pytest.raises(ValueError, match=r"these differ: towers"):
        other.retrieve("a", milvus)
    with pytest.raises(ValueError, match=r"these differ: towers"):
        MilvusPool.create(uri, "q", other.fingerprint).add(pool)


def test_bad_requests_are_named(pool, uri, monkeypatch):
    milvus = MilvusPool.create(uri, "p", MADE_BY)
    with pytest.raises(ValueError, match="the pool is empty"):
        milvus.search(unit(1))
    with pytest.raises(ValueError, match="'p' already"):
        MilvusPool.create(uri, "p", MADE_BY)
    with pytest.raises(ValueError, match=r"no collection 'q'.*create"):
        MilvusPool(uri, "q")
    with pytest.raises(ValueError, match="duplicate id 'a'"):
        milvus.append("text", ["a", "b"], unit(2), ["a", "a"])
    with pytest.raises(ValueError, match="more than 512 bytes"):
        milvus.append("text", ["a"], unit(1), ["é" * 300])
    with pytest.raises(ValueError, match="'long' has more than 65535 bytes"):
        milvus.append("text", ["é" * 40_000], unit(1), ["long"])
    with pytest.raises(ValueError, match="do not match"):
        milvus.append("text", ["a"], unit(2))
    milvus.append("text", ["a"], unit(1), ["a"])
    with pytest.raises(ValueError, match="no candidate remains"):
        milvus.search(unit(1), exclude=["a"])
    with pytest.raises(ValueError, match="modality='video'"):
        milvus.search(unit(1), modality="video")
    with pytest.raises(ValueError, match="exclude='a' is one string"):
        milvus.search(unit(1), exclude="a")
    real = builtins.__import__

    def without(name, *a, **k):
        if name == "pymilvus":
            raise ImportError(name)
        return real(name, *a, **k)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pymilvus"):
        MilvusPool(uri)
