import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from snail.datasets.drawing import draw_glyphs


@pytest.fixture(scope="module")
def glyphs() -> npt.NDArray[np.uint8]:
    return draw_glyphs(200, 6, seed=3)


def test_draw_glyphs_gives_bytes_of_the_asked_shape() -> None:
    images = draw_glyphs(3, 2, seed=0, size=20)
    assert images.shape == (3, 2, 20, 20)
    assert images.dtype == np.uint8


def test_draw_glyphs_gives_the_same_bits_everywhere() -> None:
    digest = hashlib.sha256(draw_glyphs(40, 3, seed=7, first=5).tobytes()).hexdigest()
    assert digest == "9a0c0c2ce3624231b4c12c7a9eda758e9532ba25ac8de3296339ae125e80928f"


def test_draw_glyphs_does_not_depend_on_how_much_is_asked(glyphs: npt.NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(draw_glyphs(9, 6, seed=3), glyphs[:9])
    np.testing.assert_array_equal(draw_glyphs(9, 1, seed=3), glyphs[:9, :1])
    np.testing.assert_array_equal(draw_glyphs(20, 2, seed=3, first=180), glyphs[180:, :2])
    # More drawings than are inked, or classes than are planned, at a time.
    many = draw_glyphs(2, 5000, seed=3, size=8)
    np.testing.assert_array_equal(many[:, :6], draw_glyphs(2, 6, seed=3, size=8))


def test_draw_glyphs_differs_between_seeds_and_classes(glyphs: npt.NDArray[np.uint8]) -> None:
    other = draw_glyphs(200, 6, seed=4)
    assert (glyphs != other).any(axis=(2, 3)).all()
    assert (glyphs[1:] != glyphs[:-1]).any(axis=(2, 3)).all()


def test_draw_glyphs_never_repeats_a_drawing(glyphs: npt.NDArray[np.uint8]) -> None:
    assert len({drawing.tobytes() for drawing in glyphs.reshape(-1, 28, 28)}) == 200 * 6


def test_draw_glyphs_is_a_letter_not_a_dot_nor_a_blot(glyphs: npt.NDArray[np.uint8]) -> None:
    ink = glyphs.astype(np.float64).mean(axis=(2, 3)) / 255
    assert ink.min() > 0.03
    assert ink.max() < 0.35
    assert (glyphs.max(axis=(2, 3)) == 255).all()
    rows, columns = (glyphs > 127).any(axis=3).sum(axis=2), (glyphs > 127).any(axis=2).sum(axis=2)
    assert np.maximum(rows, columns).min() >= 12


def test_draw_glyphs_keeps_the_ink_off_the_edge(glyphs: npt.NDArray[np.uint8]) -> None:
    edge = np.ones((28, 28), bool)
    edge[1:-1, 1:-1] = False
    assert glyphs[:, :, edge].max() < 128


@pytest.mark.parametrize("size", [8, 56])
def test_draw_glyphs_draws_the_same_letters_at_any_size(glyphs: npt.NDArray[np.uint8], size: int) -> None:
    ink = draw_glyphs(20, 6, seed=3, size=size).astype(np.float64).mean(axis=(2, 3))
    np.testing.assert_allclose(ink, glyphs[:20].astype(np.float64).mean(axis=(2, 3)), rtol=0.25)


def test_draw_glyphs_is_hard_for_nearest_pixels_but_not_random(glyphs: npt.NDArray[np.uint8]) -> None:
    rng = np.random.default_rng(0)
    pixels = glyphs.reshape(200, 6, -1).astype(np.float64)
    right = []
    for _ in range(400):  # 5-way 1-shot episodes with one query a class
        episode = pixels[rng.choice(200, 5, replace=False)]
        distance = ((episode[:, None, 1] - episode[None, :, 0]) ** 2).sum(axis=2)
        right.append(distance.argmin(axis=1) == np.arange(5))
    assert 0.35 < np.mean(right) < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "got 0 and 1"),
        ({"drawings": -1}, "got 1 and -1"),
        ({"size": 7}, "size must be at least 8 pixels, got 7"),
        ({"seed": -1}, "got -1 and 0"),
        ({"seed": 2**64}, "fit in 64 bits"),
        ({"first": -2}, "got 0 and -2"),
    ],
)
def test_draw_glyphs_rejects_arguments_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_glyphs(**{"classes": 1, "drawings": 1, "seed": 0} | arguments)
