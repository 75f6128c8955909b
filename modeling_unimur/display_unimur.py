"""Replies and pools as a person sees them: one line of text, or HTML with small pictures for a notebook."""

import base64
import html
import io
from collections.abc import Callable, Iterable

from PIL import Image

LARGE, SMALL = 256, 112  # pixels of a picture's longer side: the reply's own, and one of many
WIDTH = 60  # characters of a text in one line


def shortened(text: str, width: int = WIDTH) -> str:
    """A text as a quoted single line of about `width` characters."""
    return repr(text if len(text) <= width else f"{text[: width - 1]}…")


def thumbnail(image: Image.Image, side: int) -> str:
    """An RGB picture, its longer side at most `side` pixels, as a `data:` URL: PNG where it is that small, else JPEG."""
    small, kind = image.copy(), "PNG"
    if max(small.size) > side:
        small.thumbnail((side, side))
        kind = "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def figure(item: str | Callable[[], Image.Image], caption: str, side: int = SMALL) -> str:
    """
    HTML of a text, or of a picture that is decoded now; where that raises a `ValueError`, the reason is in its
    place. Every text is escaped.
    """
    if isinstance(item, str):
        body = f'<div style="width:{side}px;max-height:{side}px;overflow:auto">{html.escape(item)}</div>'
    else:
        try:
            body = f'<img src="{thumbnail(item(), side)}" alt="{html.escape(caption)}">'
        except ValueError as error:
            body = f'<div style="width:{side}px"><em>{html.escape(str(error))}</em></div>'
    return (
        '<figure style="display:inline-block;vertical-align:top;margin:0 12px 8px 0;text-align:left">'
        f'{body}<figcaption style="font-size:80%;opacity:.7">{html.escape(caption)}</figcaption></figure>'
    )


def gallery(heading: str, figures: Iterable[str]) -> str:
    """HTML of a heading, which is escaped, above figures of `figure`."""
    return f"<div><div>{html.escape(heading)}</div>{''.join(figures)}</div>"
