import copy
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torchvision.models import resnet18

from snail import (
    ANIL,
    BOIL,
    MAML,
    Conv4,
    Episode,
    FineTuning,
    FirstOrderMAML,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaSGD,
    Reptile,
)
from snail.inner_loop import GradientLearner, task_losses

DOUBLE = torch.float64
NORMS = ("inductive", "transductive", "running")
TRAINED: dict[str, type[GradientLearner]] = {
    learner.__name__: learner
    for learner in (MAML, FirstOrderMAML, ANIL, BOIL, MetaSGD, MAMLPlusPlus, Reptile, ImplicitMAML)
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def episode(b: int = 2, *, ways: int = 3, shots: int = 2, q: int = 4, item: tuple[int, ...] = (3,)) -> Episode:
    """Made-up episodes in double precision."""
    support_y = torch.arange(ways).repeat(shots).expand(b, -1)
    support_x = torch.randn(b, ways * shots, *item, dtype=DOUBLE)
    query_x, query_y = torch.randn(b, q, *item, dtype=DOUBLE), torch.randint(ways, (b, q))
    return Episode(support_x, support_y, query_x, query_y, ways)


def given(batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
    return batch.support_x, batch.support_y, batch.query_x


def body(norm: bool = True) -> nn.Sequential:
    """Items of three numbers to four channels."""
    layers = (nn.BatchNorm1d(4),) if norm else ()
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh())


def learned(kind: type[GradientLearner] = MAML, *, norm: bool = True, **options: Any) -> Any:
    """A learner of two steps in double precision, the same at every call."""
    torch.manual_seed(1)
    options = {"steps": 2, "inner_rate": 0.3, **options}
    return kind(body(norm), 4, 3, **options).double()


def gradients_of(learner: GradientLearner, batch: Episode) -> dict[str, Tensor]:
    """The gradient of the loss by every parameter; zeros where there is none."""
    learner.zero_grad()
    learner.loss(batch)[0].backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}")


# -- losses and rates ----------------------------------------------------------------------------------------------


def test_task_losses_are_means_of_each_task() -> None:
    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (3, 4), dtype=torch.int32)
    expected = torch.stack([F.cross_entropy(one, label.long()) for one, label in zip(logits, labels, strict=True)])
    torch.testing.assert_close(task_losses(logits, labels), expected)
    values, truth = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    torch.testing.assert_close(task_losses(values, truth), (values - truth).square().mean((1, 2)))


def test_rates_are_one_number_or_one_an_element_or_one_a_weight_and_step() -> None:
    plain, element, step = (
        learned(learn_rates=kind, steps=3, inner_rate=0.2).rates for kind in (None, "parameter", "layer_and_step")
    )
    name = "embedding.0.weight"
    assert plain(name, 2) == 0.2
    assert not list(plain.parameters())
    assert element(name, 1).shape == (4, 3)
    assert sum(p.numel() for p in element.parameters()) == 12 + 4 + 4 + 4 + 12 + 3
    assert sum(p.numel() for p in step.parameters()) == 6 * 3
    with torch.no_grad():
        step.learned["embedding/0/weight"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert [step(name, k).item() for k in range(5)] == [1, 2, 3, 3, 3]  # steps beyond those of training use the last
    for rates in (element, step):
        assert all(p.requires_grad and p.is_leaf for p in rates.parameters())
    assert step("head.bias", 0).item() == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["parameter", "layer_and_step"])
def test_learned_rates_are_what_the_steps_are_taken_at(kind: Any) -> None:
    batch, learner = episode(), learned(learn_rates=kind, norm=False, steps=2, test_steps=[1, 2])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for rate in learner.rates.parameters():
            rate.copy_(0.3 * torch.randn(rate.shape, generator=generator))
    weights = [{n: w.detach() for n, w in learner.network.named_parameters()} for _ in range(2)]
    for step, answer in enumerate(learner.answers(*given(batch))):
        for i, own in enumerate(weights):
            own = {name: weight.requires_grad_() for name, weight in own.items()}
            logits = functional_call(learner.network, own, (batch.support_x[i],))
            gradients = torch.autograd.grad(F.cross_entropy(logits, batch.support_y[i]), list(own.values()))
            weights[i] = {
                name: (weight - learner.rates(name, step) * gradient).detach()
                for (name, weight), gradient in zip(own.items(), gradients, strict=True)
            }
            expected = functional_call(learner.network, weights[i], (batch.query_x[i],))
            torch.testing.assert_close(answer[i], expected)


# -- steps ---------------------------------------------------------------------------------------------------------


def adapted_by_torch(
    network: nn.Module, batch: Episode, optimizer: Callable[..., torch.optim.Optimizer], steps: int
) -> Tensor:
    """The answers of a copy of the network for each task, trained with an optimiser of torch; no batch norm."""
    answers = []
    for x, y, query in zip(*given(batch), strict=True):
        own = copy.deepcopy(network)
        optimiser = optimizer(own.parameters())
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimiser.step()
        answers.append(own(query).detach())
    return torch.stack(answers)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_inner_loop_of_sgd_equals_torchs(steps: int, b: int) -> None:
    learner, batch = learned(norm=False, steps=steps), episode(b)
    expected = adapted_by_torch(learner.network, batch, lambda p: torch.optim.SGD(p, lr=0.3), steps)
    torch.testing.assert_close(learner(*given(batch)), expected)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_inner_loop_of_adam_equals_torchs_without_momentum(steps: int) -> None:
    learner, batch = learned(norm=False, steps=steps, inner_optimizer="adam", inner_rate=0.1), episode(3)
    expected = adapted_by_torch(
        learner.network, batch, lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.999)), steps
    )
    torch.testing.assert_close(learner(*given(batch)), expected)


def test_inner_loop_of_adam_takes_two_steps_as_by_hand() -> None:
    # One weight w = 1, the item 1, the value 0: the loss is w², its gradient 2w.
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(network.weight)
    learner = MAML(network, steps=2, inner_optimizer="adam", inner_rate=0.1, test_steps=[0, 1, 2])
    one, zero = torch.ones(1, 1, 1, dtype=DOUBLE), torch.zeros(1, 1, 1, dtype=DOUBLE)
    first = 1 - 0.1 * 2 / (2 + 1e-8)
    gradient = 2 * first
    moment = (0.999 * 0.001 * 4 + 0.001 * gradient**2) / (1 - 0.999**2)
    second = first - 0.1 * gradient / (math.sqrt(moment) + 1e-8)
    assert learner.answers(one, zero, one).flatten().tolist() == pytest.approx([1, first, second], rel=1e-14)


def test_inner_loop_begins_anew_for_each_episode() -> None:
    learner, batch = learned(inner_optimizer="adam"), episode()
    first = learner(*given(batch))
    learner(*given(episode()))
    assert torch.equal(learner(*given(batch)), first)


def test_inner_loop_lowers_the_supports_loss_of_each_task() -> None:
    learner, batch = learned(test_steps=[0, 1, 5, 20]), episode(3)
    answers = learner.answers(batch.support_x, batch.support_y, batch.support_x)
    losses = torch.stack([task_losses(answer, batch.support_y) for answer in answers])
    assert losses.diff(dim=0).lt(0).all()


def test_labels_of_the_support_decide_the_answers() -> None:
    learner, batch = learned(), episode()
    other = learner(batch.support_x, (batch.support_y + 1) % 3, batch.query_x)
    assert (other - learner(*given(batch))).abs().amin((1, 2)).gt(1e-3).all()


# -- which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapt", "names"),
    [
        (["*"], ["embedding.0.weight", "embedding.0.bias", "embedding.1.weight", "embedding.1.bias", "head.*"]),
        (["head.*"], ["head.*"]),
        (["*.bias"], ["embedding.0.bias", "embedding.1.bias", "head.bias"]),
        (["embedding.[1-9].*", "head.bias"], ["embedding.1.weight", "embedding.1.bias", "head.bias"]),
    ],
)
def test_adapt_names_the_weights_that_move(adapt: list[str], names: list[str]) -> None:
    learner, batch = learned(adapt=adapt), episode()
    expected = [full for name in names for full in (["head.weight", "head.bias"] if name == "head.*" else [name])]
    assert learner.adapted == expected
    task = learner.enter(*given(batch))
    before = learner.start(task)
    after = learner.step(task, before, 0, graph=True)
    assert sorted(after) == sorted(expected)
    moved = {name: (after[name] - before[name]).flatten(1).abs().sum(1).gt(0).all() for name in after}
    moved.pop("embedding.0.bias", None)  # batch norm behind it takes it out again
    assert all(moved.values())


def test_rates_are_learned_for_adapted_weights_alone() -> None:
    learner = learned(MetaSGD, adapt=["head.*"])
    assert sorted(name for name, _ in learner.rates.named_parameters()) == ["learned.head/bias", "learned.head/weight"]


@pytest.mark.parametrize("kind", [MAML, ANIL, BOIL])
def test_frozen_parameters_can_be_adapted(kind: type[GradientLearner]) -> None:
    batch, learner, frozen = episode(), learned(kind), learned(kind)
    frozen.requires_grad_(False)
    torch.testing.assert_close(frozen(*given(batch)), learner(*given(batch)))
    loss, _ = frozen.loss(batch)
    torch.testing.assert_close(loss, learner.loss(batch)[0].detach())
    assert not loss.requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())


def test_frozen_parameters_do_not_change_the_gradient_of_others() -> None:
    batch, learner, partly = episode(), learned(), learned()
    partly.network.embedding.requires_grad_(False)
    every, some = gradients_of(learner, batch), gradients_of(partly, batch)
    assert all(
        torch.equal(some[name], torch.zeros_like(some[name])) for name in some if name.startswith("network.embedding.")
    )
    torch.testing.assert_close(some["network.head.weight"], every["network.head.weight"])
    torch.testing.assert_close(some["network.head.bias"], every["network.head.bias"])


@pytest.mark.parametrize("first_order", [False, True])
def test_rates_are_learned_for_frozen_weights(first_order: bool) -> None:
    batch, learner, frozen = episode(), *(learned(MetaSGD, first_order=first_order) for _ in range(2))
    frozen.network.requires_grad_(False)
    every, some = gradients_of(learner, batch), gradients_of(frozen, batch)
    rates = [name for name in every if name.startswith("rates.")]
    assert_same({name: some[name] for name in rates}, {name: every[name] for name in rates})
    assert all(some[name].any() for name in rates)


def test_weights_without_effect_stay() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, items: Tensor) -> Tensor:
            return self.used(items)

    learner, batch = MAML(Idle(), ways=3, steps=2, inner_optimizer="adam").double(), episode()
    task = learner.enter(*given(batch))
    before = learner.start(task)
    after = learner.step(task, before, 0, graph=True)
    assert torch.equal(after["embedding.idle.weight"], before["embedding.idle.weight"])
    learner.loss(batch)[0].backward()
    assert learner.network.embedding.idle.weight.grad is None


# -- tasks in parallel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks_at_once", "threads"), [(1, 1), (3, 1), (1, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("norm", [*NORMS, None])
@pytest.mark.parametrize("name", TRAINED)
def test_tasks_in_parallel_equal_one_after_the_other(
    name: str, norm: str | None, tasks_at_once: int, threads: int
) -> None:
    options = {} if norm is None else {"batch_norm": norm}
    together = learned(TRAINED[name], norm=norm is not None, tasks_at_once=4, **options)
    apart = learned(TRAINED[name], norm=norm is not None, tasks_at_once=tasks_at_once, threads=threads, **options)
    batch = episode(4)
    for _ in range(2):  # running averages of the first meta-step are averages of averages after the second
        (loss, logs), (expected, expected_logs) = together.loss(batch), apart.loss(batch)
        torch.testing.assert_close(loss, expected)
        assert_same(logs, expected_logs)
    gradients = gradients_of(together, batch)
    assert_same(gradients, gradients_of(apart, batch))
    assert any(gradient.any() for gradient in gradients.values())
    assert_same(dict(together.named_buffers()), dict(apart.named_buffers()))
    for learner in (together, apart):
        learner.eval()
    torch.testing.assert_close(together(*given(batch)), apart(*given(batch)))


@pytest.mark.parametrize("norm", NORMS)
def test_tasks_of_fine_tuning_in_parallel_equal_one_after_the_other(norm: str) -> None:
    together, apart = (
        learned(FineTuning, batch_norm=norm, tasks_at_once=n, inner_rate=0.1, steps=5).eval() for n in (3, 1)
    )
    batch = episode(3)
    torch.testing.assert_close(together(*given(batch)), apart(*given(batch)))


def test_loss_is_the_mean_over_the_queries_whatever_the_number_of_tasks_at_once() -> None:
    batch, answers = episode(5), []
    for tasks_at_once in (1, 2, 5, 99, None):
        learner = learned(tasks_at_once=tasks_at_once)
        loss, logs = learner.loss(batch)
        answer = learner(*given(batch))
        torch.testing.assert_close(loss.detach(), F.cross_entropy(answer.flatten(0, 1), batch.query_y.flatten()))
        assert float(logs["accuracy"]) == pytest.approx(float((answer.argmax(-1) == batch.query_y).double().mean()))
        answers.append(answer)
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


def test_tasks_do_not_meet() -> None:
    learner, batch = learned().eval(), episode(3)
    before = learner(*given(batch))
    batch.support_x[1] += 1
    after = learner(*given(batch))
    torch.testing.assert_close(after[::2], before[::2])
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_tasks_are_computed_as_many_at_once_as_is_said() -> None:
    seen: list[int] = []

    class Watched(MAML):
        def enter(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Any:
            seen.append(len(support_x))
            return super().enter(support_x, support_y, query_x)

    for tasks_at_once, expected in ((2, [2, 2, 1]), (1, [1] * 5), (None, [5])):
        seen.clear()
        learner = learned(Watched, tasks_at_once=tasks_at_once)
        learner.loss(episode(5))
        learner(*given(episode(5)))
        assert seen == expected * 2
    seen.clear()
    batch = episode(5)
    learner.numbers_on_cpu = 2 * batch.support_x[0].numel() + 1
    learner(*given(batch))
    assert seen == [2, 2, 1]


@pytest.mark.parametrize(
    ("shape", "together"),
    [((32, 5, 1, 28, 28), 4), ((32, 20, 1, 28, 28), 1), ((4, 5, 3, 84, 84), 1), ((25, 10, 1), 1600)],
)
def test_tasks_are_computed_as_many_at_once_as_suits_their_size(shape: tuple[int, ...], together: int) -> None:
    support_x = torch.empty(shape, device="meta")
    assert learned().tasks_together(support_x) == len(support_x)  # not on a CPU: all
    assert learned().tasks_together(torch.empty(1, device="cpu").expand(shape)) == together
    assert learned(tasks_at_once=3).tasks_together(support_x) == 3


def transductive_loss(network: nn.Module, batch: Episode, rate: float, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """MAML's loss and gradient with nothing but torch: task after task, the network in torch's own training mode."""
    network = copy.deepcopy(network).train()
    names, weights = zip(*network.named_parameters(), strict=True)
    losses = []
    for x, y, query, truth in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        own = list(weights)
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(network, dict(zip(names, own, strict=True)), (x,)), y)
            own = [w - rate * g for w, g in zip(own, torch.autograd.grad(loss, own, create_graph=True), strict=True)]
        losses.append(F.cross_entropy(functional_call(network, dict(zip(names, own, strict=True)), (query,)), truth))
    total = torch.stack(losses).mean()
    gradients = torch.autograd.grad(total, weights)
    return total.detach(), dict(zip(names, gradients, strict=True))


class Attentive(nn.Module):
    """A perceptron with torch's attention over its items' positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, items: Tensor) -> Tensor:
        read: Tensor = self.out(self.attention(items, items, items)[0].mean(1))
        return read


UNMODIFIED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: resnet18(num_classes=2), (3, 32, 32)),
    "perceptron": (
        lambda: nn.Sequential(OrderedDict(a=nn.Linear(3, 8), b=nn.BatchNorm1d(8), c=nn.Tanh(), d=nn.Linear(8, 2))),
        (3,),
    ),
    "attention": (Attentive, (3, 2)),
    "conv4": (lambda: Conv4(filters=2, image_size=16, out_features=2), (1, 16, 16)),
    "strided": (lambda: Conv4(filters=2, image_size=16, out_features=2, strided=True), (1, 16, 16)),
}


@pytest.mark.parametrize("name", UNMODIFIED)
def test_any_network_goes_in_unmodified(name: str) -> None:
    make, item = UNMODIFIED[name]
    network, batch = make().double(), episode(2, ways=2, shots=1, q=2, item=item)
    expected, by_hand = transductive_loss(network, batch, 0.1, 1)
    before = copy.deepcopy(network.state_dict())
    learner = MAML(network, ways=2, steps=1, inner_rate=0.1, batch_norm="transductive")
    loss, _ = learner.loss(batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    for parameter, gradient in by_hand.items():
        found = network.get_parameter(parameter).grad
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)
    assert_same(dict(network.state_dict()), dict(before))


# -- batch norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MAML, ANIL, BOIL, Reptile, ImplicitMAML, FineTuning, MAMLPlusPlus])
@pytest.mark.parametrize("norm", NORMS)
def test_answers_depend_on_other_queries_only_where_it_is_said(kind: type[GradientLearner], norm: str) -> None:
    learner, batch = learned(kind, batch_norm=norm, steps=2), episode(2)
    if kind is not FineTuning:
        learner.loss(batch)  # moves running averages
    learner.eval()
    together = learner(*given(batch))
    changed = batch.query_x.clone()
    changed[:, 1:] += 1
    moved = (learner(batch.support_x, batch.support_y, changed) - together)[:, 0].abs().max()
    assert learner.transductive is (norm == "transductive")
    if learner.transductive:
        assert moved > 1e-3
        return
    assert moved < 1e-12
    alone = [learner(batch.support_x, batch.support_y, query) for query in batch.query_x.split(1, 1)]
    torch.testing.assert_close(torch.cat(alone, 1), together)


@pytest.mark.parametrize("norm", NORMS)
def test_answers_without_batch_norm_do_not_depend_on_other_queries(norm: str) -> None:
    learner, batch = learned(norm=False, batch_norm=norm).eval(), episode()
    alone = [learner(batch.support_x, batch.support_y, query) for query in batch.query_x.split(1, 1)]
    torch.testing.assert_close(torch.cat(alone, 1), learner(*given(batch)))


def test_batch_norm_is_told() -> None:
    told = {norm: learned(batch_norm=norm).batch_norm for norm in NORMS}
    assert told == {
        "inductive": "inductive",
        "transductive": "transductive",
        "running": "inductive, running averages",
    }
    assert learned(norm=False).batch_norm == "none"
    assert learned(norm=False, batch_norm="running").batch_norm == "none"


def normed_first(**options: Any) -> Any:
    """Batch norm of the items themselves, so that its statistics are those of the data."""
    torch.manual_seed(2)
    return MAML(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), ways=3, **{"steps": 1, **options}).double()


def test_inductive_batch_norm_uses_the_support_under_the_weights_that_answer() -> None:
    learner, batch = learned(steps=1), episode()
    task = learner.enter(*given(batch))
    weights = learner.step(task, learner.start(task), 0, graph=False)
    answer = learner(*given(batch))
    for i in range(2):
        own = {name: weight[i] for name, weight in weights.items()}
        support, query = (
            F.linear(x[i], own["embedding.0.weight"], own["embedding.0.bias"]) for x in (batch.support_x, batch.query_x)
        )
        normal = (query - support.mean(0)) / (support.var(0, correction=0) + 1e-5).sqrt()
        features = (normal * own["embedding.1.weight"] + own["embedding.1.bias"]).tanh()
        torch.testing.assert_close(answer[i], F.linear(features, own["head.weight"], own["head.bias"]))


def of_passes(*passes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of ``(b, i, c)``, averaged over tasks and passes."""
    return (
        torch.stack([x.mean(1) for x in passes]).mean((0, 1)),
        torch.stack([x.var(1, correction=1) for x in passes]).mean((0, 1)),
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tasks_at_once", [1, 2, None])
def test_running_averages_move_once_per_meta_step(tasks_at_once: int | None, recompute: bool) -> None:
    learner = normed_first(batch_norm="running", tasks_at_once=tasks_at_once, recompute=recompute)
    mean, var = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    for _ in range(2):
        batch = episode(3, q=6)
        batch.support_x += 2
        learner.loss(batch)[0].backward()
        of_mean, of_var = of_passes(batch.support_x, batch.query_x)
        mean, var = 0.9 * mean + 0.1 * of_mean, 0.9 * var + 0.1 * of_var
        averages = learner._averages(0)["embedding.0"]
        torch.testing.assert_close(averages[0], mean)
        torch.testing.assert_close(averages[1], var)
        assert len({id(value) for value in learner.averages.buffers()}) == 2
    own = learner.network.embedding[0]
    assert int(own.num_batches_tracked) == 0
    assert torch.equal(own.running_mean, torch.zeros(3, dtype=DOUBLE))
    assert torch.equal(own.running_var, torch.ones(3, dtype=DOUBLE))


def test_running_averages_of_each_step_are_its_own() -> None:
    learner, batch = normed_first(batch_norm="running", per_step_norm=True, steps=2), episode(3, q=6)
    learner.loss(batch)
    for index, items in enumerate((batch.support_x, batch.support_x, batch.query_x)):
        averages = learner._averages(index)["embedding.0"]
        mean, var = of_passes(items)
        torch.testing.assert_close(averages[0], 0.1 * mean)
        torch.testing.assert_close(averages[1], 0.9 + 0.1 * var)


@pytest.mark.parametrize("per_step_norm", [False, True])
def test_running_averages_are_used_and_kept_in_evaluation(per_step_norm: bool) -> None:
    learner = normed_first(batch_norm="running", per_step_norm=per_step_norm, steps=1, test_steps=[0, 1, 2])
    for _ in range(3):
        learner.loss(episode(3))
    learner.eval()
    before, batch = copy.deepcopy(dict(learner.named_buffers())), episode(1)
    answers = learner.answers(*given(batch))
    learner.loss(batch)
    assert_same(dict(learner.named_buffers()), before)
    assert learner.meta_steps == 3
    linear = learner.network.embedding[1]
    mean, var = learner._averages(0)["embedding.0"]
    unadapted = linear((batch.query_x[0] - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(answers[0, 0], unadapted.detach())
    index = 1 if per_step_norm else 0
    task = learner.enter(*given(batch))
    weights = learner.step(task, learner.start(task), 0, graph=False)
    own = {name.removeprefix("embedding."): weight[0] for name, weight in weights.items()}
    mean, var = learner._averages(index)["embedding.0"]
    normal = (batch.query_x[0] - mean) / (var + 1e-5).sqrt()
    normal = normal * own.get("0.weight", 1) + own.get("0.bias", 0)
    torch.testing.assert_close(answers[1, 0], F.linear(normal, own["1.weight"], own["1.bias"]))


def test_running_averages_begin_with_those_of_the_network() -> None:
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        assert norm.running_mean is not None
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    learner = MAML(nn.Sequential(norm, nn.Linear(3, 3)), ways=3, batch_norm="running", steps=2, per_step_norm=True)
    for index in range(3):
        assert learner._averages(index)["embedding.0"][0].tolist() == [1, 2, 3]


def test_running_averages_of_an_embedding_that_is_batch_norm_itself_are_kept_and_used() -> None:
    learner, batch = ANIL(nn.BatchNorm1d(3), 3, 3, batch_norm="running").double(), episode(2, q=6)
    learner.loss(batch)
    mean, var = of_passes(batch.support_x, batch.query_x)
    averages = learner._averages(0)["embedding"]
    torch.testing.assert_close(averages[0], 0.1 * mean)
    torch.testing.assert_close(averages[1], 0.9 + 0.1 * var)
    learner.eval()
    alone = [learner(batch.support_x, batch.support_y, query) for query in batch.query_x.split(1, 1)]
    torch.testing.assert_close(torch.cat(alone, 1), learner(*given(batch)))


@pytest.mark.parametrize("norm", NORMS)
def test_per_step_norm_gives_each_step_weights_of_its_own(norm: str) -> None:
    learner = learned(batch_norm=norm, per_step_norm=True, steps=2, test_steps=[0, 1, 2, 3])
    assert {name: tuple(weight.shape) for name, weight in learner.step_norm.items()} == {
        "embedding/1/weight": (3, 4),
        "embedding/1/bias": (3, 4),
    }
    assert not any("embedding.1" in name for name in learner.adapted)
    assert not learner.network.embedding[1].weight.requires_grad
    batch, learner = episode(), learner.eval()
    before = learner.answers(*given(batch))
    touched = []
    for index in range(3):
        with torch.no_grad():
            learner.step_norm["embedding/1/bias"][index] += 0.5
            moved = learner.answers(*given(batch)) - before
            learner.step_norm["embedding/1/bias"][index] -= 0.5
        touched.append([bool(answer.abs().max() > 1e-6) for answer in moved])
    # The weights of pass k answer after k steps, and take part in the step behind it; steps beyond use the last.
    assert touched == [[True, True, True, True], [False, True, True, True], [False, False, True, True]]


@pytest.mark.parametrize("training", [False, True])
def test_layers_stay_in_the_mode_that_they_are_in(training: bool) -> None:
    learner = learned().train(training)
    before = {name: buffer.clone() for name, buffer in learner.network.named_buffers()}
    learner.loss(episode())[0].backward()
    assert all(module.training is training for module in learner.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in learner.network.named_buffers())


# -- answering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [*TRAINED.values(), FineTuning])
def test_answers_are_the_same_with_gradients_switched_off(kind: type[GradientLearner], norm: str) -> None:
    learner, batch = learned(kind, batch_norm=norm, steps=2).eval(), episode()
    expected = learner(*given(batch))
    assert not expected.requires_grad
    with torch.no_grad():
        answer = learner(*given(batch))
        assert not torch.is_grad_enabled()
    assert torch.equal(answer, expected)
    with torch.inference_mode():
        made_inside = tuple(x.clone() for x in given(batch))
        assert made_inside[0].is_inference()
        answer = learner(*made_inside)
        assert torch.is_inference_mode_enabled()
        assert torch.equal(answer, expected)


@pytest.mark.parametrize("kind", [MAML, ANIL, Reptile, ImplicitMAML, MAMLPlusPlus])
def test_answering_leaves_the_learner_as_it_was(kind: type[GradientLearner]) -> None:
    learner, batch = learned(kind).eval(), episode()
    learner.network.head.bias.requires_grad_(False)
    learner.network.head.weight.grad = torch.full_like(learner.network.head.weight, 7)
    before = copy.deepcopy(learner)
    answer = learner(*given(batch))
    assert answer.grad_fn is None
    for (name, parameter), kept in zip(learner.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, kept)
        assert parameter.requires_grad is kept.requires_grad
        assert parameter.grad is None or torch.equal(parameter.grad, torch.full_like(parameter, 7))
        assert (parameter.grad is None) is (name != "network.head.weight")
    assert [m.training for m in learner.modules()] == [m.training for m in before.modules()]
    assert_same(dict(learner.named_buffers()), dict(before.named_buffers()))
    assert learner.meta_steps == 0


def test_answering_leaves_episodes_as_they_were() -> None:
    learner, batch = learned(), episode()
    copies = [x.clone() for x in given(batch)]
    learner.loss(batch)
    learner.eval()(*given(batch))
    assert all(torch.equal(x, kept) for x, kept in zip(given(batch), copies, strict=True))


def test_training_under_no_grad_costs_and_changes_no_parameters_gradient() -> None:
    learner, batch = learned(), episode()
    expected, _ = learner.loss(batch)
    with torch.no_grad():
        loss, _ = learner.loss(batch)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_may_be_of_any_integer_dtype(dtype: torch.dtype) -> None:
    learner, batch = learned(), episode()
    other = Episode(batch.support_x, batch.support_y.to(dtype), batch.query_x, batch.query_y.to(dtype), 3)
    assert torch.equal(learner(*given(other)), learner(*given(batch)))
    assert torch.equal(learner.loss(other)[0], learner.loss(batch)[0])


def test_test_steps_are_scored_each_by_itself() -> None:
    batch = episode()
    learner = learned(steps=2, test_steps=[3, 0, 1, 3]).eval()
    assert learner.variants == [{"inner_steps": 0}, {"inner_steps": 1}, {"inner_steps": 3}]
    answers = learner.answers(*given(batch))
    assert answers.shape == (3, 2, 4, 3)
    for steps, answer in zip((1, 3), answers[1:], strict=True):
        torch.testing.assert_close(answer, learned(steps=2, test_steps=steps)(*given(batch)))
    assert torch.equal(learner(*given(batch)), answers[-1])
    assert (answers.diff(dim=0).abs().amax((1, 2, 3)) > 1e-3).all()


def test_no_step_is_the_unadapted_network() -> None:
    learner, batch = learned(norm=False, test_steps=0).eval(), episode()
    assert learner.variants == [{"inner_steps": 0}]
    torch.testing.assert_close(learner(*given(batch)), learner.network(batch.query_x).detach())


def test_as_many_steps_are_scored_as_are_trained_by_default() -> None:
    assert learned(steps=3).variants == [{"inner_steps": 3}]
    batch = episode()
    assert torch.equal(learned(steps=3)(*given(batch)), learned(steps=1, test_steps=3)(*given(batch)))


@pytest.mark.parametrize("tasks_at_once", [1, None])
@pytest.mark.parametrize("recompute", [False, True])
def test_networks_with_dropout_run(recompute: bool, tasks_at_once: int | None) -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    learner = MAML(network, ways=3, steps=2, recompute=recompute, tasks_at_once=tasks_at_once).double()
    batch = episode()
    losses = []
    for _ in range(2):
        loss, _ = learner.loss(batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learner.parameters())
    learner.eval()
    assert torch.equal(learner(*given(batch)), learner(*given(batch)))


def test_inner_loop_learns_regression() -> None:
    learner = MAML(body(), 4, 2, steps=2, test_steps=[0, 50], inner_rate=0.1).double()
    support_x, query_x = torch.randn(3, 5, 3, dtype=DOUBLE), torch.randn(3, 4, 3, dtype=DOUBLE)
    support_y, query_y = torch.randn(3, 5, 2, dtype=DOUBLE), torch.randn(3, 4, 2, dtype=DOUBLE)
    batch = Episode(support_x, support_y, query_x, query_y, None)
    loss, logs = learner.loss(batch)
    assert logs == {}
    assert loss.shape == ()
    before, after = learner.answers(support_x, support_y, support_x)
    assert (after - support_y).square().mean() < 0.3 * (before - support_y).square().mean()


# -- threads ---------------------------------------------------------------------------------------------------------


class Here(MAML):
    """Notes the thread that each group of tasks is computed on, and how many threads torch uses there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[int, str, int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.seen)] = self.seen  # the copies write into the same list
        reduced = self.__reduce_ex__(4)
        copied = reduced[0](*reduced[1])
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(reduced[2], memo))
        return copied

    def enter(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Any:
        self.seen.append((len(support_x), threading.current_thread().name, torch.get_num_threads()))
        return super().enter(support_x, support_y, query_x)


def test_groups_of_tasks_take_turns_on_the_threads() -> None:
    learner, batch = learned(Here, tasks_at_once=2, threads=2), episode(7)
    before = torch.get_num_threads()
    for compute in (lambda: learner.loss(batch), lambda: learner(*given(batch))):
        learner.seen.clear()
        compute()
        first, *seen = learner.seen
        assert first[:2] == (1, "MainThread")  # whether it draws random numbers is tried on one task
        assert sorted(size for size, _, _ in seen) == [1, 2, 2, 2]
        assert sorted(size for size, name, _ in seen if name == "MainThread") == [2, 2]
        assert {cores for _, name, cores in seen} == {1}
        learner.seen.clear()
        compute()
        assert len(learner.seen) == 4  # it is known now
    assert torch.get_num_threads() == before


def test_as_many_threads_as_torch_uses_by_default() -> None:
    support_x = torch.zeros(4, 6, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert learned(tasks_at_once=1).groups_side_by_side(support_x) == 2
        assert learned(tasks_at_once=1, threads=3).groups_side_by_side(support_x) == 3
        assert learned(tasks_at_once=4).groups_side_by_side(support_x) == 1  # one group
        assert learned(tasks_at_once=1, threads=3).groups_side_by_side(support_x.to("meta")) == 1  # no CPU
    finally:
        torch.set_num_threads(before)


def test_what_draws_random_numbers_runs_on_one_thread_and_is_repeatable() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    batch, losses = episode(4), {}
    for threads in (1, 2):
        learner = Here(copy.deepcopy(network), ways=3, tasks_at_once=1, threads=threads).double()
        torch.manual_seed(4)
        losses[threads] = [learner.loss(batch)[0].item() for _ in range(2)]
        assert {name for _, name, _ in learner.seen} == {"MainThread"}
    assert losses[1] == losses[2] and losses[1][0] != losses[1][1]  # the trial left the generator as it was


def test_reptile_draws_its_batches_on_one_thread() -> None:
    batch = episode(4)
    losses = []
    for threads in (1, 2, 2):
        learner = learned(Reptile, steps=3, inner_batch=3, tasks_at_once=1, threads=threads)
        torch.manual_seed(5)
        losses.append(learner.loss(batch)[0].item())
    assert losses[0] == losses[1] == losses[2]


def test_a_network_that_cannot_be_copied_runs_on_one_thread() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("no copies")

    learner = MAML(Stubborn(3, 3), ways=3, tasks_at_once=1, threads=2).double()
    plain = MAML(nn.Linear(3, 3), ways=3, tasks_at_once=1, threads=1).double()
    plain.load_state_dict(learner.state_dict())
    batch = episode(3)
    assert_same(gradients_of(learner, batch), gradients_of(plain, batch))


def test_half_precision_of_the_caller_reaches_every_thread() -> None:
    batch, losses = episode(4), []
    for threads in (1, 2):
        learner = learned(tasks_at_once=1, threads=threads).float()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(learner.loss(batch.map_items(Tensor.float))[0].item())
    assert losses[0] == losses[1]
    assert losses[0] != learned(tasks_at_once=1).float().loss(batch.map_items(Tensor.float))[0].item()


def test_an_error_of_any_thread_is_raised_and_leaves_all_as_it_was() -> None:
    class Broken(MAML):
        def enter(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Any:
            if threading.current_thread().name != "MainThread":
                raise RuntimeError("this thread failed")
            return super().enter(support_x, support_y, query_x)

    before = torch.get_num_threads()
    learner = learned(Broken, tasks_at_once=1, threads=2)
    with pytest.raises(RuntimeError, match="this thread failed"):
        learner.loss(episode(4))
    assert torch.get_num_threads() == before
    assert learner.meta_steps == 0
    assert not learner.network.embedding[0].weight.grad


# -- the graph and the memory --------------------------------------------------------------------------------------


OPTIONS: dict[str, tuple[type[GradientLearner], dict[str, Any]]] = {
    "MAML": (MAML, {"steps": 3}),
    "adam": (MAML, {"steps": 3, "inner_optimizer": "adam", "inner_rate": 0.1, "norm": False}),
    "running": (MAML, {"steps": 3, "batch_norm": "running"}),
    "ANIL": (ANIL, {"steps": 3}),
    "MetaSGD": (MetaSGD, {"steps": 2}),
    "MAML++": (MAMLPlusPlus, {"steps": 3, "multi_step_loss": 10}),
}


@pytest.mark.parametrize("tasks_at_once", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_recomputing_changes_no_gradient(name: str, tasks_at_once: int) -> None:
    kind, options = OPTIONS[name]
    plain, spared = (learned(kind, recompute=on, tasks_at_once=tasks_at_once, **options) for on in (False, True))
    batch = episode(2)
    torch.testing.assert_close(plain.loss(batch)[0], spared.loss(batch)[0])
    assert_same(gradients_of(plain, batch), gradients_of(spared, batch))
    assert_same(dict(plain.named_buffers()), dict(spared.named_buffers()))


def numbers_kept(learner: GradientLearner, batch: Episode) -> int:
    """How many numbers the graph of a loss keeps for its derivative."""
    kept = 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    task = learner.enter(*given(batch))
    with saved_tensors_hooks(count, lambda x: x):
        learner.meta_loss(task, batch.query_y)
    return kept


def test_recomputing_keeps_less() -> None:
    batch = episode(2, shots=20)
    kept = {on: [numbers_kept(learned(recompute=on, steps=n), batch) for n in (1, 4)] for on in (False, True)}
    assert kept[True][1] < 0.5 * kept[False][1]
    assert kept[True][1] - kept[True][0] < 0.3 * (kept[False][1] - kept[False][0])


def test_loss_keeps_gradients_and_no_graph() -> None:
    learner, batch, kept = learned(steps=3), episode(2, shots=20), 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    loss, _ = learner.loss(batch)
    function = loss.grad_fn
    assert function is not None
    stack, seen = [function], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kept += sum(x.numel() for x in getattr(node, "saved_tensors", ()))
        stack.extend(after for after, _ in node.next_functions if after is not None)
    assert kept == sum(p.numel() for p in learner.parameters())


def test_loss_can_be_scaled_and_added() -> None:
    learner, batch = learned(), episode()
    plain = gradients_of(learner, batch)
    learner.zero_grad()
    (3 * learner.loss(batch)[0] + learner.loss(batch)[0]).backward()
    assert_same({name: p.grad for name, p in learner.named_parameters()}, {n: 4 * g for n, g in plain.items()})


def test_gradients_accumulate_as_those_of_any_loss() -> None:
    learner, batch = learned(), episode()
    plain = gradients_of(learner, batch)
    for _ in range(2):
        learner.loss(batch)[0].backward()
    assert_same({name: p.grad for name, p in learner.named_parameters()}, {n: 3 * g for n, g in plain.items()})


# -- what is kept --------------------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("norm", ["inductive", "running"])
def test_a_state_dict_holds_all_that_was_learned(name: str, norm: str) -> None:
    learner, batch = learned(TRAINED[name], batch_norm=norm), episode()
    optimiser = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        learner.loss(batch)[0].backward()
        optimiser.step()
    again = learned(TRAINED[name], batch_norm=norm)
    again.load_state_dict(saved_and_loaded(learner.state_dict()))
    assert again.meta_steps == 3
    assert torch.equal(again.eval()(*given(batch)), learner.eval()(*given(batch)))
    assert torch.equal(again.train().loss(batch)[0], learner.train().loss(batch)[0])


# -- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": -3}, "steps is -3; it must be at least 1"),
        ({"test_steps": -1}, "test_steps is -1; it must be at least 0"),
        ({"test_steps": [3, -2]}, "test_steps is -2; it must be at least 0"),
        ({"test_steps": []}, "test_steps"),
        ({"tasks_at_once": 0}, "tasks_at_once is 0; it must be at least 1"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"batch_norm": "batch"}, "batch_norm is 'batch'; choose one of inductive, transductive, running"),
        ({"inner_optimizer": "lbfgs"}, "inner_optimizer is 'lbfgs'; choose one of sgd, adam"),
        ({"learn_rates": "each"}, "learn_rates is 'each'; choose one of parameter, layer_and_step"),
        ({"adapt": ["heads.*", "body"]}, r"adapt = \['heads.\*', 'body'\] matches none of the parameters embedding.0"),
        ({"adapt": []}, "matches none of the parameters"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        learned(**options)


def test_a_head_needs_ways() -> None:
    with pytest.raises(ValueError, match="embedding_dim is 4, but the head behind it needs ways"):
        MAML(body(), 4)
    with pytest.raises(ValueError, match="ways is 0; it must be at least 1"):
        MAML(body(), 4, 0)


@pytest.mark.parametrize("kind", [MAML, ANIL, Reptile, ImplicitMAML])
def test_a_head_that_does_not_fit_the_ways_is_refused(kind: type[GradientLearner]) -> None:
    network = nn.Sequential(OrderedDict(body=body(), top=nn.Linear(4, 5))).double()
    options: dict[str, Any] = {"adapt": ["embedding.top.*"]} if kind is ANIL else {}
    learner, batch = kind(network, ways=3, **options), episode()
    words = r"answers with \(5,\) values an item, but episodes have 3 ways; give it a last layer"
    with pytest.raises(ValueError, match=words):
        learner.loss(batch)
    with pytest.raises(ValueError, match=words):
        learner(*given(batch))


def test_a_network_that_answers_with_maps_is_refused() -> None:
    learner = MAML(nn.Conv2d(1, 3, 3).double(), ways=3)
    with pytest.raises(ValueError, match=r"answers with \(3, 2, 2\) values an item"):
        learner.loss(episode(item=(1, 4, 4)))


@pytest.mark.parametrize("b", [1, 2])
def test_regression_of_the_wrong_width_is_refused(b: int) -> None:
    x, y = torch.randn(b, 4, 3), torch.randn(b, 4, 2)
    learner = MAML(nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"answers with \(1,\) values an item, but \(2,\) are to be learned"):
        learner.loss(Episode(x, y, x, y, None))
    with pytest.raises(ValueError, match=r"answers with \(1,\) values an item, but \(2,\) are to be learned"):
        learner(x, y, x)


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("norm", ["inductive", "transductive"])
def test_batch_norm_of_a_single_value_is_refused(norm: str, b: int) -> None:
    learner = MAML(body(), 4, 1, batch_norm=norm).double()  # type: ignore[arg-type]
    batch = episode(b, ways=1, shots=1)
    words = "1 value a channel in a support of 1 item, .* give more shots or ways, or take batch_norm='running'"
    with pytest.raises(ValueError, match=words):
        learner.loss(batch)
    with pytest.raises(ValueError, match=words):
        learner.eval()(*given(batch))


def test_batch_norm_with_running_averages_answers_from_a_single_value() -> None:
    learner = MAML(body(), 4, 1, batch_norm="running").double().eval()
    assert learner(*given(episode(ways=1, shots=1))).isfinite().all()


def test_running_averages_of_a_layer_that_keeps_none_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"batch_norm='running' needs averages, but layer embedding\.1 keeps none"):
        MAML(network, 4, 3, batch_norm="running")
    MAML(network, 4, 3)(*(x.float() if x.is_floating_point() else x for x in given(episode())))


@pytest.mark.parametrize("kind", [MAML, FirstOrderMAML, ANIL, MAMLPlusPlus, Reptile, ImplicitMAML])
@pytest.mark.parametrize("tasks_at_once", [1, None])
def test_a_rate_at_which_the_loop_diverges_is_named(kind: type[GradientLearner], tasks_at_once: int | None) -> None:
    options: dict[str, Any] = {"inner_optimizer": "sgd"} if kind is Reptile else {}
    network = nn.Sequential(OrderedDict(body=nn.Linear(3, 2), top=nn.Linear(2, 2))).double()
    options |= {"adapt": ["*.top.*"], "tasks_at_once": tasks_at_once}
    learner = kind(network, steps=3, inner_rate=1e200, **options)
    x, y = torch.randn(2, 4, 3, dtype=DOUBLE), torch.randn(2, 4, 2, dtype=DOUBLE)
    words = r"the inner loop diverged at step 1 with the rate 1e\+200\b.* support's loss before .*; lower inner_rate"
    with pytest.raises(FloatingPointError, match=words):
        learner.loss(Episode(x, y, x, y, None))
    with pytest.raises(FloatingPointError, match=words):
        learner.eval()(x, y, x)


def test_the_last_step_may_be_the_one_that_diverges() -> None:
    learner = MAML(nn.Linear(3, 2).double(), steps=1, inner_rate=1e200)
    x, y = torch.randn(2, 4, 3, dtype=DOUBLE), torch.randn(2, 4, 2, dtype=DOUBLE)
    with pytest.raises(FloatingPointError, match="diverged at step 1 with the rate"):
        learner.loss(Episode(x, y, x, y, None))


# -- what is said --------------------------------------------------------------------------------------------------


def test_note_tells_the_inner_loop() -> None:
    assert learned(steps=1).note == "1 step of sgd at 0.3"
    assert learned(steps=2, inner_optimizer="adam", inner_rate=0.001).note == "2 steps of adam at 0.001"
    told = learned(learn_rates="layer_and_step", per_step_norm=True).note
    assert told == "2 steps of sgd at 0.3, rates learned by layer and step, batch norm by step"
