import pytest
import torch
from torch import Tensor, nn

from snail import EmbeddingLearner, Episode, MatchingNetwork, NearestNeighbour, ProtoNet
from snail.metric import prototype_logits, shifted_logits

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


# -- ProtoNet and Matching networks ------------------------------------------------------------------------------


def episode(b: int = 2, n: int = 3, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Support ``(b, n * k, 4)`` with its labels, and five queries."""
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(b, i, 4, generator=generator, dtype=torch.float64) for i in (n * k, 5))
    return support, torch.rand(b, n * k, generator=generator).argsort(1) % n, query


def test_protonet_answers_with_prototypes_in_the_embedding() -> None:
    support, labels, query = episode()
    embedding = nn.Linear(4, 3).double()
    logits = ProtoNet(embedding)(support, labels, query)
    for b in range(2):
        means = torch.stack([embedding(support[b][labels[b] == c]).mean(0) for c in range(3)])
        torch.testing.assert_close(logits[b], -torch.cdist(embedding(query[b]), means).square())


def test_protonet_takes_as_many_ways_as_an_episode_has() -> None:
    learner = ProtoNet(nn.Identity())
    for n in (2, 5, 7):
        assert learner(*episode(n=n)).shape == (2, 5, n)


def test_matching_network_by_hand() -> None:
    support, labels = points((1, 0), (0, 2), (3, 0)), torch.tensor([[0, 1, 0]])
    # The query's cosines with the support are 1, 0 and 1.
    e = torch.e
    logits = MatchingNetwork(nn.Identity())(support, labels, points((5, 0)))
    torch.testing.assert_close(logits.exp(), torch.tensor([[[2 * e / (2 * e + 1), 1 / (2 * e + 1)]]]))
    sure = MatchingNetwork(nn.Identity(), scale=3)(support, labels, points((5, 0)))
    torch.testing.assert_close(sure.exp(), torch.tensor([[[2 * e**3 / (2 * e**3 + 1), 1 / (2 * e**3 + 1)]]]))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_matching_network_answers_with_probabilities(similarity: str) -> None:
    logits = MatchingNetwork(nn.Identity(), similarity=similarity)(*episode(k=3))
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_matching_network_with_squared_distances_is_protonet_at_one_shot() -> None:
    given = episode(k=1)
    matching = MatchingNetwork(nn.Identity(), similarity="euclidean")(*given)
    torch.testing.assert_close(matching, ProtoNet(nn.Identity())(*given).log_softmax(-1))


@pytest.mark.parametrize("learner", [ProtoNet, MatchingNetwork])
def test_renaming_classes_renames_answers(learner: type[ProtoNet] | type[MatchingNetwork]) -> None:
    support, labels, query = episode()
    order = torch.tensor([2, 0, 1])
    answers = learner(nn.Identity())(support, labels, query)
    torch.testing.assert_close(learner(nn.Identity())(support, order[labels], query)[..., order], answers)


@pytest.mark.parametrize("learner", [ProtoNet, MatchingNetwork])
def test_metric_learners_answer_each_query_by_itself(learner: type[ProtoNet] | type[MatchingNetwork]) -> None:
    support, labels, query = episode()
    answers = learner(nn.Identity())(support, labels, query)
    alone = torch.cat([learner(nn.Identity())(support, labels, item) for item in query.split(1, dim=1)], dim=1)
    torch.testing.assert_close(alone, answers)


def test_matching_network_notes_what_the_paper_has_not() -> None:
    assert MatchingNetwork(nn.Identity()).note == ""
    assert MatchingNetwork(nn.Identity(), similarity="euclidean", scale=10).note == "euclidean, scale 10"


@pytest.mark.parametrize(("options", "message"), [({"similarity": "dot"}, "'dot'"), ({"scale": 0.0}, "scale is 0")])
def test_matching_network_refuses_what_it_does_not_know(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingNetwork(nn.Identity(), **options)  # type: ignore[arg-type]


def test_scale_of_protonet_multiplies_the_squared_distances_and_is_told() -> None:
    torch.manual_seed(0)
    support, labels, query = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), torch.rand(2, 3, 4)
    plain, scaled = ProtoNet(nn.Identity()), ProtoNet(nn.Identity(), scale=0.25)
    torch.testing.assert_close(scaled.answer(support, labels, query), plain.answer(support, labels, query) / 4)
    assert (plain.note, scaled.note) == ("", "scale 0.25")
    with pytest.raises(ValueError, match="scale is 0; it must be positive"):
        ProtoNet(nn.Identity(), scale=0)


def whole_episode(k: int, q: int, b: int = 2, n: int = 3) -> Episode:
    """Embedded episodes of k shots and q queries of each class, in double precision, shuffled."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(2, b, n * max(k, q), 4, generator=generator, dtype=torch.float64)
    labels = [torch.stack([torch.randperm(n * e, generator=generator) % n for _ in range(b)]) for e in (k, q)]
    return Episode(items[0, :, : n * k], labels[0], items[1, :, : n * q], labels[1], n)


def test_shifted_logits_have_the_softmax_of_squared_distances() -> None:
    torch.manual_seed(0)
    query, centres = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    expected = (-torch.cdist(query, centres).square()).softmax(-1)
    torch.testing.assert_close(shifted_logits(query, centres).softmax(-1), expected)


def test_what_all_embeddings_share_has_no_gradient_but_for_rounding() -> None:
    torch.manual_seed(0)
    query, centres = torch.randn(1, 300, 16), torch.randn(1, 100, 16)
    noise = []
    for far in (0.0, 30.0):
        shift = torch.full((16,), far, requires_grad=True)
        logits = shifted_logits(query + shift, centres + shift)
        nn.functional.cross_entropy(logits[0], torch.arange(300) % 100).backward()
        assert shift.grad is not None
        noise.append(float(shift.grad.abs().max()))
    assert noise[1] < 10 * noise[0] < 1e-4  # products of what is far from zero have a hundred times as much


def test_shifted_logits_are_precise_where_all_else_is_in_half_precision() -> None:
    query, centres = torch.tensor([[[100.0, 0.0]]]), torch.tensor([[[100.0, 0.0], [100.0, 0.25]]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = shifted_logits(query.bfloat16(), centres)
    assert logits.dtype == torch.float32
    assert float(logits[0, 0, 0] - logits[0, 0, 1]) == pytest.approx(0.0625)


@pytest.mark.parametrize(("k", "q"), [(1, 3), (2, 1)])
def test_protonet_in_turn_is_the_mean_loss_of_all_neighbours_in_the_ring(k: int, q: int) -> None:
    whole, n, m = whole_episode(k, q), 3, k + q
    losses = []
    for first in range(m):
        for b in range(len(whole)):
            items = torch.cat([whole.support_x[b], whole.query_x[b]])
            labels = torch.cat([whole.support_y[b], whole.query_y[b]])
            rings = [items[labels == c] for c in range(n)]
            within = [(first + i) % m for i in range(k)]
            centres = torch.stack([ring[within].mean(0) for ring in rings])
            for c, ring in enumerate(rings):
                for i in set(range(m)) - set(within):
                    losses.append(-(-(ring[i] - centres).square().sum(-1) / 2).log_softmax(-1)[c])
    loss, logs = ProtoNet(nn.Identity(), scale=0.5, in_turn=True).loss(whole)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    _, plain = ProtoNet(nn.Identity(), scale=0.5).loss(whole)
    assert torch.equal(logs["accuracy"], plain["accuracy"])


def test_protonet_in_turn_answers_as_ever_and_is_told() -> None:
    support, labels, query = episode()
    plain, in_turn = ProtoNet(nn.Identity()), ProtoNet(nn.Identity(), in_turn=True, scale=0.5)
    assert torch.equal(in_turn(support, labels, query), plain(support, labels, query) / 2)
    assert in_turn.note == "scale 0.5, examples in turn"


def test_protonet_in_turn_refuses_classes_of_different_sizes() -> None:
    whole = whole_episode(1, 2)
    fewer = Episode(whole.support_x, whole.support_y, whole.query_x[:, :-1], whole.query_y[:, :-1], 3)
    with pytest.raises(ValueError, match="in_turn needs equally many examples of each class, but these have from 2 to"):
        ProtoNet(nn.Identity(), in_turn=True).loss(fewer)
