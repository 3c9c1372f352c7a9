from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from snail import AttentionBlock, second_order, tasks
from snail.tasks import batch_norm_layers, run_tasks

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def of_tasks(network: nn.Module, b: int, *, spread: float = 0.3) -> dict[str, Tensor]:
    """Weights that differ from task to task, as leaves."""
    return {
        name: (weight.detach() + spread * torch.randn(b, *weight.shape, dtype=weight.dtype)).requires_grad_()
        for name, weight in network.named_parameters()
    }


def convolutional() -> nn.Sequential:
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(*layers, nn.Linear(3, 2)).double().eval()
    nn.init.normal_(network[1].bias)
    return network


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


class FusedAttention(nn.Module):
    """Items of ``(t, c)``; attention is torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.out = nn.Linear(2, 3 * 4), nn.Linear(4, 2)

    def forward(self, items: Tensor) -> Tensor:
        query, keys, values = (x.unsqueeze(1) for x in self.keys(items).chunk(3, -1))
        read: Tensor = self.out(F.scaled_dot_product_attention(query, keys, values).squeeze(1).mean(1))
        return read


class ManyHeads(nn.Module):
    """Items of ``(t, c)``; attention is torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, batch_first=True)

    def forward(self, items: Tensor) -> Tensor:
        read: Tensor = self.attention(items, items, items, need_weights=False)[0].mean(1)
        return read


class Causal(nn.Module):
    """Items of ``(t, c)``; attention is that of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionBlock(2, 4, 3)

    def forward(self, items: Tensor) -> Tensor:
        read: Tensor = self.attention(items)[:, -1]
        return read


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (3,)),
    "convolutional": (convolutional, (1, 4, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)), (3,)),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten()), (2, 3)),
    "scaled_dot_product_attention": (FusedAttention, (4, 2)),
    "MultiheadAttention": (ManyHeads, (4, 2)),
    "AttentionBlock": (Causal, (4, 2)),
}


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    make, item = NETWORKS[name]
    return make().double().eval(), item


def plain(network: nn.Module, weights: dict[str, Tensor], items: Tensor) -> Tensor:
    """One task after the other in torch's own training mode, which normalises by the batch."""
    norms = list(batch_norm_layers(network).values())
    for norm in norms:
        norm.train()
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    outputs = [
        functional_call(network, {**{n: w[i] for n, w in weights.items()}, **kept}, (x,)) for i, x in enumerate(items)
    ]
    for norm in norms:
        norm.eval()
    return torch.stack(outputs)


# -- each task has weights of its own ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("b", [1, 3])
def test_run_tasks_equals_one_task_after_the_other(name: str, b: int) -> None:
    network, item = made(name)
    weights, items = of_tasks(network, b), numbers(b, 5, *item)
    output, _ = run_tasks(network, weights, items)
    expected = plain(network, weights, items)
    torch.testing.assert_close(output, expected)
    pull = numbers(*output.shape)
    gradients = torch.autograd.grad((output * pull).sum(), list(weights.values()))
    by_hand = torch.autograd.grad((expected * pull).sum(), list(weights.values()))
    for gradient, correct in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(gradient, correct)


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_run_tasks_has_an_exact_second_derivative_by_weights_of_each_task(name: str, b: int) -> None:
    # Batch norm with weights of each task within ``F.batch_norm`` is wrong here under vmap, and fused attention raises.
    network, item = made(name)
    weights, items = of_tasks(network, b), numbers(b, 4, *item)
    names, values = list(weights), tuple(weights.values())

    def output(*given: Tensor) -> Tensor:
        return run_tasks(network, dict(zip(names, given, strict=True)), items)[0].square()

    assert torch.autograd.gradcheck(output, values, fast_mode=True, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(output, values, fast_mode=True, atol=1e-6, rtol=1e-5)


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(2, 3, 3),
    "strided, padded": lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)),
    "without bias": lambda: nn.Conv2d(2, 3, 1, bias=False),
    "circular": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(2, 3, 3, padding="same"),
    "dilated": lambda: nn.Conv2d(2, 3, 2, dilation=2),
    "groups": lambda: nn.Conv2d(2, 4, 3, groups=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_run_tasks_on_a_gpu_makes_convolutions_products_of_matrices_that_are_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[tuple[int, ...]] = []

    def noted(x: Tensor, *options: Any) -> Tensor:
        products.append(tuple(x.shape))
        return second_order.conv2d(x, *options)

    monkeypatch.setattr(tasks, "conv2d", noted)
    network = CONVOLUTIONS[kind]().double()
    weights, items = of_tasks(network, 2), numbers(2, 3, 2, 6, 5).requires_grad_()
    given = (items, *weights.values())

    def output(items: Tensor, *values: Tensor) -> Tensor:
        return run_tasks(network, dict(zip(weights, values, strict=True)), items)[0].square()

    expected = output(*given)
    gradients = torch.autograd.grad(expected.sin().sum(), given)
    assert not products
    monkeypatch.setattr(tasks._TaskOperations, "products_on", ("cpu",))
    torch.testing.assert_close(output(*given), expected)
    assert len(products) == (kind not in ("same", "dilated", "groups"))
    for gradient, by_hand in zip(torch.autograd.grad(output(*given).sin().sum(), given), gradients, strict=True):
        torch.testing.assert_close(gradient, by_hand)
    assert torch.autograd.gradgradcheck(output, given, fast_mode=True, atol=1e-6, rtol=1e-5)


def test_run_tasks_leaves_convolutions_of_shared_weights_and_big_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks._TaskOperations, "products_on", ("cpu",))
    monkeypatch.setattr(tasks, "conv2d", lambda *given: pytest.fail("a product of matrices"))
    network, items = nn.Conv2d(1, 2, 3).double(), numbers(2, 3, 1, 4, 4)
    weights = of_tasks(network, 2)
    run_tasks(network, {"bias": weights["bias"]}, items)
    run_tasks(network, of_tasks(network, 1), items[:1])  # nor those of a task alone
    monkeypatch.setattr(tasks._TaskOperations, "most_numbers", 3 * 4 * 4 * 9 - 1)
    run_tasks(network, weights, items)  # nor what makes a big matrix
    monkeypatch.setattr(tasks._TaskOperations, "most_numbers", 3 * 4 * 4 * 9)
    with pytest.raises(pytest.fail.Exception, match="a product of matrices"):
        run_tasks(network, weights, items)


@pytest.mark.parametrize("counted", [None, 4])
@pytest.mark.parametrize("find", [False, True])
def test_run_tasks_has_an_exact_second_derivative_whosever_statistics_are_used(counted: int | None, find: bool) -> None:
    network = convolutional()
    weights, items = of_tasks(network, 2), numbers(2, 6, 1, 4, 4)
    names = list(weights)

    def output(*given: Tensor) -> Tensor:
        named = dict(zip(names, given, strict=True))
        return run_tasks(network, named, items, counted=counted, find=find)[0].square()

    assert torch.autograd.gradgradcheck(output, tuple(weights.values()), fast_mode=True, atol=1e-6, rtol=1e-5)


def test_run_tasks_takes_what_is_not_named_from_the_network_or_from_what_is_shared() -> None:
    network, items = nn.Linear(2, 2).double(), numbers(3, 4, 2)
    own = {"bias": numbers(3, 2)}
    expected = items @ network.weight.T + own["bias"].unsqueeze(1)
    torch.testing.assert_close(run_tasks(network, own, items)[0], expected)
    shared = {"weight": numbers(2, 2)}
    expected = items @ shared["weight"].T + own["bias"].unsqueeze(1)
    torch.testing.assert_close(run_tasks(network, own, items, shared=shared)[0], expected)
    expected = items @ network.weight.T + network.bias
    torch.testing.assert_close(run_tasks(network, {}, items)[0], expected)


@pytest.mark.parametrize("b", [1, 3])
def test_run_tasks_hands_gradients_to_the_networks_own_parameters(b: int) -> None:
    network, items = perceptron(), numbers(b, 5, 3)
    run_tasks(network, {"3.bias": numbers(b, 2)}, items)[0].square().sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        name for name, _ in network.named_parameters() if name != "3.bias"
    }


def test_run_tasks_drops_other_units_in_every_task() -> None:
    network = nn.Dropout(0.5)
    output, _ = run_tasks(network, {}, torch.ones(3, 2, 50))
    assert set(output.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(output[0], output[1])
    assert not torch.equal(output[0, 0], output[0, 1])


class Formatted(nn.Module):
    """Asks for a memory format and pools in several ways."""

    def __init__(self, pooled: int | tuple[int, int]) -> None:
        super().__init__()
        self.convolution, self.pool = nn.Conv2d(2, 3, 3, padding=1), nn.AdaptiveAvgPool2d(pooled)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        pooled: Tensor = self.pool(self.convolution(images))
        return pooled


@pytest.mark.parametrize("pooled", [1, (1, 1), 2, (1, 2)])
def test_run_tasks_takes_memory_formats_and_adaptive_pooling(pooled: int | tuple[int, int]) -> None:
    network = Formatted(pooled).double()
    weights, items = of_tasks(network, 3), numbers(3, 2, 2, 4, 6)
    torch.testing.assert_close(run_tasks(network, weights, items)[0], plain(network, weights, items))


# -- batch norm ----------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalise ``(i, c, ...)`` by statistics ``(c,)``."""
    along = (1, -1) + (1,) * (x.ndim - 2)
    return (x - mean.view(along)) / (var.view(along) + 1e-5).sqrt()


def statistics(x: Tensor, *, correction: int) -> tuple[Tensor, Tensor]:
    values = x.transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, correction=correction)


LAYERS: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, (3,)),
    (nn.BatchNorm1d, (3, 2)),
    (nn.BatchNorm2d, (3, 2, 2)),
    (nn.BatchNorm3d, (3, 2, 1, 2)),
]


@pytest.mark.parametrize(("layer", "item"), LAYERS)
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("find", [False, True])
def test_run_tasks_normalises_all_by_the_counted_items(
    layer: type[nn.Module], item: tuple[int, ...], b: int, find: bool
) -> None:
    network, items = nn.Sequential(layer(3)).double().eval(), 2 + 3 * numbers(b, 7, *item)
    for counted in (None, 7, 4, 2):
        output, found = run_tasks(network, {}, items, counted=counted, find=find)
        for i, x in enumerate(items):
            torch.testing.assert_close(output[i], by_hand(x, *statistics(x[:counted], correction=0)))
            if find:
                mean, var = statistics(x[:counted], correction=1)
                torch.testing.assert_close(found["0"][0][i], mean)
                torch.testing.assert_close(found["0"][1][i], var)
        assert bool(found) is find


def test_run_tasks_finds_statistics_without_a_gradient_and_only_where_wanted() -> None:
    network, items = perceptron(), numbers(3, 5, 3).requires_grad_()
    weights = of_tasks(network, 3)
    output, found = run_tasks(network, weights, items, find=True)
    assert list(found) == ["1"]
    assert [tuple(value.shape) for value in found["1"]] == [(3, 4), (3, 4)]
    assert not any(value.requires_grad for value in found["1"])
    unfound, nothing = run_tasks(network, weights, items)
    assert nothing == {}
    torch.testing.assert_close(output, unfound)


@pytest.mark.parametrize("b", [1, 3])
def test_run_tasks_normalises_by_given_averages(b: int) -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).double().eval()
    items, weights = numbers(b, 4, 2), of_tasks(network, b)
    averages = {name: (numbers(2), 0.5 + numbers(2).square()) for name in ("0", "2")}
    output, found = run_tasks(network, weights, items, averages=averages, find=True)
    assert found == {}
    for i, x in enumerate(items):
        own = {name: weight[i] for name, weight in weights.items()}
        x = by_hand(x, *averages["0"]) * own["0.weight"] + own["0.bias"]
        x = F.linear(x, own["1.weight"], own["1.bias"])
        x = by_hand(x, *averages["2"]) * own["2.weight"] + own["2.bias"]
        torch.testing.assert_close(output[i], x)
    alone, _ = run_tasks(network, weights, items[:, :1], averages=averages)
    torch.testing.assert_close(alone, output[:, :1])


@pytest.mark.parametrize("find", [False, True])
@pytest.mark.parametrize("b", [1, 2])
def test_run_tasks_leaves_the_networks_own_buffers(b: int, find: bool) -> None:
    network = convolutional()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    run_tasks(network, of_tasks(network, b), numbers(b, 4, 1, 4, 4), find=find)
    assert int(before["1.num_batches_tracked"]) == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.3}])
def test_run_tasks_takes_every_kind_of_batch_norm(options: dict[str, float]) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options)).double().eval()  # type: ignore[arg-type]
    weights, items = of_tasks(network, 3), numbers(3, 5, 3)
    torch.testing.assert_close(run_tasks(network, weights, items)[0], plain(network, weights, items))


def test_run_tasks_leaves_torch_as_it_was() -> None:
    run_tasks(perceptron(), {}, numbers(2, 4, 3))
    x, norm = 5 + numbers(4, 3), nn.BatchNorm1d(3).double().eval()
    torch.testing.assert_close(norm(x), x / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("find", [False, True])
@pytest.mark.parametrize("b", [1, 2])
def test_run_tasks_refuses_a_single_value_a_channel(b: int, find: bool) -> None:
    with pytest.raises(ValueError, match=r"1 value a channel .* more shots or ways, or take batch_norm='running'"):
        run_tasks(perceptron(), {}, numbers(b, 1, 3), find=find)
    with pytest.raises(ValueError, match="1 value a channel in a support of 1 item"):
        run_tasks(perceptron(), {}, numbers(b, 3, 3), counted=1, find=find)
    several = convolutional()
    assert run_tasks(several, {}, numbers(b, 1, 1, 4, 4), find=find)[0].isfinite().all()
    pair = {"1": (torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE))}
    assert run_tasks(perceptron(), {}, numbers(b, 1, 3), averages=pair, find=find)[0].isfinite().all()


def test_batch_norm_layers_are_found_by_name() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.LayerNorm(2), nn.BatchNorm2d(2)), nn.GroupNorm(1, 2))
    assert batch_norm_layers(network) == {"0": network[0], "1.1": network[1][1]}


class Watched(nn.Module):
    """Notes whether its weight, as it is seen from within, is the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(3)), list[bool]()
        self.parameter = [self.weight]  # in a list, where it is not replaced

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight is self.parameter[0])
        return x * self.weight


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("given", ["none", "of each", "for all"])
def test_no_network_sees_a_parameter_that_threads_share(tasks: int, given: str) -> None:
    # A Function of Python's that is given one on two threads makes them wait for each other without end (torch 2.14).
    network, items = Watched(), torch.ones(tasks, 2, 3)
    weights = {"weight": network.weight.expand(tasks, 3)} if given == "of each" else {}
    shared = {"weight": network.weight * 1} if given == "for all" else {}
    output, _ = run_tasks(network, weights, items, shared=shared)
    assert network.seen == [False]
    (gradient,) = torch.autograd.grad(output.sum(), network.weight)
    torch.testing.assert_close(gradient, torch.full((3,), 2.0 * tasks))
