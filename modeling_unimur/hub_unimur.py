"""What lives beside the weights on the Hub: pipeline, endpoint handler, sentence-transformers module, card, pool."""

import importlib.metadata
import json
import shutil
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download
from transformers.utils import cached_file, logging

from .card_unimur import model_card
from .golden_unimur import GOLDEN, compare_golden, save_golden
from .pool_files import has_index
from .pool_unimur import CandidatePool

logger = logging.get_logger(__name__)

# Files that no import leads to, so that transformers does not copy them.
COMPANIONS = ("pipeline_unimur.py", "sentence_unimur.py", "handler.py")
CUSTOM_PIPELINES = {
    "multimodal-retrieval": {
        "impl": "pipeline_unimur.MultimodalRetrievalPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
SENTENCE_TRANSFORMERS = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_unimur.UniMuREncoder"}],
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}
REQUIREMENTS = "requirements.txt"
POOL = "pool"
FORMER_POOL = f"{POOL}/*"  # what a pool must not be uploaded beside: its index would be taken for the new one's


def refuse_local_towers(config: dict[str, Any]) -> None:
    """Refuses an adapter's config that names folders, which nobody else has, with a `ValueError`."""
    for name in ("text_model_name_or_path", "clip_model_name_or_path"):
        value = config.get(name)
        if value is not None and (Path(value).is_absolute() or Path(value).is_dir()):
            raise ValueError(
                f"{name} of this adapter is a folder of this machine, which nobody else has: name the tower on the Hub, "
                "or save a full checkpoint by save_pretrained(..., with_towers=True) and push that"
            )


class HubMixin:
    """Over a model that has `processor`, `config`, `save_pretrained` and `_source`, the arguments it was loaded by."""

    def save_companions(self, folder: str | Path, *, pool: CandidatePool | None = None, golden: bool = False) -> None:
        """
        Writes what users of a checkpoint call beside its weights and code.

        Args:
            pool: a pool to pack beside the model.
            golden: also write the golden vectors of `self_check`.
        """
        folder = Path(folder)
        for name in COMPANIONS:
            source = self._companion(name)
            if source is None:
                logger.warning(
                    f"{name} is neither with this code nor in the repository it came from: saved without it"
                )
            elif source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        for name, content in SENTENCE_TRANSFORMERS.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        if pool is not None:
            pool.check_made_by(self.fingerprint)
            pool.save_to_disk(folder / POOL)
        self._save_requirements(folder)
        if golden:
            save_golden(self, folder)

    def push_to_hub(
        self, repo_id: str, *, card: ModelCard | None = None, pool: CandidatePool | None = None,
        commit_message: str = "Upload UniMuR", private: bool | None = None, token: bool | str | None = None,
        revision: str | None = None, create_pr: bool = False, max_shard_size: int | str = "50GB",
    ) -> str:  # fmt: skip
        """
        Uploads model, processor, code, card, pipeline, endpoint handler, sentence-transformers module and golden vectors.

        Args:
            repo_id: `org/name`; created where it does not exist.
            card: by default [`model_card`] of what the config knows, unless the repository has a card already.
            pool: a pool to pack beside the model, which endpoints and pipelines then search; replaces one that is there.
            commit_message, private, token, revision, create_pr, max_shard_size: as transformers' models take them.

        Returns:
            URL of the commit.

        Raises:
            ValueError: the pool was made by another model, or the model is an adapter on towers in local folders.
        """
        refuse_local_towers(self.config.to_dict())
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, pool=pool, golden=True)
            if card is None and not api.file_exists(repo_id, "README.md", revision=revision):
                card = model_card(self.config, repo_id, has_pool=pool is not None)
            if card is not None:
                card.save(Path(folder) / "README.md")
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                create_pr=create_pr, delete_patterns=FORMER_POOL if pool is not None else None,
            )  # fmt: skip

    @cached_property
    def packed_pool(self) -> CandidatePool:
        """
        The pool packed beside the checkpoint, in its folder or its Hub repository.

        Raises:
            ValueError: the model was not loaded from a checkpoint, or no pool is packed with it.
        """
        name = self._source.get("pretrained_model_name_or_path")
        if name is None:
            raise ValueError("this model was not loaded from a checkpoint, so no pool is packed with it: give a pool")
        folder = Path(name) / self._source.get("subfolder", "")
        if not Path(name).is_dir():
            hub = {
                k: v for k, v in self._source.items() if k in ("revision", "token", "cache_dir", "local_files_only")
            }
            prefix = f"{self._source['subfolder']}/" if self._source.get("subfolder") else ""
            folder = Path(snapshot_download(name, allow_patterns=f"{prefix}{POOL}/*", **hub)) / prefix
        if not (folder / POOL).is_dir():
            raise ValueError(
                f"no pool is packed with {str(name)!r}: give a pool, or pack one by save_pretrained(..., pool=pool)"
            )
        return CandidatePool.load_from_disk(folder / POOL)

    def open_pool(self, path: str | Path) -> CandidatePool:
        """A saved pool. Raises `FileNotFoundError` where there is none, `ValueError` where another model made it."""
        pool = CandidatePool.load_from_disk(path)
        pool.check_made_by(self.fingerprint)
        return pool

    def pool_from_hub(self, repo_id: str, **arguments: Any) -> CandidatePool:
        """
        A pool that `CandidatePool.push_to_hub` uploaded; `arguments` (revision, token, cache_dir, ...) as its `from_hub`.

        Raises:
            ValueError: another model made it; the message says what differs.
        """
        pool = CandidatePool.from_hub(repo_id, **arguments)
        pool.check_made_by(self.fingerprint)
        return pool

    def self_check(self) -> dict[str, float]:
        """
        Compares embeddings of fixed inputs with those saved beside the checkpoint.

        Returns:
            The largest difference of a coordinate, for a dialogue, an image and a text.

        Raises:
            ValueError: the checkpoint holds no golden vectors, or one differs; the message says which and by how much.
        """
        path = self._beside_weights(GOLDEN)
        if path is None:
            raise ValueError(f"the checkpoint holds no {GOLDEN}: save it with save_pretrained(..., golden=True)")
        return compare_golden(self, path)

    def _save_requirements(self, folder: Path) -> None:
        """What an endpoint's container installs: the package's own requirements, and those of the pool and the LoRA."""
        extras = {"faiss-cpu": has_index(folder / POOL), "peft": self.config.text_adapter}
        try:
            stated = importlib.metadata.requires("modeling-unimur")
        except importlib.metadata.PackageNotFoundError:
            source = self._companion(REQUIREMENTS)
            if source is None:
                logger.warning(f"saved without {REQUIREMENTS}: the package's are unknown until it is installed by pip")
                return
            stated = source.read_text().splitlines()
        lines = [line for line in stated if "extra ==" not in line]
        for name, needed in extras.items():
            if needed and not any(line.startswith(name) for line in lines):
                lines.append(next((line.partition(";")[0].strip() for line in stated if line.startswith(name)), name))
        (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n")

    def _companion(self, name: str) -> Path | None:
        """A companion file, from beside this code or, where this code came from the Hub, from the repository."""
        here = Path(__file__).with_name(name)
        return here if here.is_file() else self._beside_weights(name)

    def _beside_weights(self, name: str) -> Path | None:
        if not self._source:
            return None
        source = dict(self._source)
        try:
            return Path(cached_file(source.pop("pretrained_model_name_or_path"), name, **source))
        except OSError:
            return None
