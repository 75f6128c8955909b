"""Every image that arrives from outside: decoded to RGB, or refused by a named reason."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from modeling_unimur.images_unimur import BadImageError, decode_image, image_files, image_reference
from tests.conftest import picture
from tests.tiny import make_processor


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


def reason(source, **bounds):
    with pytest.raises(BadImageError) as caught:
        decode_image(source, **bounds)
    return caught.value.reason


JPEG = encoded(Image.effect_noise((128, 128), 80), "JPEG")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "undecodable"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (huge_png(12_000, 8_000), "too_many_pixels"),
        (huge_png(40_000, 40_000), "too_many_pixels"),
        (huge_png(1, 60_000), "too_narrow"),
        (huge_png(15_000_000, 1), "too_narrow"),
    ],
)
def test_bad_bytes(tmp_path, data, expected):
    (tmp_path / "x.img").write_bytes(data)
    for source in (data, bytearray(data), tmp_path / "x.img", {"bytes": data, "path": None}):
        assert reason(source) == expected
    for source in (tmp_path / "x.img", {"bytes": data, "path": "x.img"}):
        with pytest.raises(BadImageError, match=r"x\.img"):
            decode_image(source)


def test_bounds_hold_before_anything_is_decoded(tmp_path, monkeypatch):
    def decoded(*args):
        raise AssertionError("decoded")

    (tmp_path / "x.png").write_bytes(encoded(picture(1)))
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_bytes", decoded)
        assert reason(tmp_path / "x.png", max_bytes=10) == reason(JPEG, max_bytes=10) == "too_many_bytes"
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert reason(tmp_path / "x.png", max_pixels=40 * 30 - 1) == reason(picture(1), max_pixels=10) == "too_many_pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(huge_png(12_000, 8_000)) == "too_many_pixels"
    assert reason(Image.open(io.BytesIO(encoded(Image.new("L", (1, 101)))))) == "too_narrow"


def test_just_within_the_bounds():
    data = encoded(picture(1))
    assert decode_image(data, max_pixels=40 * 30, max_bytes=len(data)).size == (40, 30)
    assert decode_image(encoded(Image.new("L", (100, 1)))).size == (100, 1)


def test_absence_has_its_reason(tmp_path):
    for absent in (None, {"bytes": None, "path": None}, tmp_path / "no.png", tmp_path, tmp_path / "a\0b"):
        assert reason(absent) == "missing"
    assert reason("a" * 5000) == "unreadable"
    assert reason(Image.new("RGB", (0, 3))) == "empty"


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "HTTP://a/b", "s3://a/b.png", "data:image/png;base64,xx"]
)
def test_a_url_is_never_fetched(url):
    for source in (url, {"bytes": None, "path": url}):
        with pytest.raises(ValueError, match="is a URL: servers and readers fetch none") as caught:
            decode_image(source)
        assert not isinstance(caught.value, BadImageError)  # a wrong set-up, not one bad pair among good ones


def test_what_is_no_image_is_named():
    with pytest.raises(ValueError, match="got int"):
        decode_image(3)


def test_an_image_opened_but_not_loaded_is_guarded_too():
    assert reason(Image.open(io.BytesIO(JPEG[: len(JPEG) // 2]))) == "truncated"


def test_formats_that_run_programs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(BadImageError, match="not an image of a format that is read here"):
        decode_image(postscript)
    with pytest.raises(BadImageError, match="is EPS, which is not read here"):
        decode_image(Image.open(io.BytesIO(postscript)))


def test_a_format_that_is_decoded_on_opening_is_not_opened(monkeypatch):
    icon, opened = encoded(Image.new("RGB", (16, 16)), "ICO"), []
    monkeypatch.setattr("PIL.IcoImagePlugin.IcoImageFile._open", opened.append)
    with pytest.raises(BadImageError, match=r"PNG.*: convert it"):
        decode_image(icon)
    assert not opened


def test_every_format_is_read():
    for kind in ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "JPEG2000", "PPM", "TIFF"):
        more = {"save_all": True, "append_images": [picture(2)]} if kind == "MPO" else {}
        data = encoded(picture(1), kind, **more)
        assert Image.open(io.BytesIO(data)).format == kind
        assert decode_image(data).size == (40, 30)


def test_broken_bytes_raise_nothing_else():
    noise = Image.effect_noise((24, 24), 80)
    whole = [encoded(noise, kind) for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG")]
    rng = np.random.default_rng(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(700):
            data = bytearray(whole[turn % len(whole)])
            for at in rng.integers(0, min(len(data), 120), 4):
                data[at] = rng.integers(256)
            try:
                assert decode_image(data).mode == "RGB"
            except BadImageError:
                refused += 1
    assert refused > 100


def damaged(data, at, value):
    broken = bytearray(data)
    broken[at : at + len(value)] = value
    return bytes(broken)


def test_a_jpeg_damaged_within_is_refused():
    noise = Image.effect_noise((200, 150), 80)
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = encoded(noise, "JPEG", **options)
        assert decode_image(data + b"\0" * 50).size == (200, 150)  # cameras write behind the end
        middle = data.index(b"\xff\xda") + 600
        assert reason(damaged(data, middle, b"\xff\xa0")) == "damaged"  # a marker that cannot be there
        assert reason(damaged(data, middle, b"\xff\xd3")) == "damaged"  # a restart out of its order
        assert reason(data[:-2]) == reason(data[: len(data) * 2 // 3]) == "truncated"
    restarts = encoded(noise, "JPEG", restart_marker_rows=1)
    first, second = restarts.index(b"\xff\xd0"), restarts.index(b"\xff\xd1")
    assert reason(restarts[:first] + restarts[second:]) == "damaged"  # a row is lost


def test_what_pillow_is_asked_to_pass_over_is_refused_all_the_same(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.effect_noise((64, 64), 80), "PNG")
    assert reason(JPEG[: len(JPEG) // 2]) == "truncated"
    assert reason(whole[: len(whole) // 2]) in ("truncated", "damaged")


def test_a_png_damaged_within_is_refused():
    data = encoded(Image.effect_noise((64, 64), 80), "PNG")
    rng = np.random.default_rng(0)
    for at in rng.integers(50, len(data) - 20, 40):
        assert reason(damaged(data, at, bytes([data[at] ^ 64]))) in ("damaged", "truncated", "undecodable")


def bomb_of_text(kind):
    """A PNG of a few kilobytes with a text or a colour profile of 60 MB."""
    info, profile = PngImagePlugin.PngInfo(), None
    if kind == "zTXt":
        info.add_text("Comment", "a" * 60_000_000, zip=True)
    else:
        profile = b"a" * 60_000_000
    return encoded(picture(1), "PNG", pnginfo=info, **({"icc_profile": profile} if profile else {}))


@pytest.mark.parametrize("kind", ["zTXt", "iCCP"])
def test_bombs_beside_the_pixels_are_bounded(kind):
    data = bomb_of_text(kind)
    assert len(data) < 1_000_000
    tracemalloc.start()
    with contextlib.suppress(BadImageError):
        decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_an_animation_costs_its_first_frame(monkeypatch):
    frames = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(60)]
    for kind in ("WEBP", "GIF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **(
            {"lossless": True} if kind == "WEBP" else {}))  # fmt: skip
        assert Image.open(io.BytesIO(data)).n_frames == 60
        with monkeypatch.context() as patched:
            patched.setattr(type(Image.open(io.BytesIO(data))), "seek", lambda *args: pytest.fail("another frame"))
            assert decode_image(data).getpixel((5, 5)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"is HEIC, .*pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", r"is HEIC, .*pip install pillow-heif"),
        (b"\xff\x0a\xfa\x7f", r"is JPEG XL, .*convert it"),
        (b"<?xml version='1.0'?><svg xmlns='x'></svg>", r"is SVG, .*render it to PNG"),
    ],
)
def test_a_known_format_that_nothing_reads_names_what_would_help(data, message):
    with pytest.raises(BadImageError, match=message) as caught:
        decode_image(data)
    assert caught.value.reason == "unsupported"


def test_avif_is_read_or_names_the_pillow_that_would(monkeypatch):
    if features.check("avif"):
        data = encoded(picture(1), "AVIF")
        assert decode_image(data).size == (40, 30)
    else:
        data = b"\0\0\0\x1cftypavif\0\0\0\0"
    monkeypatch.setattr("modeling_unimur.images_unimur.FORMATS", ("JPEG", "PNG"))
    with pytest.raises(BadImageError, match=r"is AVIF, .*pillow>=11.3"):
        decode_image(data)


def test_heic_is_read_once_a_plugin_is_registered(monkeypatch):
    """Stands in for pillow-heif, which registers itself under this name."""

    class HeifFile(PngImagePlugin.PngImageFile):
        format = "HEIF"

    def open_as_png(file, name):
        return HeifFile(io.BytesIO(encoded(picture(1))))

    monkeypatch.setitem(Image.OPEN, "HEIF", (open_as_png, lambda start: start[4:12] == b"ftypheic"))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    assert decode_image(b"\0\0\0\x18ftypheic\0\0\0\0").tobytes() == picture(1).tobytes()


def test_pixels_as_an_array_are_an_image():
    colour = np.asarray(picture(1))
    for values in (colour, np.dstack([colour, np.full(colour.shape[:2], 255, np.uint8)])):
        assert decode_image(values).tobytes() == picture(1).tobytes()
    grey = colour[..., 0]
    assert np.array_equal(np.asarray(decode_image(grey))[..., 2], grey)
    assert np.array_equal(np.asarray(decode_image(grey[..., None]))[..., 1], grey)
    assert decode_image(image_reference(colour)).tobytes() == picture(1).tobytes()
    for values in (colour.astype(np.float32) / 255, colour[None], colour[..., :2], colour.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match="an image as an array is uint8"):
            decode_image(values)
    assert reason(np.zeros((0, 4, 3), np.uint8)) == "empty"


def test_the_images_of_a_folder_are_sorted_and_nested(tmp_path):
    for name in ("b/2.JPG", "a.webp", "b/1.heic", ".x.png", ".cache/y.png", "notes.txt", "noending"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.relative_to(tmp_path).as_posix() for file in image_files(tmp_path)] == [
        "a.webp",
        "b/1.heic",
        "b/2.JPG",
    ]


def test_the_reason_survives_a_process_and_another_message():
    with pytest.raises(BadImageError) as caught:
        decode_image("gone.png")
    error = pickle.loads(pickle.dumps(caught.value))  # as it leaves another process
    assert isinstance(error, BadImageError) and "gone.png" in str(error) and error.reason == "missing"
    with pytest.raises(BadImageError, match=r"^image 1: 'x' does not exist") as caught:
        make_processor().pixels([picture(1), "x"])
    assert caught.value.reason == "missing"


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


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_transparency_is_white(mode):
    clear = Image.new({"La": "LA", "RGBa": "RGBA"}[mode], (1, 1), 0).convert(mode)
    assert decode_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_keeps_its_colours():
    for kind in ("JPEG", "TIFF"):
        red = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)).getpixel((8, 8))
        assert np.abs(np.subtract(red, (255, 0, 0))).max() < 3


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    assert [decoded.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]
    wide = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))
    assert [decode_image(wide).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]
    assert decode_image(encoded(Image.fromarray(values), transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    floats = Image.fromarray(np.array([[0.0, 0.5, np.nan]], dtype=np.float32))
    assert [decode_image(floats).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 0]


def test_the_first_frame_of_an_animation():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    decoded = decode_image(encoded(red, "GIF", save_all=True, append_images=[blue], duration=100))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_is_an_image():
    assert decode_image(encoded(Image.new("RGB", (1, 1), "red"))).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    halves = Image.new("RGB", (40, 20), "blue")
    halves.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    decoded = decode_image(encoded(halves, "JPEG", exif=exif))
    assert decoded.size == (20, 40)
    assert decoded.getpixel((10, 5))[0] > 200 and decoded.getpixel((10, 35))[2] > 200


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "F", "HSV", "LAB", "La", "I;16", "P", "RGBA"])
def test_an_image_of_any_mode_is_kept_as_it_is_embedded(mode):
    image = picture(1).convert("LA" if mode == "La" else "I" if mode == "I;16" else "RGB")
    image = image.convert(mode) if mode != "LAB" else Image.new("LAB", (40, 30), (90, 20, 200))
    assert decode_image(image_reference(image)).tobytes() == decode_image(image).tobytes()


def test_an_image_is_kept_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture(1), "JPEG", exif=exif)))
    assert decode_image(image_reference(image)).size == (30, 40)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_encoded_bytes_of_any_kind_are_kept(kind):
    for image in (kind(JPEG), {"bytes": kind(JPEG), "path": None}):
        assert decode_image(image).size == (128, 128)
        assert image_reference(image) == {"bytes": JPEG, "path": None}


def test_the_given_image_is_left_alone():
    image = picture(1)
    decoded = decode_image(image)
    decoded.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == picture(1).getpixel((0, 0)) != (1, 2, 3)


def test_real_photos_decode(samples):
    photos = sorted((samples / "photos" / "images").iterdir())[:8]
    for photo in photos:
        with Image.open(photo) as expected:
            assert decode_image(photo).size == decode_image({"bytes": photo.read_bytes(), "path": None}).size
            assert set(decode_image(photo).size) == set(expected.size)
