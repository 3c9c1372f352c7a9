"""MAML and its family: what an outer loop learns from the one inner loop (``snail.inner_loop``).

A class below either says what is differentiated (``MAML``, ``Reptile``, ``ImplicitMAML``) or names a choice of options
under which a paper is known.

Axes: ``b`` task (an episode), ``s`` support items, ``q`` query items, ``n`` ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .inner_loop import GradientLearner, InnerOptimizer, LearnedRates, Task, Weights, detached, task_losses

__all__ = ["ANIL", "BOIL", "MAML", "FineTuning", "FirstOrderMAML", "ImplicitMAML", "MAMLPlusPlus", "MetaSGD", "Reptile"]


class MAML(GradientLearner):
    """Model-agnostic meta-learning (Finn et al., 2017): weights from which a few gradient steps learn a task.

    The outer loop minimises the queries' loss under the adapted weights, differentiating through the steps. The
    default is one step at 0.4, as in the paper's training on 5-way Omniglot; there it is scored after three
    (``test_steps=3``) with ``batch_norm="transductive"`` (appendix A.1 and the authors' code).

    Args:
        embedding: See ``GradientLearner``, as for all that is not named here.
        embedding_dim: See there.
        ways: See there.
        first_order: Whether the gradient that a step takes counts as a constant, which spares second derivatives.
        second_order_from: Meta-step from which on second derivatives are taken, first-order ones before (the
            derivative-order annealing of MAML++).
        multi_step_loss: Meta-steps during which the loss after every step counts, at first all alike and with less and
            less weight on the earlier ones (MAML++); 0: the loss after the last step alone.
        **kwargs: See ``GradientLearner``.
    """

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        first_order: bool = False,
        second_order_from: int = 0,
        multi_step_loss: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, embedding_dim, ways, **kwargs)
        for what, value in (("second_order_from", second_order_from), ("multi_step_loss", multi_step_loss)):
            if value < 0:
                raise ValueError(f"{what} is {value} meta-steps; it must be at least 0")
        self.first_order = first_order
        self.second_order_from = second_order_from
        self.multi_step_loss = multi_step_loss

    @property
    def note(self) -> str:
        """See ``Learner.note``: the inner loop, and what differs from the exact gradient of its last loss."""
        told = [super().note]
        if self.first_order and type(self) is not FirstOrderMAML:
            told.append("first order")
        if self.second_order_from:
            told.append(f"second order from meta-step {self.second_order_from}")
        if self.multi_step_loss:
            told.append(f"multi-step loss until {self.multi_step_loss}")
        return ", ".join(told)

    @property
    def settled(self) -> bool:
        """See ``GradientLearner.settled``: once nothing is annealed any more."""
        return self.meta_steps >= max(self.multi_step_loss, self.second_order_from)

    def importance(self) -> list[float]:
        """The weight of the queries' loss after each step, from the first to the last; they sum to 1."""
        if self.meta_steps >= self.multi_step_loss:
            return [0.0] * (self.steps - 1) + [1.0]
        # As in the authors' code, with the share of the annealing that is over in the place of epochs.
        over = self.meta_steps / self.multi_step_loss
        earlier = max((1 - over) / self.steps, 0.03 / self.steps)
        return [earlier] * (self.steps - 1) + [1 - (self.steps - 1) * earlier]

    def meta_loss(self, task: Task, query_y: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientLearner.meta_loss``."""
        graph = not self.first_order and self.meta_steps >= self.second_order_from
        weights, losses = self.start(task), []
        for step, importance in enumerate(self.importance()):
            weights = self.step(task, weights, step, graph=graph)
            if importance:
                answer = self.query(task, weights, step + 1)
                losses.append(importance * task_losses(answer, query_y).mean())
        return torch.stack(losses).sum(), answer


class FirstOrderMAML(MAML):
    """MAML without second derivatives (Finn et al., 2017, section 5.2)."""

    def __init__(
        self, embedding: nn.Module, embedding_dim: int | None = None, ways: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(embedding, embedding_dim, ways, first_order=True, **kwargs)


class ANIL(MAML):
    """Almost no inner loop (Raghu et al., 2020): the head alone is adapted, the embedding is run once."""

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        adapt: Sequence[str] = ("head.*",),
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, embedding_dim, ways, adapt=adapt, **kwargs)


class BOIL(MAML):
    """Body only in the inner loop (Oh et al., 2021): all but the head is adapted."""

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        adapt: Sequence[str] = ("embedding.*",),
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, embedding_dim, ways, adapt=adapt, **kwargs)


class MetaSGD(MAML):
    """MAML with a learned rate, sign included, for every element of every weight (Li et al., 2017)."""

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        learn_rates: LearnedRates | None = "parameter",
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, embedding_dim, ways, learn_rates=learn_rates, **kwargs)


class MAMLPlusPlus(MAML):
    """MAML with the changes of Antoniou et al. (2019), each of which is an option of its own.

    A loss after every step at first, a learned rate for each weight and step, batch-norm weights for each step; with
    ``batch_norm="running"`` averages for each step too. The outer rate's cosine is the module's (``schedule``).
    Derivative-order annealing is off, as in the authors' configs.
    """

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        steps: int = 5,
        inner_rate: float = 0.1,
        learn_rates: LearnedRates | None = "layer_and_step",
        per_step_norm: bool = True,
        multi_step_loss: int = 5000,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embedding,
            embedding_dim,
            ways,
            steps=steps,
            inner_rate=inner_rate,
            learn_rates=learn_rates,
            per_step_norm=per_step_norm,
            multi_step_loss=multi_step_loss,
            **kwargs,
        )


class FineTuning(GradientLearner):
    """Weights adapted to each episode from where they are, with nothing learned before: a floor.

    From random weights it learns each task from scratch; from those of a trained network it fine-tunes.
    """

    needs_training = False

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        steps: int = 50,
        inner_rate: float = 0.001,
        inner_optimizer: InnerOptimizer = "adam",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embedding,
            embedding_dim,
            ways,
            steps=steps,
            inner_rate=inner_rate,
            inner_optimizer=inner_optimizer,
            **kwargs,
        )

    def meta_loss(self, task: Task, query_y: Tensor) -> tuple[Tensor, Tensor]:
        """There is nothing to learn.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("FineTuning learns nothing between episodes; score it without training, or train snail.MAML")


class Reptile(GradientLearner):
    """Reptile (Nichol et al., 2018): the weights move towards those that plain training on a task ends with.

    Every item of a training episode is trained on, queries too. The gradient that the outer optimiser takes is the
    weights less the adapted ones, averaged over the tasks: with ``torch.optim.SGD`` at a rate of epsilon this is the
    paper's update, serial with one episode in a batch, else batched.

    Args:
        embedding: See ``GradientLearner``, as for all that is not named here.
        embedding_dim: See there.
        ways: See there.
        steps: See there.
        inner_rate: See there.
        inner_optimizer: See there.
        inner_batch: Items of each training step, drawn from all of the task's; ``None``: all of them.
        **kwargs: See ``GradientLearner``.
    """

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        steps: int = 5,
        inner_rate: float = 0.001,
        inner_optimizer: InnerOptimizer = "adam",
        inner_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embedding,
            embedding_dim,
            ways,
            steps=steps,
            inner_rate=inner_rate,
            inner_optimizer=inner_optimizer,
            **kwargs,
        )
        if inner_batch is not None and inner_batch < 1:
            raise ValueError(f"inner_batch is {inner_batch}; it must be at least 1")
        self.inner_batch = inner_batch

    def meta_loss(self, task: Task, query_y: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientLearner.meta_loss``."""
        items, truth = torch.cat([task.support, task.query], 1), torch.cat([task.support_y, query_y], 1)
        at_first = self.start(task)
        weights = detached(at_first)
        for step in range(self.steps):
            support, support_y = self._batch(items, truth)
            task = replace(task, support=support, support_y=support_y)
            weights = detached(self.step(task, weights, step, graph=False))
        with torch.no_grad():
            answer = self.query(replace(task, support=items, support_y=truth), weights, self.steps)
            loss = task_losses(answer, query_y).mean()
        # A scalar of this gradient; its value is that of the loss, to look at.
        way = {name: at_first[name].detach() - weights[name].detach() for name in weights}
        pull = _inner_product(at_first, way).mean()
        return loss + pull - pull.detach(), answer

    def _batch(self, items: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        if self.inner_batch is None or self.inner_batch >= items.shape[1]:
            return items, truth
        chosen = torch.rand(items.shape[:2], device=items.device).argsort(1)[:, : self.inner_batch]
        rows = torch.arange(len(items), device=items.device).unsqueeze(1)
        return items[rows, chosen], truth[rows, chosen]


class ImplicitMAML(GradientLearner):
    """MAML by implicit gradients (Rajeswaran et al., 2019): exact at the end of the inner loop, whatever led there.

    The inner loop minimises the support's loss plus ``strength / 2`` times the squared distance to where it began. At
    the minimum the meta-gradient is ``(I + H / strength)^-1`` times the queries' gradient (equation 6), H the support's
    second derivative; conjugate gradients solve it with products of H and vectors, so that memory does not grow with
    the number of steps.

    Args:
        embedding: See ``GradientLearner``, as for all that is not named here.
        embedding_dim: See there.
        ways: See there.
        steps: See there.
        inner_rate: See there.
        strength: How strongly the adapted weights are held (the paper's lambda).
        solver_steps: Steps of conjugate gradients.
        damping: Added to the identity in the system that is solved; 0 is exact.
        **kwargs: See ``GradientLearner``.
    """

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        steps: int = 16,
        inner_rate: float = 0.1,
        strength: float = 2.0,
        solver_steps: int = 5,
        damping: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, embedding_dim, ways, steps=steps, inner_rate=inner_rate, **kwargs)
        if strength <= 0 or damping < 0 or solver_steps < 1:
            raise ValueError(
                f"strength is {strength:g}, damping {damping:g} and solver_steps {solver_steps}; strength must be "
                f"positive, damping at least 0, solver_steps at least 1"
            )
        self.strength, self.solver_steps, self.damping = strength, solver_steps, damping

    @property
    def note(self) -> str:
        """See ``Learner.note``: the inner loop, how strongly it is held and how far the system is solved."""
        return f"{super().note}, strength {self.strength:g}, {self.solver_steps} solver steps"

    def meta_loss(self, task: Task, query_y: Tensor) -> tuple[Tensor, Tensor]:
        """See ``GradientLearner.meta_loss``."""
        at_first = self.start(task)
        weights = detached(at_first)
        for step in range(self.steps):
            weights = detached(self.step(task, weights, step, graph=False))
        answer = self.query(task, weights, self.steps)
        losses = task_losses(answer, query_y)
        wanted = _gradient(losses, weights, retain_graph=True)
        slope = _gradient(self.support_losses(task, weights, self.steps), weights, create_graph=True)

        def system(vector: Weights) -> Weights:
            product = _gradient(_inner_product(slope, vector), weights, retain_graph=True)
            return {name: (1 + self.damping) * vector[name] + product[name] / self.strength for name in vector}

        solution = conjugate_gradients(system, wanted, self.solver_steps)
        # Its gradient by where the loop began is the solution; by what is not adapted, that of the minimum's move.
        implicit = _inner_product(at_first, solution) - _inner_product(slope, solution) / self.strength
        return (losses + implicit - implicit.detach()).mean(), answer


def conjugate_gradients(system: Callable[[Weights], Weights], wanted: Weights, steps: int) -> Weights:
    """Solve ``system(x) = wanted`` for each task by itself, by conjugate gradients from 0.

    Args:
        system: A symmetric positive definite linear map of ``(b, *shape)`` by name, task by task.
        wanted: What it is to give.
        steps: Number of steps; the solution is exact, but for rounding, after as many as there are unknowns.
    """
    solution = {name: torch.zeros_like(value) for name, value in wanted.items()}
    residual, direction = dict(wanted), dict(wanted)
    square = _inner_product(residual, residual)
    for _ in range(steps):
        image = system(direction)
        curvature = _inner_product(direction, image)
        length = torch.where(curvature > 0, square / curvature, 0)  # a task that is solved, or not convex, stays
        solution = _along(solution, length, direction)
        residual = _along(residual, -length, image)
        before, square = square, _inner_product(residual, residual)
        direction = _along(residual, torch.where(before > 0, square / before, 0), direction)
    return solution


def _along(start: Weights, length: Tensor, direction: Weights) -> Weights:
    """``start + length * direction``, with a length ``(b,)`` for each task."""
    return {name: start[name] + length.view(-1, *[1] * (step.ndim - 1)) * step for name, step in direction.items()}


def _inner_product(left: Weights, right: Weights) -> Tensor:
    """The inner product of each task's weights, ``(b,)``."""
    return torch.stack([(left[name] * right[name]).flatten(1).sum(1) for name in left]).sum(0)


def _gradient(
    values: Tensor, weights: Weights, *, retain_graph: bool | None = None, create_graph: bool = False
) -> Weights:
    """The gradient of each task's value ``(b,)`` by its weights; zeros where there is none."""
    gradients = torch.autograd.grad(
        values.sum(), list(weights.values()), retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
