from typing import Any

import pytest
import torch
from torch import Tensor

from snail import Episode


def parts(**changed: Any) -> dict[str, Any]:
    """Arguments of a good batch of two 3-way episodes with 3 support items and 4 queries, some of them changed."""
    good = {
        "support_x": torch.arange(6.0).reshape(2, 3, 1),
        "support_y": torch.tensor([[0, 1, 2], [2, 0, 1]]),
        "query_x": torch.arange(8.0).reshape(2, 4, 1),
        "query_y": torch.tensor([[0, 1, 2, 0], [1, 1, 2, 0]]),
        "ways": 3,
    }
    return good | changed


def regression(**changed: Any) -> dict[str, Any]:
    """Arguments of a good batch of two regression episodes, some of them changed."""
    return parts(support_y=torch.zeros(2, 3, 1), query_y=torch.zeros(2, 4, 1), ways=None) | changed


def test_episode_keeps_what_it_is_given() -> None:
    given = parts()
    episode = Episode(**given)
    assert all(getattr(episode, name) is value for name, value in given.items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_episode_takes_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    assert Episode(**parts(support_y=parts()["support_y"].to(dtype))).support_y.dtype == dtype


@pytest.mark.parametrize("item", [(), (5,), (1, 28, 28)])
def test_episode_takes_items_of_any_shape(item: tuple[int, ...]) -> None:
    episode = Episode(**parts(support_x=torch.zeros(2, 3, *item), query_x=torch.zeros(2, 4, *item)))
    assert episode.support_x.shape == (2, 3, *item)


def test_episode_takes_regression_targets() -> None:
    assert Episode(**regression(support_y=torch.zeros(2, 3, 7), query_y=torch.zeros(2, 4, 7))).ways is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"support_x": torch.zeros(2)}, r"support_x of shape \(2,\) and support_y of shape \(2, 3\)"),
        ({"support_y": torch.zeros(2, dtype=torch.int64)}, r"support_y of shape \(2,\)"),
        ({"support_y": torch.zeros(2, 4, dtype=torch.int64)}, r"\(2, 3, 1\) and support_y of shape \(2, 4\)"),
        ({"query_y": torch.zeros(3, 4, dtype=torch.int64)}, r"\(2, 4, 1\) and query_y of shape \(3, 4\)"),
        ({"query_x": torch.zeros(2, 3, 1)}, r"query_x of shape \(2, 3, 1\) and query_y of shape \(2, 4\)"),
    ],
)
def test_episode_rejects_shapes_that_do_not_fit(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Episode(**parts(**changed))


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_episode_rejects_an_empty_support_or_query(part: str, shape: tuple[int, int]) -> None:
    empty = {f"{part}_x": torch.zeros(*shape, 1), f"{part}_y": torch.zeros(shape, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"the {part} is empty: {part}_x has shape"):
        Episode(**parts(**empty))


@pytest.mark.parametrize("part", ["support_y", "query_y"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_episode_rejects_labels_that_are_not_integers(part: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"{part} of shape .* and dtype {dtype}; classification needs integers"):
        Episode(**parts(**{part: parts()[part].to(dtype)}))


def test_episode_rejects_integer_labels_of_three_axes() -> None:
    with pytest.raises(ValueError, match=r"support_y of shape \(2, 3, 1\).*needs integers \(b, items\)"):
        Episode(**parts(support_y=torch.zeros(2, 3, 1, dtype=torch.int64)))


@pytest.mark.parametrize("part", ["support_y", "query_y"])
@pytest.mark.parametrize(("label", "span"), [(3, "from 0 to 3"), (-1, "from -1 to 2"), (-100, "from -100 to 2")])
def test_episode_rejects_labels_out_of_range(part: str, label: int, span: str) -> None:
    labels = parts()[part].clone()
    labels[1, 1] = label
    with pytest.raises(ValueError, match=f"{part} runs {span}; 3 ways allow 0 to 2"):
        Episode(**parts(**{part: labels}))


@pytest.mark.parametrize("ways", [0, -1])
def test_episode_rejects_ways_below_one(ways: int) -> None:
    with pytest.raises(ValueError, match=f"ways is {ways}; it must be at least 1"):
        Episode(**parts(ways=ways))


def test_episode_rejects_support_and_query_of_different_episode_counts() -> None:
    with pytest.raises(ValueError, match="2 episodes in the support but 1 in the query"):
        Episode(**parts(query_x=torch.zeros(1, 4, 1), query_y=torch.zeros(1, 4, dtype=torch.int64)))


def test_episode_rejects_items_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"support items of shape \(1,\) but query items of shape \(2,\)"):
        Episode(**parts(query_x=torch.zeros(2, 4, 2)))


@pytest.mark.parametrize("part", ["support_y", "query_y"])
def test_episode_rejects_regression_without_floats(part: str) -> None:
    whole = regression()[part].long()
    with pytest.raises(ValueError, match=rf"{part} of shape .*torch.int64; regression \(ways=None\) needs floating"):
        Episode(**regression(**{part: whole}))


@pytest.mark.parametrize("part", ["support_y", "query_y"])
def test_episode_rejects_regression_targets_without_their_axis(part: str) -> None:
    with pytest.raises(ValueError, match=rf"{part} of shape \(2, .\).*needs floating \(b, items, d\)"):
        Episode(**regression(**{part: regression()[part][..., 0]}))


def test_episode_length_is_the_number_of_episodes() -> None:
    assert len(Episode(**parts())) == 2


def test_episode_to_moves_everything() -> None:
    there = Episode(**parts()).to("meta")
    assert {there.support_x.device.type, there.query_x.device.type} == {"meta"}
    assert {there.support_y.device.type, there.query_y.device.type} == {"meta"}
    assert (there.ways, there.query_x.shape) == (3, (2, 4, 1))


def test_episode_to_its_own_device_changes_nothing() -> None:
    episode = Episode(**parts())
    same = episode.to(torch.device("cpu"), non_blocking=True)
    assert all(torch.equal(getattr(same, name), getattr(episode, name)) for name in ("support_x", "query_y"))


def test_episode_map_items_changes_items_alone() -> None:
    episode = Episode(**parts())
    mapped = episode.map_items(lambda items: items.repeat(1, 1, 2) + 1)
    assert mapped.support_x.tolist() == (episode.support_x.repeat(1, 1, 2) + 1).tolist()
    assert mapped.query_x.tolist() == (episode.query_x.repeat(1, 1, 2) + 1).tolist()
    assert mapped.support_y is episode.support_y
    assert mapped.query_y is episode.query_y
    assert mapped.ways == 3


def test_episode_map_items_leaves_the_original_as_it_was() -> None:
    episode = Episode(**parts())
    episode.map_items(lambda items: items * 0)
    assert torch.equal(episode.support_x, parts()["support_x"])


def test_episode_map_items_checks_what_it_makes() -> None:
    with pytest.raises(ValueError, match=r"support_x of shape \(2, 1\)"):
        Episode(**parts()).map_items(lambda items: items[:, :1, 0])


def test_to_a_gpu_without_waiting_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory a copy waits for the device; there is no GPU needed to see which way is taken."""
    pinned: list[int] = []
    sent: list[tuple[Any, bool]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (pinned.append(self.data_ptr()), self)[1])
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: (sent.append((device, non_blocking)), self)[1])
    episode = Episode(**parts())
    episode.to("cuda", non_blocking=True)
    assert len(pinned) == 4 and sent == [("cuda", True)] * 4
    episode.to("cuda")
    episode.to("cpu", non_blocking=True)
    assert len(pinned) == 4 and sent[4:] == [("cuda", False)] * 4 + [("cpu", True)] * 4
