"""``snail fit`` watched from within: when its training steps end, which levers it took, how much memory it needed."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from snail import Episode

from ..cli import main as snail
from ..levers import bf16_is_fast, keep_memory
from ..runs import KeepConfig
from .processes import peak_memory

__all__ = ["EPOCHS", "TIMED", "Command", "Enough", "Watch"]

NOTED, BEGUN = "noted.json", "begun.ckpt"  # what a watched command leaves
EPOCHS = 1000
"""Of a command that is timed: more than it gets to."""
TIMED = (f"--trainer.max_epochs={EPOCHS}", "--data.val_episodes=0")
"""Options of a command that is timed."""


class Enough(BaseException):
    """Ends a command that is timed, past all who handle errors, once there are numbers enough."""


class Watch(Callback):
    """Notes what a command does, and when its training steps end.

    Args:
        folder: Where it writes what it noted and, if steps are timed, the checkpoint that training starts from.
        warmup: Steps at the start that are not timed, at least 1.
        seconds: How long steps are timed before the command is ended; to its own end if not given.
    """

    def __init__(self, folder: Path, warmup: int = 1, seconds: float | None = None) -> None:
        self.folder, self.warmup, self.seconds = Path(folder), warmup, seconds
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.shots: set[int] = set()
        self.parts = ["train"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the other way is to start from."""
        if self.seconds is not None:
            trainer.save_checkpoint(self.folder / BEGUN)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Episode, batch_idx: int
    ) -> None:
        """Note the time.

        Raises:
            Enough: If steps were timed for long enough.
        """
        self.ends.append(time.perf_counter())
        self.shots.add(batch.support_y.shape[1] // cast(int, batch.ways))
        if len(self.ends) <= self.warmup:
            self.losses.append(float(outputs["loss"]))
        elif self.seconds is not None and self.ends[-1] - self.ends[self.warmup - 1] >= self.seconds:
            self._write(trainer)
            raise Enough

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that it took place."""
        self.parts.append("val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was seen."""
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that it took place."""
        self.parts.append("test")
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        parts = list(dict.fromkeys(self.parts))
        data = cast(Any, trainer).datamodule
        arrays = [data.images(part).pixels for part in parts]
        mapped = [resident for array in arrays if (resident := resident_bytes(array)) is not None]
        timed = self.ends[self.warmup - 1 :]
        seen = {
            "levers": levers_taken(trainer),
            "threads": torch.get_num_threads(),
            "losses": self.losses,
            "step_ms": [round(1000 * (end - before), 3) for before, end in itertools.pairwise(timed)],
            "steps": len(self.ends),
            "shots": sorted(self.shots),
            "train_shots": list(data.train_shots),
            "parts": parts,
            "data_bytes": sum(array.nbytes for array in arrays),
            "data_resident": sum(mapped) if mapped else None,
        }
        (self.folder / NOTED).write_text(json.dumps(seen))


def levers_taken(trainer: Trainer) -> dict[str, Any]:
    """What the command of a trainer did to be faster, and what this machine lacks for it (``experiments.levers``)."""
    config = next(callback.text for callback in cast(Any, trainer).callbacks if isinstance(callback, KeepConfig))
    asked = yaml.safe_load(config)["keep_memory"]
    kept = asked and keep_memory()  # once more, to learn whether the library took it
    lacking = ["bf16 in hardware"] * (not bf16_is_fast("cpu")) + ["memory that can be kept"] * (asked and not kept)
    taken = {"precision": str(trainer.precision), "memory_kept": kept}
    return taken | {"channels_last": channels_last(trainer.lightning_module), "lacking": lacking}


def channels_last(network: nn.Module) -> bool:
    """Whether a network's convolutions have their channels beside each other in memory."""
    return any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in network.parameters()
    )


def resident_bytes(array: Tensor) -> int | None:
    """How much of a mapped file's array is in memory; ``None`` if it is not mapped, or the system does not tell."""
    inside = False
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps").read_text().splitlines():
            key, *rest = line.split()
            if not key.endswith(":"):  # such as 7f12-7f34 rw-p 00000000 08:01 1234 /a/file; without a file it is 0
                start, end = (int(address, 16) for address in key.split("-"))
                inside = start <= array.data_ptr() < end and rest[3] != "0"
            elif inside and key == "Rss:":
                return 1024 * int(rest[0])
    return None


class _Terminal(io.StringIO):
    """Says that it is a terminal; nobody looks at it."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Command:
    """``snail fit`` on the CPU, as on a terminal; to be called in a process of its own, whose folder it changes.

    Args:
        options: Of ``snail fit``.
        folder: Where it works.
        warmup: See ``Watch``.
        seconds: See ``Watch``.
    """

    options: tuple[str, ...]
    folder: Path
    warmup: int = 1
    seconds: float | None = None

    @property
    def checkpoint(self) -> Path:
        """What training started from, once it ran."""
        return self.folder / BEGUN

    def __call__(self) -> dict[str, Any]:
        """Run it: what ``Watch`` noted, and the ``peak_memory`` of the process in bytes.

        Raises:
            RuntimeError: If the command fails, or ends before its steps were timed.
        """
        watch = {"folder": str(self.folder), "warmup": self.warmup, "seconds": self.seconds}
        callbacks = json.dumps([{"class_path": f"{Watch.__module__}.{Watch.__qualname__}", "init_args": watch}])
        argv = ["fit", *self.options, "--trainer.accelerator=cpu", f"--trainer.callbacks={callbacks}"]
        os.chdir(self.folder)
        terminal = _Terminal()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(terminal):
            try:
                status, enough = snail(argv), self.seconds is None
            except Enough:
                status, enough = 0, True
        if status:
            raise RuntimeError(terminal.getvalue().strip().splitlines()[-1])
        if not enough:
            raise RuntimeError(f"training ended before its steps were timed for {self.seconds} s")
        seen: dict[str, Any] = json.loads((self.folder / NOTED).read_text())
        return seen | {"peak_memory": peak_memory()}
