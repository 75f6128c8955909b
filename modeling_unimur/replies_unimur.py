"""The reply of Section 3.4 out of ranked hits, whatever pool they come from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from PIL import Image

from .images_unimur import BadImageError, decode_image

MODALITIES = ("image", "text")


class Undecoded:
    """A candidate's picture as it is stored; `image` decodes it once, or raises a [`BadImageError`] that names `id`."""

    def __init__(self, id: str, source: Any):
        self.id, self.source = id, source

    @cached_property
    def image(self) -> Image.Image:
        try:
            return decode_image(self.source)
        except BadImageError as error:
            raise BadImageError(f"candidate {self.id!r}: {error}", error.reason) from error


class _Item:
    """The field `Candidate.item`: of an [`Undecoded`] its picture, which most callers never look at."""

    def __get__(self, candidate: "Candidate | None", owner: type) -> str | Image.Image:
        if candidate is None:
            raise AttributeError("item")  # so the field has no default
        item = vars(candidate)["item"]
        return item.image if isinstance(item, Undecoded) else item

    def __set__(self, candidate: "Candidate", item: str | Image.Image | Undecoded) -> None:
        vars(candidate)["item"] = item


@dataclass(frozen=True)
class Candidate:
    """
    A retrieved candidate: `item` is a text or an RGB `PIL.Image`; `rank` counts from 1; `score` is what it was ranked by;
    `source` is the path that an image was given by or, once its pool was saved, the file's name.

    A picture is decoded when `item` is first asked for: then one that is missing or broken raises a [`BadImageError`].
    """

    id: str
    modality: str
    item: str | Image.Image = _Item()
    score: float
    rank: int
    source: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Retrieval:
    """
    The reply of Section 3.4: `text`, the best text of the pool; `image`, the best of what remains if that is an image;
    `candidates`, the best of the pool in order. `text` is `None` where no text was searched.
    """

    text: str | None
    image: Image.Image | None
    candidates: list[Candidate]


class Hit(NamedTuple):
    """A candidate before it is fetched; `key` is how its pool finds it, such as a row."""

    score: float
    key: Any
    kind: str


def check_search(
    size: int, top_k: int, modality: str | None, exclude: Sequence[str] = (), image_bias: float = 0.0
) -> None:
    """Refuses with a `ValueError` what no pool can search."""
    if not size:
        raise ValueError("the pool is empty: build it with images, texts or both")
    if modality not in (None, *MODALITIES):
        raise ValueError(f"modality={modality!r} is not 'image', 'text' or None")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if isinstance(exclude, str):
        raise ValueError(f"exclude={exclude!r} is one string: give a list of ids")
    if not abs(image_bias) < 2.0**127:  # half of what float32 holds, in which scores are; NaN compares as false
        raise ValueError(
            f"image_bias={image_bias} must be finite in float32: modality='image' or 'text' searches one kind only"
        )


def differences(made_by: dict[str, Any], fingerprint: dict[str, Any]) -> str:
    """What differs between the fingerprint of a pool and a model's, in words; empty where nothing does."""
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
        fetch: keys -> key: (id, item, source, ...), the item a text, a picture or an [`Undecoded`] one. Called once,
            with each key that a reply shows.

    Raises:
        ValueError: a query has no hit.
        BadImageError: the picture of a reply is missing or broken.
    """
    if not all(ranked):
        raise ValueError("no candidate remains: modality and exclude leave nothing of the pool")
    # Places in the ranking: of the best text, and of the best of the rest where that is an image.
    texts = [next((i for i, hit in enumerate(hits) if hit.kind == "text"), None) for hits in ranked]
    rests = [next((i for i in range(len(hits)) if i != text), None) for hits, text in zip(ranked, texts, strict=True)]
    images = [i if i is not None and hits[i].kind == "image" else None for hits, i in zip(ranked, rests, strict=True)]
    shown = [
        [*range(min(top_k, len(hits))), *(i for i in (text, image) if i is not None)]
        for hits, text, image in zip(ranked, texts, images, strict=True)
    ]
    items = fetch({hits[i].key for hits, places in zip(ranked, shown, strict=True) for i in places})

    def picture(key: Any) -> Image.Image:
        item = items[key][1]
        return item.image if isinstance(item, Undecoded) else item

    return [
        Retrieval(
            None if text is None else items[hits[text].key][1],
            None if image is None else picture(hits[image].key),
            [
                Candidate(items[hit.key][0], hit.kind, items[hit.key][1], hit.score, rank, items[hit.key][2])
                for rank, hit in enumerate(hits[:top_k], 1)
            ],
        )
        for hits, text, image in zip(ranked, texts, images, strict=True)
    ]
