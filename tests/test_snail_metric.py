import pytest
import torch
from torch import Tensor, nn

from snail import EmbeddingLearner, Episode, NearestNeighbour
from snail.metric import prototype_logits

INF = float("inf")


def points(*rows: tuple[float, ...]) -> Tensor:
    """One episode of points, ``(1, items, 2)``."""
    return torch.tensor([rows], dtype=torch.float32)


def test_nearest_neighbour_answers_minus_the_least_distance_of_each_class() -> None:
    support, labels = points((0, 0), (3, 4), (10, 0), (6, 8)), torch.tensor([[0, 1, 0, 1]])
    logits = NearestNeighbour(2)(support, labels, points((0, 0), (9, 0), (6, 9)))
    expected = [[0.0, -5.0], [-1.0, -(52**0.5)], [-(97**0.5), -1.0]]
    torch.testing.assert_close(logits, torch.tensor([expected]))
    assert logits.argmax(dim=-1).tolist() == [[0, 0, 1]]


def test_nearest_neighbour_gives_minus_infinity_to_an_absent_class() -> None:
    logits = NearestNeighbour(3)(points((0, 0), (3, 4)), torch.tensor([[2, 0]]), points((0, 0)))
    assert logits.tolist() == [[[-5, -INF, 0]]]


def test_nearest_neighbour_keeps_episodes_apart() -> None:
    support = torch.cat([points((0, 0), (3, 4)), points((1, 1), (0, 0))])
    labels, query = torch.tensor([[0, 1], [0, 1]]), torch.cat([points((0, 0))] * 2)
    logits = NearestNeighbour(2)(support, labels, query)
    torch.testing.assert_close(logits, torch.tensor([[[0.0, -5.0]], [[-(2**0.5), 0.0]]]))


def test_nearest_neighbour_measures_in_the_embedding() -> None:
    first_channel = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        first_channel.weight.copy_(torch.tensor([[1.0, 0.0]]))
        logits = NearestNeighbour(2, first_channel)(points((0, 99), (3, 0)), torch.tensor([[0, 1]]), points((1, 0)))
    torch.testing.assert_close(logits, torch.tensor([[[-1.0, -2.0]]]))


def test_nearest_neighbour_compares_pixels_by_default() -> None:
    images = torch.zeros(1, 3, 1, 4, 4)
    images[0, 1] = 1
    images[0, 2] = 0.75
    logits = NearestNeighbour(2)(images[:, :2], torch.tensor([[1, 0]]), images[:, 2:])
    torch.testing.assert_close(logits, torch.tensor([[[-1.0, -3.0]]]))


def test_nearest_neighbour_answers_each_query_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    labels = torch.arange(6).expand(2, 6) % 3
    learner = NearestNeighbour(3)
    together = learner(support, labels, query)
    alone = torch.cat([learner(support, labels, item) for item in query.split(1, dim=1)], dim=1)
    torch.testing.assert_close(alone, together)


def test_nearest_neighbour_finds_an_item_at_no_distance_among_many() -> None:
    support = 5 + torch.rand(1, 100, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100).view(1, 100) % 20
    logits = NearestNeighbour(20)(support, labels, support)
    own = logits.gather(2, labels.unsqueeze(-1))
    torch.testing.assert_close(own, torch.zeros(1, 100, 1), rtol=0, atol=1e-4)


def test_nearest_neighbour_answers_a_query_alike_among_few_and_many() -> None:
    generator = torch.Generator().manual_seed(0)
    support, others = 5 + torch.rand(1, 5, 64, generator=generator), 5 + torch.rand(1, 95, 64, generator=generator)
    query, labels, learner = torch.cat([support, others], dim=1), torch.arange(5).view(1, 5), NearestNeighbour(5)
    together = learner(support, labels, query)
    alone = torch.cat([learner(support, labels, item) for item in query.split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_nearest_neighbour_takes_every_label_dtype_of_an_episode(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0]], dtype=dtype)
    episode = Episode(points((0, 0), (3, 4)), labels, points((0, 0)), labels[:, :1], ways=2)
    logits = NearestNeighbour(2)(episode.support_x, episode.support_y, episode.query_x)
    assert logits.tolist() == [[[-5, 0]]]


def test_nearest_neighbour_is_an_inductive_embedding_learner_without_parameters() -> None:
    learner = NearestNeighbour(5)
    assert isinstance(learner, EmbeddingLearner)
    assert not learner.transductive
    assert learner.note == ""
    assert not list(learner.parameters())


def test_prototype_logits_are_minus_the_squared_distance_to_the_mean_of_a_class() -> None:
    support = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [2.0, 0.0]]])
    logits = prototype_logits(support, torch.tensor([[0, 1, 0]]), torch.tensor([[[1.0, 1.0]]]), ways=2)
    assert torch.equal(logits, torch.tensor([[[-1.0, -13.0]]]))  # to (1, 0) and to (3, 4), squared
