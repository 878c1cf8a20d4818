"""Every kind of image that Pillow opens becomes what a viewer shows, or is refused with the record's name."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from vlm_jax.data.picture import Picture
from vlm_jax.data.transforms import centre_box, random_box, resample, whole_box
from vlm_jax.errors import UserError


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(mode: str, *values) -> Image.Image:
    """An image of one row."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def png(width: int, height: int, depth: int, color: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose rows are all the same, of kinds that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress((b"\0" + row) * height)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def picture(content: bytes) -> Picture:
    return Picture(content, "record 7 of birds")


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PALETTE = (b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
INDEXED = pixels("P", 0, 1)
INDEXED.putpalette(PALETTE[1])
FRAMES = [pixels("RGB", (255, 0, 0), (0, 0, 255)), pixels("RGB", WHITE, BLACK)]
KINDS = {
    "bilevel": (png(8, 1, 1, 0, b"\xc0"), [WHITE] * 2 + [BLACK] * 6),
    "bilevel with a transparent colour": (png(2, 1, 1, 0, b"\x00", (b"tRNS", b"\0\0")), [WHITE] * 2),
    "grey of 2 bits": (png(4, 1, 2, 0, b"\x1b"), [BLACK, (85,) * 3, (170,) * 3, WHITE]),
    "grey of 4 bits": (png(2, 1, 4, 0, b"\x6f"), [(102,) * 3, WHITE]),
    "grey": (encoded(pixels("L", 0, 7, 255)), [BLACK, (7,) * 3, WHITE]),
    "grey with a transparent colour": (png(2, 1, 8, 0, b"\5\6", (b"tRNS", b"\0\5")), [WHITE, (6,) * 3]),
    "grey of 16 bits": (png(3, 1, 16, 0, struct.pack(">3H", 0x12FF, 0xFF00, 255)), [(18,) * 3, WHITE, BLACK]),
    "grey and alpha": (encoded(pixels("LA", (0, 255), (0, 0), (100, 128))), [BLACK, WHITE, (177,) * 3]),
    "grey and alpha of 16 bits": (png(1, 1, 16, 4, struct.pack(">2H", 0x12FF, 0xFFFF)), [(18,) * 3]),
    "colour": (encoded(pixels("RGB", (1, 2, 3), WHITE)), [(1, 2, 3), WHITE]),
    "colour with a transparent colour": (
        encoded(pixels("RGB", (1, 2, 3), (4, 5, 6)), transparency=(1, 2, 3)),
        [WHITE, (4, 5, 6)],
    ),
    "colour of 16 bits": (png(1, 1, 16, 2, struct.pack(">3H", 0x12FF, 0xFF00, 255)), [(18, 255, 0)]),
    "colour and alpha": (
        encoded(pixels("RGBA", (9, 9, 9, 0), (9, 8, 7, 255), (200, 100, 0, 128))),
        [WHITE, (9, 8, 7), (227, 177, 127)],
    ),
    "colour and alpha of 16 bits": (png(1, 1, 16, 6, struct.pack(">4H", 0x12FF, 0xFF00, 255, 0xFFFF)), [(18, 255, 0)]),
    "palette": (png(2, 1, 8, 3, b"\1\0", PALETTE), [(40, 50, 60), (10, 20, 30)]),
    "palette of 1 bit": (png(2, 1, 1, 3, b"\x80", PALETTE), [(40, 50, 60), (10, 20, 30)]),
    "palette and alpha": (png(2, 1, 8, 3, b"\1\0", PALETTE, (b"tRNS", b"\0\xff")), [(40, 50, 60), WHITE]),
    "GIF, of which the first frame": (
        encoded(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]),
        [(255, 0, 0), (0, 0, 255)],
    ),
    "GIF with a transparent colour": (encoded(INDEXED, "gif", transparency=0), [WHITE, (40, 50, 60)]),
    "APNG, of which the first frame": (
        encoded(FRAMES[0], save_all=True, append_images=FRAMES[1:]),
        [(255, 0, 0), (0, 0, 255)],
    ),
    "WebP and alpha": (
        encoded(pixels("RGBA", (9, 9, 9, 0), (9, 8, 7, 255)), "webp", lossless=True),
        [WHITE, (9, 8, 7)],
    ),
    "BMP": (encoded(pixels("RGB", (1, 2, 3)), "bmp"), [(1, 2, 3)]),
    "JPEG": (encoded(Image.new("RGB", (8, 8), (200, 100, 50)), "jpeg"), [(200, 100, 50)]),
    "grey JPEG": (encoded(Image.new("L", (8, 8), 77), "jpeg"), [(77,) * 3]),
    "progressive JPEG": (encoded(Image.new("RGB", (8, 8), (200, 100, 50)), "jpeg", progressive=True), [(200, 100, 50)]),
    # Stored inverted, as Adobe does: no ink is white, key alone is black.
    "CMYK JPEG": (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "jpeg"), [WHITE]),
    "CMYK JPEG of cyan": (encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "jpeg"), [(0, 255, 255)]),
    "CMYK TIFF": (encoded(pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "tiff"), [(255, 0, 0), BLACK]),
    "YCbCr TIFF": (encoded(pixels("YCbCr", (255, 128, 128), (76, 85, 255)), "tiff"), [WHITE, (254, 0, 0)]),
    "LAB TIFF": (encoded(pixels("LAB", (255, 128, 128), (0, 128, 128)), "tiff"), [(254, 255, 254), (1, 0, 1)]),
}
REFUSED = {
    "32-bit integers": (encoded(pixels("I", 70000, 5), "tiff"), "it is a TIFF of mode I, where no value is known"),
    "16 bits in TIFF": (encoded(pixels("I;16", 7, 5), "tiff"), "it is a TIFF of mode I;16, where no value is known"),
    "floating point": (encoded(pixels("F", 0.5, 1.0), "tiff"), "it is a TIFF of mode F, where no value is known"),
    "grey of 2 bits with a transparent colour": (png(4, 1, 2, 0, b"\x1b", (b"tRNS", b"\0\1")), "unusual depth L;2"),
    "grey of 16 bits with a transparent colour": (
        png(1, 1, 16, 0, b"\x12\xff", (b"tRNS", b"\x12\xff")),
        "unusual depth I;16B",
    ),
    "colour of 16 bits with a transparent colour": (
        png(1, 1, 16, 2, b"\x12\xff" * 3, (b"tRNS", b"\x12\xff" * 3)),
        "unusual depth RGB;16B",
    ),
    "no pixels": (png(0, 1, 8, 0, b""), "no kind that Pillow knows"),
    "a GIF without pixels": (b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0;", "no kind that Pillow knows"),
    "a truncated PNG": (png(64, 64, 8, 0, bytes(range(64)))[:-30], "truncated"),
    "a truncated JPEG": (encoded(Image.effect_noise((64, 64), 50), "jpeg")[:-200], "truncated"),
    "a decompression bomb": (png(60_000, 60_000, 1, 0, b""), "decompression bomb"),
    "something else": (b"<svg/>", "no kind that Pillow knows"),
    "nothing": (b"", "no kind that Pillow knows"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_becomes_what_a_viewer_shows(kind):
    content, expected = KINDS[kind]
    shown = picture(content).pixels(3)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown[0, : len(expected)], expected)
    luma = np.asarray(expected) @ [0.299, 0.587, 0.114]
    assert abs(picture(content).pixels(1)[0, : len(expected), 0] - luma).max() <= 1


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_viewer_shows_is_refused_with_the_name_of_the_record(kind):
    content, reason = REFUSED[kind]
    for look in (lambda image: image.pixels(3), lambda image: image.view(2, 1, whole_box)):
        with pytest.raises(UserError, match=rf"record 7 of birds has an image that cannot be used \(.*({reason})"):
            look(picture(content))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "mpo"])
def test_images_stand_upright(kind, orientation):
    """Exif 2.32: which sides of the scene the first row and the first column of an image are."""
    row, column = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    scene = np.kron(np.array([[0, 80], [160, 240], [40, 120]], np.uint8), np.ones((16, 16), np.uint8))
    stored = scene if row in "tb" else scene.T
    stored = stored[:: -1 if row in "br" else 1, :: -1 if column in "br" else 1]
    exif = Image.Exif()
    exif[274] = orientation
    turned = picture(encoded(Image.fromarray(stored), kind, exif=exif))
    assert turned.pixels(1).shape == (48, 32, 1)
    np.testing.assert_allclose(turned.pixels(1)[8::16, 8::16, 0], scene[8::16, 8::16], atol=2)

    def lowest(height, width):
        return 0, height - 24, width, height

    np.testing.assert_allclose(turned.view(8, 1, lowest), resample(Image.fromarray(scene), lowest(48, 32), 8), atol=2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_turns_nothing():
    content = encoded(pixels("L", 30, 220), "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03")
    np.testing.assert_allclose(picture(content).pixels(1)[0, :, 0], [30, 220], atol=5)


def test_a_picture_between_pillows_two_limits_is_read(monkeypatch):
    """Pillow warns above one number of pixels and refuses above twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    content = encoded(Image.new("L", (8, 8), 9))
    with pytest.warns(Image.DecompressionBombWarning):
        assert picture(content).pixels(1).shape == (8, 8, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(UserError, match=r"record 7 of birds .*64 pixels\) exceeds limit of 60"):
        picture(content).pixels(1)


@pytest.fixture(scope="module")
def photograph() -> bytes:
    """640x427, with the chroma subsampled as cameras do it."""
    return encoded(Image.fromarray(load_sample_image("flower.jpg")), "jpeg", quality=90, subsampling=2)


def _plain(content: bytes, size: int, box) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)).astype(int)


@pytest.mark.parametrize("size", [16, 32, 53, 64, 106])
def test_a_jpeg_decoded_at_a_fraction_looks_like_one_decoded_whole(photograph, size):
    """At an eighth, a quarter and a half of its size, at most 14 of 255 away at the sharpest edges, 0.6 on average."""
    for choose in (partial(centre_box, size=size), lambda height, width: (100, 20, 500, 420)):
        error = np.abs(picture(photograph).view(size, 3, choose) - _plain(photograph, size, choose(427, 640)))
        assert error.max() <= 14
        assert error.mean() <= 0.6


def test_a_jpeg_keeps_two_pixels_for_each_of_the_result(photograph, monkeypatch):
    """So that small crops of large images are never scaled up from a thumbnail."""
    decoded = []
    resize = Image.Image.resize

    def noted(image, size, resample, box):
        decoded.append((image.size, box))
        return resize(image, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", noted)
    for side, expected in ((427, 2), (400, 2), (399, 1), (100, 1), (30, 1)):
        picture(photograph).view(100, 3, lambda height, width, side=side: (10, 0, 10 + side, side))
        (width, height), box = decoded.pop()
        assert (width, height) == (-(-640 // expected), -(-427 // expected))
        np.testing.assert_allclose(box, np.array([10, 0, 10 + side, side]) / expected)
    picture(photograph).view(8, 3, partial(centre_box, size=8))
    assert decoded.pop()[0] == (80, 54)


@pytest.mark.parametrize("content", ["jpeg", "png"])
def test_crops_are_of_the_box_that_was_drawn(photograph, content):
    """Also where a JPEG is decoded smaller: a box in the wrong place would be tens of levels away."""
    if content == "png":
        photograph = encoded(Image.open(io.BytesIO(photograph)))
    draws = partial(random_box, min_area=0.3)
    for seed in range(5):
        box = draws(427, 640, rng=np.random.default_rng(seed))
        seen = picture(photograph).view(48, 3, partial(draws, rng=np.random.default_rng(seed)))
        assert np.abs(seen - _plain(photograph, 48, box)).mean() <= (0.6 if content == "jpeg" else 0)


def test_grey_of_a_jpeg_is_its_luma(photograph):
    grey = picture(photograph).view(100, 1, whole_box)[..., 0]
    luma = picture(photograph).view(100, 3, whole_box) @ [0.299, 0.587, 0.114]
    assert np.abs(grey - luma).mean() < 0.7
