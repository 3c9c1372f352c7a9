"""An embedding that learns to be another's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snail import Conv4, Episode, ProtoNet
from snail.distillation import imitation_loss


def episode(dtype: torch.dtype = torch.float64) -> Episode:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 3, dtype=dtype)
    y = torch.arange(5).repeat(2, 2)
    return Episode(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:], 5)


def linear(out: int = 4) -> nn.Linear:
    return nn.Linear(3, out, dtype=torch.float64)


def test_the_loss_is_the_mean_squared_distance_and_its_gradient_that_of_the_closed_form() -> None:
    learner, teacher, some = ProtoNet(linear()), linear(), episode()
    loss, logs = imitation_loss(learner, teacher, some)
    loss.backward()
    items = torch.cat([some.support_x, some.query_x], dim=1).flatten(0, 1)
    apart = (learner.embedding(items) - teacher(items)).detach()
    assert loss.item() == pytest.approx(sum(float(row @ row) for row in apart) / 20)
    torch.testing.assert_close(learner.embedding.weight.grad, 2 * apart.T @ items / 20)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    answers = learner(some.support_x, some.support_y, some.query_x).argmax(-1)
    assert logs["accuracy"].item() == pytest.approx((answers == some.query_y).double().mean().item())


def test_labels_do_not_count() -> None:
    learner, teacher, some = ProtoNet(linear()), linear(), episode()
    other = Episode(some.support_x, some.support_y.flip(1), some.query_x, some.query_y.roll(1, 1), 5)
    assert imitation_loss(learner, teacher, some)[0] == imitation_loss(learner, teacher, other)[0]


def test_what_can_be_the_teacher_becomes_it() -> None:
    learner, teacher, some = ProtoNet(linear()), linear(), episode()
    optimizer = torch.optim.LBFGS(
        learner.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def again() -> float:
        optimizer.zero_grad()
        loss = imitation_loss(learner, teacher, some)[0]
        loss.backward()
        return float(loss.detach())

    optimizer.step(again)
    torch.testing.assert_close(learner.embedding.weight, teacher.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.embedding.bias, teacher.bias, atol=1e-5, rtol=0)


def test_in_half_precision_the_loss_is_in_single() -> None:
    x = torch.rand(1, 4, 1, 28, 28)
    some = Episode(x[:, :2], torch.tensor([[0, 1]]), x[:, 2:], torch.tensor([[0, 1]]), 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = imitation_loss(ProtoNet(Conv4(filters=4)), Conv4(filters=6).eval(), some)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_embeddings_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="the teacher's embedding has 6 channels and the learner's 4"):
        imitation_loss(ProtoNet(linear(4)), linear(6), episode())
