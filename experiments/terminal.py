"""What a person sees while a run goes on, and the metrics file they read afterwards."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from snail.evaluation import metric_in
from snail.files import replacing

__all__ = ["MetricsCsv", "RunProgress"]


class RunProgress(ProgressBar):
    """One bar over the whole training; where no terminal listens, a line a validation instead."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._live = sys.stderr.isatty()
        self._silent = False

    def disable(self) -> None:
        """Show nothing, as Lightning asks on all processes but the first."""
        self._live = False
        self._silent = True

    def enable(self) -> None:
        """Show progress."""
        self._live = sys.stderr.isatty()
        self._silent = False

    def _open(self, what: str, total: float, start: int = 0) -> None:
        known = int(total) if total != float("inf") else None
        self._bar = tqdm(total=known, initial=start, desc=what, unit="step", leave=False, disable=not self._live,
                         dynamic_ncols=True, smoothing=0.05)  # fmt: skip

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step that training starts from."""
        self._open("training", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Move on."""
        if self._bar is not None and trainer.global_step > self._bar.n:
            self._bar.update(trainer.global_step - self._bar.n)
            if self._live and trainer.global_step % 10 == 0:  # reading the loss waits for the device
                self._bar.set_postfix_str(self._figures(trainer), refresh=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how validation went, where there is no bar to say it."""
        if trainer.state.fn == "fit" and not self._live and not self._silent and not trainer.sanity_checking:
            total = trainer.estimated_stepping_batches
            print(f"step {trainer.global_step}/{total:.0f}  {self._figures(trainer)}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar over the test batches."""
        self._open("scoring", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    @staticmethod
    def _figures(trainer: Trainer) -> str:
        logged = trainer.callback_metrics
        shown = [f"loss {float(logged['train/loss']):.3f}"] if "train/loss" in logged else []
        if metric := metric_in(logged, "val/"):
            shown.append(f"validation {metric.title} {metric.text(float(logged[f'val/{metric.name}']))}")
        return "  ".join(shown)


class MetricsCsv(Logger):
    """Metrics as ``metrics.csv`` in the run's folder, one row a step; a resumed run goes on in the same file.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / "metrics.csv"
        self._rows: dict[int, dict[str, float]] = {}
        self._resumed = False

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Runs are numbered in their name."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep the metrics of a step."""
        step = step or 0
        if not self._resumed:
            self._resumed = True
            if self.path.exists():  # what was logged after the checkpoint that the run goes on from is done again
                with self.path.open(newline="") as file:
                    rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
                self._rows = {int(row.pop("step")): row for row in rows if row["step"] < step}
        self._rows.setdefault(step, {}).update({k: float(v) for k, v in metrics.items()})

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is kept as ``config.yaml``."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file beside and rename it."""
        if not self._rows:
            return
        columns = sorted({key for row in self._rows.values() for key in row})
        with replacing(self.path, newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self._rows.items()))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()
