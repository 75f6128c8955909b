"""Section 3.4: embeddings of dialogues, images and texts, pools of candidates, and replies out of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import BatchFeature

from .conversation_unimur import Conversation
from .dialogues_unimur import is_batch
from .pool_unimur import CandidatePool, Retrieval
from .towers_unimur import non_finite_tensors


class RetrievalMixin:
    """
    What a user calls, over a model that has `processor`, `fingerprint`, `encode_images`, `encode_contexts`,
    `encode_clip_texts`, `input_embeddings`, `last_outputs` and `W_t2m`.
    """

    def embed_dialogues(
        self, dialogues: Sequence[Any], batch_size: int = 32, show_progress_bar: bool = False
    ) -> torch.Tensor:
        """
        Unified embeddings of dialogues: a list of n, each as [`parse_dialogue`] takes it -> `(n, q)` float32 on CPU,
        L2-normalised. Raises `ValueError` naming the bad item.
        """
        return self._embed("dialogues", dialogues, batch_size, show_progress_bar)

    def embed_images(
        self, images: Sequence[Any], batch_size: int = 32, show_progress_bar: bool = False
    ) -> torch.Tensor:
        """Unified embeddings of candidate images (PIL, paths, bytes or datasets' undecoded ones): as `embed_dialogues`."""
        return self._embed("images", images, batch_size, show_progress_bar)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 32, show_progress_bar: bool = False) -> torch.Tensor:
        """Embeddings of candidate texts in the space `config.text_candidates` names: as `embed_dialogues`."""
        return self._embed("texts", texts, batch_size, show_progress_bar)

    def prepare(self, kind: str, items: Sequence[Any]) -> BatchFeature:
        """The tensors that `encode` reads of n `"dialogues"`, `"images"` or `"texts"`, on CPU."""
        if kind == "dialogues":
            return self.processor.contexts(items)
        if kind == "images":
            return BatchFeature({"pixel_values": self.processor.pixels(items)})
        space = self.config.text_candidates
        return self.processor.clip_texts(items) if space == "clip_text" else self.processor.texts(
            items, end_with_ret=space == "ret"
        )  # fmt: skip

    def encode(self, kind: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings `(n, q)` float32, not normalised, of what `prepare` made of n items of this kind."""
        if kind == "images":
            return self.unify_images(*self.encode_images(inputs["pixel_values"]))
        space = self.config.text_candidates
        if kind == "texts" and space == "clip_text":
            embeds = self.encode_clip_texts(inputs["clip_input_ids"], inputs["clip_attention_mask"])
            return self.unify_clip_texts(embeds)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if kind == "dialogues" or space == "ret":
            features = self.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
            return self.encode_contexts(ids, mask, features)
        outputs = self.input_embeddings(ids)
        if space == "last_output":
            outputs = self.last_outputs(outputs, mask)
        return self.W_t2m((outputs.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    @torch.no_grad()
    def embed_inputs(self, kind: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As `embed_dialogues`, `embed_images` or `embed_texts`, of what `prepare` made, on the model's device."""
        return self.finished(self.encode(kind, inputs))

    def finished(self, embeds: torch.Tensor) -> torch.Tensor:
        """
        Embeddings `(..., q)` as `encode` makes them -> float32 on CPU, L2-normalised. Raises `ValueError` naming the
        weights that hold NaN or infinity where the embeddings do.
        """
        if not bool(torch.isfinite(embeds).all()):
            names = non_finite_tensors(self) or ["none: the input overflows the towers' dtype"]
            raise ValueError(f"the embeddings hold NaN or infinity; weights that do: {', '.join(names[:5])}")
        return F.normalize(embeds.float(), dim=-1).cpu()

    def _embed(self, kind: str, items: Sequence[Any], batch_size: int, show_progress_bar: bool) -> torch.Tensor:
        _check_list(kind, items)
        parts = []
        for start in tqdm(range(0, len(items), batch_size), f"embedding {kind}", disable=not show_progress_bar):
            try:
                inputs = self.prepare(kind, items[start : start + batch_size])
                parts.append(self.embed_inputs(kind, inputs.to(self.device)))
            except ValueError as error:
                raise ValueError(f"{error} (counting from {kind[:-1]} {start})" if start else str(error)) from error
        return torch.cat(parts) if parts else torch.empty(0, self.config.embedding_width)

    def conversation(self) -> Conversation:
        """A conversation to which turns are added one by one, each at the cost of its own tokens."""
        return Conversation(self)

    def build_pool(
        self, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None, *,
        image_ids: Sequence[str] | None = None, text_ids: Sequence[str] | None = None,
        batch_size: int = 32, show_progress_bar: bool = True,
    ) -> CandidatePool:  # fmt: skip
        """
        One pool of images and texts (Section 3.4).

        Args:
            images: PIL images, paths, bytes, or a column of a `datasets.Dataset`.
            texts: strings.
            image_ids, text_ids: unique names; numbered by default.

        Raises:
            ValueError: nothing given, a bad item, an id twice, or not one id for each candidate.
        """
        pool = CandidatePool.empty(self.fingerprint)
        return self.extend_pool(pool, images, texts, image_ids=image_ids, text_ids=text_ids,
                                batch_size=batch_size, show_progress_bar=show_progress_bar)  # fmt: skip

    def extend_pool(
        self, pool: CandidatePool, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None, *,
        image_ids: Sequence[str] | None = None, text_ids: Sequence[str] | None = None,
        batch_size: int = 32, show_progress_bar: bool = True,
    ) -> CandidatePool:  # fmt: skip
        """`pool` with more candidates, as a new pool; refuses one that another model made. See `build_pool`."""
        pool.check_made_by(self.fingerprint)
        images, texts = ([] if items is None else items for items in (images, texts))
        _check_list("images", images)
        _check_list("texts", texts)
        if not len(images) and not len(texts):
            raise ValueError("no candidates: give images, texts or both")
        # Before anything is embedded, which may take hours.
        image_ids = pool.new_ids("image", images, image_ids)
        text_ids = pool.new_ids("text", texts, text_ids, len(pool) + len(images))
        pool.check_ids([*image_ids, *text_ids])
        arguments = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        if len(images):
            pool = pool.append("image", images, self.embed_images(images, **arguments), image_ids)
        if len(texts):
            pool = pool.append("text", texts, self.embed_texts(texts, **arguments), text_ids)
        return pool

    def retrieve(
        self, dialogue: Any, pool: CandidatePool, *, top_k: int = 10, modality: str | None = None,
        exclude: Sequence[str] = (), calibrate: bool = False, image_bias: float = 0.0, batch_size: int = 32,
    ) -> Retrieval | list[Retrieval]:  # fmt: skip
        """
        The reply to a dialogue out of a pool (Section 3.4).

        Args:
            dialogue: one dialogue (a string, a list of strings and images, or chat messages), or a list of dialogues
                that are each a list.
            top_k: how many candidates to return.
            modality: `"image"` or `"text"` to search one kind only.
            exclude: ids not to return, such as those already shown.
            calibrate, image_bias: see [`CandidatePool.search`].

        Returns:
            One [`Retrieval`], or a list where a list of dialogues was given.

        Raises:
            ValueError: the pool is empty or another model made it; the message says what differs.
        """
        pool.check_made_by(self.fingerprint)
        many = is_batch(dialogue)
        queries = self.embed_dialogues(dialogue if many else [dialogue], batch_size=batch_size)
        found = pool.search(queries, top_k=top_k, modality=modality, exclude=exclude,
                            calibrate=calibrate, image_bias=image_bias)  # fmt: skip
        return found if many else found[0]


def _check_list(kind: str, items: Any) -> None:
    if isinstance(items, str) or not hasattr(items, "__len__"):
        given = "one string" if isinstance(items, str) else type(items).__name__
        raise ValueError(f"expected a list of {kind}, got {given}")
