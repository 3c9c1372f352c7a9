import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snail import Conv4


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
