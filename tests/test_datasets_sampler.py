import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snail import Episode
from snail.datasets import Episodes, EpisodeSampler, Images
from snail.datasets.images import split_hash
from snail.datasets.sampler import DrawnBatches, _distinct, choose_shots
from snail.evaluation import KnownEpisodes

TENSORS = ("support_x", "support_y", "query_x", "query_y")


def pool(counts: Sequence[int] = (6,) * 12, prefix: str = "class") -> Images:
    """Images of two pixels that spell each image's own index."""
    index = torch.arange(sum(counts))
    pixels = torch.stack([index // 256, index % 256], dim=1).to(torch.uint8).reshape(-1, 1, 1, 2)
    return Images(pixels, tuple(f"{prefix}{i}" for i in range(len(counts))), tuple(counts))


def sampler(images: Images | None = None, name: str = "made-up/train", **changed: int) -> EpisodeSampler:
    sizes = {"ways": 3, "shots": 2, "queries": 2, "seed": 0} | changed
    return EpisodeSampler(pool() if images is None else images, name, **sizes)


def episodes(**changed: Any) -> Episodes:
    settings = {"name": "made-up/halves/test", "ways": 3, "shots": 2, "queries": 1, "seed": 4}
    settings |= {"count": 7, "batch_size": 3} | changed
    count, batch_size = settings.pop("count"), settings.pop("batch_size")
    return Episodes(EpisodeSampler(pool(), **settings), count, pool(), batch_size)


def same(one: Episode, other: Episode) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def classes_of(images: Images, indices: Tensor) -> Tensor:
    """The class that each image belongs to."""
    return torch.bucketize(indices, torch.tensor(images.counts).cumsum(0), right=True)


def class_of_label(images: Images, episode: Episode) -> Tensor:
    """The class that carries each label, ``(b, ways)``, read off the support."""
    table = torch.empty(len(episode), episode.ways or 0, dtype=torch.int64)
    return table.scatter_(1, episode.support_y, classes_of(images, episode.support_x))


def table(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """How often each row met each column."""
    return torch.bincount(rows.flatten() * shape[1] + columns.flatten(), minlength=shape[0] * shape[1])


def chi_square(counts: Tensor) -> float:
    """Pearson's statistic against the same expectation in every cell."""
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


def bound(freedom: int) -> float:
    """What chance exceeds once in 30,000 times: Wilson and Hilferty's quantile at four standard deviations."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 4 * spread**0.5) ** 3)


@cache
def many(classes: int = 64) -> tuple[Images, Episode]:
    """Many 5-way episodes of as many classes as mini-ImageNet trains on."""
    images = pool((6,) * classes)
    return images, sampler(images, ways=5, shots=1, queries=1).draw(0, 20_000)


def numbered_by_rank(labels: Tensor, classes: Tensor) -> Tensor:
    """Labels as some ports give them, by the rank of the class among those of the episode."""
    return torch.zeros_like(labels).scatter_(1, classes.argsort(dim=1), torch.arange(labels.shape[1]).expand_as(labels))


# -- a pure function of the index --------------------------------------------------------------------------------


def test_draw_is_a_function_of_the_index_alone() -> None:
    whole = sampler().draw(0, 10)
    piece = sampler().draw(4, 7)
    assert all(torch.equal(getattr(whole, name)[4:7], getattr(piece, name)) for name in TENSORS)


def test_draw_does_not_remember_earlier_draws() -> None:
    fresh, used = sampler(), sampler()
    used.draw(0, 9)
    used.draw(100, 101)
    assert same(fresh.draw(5, 8), used.draw(5, 8))


def test_draw_neither_reads_nor_moves_the_global_generators() -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    before = states()
    first = sampler().draw(0, 3)
    assert states() == before
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert same(sampler().draw(0, 3), first)


def test_draw_never_changes_silently() -> None:
    batch = sampler(ways=5, shots=2, queries=1, seed=3).draw(2, 10)
    digest = hashlib.sha256(b"".join(getattr(batch, name).numpy().astype("<i8").tobytes() for name in TENSORS))
    assert digest.hexdigest() == "ac773147b0f0031afc399ff469d309ba87e6c21717fbd21f7bbf7863ca1f0c00"


def test_draw_reaches_any_index() -> None:
    far = sampler().draw(10**15, 10**15 + 2)
    assert not same(far, sampler().draw(0, 2))
    assert same(far, sampler().draw(10**15, 10**15 + 2))


def test_draw_does_not_repeat_episodes() -> None:
    batch = sampler(ways=5, shots=1, queries=1).draw(0, 2000)
    assert len({tuple(row) for row in batch.support_x.tolist()}) > 1990


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"seed": 2**70}, {"ways": 4}, {"shots": 1}, {"shots": 3}, {"queries": 1}, {"queries": 3}],
    ids=str,
)
def test_another_setting_gives_other_episodes(changed: dict[str, int]) -> None:
    one, other = sampler().draw(0, 50), sampler(**changed).draw(0, 50)
    classes = class_of_label(pool(), one), class_of_label(pool(), other)[:, :3]
    agreeing = (classes[0] == classes[1]).all(dim=1).float().mean()
    assert agreeing < 0.1
    assert not torch.equal(classes[0][0], classes[1][0])  # the first too, where every counter is at zero


def test_another_name_or_split_gives_other_episodes() -> None:
    here = sampler().draw(0, 5)
    assert not same(here, sampler(name="made-up/test").draw(0, 5))
    assert not same(here, sampler(pool(prefix="other")).draw(0, 5))


@dataclass
class OneByOne(Dataset[Episode]):
    """The single episodes of ``Episodes``, as a map-style data set."""

    episodes: Episodes

    def __len__(self) -> int:
        return self.episodes.count

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a machine with one core
@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_episodes_any_num_workers(workers: int) -> None:
    here = episodes()
    context = "fork" if workers else None
    loader = DataLoader(OneByOne(here), batch_size=None, num_workers=workers, multiprocessing_context=context)
    loaded = list(loader)
    direct = here.drawn_by.draw(0, here.count).map_items(here.images.take)
    assert len(loaded) == here.count
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(one, name) for one in loaded]), getattr(direct, name))


# -- what an episode is made of ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ((6,) * 12, {"ways": 5, "shots": 2, "queries": 3}),
        ((3, 9, 4, 30, 5), {"ways": 3, "shots": 2, "queries": 1}),
        ((3, 3, 3), {"ways": 3, "shots": 1, "queries": 2}),  # every class and every image is used
        ((2, 2), {"ways": 1, "shots": 1, "queries": 1}),
    ],
)
def test_episode_holds_each_class_as_often_as_asked(counts: tuple[int, ...], sizes: dict[str, int]) -> None:
    images = pool(counts)
    batch = sampler(images, **sizes).draw(0, 200)
    ways, shots, queries = sizes["ways"], sizes["shots"], sizes["queries"]
    assert batch.ways == ways
    assert batch.support_x.shape == batch.support_y.shape == (200, ways * shots)
    assert batch.query_x.shape == batch.query_y.shape == (200, ways * queries)
    assert {getattr(batch, name).dtype for name in TENSORS} == {torch.int64}
    for support_x, support_y, query_x, query_y in zip(*(getattr(batch, name) for name in TENSORS), strict=True):
        assert Counter(support_y.tolist()) == dict.fromkeys(range(ways), shots)
        assert Counter(query_y.tolist()) == dict.fromkeys(range(ways), queries)
        # No image twice, so support and queries are disjoint.
        assert len({*support_x.tolist(), *query_x.tolist()}) == ways * (shots + queries)
        classes = classes_of(images, torch.cat([support_x, query_x])).tolist()
        pairs = set(zip(torch.cat([support_y, query_y]).tolist(), classes, strict=True))
        assert len(pairs) == len({label for label, _ in pairs}) == len({number for _, number in pairs}) == ways


def test_labels_are_permuted() -> None:
    images, batch = many()
    classes = classes_of(images, batch.support_x)
    assert chi_square(table(classes, batch.support_y, (64, 5))) < bound(63 * 5)
    ranked = numbered_by_rank(batch.support_y, classes)
    assert chi_square(table(classes, ranked, (64, 5))) > 100 * bound(63 * 5)


@pytest.mark.parametrize("classes", [12, 13, 14])
def test_fixed_labels_are_a_function_of_the_class_and_every_class_is_drawn(classes: int) -> None:
    images = pool((6,) * classes)
    fixed = EpisodeSampler(images, "made-up/train", ways=3, shots=2, queries=2, seed=0, fixed_labels=True)
    episode = fixed.draw(0, 3000)
    classes_there = class_of_label(images, episode)
    assert torch.equal(classes_there % 3, torch.arange(3).expand(3000, 3))
    counts = classes_there.flatten().bincount(minlength=classes)
    carriers = torch.tensor([len(range(i % 3, classes, 3)) for i in range(classes)])
    expected = 3000 / carriers
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()
    assert not torch.equal(class_of_label(images, sampler(images).draw(0, 9)) % 3, torch.arange(3).expand(9, 3))


def test_no_support_gives_chance() -> None:
    # 51 % for labels by rank is facts.md, section 6.3, row 4.
    images, batch = many()
    classes, labels = classes_of(images, batch.query_x), batch.query_y

    def best_guess(labels: Tensor) -> float:
        guess = table(classes[:10_000], labels[:10_000], (64, 5)).reshape(64, 5).argmax(dim=1)
        return float((guess[classes[10_000:]] == labels[10_000:]).double().mean())

    assert best_guess(labels) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 50_000) ** 0.5)
    assert best_guess(numbered_by_rank(labels, classes)) == pytest.approx(0.51, abs=0.02)


@pytest.mark.parametrize("part", ["support", "query"])
def test_position_tells_nothing_about_the_label(part: str) -> None:
    labels = sampler(ways=3, shots=2, queries=2).draw(0, 6000)
    y = getattr(labels, f"{part}_y")
    positions = torch.arange(6).expand_as(y)
    assert chi_square(table(positions, y, (6, 3))) < bound(6 * 2)
    in_order = y.sort(dim=1).values
    assert chi_square(table(positions, in_order, (6, 3))) > 100 * bound(6 * 2)


@pytest.mark.parametrize("part", ["support", "query"])
def test_every_arrangement_of_the_labels_is_equally_likely(part: str) -> None:
    # Turning a fixed order by a random number of places would pass by the position alone.
    y = getattr(sampler(ways=2, shots=2, queries=2).draw(0, 6000), f"{part}_y")
    counts = Counter(map(tuple, y.tolist()))
    assert set(counts) == set(itertools.permutations((0, 0, 1, 1)))
    assert chi_square(torch.tensor(list(counts.values()))) < bound(5)


def test_support_and_queries_are_shuffled_apart() -> None:
    batch = sampler(ways=3, shots=1, queries=1).draw(0, 7200)
    arrangements = zip(map(tuple, batch.support_y.tolist()), map(tuple, batch.query_y.tolist()), strict=True)
    counts = Counter(arrangements)
    assert len(counts) == 36
    assert chi_square(torch.tensor(list(counts.values()))) < bound(35)


def test_classes_are_drawn_uniformly() -> None:
    images, batch = many()
    for label in range(5):
        classes = class_of_label(images, batch)[:, label]
        assert chi_square(torch.bincount(classes, minlength=64)) < bound(63)


@pytest.mark.parametrize("part", ["support_x", "query_x"])
def test_images_are_drawn_uniformly_in_their_class(part: str) -> None:
    _, batch = many()
    drawn = torch.bincount(getattr(batch, part).flatten(), minlength=64 * 6).reshape(64, 6)
    assert sum(chi_square(counts) for counts in drawn) < bound(64 * 5)


@pytest.mark.parametrize("part", ["support_x", "query_x"])
def test_unequal_classes_are_drawn_alike_and_each_of_their_images_too(part: str) -> None:
    counts = (2, 5, 9)
    images = pool(counts)
    drawn = getattr(sampler(images, ways=2, shots=1, queries=1).draw(0, 9000), part).flatten()
    assert chi_square(torch.bincount(classes_of(images, drawn))) < bound(2)
    per_image = torch.bincount(drawn, minlength=16)
    assert sum(chi_square(some) for some in per_image.split(counts)) < bound(1 + 4 + 8)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ways": 0}, "ways is 0; it must be at least 1"),
        ({"shots": 0}, "shots is 0; it must be at least 1"),
        ({"queries": -2}, "queries is -2; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"ways": 13}, "13 ways are asked of 'made-up/train', which has 12 classes"),
    ],
)
def test_sampler_rejects_sizes_out_of_range(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**changed)


def test_sampler_names_the_class_with_too_few_images() -> None:
    message = "2 shots and 2 queries need 4 images a class, but class 'class1' of 'made-up/train' has 3"
    with pytest.raises(ValueError, match=message):
        sampler(pool((9, 3, 5)))


def test_sampler_takes_a_class_with_just_enough_images() -> None:
    sampler(pool((9, 4, 5))).draw(0, 1)


# -- the draw without repetition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(4, 2), (4, 3), (4, 4), (5, 1), (1, 1)])
def test_distinct_makes_every_ordered_choice_equally_likely(size: int, count: int) -> None:
    # All that the random numbers can be modulo what is left: each ordered choice must come out once.
    numbers = list(itertools.product(*(range(size - j) for j in range(count))))
    drawn = _distinct(np.array(numbers, np.uint64), np.full(len(numbers), size, np.uint64), count)
    assert sorted(map(tuple, drawn.tolist())) == list(itertools.permutations(range(size), count))


def test_distinct_takes_a_size_for_each_and_any_numbers() -> None:
    numbers = np.array([[2**64 - 1] * 3, [2**63] * 3, [0] * 3], np.uint64).reshape(3, 1, 3)
    drawn = _distinct(numbers, np.array([[3], [4], [7]], np.uint64), 3)
    # 2**64 - 1 is 0 modulo 3, 1 modulo 2, 0 modulo 1; 2**63 is 0 modulo 4, 2 modulo 3, 0 modulo 2.
    assert drawn.reshape(3, 3).tolist() == [[0, 2, 1], [0, 3, 1], [0, 1, 2]]


# -- the number of shots of a step -------------------------------------------------------------------------------


def test_choose_shots_depends_on_seed_and_step_alone() -> None:
    chosen = [choose_shots(range(1, 6), 0, step) for step in range(50)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert [choose_shots(range(1, 6), 0, step) for step in reversed(range(50))] == chosen[::-1]
    assert [choose_shots(range(1, 6), 1, step) for step in range(50)] != chosen


def test_choose_shots_never_changes_silently() -> None:
    assert [choose_shots([1, 2, 3, 4, 5], 0, step) for step in range(12)] == [5, 2, 2, 3, 4, 5, 4, 3, 1, 3, 5, 4]


def test_choose_shots_is_uniform_and_forgets_the_step_before() -> None:
    chosen = torch.tensor([choose_shots(range(1, 6), 7, step) for step in range(10_001)]) - 1
    assert chi_square(torch.bincount(chosen, minlength=5)) < bound(4)
    assert chi_square(table(chosen[1:], chosen[:-1], (5, 5))) < bound(24)


def test_choose_shots_gives_a_single_choice() -> None:
    assert {choose_shots([3], 0, step) for step in range(20)} == {3}


# -- episodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 9, [2])])
def test_episodes_come_in_batches_and_the_last_may_be_smaller(count: int, batch_size: int, sizes: list[int]) -> None:
    here = episodes(count=count, batch_size=batch_size)
    assert [len(batch) for batch in here] == [len(batch) for batch in here.drawn] == sizes
    assert len(here) == len(here.drawn) == len(sizes)


def test_episodes_iteration_equals_single_episodes() -> None:
    here = episodes()
    batches, singles = list(here), [here[i] for i in range(7)]
    for name in TENSORS:
        iterated = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(iterated, torch.cat([getattr(one, name) for one in singles]))


def test_episodes_do_not_depend_on_the_batch_size() -> None:
    ones, fives = list(episodes(batch_size=1).drawn), list(episodes(batch_size=5).drawn)
    assert torch.equal(torch.cat([e.query_x for e in ones]), torch.cat([e.query_x for e in fives]))


def test_episodes_are_the_same_each_time_around() -> None:
    here = episodes().drawn
    assert all(itertools.starmap(same, zip(here, here, strict=True)))
    assert isinstance(here, DrawnBatches)


def test_episodes_items_are_the_images_at_the_indices() -> None:
    here = episodes()
    for ready, indices in zip(here, here.drawn, strict=True):
        spelled = (ready.support_x * 255).round().long() @ torch.tensor([256, 1])
        assert torch.equal(spelled.reshape(indices.support_x.shape), indices.support_x)
        assert ready.query_x.shape == (*indices.query_x.shape, 1, 1, 2)
        assert torch.equal(ready.support_y, indices.support_y)


@pytest.mark.parametrize("index", [-1, 7, 100])
def test_episodes_reject_an_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=f"episode {index} of 7"):
        episodes()[index]


@pytest.mark.parametrize("changed", [{"count": 0}, {"batch_size": 0}, {"count": -1}], ids=str)
def test_episodes_reject_counts_below_one(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"episodes in batches of .*; both must be at least 1"):
        episodes(**changed)


def test_episodes_facts_identify_them() -> None:
    assert episodes().facts == {
        "dataset": "made-up",
        "split": "halves/test",
        "split_hash": split_hash(pool().class_names),
        "ways": 3,
        "shots": 2,
        "queries": 1,
        "episodes": 7,
        "seed": 4,
    }


@pytest.mark.parametrize(
    "changed", [{"name": "other/halves/test"}, {"name": "made-up/halves/val"}, {"seed": 5}], ids=str
)
def test_episodes_of_another_data_set_split_or_seed_are_others(changed: dict[str, Any]) -> None:
    assert not torch.equal(episodes()[0].support_x, episodes(**changed)[0].support_x)


def test_episodes_are_what_evaluate_takes_facts_and_pool_from() -> None:
    assert isinstance(episodes(), KnownEpisodes)
    assert not isinstance(list(episodes()), KnownEpisodes)


def test_few_questions_are_drawn_among_all_classes_of_the_same_episodes() -> None:
    images = Images.from_classes(np.zeros((6, 8, 2, 2), np.uint8), [f"{i}" for i in range(6)])
    all_of_them, one = (
        EpisodeSampler(images, "made-up/train", ways=3, shots=2, queries=2, seed=0, max_queries=most).draw(0, 600)
        for most in (None, 1)
    )
    assert torch.equal(all_of_them.support_x, one.support_x)
    assert torch.equal(all_of_them.query_x[:, :1], one.query_x) and torch.equal(all_of_them.query_y[:, :1], one.query_y)
    assert (torch.bincount(one.query_y.flatten()) - 200).abs().max() < 4 * (600 * 2 / 9) ** 0.5  # each label as often
    with pytest.raises(ValueError, match="max_queries is 0; it must be at least 1"):
        EpisodeSampler(images, "made-up/train", ways=3, shots=2, queries=2, seed=0, max_queries=0)
