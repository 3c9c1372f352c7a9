"""Run folders: where a run's config, metrics, checkpoints, pictures and results are, and how they are read again.

Everything is written beside and renamed, so a kill leaves the old file or the new one. Nothing that is read can run
code: checkpoints load with ``weights_only=True``, and the config inside one may name classes of trusted packages only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from snail.evaluation import METRICS, Metric, hardware, metric_in
from snail.files import replacing
from snail.pretrained import WEIGHTS, Weights

from .trust import check_config

__all__ = [
    "LINKED_KEY",
    "RUNS",
    "STARTED_KEY",
    "TEACHER_KEY",
    "AtomicCheckpointIO",
    "KeepCheckpoints",
    "KeepConfig",
    "about_weights",
    "best_score",
    "checkpoint_config",
    "config_in",
    "find_checkpoint",
    "latest_run",
    "new_run",
    "read_checkpoint",
    "training_facts",
]

RUNS = Path("runs")  # in the folder where the command is given
LINKED_KEY = "snail_linked"  # where a checkpoint holds the model's arguments that came from the data
STARTED_KEY = "snail_started_from"  # where it holds which run's weights training began with, if any
CONFIG_KEY = "snail_config"  # where a checkpoint holds its run's config, as YAML text
TEACHER_KEY = "snail_teacher"  # where it holds which run's embedding it learned from, if any
TELLING = (CONFIG_KEY, LINKED_KEY, STARTED_KEY, TEACHER_KEY, "global_step", "epoch", "pytorch-lightning_version")
"""What a checkpoint tells of its weights, in plain values, beside what validation and time it took."""


def new_run(root: Path, name: str) -> Path:
    """Make the folder of a new run: ``root/name``, or ``root/name-2`` and so on where that is taken.

    Raises:
        ValueError: If the name is not that of a folder.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a run cannot be called {name!r}; use letters, digits, '_', '-' and '.'")
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        run = root / (name if number == 1 else f"{name}-{number}")
        try:
            run.mkdir()
        except FileExistsError:
            number += 1
        else:
            return run


def latest_run(root: Path, name: str) -> Path:
    """The newest run of a name that has a checkpoint to go on from.

    Raises:
        FileNotFoundError: If there is none.
    """
    runs = [
        run for run in (root.iterdir() if root.is_dir() else ()) if re.fullmatch(re.escape(name) + r"(-\d+)?", run.name)
    ]
    resumable = [run for run in runs if (run / "last.ckpt").is_file()]
    if not resumable:
        raise FileNotFoundError(
            f"there is no run of the name {name!r} with a last.ckpt in {root}; start one without --ckpt_path"
        )
    return max(resumable, key=lambda run: (run / "last.ckpt").stat().st_mtime)


def find_checkpoint(path: Path, *, prefer: str) -> Path:
    """The checkpoint that ``path`` means: itself, or ``prefer`` (else whatever there is) in a run's folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path.is_file():
        return path
    for name in (prefer, "best.ckpt", "last.ckpt", WEIGHTS):
        if (path / name).is_file():
            return path / name
    what = f"holds no best.ckpt, last.ckpt or {WEIGHTS}" if path.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{path} {what}; --ckpt_path takes a run's folder, such as runs/glyphs_5way, or a checkpoint"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without running anything that it holds.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is cut off, damaged, or no checkpoint, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.suffix == Path(WEIGHTS).suffix:
        weights = Weights.read(path)
        return {"state_dict": {f"learner.{name}": value for name, value in weights.state.items()}, **weights.about}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values (cut off, damaged or untrusted: "
            f"{type(error).__name__}); use another one"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of a training run: it has no state_dict")
    return content


def config_in(checkpoint: dict[str, Any], path: Path) -> Any:
    """The config in a checkpoint as it is; what it names is not to be acted on (``checkpoint_config`` looks at it).

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    text = checkpoint.get(CONFIG_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path} holds no config of a snail run; it was written by another program")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"the config in {path} cannot be read ({type(error).__name__}); use another checkpoint"
        ) from error


def checkpoint_config(checkpoint: dict[str, Any], path: Path, trust: Iterable[str] = ()) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint, after a look at what it names (``trust.check_config``).

    Args:
        checkpoint: From ``read_checkpoint``.
        path: Where it came from, for messages.
        trust: Packages besides snail, torch and torchvision whose classes may be named.

    Raises:
        ValueError: If there is no config, or it is not to be trusted.
    """
    return check_config(config_in(checkpoint, path), path, trust)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside and renames it; reads with ``weights_only=True`` alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See Lightning's ``CheckpointIO``."""
        with replacing(Path(path), "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See Lightning's ``CheckpointIO``."""
        return read_checkpoint(Path(path))


class KeepCheckpoints(Checkpoint):
    """Keeps ``last.ckpt``, after every epoch and by the clock within one, and ``best.ckpt`` by what validation scores.

    Args:
        run: The run's folder.
        every: Time between two checkpoints within an epoch.
    """

    def __init__(self, run: Path, every: timedelta) -> None:
        self.run = run
        self.every = every
        self.best: float | None = None
        self.metric = "accuracy"
        self._seconds_before = 0.0  # of training, before this process went on
        self._started_at = self._saved_at = time.monotonic()
        self._device = torch.device("cpu")
        self._processes = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._started_at = self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, between two optimiser steps. The end of an epoch, a moment later, saves all of it."""
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and not trainer.is_last_batch and self._due(trainer):
            self._save(trainer, "last.ckpt")

    def _due(self, trainer: Trainer) -> bool:
        if not self.every:
            return True
        if trainer.world_size > 1 and trainer.global_step % cast(Any, trainer).log_every_n_steps:
            return False  # to agree on the time is to wait for each other
        return trainer.strategy.broadcast(time.monotonic() - self._saved_at >= self.every.total_seconds())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what validated best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metric = metric_in(trainer.callback_metrics, "val/")
        if metric is None:
            return
        score = float(trainer.callback_metrics[f"val/{metric.name}"])
        if self.best is None or metric.better(score, self.best):
            self.best, self.metric = score, metric.name
            self._save(trainer, "best.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after every epoch, and so at the end of training."""
        self._save(trainer, "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and what training took."""
        seconds = self._seconds_before + time.monotonic() - self._started_at
        took = {"seconds": seconds, "hardware": hardware(self._device), "processes": self._processes}
        return {"best": self.best, "metric": self.metric, **took}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score so far."""
        self.best = state_dict["best"]
        self.metric = state_dict.get("metric", "accuracy")
        self._seconds_before = state_dict["seconds"]

    def _save(self, trainer: Trainer, name: str) -> None:
        self._device, self._processes = trainer.strategy.root_device, trainer.world_size
        trainer.save_checkpoint(self.run / name)
        self._saved_at = time.monotonic()


def best_score(checkpoint: dict[str, Any]) -> tuple[Metric, float]:
    """The validation score that a ``best.ckpt`` was kept for."""
    state = checkpoint["callbacks"][KeepCheckpoints.__qualname__]
    return METRICS[state["metric"]], state["best"]


def about_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a checkpoint beside its weights where a run will not go on from it."""
    told = {key: checkpoint[key] for key in TELLING if key in checkpoint}
    state = checkpoint.get("callbacks", {}).get(KeepCheckpoints.__qualname__)
    return told | ({"callbacks": {KeepCheckpoints.__qualname__: state}} if state else {})


def training_facts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells about its training, for results: steps, seconds, hardware."""
    state = checkpoint.get("callbacks", {}).get(KeepCheckpoints.__qualname__, {})
    facts = {"steps": checkpoint.get("global_step"), **{key: state.get(key) for key in ("seconds", "hardware")}}
    if state.get("processes", 1) > 1:
        facts["processes"] = state["processes"]
    facts["started_from"] = checkpoint.get(STARTED_KEY) or None
    facts["teacher"] = checkpoint.get(TEACHER_KEY) or None
    return {key: value for key, value in facts.items() if value is not None}


class KeepConfig(Callback):
    """Writes the run's config, with what the data told the model, into its folder and into every checkpoint.

    Args:
        run: The run's folder.
        text: The config as YAML.
        linked: The model's arguments that came from the data, which a later command must not change.
        started_from: What is known of the run whose weights training began with, if any.
        teacher: What is known of the run whose embedding is learned from, if any.
    """

    def __init__(
        self,
        run: Path,
        text: str,
        linked: dict[str, int],
        started_from: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.text = text
        self.linked = linked
        self.started_from = started_from or {}
        self.teacher = teacher or {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` at once where nothing is trained."""
        if stage != "fit":
            self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config.yaml`` once all that is restored fits."""
        if trainer.is_global_zero:
            with replacing(self.run / "config.yaml") as file:
                file.write(self.text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the config beside the weights."""
        checkpoint[CONFIG_KEY] = self.text
        checkpoint[LINKED_KEY] = self.linked
        checkpoint[STARTED_KEY] = self.started_from
        checkpoint[TEACHER_KEY] = self.teacher
