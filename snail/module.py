"""The Lightning module that trains and scores any learner; it knows none of them by name."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from .distillation import imitation_loss
from .episodes import Episode
from .evaluation import Result, Scorer, Scoring, as_parameters
from .learner import EmbeddingLearner, Learner

__all__ = ["FewShot"]


class FewShot(LightningModule):
    """Trains a learner on episodes with ``learner.loss`` and scores it as ``snail.evaluate`` does.

    Loaders yield ``Episode`` batches. An evaluation loader may yield episodes of indices and say where they point
    with an attribute ``episodes`` (``snail.datasets`` does); then each image is embedded once.

    Args:
        learner: What is trained.
        optimizer: Optimiser of all parameters, with its learning rate; Adam as in the paper, which gives no rate.
        schedule: How the optimiser's learning rate moves: ``cosine`` or ``linear`` to zero over the run, or
            ``constant``.
        warmup: Optimiser steps over which the learning rate first rises from zero.
        compile: Whether the loss is compiled (``torch.compile``), for learners whose answers are made from embeddings;
            each number of shots is compiled once, which takes a while. Worth it on a GPU; slower on a CPU.

    Raises:
        ValueError: If ``warmup`` is negative, or a learner that takes gradients in its loss is to be compiled.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup: int = 100,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"warmup is {warmup} steps; it must be at least 0")
        self.learner = learner
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup = warmup
        self.results: list[Result] = []
        self._scorings: dict[int, Scoring] = {}
        self._last_loss: Tensor | None = None
        self._teacher: tuple[nn.Module] | None = None  # in a tuple: no part of this module, nor of its checkpoints
        if compile and not isinstance(learner, EmbeddingLearner):
            raise ValueError(f"{type(learner).__name__} takes gradients in its loss and cannot be compiled")
        self.compile_loss = compile
        self._loss = self._compiled(learner.loss)

    def learn_from(self, teacher: nn.Module) -> None:
        """Train the learner's embedding to be another, by ``imitation_loss`` instead of the learner's own loss.

        Args:
            teacher: Any module from items to as many channels; it stays as it is, and is kept in no checkpoint.

        Raises:
            ValueError: If the learner does not answer from embeddings.
        """
        if not isinstance(self.learner, EmbeddingLearner):
            raise ValueError(f"{type(self.learner).__name__} has no embedding that could learn from a teacher")
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._loss = self._compiled(partial(imitation_loss, self.learner, teacher))

    def _compiled(self, loss: Callable[[Episode], Any]) -> Callable[[Episode], tuple[Tensor, dict[str, Tensor]]]:
        return torch.compile(loss, dynamic=False) if self.compile_loss else loss

    def on_fit_start(self) -> None:
        """Bring the teacher, if any, to where the learner is."""
        for teacher in self._teacher or ():
            teacher.to(self.device)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """The learner's answer; see ``Learner.forward``."""
        answer: Tensor = self.learner(support_x, support_y, query_x)
        return answer

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The learner's loss on a batch of episodes."""
        loss, logs = self._loss(batch.map_items(lambda items: as_parameters(items, self.learner)))
        self._last_loss = loss.detach()
        # To look is to wait for the device; a loss that was not finite once stays so.
        if self.device.type == "cpu" or self.global_step % cast(Any, self.trainer).log_every_n_steps == 0:
            self._check_loss()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in logs.items()})
        return loss

    def _check_loss(self) -> None:
        loss = self._last_loss
        if loss is not None and not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} at step {self.global_step}; lower the learning rate "
                f"(--model.optimizer.lr) or clip gradients (--trainer.gradient_clip_val 1)"
            )

    def configure_optimizers(self) -> Any:
        """The optimiser with its schedule, which counts optimiser steps."""
        optimizer = self.optimizer(self.learner.parameters())
        steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / (self.warmup + 1))
            if self.schedule == "constant" or not math.isfinite(steps):
                return rise
            if self.schedule == "linear":
                return rise * (1 - min(1.0, step / max(1, steps)))
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- scoring: the same for validation and test, one loader a setting ---------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the epoch before."""
        self._scorings = {}

    def on_test_epoch_start(self) -> None:
        """Forget the scores of the epoch before."""
        self._scorings = {}

    def validation_step(self, batch: Episode, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of episodes."""
        self._score(batch, dataloader_idx, self.trainer.val_dataloaders)

    def test_step(self, batch: Episode, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of episodes."""
        self._score(batch, dataloader_idx, self.trainer.test_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy`` (``val/mse`` for regression), the mean over the settings, and each setting's own.

        Of a learner whose answer is scored in variants the last one counts.
        """
        last = [results[-1] for results in self._finish_scoring()]
        name = f"val/{last[0].metric}"
        for result in last:
            if "shots" in result.facts:
                self.log(f"{name}_{result.facts['shots']}shot", result.mean)
        self.log(name, sum(result.mean for result in last) / len(last), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        """Keep the results of all settings in ``self.results``."""
        self._finish_scoring()

    def _score(self, batch: Episode, setting: int, loaders: Any) -> None:
        if setting not in self._scorings:
            loader = _nth(loaders, setting)
            episodes = getattr(loader, "episodes", None)
            pool, known = (None, {}) if episodes is None else (episodes.images, episodes.facts)
            same = (s.scorer for s in self._scorings.values() if s.scorer.pool is pool and pool is not None)
            starts = getattr(loader, "starts", None) if self.trainer.world_size > 1 else None
            self._scorings[setting] = Scoring(next(same, None) or Scorer(self.learner, pool), known, starts)
        self._scorings[setting].add(batch)

    def _finish_scoring(self) -> list[list[Result]]:
        """The results of each setting, which are also kept in ``self.results``, one after the other."""
        found = [scoring.results(self.device, self._over_processes) for _, scoring in sorted(self._scorings.items())]
        self.results = [result for results in found for result in results]
        self._scorings = {}  # embeddings of the pool are not kept through training
        return found

    def _over_processes(self, own: Tensor) -> Tensor:
        total: Tensor = self.trainer.strategy.reduce(own, reduce_op="sum")
        return total

    # -- what else a run needs to go on exactly where it was ---------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of all random generators of each process, in tensors and plain values."""
        self._check_loss()  # weights that are not finite never take the place of others
        states: list[Any] = [generator_states()]
        if torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, generator_states())
        checkpoint["generators"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the random generators back (of a run on fewer processes, those of one of them), and keep all digits."""
        for name, parameter in self.named_parameters():  # the trainer converts them later, when digits are lost
            kept = checkpoint.get("state_dict", {}).get(name, parameter)
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, kept.dtype))
        states = checkpoint.get("generators", [{}])
        states = [states] if isinstance(states, dict) else states  # of one process, as it was kept once
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        set_generator_states(states[rank % len(states)])


def generator_states() -> dict[str, Any]:
    """The state of all random generators of this process, in tensors and plain values."""
    _, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generator_states(state: dict[str, Any]) -> None:
    """Put back what ``generator_states`` gave; what it does not hold stays as it is."""
    if "torch" in state:
        torch.set_rng_state(state["torch"].cpu())
    if "python" in state:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in state:
        np.random.set_state(("MT19937", *state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _nth(loaders: Any, index: int) -> Any:
    return loaders[index] if isinstance(loaders, (list, tuple)) else loaders
