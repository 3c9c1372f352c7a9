import pytest
import torch
from torch import Tensor

from snail.datasets.augmentation import distort


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
