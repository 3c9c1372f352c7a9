import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from snail import (
    ANIL,
    BOIL,
    MAML,
    Episode,
    FineTuning,
    FirstOrderMAML,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaSGD,
    Reptile,
)
from snail.inner_loop import GradientLearner, Task
from snail.maml import conjugate_gradients

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def given(batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
    return batch.support_x, batch.support_y, batch.query_x


def gradient_of(learner: GradientLearner, batch: Episode) -> dict[str, Tensor]:
    """The gradient of the loss by every parameter that is learned; zeros where there is none."""
    named = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    loss, _ = learner.loss(batch)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = zip(named.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in found}


# -- linear regression: closed forms -------------------------------------------------------------------------------
#
# f_i(w) = 1/2 (w - w_i*)' S_i (w - w_i*). The mean squared error of items with X'X / m = S_i and values X w_i* is
# twice that, so a step at the rate a/2 on it is one at the rate a on f_i.


def spread(b: int, d: int) -> Tensor:
    """Symmetric positive definite matrices with eigenvalues in about [0.2, 2]."""
    basis, _ = torch.linalg.qr(numbers(b, d, d))
    return basis @ torch.diag_embed(0.2 + 1.8 * torch.rand(b, d, dtype=DOUBLE)) @ basis.mT


def linear_episode(support: Tensor, query: Tensor, optima: Tensor) -> Episode:
    """Tasks whose inputs have second moments ``(b, d, d)``, and whose values a weight ``(b, d)`` explains."""
    items = [math.sqrt(support.shape[-1]) * torch.linalg.cholesky(moments).mT for moments in (support, query)]
    for x, moments in zip(items, (support, query), strict=True):
        torch.testing.assert_close(x.mT @ x / x.shape[1], moments)
    (support_x, support_y), (query_x, query_y) = ((x, x @ optima.unsqueeze(-1)) for x in items)
    return Episode(support_x, support_y, query_x, query_y, None)


def linear(kind: type[GradientLearner], d: int, **options: Any) -> tuple[Any, nn.Parameter]:
    network = nn.Linear(d, 1, bias=False).double()
    return kind(network, **options), network.weight


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("tasks_at_once", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_maml_has_the_closed_forms_gradient_on_linear_regression(steps: int, tasks_at_once: int) -> None:
    moments, optima, a = spread(5, 3), numbers(5, 3), 0.4
    learner, weight = linear(MAML, 3, steps=steps, inner_rate=a / 2, tasks_at_once=tasks_at_once)
    loss, _ = learner.loss(linear_episode(moments, moments, optima))
    loss.backward()
    moved = torch.matrix_power(torch.eye(3, dtype=DOUBLE) - a * moments, steps)
    q = moved @ moments @ moved
    away = weight.detach() - optima
    torch.testing.assert_close(loss.detach() / 2, (0.5 * (away * apply(q, away)).sum(-1)).mean())
    torch.testing.assert_close(weight.grad / 2, apply(q, away).mean(0, keepdim=True))


@pytest.mark.parametrize("steps", [1, 2])
def test_maml_adapts_to_the_support_and_is_judged_by_the_queries(steps: int) -> None:
    support, query, optima, a = spread(4, 3), spread(4, 3), numbers(4, 3), 0.4
    learner, weight = linear(MAML, 3, steps=steps, inner_rate=a / 2)
    found = gradient_of(learner, linear_episode(support, query, optima))["network.embedding.weight"] / 2
    moved = torch.matrix_power(torch.eye(3, dtype=DOUBLE) - a * support, steps)
    away = weight.detach() - optima
    torch.testing.assert_close(found, apply(moved @ query @ moved, away).mean(0, keepdim=True))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("options", [{"kind": FirstOrderMAML}, {"kind": MAML, "first_order": True}])
def test_first_order_maml_leaves_the_jacobian_of_the_steps_out(options: dict[str, Any], steps: int) -> None:
    support, query, optima, a = spread(4, 3), spread(4, 3), numbers(4, 3), 0.4
    learner, weight = linear(d=3, steps=steps, inner_rate=a / 2, **options)
    found = gradient_of(learner, linear_episode(support, query, optima))["network.embedding.weight"] / 2
    moved = torch.matrix_power(torch.eye(3, dtype=DOUBLE) - a * support, steps)
    away = weight.detach() - optima
    torch.testing.assert_close(found, apply(query @ moved, away).mean(0, keepdim=True))


def descend(learner: GradientLearner, batch: Episode, *, rate: float, steps: int = 150) -> None:
    optimiser = torch.optim.SGD(learner.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        learner.loss(batch)[0].backward()
        optimiser.step()


def optimum(weights: Tensor, optima: Tensor) -> Tensor:
    """``(E W_i)^-1 E[W_i w_i*]``."""
    return torch.linalg.solve(weights.mean(0), apply(weights, optima).mean(0))


def test_maml_and_plain_training_converge_to_their_own_optima() -> None:
    moments, optima, a = spread(4, 2), numbers(4, 2), 0.3
    batch, eye = linear_episode(moments, moments, optima), torch.eye(2, dtype=DOUBLE)
    adapted = optimum((eye - a * moments) @ moments @ (eye - a * moments), optima)
    plain = optimum(moments, optima)
    assert (adapted - plain).norm() > 0.1
    learner, weight = linear(MAML, 2, inner_rate=a / 2)
    descend(learner, batch, rate=1.0)
    torch.testing.assert_close(weight[0].detach(), adapted, rtol=1e-5, atol=1e-6)
    # One step of Reptile on all items is plain training on all tasks, at its rate.
    learner, weight = linear(Reptile, 2, steps=1, inner_optimizer="sgd", inner_rate=0.5)
    descend(learner, batch, rate=1.0)
    torch.testing.assert_close(weight[0].detach(), plain, rtol=1e-5, atol=1e-6)


def test_maml_moves_to_the_hard_cluster_and_plain_training_to_the_easy_one() -> None:
    a, easy, hard = 0.5, 0.9 / 0.5, 0.2 / 0.5  # moments, as shares of 1 / a
    centres = {"easy": torch.tensor([1.0, 0.0], dtype=DOUBLE), "hard": torch.tensor([0.0, 1.0], dtype=DOUBLE)}
    rho = torch.tensor([easy, easy, easy, hard], dtype=DOUBLE)  # easy tasks are three in four
    optima = torch.stack([centres["easy"]] * 3 + [centres["hard"]])
    moments = rho.view(4, 1, 1) * torch.eye(2, dtype=DOUBLE)
    batch = linear_episode(moments, moments, optima)
    share = {"easy": 0.75 * easy * (1 - a * easy) ** 2, "hard": 0.25 * hard * (1 - a * hard) ** 2}
    expected = sum(share[name] * centres[name] for name in share) / sum(share.values())
    learner, weight = linear(MAML, 2, inner_rate=a / 2)
    descend(learner, batch, rate=8.0)
    torch.testing.assert_close(weight[0].detach(), expected, rtol=1e-5, atol=1e-6)
    assert (weight[0] - centres["hard"]).norm() < 0.5 * (weight[0] - centres["easy"]).norm()
    share = {"easy": 0.75 * easy, "hard": 0.25 * hard}
    expected = sum(share[name] * centres[name] for name in share) / sum(share.values())
    learner, weight = linear(Reptile, 2, steps=1, inner_optimizer="sgd", inner_rate=0.3)
    descend(learner, batch, rate=1.0)
    torch.testing.assert_close(weight[0].detach(), expected, rtol=1e-5, atol=1e-6)
    assert (weight[0] - centres["easy"]).norm() < 0.5 * (weight[0] - centres["hard"]).norm()


# -- finite differences --------------------------------------------------------------------------------------------


class Attentive(nn.Module):
    """Items of ``(t, c)``, read by torch's attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.enter = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, items: Tensor) -> Tensor:
        x = self.enter(items)
        if self.fused:
            heads = x.unsqueeze(1)
            read = x + F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)
        else:
            read = x + self.attention(x, x, x, need_weights=False)[0]
        return read.mean(1).tanh()


def perceptron(norm: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.Tanh())


def convolutional() -> nn.Module:
    layers = (nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4))
    return nn.Sequential(*layers, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (3,)),
    "plain perceptron": (partial(perceptron, norm=False), (3,)),
    "convolutional": (convolutional, (1, 6, 6)),
    "attention": (partial(Attentive, fused=False), (3, 2)),
    "fused attention": (partial(Attentive, fused=True), (3, 2)),
}


def learned(kind: type[GradientLearner], embedding: str = "perceptron", **options: Any) -> Any:
    """A learner of three ways in double precision; the weights of its batch norm are not those it starts with."""
    torch.manual_seed(1)
    make, _ = EMBEDDINGS[embedding]
    network = make()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return kind(network, 4, 3, **{"inner_rate": 0.5, **options}).double()


def episode(b: int = 2, *, item: tuple[int, ...] = (3,), shots: int = 2, q: int = 4) -> Episode:
    support_y = torch.arange(3).repeat(shots).expand(b, -1)
    return Episode(numbers(b, 3 * shots, *item), support_y, numbers(b, q, *item), torch.randint(3, (b, q)), 3)


def assert_gradient_is_exact(learner: GradientLearner, batch: Episode, *, size: float = 1e-5) -> None:
    """Compare with central differences along a random direction of every parameter."""
    meta_steps = learner.meta_steps

    def value() -> float:
        learner.meta_steps = meta_steps
        with torch.no_grad():
            return learner.loss(batch)[0].item()

    for name, gradient in gradient_of(learner, batch).items():
        parameter = learner.get_parameter(name)
        direction, kept = torch.randn_like(parameter), parameter.detach().clone()
        ends = []
        for sign in (1, -1):
            parameter.data.copy_(kept + sign * size * direction)
            ends.append(value())
        parameter.data.copy_(kept)
        numeric, analytic = (ends[0] - ends[1]) / (2 * size), (gradient * direction).sum().item()
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-8), name


EXACT: dict[str, tuple[type[GradientLearner], str, dict[str, Any]]] = {
    "MAML, 1 step": (MAML, "perceptron", {}),
    "MAML, 3 steps": (MAML, "perceptron", {"steps": 3}),
    "no batch norm": (MAML, "plain perceptron", {"steps": 3}),
    "transductive": (MAML, "perceptron", {"steps": 2, "batch_norm": "transductive"}),
    "running": (MAML, "perceptron", {"steps": 2, "batch_norm": "running"}),
    "ANIL": (ANIL, "perceptron", {"steps": 3}),
    "ANIL, transductive": (ANIL, "perceptron", {"steps": 2, "batch_norm": "transductive"}),
    "ANIL, per step": (ANIL, "perceptron", {"steps": 2, "per_step_norm": True}),
    "BOIL": (BOIL, "perceptron", {"steps": 3}),
    "MetaSGD": (MetaSGD, "perceptron", {"steps": 2}),
    "rates of each step": (MAML, "perceptron", {"steps": 3, "learn_rates": "layer_and_step"}),
    "rates of BOIL": (BOIL, "perceptron", {"steps": 2, "learn_rates": "layer_and_step"}),
    "norm of each step": (MAML, "perceptron", {"steps": 2, "per_step_norm": True}),
    "norm of each step, running": (MAML, "perceptron", {"steps": 2, "per_step_norm": True, "batch_norm": "running"}),
    "adam": (MAML, "plain perceptron", {"steps": 3, "inner_optimizer": "adam", "inner_rate": 0.05}),
    "recompute": (MAML, "perceptron", {"steps": 3, "recompute": True}),
    "recompute, running": (MAML, "perceptron", {"steps": 2, "recompute": True, "batch_norm": "running"}),
    "recompute, adam": (
        MAML,
        "plain perceptron",
        {"steps": 3, "recompute": True, "inner_optimizer": "adam", "inner_rate": 0.05},
    ),
    "MAML++": (MAMLPlusPlus, "perceptron", {"steps": 3, "multi_step_loss": 0}),
    "one task at once": (MAML, "perceptron", {"steps": 2, "tasks_at_once": 1}),
    "convolutional": (MAML, "convolutional", {"steps": 2}),
    "convolutional, transductive": (MAML, "convolutional", {"steps": 2, "batch_norm": "transductive"}),
    "convolutional, running": (MAML, "convolutional", {"steps": 2, "batch_norm": "running"}),
    "convolutional, MAML++": (MAMLPlusPlus, "convolutional", {"steps": 2}),
    "attention": (MAML, "attention", {"steps": 2}),
    "fused attention": (MAML, "fused attention", {"steps": 2}),
    "fused attention, recompute": (MAML, "fused attention", {"steps": 2, "recompute": True}),
}


@pytest.mark.parametrize("name", EXACT)
def test_meta_gradient_equals_finite_differences(name: str) -> None:
    kind, embedding, options = EXACT[name]
    assert_gradient_is_exact(learned(kind, embedding, **options), episode(item=EMBEDDINGS[embedding][1]))


@pytest.mark.parametrize("learn_rates", [None, "layer_and_step"])
def test_meta_gradient_of_a_multi_step_loss_equals_finite_differences(learn_rates: Any) -> None:
    learner = learned(MAML, steps=3, multi_step_loss=10, learn_rates=learn_rates)
    learner.meta_steps = 5
    assert len(set(learner.importance())) == 2
    assert_gradient_is_exact(learner, episode())


def test_meta_gradient_of_regression_equals_finite_differences() -> None:
    torch.manual_seed(1)
    learner = MAML(nn.Sequential(nn.Linear(2, 5), nn.Tanh()), 5, 2, steps=2, inner_rate=0.2).double()
    items = [numbers(3, 4, 2) for _ in range(4)]
    assert_gradient_is_exact(learner, Episode(*items, None))


def test_meta_gradient_of_uneven_batches_equals_finite_differences() -> None:
    assert_gradient_is_exact(learned(MAML, tasks_at_once=2), episode(3))


def test_first_order_gradients_differ_from_finite_differences() -> None:
    # Otherwise the tests above would not see a second derivative that is left out.
    batch = episode()
    exact, first = (gradient_of(learned(kind, steps=3), batch) for kind in (MAML, FirstOrderMAML))
    for name in ("network.embedding.0.weight", "network.embedding.1.weight", "network.head.weight"):
        assert (exact[name] - first[name]).norm() > 0.1 * exact[name].norm()


def test_first_order_gradients_of_rates_are_those_with_constant_inner_gradients() -> None:
    batch, learner = episode(), learned(MetaSGD, "plain perceptron", steps=1, first_order=True)
    found = gradient_of(learner, batch)
    own = {name.removeprefix("network."): p for name, p in learner.named_parameters() if name.startswith("network.")}
    expected = {name: torch.zeros_like(p) for name, p in learner.named_parameters()}
    for x, y, query, truth in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        loss = F.cross_entropy(functional_call(learner.network, own, (x,)), y)
        gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
        after = {name: (w - 0.5 * gradients[name]).detach().requires_grad_() for name, w in own.items()}
        loss = F.cross_entropy(functional_call(learner.network, after, (query,)), truth)
        for name, pull in zip(after, torch.autograd.grad(loss, list(after.values())), strict=True):
            expected[f"network.{name}"] += pull / 2
            expected[f"rates.learned.{name.replace('.', '/')}"] -= pull * gradients[name] / 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_meta_gradient_is_finite_where_an_inner_gradient_is_zero() -> None:
    # A unit that is never active has no gradient, and the root in Adam's step has no derivative there.
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    with torch.no_grad():
        network[0].bias[0] = -100
    for kind in (MAML, FirstOrderMAML):
        learner = kind(network, 4, 3, steps=2, inner_optimizer="adam", inner_rate=0.05).double()
        found = gradient_of(learner, episode())
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found["network.head.weight"].any()


# -- MAML's options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        # v_i = max(1/S - e/(S E), 0.03/S) for all but the last, which has the rest; S = 5, E = 10.
        (0, [0.2, 0.2, 0.2, 0.2, 0.2]),
        (1, [0.18, 0.18, 0.18, 0.18, 0.28]),
        (5, [0.1, 0.1, 0.1, 0.1, 0.6]),
        (9, [0.02, 0.02, 0.02, 0.02, 0.92]),
        (9.9, [0.006, 0.006, 0.006, 0.006, 0.976]),
        (10, [0, 0, 0, 0, 1]),
        (1000, [0, 0, 0, 0, 1]),
    ],
)
def test_multi_step_loss_has_the_weights_of_the_authors_code(over: float, expected: list[float]) -> None:
    learner = learned(MAML, steps=5, multi_step_loss=1000)
    learner.meta_steps = round(100 * over)
    assert learner.importance() == pytest.approx(expected)
    assert sum(learner.importance()) == pytest.approx(1)


def test_multi_step_loss_is_a_weighted_sum_of_the_losses_after_each_step() -> None:
    batch = episode()
    losses = [learned(MAML, steps=3, test_steps=n)(*given(batch)) for n in (1, 2, 3)]
    expected = [F.cross_entropy(answer.flatten(0, 1), batch.query_y.flatten()).item() for answer in losses]
    learner = learned(MAML, steps=3, multi_step_loss=8)
    for taken in range(10):
        assert learner.meta_steps == taken
        share = max((1 - taken / 8) / 3, 0.01) if taken < 8 else 0
        by_hand = share * (expected[0] + expected[1]) + (1 - 2 * share) * expected[2]
        assert learner.loss(batch)[0].item() == pytest.approx(by_hand)


def test_second_derivatives_are_taken_from_the_meta_step_that_is_said() -> None:
    batch, annealed = episode(), learned(MAML, steps=2, second_order_from=2)
    first, exact = (gradient_of(learned(kind, steps=2), batch) for kind in (FirstOrderMAML, MAML))
    for expected in (first, first, exact, exact):
        found = gradient_of(annealed, batch)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_a_meta_step_is_a_loss_in_training() -> None:
    learner, batch = learned(MAML), episode()
    learner.loss(batch)
    learner.eval().loss(batch)
    learner(*given(batch))
    assert learner.meta_steps == 1
    learner.train().loss(batch)
    assert learner.meta_steps == 2


@pytest.mark.parametrize("option", ["second_order_from", "multi_step_loss"])
def test_meta_steps_below_zero_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is -1 meta-steps; it must be at least 0"):
        learned(MAML, **{option: -1})


# -- names ---------------------------------------------------------------------------------------------------------


BODY = ["embedding.0.weight", "embedding.0.bias", "embedding.1.weight", "embedding.1.bias"]
HEAD = ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("kind", "adapted", "note"),
    [
        (MAML, BODY + HEAD, "1 step of sgd at 0.4"),
        (FirstOrderMAML, BODY + HEAD, "1 step of sgd at 0.4"),
        (ANIL, HEAD, "1 step of sgd at 0.4"),
        (BOIL, BODY, "1 step of sgd at 0.4"),
        (MetaSGD, BODY + HEAD, "1 step of sgd at 0.4, rates learned by parameter"),
        (
            MAMLPlusPlus,
            BODY[:2] + HEAD,
            "5 steps of sgd at 0.1, rates learned by layer and step, batch norm by step, multi-step loss until 5000",
        ),
        (FineTuning, BODY + HEAD, "50 steps of adam at 0.001"),
        (Reptile, BODY + HEAD, "5 steps of adam at 0.001"),
        (ImplicitMAML, BODY + HEAD, "16 steps of sgd at 0.1, strength 2, 5 solver steps"),
    ],
)
def test_learners_say_what_they_adapt_and_how(kind: type[GradientLearner], adapted: list[str], note: str) -> None:
    learner = kind(perceptron(), 4, 3)
    assert learner.adapted == adapted
    assert learner.note == note


def test_note_tells_of_every_departure_from_the_exact_gradient() -> None:
    assert learned(MAML, first_order=True).note == "1 step of sgd at 0.5, first order"
    told = learned(MAML, second_order_from=7, multi_step_loss=9).note
    assert told == "1 step of sgd at 0.5, second order from meta-step 7, multi-step loss until 9"


@pytest.mark.parametrize("norm", [False, True])
def test_anil_runs_the_embedding_once(norm: bool) -> None:
    calls: list[int] = []
    for kind, steps in ((ANIL, 1), (ANIL, 5), (MAML, 5)):
        learner = learned(kind, "perceptron" if norm else "plain perceptron", steps=steps)
        handle = learner.network.embedding.register_forward_hook(lambda *_: calls.append(1))
        for use in (lambda: learner.loss(episode()), lambda: learner(*given(episode()))):  # noqa: B023
            calls.clear()
            use()
            assert len(calls) == (2 if kind is ANIL else steps + 1)  # support and queries, or all the passes
        handle.remove()


def test_anil_equals_adapting_the_head_with_the_embedding_run_each_time() -> None:
    class Each(ANIL):
        def enter(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Task:
            return Task("", support_x, support_y, query_x)

    batch = episode()
    for norm in ("inductive", "transductive", "running"):
        once, each = (learned(kind, steps=3, batch_norm=norm) for kind in (ANIL, Each))
        found, expected = gradient_of(once, batch), gradient_of(each, batch)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(once(*given(batch)), each(*given(batch)))


def test_fine_tuning_learns_nothing_between_episodes() -> None:
    learner = learned(FineTuning)
    assert not learner.needs_training
    assert MAML.needs_training
    with pytest.raises(RuntimeError, match="FineTuning learns nothing between episodes"):
        learner.loss(episode())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MAML, {}),
        (MAML, {"steps": 3, "recompute": True, "batch_norm": "running"}),
        (FirstOrderMAML, {}),
        (ANIL, {}),
        (BOIL, {}),
        (MetaSGD, {}),
        (MAMLPlusPlus, {"steps": 2, "batch_norm": "running"}),
        (Reptile, {"inner_rate": 0.05}),
        (Reptile, {"inner_rate": 0.3, "inner_optimizer": "sgd", "inner_batch": 5}),
        (ImplicitMAML, {"inner_rate": 0.2}),
        (ImplicitMAML, {"inner_rate": 0.2, "adapt": ["head.*"]}),
    ],
)
def test_learners_learn(kind: type[GradientLearner], options: dict[str, Any]) -> None:
    learner, batch = learned(kind, **options), episode(4)
    optimiser, losses = torch.optim.Adam(learner.parameters(), lr=0.05), []
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    for _ in range(25):
        optimiser.zero_grad()
        loss, _ = learner.loss(batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    # A bias in front of batch norm has no effect, so its rate may or may not move, by rounding.
    of_no_effect = {f"rates.learned.{name}" for name in ("embedding/0/bias",)}
    still = {name for name, p in learner.named_parameters() if torch.equal(p, before[name])} - of_no_effect
    frozen = {name for name, p in learner.named_parameters() if not p.requires_grad}
    # Reptile's way is that of the adapted weights; implicit gradients know no rates.
    assert still == frozen


# -- implicit MAML -------------------------------------------------------------------------------------------------


def implicit(d: int, b: int, solver_steps: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-gradient on linear regression; of the closed form its system and the queries' gradient."""
    torch.manual_seed(3)
    support, query, optima, strength = spread(b, d), spread(b, d), numbers(b, d), 1.5
    learner, weight = linear(
        ImplicitMAML, d, steps=200, inner_rate=0.2, strength=strength, solver_steps=solver_steps, **options
    )
    batch = linear_episode(support, query, optima)
    found = gradient_of(learner, batch)["network.embedding.weight"].squeeze(0)
    # The mean squared error's second derivative is twice the moments.
    system = torch.eye(d, dtype=DOUBLE) + 2 * support / strength
    minimum = torch.linalg.solve(system, weight.detach() + apply(2 * support / strength, optima))
    adapted = (learner(*given(batch)) / batch.query_x.sum(-1, keepdim=True)) if d == 1 else None
    assert adapted is None or torch.allclose(adapted[..., 0], minimum.expand(-1, batch.query_x.shape[1]))
    return found, system, apply(2 * query, minimum - optima)


@pytest.mark.parametrize("b", [1, 4])
def test_implicit_maml_tends_to_the_closed_form_with_solver_steps(b: int) -> None:
    errors = []
    for solver_steps in (1, 2, 3, 4, 5, 8):
        found, system, slope = implicit(5, b, solver_steps)
        expected = torch.linalg.solve(system, slope).mean(0)
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors[:5]))
    assert errors[0] > 1e-2
    assert max(errors[4:]) < 1e-10  # as many steps as unknowns, and more than that


def test_implicit_maml_adapts_to_the_regularised_minimum() -> None:
    implicit(1, 3, 1)


@pytest.mark.parametrize("damping", [0.0, 0.5, 2.0])
def test_implicit_maml_adds_damping_to_the_identity(damping: float) -> None:
    found, system, slope = implicit(3, 4, 3, damping=damping)
    damped = system + damping * torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(found, torch.linalg.solve(damped, slope).mean(0), rtol=1e-9, atol=1e-12)


def test_implicit_maml_keeps_no_more_for_more_steps() -> None:
    kept: dict[int, int] = {}
    for steps in (2, 20):

        def count(x: Tensor) -> Tensor:
            kept[steps] = kept.get(steps, 0) + x.numel()  # noqa: B023
            return x

        learner, batch = learned(ImplicitMAML, steps=steps), episode()
        task = learner.enter(*given(batch))
        weights = learner.start(task)
        at_first = learner.step(task, weights, 0, graph=False)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss, _ = learner.meta_loss(task, batch.query_y)
        stack, seen = [loss.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack.extend(after for after, _ in node.next_functions)
        kept[steps] = len(seen)
        assert at_first.keys() == weights.keys()
    assert kept[2] == kept[20]


@pytest.mark.parametrize("norm", ["inductive", "transductive", "running"])
@pytest.mark.parametrize(
    ("embedding", "adapt"),
    [
        ("plain perceptron", ["head.*"]),  # the embedding is run once
        ("perceptron", ["head.*"]),
        ("perceptron", ["embedding.1.*"]),
        ("perceptron", ["embedding.1.bias", "head.*"]),  # the embedding is run in every step
        ("plain perceptron", ["*"]),
    ],
)
def test_implicit_meta_gradient_equals_finite_differences_at_the_minimum(
    embedding: str, adapt: list[str], norm: str
) -> None:
    learner = learned(
        ImplicitMAML,
        embedding,
        adapt=adapt,
        batch_norm=norm,
        steps=120,
        inner_rate=0.4,
        strength=1.0,
        solver_steps=40,
    )
    assert_gradient_is_exact(learner, episode())


def systems(b: int, n: int) -> tuple[Tensor, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    matrix = spread(b, n)

    def system(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        image = apply(matrix, torch.cat([vector["some"].flatten(1), vector["others"]], 1))
        return {"some": image[:, :4].view(-1, 2, 2), "others": image[:, 4:]}

    return matrix, system


@pytest.mark.parametrize("b", [1, 3])
def test_conjugate_gradients_solve_a_batch_of_systems(b: int) -> None:
    matrix, system = systems(b, 7)
    wanted = {"some": numbers(b, 2, 2), "others": numbers(b, 3)}
    flat = torch.cat([wanted["some"].flatten(1), wanted["others"]], 1)
    expected = torch.linalg.solve(matrix, flat)
    errors = []
    for steps in range(1, 8):
        solution = conjugate_gradients(system, wanted, steps)
        away = torch.cat([solution["some"].flatten(1), solution["others"]], 1) - expected
        errors.append((away * apply(matrix, away)).sum(-1))  # what conjugate gradients make least of, step by step
    assert torch.stack(errors).diff(dim=0).lt(0).all()
    torch.testing.assert_close(solution["some"].flatten(1), expected[:, :4], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(solution["others"], expected[:, 4:], rtol=1e-9, atol=1e-11)


def test_conjugate_gradients_keep_tasks_apart_and_stop_at_a_solution() -> None:
    _matrix, system = systems(3, 7)
    wanted = {"some": numbers(3, 2, 2), "others": numbers(3, 3)}
    wanted = {name: value * torch.tensor([1.0, 0.0, 1e6], dtype=DOUBLE).view(3, *[1] * (value.ndim - 1))
              for name, value in wanted.items()}  # fmt: skip
    together = conjugate_gradients(system, wanted, 3)
    for i in range(3):

        def alone(vector: dict[str, Tensor], i: int = i) -> dict[str, Tensor]:
            every = {name: value.expand(3, *value.shape[1:]) for name, value in vector.items()}
            return {name: value[i : i + 1] for name, value in system(every).items()}

        found = conjugate_gradients(alone, {name: value[i : i + 1] for name, value in wanted.items()}, 3)
        for name in found:
            torch.testing.assert_close(found[name][0], together[name][i])
    assert not any(value[1].any() for value in together.values())
    longer = conjugate_gradients(system, wanted, 50)
    assert all(value.isfinite().all() for value in longer.values())
    image = system(longer)
    for name in image:
        torch.testing.assert_close(image[name], wanted[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"strength": 0.0}, {"strength": -1.0}, {"damping": -0.5}, {"solver_steps": 0}],
)
def test_implicit_maml_refuses_a_system_without_a_solution(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="strength must be positive, damping at least 0, solver_steps at least 1"):
        learned(ImplicitMAML, **options)


# -- Reptile -------------------------------------------------------------------------------------------------------


def union(batch: Episode) -> tuple[Tensor, Tensor]:
    return torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)


def trained(learner: Reptile, batch: Episode, steps: int) -> list[dict[str, Tensor]]:
    """For each task the weights after plain steps of torch's SGD on all its items."""
    found = []
    for x, y in zip(*union(batch), strict=True):
        weights = {name: p.detach().clone().requires_grad_() for name, p in learner.network.named_parameters()}
        optimiser = torch.optim.SGD(weights.values(), lr=learner.inner_rate)
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(functional_call(learner.network, weights, (x,)), y).backward()
            optimiser.step()
        found.append({name: weight.detach() for name, weight in weights.items()})
    return found


@pytest.mark.parametrize("tasks_at_once", [1, None])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_reptiles_gradient_is_the_weights_less_the_mean_of_the_adapted_ones(
    steps: int, tasks_at_once: int | None
) -> None:
    learner = learned(Reptile, "plain perceptron", steps=steps, inner_optimizer="sgd", tasks_at_once=tasks_at_once)
    batch = episode(3)
    found, ends = gradient_of(learner, batch), trained(learner, batch, steps)
    for name, weight in learner.network.named_parameters():
        away = weight.detach() - torch.stack([end[name] for end in ends]).mean(0)
        torch.testing.assert_close(found[f"network.{name}"], away)


def test_reptiles_loss_is_that_of_the_queries_after_training_on_all_items() -> None:
    learner, batch = learned(Reptile, "plain perceptron", steps=3, inner_optimizer="sgd"), episode(3)
    ends = trained(learner, batch, 3)
    losses = [
        F.cross_entropy(functional_call(learner.network, end, (x,)), y).item()
        for end, x, y in zip(ends, batch.query_x, batch.query_y, strict=True)
    ]
    assert learner.loss(batch)[0].item() == pytest.approx(sum(losses) / 3)


@pytest.mark.parametrize("b", [1, 3])
def test_reptile_with_sgd_outside_is_the_papers_update(b: int) -> None:
    learner, batch, epsilon = learned(Reptile, "plain perceptron", steps=3, inner_optimizer="sgd"), episode(b), 0.25
    ends = trained(learner, batch, 3)
    expected = {
        name: weight + epsilon * (torch.stack([end[name] for end in ends]).mean(0) - weight)
        for name, weight in ((n, p.detach().clone()) for n, p in learner.network.named_parameters())
    }
    descend(learner, batch, rate=epsilon, steps=1)
    for name, weight in learner.network.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name])


def test_reptile_of_two_steps_expands_as_in_the_paper() -> None:
    # With g and H those of the loss at the weights, two steps at a rate a go a (2 g - a H g) + O(a^3).
    batch = episode(1)
    x, y = union(batch)

    def loss(weights: dict[str, Tensor], network: nn.Module) -> Tensor:
        return F.cross_entropy(functional_call(network, weights, (x[0],)), y[0])

    left = []
    for a in (0.02, 0.01, 0.005):
        learner = learned(Reptile, "plain perceptron", steps=2, inner_optimizer="sgd", inner_rate=a)
        found = gradient_of(learner, batch)
        own = dict(learner.network.named_parameters())
        g = dict(zip(own, torch.autograd.grad(loss(own, learner.network), list(own.values()), create_graph=True)))  # noqa: B905
        moved = {name: (w - a * g[name]).detach().requires_grad_() for name, w in own.items()}
        second = torch.autograd.grad(loss(moved, learner.network), list(moved.values()))
        for (name, first), then in zip(g.items(), second, strict=True):
            torch.testing.assert_close(found[f"network.{name}"], a * (first.detach() + then))
        along = sum((first * first.detach()).sum() for first in g.values())
        curved = torch.autograd.grad(along, list(own.values()))
        errors = [
            (found[f"network.{name}"] - a * (2 * g[name].detach() - a * bend)).square().sum()
            for name, bend in zip(own, curved, strict=True)
        ]
        left.append(torch.stack(errors).sum().sqrt().item())
    assert left[0] / left[1] == pytest.approx(8, rel=0.1)
    assert left[1] / left[2] == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("inner_batch", [1, 4, 10, 99, None])
def test_reptile_draws_items_for_each_step(inner_batch: int | None) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Reptile):
        def support_losses(self, task: Task, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((task.support, task.support_y))
            return super().support_losses(task, *args, **kwargs)

    learner = learned(Watched, "plain perceptron", steps=30, inner_batch=inner_batch, inner_rate=0.001)
    batch = episode(2)
    number = torch.arange(20, dtype=DOUBLE).view(2, 10)
    batch.support_x[..., 0], batch.query_x[..., 0] = number[:, :6], number[:, 6:]
    _, labels = union(batch)
    learner.loss(batch)
    assert len(seen) == 30
    for items, truth in seen:
        drawn = items[..., 0].long()
        assert drawn.shape == truth.shape == (2, min(inner_batch or 10, 10))
        assert all(len(set(row.tolist())) == len(row) for row in drawn)  # no item twice
        assert torch.equal(drawn // 10, torch.tensor([[0], [1]]).expand_as(drawn))  # none of another task
        assert torch.equal(truth, labels.flatten()[drawn])
    if inner_batch is not None and inner_batch < 10:
        assert len({int(item) for items, _ in seen for item in items[..., 0].flatten()}) > 2 * inner_batch
        assert any(not torch.equal(seen[0][0] % 10, items % 10) for items, _ in seen)
        assert any(not torch.equal(items[0, :, 0] % 10, items[1, :, 0] % 10) for items, _ in seen)


def test_reptile_with_adam_inside_moves_each_weight_by_about_the_rate() -> None:
    # The first step of Adam without momentum is the sign of the gradient.
    learner, batch = learned(Reptile, "plain perceptron", steps=1, inner_rate=0.001), episode(1)
    assert learner.inner_optimizer == "adam"
    x, y = union(batch)
    own = dict(learner.network.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(learner.network(x[0]), y[0]), list(own.values()))
    found = gradient_of(learner, batch)
    for name, gradient in zip(own, gradients, strict=True):
        expected = 0.001 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(found[f"network.{name}"], expected)


def test_reptile_refuses_batches_of_nothing() -> None:
    with pytest.raises(ValueError, match="inner_batch is 0; it must be at least 1"):
        learned(Reptile, inner_batch=0)


def test_reptile_scores_on_the_support_alone() -> None:
    batch = episode()
    options = {"steps": 3, "inner_optimizer": "sgd"}
    reptile, maml = (learned(kind, **options).eval() for kind in (Reptile, MAML))
    torch.testing.assert_close(reptile(*given(batch)), maml(*given(batch)))
