"""What the page does, apart from how it looks: a visitor's conversation, and the replies to it."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

logger = logging.getLogger(__name__)

LISTED = 8  # candidates beside the conversation
ALSO = 3  # further pictures beneath the reply's
STRIP = 24  # pictures of the pool to choose from
MAX_UPLOADS = 24  # of a visitor, in the pool
MAX_PIXELS = 16_000_000
MAX_SIDE = 1024  # of a picture that is kept: embedding it again and drawing it again stay cheap
MAX_IMAGES = 16  # of a visitor, in a conversation
MAX_TURNS = 64  # of a conversation, replies included
MAX_TEXT = 2_000  # characters
# How far the best candidate of a modality is ahead of its next, in deviations of the scores over the pool, and in what
# words the page says so. Set by hand after a look at the miniature's validation dialogues, and not calibrated.
SURE = ((0.6, "sure"), (0.15, "fairly sure"), (0.0, "unsure"))
# Openings of a conversation, in the words that the miniature knows; a number is a picture of the strip that comes first.
# Which are offered is decided by the model: those that it answers by a picture.
OPENINGS: tuple[tuple[str, int | None], ...] = (
    ("look who i met. later i saw it again, playing the drums on the beach. show me!", 3),
    ("i met a penguin today. it had a blue beanie on. it spends the day playing the harp on the lawn. can i see it?", None),
    ("there was a monkey in a pink beanie, rolling a barrel. do you have a picture?", None),
    ("what do lions look like?", None),
    ("this is my friend. now imagine it in the desert. let me have a look!", 8),
    ("there was a frog in a red cap, eating an apple. please show it to me.", None),
    ("i saw an owl in the forest. it had a purple hat on. i would love to see that.", None),
    ("what do pandas look like?", None),
)  # fmt: skip
# Of pictures that the pool has.
NAMED = (
    "i met a {} today. can i see it?",
    "there was a {}. please show it to me.",
    "i saw a {}. do you have a picture?",
)
OFFERED = 4  # examples
DRAWN = "drawn, not from the pool"  # the name of a drawn picture


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with its name, its id where it is a candidate of the pool, and whether it was drawn."""

    name: str
    image: Image.Image
    id: str | None = None
    drawn: bool = False


@dataclass(frozen=True)
class Turn:
    """
    A turn of a conversation.

    Attributes:
        role: `"user"` or `"assistant"`.
        text: its words, if any.
        pictures: what it shows.
        text_id: of a reply's words, in the pool.
        also: of a reply, the pictures that came next.
        sure: of a reply, how sure it is, as a sentence.
        forgotten: of a reply, how many of the oldest turns exceeded the model's positions.
        cut: of a reply, whether the turn before it exceeded them alone, so that only its end was read.
    """

    role: str
    text: str | None
    pictures: tuple[Picture, ...] = ()
    text_id: str | None = None
    also: tuple[Picture, ...] = ()
    sure: str = ""
    forgotten: int = 0
    cut: bool = False

    @property
    def message(self) -> dict[str, Any]:
        """As `retrieve` takes it."""
        parts = [{"type": "image", "image": picture.image} for picture in self.pictures]
        words = [{"type": "text", "text": self.text}] if self.text else []
        return {"role": self.role, "content": parts + words}


@dataclass(frozen=True)
class Session:
    """
    A visitor's conversation; never changed, only followed by another.

    Attributes:
        turns: the replies among them.
        queried: how many of the turns the last reply was retrieved for.
        pool: the pool with the visitor's pictures; `None` is everybody's.
        uploads: how many pictures the visitor has added.
        reply: the last `Retrieval`.
    """

    turns: tuple[Turn, ...] = ()
    queried: int = 0
    pool: Any = None
    uploads: int = 0
    reply: Any = None


@dataclass(frozen=True)
class Example:
    """A first turn that a visitor may send: its words, its picture, and the picture on its button."""

    text: str
    picture: Picture | None
    thumbnail: Picture | None


class App:
    """
    Args:
        model: a loaded UniMuR.
        pool: what it searches.
        openings: words, and the number of a picture of `strip` that comes first or `None`.
    """

    def __init__(self, model: Any, pool: Any, openings: Sequence[tuple[str, int | None]] = OPENINGS):
        self.model, self.pool, self.openings = model, pool, openings
        pool.check_made_by(model.fingerprint)
        processor = model.processor
        processor.max_image_pixels = min(processor.max_image_pixels, MAX_PIXELS)

    @property
    def draws(self) -> bool:
        """Whether its model can draw, and what that needs is installed."""
        return bool(self.model.config.n_drawing_tokens) and find_spec("diffusers") is not None

    @cached_property
    def strip(self) -> list[Picture]:
        """Some of the pool's pictures, evenly from its first to its last; those that cannot be read are left out."""
        table = self.pool.dataset.with_format(None)
        rows = np.flatnonzero(pc.equal(table.data.column("modality"), "image"))
        if not len(rows):
            return []
        chosen = table[rows[np.linspace(0, len(rows) - 1, min(STRIP, len(rows))).astype(int)].tolist()]
        pictures = []
        for id_, image in zip(chosen["id"], chosen["image"], strict=True):
            try:
                decoded = self.model.processor.decode(image["bytes"] or Path(image["path"]))
            except ValueError:
                continue
            pictures.append(Picture(name_of(id_), reduced(decoded), id_))
        return pictures

    @cached_property
    def examples(self) -> list[Example]:
        """Openings that are answered by a picture, at most `OFFERED`; by default three ask for one that the pool has."""
        examples = self._named() if self.openings is OPENINGS else []
        offered = [
            (text, None if at is None else self.strip[at])
            for text, at in self.openings
            if at is None or at < len(self.strip)
        ]
        for text, picture in offered:
            pictures = self._opened(text, picture)
            if pictures:
                examples.append(Example(text, picture, picture or pictures[0]))
        return examples[:OFFERED]

    def _opened(self, text: str, picture: Picture | None = None) -> Sequence[Picture]:
        """The pictures of the reply to an opening."""
        session = Session(turns=(self._turn(text, [picture] if picture else []),), queried=1)
        return self._answered(session, 0.0).turns[1].pictures

    def _named(self) -> list[Example]:
        """
        An example of each of `NAMED` about a picture of the strip whose name says what it shows, as the miniature's do
        ("frog in a red hat, eating apple, forest"), and that the reply shows.
        """
        things = [name for name in (picture.name.partition(",")[0] for picture in self.strip) if " in a " in name]
        examples: list[Example] = []
        for thing in dict.fromkeys(things):
            if len(examples) == len(NAMED):
                break
            text = NAMED[len(examples)].format(thing)
            pictures = self._opened(text)
            if pictures and pictures[0].name.startswith(thing):
                examples.append(Example(text, None, pictures[0]))
        return examples

    def say(self, session: Session, text: str | None, files: Iterable[str], image_bias: float) -> Session:
        """
        Adds a turn of words and picture files, and the reply to it.

        Raises:
            ValueError: an empty turn, too long a text, too many turns or pictures, a file that is no picture; the session
                stays as it was.
        """
        return self._say(session, text, [self._picture(file) for file in files], image_bias)

    def show(self, session: Session, at: int, image_bias: float) -> Session:
        """Adds a turn that shows a picture of the strip, and the reply to it. Raises `ValueError` as `say` does."""
        return self._say(session, None, [self.strip[at]], image_bias)

    def try_example(self, session: Session, at: int, image_bias: float) -> Session:
        """Adds an example as a turn, and the reply to it. Raises `ValueError` as `say` does."""
        example = self.examples[at]
        return self._say(session, example.text, [example.picture] if example.picture else [], image_bias)

    def rank_again(self, session: Session, image_bias: float) -> Session:
        """The last turn answered again, by another bias or out of a larger pool."""
        return self._answered(session, image_bias) if session.queried else session

    def draw(self, session: Session) -> Session:
        """
        The last reply with a picture drawn for it in the place of the pool's, which goes to those that came next.

        Raises:
            ValueError: there is no reply, the diffusion model cannot be loaded, or the picture cannot be drawn.
        """
        if not session.queried:
            raise ValueError("Say something first: a picture is drawn for a reply.")
        try:
            self.model.pipeline  # noqa: B018  # loaded here once
        except (ImportError, OSError, ValueError) as error:  # it may name the server's folders
            logger.warning(f"no picture can be drawn: {error}")
            raise ValueError("The diffusion model could not be loaded here; the server's log says why.") from error
        image = self.model.generate([turn.message for turn in session.turns[: session.queried]])
        turn = session.turns[-1]
        former = tuple(picture for picture in turn.pictures if not picture.drawn)
        picture = Picture(DRAWN, reduced(image), drawn=True)
        # How sure the reply was is said of the pool's picture too.
        turn = replace(turn, pictures=(picture,), also=(former + turn.also)[:ALSO], sure="")
        return replace(session, turns=(*session.turns[:-1], turn), reply=session.reply.with_drawn(image))

    def add_pictures(self, session: Session, files: Sequence[str], image_bias: float) -> Session:
        """Adds a visitor's own pictures to the visitor's pool. Raises `ValueError` as `say` does."""
        if session.uploads + len(files) > MAX_UPLOADS:
            raise ValueError(f"At most {MAX_UPLOADS} pictures of your own; {session.uploads} are there already.")
        images = [self._picture(file).image for file in files]
        ids = [f"yours-{session.uploads + at + 1}" for at in range(len(images))]
        pool = self.model.extend_pool(session.pool or self.pool, images, image_ids=ids, show_progress_bar=False)
        return self.rank_again(replace(session, pool=pool, uploads=session.uploads + len(images)), image_bias)

    def unread(self, turns: Sequence[Turn]) -> tuple[int, bool]:
        """How many of the oldest turns exceed the model's positions, and whether the last one exceeds them alone."""
        processor = self.model.processor
        parsed = [[*(p.image for p in turn.pictures), *([turn.text] if turn.text else [])] for turn in turns]
        room = processor.max_length - len(processor.ending)
        fitting = (k for k in range(len(parsed)) if len(processor.turn_ids(parsed[k:])) <= room)
        forgotten = next(fitting, None)
        return (len(parsed) - 1, True) if forgotten is None else (forgotten, False)

    def _say(self, session: Session, text: str | None, pictures: Sequence[Picture], image_bias: float) -> Session:
        if len(session.turns) + 2 > MAX_TURNS:
            raise ValueError(f"A conversation has at most {MAX_TURNS} turns, replies included: start again.")
        count = sum(len(turn.pictures) for turn in session.turns if turn.role == "user")
        if count + len(pictures) > MAX_IMAGES:
            raise ValueError(
                f"At most {MAX_IMAGES} pictures go into a conversation; {count} are there already: show fewer, or start again."
            )
        turns = (*session.turns, self._turn(text, pictures))
        return self._answered(replace(session, turns=turns, queried=len(turns)), image_bias)

    def _turn(self, text: str | None, pictures: Sequence[Picture]) -> Turn:
        text = (text or "").strip()
        if not text and not pictures:
            raise ValueError("Write something, or show a picture.")
        if len(text) > MAX_TEXT:
            raise ValueError(f"That is {len(text):,} characters; at most {MAX_TEXT:,} go into a turn.")
        return Turn("user", text or None, tuple(pictures))

    def _answered(self, session: Session, image_bias: float) -> Session:
        turns, pool = session.turns[: session.queried], session.pool or self.pool
        query = self.model.embed_dialogues([[turn.message for turn in turns]])
        exclude = excluded(turns, pool.counts)
        (reply,) = pool.search(query, top_k=LISTED, exclude=exclude, image_bias=float(image_bias))
        kinds = [kind for kind, item in (("text", reply.text), ("image", reply.image)) if item is not None]
        best = {kind: closest(pool, query, kind, exclude) for kind in kinds}
        turn = turn_of(reply.text, best, *self.unread(turns))
        return replace(session, turns=(*turns, turn), reply=reply)

    def _picture(self, file: str) -> Picture:
        try:
            return Picture("your picture", reduced(self.model.processor.decode(Path(file))))
        except ValueError as error:
            # The file's own path on the server is nobody's business.
            raise ValueError(str(error).replace(str(file), Path(file).name)) from error


def closest(pool: Any, query: Any, modality: str, exclude: Sequence[str]) -> list[Any]:
    """The candidates of one modality closest to a query, best first; their scores are in deviations over the pool."""
    (reply,) = pool.search(query, top_k=1 + ALSO, modality=modality, calibrate=True, exclude=exclude)
    return reply.candidates


def turn_of(text: str | None, best: dict[str, list[Any]], forgotten: int, cut: bool) -> Turn:
    """A reply as a turn: `text`, and the best of the pictures where `best` has any."""
    pictures = tuple(Picture(name_of(c.id), reduced(c.item), c.id) for c in best.get("image", ()))
    text_id = best["text"][0].id if "text" in best else None
    sure = {kind: sureness([c.score for c in candidates]) for kind, candidates in best.items()}
    return Turn("assistant", text, pictures[:1], text_id, pictures[1:], sentence(sure), forgotten, cut)


def excluded(turns: Sequence[Turn], counts: dict[str, int]) -> list[str]:
    """Ids of the replies and pictures of a conversation; only the newest where all would leave no candidate of a modality."""
    texts = [turn.text_id for turn in turns if turn.text_id is not None]
    images = [picture.id for turn in turns for picture in turn.pictures if picture.id is not None]
    kept = []
    for used, count in ((texts, counts["text"]), (images, counts["image"])):
        newest = list(dict.fromkeys(reversed(used)))
        kept += newest[: max(0, count - 1)]
    return kept


def sureness(scores: Sequence[float]) -> str:
    """How sure the first of some falling scores is, by `SURE`; the only one is sure."""
    gap = scores[0] - scores[1] if len(scores) > 1 else float("inf")
    return next(word for least, word in SURE if gap >= least)


def sentence(sure: dict[str, str]) -> str:
    """How sure a reply is of its words and its picture."""
    if len(set(sure.values())) == 1 and len(sure) == 2:
        return f"{sure['text'].capitalize()} of both."
    names = {"text": "the words", "image": "the picture"}
    words = ", ".join(f"{word} of {names[kind]}" for kind, word in sure.items())
    return words[:1].upper() + words[1:] + "." if words else ""


def name_of(id: str) -> str:
    """What a visitor reads of a picture's id: `"holiday_beach.jpg"` is "holiday beach", `"response-image-497"` a number."""
    number = re.fullmatch(r"(?:.*[-_ ])?image[-_ ]?(\d+)", id)
    if number:
        return f"picture {number[1]}"
    stem = Path(id).stem if Path(id).suffix.lower() in Image.registered_extensions() else id
    return re.sub(r"[-_\s]+", " ", stem).strip() or id


def reduced(image: Image.Image) -> Image.Image:
    """A picture of at most `MAX_SIDE` pixels a side."""
    if max(image.size) <= MAX_SIDE:
        return image
    image = image.copy()  # it may be the pool's
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return image
