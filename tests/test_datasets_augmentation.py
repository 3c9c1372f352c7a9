import pytest
import torch
from torch import Tensor

from snail.datasets.augmentation import distort, mirror, recolour


def blob(count: int) -> Tensor:
    """Images ``(count, 1, 28, 28)`` with a soft spot off the centre."""
    place = torch.arange(28.0)
    spot = torch.exp(-((place - 9) ** 2).unsqueeze(1) / 8 - (place - 16) ** 2 / 8)
    return spot.expand(count, 1, 28, 28).clone()


def centre(images: Tensor) -> Tensor:
    """Where the mass of each image is, row and column: ``(count, 2)``."""
    mass, place = images.squeeze(1), torch.arange(28.0)
    return torch.stack([(mass.sum(2) * place).sum(1), (mass.sum(1) * place).sum(1)], 1) / mass.sum((1, 2)).unsqueeze(1)


def test_distort_leaves_images_as_they_are_at_strength_0() -> None:
    images = blob(3)
    assert torch.equal(distort(images, 0), images)


def test_distort_changes_each_image_in_its_own_way_and_little() -> None:
    torch.manual_seed(0)
    moved = centre(distort(blob(500))) - centre(blob(500))
    assert len({tuple(row) for row in moved.tolist()}) == 500
    assert moved.abs().max() < 5 and (moved.std(0) > 0.5).all() and (moved.mean(0).abs() < 0.3).all()
    torch.manual_seed(0)
    less = centre(distort(blob(500), 0.5)) - centre(blob(500))
    assert 0.4 < (less.std() / moved.std()) < 0.6


def test_distort_is_a_function_of_the_random_generator() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(distort(blob(2)))
    assert torch.equal(*states) and not torch.equal(distort(blob(2)), states[0])


def test_distort_keeps_any_leading_axes_and_colours_together() -> None:
    torch.manual_seed(0)
    images = blob(6).expand(6, 3, 28, 28).unflatten(0, (2, 3))
    changed = distort(images)
    assert changed.shape == (2, 3, 3, 28, 28)
    assert torch.equal(changed[:, :, 0], changed[:, :, 2])


def test_distort_refuses_a_negative_strength() -> None:
    with pytest.raises(ValueError, match="strength is -1; it must be at least 0"):
        distort(blob(1), -1)


def test_what_comes_in_from_outside_is_nothing_or_a_reflection() -> None:
    white = torch.ones(50, 1, 28, 28)
    assert distort(white).min() == 0
    torch.testing.assert_close(distort(white, outside="reflection"), white)


def test_mirror_turns_about_half_of_the_images_left_to_right_whole() -> None:
    torch.manual_seed(0)
    images = torch.rand(20, 10, 3, 4, 4)
    seen = mirror(images)
    same, turned = ((seen == each).flatten(2).all(-1) for each in (images, images.flip(-1)))
    assert (same ^ turned).all() and 80 < turned.sum() < 120


def test_recolour_changes_brightness_contrast_and_saturation_of_each_photograph_by_up_to_a_share() -> None:
    torch.manual_seed(0)
    grey = torch.full((200, 3, 4, 4), 0.5)
    shade = recolour(grey)
    assert torch.equal(shade, shade[:, :1, :1, :1].expand_as(shade))  # a grey wall stays one
    factor = shade[:, 0, 0, 0] / 0.5
    assert 0.6 <= factor.min() < 0.65 and 1.35 < factor.max() <= 1.4
    less = recolour(grey, 0.25)[:, 0, 0, 0] / 0.5
    assert 0.9 <= less.min() < 0.92 and 1.08 < less.max() <= 1.1

    images = 0.4 + 0.2 * torch.rand(200, 3, 4, 4)
    seen = recolour(images)
    spread = ((x - x.mean(-3, keepdim=True)).flatten(1).std(1) for x in (seen, images))  # of colours
    contrast = (x.mean(-3).flatten(1).std(1) for x in (seen, images))
    for new, old in (spread, contrast):
        assert 0.2 < (new / old).min() < 0.7 and 1.3 < (new / old).max() < 2.8
    bright = recolour(torch.rand(50, 2, 3, 4, 4))
    assert bright.min() >= 0 and bright.max() == 1  # no more than white
    assert recolour(torch.rand(2, 1, 4, 4)).shape == (2, 1, 4, 4)


def test_recolour_leaves_images_as_they_are_at_strength_0_and_refuses_less() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(recolour(images, 0), images)
    with pytest.raises(ValueError, match="strength is -1; it must be at least 0"):
        recolour(images, -1)
