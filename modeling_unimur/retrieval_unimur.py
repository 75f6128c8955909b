"""Section 3.4: embeddings of dialogues, images and texts, pools of candidates, and replies out of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import BatchFeature

from .conversation_unimur import Conversation
from .generation_unimur import check_when, with_drawn
from .identity_unimur import non_finite_tensors
from .images_unimur import located
from .inputs_unimur import KINDS, as_dialogues, as_items, batches, check_count, check_pool, kind_of, warn_of_turns
from .pool_ids import id_strings
from .pool_unimur import CandidatePool, Retrieval

if TYPE_CHECKING:
    from .configuration_unimur import UniMuRConfig
    from .processing_unimur import UniMuRProcessor

PATIENCE = 2.0  # seconds that work takes in silence


class RetrievalMixin:
    """
    What a user calls. Every verb takes what [`as_items`] lists and these arguments:

    - `batch_size`: items embedded at once; it changes no embedding beyond rounding.
    - `show_progress_bar`: `True` or `False`; by default a bar is shown where the work takes longer than `PATIENCE` seconds.
    - `convert_to_numpy`: `True` for a numpy array, `False` for a torch tensor on CPU. By default the `embed_*` give
      tensors, and the `encode*` arrays, as sentence-transformers' do.

    One item is answered with one vector `(q,)`, a list of n with `(n, q)`: float32, L2-normalised. A list of strings is
    n dialogues to `embed_dialogues`, and one dialogue of n turns to `retrieve`; a list of lists is n dialogues to both.
    """

    if TYPE_CHECKING:  # what the model brings
        config: UniMuRConfig
        processor: UniMuRProcessor
        W_t2m: torch.nn.Linear

        @property
        def fingerprint(self) -> dict[str, Any]: ...
        @property
        def device(self) -> torch.device: ...
        def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
        def unify_images(self, features: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor: ...
        def encode_clip_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor: ...
        def unify_clip_texts(self, embeds: torch.Tensor) -> torch.Tensor: ...
        def encode_contexts(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None
        ) -> torch.Tensor: ...
        def input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor: ...
        def last_outputs(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor: ...

    # Embeddings

    @overload
    def embed_dialogues(
        self, dialogues: Any, batch_size: int = ..., show_progress_bar: bool | None = ..., *,
        convert_to_numpy: Literal[False] = ...,
    ) -> torch.Tensor: ...  # fmt: skip
    @overload
    def embed_dialogues(
        self, dialogues: Any, batch_size: int = ..., show_progress_bar: bool | None = ..., *,
        convert_to_numpy: Literal[True],
    ) -> np.ndarray: ...  # fmt: skip

    def embed_dialogues(
        self, dialogues: Any, batch_size: int = 32, show_progress_bar: bool | None = None, *,
        convert_to_numpy: bool = False,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        """
        Unified embeddings of dialogues, each as [`parse_dialogue`] takes it.

        Args:
            dialogues: one dialogue (a string, an image, or chat messages), or a list of n. A list of strings is a list of
                dialogues: one dialogue of several turns is a list of its own.
            batch_size, show_progress_bar, convert_to_numpy: see [`RetrievalMixin`].

        Returns:
            `(n, q)` float32 on CPU, L2-normalised; `(q,)` of one dialogue.

        Raises:
            ValueError: the argument, or the item, and what is wrong with it.
        """
        items, single = as_items("dialogues", dialogues)
        warn_of_turns(items)
        return self._embed("dialogues", items, single, batch_size, show_progress_bar, convert_to_numpy)

    @overload
    def embed_images(
        self, images: Any, batch_size: int = ..., show_progress_bar: bool | None = ..., *,
        convert_to_numpy: Literal[False] = ...,
    ) -> torch.Tensor: ...  # fmt: skip
    @overload
    def embed_images(
        self, images: Any, batch_size: int = ..., show_progress_bar: bool | None = ..., *,
        convert_to_numpy: Literal[True],
    ) -> np.ndarray: ...  # fmt: skip

    def embed_images(
        self, images: Any, batch_size: int = 32, show_progress_bar: bool | None = None, *,
        convert_to_numpy: bool = False,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        """
        Unified embeddings of candidate images, each as [`decode_image`] takes it; a folder means its images, sorted
        by path. Otherwise as `embed_dialogues`.
        """
        return self._embed("images", *as_items("images", images), batch_size, show_progress_bar, convert_to_numpy)

    @overload
    def embed_texts(
        self, texts: Any, batch_size: int = ..., show_progress_bar: bool | None = ..., *,
        convert_to_numpy: Literal[False] = ...,
    ) -> torch.Tensor: ...  # fmt: skip
    @overload
    def embed_texts(
        self, texts: Any, batch_size: int = ..., show_progress_bar: bool | None = ..., *,
        convert_to_numpy: Literal[True],
    ) -> np.ndarray: ...  # fmt: skip

    def embed_texts(
        self, texts: Any, batch_size: int = 32, show_progress_bar: bool | None = None, *,
        convert_to_numpy: bool = False,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        """Embeddings of candidate texts in the space `config.text_candidates` names. Otherwise as `embed_dialogues`."""
        return self._embed("texts", *as_items("texts", texts), batch_size, show_progress_bar, convert_to_numpy)

    def encode(
        self, inputs: Any, batch_size: int = 32, show_progress_bar: bool | None = None, *,
        convert_to_numpy: bool = True,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        """
        As sentence-transformers' `encode`: embeddings of inputs of one kind or mixed, in their order.

        Args:
            inputs: one input, or a list: a string (embedded as `embed_texts` does), an image (`embed_images`), chat
                messages or `{"image": …, "text": …}` (`embed_dialogues`). A string is words, never a path.
            batch_size, show_progress_bar, convert_to_numpy: see [`RetrievalMixin`].

        Returns:
            `(n, q)` float32, L2-normalised; `(q,)` of one input.

        Raises:
            ValueError: the item and what is wrong with it.
        """
        return self._encode(inputs, batch_size, show_progress_bar, convert_to_numpy, query=False)

    def encode_query(
        self, inputs: Any, batch_size: int = 32, show_progress_bar: bool | None = None, *,
        convert_to_numpy: bool = True,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        """As `encode`, but that a string and an image too are dialogues of one turn: what searches."""
        return self._encode(inputs, batch_size, show_progress_bar, convert_to_numpy, query=True)

    def encode_document(
        self, inputs: Any, batch_size: int = 32, show_progress_bar: bool | None = None, *,
        convert_to_numpy: bool = True,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        """`encode`, under the name that sentence-transformers gives to what is searched."""
        return self.encode(inputs, batch_size, show_progress_bar, convert_to_numpy=convert_to_numpy)

    def similarity(self, a: Any, b: Any) -> torch.Tensor:
        """
        Cosine of each pair.

        Args:
            a, b: embeddings, `(n, q)` and `(m, q)`, or `(q,)` for one; tensors, arrays or lists of numbers.

        Returns:
            `(n, m)` float32 on CPU.

        Raises:
            ValueError: not numbers, or other shapes.
        """
        a, b = (_unit_rows(name, value) for name, value in (("a", a), ("b", b)))
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"a holds vectors of width {a.shape[1]}, b of {b.shape[1]}: they are of different models")
        return a @ b.T

    # The steps of an embedding

    def prepare(self, kind: str, items: Sequence[Any], first: int = 0) -> BatchFeature:
        """
        The tensors that `unify` reads of n `"dialogues"`, `"images"` or `"texts"`, on CPU; `first` is the number by which
        messages call the first item.
        """
        if kind == "dialogues":
            return self.processor.contexts(items, first=first)
        if kind == "images":
            return BatchFeature({"pixel_values": self.processor.pixels(items, first=first)})
        space = self.config.text_candidates
        if space == "clip_text":
            return self.processor.clip_texts(items, first=first)
        return self.processor.texts(items, end_with_ret=space == "ret", first=first)

    def unify(self, kind: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
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

    def prepare_mixed(
        self, inputs: Sequence[Any], *, query: bool = False, prompt: str | None = None, first: int = 0
    ) -> BatchFeature:
        """
        The tensors that `unify_mixed` reads of n inputs as [`kind_of`] takes them, of one kind or mixed: for each kind
        there is, `<kind>.rows` `(m,)` int64, the places of its items, and what `prepare` gives under `<kind>.<name>`.

        Args:
            query: make a dialogue of every input.
            prompt: put before a text, and before a dialogue as a turn of its own.
            first: the number by which messages call the first input.

        Raises:
            ValueError: an input of no known form, or a prompt for an image, which has no words to put it before.
        """
        groups: dict[str, tuple[list[int], list[Any]]] = {}
        for row, item in enumerate(inputs):
            try:
                kind, item = kind_of(item, query=query)
            except ValueError as error:
                raise located(error, f"input {first + row}") from error
            if prompt and kind == "images":
                raise ValueError(f"input {first + row} is an image, which takes no prompt; got {prompt!r}")
            if prompt:
                item = prompt + item if kind == "texts" else [prompt, *item]
            rows, items = groups.setdefault(kind, ([], []))
            rows.append(row)
            items.append(item)
        features: dict[str, torch.Tensor] = {}
        for kind, (rows, items) in groups.items():
            features[f"{kind}.rows"] = torch.tensor(rows)
            try:
                tensors = self.prepare(kind, items, first if len(groups) == 1 else 0)
            except ValueError as error:
                places = ", ".join(str(first + row) for row in rows)
                raise (error if len(groups) == 1 else located(error, f"of the inputs {places}")) from error
            features |= {f"{kind}.{name}": value for name, value in tensors.items()}
        return BatchFeature(features)

    def unify_mixed(self, features: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings `(n, q)` float32, not normalised, of what `prepare_mixed` made of n inputs."""
        groups = {
            kind: {name.split(".", 1)[1]: value for name, value in features.items() if name.startswith(f"{kind}.")}
            for kind in KINDS
        }
        parts = [(inputs.pop("rows"), self.unify(kind, inputs)) for kind, inputs in groups.items() if inputs]
        embeds = torch.cat([embeds for _, embeds in parts])
        return embeds[torch.cat([rows for rows, _ in parts]).argsort()]

    @torch.no_grad()
    def embed_inputs(self, kind: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As `embed_dialogues`, `embed_images` or `embed_texts`, of what `prepare` made, on the model's device."""
        return self.finished(self.unify(kind, inputs))

    def finished(self, embeds: torch.Tensor) -> torch.Tensor:
        """
        Embeddings `(..., q)` as `unify` makes them -> float32 on CPU, L2-normalised. Raises `ValueError` naming the
        weights that hold NaN or infinity where the embeddings do.
        """
        if not bool(torch.isfinite(embeds).all()):
            names = non_finite_tensors(cast(torch.nn.Module, self)) or ["none: the input overflows the towers' dtype"]
            raise ValueError(f"the embeddings hold NaN or infinity; weights that do: {', '.join(names[:5])}")
        return F.normalize(embeds.float(), dim=-1).cpu()

    def _embed(
        self, kind: str, items: Sequence[Any], single: bool, batch_size: int, show_progress_bar: bool | None,
        convert_to_numpy: bool,
    ) -> torch.Tensor | np.ndarray:  # fmt: skip
        return _answer(self._rows(kind, items, batch_size, show_progress_bar), single, convert_to_numpy)

    def _rows(self, kind: str, items: Sequence[Any], batch_size: int, show_progress_bar: bool | None) -> torch.Tensor:
        """`(n, q)` of items of one kind."""

        def embed(batch: Sequence[Any], start: int) -> torch.Tensor:
            return self.embed_inputs(kind, self.prepare(kind, batch, start).to(self.device))

        return self._batched(kind, items, batch_size, show_progress_bar, embed)

    def _encode(
        self, inputs: Any, batch_size: int, show_progress_bar: bool | None, convert_to_numpy: bool, query: bool
    ) -> torch.Tensor | np.ndarray:
        items, single = as_items("dialogues", inputs)

        def embed(batch: Sequence[Any], start: int) -> torch.Tensor:
            features = self.prepare_mixed(batch, query=query, first=start).to(self.device)
            return self.finished(self.unify_mixed(features))

        return _answer(self._batched("inputs", items, batch_size, show_progress_bar, embed), single, convert_to_numpy)

    @torch.no_grad()
    def _batched(
        self, words: str, items: Sequence[Any], batch_size: int, show_progress_bar: bool | None,
        embed: Callable[[Sequence[Any], int], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """`(n, q)` of items, which `embed` makes of a batch and the number of its first."""
        size = check_count("batch_size", batch_size)
        count = -(-len(items) // size)
        steps = _progress(batches(items, size), f"embedding {words}", count, show_progress_bar)
        parts = [embed(batch, start) for start, batch in steps]
        return torch.cat(parts) if parts else torch.empty(0, self.config.embedding_width)

    # Replies

    def conversation(self) -> Conversation:
        """A conversation to which turns are added one by one, each at the cost of its own tokens."""
        return Conversation(self)

    def build_pool(
        self, images: Any = None, texts: Any = None, *, image_ids: Iterable[str | int] | None = None,
        text_ids: Iterable[str | int] | None = None, batch_size: int = 32, show_progress_bar: bool | None = None,
    ) -> CandidatePool:  # fmt: skip
        """
        One pool of images and texts (Section 3.4).

        Args:
            images: a list or column of images, each as [`decode_image`] takes it, or a folder: its images and those of
                its sub-folders, sorted by path.
            texts: a list or column of strings.
            image_ids, text_ids: unique names; numbered by default.
            batch_size, show_progress_bar: see [`RetrievalMixin`].

        Raises:
            ValueError: nothing given, a bad item, a duplicate id, or not one id for each candidate.
        """
        pool = CandidatePool.empty(self.fingerprint)
        return self.extend_pool(pool, images, texts, image_ids=image_ids, text_ids=text_ids,
                                batch_size=batch_size, show_progress_bar=show_progress_bar)  # fmt: skip

    def extend_pool(
        self, pool: CandidatePool, images: Any = None, texts: Any = None, *,
        image_ids: Iterable[str | int] | None = None, text_ids: Iterable[str | int] | None = None,
        batch_size: int = 32, show_progress_bar: bool | None = None,
    ) -> CandidatePool:  # fmt: skip
        """`pool` with more candidates, as a new pool; refuses one that another model made. See `build_pool`."""
        check_pool(pool)
        pool.check_made_by(self.fingerprint)
        images, texts = _candidates("images", images), _candidates("texts", texts)
        if not len(images) and not len(texts):
            raise ValueError("no candidates: give images, texts or both")
        # Before anything is embedded, which may take hours.
        check_count("batch_size", batch_size)
        image_ids = pool.new_ids("image", images, image_ids)
        text_ids = pool.new_ids("text", texts, text_ids, len(pool) + len(images))
        pool.check_ids([*image_ids, *text_ids])
        if len(images):
            pool = pool.append("image", images, self._rows("images", images, batch_size, show_progress_bar), image_ids)
        if len(texts):
            pool = pool.append("text", texts, self._rows("texts", texts, batch_size, show_progress_bar), text_ids)
        return pool

    def retrieve(
        self, dialogue: Any, pool: CandidatePool, *, top_k: int = 10, modality: str | None = None,
        exclude: Iterable[str | int] = (), calibrate: bool = False, image_bias: float = 0.0, batch_size: int = 32,
        generate: str = "never", **drawing: Any,
    ) -> Retrieval | list[Retrieval]:  # fmt: skip
        """
        The reply to a dialogue out of a pool (Section 3.4).

        Args:
            dialogue: one dialogue (a string, an image, a list of strings and images that are its turns, or chat
                messages), or many: a list of dialogues that are each a list, or a column, array or generator of dialogues.
            pool: what `build_pool` made, or another pool of this model.
            top_k: how many candidates to return.
            modality: `"image"` or `"text"` to search one kind only.
            exclude: ids not to return, such as those of earlier replies.
            calibrate, image_bias: see [`CandidatePool.search`].
            batch_size: dialogues embedded at once.
            generate: `"always"` draws the image of every reply, whatever the pool has; `"auto"` only in the place of a shown
                image whose cosine is below `config.draw_below`. Whether a reply shows an image stays 3.4's to say.
                `reply.image_source` says which it was.
            drawing: `seed`, `steps`, `guidance` and `size` of [`UniMuRModel.generate`].

        Returns:
            One [`Retrieval`], or a list where many dialogues were given.

        Raises:
            ValueError: the pool is none, empty, or another model's (the message says what differs), an argument is of no
                use, or this model cannot draw what is asked for.
        """
        check_pool(pool)
        pool.check_made_by(self.fingerprint)
        check_when(generate, drawing, self.config)
        ids = id_strings("exclude", exclude)
        check_count("top_k", top_k)  # before anything is embedded
        dialogues, single = as_dialogues(dialogue)
        queries = self._rows("dialogues", dialogues, batch_size, False)
        if not len(queries):
            return []
        replies = self.replies_to(
            dialogues, queries, pool, generate=generate, drawing=drawing, top_k=top_k, modality=modality, exclude=ids,
            calibrate=calibrate, image_bias=image_bias,
        )  # fmt: skip
        return replies[0] if single else replies

    def replies_to(
        self, dialogues: Sequence[Any], queries: torch.Tensor, pool: CandidatePool, *, generate: str = "never",
        drawing: Mapping[str, Any] | None = None, **search: Any,
    ) -> list[Retrieval]:  # fmt: skip
        """
        `retrieve`, of n dialogues whose embeddings `(n, q)` are there already.

        Args:
            dialogues: each as `embed_dialogues` takes it; read only where a picture is drawn.
            queries: their embeddings, n at least 1.
            generate, drawing: `generate` of `retrieve`, and the others of its arguments that a picture is drawn with.
            search: of [`CandidatePool.search`].

        Raises:
            ValueError: as `retrieve`.
            ImportError, OSError: the diffusion model cannot be loaded, see `pipeline`.
        """
        check_when(generate, drawing or {}, self.config)
        hits = pool.search(queries, **search)
        if generate == "never":
            return hits
        places = list(range(len(hits)))
        if generate == "auto":
            places = self._to_draw(hits, queries, pool, id_strings("exclude", search.get("exclude", ())))
        return with_drawn(self, dialogues, hits, places, drawing or {})

    def _to_draw(
        self, hits: list[Retrieval], queries: torch.Tensor, pool: CandidatePool, exclude: Sequence[str]
    ) -> list[int]:
        """The replies that show an image whose cosine is below `config.draw_below`."""
        shown = [i for i, reply in enumerate(hits) if reply.best_image is not None]
        if not shown:
            return []
        below = self.config.draw_below
        assert below is not None  # `check_when` has refused it
        best = pool.search(queries[shown], top_k=1, modality="image", exclude=exclude)
        return [i for i, reply in zip(shown, best, strict=True) if reply.candidates[0].score < below]


def _candidates(kind: str, given: Any) -> Sequence[Any]:
    if given is None:
        return []
    items, single = as_items(kind, given)
    if single:
        folder = ", or a folder" if kind == "images" else ""
        raise ValueError(f"{kind} is one {kind[:-1]} ({type(given).__name__}): give a list of {kind}{folder}")
    return items


def _answer(rows: torch.Tensor, single: bool, convert_to_numpy: bool) -> torch.Tensor | np.ndarray:
    rows = rows[0] if single else rows
    return rows.numpy() if convert_to_numpy else rows


def _progress(steps: Iterable[Any], words: str, count: int, show: bool | None) -> Iterable[Any]:
    """Steps under the package's one rule of progress bars, see [`RetrievalMixin`]."""
    return tqdm(steps, words, count, disable=show is False, delay=PATIENCE if show is None else 0)


def _unit_rows(name: str, value: Any) -> torch.Tensor:
    try:
        rows = torch.as_tensor(value).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} holds no embeddings ({error}): give what embed_* or encode gave") from error
    if rows.ndim not in (1, 2) or not rows.shape[-1]:
        raise ValueError(f"{name} has the shape {tuple(rows.shape)}: embeddings are (n, q), or (q,) for one")
    return F.normalize(rows.reshape(-1, rows.shape[-1]), dim=-1)
