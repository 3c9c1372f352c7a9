import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snail import SNAIL, AttentionBlock, Conv4, EmbeddingLearner, Episode, MatchingNetwork, ProtoNet, TCBlock, serialize
from snail.datasets.images import Images
from snail.datasets.sampler import EpisodeSampler
from snail.metric import prototype_logits

DIM = 4  # channels of the vectors that are items below
PAPER = [  # ways, max_shots, channels of the input and after each block, parameters of the head in millions
    (5, 1, (69, 101, 485, 613, 997, 1253), 3.10),
    (5, 5, (69, 101, 741, 869, 1509, 1765), 6.22),
    (20, 1, (84, 116, 756, 884, 1524, 1780), 6.36),
    (20, 5, (84, 116, 1012, 1140, 2036, 2292), 10.57),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def learner() -> SNAIL:
    """A 3-way SNAIL of up to 2 shots on vectors, float64, in evaluation mode; tests leave it as it is."""
    torch.manual_seed(0)
    return SNAIL(nn.Identity(), DIM, 3, 2).double().eval().requires_grad_(False)


def draw_episode(ways: int = 3, shots: int = 2, queries: int = 4, b: int = 2, item: Sequence[int] = (DIM,)) -> Episode:
    """Random items, every label in each support equally often."""
    labels = torch.arange(ways).repeat(shots)
    support_y = torch.stack([labels[torch.randperm(ways * shots)] for _ in range(b)])
    support_x, query_x = (torch.randn(b, count, *item, dtype=torch.float64) for count in (ways * shots, queries))
    return Episode(support_x, support_y, query_x, torch.randint(ways, (b, queries)), ways)


def perturb_from(x: Tensor, t: int) -> Tensor:
    """The sequences ``x`` with every step from ``t`` on changed."""
    changed = x.clone()
    changed[:, t:] += 3 * torch.randn_like(changed[:, t:])
    return changed


def answer(learner: SNAIL, episode: Episode) -> Tensor:
    logits: Tensor = learner(episode.support_x, episode.support_y, episode.query_x)
    return logits


def parts(episode: Episode) -> tuple[Tensor, ...]:
    return episode.support_x, episode.support_y, episode.query_x, episode.query_y


def one_sequence_a_query(learner: SNAIL, episode: Episode) -> Tensor:
    """The definition: each query alone at the end of a whole sequence, embedded and read without any state."""
    logits = []
    for query in episode.query_x.split(1, dim=1):
        items = torch.cat([episode.support_x, query], dim=1)
        embedded = torch.stack([learner.embedding(sequence) for sequence in items])
        one_hot = F.one_hot(episode.support_y, learner.ways).to(embedded.dtype)
        labels = torch.cat([one_hot, torch.zeros_like(one_hot[:, :1])], dim=1)
        logits.append(learner.network(torch.cat([embedded, labels], dim=-1))[:, -1])
    return torch.stack(logits, dim=1)


def gradients(y: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random weighting of ``y``."""
    weighting = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((y * weighting).sum(), wanted)


# The network of the paper


@pytest.mark.parametrize(("ways", "max_shots", "channels", "millions"), PAPER)
def test_snail_has_the_widths_and_parameters_of_the_paper(
    ways: int, max_shots: int, channels: Sequence[int], millions: float
) -> None:
    with torch.device("meta"):
        network = SNAIL(nn.Identity(), 64, ways, max_shots).network
        x = torch.empty(1, ways * max_shots + 1, 64 + ways)
        widths = [x.shape[-1]]
        for block in network.blocks:
            x = block(x)
            assert block.out_features == ways if isinstance(block, nn.Linear) else block.out_channels == x.shape[-1]
            widths.append(x.shape[-1])
    assert widths == [*channels, ways]
    assert network.out_channels == ways
    parameters = sum(p.numel() for p in network.parameters())
    assert round(parameters / 1e6, 2) == millions
    layers = (ways * max_shots).bit_length()
    starts = [width + 128 * i for width in (channels[1], channels[3]) for i in range(layers)]
    dense = sum(2 * (2 * width + 1) * 128 for width in starts)
    keys_and_values = [(64, 32), (256, 128), (512, 256)]
    attention = sum((c + 1) * (2 * k + v) for c, (k, v) in zip(channels[::2], keys_and_values, strict=True))
    assert parameters == dense + attention + (channels[5] + 1) * ways


@pytest.mark.parametrize(("option", "field"), [({}, 8), ({"dilation_start": 1}, 8), ({"dilation_start": 2}, 15)])
def test_snail_passes_the_first_dilation_to_its_convolutions(option: dict[str, int], field: int) -> None:
    with torch.device("meta"):
        network = SNAIL(nn.Identity(), DIM, 3, 2, **option).network
    assert [block.receptive_field for block in network.blocks if isinstance(block, TCBlock)] == [field, field]


@pytest.mark.parametrize(("ways", "max_shots"), [(1, 1), (2, 1), (5, 1), (5, 5), (20, 5)])
def test_snail_convolutions_see_the_longest_episode(ways: int, max_shots: int) -> None:
    with torch.device("meta"):
        network = SNAIL(nn.Identity(), DIM, ways, max_shots).network
    fields = [block.receptive_field for block in network.blocks if isinstance(block, TCBlock)]
    assert len(fields) == 2
    assert min(fields) >= ways * max_shots + 1


@pytest.mark.parametrize("t", [1, 2, 6, 26, 101])
def test_snail_ignores_future(learner: SNAIL, t: int) -> None:
    x = torch.randn(2, t, DIM + 3, dtype=torch.float64)
    y = learner.network(x)
    assert y.shape == (2, t, 3)
    for start in sorted({0, 1, t // 2, t - 2, t - 1} & set(range(t))):
        changed = learner.network(perturb_from(x, start))
        assert torch.equal(changed[:, :start], y[:, :start])
        assert not torch.equal(changed[:, start], y[:, start])


@pytest.mark.parametrize("sizes", [(1,) * 7, (6, 1), (2, 1, 4)])
def test_snail_network_reads_pieces_as_the_whole(learner: SNAIL, sizes: Sequence[int]) -> None:
    x = torch.randn(2, 7, DIM + 3, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split(list(sizes), dim=1):
        y, state = learner.network.step(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), learner.network(x), rtol=1e-10, atol=1e-12)


# An episode is q separate sequences


@pytest.mark.parametrize("shots", [1, 2])
def test_snail_equals_one_sequence_a_query(shots: int) -> None:
    embedding = Conv4(filters=8, image_size=16, out_features=DIM)
    learner = SNAIL(embedding, DIM, 2, 2).double()
    learner(*(torch.rand(1, 2, 1, 16, 16).double(), torch.tensor([[0, 1]]), torch.rand(1, 2, 1, 16, 16).double()))
    learner.eval()  # with running statistics that training has moved
    episode = draw_episode(2, shots, queries=3, item=(1, 16, 16))
    inputs = [episode.support_x.requires_grad_(), episode.query_x.requires_grad_()]
    together, separate = answer(learner, episode), one_sequence_a_query(learner, episode)
    assert together.shape == (2, 3, 2)
    torch.testing.assert_close(together, separate, rtol=1e-10, atol=1e-12)
    wanted = [*inputs, *learner.parameters()]
    for ours, theirs in zip(gradients(together, wanted), gradients(separate, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
        assert ours.any()


def test_snail_answers_each_query_by_itself_in_evaluation(learner: SNAIL) -> None:
    episode = draw_episode()
    logits = answer(learner, episode)
    others = perturb_from(episode.query_x, 1)
    assert torch.equal(answer(learner, replace(episode, query_x=others))[:, 0], logits[:, 0])
    last = replace(episode, query_x=episode.query_x[:, -1:], query_y=episode.query_y[:, -1:])
    alone = answer(learner, last)
    torch.testing.assert_close(alone, logits[:, -1:], rtol=1e-10, atol=1e-12)
    assert not learner.transductive
    assert learner.batch_norm == "inductive"


def test_inductive_bn_query_independent() -> None:
    learner, episode = SNAIL(Conv4(filters=4, image_size=16), 64, 3, 1).double(), draw_episode(3, 1, item=(1, 16, 16))
    others = replace(episode, query_x=perturb_from(episode.query_x, 1))
    learner.eval()
    assert torch.equal(answer(learner, others)[:, 0], answer(learner, episode)[:, 0])
    learner.train()  # here batch norm couples the images of a step
    assert not torch.allclose(answer(learner, others)[:, 0], answer(learner, episode)[:, 0])


def test_snail_couples_queries_by_batch_norm_only() -> None:
    learner, episode = SNAIL(nn.Linear(DIM, DIM), DIM, 3, 2).double().train(), draw_episode()
    others = replace(episode, query_x=perturb_from(episode.query_x, 1))
    assert torch.equal(answer(learner, others)[:, 0], answer(learner, episode)[:, 0])


def test_snail_keeps_episodes_apart(learner: SNAIL) -> None:
    episode, other = draw_episode(), draw_episode()
    mixture = [torch.stack([a[0], b[1]]) for a, b in zip(parts(episode), parts(other), strict=True)]
    mixed = Episode(mixture[0], mixture[1], mixture[2], mixture[3], 3)
    assert torch.equal(answer(learner, mixed)[0], answer(learner, episode)[0])
    assert torch.equal(answer(learner, mixed)[1], answer(learner, other)[1])


# Labels


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, dict):
        yield from tensors_in(list(arguments.values()))
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from tensors_in(argument)


def test_query_label_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, episode = SNAIL(nn.Identity(), DIM, 3, 2).double(), draw_episode()
    given: list[Tensor] = []
    branched: list[Tensor] = []
    logits: list[Tensor] = []
    branch = learner.network.branch

    def watched_branch(x: Tensor, state: Any) -> Tensor:
        branched.append(x)
        return branch(x, state)

    monkeypatch.setattr(learner.network, "branch", watched_branch)
    learner.register_forward_pre_hook(
        lambda _, args, kwargs: given.extend(tensors_in([args, kwargs])), with_kwargs=True
    )
    learner.register_forward_hook(lambda module, args, output: logits.append(output))
    losses = [learner.loss(replace(episode, query_y=(episode.query_y + i) % 3))[0] for i in range(3)]
    assert len({loss.item() for loss in losses}) == 3
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert all(any(tensor is known for known in parts(episode)[:3]) for tensor in given)
    assert all(torch.equal(x[..., :DIM], episode.query_x) for x in branched)
    assert not any(x[..., DIM:].any() for x in branched)


def test_snail_reads_the_label_of_each_support_item(learner: SNAIL) -> None:
    episode = draw_episode()
    logits = answer(learner, episode)
    for item in range(6):
        relabelled = episode.support_y.clone()
        relabelled[:, item] = (relabelled[:, item] + 1) % 3
        changed = answer(learner, replace(episode, support_y=relabelled))
        assert (changed - logits).abs().amax(dim=(1, 2)).gt(1e-6).all()


def test_snail_reads_each_support_item_and_its_own_query(learner: SNAIL) -> None:
    episode = draw_episode()
    support_x, query_x = episode.support_x.clone().requires_grad_(), episode.query_x.clone().requires_grad_()
    logits = learner(support_x, episode.support_y, query_x)
    of_support, of_query = torch.autograd.grad(logits[:, 2].square().sum(), [support_x, query_x])
    assert of_support.any(dim=-1).all()
    assert of_query[:, 2].any(dim=-1).all()
    assert not of_query[:, [0, 1, 3]].any()


def test_snail_sequence_is_as_wide_as_embedding_and_ways(learner: SNAIL) -> None:
    episode = draw_episode()
    sequence = serialize(episode.support_x, episode.support_y, 3)
    assert sequence.shape[-1] == DIM + 3
    learner.network(sequence)
    with pytest.raises(RuntimeError):
        learner.network(sequence[..., :-1])


def test_snail_returns_raw_logits(learner: SNAIL) -> None:
    outputs: list[Tensor] = []
    last = learner.network.blocks[-1]
    assert isinstance(last, nn.Linear)
    handle = last.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = answer(learner, draw_episode())
    handle.remove()
    assert torch.equal(logits, outputs[-1])
    assert logits.logsumexp(dim=-1).abs().gt(1e-3).all()  # a log-softmax would be zero here


def test_snail_loss_is_the_cross_entropy_of_all_queries(learner: SNAIL) -> None:
    episode = draw_episode()
    loss, logs = learner.loss(episode)
    logits = answer(learner, episode)
    answers = logits.log_softmax(dim=-1).gather(2, episode.query_y.unsqueeze(-1))
    torch.testing.assert_close(loss.double(), -answers.mean(), rtol=1e-5, atol=1e-6)
    right = (logits.argmax(dim=-1) == episode.query_y).sum().item()
    assert logs["accuracy"].item() == pytest.approx(right / 8)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_snail_learns_from_labels_of_every_integer_dtype(learner: SNAIL, dtype: torch.dtype) -> None:
    episode = draw_episode()
    same = replace(episode, support_y=episode.support_y.to(dtype), query_y=episode.query_y.to(dtype))
    assert torch.equal(answer(learner, same), answer(learner, episode))
    assert torch.equal(learner.loss(same)[0], learner.loss(episode)[0])


def test_episode_tensors_not_mutated() -> None:
    learner, episode = SNAIL(nn.Linear(DIM, DIM), DIM, 3, 2).double(), draw_episode()
    before = [part.clone() for part in parts(episode)]
    learner.loss(episode)[0].backward()
    assert all(map(torch.equal, parts(episode), before))


# Shots


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_snail_answers_any_number_of_shots_up_to_its_longest(shots: int) -> None:
    learner, episode = SNAIL(nn.Identity(), DIM, 3, 3).double().eval(), draw_episode(shots=shots)
    logits = answer(learner, episode)
    assert logits.shape == (2, 4, 3)
    torch.testing.assert_close(logits, one_sequence_a_query(learner, episode), rtol=1e-10, atol=1e-12)


def test_snail_answers_an_episode_with_classes_missing(learner: SNAIL) -> None:
    episode = draw_episode()
    logits = learner(episode.support_x[:, :1], episode.support_y[:, :1], episode.query_x)
    assert logits.shape == (2, 4, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("items", [7, 9])
def test_snail_refuses_more_shots_than_it_was_built_for(learner: SNAIL, items: int) -> None:
    support_x, support_y = torch.zeros(1, items, DIM).double(), torch.arange(items).view(1, -1) % 3
    message = rf"an episode of {items} support items is longer than this SNAIL was built for: 3 ways x 2 shots"
    with pytest.raises(ValueError, match=message):
        learner(support_x, support_y, torch.zeros(1, 1, DIM).double())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((DIM, 0, 1), "ways is 0; it must be at least 1"),
        ((DIM, 5, 0), "max_shots is 0; it must be at least 1"),
        ((DIM, -5, -1), "ways is -5; it must be at least 1"),
    ],
)
def test_snail_refuses_sizes_below_one(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SNAIL(nn.Identity(), *sizes)


@pytest.mark.parametrize("embedding_dim", [0, -3])
def test_snail_refuses_an_embedding_of_no_channels(embedding_dim: int) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim is {embedding_dim}"):
        SNAIL(nn.Identity(), embedding_dim, 5, 1)


def test_snail_refuses_a_first_dilation_below_one() -> None:
    with pytest.raises(ValueError, match="dilation_start is 0; it must be at least 1"):
        SNAIL(nn.Identity(), DIM, 5, 1, dilation_start=0)


# Devices and types


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16 autocast"])
@pytest.mark.parametrize("device", DEVICES)
def test_snail_trains_on_every_device_and_dtype(device: str, precision: str) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    learner = SNAIL(Conv4(filters=4, image_size=16, out_features=DIM), DIM, 2, 2).to(device, dtype)
    episode = draw_episode(2, item=(1, 16, 16)).map_items(lambda x: x.to(dtype)).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled="autocast" in precision):
        loss, logs = learner.loss(episode)
    loss.backward()
    assert loss.isfinite()
    assert 0 <= logs["accuracy"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learner.parameters())
    assert all(p.grad is not None and p.grad.dtype == dtype for p in learner.parameters())


def test_snail_answers_alike_under_bfloat16_autocast() -> None:
    learner, episode = SNAIL(nn.Identity(), DIM, 3, 2).eval(), draw_episode().map_items(Tensor.float)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = answer(learner, episode)
    torch.testing.assert_close(coarse.float(), answer(learner, episode), rtol=0.05, atol=0.03)


def test_snail_is_an_embedding_learner_that_answers_from_embeddings(learner: SNAIL) -> None:
    assert isinstance(learner, EmbeddingLearner)
    assert learner.note == ""
    episode = draw_episode()
    from_embeddings = learner.answer(
        learner.embedding(episode.support_x), episode.support_y, learner.embedding(episode.query_x)
    )
    torch.testing.assert_close(from_embeddings, answer(learner, episode), rtol=1e-12, atol=1e-14)


# Learning


class Unlabelled(SNAIL):
    """A SNAIL that is told no label of the support."""

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        return super().answer(support, torch.full_like(support_y, -1), query)


def overfit(learner: SNAIL) -> list[float]:
    """Losses on one batch: the same items twice, labelled otherwise, so that only support labels tell them apart."""
    once = draw_episode(shots=1, b=1).map_items(Tensor.float)
    support_x, support_y, query_x, query_y = (torch.cat([part, part]) for part in parts(once))
    support_y[1], query_y[1] = (support_y[1] + 1) % 3, (query_y[1] + 1) % 3
    episode = Episode(support_x, support_y, query_x, query_y, 3)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    losses = []
    for _ in range(50):
        loss, _ = learner.loss(episode)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_overfits_one_episode_batch() -> None:
    losses = overfit(SNAIL(nn.Sequential(nn.Linear(DIM, 16), nn.ReLU()), 16, 3, 1))
    assert losses[0] > 0.8
    assert losses[-1] < 0.05


def test_overfits_no_batch_without_support_labels() -> None:
    losses = overfit(Unlabelled(nn.Sequential(nn.Linear(DIM, 16), nn.ReLU()), 16, 3, 1))
    assert min(losses) > math.log(2) - 1e-4  # the same items carry two labels, each half of the time


class Ranked(EpisodeSampler):
    """The defect of other ports: an episode's classes carry labels in their sorted order."""

    def draw(self, start: int, stop: int) -> Episode:
        episode = super().draw(start, stop)
        support, query = (x // PER_CLASS for x in (episode.support_x, episode.query_x))
        ranks = [(classes.unsqueeze(-1) > support.unsqueeze(1)).sum(dim=-1) for classes in (support, query)]
        return replace(episode, support_y=ranks[0], query_y=ranks[1])


CLASSES, PER_CLASS = 8, 20


def accuracy_on_training_classes(
    learner_class: type[SNAIL], sampler_class: type[EpisodeSampler]
) -> tuple[float, float]:
    """Mean and standard error over fresh 2-way 1-shot episodes of the classes that were trained on."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(60, 195, (CLASSES, 1, 8, 8))
    pixels = np.clip(centres + rng.normal(0, 15, (CLASSES, PER_CLASS, 8, 8)), 0, 255).astype(np.uint8)
    images = Images.from_classes(pixels, [f"class {i}" for i in range(CLASSES)])
    sampler = sampler_class(images, "gaussians/train", ways=2, shots=1, queries=1, seed=0)
    torch.manual_seed(0)
    learner = learner_class(nn.Sequential(nn.Flatten(), nn.Linear(64, 32)), 32, 2, 1)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    for step in range(120):
        loss, _ = learner.loss(sampler.draw(step * 8, (step + 1) * 8).map_items(images.take))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = sampler.draw(10_000, 11_000).map_items(images.take)
    with torch.no_grad():
        correct = (answer(learner.eval(), fresh).argmax(dim=-1) == fresh.query_y).double().mean(dim=1)
    return correct.mean().item(), correct.std().item() / len(correct) ** 0.5


def test_support_labels_give_more_than_chance() -> None:
    accuracy, _ = accuracy_on_training_classes(SNAIL, EpisodeSampler)
    assert accuracy > 0.7


def test_no_support_labels_gives_chance() -> None:
    accuracy, error = accuracy_on_training_classes(Unlabelled, EpisodeSampler)
    assert abs(accuracy - 0.5) < 4 * error


def test_no_support_labels_would_give_away_ranked_labels() -> None:
    accuracy, error = accuracy_on_training_classes(Unlabelled, Ranked)  # shows that the test above has the power
    assert accuracy > 0.7
    assert accuracy - 0.5 > 10 * error


def test_snail_prototype_loss_adds_to_the_loss_and_changes_no_answer() -> None:
    torch.manual_seed(0)
    plain = SNAIL(nn.Flatten(), 4, ways=3, max_shots=2)
    helped = SNAIL(nn.Flatten(), 4, ways=3, max_shots=2, prototype_loss=0.5)
    helped.load_state_dict(plain.state_dict())
    y = torch.tensor([[2, 0, 1, 1, 2, 0]])
    episode = Episode(torch.randn(1, 6, 4), y, torch.randn(1, 3, 4), torch.tensor([[0, 1, 2]]), ways=3)
    x = (episode.support_x, episode.support_y, episode.query_x)
    assert torch.equal(plain(*x), helped(*x))
    prototypes = prototype_logits(episode.support_x, y, episode.query_x, 3)
    second = nn.functional.cross_entropy(prototypes[0], episode.query_y[0])
    torch.testing.assert_close(helped.loss(episode)[0], plain.loss(episode)[0] + 0.5 * second)
    assert (plain.note, helped.note) == ("", "prototype loss 0.5")


def test_snail_prototype_loss_over_the_batch_has_all_its_classes_to_choose_from() -> None:
    torch.manual_seed(0)
    learner = SNAIL(nn.Flatten(), 4, ways=3, max_shots=2, prototype_loss=0.5, prototypes="batch").double()
    y = torch.tensor([[0, 1, 2, 2, 1, 0], [1, 1, 0, 0, 2, 2]])
    query_y = torch.tensor([[0, 2], [1, 1]])
    episode = Episode(torch.randn(2, 6, 4).double(), y, torch.randn(2, 2, 4).double(), query_y, ways=3)
    centres = torch.stack([episode.support_x[b][y[b] == n].mean(0) for b in range(2) for n in range(3)])
    distances = torch.stack([(query - centres).square().sum(-1) for query in episode.query_x.flatten(0, 1)])
    expected = nn.functional.cross_entropy(-distances, torch.tensor([0, 2, 3 + 1, 3 + 1]))
    loss, logs = learner.loss(episode)
    torch.testing.assert_close(loss, logs["loss_at_last_position"] + 0.5 * expected)
    assert learner.note == "prototype loss 0.5 over the batch"
    with pytest.raises(ValueError, match="prototypes is 'all'; choose episode or batch"):
        SNAIL(nn.Flatten(), 4, ways=3, max_shots=2, prototypes="all")  # type: ignore[arg-type]


def test_snail_prototype_loss_keeps_its_digits_in_half_precision() -> None:
    learner = SNAIL(nn.Flatten(), 2, ways=2, max_shots=1, prototype_loss=1.0)
    support, query = torch.tensor([[[100.0, 0.25], [100.0, 0.5]]]), torch.tensor([[[100.0, 1.0]]])
    episode = Episode(support, torch.tensor([[0, 1]]), query, torch.tensor([[1]]), ways=2)
    exact = learner._prototype_loss(support, query, episode)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(learner._prototype_loss(support, query, episode), exact)
    assert exact < 0.6  # nearer is likelier; half precision would call it even, 0.69


# -- where training begins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ways", "c", "shots"), [(5, 12, 1), (20, 64, 3), (5, 2, 5)])
def test_snail_begins_as_a_matching_network(ways: int, c: int, shots: int) -> None:
    torch.manual_seed(0)
    learner = SNAIL(nn.Identity(), c, ways, 5, start="matching").double().eval()
    support, query = (nn.functional.normalize(torch.randn(2, n, c).double(), dim=-1) for n in (ways * shots, 7))
    y = torch.arange(ways).repeat(shots).expand(2, -1)
    # What carries a label has 16 more than the query itself, which has none and is at no distance.
    nearness = torch.cat([16 - torch.cdist(query, support).square() / 2, torch.zeros(2, 7, 1).double()], dim=-1)
    read = nearness.softmax(-1)[..., :-1] @ nn.functional.one_hot(y, ways).double()
    answers = learner.answer(support, y, query)
    torch.testing.assert_close(answers, 10 * read, rtol=0, atol=0.02)  # squares are nearly such
    likely = MatchingNetwork(nn.Identity(), similarity="euclidean", scale=0.5).answer(support, y, query)
    torch.testing.assert_close(answers, 10 * likely.exp(), rtol=0, atol=0.02)
    assert learner.note == "begun as a matching network"


@pytest.mark.parametrize(("ways", "c", "shots"), [(5, 12, 1), (20, 32, 3), (5, 2, 5)])
def test_snail_begins_as_a_prototypical_network(ways: int, c: int, shots: int) -> None:
    torch.manual_seed(0)
    learner = SNAIL(nn.Identity(), c, ways, 5, start="prototypes").double().eval()
    support, query = (nn.functional.normalize(torch.randn(2, n, c).double(), dim=-1) for n in (ways * shots, 7))
    y = torch.stack([torch.arange(ways).repeat(shots)[torch.randperm(ways * shots)] for _ in range(2)])
    same = (y.unsqueeze(2) == y.unsqueeze(1)).tril().double()
    away = (support - same / same.sum(-1, keepdim=True) @ support).square().sum(-1)  # from the class's mean so far
    midst = torch.cat(
        [support.mean(1, keepdim=True) * ways * shots + query.unsqueeze(1).flatten(0, 1).view(2, 7, c)], 1
    )
    own = (query - midst / (ways * shots + 1)).square().sum(-1, keepdim=True)  # a query has no class: from all so far
    logits = torch.cat([16 - 0.1 * torch.cdist(query, support).square() + 0.14 * away.unsqueeze(1), 0.14 * own], dim=-1)
    read = logits.softmax(-1)[..., :-1] @ nn.functional.one_hot(y, ways).double()
    torch.testing.assert_close(learner.answer(support, y, query), 40 * read, rtol=0, atol=0.02)
    assert learner.note == "begun as a prototypical network"


@pytest.mark.parametrize(("c", "within"), [(16, 8), (48, 14)])
def test_a_start_with_prototypes_comes_nearer_to_a_prototypical_network_than_a_matching_one(
    c: int, within: float
) -> None:
    torch.manual_seed(0)
    centres = torch.randn(60, 20, 1, c) * math.sqrt(16 / c)
    spread = (within / c * (0.5 + torch.rand(60, 20, 1, 1))).sqrt()  # each class varies by another amount
    items, order = centres + spread * torch.randn(60, 20, 6, c), torch.randperm(100)
    support, query = items[:, :, :5].flatten(1, 2)[:, order], items[:, :, 5]
    y, truth = torch.arange(20).repeat_interleave(5)[order].expand(60, -1), torch.arange(20)
    nearest = ProtoNet(nn.Identity()).answer(support, y, query).argmax(-1)
    differ, wrong = {}, {"nearest": (nearest != truth).float().mean()}
    for start in ("matching", "prototypes"):
        learner = SNAIL(nn.Identity(), c, 20, 5, start=start).eval()
        learner.begin(support[:4].flatten(0, 1))
        with torch.no_grad():
            answers = learner.answer(support, y, query).argmax(-1)
        differ[start], wrong[start] = ((answers != other).float().mean() for other in (nearest, truth))
    assert differ["prototypes"] < 0.6 * differ["matching"], differ
    assert abs(wrong["prototypes"] - wrong["nearest"]) < 0.5 * (wrong["matching"] - wrong["nearest"]), wrong


def test_a_matching_start_looks_at_embeddings_from_their_midst() -> None:
    torch.manual_seed(0)
    support, query, far = torch.randn(50, 5, 16) / 2, torch.randn(50, 7, 16) / 2, 6 * torch.randn(16).sign()
    y = torch.arange(5).expand(50, -1)
    learner = SNAIL(nn.Identity(), 16, 5, 1, start="matching").eval()
    plain = learner.answer(support, y, query)
    astray = learner.answer(support + far, y, query + far)
    learner.begin((support + far).flatten(0, 1))
    torch.testing.assert_close(learner.answer(support + far, y, query + far), plain, rtol=0, atol=0.5)
    assert (astray - plain).abs().max() > 5  # tanh is not straight out there


def test_to_begin_changes_no_other_start_and_no_embedding() -> None:
    torch.manual_seed(0)
    for start in ("random", "matching", "prototypes"):
        learner = SNAIL(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 6, 3, 2, start=start)
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        learner.begin(torch.randn(9, 4))
        same = {name for name, value in learner.state_dict().items() if torch.equal(value, before[name])}
        assert same >= {name for name in before if name.startswith("embedding.")}
        assert (same == set(before)) is (start == "random")


def test_snail_of_many_channels_begins_by_comparing_some_directions_of_them() -> None:
    torch.manual_seed(0)
    learner = SNAIL(nn.Identity(), 384, 5, 1, start="matching").eval()
    support, y = torch.randn(200, 5, 384) / 4, torch.arange(5).expand(200, 5)
    query = support + torch.randn(200, 5, 384) / 8
    assert (learner.answer(support, y, query).argmax(-1) == y).float().mean() > 0.95


@pytest.mark.parametrize("start", ["matching", "prototypes"])
def test_snail_of_many_channels_begins_by_comparing_the_directions_in_which_embeddings_differ(start: Any) -> None:
    torch.manual_seed(0)
    few = torch.nn.init.orthogonal_(torch.empty(60, 384))  # of 384 directions
    learner = SNAIL(nn.Identity(), 384, 5, 1, start=start).eval()
    y = torch.arange(5).expand(400, 5)
    support, query = (torch.randn(400, 5, 60) @ few / 4 for _ in range(2))
    nearest = torch.cdist(query, support).argmin(-1)

    def right() -> float:
        return (learner.answer(support, y, query).argmax(-1) == nearest).float().mean().item()

    by_chance = right()
    learner.begin(torch.randn(500, 60) @ few / 4)
    assert by_chance < 0.75 and right() > 0.9


@pytest.mark.parametrize("start", ["matching", "prototypes"])
def test_snail_begun_as_another_learner_is_the_same_network_all_of_which_learns(start: Any) -> None:
    torch.manual_seed(0)
    begun, plain = (SNAIL(nn.Identity(), DIM, 3, 2, start=word) for word in (start, "random"))
    shapes = [{name: value.shape for name, value in learner.state_dict().items()} for learner in (begun, plain)]
    assert shapes[0] == shapes[1]
    episode = draw_episode().map_items(Tensor.float)
    optimizer = torch.optim.Adam(begun.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in begun.named_parameters()}
    for _ in range(2):  # the first step reaches the last layer alone
        optimizer.zero_grad()
        begun.loss(episode)[0].backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in begun.named_parameters())


@pytest.mark.parametrize(
    ("start", "most", "ways", "layers"),
    [
        ("matching", 128, 129, "all"),
        ("matching", 128, 5, "convolutions"),
        ("matching", 128, 5, "attention"),
        ("prototypes", 64, 65, "all"),
    ],
)
def test_snail_says_what_its_start_needs(start: Any, most: int, ways: int, layers: Any) -> None:
    with pytest.raises(ValueError, match=f"needs all layers .here {layers}. and at most {most} ways .here {ways}."):
        SNAIL(nn.Identity(), 4, ways, 1, start=start, layers=layers)


def test_a_start_with_prototypes_does_without_means_where_there_is_one_example() -> None:
    learner = SNAIL(nn.Identity(), 4, 1, 1, start="prototypes").eval()
    assert (
        learner.answer(torch.randn(1, 1, 4), torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 2, 4)).isfinite().all()
    )


# -- what is left out to see what it does --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "blocks", "note"),
    [
        ("all", [AttentionBlock, TCBlock, AttentionBlock, TCBlock, AttentionBlock, nn.Linear], ""),
        ("attention", [AttentionBlock, AttentionBlock, AttentionBlock, nn.Linear], "attention alone"),
        ("convolutions", [TCBlock, TCBlock, nn.Linear], "convolutions alone"),
    ],
)
def test_layers_can_be_left_out(layers: Any, blocks: list[type[nn.Module]], note: str) -> None:
    episode = draw_episode()
    learner = SNAIL(nn.Identity(), DIM, 3, 2, layers=layers).double().eval()
    assert [type(block) for block in learner.network.blocks] == blocks and learner.note == note
    torch.testing.assert_close(answer(learner, episode), one_sequence_a_query(learner, episode))
    weights = learner.attention(episode.support_x, episode.support_y, episode.query_x)
    assert (weights is None) == (layers == "convolutions")


def test_layers_of_another_name_are_refused() -> None:
    with pytest.raises(ValueError, match="layers is 'none'; choose all, attention or convolutions"):
        SNAIL(nn.Identity(), DIM, 3, 2, layers="none")  # type: ignore[arg-type]
