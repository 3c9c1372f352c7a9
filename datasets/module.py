"""Data sets as Lightning data modules: what they share is said once, here; a data set adds how its items are had."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from snail.episodes import Episode

from .augmentation import distort, mirror, recolour
from .images import PARTS, Images
from .prepared import Pixels
from .sampler import DrawnBatches, Episodes, EpisodeSampler, Sampler, choose_shots

__all__ = ["EpisodeData", "ImageData"]


class EpisodeData(LightningDataModule, ABC):
    """Episodes for training, validation and test, wherever they come from.

    Args:
        train_shots: Fewest and most examples of a class (of a task, for regression) in training; a number between them
            is drawn for each optimiser step.
        queries: Queries of each class (of each task) in a training episode.
        batch_size: Training episodes in a step, on each device.
        steps_per_epoch: Optimiser steps between two validations.
        eval_shots: Numbers of examples of a class (of a task) that are scored, each by itself.
        eval_queries: Queries of each class (of each task) in a scored episode.
        val_episodes: Validation episodes a number of shots; 0: no validation, the last weights are the outcome.
        test_episodes: Test episodes a number of shots; 10,000 if not given, 1,000 on the built-in data.
        seed: Seed of all episodes.
    """

    dataset: str
    """The data set's name in results."""
    split: str
    """How its parts are had, as named in results."""
    default_test_episodes: int = 10_000
    ways: int | None = None
    """Classes in an episode; ``None`` for regression."""
    train_ways: int | None = None
    """Classes in a training episode; likewise."""

    def __init__(
        self,
        train_shots: tuple[int, int] = (1, 5),
        queries: int = 1,
        batch_size: int = 32,
        steps_per_epoch: int = 250,
        eval_shots: list[int] = [1, 5],  # noqa: B006 (never changed; a tuple would not read well in a YAML)
        eval_queries: int = 1,
        val_episodes: int = 1000,
        test_episodes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        low, high = train_shots
        if not 1 <= low <= high:
            raise ValueError(f"train_shots is {list(train_shots)}; it must be [fewest, most] with 1 <= fewest <= most")
        if not eval_shots:
            raise ValueError("eval_shots is empty; name at least one number of shots, such as [1, 5]")
        if batch_size < 1 or steps_per_epoch < 1:
            raise ValueError(
                f"batch_size is {batch_size} and steps_per_epoch is {steps_per_epoch}; both must be at least 1"
            )
        self.train_shots, self.queries = range(low, high + 1), queries
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.eval_shots, self.eval_queries = tuple(eval_shots), eval_queries
        self.eval_episodes = {
            "val": val_episodes,
            "test": self.default_test_episodes if test_episodes is None else test_episodes,
        }
        self.seed = seed

    @property
    def trained_on(self) -> str:
        """What results say of the classes that were trained on, where it is not the training classes alone."""
        return ""

    @property
    def changes(self) -> list[str]:
        """What results say of the training episodes where it is not the usual."""
        return []

    @property
    def training_notes(self) -> dict[str, str]:
        """What results say of training: ``on`` which classes, and a ``note`` of ``changes``, each if there is any."""
        told = {"on": self.trained_on, "note": ", ".join(self.changes)}
        return {key: text for key, text in told.items() if text}

    # -- what a source of episodes adds ------------------------------------------------------------------------

    @abstractmethod
    def sampler(self, part: str, *, ways: int | None, shots: int, queries: int, seed: int) -> Sampler:
        """Draws the episodes of ``train``, ``val`` or ``test``.

        Raises:
            ValueError: If there is no such part, or it cannot give such episodes.
        """

    def images(self, part: str) -> Images | None:
        """The pool that the items of a part's episodes are indices into; ``None`` if they are the items themselves."""
        return None

    # -- what every one then has -------------------------------------------------------------------------------

    def split_name(self, part: str) -> str:
        """Such as ``vinyals/test``.

        Raises:
            ValueError: If there is no such part.
        """
        if part not in PARTS:
            raise ValueError(f"there is no part {part!r}; choose train, val or test")
        return f"{self.split}/{part}"

    def episodes(
        self,
        part: str,
        *,
        shots: int,
        ways: int | None = None,
        queries: int | None = None,
        count: int | None = None,
        seed: int | None = None,
    ) -> Episodes:
        """Seeded episodes of a part, ready to be scored; what is not given is as the data set was set up."""
        sampler = self.sampler(
            part,
            ways=self.ways if ways is None else ways,
            shots=shots,
            queries=self.eval_queries if queries is None else queries,
            seed=self.seed if seed is None else seed,
        )
        return Episodes(
            sampler, self.eval_episodes.get(part, 1000) if count is None else count, images=self.images(part)
        )

    def train_dataloader(self) -> TrainingBatches:
        """Endless training batches, cut into epochs; which come next depends on the optimiser step alone."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("train_dataloader needs a Lightning trainer; use episodes(...) without one")
        samplers = {
            shots: self.sampler("train", ways=self.train_ways, shots=shots, queries=self.queries, seed=self.seed)
            for shots in self.train_shots
        }
        accumulate = trainer.accumulate_grad_batches
        return TrainingBatches(
            samplers,
            seed=self.seed,
            batch_size=self.batch_size,
            accumulate=accumulate,
            rank=trainer.global_rank,
            world=trainer.world_size,
            length=self.steps_per_epoch * accumulate,
            position=lambda: trainer.global_step * accumulate,
        )

    def val_dataloader(self) -> list[DrawnBatches]:
        """One loader for each number of shots, of this process's share; none where there is no validation."""
        return [self._shared("val", shots) for shots in self.eval_shots] if self.eval_episodes["val"] else []

    def test_dataloader(self) -> list[DrawnBatches]:
        """One loader for each number of shots, of this process's share."""
        return [self._shared("test", shots) for shots in self.eval_shots]

    def _shared(self, part: str, shots: int) -> DrawnBatches:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return DrawnBatches(self.episodes(part, shots=shots), rank, world)

    def transfer_batch_to_device(self, batch: Episode, device: torch.device, dataloader_idx: int) -> Episode:
        """Send episodes to ``device`` without waiting for it."""
        return batch.to(device, non_blocking=True)


class ImageData(EpisodeData):
    """Classification episodes of indices into a pool of images.

    Args:
        ways: Classes in an episode.
        train_ways: Classes in a training episode, for learners that take any number; as many as ``ways`` if not given.
        fixed_labels: Whether each training class keeps one label in all episodes instead of a new one in each: a trap,
            to be seen.
        train_classes: Train on the first so many training classes only; on all if not given.
        max_queries: Most queries of a training episode, drawn among those of all its classes; 1 is one question an
            episode, as in the papers. All of them if not given.
        distortion: How much training images are turned, stretched, slanted and shifted at random each time they are
            seen, 1 as ``snail.datasets.augmentation.distort`` says; 0 leaves them as they are.
        mirrored_at_random: Whether training images are turned left to right at random, for photographs.
        recolouring: How much brightness, contrast and saturation of training images vary at random, 1 as
            ``snail.datasets.augmentation.recolour`` says; 0 leaves them as they are.
        **kwargs: See ``EpisodeData``.

    Raises:
        ValueError: If ``distortion`` or ``recolouring`` is negative; of ``max_queries`` see ``EpisodeSampler``, of
            ``train_classes`` ``Images.first``.
    """

    ways: int
    train_ways: int
    ink = False
    """Whether images are drawings, their ink 1 on 0; they are shown dark on light."""

    def __init__(
        self,
        ways: int = 5,
        train_ways: int | None = None,
        fixed_labels: bool = False,
        train_classes: int | None = None,
        max_queries: int | None = None,
        distortion: float = 0.0,
        mirrored_at_random: bool = False,
        recolouring: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for what, strength in (("distortion", distortion), ("recolouring", recolouring)):
            if strength < 0:
                raise ValueError(f"{what} is {strength:g}; it must be at least 0")
        self.distortion, self.recolouring, self.mirrored_at_random = distortion, recolouring, mirrored_at_random
        self.max_queries = max_queries
        self.ways, self.train_ways = ways, ways if train_ways is None else train_ways
        self.fixed_labels, self.train_classes = fixed_labels, train_classes
        self._images: dict[str, Images] = {}

    @property
    def changes(self) -> list[str]:
        """See ``EpisodeData.changes``; it tells of few classes, of labels that are kept, and of changed images."""
        told = super().changes
        if self.train_classes is not None:
            told.append(f"{self.train_classes:,} classes")
        if self.fixed_labels:
            told.append("each class with one label")
        if self.distortion:
            told.append(f"images distorted by {self.distortion:g}")
        if self.mirrored_at_random:
            told.append("mirrored at random")
        if self.recolouring:
            told.append(f"recoloured by {self.recolouring:g}")
        return told

    @abstractmethod
    def load(self, part: str) -> Images:
        """The images of ``train``, ``val`` or ``test``."""

    def to_pixels(self, picture: Image.Image) -> Pixels:
        """Any picture as the data set's own images are: size, colours and what counts as ink; ``(c, h, w)``.

        Raises:
            NotImplementedError: If the data set does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how pictures from elsewhere become its images")

    def sampler(self, part: str, *, ways: int | None, shots: int, queries: int, seed: int) -> EpisodeSampler:
        """See ``EpisodeData.sampler``."""
        name = f"{self.dataset}/{self.split_name(part)}"
        ways = self.ways if ways is None else ways
        trains: dict[str, Any] = {}
        if part == "train":
            trains = {"fixed_labels": self.fixed_labels, "max_queries": self.max_queries}
        return EpisodeSampler(self.images(part), name, ways=ways, shots=shots, queries=queries, seed=seed, **trains)

    def images(self, part: str) -> Images:
        """The images of ``train``, ``val`` or ``test``, loaded once.

        Raises:
            ValueError: If there is no such part.
        """
        if part not in self._images:
            self.split_name(part)  # there is such a part
            images = self.load(part)
            if part == "train" and self.train_classes is not None:
                images = images.first(self.train_classes)
            self._images[part] = images
        if self.trainer is not None:  # gathered and scaled where the computing is done
            self._images[part] = self._images[part].to(self.trainer.strategy.root_device)
        return self._images[part]

    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode:
        """Put images in the place of indices in training; a scorer does so itself, once for each image."""
        if self.trainer is not None and self.trainer.training:
            return batch.map_items(lambda indices: self._varied(self.images("train").take(indices)))
        return batch

    def _varied(self, images: Tensor) -> Tensor:
        """Training images as they are seen this time."""
        images = distort(images, self.distortion, outside="zeros" if self.ink else "reflection")
        return recolour(mirror(images) if self.mirrored_at_random else images, self.recolouring)


@dataclass(eq=False)
class TrainingBatches:
    """Batches of training episodes, as they are drawn, without end, from wherever ``position`` says.

    Batch number j of the run, counted over all ranks, holds episodes ``j * B`` to ``(j + 1) * B - 1`` for B =
    ``world * batch_size``, of which each rank takes its ``batch_size``. ``accumulate`` batches make an optimiser
    step and share its number of shots.
    """

    samplers: Mapping[int, Sampler]
    seed: int
    batch_size: int
    accumulate: int
    rank: int
    world: int
    length: int
    position: Callable[[], int]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.length

    def __iter__(self) -> Iterator[Episode]:
        """Batches from the current position on."""
        for j in itertools.count(self.position()):
            shots = choose_shots(sorted(self.samplers), self.seed, j // self.accumulate)
            start = (j * self.world + self.rank) * self.batch_size
            yield self.samplers[shots].draw(start, start + self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the trainer's. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
