"""The reply of Section 3.4 out of ranked hits, whatever pool they come from."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .display_unimur import LARGE, figure, gallery, shortened
from .images_unimur import BadImageError, decode_image, located
from .inputs_unimur import check_count
from .pool_ids import id_strings

MODALITIES = ("image", "text")
LISTED = 10  # candidates that a notebook lists
DRAWN = "drawn"  # the id of a picture that is of no pool
MARK = "drawn, not from the pool"  # what a notebook says of it


class Undecoded:
    """
    A candidate's picture as its pool keeps it. Two are equal where id and source are: none is decoded for that.

    Args:
        id: the candidate's, for messages.
        source: as [`decode_image`] takes it.
    """

    def __init__(self, id: str, source: Any):
        self.id, self.source = id, source
        self._image: Image.Image | None = None

    @property
    def image(self) -> Image.Image:
        """RGB, decoded when it is first read. Raises a [`BadImageError`] that names the candidate."""
        if self._image is None:
            try:
                self._image = decode_image(self.source)
            except BadImageError as error:
                raise located(error, f"candidate {self.id!r}") from error
        return self._image

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undecoded) and (self.id, self.source) == (other.id, other.source)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Undecoded({self.id!r})"


@dataclass(frozen=True)
class Candidate:
    """
    A retrieved candidate. To print, compare or hash one decodes nothing; a notebook shows it.

    Attributes:
        id: its unique name in the pool.
        modality: `"image"` or `"text"`.
        stored: a text, or a picture as the pool keeps it; see `item`.
        score: what it was ranked by.
        rank: from 1; 0 of a drawn picture, which no pool ranked.
        source: the path or the name that an image was given by, `None` where there was none.
    """

    id: str
    modality: str
    stored: str | Undecoded
    score: float
    rank: int
    source: str | None = None

    @property
    def item(self) -> str | Image.Image:
        """
        The text, or the RGB `PIL.Image`, decoded when it is first read.

        Raises:
            BadImageError: the picture is missing or broken; `reason` says how.
        """
        return self.stored if isinstance(self.stored, str) else self.stored.image

    def __repr__(self) -> str:
        text = f" {shortened(self.stored)}" if isinstance(self.stored, str) else ""
        return f"Candidate({self.rank}: {self.modality} {self.id!r}{text}, score {self.score:.3f})"

    def _repr_html_(self) -> str:
        return candidate_figure(self, LARGE)


@dataclass(frozen=True)
class Retrieval:
    """
    The reply of Section 3.4: the best text of the pool and, if the best of what remains is an image, that image. To
    print, compare or hash a reply decodes nothing; a notebook shows it.

    Attributes:
        best_text: the candidate that `text` is of; `None` where no text was searched.
        best_image: the candidate that `image` is of, or a drawn picture; `None` where the reply shows no image.
        candidates: the best of the pool in order.
    """

    best_text: Candidate | None
    best_image: Candidate | None
    candidates: tuple[Candidate, ...]

    @property
    def text(self) -> str | None:
        """The words of the reply."""
        return None if self.best_text is None else str(self.best_text.item)

    @property
    def image(self) -> Image.Image | None:
        """
        The picture of the reply, an RGB `PIL.Image`, decoded when it is first read; whether there is one, `best_image`
        says without that.

        Raises:
            BadImageError: the picture is missing or broken; `reason` says how.
        """
        return None if self.best_image is None else _picture(self.best_image)

    @property
    def image_source(self) -> str | None:
        """Where `image` is from: `"retrieved"`, from the pool, or `"drawn"`, by a diffusion model; `None` without an image."""
        return None if self.best_image is None else "retrieved" if self.best_image.rank else DRAWN

    def with_drawn(self, picture: Image.Image) -> "Retrieval":
        """This reply with a drawn picture in the place of its image; `candidates` stay those of the pool."""
        return replace(self, best_image=Candidate(DRAWN, "image", Undecoded(DRAWN, picture), score=0.0, rank=0))

    def __repr__(self) -> str:
        parts = [shortened(str(self.best_text.stored))] if self.best_text is not None else []
        parts += [f"image {self.best_image.id!r}"] if self.best_image is not None else []
        return f"Retrieval({', '.join([*parts, f'{len(self.candidates)} candidates'])})"

    def _repr_html_(self) -> str:
        own = [_own_figure(self.best_image)] if self.best_image is not None else []
        rest = [candidate_figure(candidate) for candidate in self.candidates[:LISTED]]
        more = f", of which {LISTED} are listed" if len(self.candidates) > LISTED else ""
        return gallery(self.text or "", own) + gallery(f"{len(self.candidates)} candidates{more}:", rest)

    def show(self) -> None:
        """The reply in a notebook; elsewhere its words are printed and its picture opens in the system's viewer."""
        if _displayed(self):
            return
        print(self.text if self.text is not None else self)
        if self.best_image is not None:
            _picture(self.best_image).show(title=self.best_image.id)

    def save(self, folder: str | PathLike) -> Path:
        """
        Writes the reply into a folder, which is made where it is absent: the pictures of all candidates as
        `candidate-<rank>.png`, and `reply.json`:

            {"text": str | null, "image": file | null, "image_source": "retrieved" | "drawn" | null,
             "candidates": [{"id", "modality", "score", "rank", "text" or "image"}, …]}

        Returns:
            The path of `reply.json`.

        Raises:
            BadImageError: a picture is missing or broken; then nothing is written.
            OSError: the folder cannot be written.
        """
        listed = {c.rank: c for c in (*self.candidates, *filter(None, (self.best_text, self.best_image)))}
        pictures = {rank: _picture(c) for rank, c in listed.items() if c.modality == "image"}
        names = {rank: f"candidate-{rank}.png" for rank in pictures}
        content = {
            "text": self.text,
            "image": None if self.best_image is None else names[self.best_image.rank],
            "image_source": self.image_source,
            "candidates": [
                {"id": c.id, "modality": c.modality, "score": c.score, "rank": c.rank,
                 c.modality: c.item if c.modality == "text" else names[c.rank]}
                for c in self.candidates
            ],
        }  # fmt: skip
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for rank, picture in pictures.items():
            picture.save(folder / names[rank])
        path = folder / "reply.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


class Hit(NamedTuple):
    """A candidate before it is fetched; `key` is how its pool finds it, such as a row."""

    score: float
    key: Any
    kind: str


def check_search(size: int, top_k: int, modality: str | None, exclude: Any = (), image_bias: float = 0.0) -> None:
    """Refuses with a `ValueError` what no pool can search."""
    if not size:
        raise ValueError("the pool is empty: build it with images, texts or both")
    if not isinstance(modality, str | None) or modality not in (None, *MODALITIES):
        raise ValueError(f"modality={modality!r} is not 'image', 'text' or None")
    check_count("top_k", top_k)
    id_strings("exclude", exclude)
    try:
        bias = math.nan if isinstance(image_bias, str | bytes) else float(image_bias)
    except (TypeError, ValueError, OverflowError):
        bias = math.nan
    if not abs(bias) < 2.0**127:  # half of what float32 holds, in which scores are; NaN compares as false
        raise ValueError(
            f"image_bias={image_bias!r} must be finite in float32: modality='image' or 'text' searches one kind only"
        )


def differences(made_by: dict[str, Any], fingerprint: dict[str, Any]) -> str:
    """What differs between the fingerprint of a pool and a model's, as text; empty where nothing does."""
    return ", ".join(
        f"{k} ({made_by.get(k)!r} here, {v!r} in the model)" for k, v in fingerprint.items() if made_by.get(k) != v
    )


def replies(
    ranked: Sequence[Sequence[Hit]], top_k: int, fetch: Callable[[Iterable[Any]], Mapping[Any, tuple[Any, ...]]]
) -> list[Retrieval]:
    """
    Args:
        ranked: per query its hits, the best first: at least `top_k` where there are so many, the best text and the two
            best of each modality searched.
        top_k: how many candidates a reply lists.
        fetch: keys -> key: (id, item, source, …), the item a text or an [`Undecoded`] picture, the source left out where
            there is none. Called once, with each key of a candidate that a reply holds.

    Raises:
        ValueError: a query has no hit.
    """
    if not all(ranked):
        raise ValueError("no candidate remains: modality and exclude leave nothing of the pool")
    best = [_best(hits) for hits in ranked]
    places = [
        {*range(min(top_k, len(hits))), *(i for i in pair if i is not None)}
        for hits, pair in zip(ranked, best, strict=True)
    ]
    items = fetch({hits[i].key for hits, mine in zip(ranked, places, strict=True) for i in mine})

    def candidate(hits: Sequence[Hit], place: int) -> Candidate:
        id_, item, *rest = items[hits[place].key]
        return Candidate(id_, hits[place].kind, item, hits[place].score, place + 1, rest[0] if rest else None)

    return [
        Retrieval(
            None if text is None else candidate(hits, text),
            None if image is None else candidate(hits, image),
            tuple(candidate(hits, i) for i in range(min(top_k, len(hits)))),
        )
        for hits, (text, image) in zip(ranked, best, strict=True)
    ]


def _best(hits: Sequence[Hit]) -> tuple[int | None, int | None]:
    """Places in a ranking: of the best text, and of the best of the rest where that is an image (Section 3.4)."""
    text = next((i for i, hit in enumerate(hits) if hit.kind == "text"), None)
    rest = next((i for i in range(len(hits)) if i != text), None)
    return text, rest if rest is not None and hits[rest].kind == "image" else None


def _picture(candidate: Candidate) -> Image.Image:
    item = candidate.item
    if isinstance(item, str):
        raise ValueError(f"candidate {candidate.id!r} is a text")
    return item


def candidate_figure(candidate: Candidate, side: int | None = None) -> str:
    """HTML of a candidate above its rank, id and score; of its id alone where it is not ranked."""
    caption = f"{candidate.rank}: {candidate.id} ({candidate.score:.3f})" if candidate.rank else candidate.id
    stored = candidate.stored
    item = stored if isinstance(stored, str) else lambda: stored.image
    return figure(item, caption) if side is None else figure(item, caption, side)


def _own_figure(image: Candidate) -> str:
    """HTML of a reply's own picture, which says where it was drawn."""
    return candidate_figure(image, LARGE) if image.rank else figure(lambda: _picture(image), MARK, LARGE)


def _displayed(reply: Retrieval) -> bool:
    """Displays a reply as HTML where the code runs in a Jupyter kernel; elsewhere answers `False`."""
    try:
        import IPython
    except ImportError:
        return False
    if getattr(IPython.get_ipython(), "kernel", None) is None:
        return False
    IPython.display.display(reply)
    return True
