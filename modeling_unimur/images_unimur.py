"""The one guarded place where an untrusted image becomes an RGB picture."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20


class BadImageError(ValueError):
    """An image that cannot be used; `reason` is a short name to count it by."""

    def __init__(self, message: str, reason: str = "undecodable"):
        super().__init__(message)
        self.reason = reason


def decode_image(source: Any, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """
    Decodes an image, bounded in bytes and pixels before anything is decoded.

    Transparency is composed on white, 16-bit grey is scaled rather than clipped, EXIF orientation is applied, and of an
    animation the first frame is taken.

    Args:
        source: a path, encoded `bytes`, a `PIL.Image.Image`, or datasets' undecoded `{"bytes", "path"}`.
        max_pixels: width times height allowed.
        max_bytes: encoded size allowed.

    Returns:
        RGB image.

    Raises:
        BadImageError: `reason` is one of `missing`, `empty`, `too_many_bytes`, `too_many_pixels`, `undecodable`,
            `truncated`.
        ValueError: `source` is a URL, or of a type that is no image.
    """
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        return _to_rgb(_bounded(source, "an image in memory", max_pixels))
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name.startswith(("http://", "https://", "data:")):
            raise ValueError(f"{name[:80]!r} is a URL, which is never fetched here: open it yourself and pass the image")
        path = Path(name)
        if not path.is_file():
            raise BadImageError(f"{name!r} does not exist: expected an image file", "missing")
        if path.stat().st_size > max_bytes:
            raise BadImageError(f"{name!r} has {path.stat().st_size} bytes, more than {max_bytes}", "too_many_bytes")
        data = path.read_bytes()
    elif isinstance(source, bytes):
        name, data = "the given bytes", source
    else:
        raise ValueError(f"expected a path, bytes or PIL.Image, got {type(source).__name__}")
    if not data:
        raise BadImageError(f"{name!r} is empty: expected an encoded image", "empty")
    if len(data) > max_bytes:
        raise BadImageError(f"{name!r} has {len(data)} bytes, more than {max_bytes}", "too_many_bytes")
    try:
        image = _bounded(Image.open(io.BytesIO(data)), name, max_pixels)
        image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        reason = "too_many_pixels" if isinstance(error, Image.DecompressionBombError) else "undecodable"
        raise BadImageError(f"{name!r} is not an image that can be decoded: {error}", reason) from error
    except BadImageError:
        raise
    except (OSError, ValueError) as error:
        reason = "truncated" if "truncated" in str(error) else "undecodable"
        raise BadImageError(f"{name!r} could not be decoded: {error}", reason) from error
    return _to_rgb(image)


def _bounded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"{name!r} is {width}x{height}, more than {max_pixels} pixels: reduce it first", "too_many_pixels")
    if not width * height:
        raise BadImageError(f"{name!r} is {width}x{height}: it has no pixels", "empty")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16 bits are the usual range; a float picture is taken to span its own.
        top = 65535.0 if image.mode != "F" else max(float(values.max()), 1.0)
        return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
