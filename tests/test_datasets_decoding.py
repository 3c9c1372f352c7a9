import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snail.datasets.decoding import EXTENSIONS, ink_of, open_picture, pixels_of, resized

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NOISE = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def levels(picture: Image.Image) -> Any:
    return np.asarray(picture).tolist()


def one_colour(mode: str, colour: Any, size: tuple[int, int] = (3, 3)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_picture_is_opened_from_a_file_and_from_bytes(tmp_path: Path, kind: str) -> None:
    content = encoded(Image.fromarray(NOISE), kind)
    file = tmp_path / "picture"
    file.write_bytes(content)
    for source in (file, content):
        np.testing.assert_array_equal(np.asarray(open_picture(source)), NOISE)


def test_a_picture_is_read_at_once_and_its_file_closed(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(NOISE).save(file)
    picture = open_picture(file)
    file.unlink()
    np.testing.assert_array_equal(np.asarray(picture), NOISE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_a_picture_is_turned_as_its_camera_says(orientation: int, upright: Any, kind: str) -> None:
    picture = Image.fromarray(NOISE)
    with Image.open(io.BytesIO(encoded(picture, kind))) as stored:  # a JPEG is not what it was made of
        expected = upright(np.asarray(stored))
    exif = picture.getexif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(open_picture(encoded(picture, kind, exif=exif))), expected)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [one_colour("RGB", colour) for colour in (RED, GREEN, BLUE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert levels(resized(open_picture(content), 1, mode="RGB", crop=False)) == [[list(RED)]]


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", encoded(Image.fromarray(NOISE))[:60], encoded(Image.fromarray(NOISE), "JPEG")[:-300]],
    ids=["empty", "text", "half-a-png", "half-a-jpeg"],
)
def test_a_file_that_is_no_picture_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "odd.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.png cannot be read as a picture \(\w+: .*\)$"):
        open_picture(file)
    with pytest.raises(ValueError, match=rf"^a picture of {len(content)} bytes cannot be read as a picture"):
        open_picture(content)


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.png cannot be read as a picture \(FileNotFoundError"):
        open_picture(tmp_path / "absent.png")


def test_extensions_are_in_lower_case_and_pillows() -> None:
    Image.init()
    assert set(Image.registered_extensions()) >= EXTENSIONS
    assert all(extension == extension.lower() for extension in EXTENSIONS)


def palette(transparent: bool) -> Image.Image:
    """Two colours; the second is transparent if asked for."""
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    return open_picture(encoded(picture, transparency=1) if transparent else encoded(picture))


@pytest.mark.parametrize(
    ("picture", "colours"),
    [
        pytest.param(one_colour("RGB", (1, 2, 3), (2, 2)), [(1, 2, 3)] * 4, id="rgb"),
        pytest.param(one_colour("RGBA", (*RED, 255), (2, 2)), [RED] * 4, id="rgba-opaque"),
        pytest.param(one_colour("RGBA", (*RED, 0), (2, 2)), [WHITE] * 4, id="rgba-transparent"),
        pytest.param(one_colour("RGBA", (255, 0, 100, 51), (2, 2)), [(255, 204, 224)] * 4, id="rgba-a-fifth"),
        pytest.param(one_colour("LA", (0, 255), (2, 2)), [BLACK] * 4, id="la-opaque"),
        pytest.param(one_colour("LA", (0, 51), (2, 2)), [(204,) * 3] * 4, id="la-a-fifth"),
        pytest.param(one_colour("L", 100, (2, 2)), [(100,) * 3] * 4, id="grey"),
        pytest.param(one_colour("1", 1, (2, 2)), [WHITE] * 4, id="bit-1"),
        pytest.param(one_colour("1", 0, (2, 2)), [BLACK] * 4, id="bit-0"),
        pytest.param(one_colour("CMYK", (0, 0, 0, 0), (2, 2)), [WHITE] * 4, id="cmyk-paper"),
        pytest.param(one_colour("CMYK", (0, 255, 255, 0), (2, 2)), [RED] * 4, id="cmyk-red"),
        pytest.param(one_colour("CMYK", (0, 0, 0, 255), (2, 2)), [BLACK] * 4, id="cmyk-black"),
        pytest.param(one_colour("I;16", 0x80FF, (2, 2)), [(0x80,) * 3] * 4, id="16-bit"),
        pytest.param(one_colour("I;16", 0xFFFF, (2, 2)), [WHITE] * 4, id="16-bit-white"),
        pytest.param(one_colour("I;16B", 0x80FF, (2, 2)), [(0x80,) * 3] * 4, id="16-bit-big-endian"),
        pytest.param(one_colour("I", 0x80FF, (2, 2)), [(0x80,) * 3] * 4, id="32-bit-of-16"),
        pytest.param(one_colour("I", 100, (2, 2)), [(100,) * 3] * 4, id="32-bit-of-8"),
        pytest.param(one_colour("HSV", (0, 255, 255), (2, 2)), [RED] * 4, id="hsv"),
    ],
)
def test_every_kind_of_picture_becomes_colours_on_white(picture: Image.Image, colours: list[tuple[int, ...]]) -> None:
    made = resized(picture, 2, mode="RGB", crop=False)
    assert made.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(made).reshape(4, 3), colours)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_come_from_a_file_as_their_upper_eight(kind: str) -> None:
    wide = np.array([[0, 255, 256], [0x7FFF, 0x8000, 0xFFFF], [300, 3000, 30000]], dtype=np.uint16)
    made = resized(open_picture(encoded(Image.fromarray(wide), kind)), 3, mode="L", crop=False)
    np.testing.assert_array_equal(np.asarray(made), wide >> 8)


def test_sixteen_bits_of_grey_are_kept_where_one_level_is_transparent() -> None:
    wide = np.full((2, 2), 30000, dtype=np.uint16)
    made = resized(open_picture(encoded(Image.fromarray(wide), transparency=5)), 2, mode="L", crop=False)
    np.testing.assert_array_equal(np.asarray(made), wide >> 8)


def test_a_palette_becomes_its_colours_and_its_transparent_one_white() -> None:
    for transparent, second in ((False, BLUE), (True, WHITE)):
        picture = palette(transparent)
        assert picture.mode == "P"
        made = resized(picture.crop((0, 0, 2, 1)), 2, mode="RGB", crop=False)
        assert levels(made)[0] == [list(RED), list(second)]


def test_a_transparent_colour_of_a_picture_without_an_alpha_channel_becomes_white() -> None:
    picture = open_picture(encoded(one_colour("RGB", BLUE), transparency=BLUE))
    assert picture.mode == "RGB"
    assert levels(resized(picture, 3, mode="RGB", crop=False)) == [[list(WHITE)] * 3] * 3


def test_grey_is_one_channel_of_brightness() -> None:
    made = resized(one_colour("RGB", GREEN), 3, mode="L", crop=False)
    assert made.mode == "L" and levels(made) == [[150] * 3] * 3  # 0.587 * 255
    assert levels(resized(one_colour("RGBA", (0, 0, 0, 0)), 3, mode="L", crop=False)) == [[255] * 3] * 3


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("size", [(84, 84), (85, 84), (1, 1), (20, 300), (300, 20), (500, 375), (84, 20)])
def test_every_size_becomes_a_square(size: tuple[int, int], crop: bool) -> None:
    made = resized(one_colour("RGB", (9, 90, 200), size), 84, mode="RGB", crop=crop)
    assert made.size == (84, 84)
    assert np.unique(np.asarray(made).reshape(-1, 3), axis=0).tolist() == [[9, 90, 200]]  # colours stay


@pytest.mark.parametrize("crop", [False, True])
def test_a_picture_of_the_right_size_stays_as_it_is(crop: bool) -> None:
    picture = Image.fromarray(NOISE[:4, :4])
    np.testing.assert_array_equal(np.asarray(resized(picture, 4, mode="RGB", crop=crop)), NOISE[:4, :4])


def thirds(lying: bool) -> Image.Image:
    """Red for a quarter, blue for the half in the middle, green for a quarter: twice as long as it is wide."""
    array = np.zeros((20, 40, 3), dtype=np.uint8)
    array[:, :10], array[:, 10:30], array[:, 30:] = RED, BLUE, GREEN
    return Image.fromarray(array if lying else array.transpose(1, 0, 2).copy())


@pytest.mark.parametrize("lying", [True, False])
def test_cropped_the_middle_square_is_left(lying: bool) -> None:
    made = np.asarray(resized(thirds(lying), 10, mode="RGB", crop=True))
    np.testing.assert_array_equal(made, np.broadcast_to(np.array(BLUE, np.uint8), (10, 10, 3)))


@pytest.mark.parametrize("lying", [True, False])
def test_squeezed_everything_is_left(lying: bool) -> None:
    made = np.asarray(resized(thirds(lying), 8, mode="RGB", crop=False))
    made = made if lying else made.transpose(1, 0, 2)
    np.testing.assert_array_equal(made, np.broadcast_to(np.array([RED] * 2 + [BLUE] * 4 + [GREEN] * 2), (8, 8, 3)))


@pytest.mark.parametrize("crop", [False, True])
def test_halves_stay_halves(crop: bool) -> None:
    array = np.zeros((30, 60), dtype=np.uint8)
    array[:, 30:] = 255
    made = np.asarray(resized(Image.fromarray(array), 10, mode="L", crop=crop))
    assert made[:, :5].max() == 0 and made[:, 5:].min() == 255


def test_shrunk_a_pixel_is_the_mean_of_those_it_stands_for() -> None:
    array = np.random.default_rng(0).integers(256, size=(12, 24), dtype=np.uint8)
    made = np.asarray(resized(Image.fromarray(array), 6, mode="L", crop=False)).astype(float)
    np.testing.assert_allclose(made, array.reshape(6, 2, 6, 4).mean((1, 3)), rtol=0, atol=1)  # rounded for each axis


def test_enlarged_there_are_levels_between_and_no_blocks() -> None:
    array = np.array([[0, 255], [0, 255]], dtype=np.uint8)
    row = np.asarray(resized(Image.fromarray(array), 12, mode="L", crop=False))[6]
    assert len(np.unique(row)) > 5 and (np.diff(row.astype(int)) >= 0).all()


def test_pixels_are_channels_by_height_by_width() -> None:
    np.testing.assert_array_equal(pixels_of(Image.fromarray(NOISE)), np.moveaxis(NOISE, 2, 0))
    grey = pixels_of(Image.fromarray(NOISE[:, :, 0]))
    assert grey.shape == (1, 4, 6) and grey.dtype == np.uint8
    np.testing.assert_array_equal(grey[0], NOISE[:, :, 0])


@pytest.mark.parametrize(
    ("mode", "paper", "ink"),
    [
        ("L", 255, 0),
        ("L", 0, 255),
        ("1", 1, 0),
        ("RGB", WHITE, BLACK),
        ("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)),
        ("LA", (0, 0), (0, 255)),
        ("I;16", 65535, 0),
    ],
)
def test_ink_is_255_on_0_whatever_it_was_drawn_with(mode: str, paper: Any, ink: Any) -> None:
    picture = Image.new(mode, (84, 84), paper)
    picture.paste(ink, (30, 30, 54, 54))
    made = np.asarray(ink_of(picture, 28))
    assert made.shape == (28, 28)
    assert made[11:17, 11:17].min() == 255 and made[:9].max() == made[:, 20:].max() == 0
