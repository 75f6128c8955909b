"""Every image that arrives from outside: decoded to RGB, or refused by a named reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from modeling_unimur.images_unimur import BadImageError, decode_image
from tests.conftest import picture


def encoded(image, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def huge_png(width, height):
    """The header of a PNG of that size: cheap to make, dear to decode."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )


JPEG = encoded(Image.effect_noise((128, 128), 80), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "undecodable"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (huge_png(12_000, 8_000), "too_many_pixels"),
        (huge_png(40_000, 40_000), "too_many_pixels"),
    ],
)
def test_bad_bytes(tmp_path, data, reason):
    (tmp_path / "x.img").write_bytes(data)
    for source in (data, tmp_path / "x.img", {"bytes": data, "path": None}):
        with pytest.raises(BadImageError) as caught:
            decode_image(source)
        assert caught.value.reason == reason
    assert "x.img" in str(pytest.raises(BadImageError, decode_image, tmp_path / "x.img").value)


def test_bounds_and_absence(tmp_path):
    assert pytest.raises(BadImageError, decode_image, tmp_path / "no.png").value.reason == "missing"
    assert pytest.raises(BadImageError, decode_image, JPEG, max_bytes=10).value.reason == "too_many_bytes"
    assert pytest.raises(BadImageError, decode_image, picture(1), max_pixels=10).value.reason == "too_many_pixels"
    for bad in ("https://example.org/a.png", "data:image/png;base64,xx"):
        with pytest.raises(ValueError, match="is a URL"):
            decode_image(bad)
    with pytest.raises(ValueError, match="got int"):
        decode_image(3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_modes_become_rgb(mode):
    image = picture(2).convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB" and decoded.size == image.size
    if mode in ("P", "RGBA"):
        assert np.abs(np.asarray(decoded, int) - np.asarray(image.convert("RGB"), int)).max() < 3


def test_transparency_is_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    decoded = decode_image(encoded(image))
    assert decoded.getpixel((0, 0)) == (255, 0, 0) and decoded.getpixel((1, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert decode_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    assert [decoded.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_the_first_frame_of_an_animation():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    decoded = decode_image(encoded(red, "GIF", save_all=True, append_images=[blue], duration=100))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_and_orientation():
    assert decode_image(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(picture(1, (40, 20)), "JPEG", exif=exif)).size == (20, 40)
