"""`pipeline("multimodal-retrieval", model="org/unimur-…", trust_remote_code=True)`."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, cast

from transformers import Pipeline, PreTrainedModel, ProcessorMixin

from .inputs_unimur import as_dialogues, batches, check_count, check_pool
from .pool_ids import id_strings
from .pool_unimur import CandidatePool, Retrieval

SEARCH = ("top_k", "modality", "exclude", "calibrate", "image_bias")
DRAWING = ("seed", "steps", "guidance", "size")  # of a picture


class MultimodalRetrievalPipeline(Pipeline):
    """
    Replies to dialogues out of a pool of images and texts (Section 3.4).

    Args, of the pipeline or of a call:
        pool: a [`CandidatePool`], the folder of a saved one, or `{"images": […], "texts": […]}` to embed now; by default
            the pool packed beside the model.
        top_k, modality, exclude, calibrate, image_bias: as `retrieve` takes them.
        generate: `"always"` or `"auto"` to draw pictures, as `retrieve` does; `"never"` by default.
        seed, steps, guidance, size: what a picture is drawn with.

    A call takes one dialogue or many, as `retrieve` does, and returns a dict or a list of them: `text` (`str` or `None`),
    `image` (`PIL.Image` or `None`), `image_source` (`"retrieved"`, `"drawn"` or `None`), `candidates` (dicts of `id`,
    `modality`, `score`, `rank` and `text` or `image`).

    Raises:
        ValueError: a bad dialogue, a pool of another model, or no pool; a candidate's picture is missing or broken; a picture
            is to be drawn by a model that cannot draw.
        ImportError, OSError: the diffusion model cannot be loaded.
    """

    # The base class leaves these `None`, which mypy takes for their type.
    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None, **kwargs: Any):
        if processor is not None:
            cast(Any, model).processor = processor
        super().__init__(model, processor=processor, **kwargs)
        self._unimur = cast(Any, model)  # the base class knows no model's verbs

    def __call__(  # type: ignore[override]  # the base class names its inputs otherwise in each of its own tasks too
        self, dialogues: Any, batch_size: int | None = None, **kwargs: Any
    ) -> dict | list[dict]:
        """
        Args:
            dialogues: one dialogue, or many, as `retrieve` takes them: a list of dialogues that are each a list, or a
                column, a `KeyDataset`, an array or a generator of dialogues.
            batch_size: dialogues embedded at once, 32 by default.
            kwargs: those of the class.
        """
        rows, single = as_dialogues(dialogues)
        given = self._batch_size if batch_size is None else batch_size
        size = 32 if given is None else check_count("batch_size", given)
        _, _, search = self._sanitize_parameters(**kwargs)  # once, since a pool may need embedding
        # A batch is one item of transformers' loop: its own collation knows texts and tensors, not dialogues.
        answers = [reply for start, batch in batches(rows, size) for reply in super(MultimodalRetrievalPipeline, self)
                   .__call__(_Batch(batch, start), batch_size=1, **search)]  # fmt: skip
        return answers[0] if single else answers

    def _sanitize_parameters(self, pool: Any = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        known = ("pool", *SEARCH, "generate", *DRAWING)
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ValueError(f"unknown arguments {', '.join(unknown)}; a search takes {', '.join(known)}")
        if "exclude" in kwargs:
            kwargs["exclude"] = id_strings("exclude", kwargs["exclude"])  # a generator's are needed for every batch
        return {}, {}, kwargs | ({} if pool is None else {"pool": self._pool(pool)})

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        # They go along untouched, since what is drawn is drawn from them.
        return self._unimur.prepare("dialogues", input_.dialogues, input_.first) | {"given": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        return {"embeddings": self._unimur.embed_inputs("dialogues", input_tensors), "given": input_tensors["given"]}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[dict]:
        pool = postprocess_parameters.pop("pool", None)
        pool = self._pool(None) if pool is None else pool
        pool.check_made_by(self._unimur.fingerprint)
        drawing = {name: postprocess_parameters.pop(name) for name in DRAWING if name in postprocess_parameters}
        dialogues, queries = model_outputs["given"].dialogues, model_outputs["embeddings"]
        replies = self._unimur.replies_to(dialogues, queries, pool, drawing=drawing, **postprocess_parameters)
        return [as_dict(reply) for reply in replies]

    def _pool(self, pool: Any) -> CandidatePool:
        if pool is None:
            return self._unimur.packed_pool
        if isinstance(pool, str | PathLike):
            return CandidatePool.load_from_disk(pool)
        if isinstance(pool, dict):
            unknown = sorted(set(pool) - {"images", "texts"})
            if unknown:
                raise ValueError(f"a pool is given as 'images' and 'texts', not {', '.join(unknown)}")
            return self._unimur.build_pool(**pool, show_progress_bar=False)
        check_pool(pool)
        return pool


def as_dict(reply: Retrieval) -> dict[str, Any]:
    """A [`Retrieval`] as plain values and `PIL.Image`s."""
    candidates = [
        {"id": c.id, "modality": c.modality, "score": c.score, "rank": c.rank, c.modality: c.item}
        for c in reply.candidates
    ]
    return {"text": reply.text, "image": reply.image, "image_source": reply.image_source, "candidates": candidates}


class _Batch:
    """
    Dialogues that transformers' loop must take as one item: of a list it would make one item each; `first` is the number
    of the first.
    """

    def __init__(self, dialogues: Sequence[Any], first: int):
        self.dialogues, self.first = dialogues, first
