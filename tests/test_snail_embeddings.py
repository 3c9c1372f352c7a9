from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snail import Conv4, ResidualEmbedding


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def images(b: int, c: int = 1, size: int = 28) -> Tensor:
    return torch.rand(b, c, size, size, dtype=torch.float64)


def settled(**options: int | None) -> Conv4:
    """A float64 embedding, for evaluation, whose running statistics are not those it starts with."""
    embedding = Conv4(**options).double()  # type: ignore[arg-type]
    for module in embedding.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return embedding.eval()


@pytest.mark.parametrize(
    ("in_channels", "size", "out_features", "channels"),
    [
        (1, 28, 64, 64),
        (1, 28, None, 64 * 1 * 1),
        (1, 28, 10, 10),
        (3, 84, 64, 64),
        (3, 84, None, 64 * 5 * 5),
        (1, 16, None, 64),
        (1, 31, None, 64),
        (1, 32, None, 64 * 2 * 2),
    ],
)
def test_conv4_gives_a_vector_an_image(in_channels: int, size: int, out_features: int | None, channels: int) -> None:
    embedding = Conv4(in_channels, image_size=size, out_features=out_features)
    assert embedding.out_channels == channels
    assert embedding(torch.rand(2, in_channels, size, size)).shape == (2, channels)


def test_conv4_is_the_omniglot_embedding_of_the_paper_by_default() -> None:
    embedding = Conv4()
    convolutions = 1 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * 64
    assert sum(p.numel() for p in embedding.parameters()) == convolutions + 4 * 2 * 64 + 64 * 64 + 64
    assert embedding(torch.rand(2, 1, 28, 28)).shape == (2, 64)


def test_conv4_may_have_other_filters_in_each_block() -> None:
    embedding = Conv4(filters=[3, 5, 7, 6], out_features=None)
    shapes = [tuple(m.weight.shape[:2]) for m in embedding.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(3, 1), (5, 3), (7, 5), (6, 7)] and embedding.out_channels == 6
    assert embedding.description == "Conv-4 of 3-5-7-6, max-pooled"
    assert Conv4(filters=[4, 4, 4, 4]).description == Conv4(filters=4).description == "Conv-4 of 4, max-pooled"
    with pytest.raises(ValueError, match=r"filters is \[4, 4\]; give one number, or one for each of the four blocks"):
        Conv4(filters=[4, 4])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [28, 40])
def test_conv4_grown_from_a_narrower_one_answers_as_that_did(size: int, training: bool) -> None:
    narrow, wide = Conv4(filters=4, image_size=size), Conv4(filters=[4, 6, 9, 5], image_size=size)
    images = torch.rand(8, 1, size, size)
    for _ in range(3):  # running averages are taken over too
        narrow(images + torch.rand(1))
    assert wide.grow_from(narrow.state_dict())
    torch.testing.assert_close(wide.train(training)(images), narrow.train(training)(images))


def test_every_filter_of_a_grown_conv4_learns() -> None:
    torch.manual_seed(0)
    wide = Conv4(filters=[5, 6, 9, 7])
    wide.grow_from(Conv4(filters=4).state_dict())
    optimizer = torch.optim.Adam(wide.parameters(), lr=0.001)
    for _ in range(3):  # what is new has a say after one step, what is behind it after two
        optimizer.zero_grad()
        wide(torch.rand(16, 1, 28, 28)).square().sum().backward()
        optimizer.step()
    for convolution in (m for m in wide.modules() if isinstance(m, nn.Conv2d)):
        assert convolution.weight.grad is not None and bool((convolution.weight.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    "narrower",
    [
        Conv4(filters=6),
        Conv4(filters=4, out_features=32),
        Conv4(filters=4, out_features=None),
        Conv4(3, filters=4),
        Conv4(filters=4, image_size=40),
        nn.Linear(2, 2),
    ],
    ids=["wider", "other width", "no linear layer", "in colour", "larger images", "else"],
)
def test_conv4_does_not_grow_from_what_it_is_no_wider_form_of(narrower: nn.Module) -> None:
    wide = Conv4(filters=5)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    assert not wide.grow_from(narrower.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())


@pytest.mark.parametrize("size", [15, 1, 0])
def test_conv4_refuses_images_too_small_for_four_poolings(size: int) -> None:
    with pytest.raises(ValueError, match=f"images of {size} pixels are too small for four 2x2 poolings"):
        Conv4(image_size=size)


@pytest.mark.parametrize(("in_channels", "size", "out_features"), [(1, 28, 64), (3, 32, 10), (3, 84, None)])
def test_conv4_matches_plain_contiguous_reference(in_channels: int, size: int, out_features: int | None) -> None:
    embedding = settled(in_channels=in_channels, filters=8, image_size=size, out_features=out_features)
    batch = images(3, in_channels, size)
    weights = {name: value.contiguous() for name, value in embedding.state_dict().items()}
    expected = batch
    for block in range(4):
        norm = f"layers.{4 * block + 1}"
        conv = f"layers.{4 * block}"
        expected = F.conv2d(expected, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=1)
        mean, var = (weights[f"{norm}.running_{what}"].view(-1, 1, 1) for what in ("mean", "var"))
        scale, shift = (weights[f"{norm}.{what}"].view(-1, 1, 1) for what in ("weight", "bias"))
        expected = ((expected - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
        expected = F.max_pool2d(expected.contiguous(), 2)
    expected = expected.flatten(1)
    if out_features is not None:
        expected = F.linear(expected, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(embedding(batch), expected, rtol=1e-10, atol=1e-12)


def test_conv4_does_not_depend_on_the_memory_layout_of_images() -> None:
    embedding, batch = settled(in_channels=3, filters=8, image_size=32), images(3, 3, 32)
    strided = batch.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert torch.equal(embedding(batch.contiguous(memory_format=torch.channels_last)), embedding(batch))
    assert torch.equal(embedding(strided), embedding(batch))


def test_conv4_embeds_each_image_by_itself_in_evaluation() -> None:
    embedding, batch = settled(), images(6)
    together = embedding(batch)
    changed = batch.clone()
    changed[1:] = images(5)
    assert torch.equal(embedding(changed)[0], together[0])
    alone = torch.cat([embedding(image.unsqueeze(0)) for image in batch])
    torch.testing.assert_close(alone, together, rtol=1e-11, atol=1e-13)
    assert (together[1:] - together[0]).abs().sum(dim=1).gt(1e-3).all()


def test_conv4_evaluation_leaves_the_statistics_as_they_were() -> None:
    embedding = settled()
    before = {name: value.clone() for name, value in embedding.state_dict().items()}
    embedding(images(4))
    assert all(torch.equal(value, before[name]) for name, value in embedding.state_dict().items())


def test_conv4_normalises_by_the_batch_in_training() -> None:
    embedding, batch = Conv4(out_features=None).double(), images(16)
    before_relu = nn.Sequential(*embedding.layers[:2])(batch)
    torch.testing.assert_close(before_relu.mean(dim=(0, 2, 3)), torch.zeros(64, dtype=torch.float64))
    torch.testing.assert_close(
        before_relu.var(dim=(0, 2, 3), correction=0), torch.ones(64, dtype=torch.float64), rtol=0.01, atol=0
    )


def running_mean_after(*batches: Tensor) -> Tensor:
    torch.manual_seed(0)
    embedding = Conv4().double()
    for batch in batches:
        embedding(batch)
    mean = embedding.layers[1].running_mean
    assert isinstance(mean, Tensor)
    return mean


def test_conv4_running_mean_depends_on_every_training_batch() -> None:
    first, second = images(4), 3 + images(4)
    running = running_mean_after(first, second)
    assert not torch.allclose(running, running_mean_after(first + 1, second))
    assert not torch.allclose(running, running_mean_after(first, second + 1))
    torch.manual_seed(0)
    convolution = Conv4().double().layers[0]
    means = [convolution(batch).mean(dim=(0, 2, 3)) for batch in (first, second)]
    torch.testing.assert_close(running, 0.9 * 0.1 * means[0] + 0.1 * means[1])


def test_conv4_hands_gradients_to_every_parameter() -> None:
    embedding = Conv4()
    embedding(torch.rand(8, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in embedding.parameters())


# -- residual ----------------------------------------------------------------------------------------------------------


def small(**options: float) -> ResidualEmbedding:
    """A float64 embedding of the same depth with fewer channels."""
    return ResidualEmbedding(filters=(4, 5, 6, 7), wide=12, out_features=9, **options).double()  # type: ignore[arg-type]


def unsettle(embedding: nn.Module) -> None:
    """Running statistics, scales and shifts that are not those that batch norm starts with."""
    for module in embedding.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


def outputs_of(embedding: nn.Module, kind: type[nn.Module], batch: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What goes into and comes out of each module of a kind, one after the other."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output.detach())))
        for module in embedding.modules()
        if isinstance(module, kind)
    ]
    embedding(batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_residual_embedding_is_that_of_the_paper_by_default() -> None:
    embedding = ResidualEmbedding().eval()
    assert (embedding.out_channels, embedding.description) == (384, "residual, 64-96-128-256")
    widths = [3, 64, 96, 128, 256]
    count = 0
    for before, after in pairwise(widths):
        count += (before + 2 * after) * after * 9 + 3 * after + 3 * 2 * after  # three convolutions, three batch norms
        count += before * after + after  # the shortcut
    count += 256 * 2048 + 2048 + 2048 * 384 + 384
    assert sum(p.numel() for p in embedding.parameters()) == count


def test_residual_embedding_pools_84_pixels_to_42_21_11_and_6() -> None:
    embedding = ResidualEmbedding().eval()
    shapes: list[tuple[int, ...]] = []
    for module in (*embedding.blocks, embedding.widen):
        module.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    assert embedding(torch.rand(2, 3, 84, 84)).shape == (2, 384)
    assert shapes == [(2, 64, 42, 42), (2, 96, 21, 21), (2, 128, 11, 11), (2, 256, 6, 6), (2, 2048, 6, 6)]


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 84, 84), (1, 28, 28), (3, 1, 1), (2, 17, 40)])
def test_residual_embedding_takes_images_of_any_size(channels: int, height: int, width: int) -> None:
    embedding = ResidualEmbedding(channels, filters=(4, 5), wide=6, out_features=7)
    assert embedding(torch.rand(2, channels, height, width)).shape == (2, 7)
    assert (embedding.out_channels, embedding.description) == (7, "residual, 4-5")


def test_residual_embedding_matches_plain_contiguous_reference() -> None:
    embedding, batch = small(leak=0.1), images(3, 3, 30)
    unsettle(embedding)
    embedding.eval()
    weights = {name: value.contiguous() for name, value in embedding.state_dict().items()}

    def convolve(maps: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(maps, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    expected = batch
    for block in range(4):
        maps = expected
        for layer in range(3):
            maps = convolve(maps, f"blocks.{block}.layers.{3 * layer}")
            norm = f"blocks.{block}.layers.{3 * layer + 1}"
            mean, var = (weights[f"{norm}.running_{what}"].view(-1, 1, 1) for what in ("mean", "var"))
            scale, shift = (weights[f"{norm}.{what}"].view(-1, 1, 1) for what in ("weight", "bias"))
            maps = (maps - mean) / (var + 1e-5).sqrt() * scale + shift
            maps = torch.where(maps > 0, maps, 0.1 * maps)
        maps = maps + convolve(expected, f"blocks.{block}.shortcut")
        odd = maps.shape[-1] % 2
        expected = F.max_pool2d(F.pad(maps, (0, odd, 0, odd), value=-torch.inf), 2)
    expected = convolve(expected, "widen").mean((2, 3)).relu()
    expected = F.linear(expected, weights["head.2.weight"], weights["head.2.bias"])
    torch.testing.assert_close(embedding(batch), expected, rtol=1e-10, atol=1e-12)


def test_residual_embedding_leaks_a_tenth_below_zero() -> None:
    seen = outputs_of(ResidualEmbedding(filters=(4, 4, 4, 4), wide=4), nn.LeakyReLU, torch.rand(2, 3, 32, 32))
    assert len(seen) == 12
    for before, after in seen:
        assert (before < 0).any()
        torch.testing.assert_close(after, torch.where(before > 0, before, 0.1 * before))


def test_residual_embedding_dropout_keeps_nine_tenths_in_training() -> None:
    seen = outputs_of(ResidualEmbedding(), nn.Dropout, torch.rand(8, 3, 84, 84))
    assert len(seen) == 5
    for before, after in seen:
        there = before != 0
        kept = (after != 0)[there].double().mean().item()
        assert there.sum() > 5000 and abs(kept - 0.9) < 0.015  # within five standard deviations
        torch.testing.assert_close(after[after != 0], before[after != 0] / 0.9)  # so that the mean stays


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_residual_embedding_keeps_as_many_as_it_is_told(keep: float) -> None:
    embedding = ResidualEmbedding(filters=(32, 32), wide=64, keep=keep)
    before, after = outputs_of(embedding, nn.Dropout, torch.rand(16, 3, 32, 32))[0]
    assert abs((after != 0)[before != 0].double().mean().item() - keep) < 0.01


def test_residual_embedding_keeps_everything_in_evaluation() -> None:
    embedding, batch = small().eval(), images(4, 3, 20)
    seen = outputs_of(embedding, nn.Dropout, batch)
    assert len(seen) == 5 and all(torch.equal(before, after) for before, after in seen)
    assert torch.equal(embedding(batch), embedding(batch))
    embedding.train()
    assert not torch.equal(embedding(batch), embedding(batch))


def test_residual_embedding_takes_the_mean_of_the_last_maps() -> None:
    embedding, batch = small().eval(), images(3, 3, 40)
    maps = torch.randn(3, 12, 3, 5, dtype=torch.float64)
    embedding.widen.register_forward_hook(lambda _, inputs, output: maps)
    entering: list[Tensor] = []
    embedding.head.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    answer = embedding(batch)
    torch.testing.assert_close(entering[0], maps.flatten(2).sum(2) / 15)
    maps = maps.flatten(2)[:, :, torch.randperm(15)].reshape(3, 12, 3, 5)
    torch.testing.assert_close(embedding(batch), answer)  # whatever the order of the pixels
    maps = maps.clone()
    maps[:, :, 0, 0] += 15
    torch.testing.assert_close(embedding(batch), embedding.head(entering[0] + 1))  # each of them counts alike


def test_residual_embedding_embeds_each_image_by_itself_in_evaluation() -> None:
    embedding, batch = small(), images(6, 3, 24)
    unsettle(embedding)
    together = embedding.eval()(batch)
    changed = batch.clone()
    changed[1:] = images(5, 3, 24)
    assert torch.equal(embedding(changed)[0], together[0])
    alone = torch.cat([embedding(image.unsqueeze(0)) for image in batch])
    torch.testing.assert_close(alone, together, rtol=1e-11, atol=1e-13)
    assert (together[1:] - together[0]).abs().sum(dim=1).gt(1e-6).all()


def test_residual_embedding_evaluation_leaves_the_statistics_as_they_were() -> None:
    embedding = small().eval()
    before = {name: value.clone() for name, value in embedding.state_dict().items()}
    embedding(images(4, 3, 20))
    assert all(torch.equal(value, before[name]) for name, value in embedding.state_dict().items())


def test_residual_embedding_does_not_depend_on_the_memory_layout_of_images() -> None:
    embedding, batch = small().eval(), images(3, 3, 20)
    assert torch.equal(embedding(batch.contiguous(memory_format=torch.channels_last)), embedding(batch))


def test_residual_embedding_hands_gradients_to_every_parameter() -> None:
    embedding = ResidualEmbedding(filters=(8, 8, 8, 8), wide=32)
    embedding(torch.rand(8, 3, 40, 40)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in embedding.parameters())


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan")])
def test_residual_embedding_refuses_a_keep_that_is_no_probability(keep: float) -> None:
    with pytest.raises(ValueError, match=rf"keep is {keep:g}; a probability above 0 and up to 1 is needed"):
        ResidualEmbedding(keep=keep)


def test_residual_embedding_works_in_half_the_precision_and_in_twice() -> None:
    embedding, batch = small().eval(), images(4, 3, 84)
    double = embedding(batch)
    assert double.dtype == torch.float64
    single = embedding.float()(batch.float())
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = embedding(batch.float())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    torch.testing.assert_close(half.double(), double, rtol=0.05, atol=0.02)
    embedding.train()
    with torch.autocast("cpu", torch.bfloat16):
        embedding(batch.float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in embedding.parameters())
