"""The one guarded place where an untrusted image becomes an RGB picture."""

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .jpeg_unimur import jpeg_damage

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20
# CLIP's preprocessing enlarges the shorter side to its own size, and the longer one in proportion, before it crops.
MAX_ASPECT_RATIO = 100
# Pillow knows many more; among them EPS, which it hands to Ghostscript to run, and ICO, which it decodes on opening.
# AVIF is read from Pillow 11.3 on, HEIF where the package pillow-heif has registered itself.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "BMP", "DIB", "JPEG2000", "PPM", "TIFF")
# Endings that name an image file, lower case: what a folder is searched for.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".avif", ".heic", ".heif", ".bmp"}
    | {".dib", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"}
)
# What begins a file -> its format, and what reads it where Pillow does not.
ISO_BRANDS = {
    b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC",
    b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF",
}  # fmt: skip
REMEDIES = {
    "HEIC": "pip install pillow-heif, call pillow_heif.register_heif_opener() once, or convert it to PNG or JPEG",
    "AVIF": "pip install -U 'pillow>=11.3', or convert it to PNG or JPEG",
    "JPEG XL": "convert it to PNG or JPEG",
    "SVG": "it is a drawing without pixels: render it to PNG",
}


class BadImageError(ValueError):
    """An image that cannot be used; `reason` is a short name to count it by."""

    def __init__(self, message: str, reason: str = "undecodable"):
        super().__init__(message, reason)  # both in `args`, so that a copy with another message keeps its reason
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


def located(error: ValueError, where: str) -> ValueError:
    """An error with `where: ` in front of its message; of a [`BadImageError`] with its reason."""
    message = f"{where}: {error}"
    return BadImageError(message, error.reason) if isinstance(error, BadImageError) else ValueError(message)


def decode_image(source: Any, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """
    Decodes an image of one of `FORMATS`, bounded in bytes, pixels and shape before anything is decoded: its longer side
    is at most `MAX_ASPECT_RATIO` times its shorter one.

    Transparency is composed on white, 16-bit grey is scaled rather than clipped, EXIF orientation is applied, and of
    an animation the first frame is taken. Damage within a file is refused where its format shows it: in a PNG by the
    checksums, in a JPEG by its markers ([`jpeg_damage`]), in all by what their decoders report.

    Args:
        source: a path, encoded `bytes` (`bytearray`, `memoryview`), a `PIL.Image.Image`, pixels as a numpy array `(h, w)`
            or `(h, w, 1 | 3 | 4)` uint8, or datasets' undecoded `{"bytes", "path"}`.
        max_pixels: width times height allowed.
        max_bytes: encoded size allowed.

    Returns:
        RGB image, never `source` itself.

    Raises:
        BadImageError: `reason` is one of `missing` (`None` included), `unreadable`, `empty`, `too_many_bytes`,
            `too_many_pixels`, `too_narrow`, `unsupported` (a known format that nothing installed reads), `undecodable`,
            `truncated`, `damaged`.
        ValueError: `source` is a URL, or of a type that is no image.
    """
    name = "the given image"
    if isinstance(source, dict):
        name = source.get("path") or name
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise BadImageError(f"{name!r} is missing: expected a path, bytes or PIL.Image, got None", "missing")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        source = _read(name, max_bytes)
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise BadImageError(f"{name!r} is empty: expected an encoded image", "empty")
        _check_bytes(len(source), name, max_bytes)
    elif isinstance(source, np.ndarray):
        source = _from_array(source)
    elif not isinstance(source, Image.Image):
        raise ValueError(f"expected a path, bytes, PIL.Image or uint8 array, got {type(source).__name__}")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=_formats())
        _check_header(image, name, max_pixels)
        if not isinstance(source, Image.Image):
            _check_whole(image, source, name)
        image.load()
        return _to_rgb(image)
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"{name!r} is too large to decode ({error}): reduce it", "too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise _unidentified(source, name) from error
    except Exception as error:  # each of Pillow's decoders raises its own kinds on broken data
        reason = "truncated" if "truncated" in str(error) else "undecodable"
        what = re.sub(r" <_io\.BytesIO.*>", "", str(error)) or type(error).__name__
        raise BadImageError(
            f"{name!r} is not an image that can be decoded ({what}): replace it or leave it out", reason
        ) from error


def is_image(value: Any) -> bool:
    """Whether [`decode_image`] takes a value of this type, a `str` aside, which in most places is words."""
    if isinstance(value, dict):
        return bool(value) and set(value) <= {"bytes", "path"}
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8 and value.ndim in (2, 3)
    return isinstance(value, Image.Image | os.PathLike | bytes | bytearray | memoryview)


def image_files(folder: str | os.PathLike) -> list[Path]:
    """
    The image files of a folder and of its sub-folders, by their endings (`SUFFIXES`), sorted by path. Hidden files and
    folders are left out; a link to a folder is not followed.

    Raises:
        ValueError: it holds none.
    """
    root = Path(folder)
    files = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(root)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES
        and not any(part.startswith(".") for part in (*Path(parent).relative_to(root).parts, name))
    )
    if not files:
        raise ValueError(f"the folder {os.fspath(folder)!r} holds no image file ({', '.join(sorted(SUFFIXES))})")
    return files


def image_reference(image: Any) -> dict[str, Any]:
    """
    An image as datasets keeps it undecoded, `{"bytes", "path"}`: a path stays one, and a `PIL.Image` becomes the PNG of
    what `decode_image` makes of it. Raises as that does.
    """
    if isinstance(image, dict):
        data = image.get("bytes")
        return {"bytes": None if data is None else bytes(data), "path": image.get("path")}
    if isinstance(image, bytes | bytearray | memoryview):
        return {"bytes": bytes(image), "path": None}
    if isinstance(image, str | os.PathLike):
        return {"bytes": None, "path": str(Path(image).absolute())}
    buffer = io.BytesIO()
    decode_image(image).save(buffer, "PNG")  # a PNG can hold neither CMYK nor most other modes
    return {"bytes": buffer.getvalue(), "path": None}


def image_file_bytes(path: str | os.PathLike) -> bytes:
    """
    The encoded bytes of an image file, of which the header alone is looked at: what `decode_image` would refuse by its
    format, bytes, pixels or shape raises a [`BadImageError`] here, too.
    """
    name = os.fspath(path)
    data = _read(name, MAX_BYTES)
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_header(image, name, MAX_PIXELS)
    except BadImageError:
        raise
    except Exception as error:  # each of Pillow's readers raises its own kinds
        raise BadImageError(f"{name!r} is not an image of a format that is read here: it is not copied") from error
    return data


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # MPO is JPEG's to open; an old Pillow has no AVIF


def _from_array(values: np.ndarray) -> Image.Image:
    if values.dtype != np.uint8 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))):
        raise ValueError(
            f"an image as an array is uint8, (h, w) or (h, w, 1 | 3 | 4); got {values.dtype} {values.shape}: scale its "
            "values to 0..255 and put the channels last"
        )
    if not values.size:
        raise BadImageError(f"the given image is an array of shape {values.shape}: it has no pixels", "empty")
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def _read(name: str, max_bytes: int) -> bytes:
    if re.match(r"[a-z][a-z0-9+.-]*://|data:", name, re.IGNORECASE):
        raise ValueError(
            f"{name[:80]!r} is a URL: servers and readers fetch none, so open it yourself and pass the image"
        )
    path = Path(name)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadImageError(f"{name!r} is not a file: expected an image file", "missing")
        _check_bytes(size, name, max_bytes)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImageError(f"{name!r} does not exist: expected an image file", "missing") from error
    except OSError as error:
        message = f"{name[:200]!r} cannot be read ({error.strerror}): check the path"
        raise BadImageError(message, "unreadable") from error
    except BadImageError:
        raise
    except ValueError as error:  # a null character
        raise BadImageError(f"{name!r} is no path: expected an image file", "missing") from error


def _check_bytes(size: int, name: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise BadImageError(f"{name!r} has {size} bytes, more than {max_bytes}: reduce it first", "too_many_bytes")


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if image.format not in (None, *FORMATS):
        raise BadImageError(f"{name!r} is {image.format}, which is not read here: convert it to PNG or JPEG")
    if width * height > max_pixels:
        raise BadImageError(
            f"{name!r} is {width}x{height}, more than {max_pixels} pixels: reduce it first", "too_many_pixels"
        )
    if not width * height:
        raise BadImageError(f"{name!r} is {width}x{height}: it has no pixels", "empty")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadImageError(
            f"{name!r} is {width}x{height}, one side more than {MAX_ASPECT_RATIO} times the other: crop it first",
            "too_narrow",
        )


def _check_whole(image: Image.Image, data: bytes | bytearray | memoryview, name: str) -> None:
    """Refuses an encoded file that is damaged where its decoder would continue with grey or with noise."""
    if image.format == "PNG":
        try:
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()  # the checksums, which load() does not read
        except Exception as error:
            reason = "truncated" if "truncated" in str(error) else "damaged"
            raise BadImageError(f"{name!r} is a damaged PNG ({error}): replace it or leave it out", reason) from error
    elif image.format in ("JPEG", "MPO"):
        damage = jpeg_damage(bytes(data))
        if damage is not None:
            reason = "truncated" if "ends" in damage else "damaged"
            raise BadImageError(f"{name!r} is a damaged JPEG ({damage}): replace it or leave it out", reason)


def _unidentified(source: Any, name: str) -> BadImageError:
    kind = _known_format(bytes(source[:256])) if isinstance(source, bytes | bytearray | memoryview) else None
    if kind is not None:
        return BadImageError(f"{name!r} is {kind}, which is not read here: {REMEDIES[kind]}", "unsupported")
    return BadImageError(
        f"{name!r} is not an image of a format that is read here ({', '.join(FORMATS)}): convert it to PNG or JPEG"
    )


def _known_format(start: bytes) -> str | None:
    """The format, of `REMEDIES`, whose files begin this way."""
    if start[4:8] == b"ftyp":
        return ISO_BRANDS.get(start[8:12])
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    return "SVG" if b"<svg" in start else None


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        # 16 bits are the usual range; a float picture, or an integer one beyond 16 bits, is taken to span its own.
        top = max(float(values.max()), 1.0 if image.mode == "F" else 65535.0)
        if isinstance(image.info.get("transparency"), int):
            values[values == image.info["transparency"]] = top
        return Image.fromarray(np.clip(values / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
