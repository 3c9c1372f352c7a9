from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snail import ANIL, MAML, Conv4, Episode, FirstOrderMAML, MAMLPlusPlus, Reptile
from snail.inner_loop import GradientLearner
from snail.recorded import Recorded

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


def draw_episode(seed: int, shots: int = 1, image_size: int = 28, tasks: int = 3) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(3).repeat_interleave(shots).expand(tasks, -1)
    support, query = (
        torch.rand(tasks, items, 1, image_size, image_size, generator=generator) for items in (3 * shots, 3)
    )
    return Episode(support, y, query, torch.arange(3).expand(tasks, -1), 3)


def build(kind: Any = MAML, **options: Any) -> GradientLearner:
    torch.manual_seed(0)
    learner: GradientLearner = kind(Conv4(filters=8, out_features=None, strided=True), 8, 3, **options)
    return learner


def train(learner: GradientLearner, episodes: list[Episode]) -> list[Tensor]:
    """The losses and the weights in the end."""
    optimizer, losses = torch.optim.SGD(learner.parameters(), lr=0.1), []
    for episode in episodes:
        optimizer.zero_grad()
        loss, _ = learner.loss(episode)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return [torch.stack(losses), *learner.parameters(), *learner.buffers()]


class FakeGraph:
    """Computes again where a GPU would replay."""

    def __init__(self, function: Any, given: tuple[Tensor, ...]) -> None:
        self.function, self.given = function, given
        self.outcome = function(*given)

    def replay(self) -> None:
        self.outcome.copy_(self.function(*self.given))


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """The arguments of all recordings made, without a GPU."""
    made: list[tuple[Tensor, ...]] = []

    def record(self: Recorded[Tensor], *arguments: Tensor) -> Any:
        given = tuple(x.clone() for x in arguments)
        made.append(given)
        graph = FakeGraph(self.function, given)
        return graph, given, graph.outcome

    monkeypatch.setattr(Recorded, "_record", record)
    return made


def test_recorded_records_each_shape_once_and_computes_with_new_numbers(recordings: list[Any]) -> None:
    recorded = Recorded(lambda x, y: x + 2 * y)
    for size in (3, 4, 3, 4):
        x, y = torch.rand(2, size).unbind(0)
        assert torch.equal(recorded(x, y), x + 2 * y)
    assert len(recordings) == 2
    recorded(x.double(), y.double())
    assert len(recordings) == 3


def test_recorded_is_recorded_anew_where_what_it_reads_lies_elsewhere_or_something_else_changed(
    recordings: list[Any],
) -> None:
    weight, x = torch.rand(3), torch.rand(3)
    recorded = Recorded(lambda x: x * 2)

    def recordings_made(read: Tensor, depends_on: int = 1) -> int:
        recorded(x, reads=[read], depends_on=depends_on)
        return len(recordings)

    assert [recordings_made(weight), recordings_made(weight), recordings_made(weight, 2)] == [1, 1, 2]
    assert [recordings_made(x), recordings_made(weight.requires_grad_()), recordings_made(weight)] == [3, 4, 4]


def test_a_copy_of_what_is_recorded_makes_recordings_of_its_own(recordings: list[Any]) -> None:
    recorded = Recorded(torch.neg)
    recorded(torch.ones(1))
    assert torch.equal(copy.deepcopy(recorded)(torch.ones(1)), -torch.ones(1)) and len(recordings) == 2


def test_a_learner_that_may_not_record_or_is_not_on_a_gpu_does_not(recordings: list[Any]) -> None:
    for record in (True, False):
        train(build(record=record), [draw_episode(0)])
    assert not recordings


@pytest.mark.parametrize(
    ("kind", "options", "settled"),
    [
        (MAML, {}, [True, True, True]),
        (MAML, {"second_order_from": 1}, [False, True, True]),
        (MAMLPlusPlus, {"multi_step_loss": 2}, [False, False, True]),
    ],
)
def test_a_loss_that_changes_as_training_goes_on_is_not_recorded(kind: Any, options: Any, settled: list[bool]) -> None:
    learner, found = build(kind, **options), []
    for seed in range(3):
        found.append(learner.settled)
        learner.loss(draw_episode(seed))
    assert found == settled


@pytest.mark.skipif(torch.cuda.is_available(), reason="recording works where there is a GPU")
def test_what_cannot_be_recorded_is_run_as_it_is_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, learner = build(record=False), build()
    monkeypatch.setattr(learner, "_may_record", lambda support_x: learner.record)
    monkeypatch.setattr(Recorded, "_record", lambda self, *arguments: (_ for _ in ()).throw(RuntimeError("no\nway")))
    episodes = [draw_episode(seed) for seed in range(2)]
    with pytest.warns(UserWarning, match=r"a training step of MAML cannot be recorded \(no\); it is run as it is") as w:
        found = train(learner, episodes)
    assert len(w) == 1 and not learner.record
    assert all(torch.equal(a, b) for a, b in zip(found, train(plain, episodes), strict=True))


@on_gpu
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MAML, {"steps": 2, "batch_norm": "transductive"}),
        (MAML, {"batch_norm": "running", "learn_rates": "parameter"}),
        (MAML, {"tasks_at_once": 2}),
        (FirstOrderMAML, {"per_step_norm": True}),
        (ANIL, {}),
        (Reptile, {"steps": 2}),
        (MAMLPlusPlus, {"multi_step_loss": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_recorded_step_on_a_gpu_trains_as_one_that_is_run(kind: Any, options: Any) -> None:
    shots = (1, 1, 2, 1, 2, 2)
    episodes = [draw_episode(seed, k).map_items(Tensor.double).to("cuda") for seed, k in enumerate(shots)]
    learners = [build(kind, record=record, **options).to("cuda", torch.float64) for record in (True, False)]
    recorded, plain = (train(learner, episodes) for learner in learners)
    assert learners[0].record and learners[0]._recorded._recordings
    torch.testing.assert_close(recorded, plain)


@on_gpu
def test_a_network_that_looks_at_numbers_is_run_as_it_is_on_a_gpu() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :8] * x.detach().sum().cpu().sign().to(x.device)

    learner = MAML(nn.Sequential(nn.Linear(28, 28), Looks()), 8, 3, adapt=["head.*"]).cuda()
    with pytest.warns(UserWarning, match="cannot be recorded"):
        loss, _ = learner.loss(draw_episode(0).to("cuda"))
    loss.backward()
    assert torch.isfinite(loss)
