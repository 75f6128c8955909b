"""The page's HTML; everything that comes from outside is escaped."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

from talk import MAX_TEXT, Example, Picture, Session, Turn, name_of

PAPER = "https://aclanthology.org/2024.findings-eacl.105"
MINIATURE = (
    "A small model that knows animals in hats, made in minutes on two cores. Talk to it: one embedding finds the words "
    "of its reply and a picture. The method, UniMuR, is for language models such as OPT-6.7B."
)
ANY = (
    "A frozen language model reads the conversation; one embedding finds the words of the reply and its picture, in one pool "
    "of both."
)
LIMITED = "The model reads only so much at a time"
SIDE, THUMBNAIL = 480, 160  # pixels that a picture is sent with


def header(miniature: bool, links: dict[str, str]) -> str:
    """What the page is, in a line, and where more of it is: name -> URL."""
    anchors = "".join(
        f'<a href="{escape(url)}" target="_blank" rel="noopener">{escape(n)}</a>' for n, url in links.items()
    )
    return f"<h1>UniMuR</h1><p>{MINIATURE if miniature else ANY}</p><nav aria-label='Links'>{anchors}</nav>"


def examples(offered: Sequence[Example]) -> str:
    """First turns to send by one click."""
    if not offered:
        return ""
    cards = "".join(
        f'<button type="button" class="u-card" data-at="{at}">{picture(e.thumbnail, THUMBNAIL, "") if e.thumbnail else ""}'
        f"<span>{escape(e.text)}</span></button>"
        for at, e in enumerate(offered)
    )
    return f'<h2 class="u-title">Try one</h2><div class="u-cards">{cards}</div>'


def strip(pictures: Sequence[Picture]) -> str:
    """Pictures of the pool, to be shown to the model by one click."""
    if not pictures:
        return ""
    buttons = "".join(
        f'<button type="button" data-at="{at}" title="{escape(p.name)}" aria-label="Show it: {escape(p.name)}">'
        f"{picture(p, THUMBNAIL, '')}</button>"
        for at, p in enumerate(pictures)
    )
    return f'<h2 class="u-title">Or show it a picture</h2><div class="u-strip" tabindex="-1">{buttons}</div>'


def conversation(session: Session) -> str:
    """The turns, oldest first; what the model can no longer read is marked."""
    last = session.turns[-1] if session.turns else Turn("assistant", None)
    notes = {}
    if last.forgotten:
        notes[last.forgotten] = (
            "The model reads only so much at a time: the turns above no longer fit, and it has forgotten them."
        )
    if last.cut:
        notes[last.forgotten] = "The model reads only so much at a time: of this turn it has read only the end."
    turns = []
    for at, turn in enumerate(session.turns):
        if at in notes:
            turns.append(f'<p class="u-note">{notes[at]}</p>')
        turns.append(_turn(turn, "u-forgotten" if at < last.forgotten else ""))
    return f'<div class="u-log" role="log" aria-live="polite" aria-label="Conversation" tabindex="0">{"".join(turns)}</div>'


def _turn(turn: Turn, mark: str) -> str:
    words = f'<p class="u-words">{escape(turn.text)}</p>' if turn.text else ""
    if turn.role == "user":
        pictures = "".join(picture(p, SIDE, f"you showed: {p.name}") for p in turn.pictures)
        return f'<div class="u-turn u-user {mark}" aria-label="You">{pictures}{words}</div>'
    pictures = "".join(
        f"<figure>{picture(p, SIDE, p.name)}<figcaption>{escape(p.name)}</figcaption></figure>" for p in turn.pictures
    )
    if turn.also:
        also = "".join(picture(p, THUMBNAIL, p.name) for p in turn.also)
        pictures += f'<div class="u-also"><span>also found</span><div>{also}</div></div>'
    pictures = f'<div class="u-shown">{pictures}</div>' if pictures else ""
    sure = f'<p class="u-sure" title="by how far the best is ahead of the next best">{escape(turn.sure)}</p>'
    return (
        f'<div class="u-turn u-reply {mark}" aria-label="UniMuR">{pictures}<div class="u-text">'
        f"{words or '<p class=u-words>(only a picture)</p>'}{sure if turn.sure else ''}</div></div>"
    )


def ranking(reply: Any) -> str:
    """The candidates of a reply, best first; those it is made of are marked."""
    if reply is None:
        return ""
    scores = [c.score for c in reply.candidates]
    used = set(_used(reply))
    rows = "".join(_row(c, c.id in used, _share(c.score, min(scores), max(scores))) for c in reply.candidates)
    return f'<details class="u-hits"><summary>What came closest, best first</summary><ol>{rows}</ol></details>'


def _used(reply: Any) -> Iterable[str]:
    from_pool = reply.image if reply.image_source != "drawn" else None
    for modality, item in (("text", reply.text), ("image", from_pool)):
        if item is not None:
            yield from [c.id for c in reply.candidates if c.modality == modality][:1]


def _share(score: float, low: float, high: float) -> float:
    return 100 if high == low else 12 + 88 * (score - low) / (high - low)


def _row(candidate: Any, used: bool, share: float) -> str:
    if candidate.modality == "image":
        name = name_of(candidate.id)
        item = f"{picture(Picture(name, candidate.item), THUMBNAIL, '')}<span>{escape(name)}</span>"
    else:
        item = f"<span>{escape(candidate.item)}</span>"
    mark = '<span class="u-mark">in the reply</span>' if used else ""
    return (
        f'<li class="u-row{" u-used" if used else ""}" data-id="{escape(candidate.id)}" title="score '
        f'{candidate.score:.3f}"><div class="u-item">{item}{mark}</div>'
        f'<div class="u-bar" aria-hidden="true"><i style="width:{share:.0f}%"></i></div></li>'
    )


def pool_line(counts: dict[str, int], uploads: int) -> str:
    """How large the visitor's pool is."""
    yours = f", {uploads} of them yours" if uploads else ""
    return f'<p class="u-size">{counts["image"]:,} pictures{yours} and {counts["text"]:,} texts are searched.</p>'


def counter(length: int) -> str:
    """How many characters of a turn are used; nothing while there are few. The page's script writes the same."""
    over = " u-over" if length > MAX_TEXT else ""
    return f'<span class="u-count{over}">{length:,} of {MAX_TEXT:,} characters</span>'


def picture(drawn: Picture, side: int, alt: str) -> str:
    """An `img` of at most `side` pixels; small pictures keep their pixels crisp."""
    crisp = ' class="u-crisp"' if max(drawn.image.size) <= 128 else ""
    return f'<img{crisp} src="{_data(drawn.image, side)}" alt="{escape(alt)}">'


def _data(image: Image.Image, side: int) -> str:
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    if max(small.size) <= 128:
        small.save(buffer, "PNG")
        kind = "png"
    else:
        small.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
