"""From a repository id, in a process of its own with a cache of its own, against the Hub on this machine."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_card.check import blocks, hidden
from modeling_unimur import UniMuRModel
from modeling_unimur.pool_files import MODEL
from tests.conftest import picture
from tests.hub import loopback_hub
from tests.tiny import make_model

REPO = "org/unimur-tiny"
PUSH = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pool = model.build_pool(images=["photo-1.jpg", "photo-2.jpg"], texts=["you are welcome."], show_progress_bar=False)
print(model.push_to_hub("org/unimur-tiny", pool=pool))
"""
OPTIONAL = [
    "modeling_unimur",
    "faiss",
    "datasets",
    "peft",
    "sentence_transformers",
    "gradio",
    "pymilvus",
    "mteb",
    "accelerate",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A full tiny checkpoint, and pictures to search."""
    folder = tmp_path_factory.mktemp("hub")
    make_model(folder / "towers").save_pretrained(folder / "full", with_towers=True)
    (folder / "work").mkdir()
    for at in (1, 2):
        picture(at).save(folder / "work" / f"photo-{at}.jpg")
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    """A Hub that holds the pushed checkpoint."""
    with loopback_hub() as hub:
        done = hub.run(PUSH, folder / "full", home=folder / "pusher", cwd=folder / "work")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "/commit/" in done.stdout
        yield hub


def ran(done):
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_push_uploads_everything_in_one_commit(hub):
    files = hub.files(REPO)
    assert hub.requests[("POST", "commit")] == 1
    package = {p.name for p in Path(__file__).parents[2].joinpath("modeling_unimur").glob("*.py")} - {"__init__.py"}
    assert package <= set(files), package - set(files)  # what is in the package travels
    assert {
        "README.md", "config.json", "model.safetensors", "golden.safetensors", "processor_config.json", "tokenizer.json",
        "clip_tokenizer/tokenizer.json", "modules.json", "config_sentence_transformers.json", "pool/pool.json",
        "requirements.txt",
    } <= set(files)  # fmt: skip
    assert REPO in files["README.md"].decode()
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt"))]


def test_everything_loads_from_the_repository_id(hub, folder):
    script = """
        import torch
        from PIL import Image
        from sentence_transformers import SentenceTransformer
        from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
        name = "org/unimur-tiny"
        model = AutoModel.from_pretrained(name, trust_remote_code=True, self_check=True)
        assert type(AutoProcessor.from_pretrained(name, trust_remote_code=True)).__name__ == "UniMuRProcessor"
        assert AutoConfig.from_pretrained(name, trust_remote_code=True).model_type == "unimur"
        retrieve = pipeline("multimodal-retrieval", model=name, trust_remote_code=True)
        reply = retrieve(["look", Image.open("photo-1.jpg")])  # of the pool packed beside the model
        assert reply["text"] == "you are welcome." and len(reply["candidates"]) == 3
        same = model.retrieve(["look", Image.open("photo-1.jpg")], model.packed_pool)
        assert [c["id"] for c in reply["candidates"]] == [c.id for c in same.candidates]
        encoder = SentenceTransformer(name, trust_remote_code=True)
        theirs = torch.from_numpy(encoder.encode(["hello", "a panda"]))
        assert torch.allclose(theirs, model.embed_texts(["hello", "a panda"]), atol=1e-5)
        torch.save(model.embed_dialogues(["hello", ["look", Image.open("photo-2.jpg")]]), "out.pt")
    """
    ran(hub.run(hidden("modeling_unimur") + textwrap.dedent(script), home=folder / "user", cwd=folder / "work"))
    theirs = torch.load(folder / "work" / "out.pt", weights_only=True)
    from PIL import Image

    with Image.open(folder / "work" / "photo-2.jpg") as photo:
        here = UniMuRModel.from_pretrained(folder / "full").embed_dialogues(["hello", ["look", photo]])
    assert torch.allclose(theirs, here, atol=1e-6)


def test_nothing_optional_is_needed_to_load_and_embed(hub, folder):
    script = """
        from transformers import AutoModel, AutoProcessor
        model = AutoModel.from_pretrained("org/unimur-tiny", trust_remote_code=True)
        AutoProcessor.from_pretrained("org/unimur-tiny", trust_remote_code=True)
        assert model.embed_dialogues(["hello"]).shape == (1, 24)
        try:
            model.build_pool(texts=["a"], show_progress_bar=False)
        except ImportError as error:
            assert "pip install datasets" in str(error), error
        else:
            raise AssertionError("a pool without datasets")
    """
    ran(hub.run(hidden(*OPTIONAL) + textwrap.dedent(script), home=folder / "bare", cwd=folder / "work"))


def test_a_pinned_revision_then_offline(hub, folder):
    first = hub.repositories[("models", REPO)].branches["main"]
    files = folder / "second"
    files.mkdir()
    tensors = load_file(folder / "full" / "model.safetensors")
    tensors["W_t2m.weight"] = -tensors["W_t2m.weight"]
    save_file(tensors, files / "model.safetensors", metadata={"format": "pt"})
    second = hub.upload(REPO, files)
    try:
        script = """
            import sys
            from transformers import AutoModel
            for revision in sys.argv[1:]:
                model = AutoModel.from_pretrained("org/unimur-tiny", revision=revision, trust_remote_code=True)
                print(model.W_t2m.weight[0, 0].item())
        """
        weight = load_file(folder / "full" / "model.safetensors")["W_t2m.weight"][0, 0].item()
        home, script = folder / "pinned", textwrap.dedent(script)
        online = hub.run(script, first, "main", home=home, cwd=folder / "work")
        assert ran(online).split() == [f"{weight}", f"{-weight}"]
        hub.down = True
        offline = hub.run(script, first, home=home, cwd=folder / "work", HF_HUB_OFFLINE="1")
        assert ran(offline).split() == [f"{weight}"]
    finally:
        hub.down = False
        hub.repositories[("models", REPO)].branches["main"] = first
    assert first != second


def test_an_upload_whose_connection_broke_goes_on_where_it_stopped(folder):
    with loopback_hub() as hub:
        size = (folder / "full" / "model.safetensors").stat().st_size
        hub.break_larger_than = size - 1
        impatient = "import time\ntime.sleep = lambda seconds: None\n"  # the client tries again, ever more slowly
        broken = hub.run(impatient + PUSH, folder / "full", home=folder / "breaks", cwd=folder / "work")
        assert broken.returncode != 0 and hub.files(REPO) == {}
        there = len(hub.blobs)
        assert there >= 1  # the smaller files came through
        hub.break_larger_than = None
        before = hub.requests[("PUT", "blob")]
        ran(hub.run(PUSH, folder / "full", home=folder / "breaks", cwd=folder / "work"))
        assert hub.requests[("PUT", "blob")] - before == 1  # only what was missing is sent again
        assert "model.safetensors" in hub.files(REPO)


def test_an_adapter_finds_its_towers_in_two_repositories_at_their_revisions(folder, tmp_path):
    local = make_model(tmp_path / "towers", "opt", seed=1)
    text, clip = tmp_path / "towers" / "text", tmp_path / "towers" / "clip"
    weights = load_file(text / "model.safetensors")
    (text / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, held in shards.items():  # as facebook/opt-6.7b has them
        torch.save({name: weights[name] for name in held}, text / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (text / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with loopback_hub() as hub:
        pinned = {
            "text_model_revision": hub.upload("base/opt", text),
            "clip_model_revision": hub.upload("base/clip", clip),
        }
        torch.save({n: weights[n] * 2 for n in names[::2]}, text / "pytorch_model-00001-of-00002.bin")
        hub.upload("base/opt", text)  # the base moves on; the adapter does not
        for name, value in {
            "text_model_name_or_path": "base/opt",
            "clip_model_name_or_path": "base/clip",
            **pinned,
        }.items():
            setattr(local.config, name, value)
        local.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "model.safetensors").stat().st_size < 100_000
        adapter = hub.upload("org/adapter", tmp_path / "adapter")
        script = """
            import sys, torch
            from transformers import AutoModel
            model = AutoModel.from_pretrained("org/adapter", revision=sys.argv[1], trust_remote_code=True)
            assert model.config.is_adapter
            torch.save(model.embed_dialogues(["hello", "a panda"]), sys.argv[2])
        """
        ran(
            hub.run(
                textwrap.dedent(script), adapter, tmp_path / "out.pt", home=tmp_path / "home", cwd=tmp_path / "work"
            )
        )
        theirs = torch.load(tmp_path / "out.pt", weights_only=True)
        assert torch.allclose(theirs, local.embed_dialogues(["hello", "a panda"]), atol=1e-6)
        del hub.repositories[("models", "base/clip")]
        gone = hub.run(
            textwrap.dedent(script), adapter, tmp_path / "x", home=tmp_path / "other", cwd=tmp_path / "work"
        )
        assert gone.returncode != 0 and "needs its base clip_model 'base/clip'" in gone.stderr


def test_the_command_checks_then_uploads_the_model_and_its_space(folder, tmp_path):
    """In the checkout's own package, as a maintainer runs it; what is checked before is tested in test_push.py."""
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import hub_card.push as push
        push.check_folder = lambda made, repo_id: print("checked", repo_id)
        from modeling_unimur import UniMuRModel
        model = UniMuRModel.from_pretrained(sys.argv[1])
        model.build_pool(texts=["hi"], show_progress_bar=False).save_to_disk("pool")
        push.main([sys.argv[1], "org/unimur-x", "--license", "apache-2.0", "--pool", "pool", "--space", "org/page"])
    """
    with loopback_hub() as hub:
        done = hub.run(textwrap.dedent(script), folder / "full", home=tmp_path / "home", cwd=tmp_path / "work")
        assert "checked org/unimur-x" in ran(done)
        assert {"README.md", "handler.py", "pool/pool.json"} <= set(hub.files("org/unimur-x"))
        page = hub.files("org/page", kind="spaces")
        assert {"app.py", "requirements.txt", "README.md"} <= set(page)
        assert b"sdk: gradio" in page["README.md"] and not [name for name in page if "__pycache__" in name]


def test_a_pool_replaces_the_packed_one_and_its_index(folder, tmp_path):
    pytest.importorskip("faiss")
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import hub_card.push as push
        push.check_folder = lambda made, repo_id: None
        from modeling_unimur import UniMuRModel
        full = sys.argv[1]
        model = UniMuRModel.from_pretrained(full)
        for at, texts in enumerate((["a", "b", "c"], ["d", "e"])):
            pool = model.build_pool(texts=texts, show_progress_bar=False)
            pool = pool if at else pool.build_index()
            model.push_to_hub("org/by-model", pool=pool)
            pool.save_to_disk(f"pool-{{at}}")
            push.main([full, "org/by-command", "--pool", f"pool-{{at}}"])
        for repo in ("org/by-model", "org/by-command"):
            print(UniMuRModel.from_pretrained(repo).packed_pool)
    """
    with loopback_hub() as hub:
        done = hub.run(textwrap.dedent(script), folder / "full", home=tmp_path / "home", cwd=tmp_path / "work")
        assert ran(done).count("CandidatePool(0 images, 2 texts, dimension 24)") == 2
        for repo in ("org/by-model", "org/by-command"):
            assert not [name for name in hub.files(repo) if name.startswith("pool/index")]


def test_a_pool_goes_to_the_hub_and_comes_back_to_the_model_that_made_it(hub, folder, tmp_path):
    push = """
        from transformers import AutoModel
        model = AutoModel.from_pretrained("org/unimur-tiny", trust_remote_code=True)
        model.packed_pool.push_to_hub("org/replies")
        model.W_t2m.weight.data += 1
        model.pool_from_hub("org/replies")
    """
    fetch = """
        from transformers import AutoModel
        model = AutoModel.from_pretrained("org/unimur-tiny", trust_remote_code=True)
        pool = type(model.packed_pool).from_hub("org/replies")
        reply = model.retrieve("hello", pool)
        same = model.retrieve("hello", model.packed_pool)
        print(len(pool), [c.id for c in reply.candidates] == [c.id for c in same.candidates])
    """
    refused = hub.run(textwrap.dedent(push), home=tmp_path / "a", cwd=folder / "work")
    assert refused.returncode and "made by another model; these differ: maps" in refused.stderr
    files = hub.files("org/replies", kind="datasets")
    assert {"pool.json", "README.md"} <= set(files)
    assert any(name.startswith("data-00000-of-00001-") for name in files)
    assert ran(hub.run(textwrap.dedent(fetch), home=tmp_path / "b", cwd=folder / "work")).split() == ["3", "True"]
    # The card's own snippet, once the model's name is put in, and without this package.
    (snippet,) = blocks(files["README.md"].decode(), "python")
    assert MODEL in snippet
    script = hidden("modeling_unimur") + snippet.replace(MODEL, REPO)
    assert ran(hub.run(script, home=tmp_path / "c", cwd=folder / "work")) == "you are welcome.\n"
