"""A pool on the Hub: its folder as a dataset repository, with a card."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import create_branch, create_repo, snapshot_download, upload_folder

MODEL = "org/the-model-that-made-this-pool"  # in a card: a pool knows its model by fingerprint, not by name


def upload_pool(
    pool, repo_id: str, *, max_shard_size: int | str = "500MB", private: bool | None = None, token: str | None = None,
    revision: str | None = None, commit_message: str = "Upload a UniMuR candidate pool",
) -> str:  # fmt: skip
    """
    Saves a [`CandidatePool`] aside and uploads it as the dataset repository `repo_id`, images included.

    Args:
        max_shard_size: of an Arrow file, about.
        private, token, commit_message: as `huggingface_hub`'s.
        revision: a branch, made where there is none; by default `main`.

    Returns:
        The commit's URL.
    """
    repo_id = create_repo(repo_id, repo_type="dataset", private=private, token=token, exist_ok=True).repo_id
    if revision is not None:
        create_branch(repo_id, repo_type="dataset", branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pool.save_to_disk(folder, max_shard_size=max_shard_size)
        (Path(folder) / "README.md").write_text(pool_card(pool, repo_id))
        # What a former pool had, such as more files or an index, does not stay beside the new one's.
        former = ["data-*.arrow", "index*", "statistics.safetensors"]
        done = upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type="dataset", token=token, revision=revision,
            commit_message=commit_message, delete_patterns=former,
        )  # fmt: skip
    return str(done.commit_url)


def download_pool(repo_id: str, *, revision: str | None = None, **arguments: Any) -> str:
    """The folder of a pool on the Hub; `arguments` (token, cache_dir, local_files_only, ...) go to snapshot_download."""
    return snapshot_download(repo_id, repo_type="dataset", revision=revision, **arguments)


def pool_card(pool, repo_id: str) -> str:
    """The dataset card: what the pool holds, what made it, how it is opened."""
    counts = pool.embeddings.counts
    size = next(name for name, limit in SIZES.items() if len(pool) < limit)
    index = "none; it is searched exactly"
    if pool.index is not None:
        recalls = ", ".join(f"{value:.3f} for {m}s" for m, value in pool.index.about["recall_at_10"].items())
        index = f"{pool.index.about['kind']}, recall@10 {recalls} ({pool.index.about['recall_queries']})"
    made_by = "\n".join(f"| {name} | `{value}` |" for name, value in pool.made_by.items())
    return f"""---
library_name: datasets
task_categories:
- image-to-text
- text-retrieval
tags:
- unimur
- multimodal-retrieval
size_categories:
- {size}
---
# A UniMuR candidate pool

{counts["image"]:,} images and {counts["text"]:,} texts with their unified embeddings (L2-normalised float32), for
retrieval by a UniMuR model. Only the model that made it can search it: a query of another one is refused.

| made by | |
|---|---|
{made_by}

Approximate index: {index}.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{MODEL}", trust_remote_code=True)  # put its name here
pool = model.pool_from_hub("{repo_id}")
print(model.retrieve("hello!", pool).text)
```

The licences and the origin of the images and texts are their own: whoever uploads a pool says here what they are.
"""


SIZES = {
    "n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7, "10M<n<100M": 1e8,
    "100M<n<1B": 1e9, "1B<n<10B": 1e10, "10B<n<100B": 1e11, "100B<n<1T": 1e12, "n>1T": float("inf"),
}  # fmt: skip
