"""`pipeline("multimodal-retrieval", model="org/unimur-…", trust_remote_code=True)`."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from transformers import Pipeline, PreTrainedModel, ProcessorMixin

from .dialogues_unimur import is_batch
from .pool_unimur import CandidatePool, Retrieval

SEARCH = ("top_k", "modality", "exclude", "calibrate", "image_bias")


class MultimodalRetrievalPipeline(Pipeline):
    """
    Replies to dialogues out of a pool of images and texts (Section 3.4).

    Args, of the pipeline or of a call:
        pool: a [`CandidatePool`], the folder of a saved one, or `{"images": […], "texts": […]}` to embed now; by default
            the pool packed beside the model.
        top_k, modality, exclude, calibrate, image_bias: as `retrieve` takes them.

    A call takes one dialogue, or a list of dialogues that are each a list, and returns a dict or a list of them: `text`
    (`str` or `None`), `image` (`PIL.Image` or `None`), `candidates` (dicts of `id`, `modality`, `score`, `rank` and
    `text` or `image`).

    Raises:
        ValueError: a bad dialogue, a pool of another model, or no pool.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None, **kwargs: Any):
        if processor is not None:
            model.processor = processor
        super().__init__(model, processor=processor, **kwargs)

    def __call__(self, dialogues: Any, batch_size: int | None = None, **kwargs: Any) -> dict | list[dict]:
        """
        Args:
            dialogues: one dialogue, or a list of dialogues that are each a list.
            batch_size: dialogues embedded at once, 32 by default.
            kwargs: those of the class.
        """
        many = is_batch(dialogues)
        rows = list(dialogues) if many else [dialogues]
        size = batch_size or self._batch_size or 32
        # A batch is one item of transformers' loop: its own collation knows texts and tensors, not dialogues.
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        found = [reply for batch in batches for reply in super(MultimodalRetrievalPipeline, self).__call__(
            _Batch(batch), batch_size=1, **kwargs)]  # fmt: skip
        return found if many else found[0]

    def _sanitize_parameters(self, pool: Any = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        unknown = sorted(set(kwargs) - set(SEARCH))
        if unknown:
            raise ValueError(f"unknown arguments {', '.join(unknown)}; a search takes {', '.join(('pool', *SEARCH))}")
        found = {} if pool is None else {"pool": self._pool(pool)}
        return {}, {}, kwargs | found

    def preprocess(self, batch: "_Batch") -> dict[str, Any]:
        return self.model.prepare("dialogues", batch.dialogues)

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        return {"embeddings": self.model.embed_inputs("dialogues", model_inputs)}

    def postprocess(
        self, model_outputs: dict[str, Any], pool: CandidatePool | None = None, **search: Any
    ) -> list[dict]:
        pool = self._pool(None) if pool is None else pool
        pool.check_made_by(self.model.fingerprint)
        return [as_dict(reply) for reply in pool.search(model_outputs["embeddings"], **search)]

    def _pool(self, pool: Any) -> CandidatePool:
        if pool is None:
            return self.model.packed_pool
        if isinstance(pool, str | PathLike):
            return CandidatePool.load_from_disk(pool)
        if isinstance(pool, dict):
            unknown = sorted(set(pool) - {"images", "texts"})
            if unknown:
                raise ValueError(f"a pool is given as 'images' and 'texts', not {', '.join(unknown)}")
            return self.model.build_pool(**pool, show_progress_bar=False)
        return pool


def as_dict(reply: Retrieval) -> dict[str, Any]:
    """A [`Retrieval`] as plain values and `PIL.Image`s."""
    candidates = [
        {"id": c.id, "modality": c.modality, "score": c.score, "rank": c.rank, c.modality: c.item}
        for c in reply.candidates
    ]
    return {"text": reply.text, "image": reply.image, "candidates": candidates}


class _Batch:
    """Dialogues that transformers' loop must take as one item: of a list it would make one item each."""

    def __init__(self, dialogues: Sequence[Any]):
        self.dialogues = dialogues
