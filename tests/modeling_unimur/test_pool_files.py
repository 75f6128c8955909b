"""A pool goes to the Hub as a dataset repository and comes back the same; the two transfers are stood in for."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import DatasetCard

import modeling_unimur.pool_files as sharing
from modeling_unimur import CandidatePool
from tests.conftest import picture

MADE_BY = {"towers": "t0", "maps": "m0", "text_candidates": "ret", "dimension": 4}


def unit(n):
    return torch.nn.functional.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), dim=-1)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder in the place of the Hub; what was calls of it."""
    calls = {}

    def create(repo_id, **arguments):
        calls["create"] = arguments
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload(*, repo_id, folder_path, **arguments):
        calls["upload"] = arguments
        repo = tmp_path / repo_id
        for pattern in arguments["delete_patterns"]:
            for file in repo.glob(pattern):
                file.unlink()
        shutil.copytree(folder_path, repo, dirs_exist_ok=True)
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def download(repo_id, **arguments):
        calls["download"] = arguments
        return str(tmp_path / repo_id)

    monkeypatch.setattr(sharing, "create_repo", create)
    monkeypatch.setattr(
        sharing, "create_branch", lambda repo_id, **arguments: calls.update(branch=arguments["branch"])
    )
    monkeypatch.setattr(sharing, "upload_folder", upload)
    monkeypatch.setattr(sharing, "snapshot_download", download)
    return SimpleNamespace(calls=calls, folder=tmp_path)


def test_a_pool_is_pushed_in_shards_and_opened_again(hub):
    pool = CandidatePool.empty(MADE_BY).append("image", [picture(i) for i in range(4)], unit(4))
    pool = pool.append("text", ["a", "b"], unit(2))
    url = pool.push_to_hub("mine", max_shard_size=1, private=True, revision="v1")
    assert url == "https://hub/commit/1"
    assert hub.calls["create"] == {"repo_type": "dataset", "private": True, "token": None, "exist_ok": True}
    assert hub.calls["branch"] == "v1"
    assert hub.calls["upload"]["repo_type"] == "dataset" and hub.calls["upload"]["revision"] == "v1"
    again = CandidatePool.from_hub("someone/mine", revision="v1", local_files_only=True)
    assert hub.calls["download"] == {"repo_type": "dataset", "revision": "v1", "local_files_only": True}
    assert again.made_by == MADE_BY
    one, other = pool.search(unit(1))[0], again.search(unit(1))[0]
    assert [(c.id, c.score) for c in one.candidates] == [(c.id, c.score) for c in other.candidates]


def test_the_card_says_what_made_it_and_how_it_is_opened(hub):
    pytest.importorskip("faiss")
    pool = CandidatePool.empty(MADE_BY).append("text", [str(i) for i in range(1200)], unit(1200)).build_index("sq8")
    pool.push_to_hub("mine")
    card = DatasetCard.load(hub.folder / "someone" / "mine" / "README.md")
    assert card.data.size_categories == ["1K<n<10K"] and card.data.library_name == "datasets"
    assert "0 images and 1,200 texts" in card.text and "| maps | `m0` |" in card.text
    assert re.search(r"sq8, recall@10 \d\.\d{3} for texts \(200 of the pool's own", card.text)
    assert 'model.pool_from_hub("someone/mine")' in card.text and "from modeling_unimur" not in card.text
    assert CandidatePool.from_hub("someone/mine").index.about["kind"] == "sq8"
    CandidatePool.empty(MADE_BY).append("text", ["a"], unit(1)).push_to_hub("mine")  # the old index goes
    assert not list(Path(hub.folder, "someone", "mine").glob("index*"))
    assert len(CandidatePool.from_hub("someone/mine")) == 1
