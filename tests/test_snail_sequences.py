import pytest
import torch
from torch import Tensor

from snail import serialize


def episode() -> Tensor:
    """The embedding of one episode of three steps, two channels wide."""
    return torch.tensor([[[0.5, -2.0], [3.0, 4.0], [0.25, 8.0]]])


def test_serialize_lays_one_hot_labels_behind_the_embedding() -> None:
    expected = [[[0.5, -2.0, 0, 1, 0], [3.0, 4.0, 1, 0, 0], [0.25, 8.0, 0, 0, 1]]]
    assert serialize(episode(), torch.tensor([[1, 0, 2]]), 3).tolist() == expected


def test_serialize_keeps_episodes_apart() -> None:
    embedded, labels = torch.arange(8.0).view(2, 2, 2), torch.tensor([[0, 1], [1, -1]])
    expected = [[[0, 1, 1, 0], [2, 3, 0, 1]], [[4, 5, 0, 1], [6, 7, 0, 0]]]
    assert serialize(embedded, labels, 2).tolist() == expected


def test_serialize_writes_zeros_where_the_label_is_unknown() -> None:
    sequence = serialize(episode(), torch.tensor([[1, -1, -1]]), 3)
    assert sequence[0, :, 2:].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(sequence[..., :2], episode())


def test_serialize_without_labels_equals_all_unknown() -> None:
    unknown = serialize(episode(), torch.full((1, 3), -1), 4)
    assert torch.equal(serialize(episode(), None, 4), unknown)
    assert unknown.shape == (1, 3, 2 + 4)
    assert not unknown[..., 2:].any()


@pytest.mark.parametrize("ways", [1, 5, 20])
def test_serialize_is_the_embedding_and_the_ways_wide(ways: int) -> None:
    embedded = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    sequence = serialize(embedded, torch.arange(14).view(2, 7) % ways, ways)
    assert sequence.shape == (2, 7, 64 + ways)
    assert torch.equal(sequence[..., 64:].sum(dim=-1), torch.ones(2, 7))


def test_serialize_follows_a_permutation_of_the_labels() -> None:
    labels, order = torch.tensor([[1, 0, 2]]), torch.tensor([2, 0, 1])
    permuted = serialize(episode(), order[labels], 3)
    assert torch.equal(permuted[..., 2:][..., order], serialize(episode(), labels, 3)[..., 2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_serialize_keeps_the_dtype_of_the_embedding(dtype: torch.dtype) -> None:
    embedded = episode().to(dtype)
    assert serialize(embedded, torch.tensor([[1, 0, 2]]), 3).dtype == dtype
    assert serialize(embedded, None, 3).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_serialize_takes_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 2]])
    assert torch.equal(serialize(episode(), labels.to(dtype), 3), serialize(episode(), labels, 3))


def test_serialize_leaves_its_arguments_as_they_were() -> None:
    embedded, labels = episode(), torch.tensor([[1, -1, 2]])
    sequence = serialize(embedded, labels, 3)
    sequence.zero_()
    serialize(embedded, None, 3).zero_()
    assert torch.equal(embedded, episode())
    assert labels.tolist() == [[1, -1, 2]]


def test_serialize_hands_gradients_to_the_embedding() -> None:
    embedded = episode().requires_grad_()
    serialize(embedded, torch.tensor([[1, -1, 2]]), 3).sum().backward()
    assert embedded.grad is not None
    assert torch.equal(embedded.grad, torch.ones(1, 3, 2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 3, 1]], "labels run from 0 to 3; 3 ways allow -1 to 2"),
        ([[0, -2, 1]], "labels run from -2 to 1; 3 ways allow -1 to 2"),
    ],
)
def test_serialize_refuses_labels_out_of_range(labels: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serialize(episode(), torch.tensor(labels), 3)


@pytest.mark.parametrize("shape", [(1, 2), (3,), (2, 3), (1, 3, 1)])
def test_serialize_refuses_labels_that_do_not_fit_the_steps(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels of shape .* do not fit \(1, 3\) steps"):
        serialize(episode(), torch.zeros(shape, dtype=torch.int64), 3)


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2, 1)])
def test_serialize_refuses_an_embedding_that_is_no_sequence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"embedded has shape .*; \(b, t, c\) is needed"):
        serialize(torch.zeros(shape), None, 3)
