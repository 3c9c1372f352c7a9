import hashlib
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snail import Episode, Learner, evaluate
from snail.datasets import Sinusoid
from snail.evaluation import evaluate_each

TENSORS = ("support_x", "support_y", "query_x", "query_y")


class Waves(Learner):
    """Gradient steps on the coefficients of sin x and cos x, from where a learned start is: it can fit any wave.

    Args:
        steps: Numbers of inner steps that are scored.
        rate: The rate of the inner steps.
    """

    def __init__(self, steps: Sequence[int] = (0, 1, 10), rate: float = 1.0) -> None:
        super().__init__()
        self.steps, self.rate = list(steps), rate
        self.start = nn.Parameter(torch.zeros(2, 1))

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"inner_steps": steps} for steps in self.steps]

    def answers(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        support, query = (torch.cat([x.sin(), x.cos()], dim=-1) for x in (support_x, query_x))
        weights, answers = self.start.expand(len(support), 2, 1), []
        for step in range(max(self.steps) + 1):
            if step > 0:
                weights = weights - self.rate * support.mT @ (support @ weights - support_y) / support.shape[1]
            if step in self.steps:
                answers.append(query @ weights)
        return torch.stack(answers)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return self.answers(support_x, support_y, query_x)[-1]


def draw(part: str = "test", start: int = 0, stop: int = 10, **changed: Any) -> Episode:
    sizes = {"shots": 4, "queries": 6, "seed": 0} | changed
    return Sinusoid().sampler(part, **sizes).draw(start, stop)


def same(one: Episode, other: Episode) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def waves(episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
    """Amplitude and phase of each task, read off its points by least squares, and how far off the points are."""
    x, y = (torch.cat(pair, 1).double() for pair in ((episode.support_x, episode.query_x),
                                                     (episode.support_y, episode.query_y)))  # fmt: skip
    features = torch.cat([x.sin(), x.cos()], dim=-1)
    sin, cos = torch.linalg.lstsq(features, y, driver="gelsd").solution.squeeze(-1).T
    off = (features @ torch.stack([sin, cos], 1).unsqueeze(-1) - y).abs().amax((1, 2))
    return torch.hypot(sin, cos), torch.atan2(-cos, sin), off  # a sin(x - p) = a cos p sin x - a sin p cos x


# -- what an episode is --------------------------------------------------------------------------------------------


def test_episodes_are_of_regression_and_of_the_sizes_asked_for() -> None:
    episode = draw(shots=3, queries=7)
    assert episode.ways is None
    assert episode.support_x.shape == episode.support_y.shape == (10, 3, 1)
    assert episode.query_x.shape == episode.query_y.shape == (10, 7, 1)
    assert {getattr(episode, name).dtype for name in TENSORS} == {torch.float32}


def test_every_point_of_a_task_lies_on_its_wave_with_the_phase_subtracted() -> None:
    amplitude, phase, off = waves(draw(stop=2000, shots=20))
    assert off.max() < 1e-5
    assert 0.1 <= amplitude.min() < 0.11 and 4.98 < amplitude.max() <= 5.0001
    assert -1e-4 <= phase.min() < 0.01 and math.pi - 0.01 < phase.max() <= math.pi + 1e-4


def test_amplitudes_phases_and_inputs_are_uniform_and_tell_nothing_of_each_other() -> None:
    episode = draw(stop=4000, shots=20)
    amplitude, phase, _ = waves(episode)
    inputs = torch.cat([episode.support_x, episode.query_x], 1).double().squeeze(-1)
    units = [(amplitude - 0.1) / 4.9, phase / math.pi, *((inputs[:, i] + 5) / 10 for i in (0, 1, 19, 20, 25))]
    for unit in units:
        # Kolmogorov and Smirnov's distance; chance exceeds 2 / sqrt(E) less than once in 1,000 times.
        assert (unit.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 2 / math.sqrt(4000)
    between = torch.corrcoef(torch.stack(units)) - torch.eye(len(units))
    assert between.abs().max() < 4 / math.sqrt(4000)


# -- a pure function of the index ----------------------------------------------------------------------------------


def test_draw_is_a_function_of_the_index_alone() -> None:
    whole, piece = draw(), draw(start=4, stop=7)
    assert all(torch.equal(getattr(whole, name)[4:7], getattr(piece, name)) for name in TENSORS)


def test_draw_never_changes_silently() -> None:
    batch = draw(start=2, stop=5, seed=3)
    values = torch.cat([getattr(batch, name).flatten() for name in ("support_x", "query_x")])
    digest = hashlib.sha256((values * 1000).round().long().numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "e058ba2419c152a7e950cb76ffb2405220a16c54258b698107b4383d8c192506"


def test_tasks_do_not_repeat_from_index_to_index() -> None:
    amplitude, _, _ = waves(draw(stop=1000))
    assert len({round(a, 5) for a in amplitude.tolist()}) > 980


def test_parts_and_seeds_draw_tasks_of_their_own() -> None:
    episodes = [draw("test"), draw("val"), draw("train"), draw("test", seed=1), draw("test", seed=2**70)]
    for one in range(len(episodes)):
        for other in range(one):
            gap = (waves(episodes[one])[0] - waves(episodes[other])[0]).abs()
            assert gap.min() > 1e-3


def test_shots_share_tasks_and_queries_and_fewer_are_the_first_of_more() -> None:
    few, many = draw(shots=5, queries=100), draw(shots=20, queries=100)
    assert torch.equal(few.query_x, many.query_x) and torch.equal(few.query_y, many.query_y)
    assert torch.equal(few.support_x, many.support_x[:, :5]) and torch.equal(few.support_y, many.support_y[:, :5])


# -- the data module -----------------------------------------------------------------------------------------------


def test_episodes_have_the_facts_that_identify_them() -> None:
    facts = Sinusoid(seed=4).episodes("test", shots=5).facts
    split_hash = facts.pop("split_hash")
    assert facts == {
        "dataset": "sinusoid",
        "split": "amplitude 0.1-5/test",
        "ways": None,
        "shots": 5,
        "queries": 100,
        "episodes": 600,
        "seed": 4,
    }
    assert len(split_hash) == 64
    assert split_hash != Sinusoid().episodes("val", shots=5).facts["split_hash"]
    assert split_hash == Sinusoid().episodes("test", shots=10, queries=3).facts["split_hash"]


def test_episodes_without_a_pool_are_ready_as_they_are_drawn() -> None:
    episodes = Sinusoid().episodes("val", shots=5, count=7)
    assert episodes.images is None
    for ready, drawn in zip(episodes, episodes.drawn, strict=True):
        assert same(ready, drawn)
    assert torch.equal(episodes[3].query_x, next(iter(episodes)).query_x[3:4])


def test_loaders_follow_the_protocol() -> None:
    data = Sinusoid()
    loaders = data.test_dataloader()
    assert [loader.episodes.facts["shots"] for loader in loaders] == [5, 10, 20]
    assert [sum(len(batch) for batch in loader) for loader in loaders] == [600] * 3
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1, global_step=3)  # type: ignore[assignment]
    batch = next(iter(data.train_dataloader()))
    assert batch.support_x.shape == batch.query_x.shape == (25, 10, 1)
    assert same(batch, draw("train", 75, 100, shots=10, queries=10))


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("dev", {}, "there is no part 'dev'; choose train, val or test"),
        ("val", {"ways": 5}, "5 ways are asked of waves, which have no classes"),
        ("val", {"shots": 0}, "shots is 0; it must be at least 1"),
        ("val", {"queries": -1}, "queries is -1; it must be at least 1"),
        ("val", {"seed": -1}, "seed is -1; it must be at least 0"),
        ("val", {"count": 0}, "0 episodes in batches of 100"),
    ],
)
def test_sinusoid_rejects_what_it_cannot_give(part: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinusoid().episodes(part, **({"shots": 1} | changed))


# -- scoring -------------------------------------------------------------------------------------------------------


def test_evaluate_scores_each_variant_by_the_squared_error_of_each_task() -> None:
    episodes, learner = Sinusoid().episodes("test", shots=10, count=150), Waves()
    results = evaluate_each(learner, episodes)
    assert [result.facts["inner_steps"] for result in results] == [0, 1, 10]
    assert results[0].mean > results[1].mean > results[2].mean
    # Answering 0 costs the mean square of the labels.
    squares = torch.cat([batch.query_y.double().square().mean((1, 2)) for batch in episodes])
    assert results[0].mean == pytest.approx(float(squares.mean()))
    assert results[0].ci95 == pytest.approx(1.96 * float(squares.std()) / math.sqrt(150))
    assert evaluate(learner, episodes).mean == results[2].mean


def test_more_shots_leave_less_error() -> None:
    data, learner = Sinusoid(), Waves()
    errors = [evaluate(learner, data.episodes("test", shots=shots, count=100)).mean for shots in (2, 5, 20)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.1 * errors[0]
