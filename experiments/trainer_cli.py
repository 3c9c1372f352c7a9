"""Training, validation and test as a LightningCLI: every trainer flag works, every class of the config is an option.

What is added: run folders, checkpoints that bring their own config, and what is drawn and printed at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from snail import NearestNeighbour, evaluate
from snail.datasets import EpisodeData, Glyphs
from snail.evaluation import Result
from snail.module import FewShot
from snail.results import merge_results, results_table

from .levers import bf16_is_fast, keep_memory
from .runs import (
    RUNS,
    AtomicCheckpointIO,
    KeepCheckpoints,
    KeepConfig,
    file_hash,
    new_run,
    read_checkpoint,
    training_facts,
)
from .terminal import MetricsCsv, RunProgress

__all__ = ["SnailCLI"]


class SnailCLI(LightningCLI):
    """LightningCLI over ``FewShot`` and ``EpisodeData``.

    Args:
        args: The command line, without the program's name.
        name: What to call the run if ``--name`` does not.
        checkpoint: The checkpoint that ``--ckpt_path`` was found to mean.
    """

    def __init__(self, args: Sequence[str], *, name: str, checkpoint: Path | None) -> None:
        self.default_name = name
        self.checkpoint = checkpoint
        parser = {"exit_on_error": False}
        super().__init__(
            FewShot,
            EpisodeData,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 20,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 25,
            },
            parser_kwargs={"prog": "snail", **parser, **{command: parser for command in self.subcommands()}},
            args=list(args),
        )

    # -- the options -------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, and which of their arguments are not options."""
        same = {"model", "datamodule", "weights_only", "verbose"}
        return {
            "fit": same | {"train_dataloaders", "val_dataloaders"},
            "validate": same | {"dataloaders"},
            "test": same | {"dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside those of trainer, model and data; what the model takes from the data."""
        for option, kind, default, description in (
            ("--name", str, self.default_name, "Name of the run; its folder is runs/<name>."),
            ("--checkpoint_minutes", float, 2.0, "Minutes between checkpoints within an epoch; 0: after every step."),
            ("--keep_memory", bool, True, "Let the C library keep freed memory (glibc; faster on the CPU)."),
        ):
            parser.add_argument(option, type=kind, default=default, help=description)
        parser.set_defaults(
            {
                "data": {"class_path": "snail.datasets.Glyphs"},
                "model.learner": {
                    "class_path": "snail.SNAIL",
                    "init_args": {"embedding": {"class_path": "snail.Conv4"}, "embedding_dim": 64},
                },
            }
        )
        parser.link_arguments("data.init_args.ways", "model.learner.init_args.ways")
        parser.link_arguments(
            ("data.init_args.train_shots", "data.init_args.eval_shots"),
            "model.learner.init_args.max_shots",
            compute_fn=lambda train, evaluated: max(*train, *evaluated),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a copy of the parent's method without its warning about calls from Python."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's config came first on the command line."""

    # -- making things -----------------------------------------------------------------------------------------

    @property
    def options(self) -> Namespace:
        """The options of the command that runs."""
        options: Namespace = self.config[str(self.subcommand)]
        return options

    def before_instantiate_classes(self) -> None:
        """Take the levers that change no result."""
        if self.options.keep_memory:
            keep_memory()
        if self.options.trainer.precision is None and bf16_is_fast():
            self.options.trainer.precision = "bf16-mixed"
        if self.checkpoint is not None:
            self.options.ckpt_path = str(self.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run's folder behind it, which is made once all else is known to be in order."""
        self.datamodule.prepare_data()
        for part in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[str(self.subcommand)]:
            self._check_episodes(part)
        settings = self._get(self.config_init, "trainer")
        if self.checkpoint is not None:
            self.run = self.checkpoint.parent
        elif settings["fast_dev_run"]:
            self.run = RUNS / self.options.name  # Lightning writes nothing then
        else:
            self.run = new_run(RUNS, self.options.name)
        callbacks: list[Any] = []
        if settings["enable_progress_bar"] is not False:
            callbacks.append(RunProgress())
        if self.subcommand == "fit" and not settings["fast_dev_run"]:
            callbacks.append(KeepConfig(self.run, self._config_text()))
            if settings["enable_checkpointing"] is not False:
                callbacks.append(KeepCheckpoints(self.run, timedelta(minutes=self.options.checkpoint_minutes)))
        kwargs |= {"callbacks": [*(settings["callbacks"] or []), *callbacks]}
        kwargs |= {"plugins": [*_as_list(settings["plugins"]), AtomicCheckpointIO()]}
        if settings["logger"] in (None, True):
            kwargs["logger"] = self._loggers() if self.subcommand == "fit" else False
        return super().instantiate_trainer(**kwargs)

    def _check_episodes(self, part: str) -> None:
        """Draw one episode of each kind, so that what cannot be drawn is said before anything starts."""
        data = self.datamodule
        kinds = [(shots, data.queries) for shots in data.train_shots] if part == "train" else [
            (shots, data.eval_queries) for shots in data.eval_shots
        ]  # fmt: skip
        for shots, queries in kinds:
            data.episodes(part, shots=shots, queries=queries)

    def _config_text(self) -> str:
        config = self.options.clone()
        config.pop("config", None)
        config.pop("ckpt_path", None)
        text: str = self._parser(self.subcommand).dump(config, skip_none=True, skip_check=True, format="yaml")
        return text

    def _loggers(self) -> list[Any]:
        loggers: list[Any] = [MetricsCsv(self.run)]
        if find_spec("tensorboard") is None:
            return loggers
        from lightning.pytorch.loggers import TensorBoardLogger

        return [*loggers, TensorBoardLogger(str(self.run), name=None, version="tensorboard")]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        quietly = {} if subcommand == "fit" else {"verbose": False}
        kwargs = super()._prepare_subcommand_kwargs(subcommand) | quietly
        if self.checkpoint is not None:
            kwargs["ckpt_path"] = str(self.checkpoint)
        return kwargs

    # -- the commands ------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Say what starts, and keep the network as it is before training, for comparison."""
        self.untrained = copy.deepcopy(self.model.learner)
        size = sum(p.numel() for p in self.model.learner.parameters())
        levers = f"precision {self.trainer.precision}" + (", memory kept" if self.options.keep_memory else "")
        print(
            f"{self.model.learner.name}, {size / 1e6:.2f} M parameters, on {self.datamodule.dataset} "
            f"({self.datamodule.split}), {self.datamodule.ways}-way; {levers}; run folder {self.run}",
            flush=True,
        )

    def after_fit(self) -> None:
        """Draw, and test on the built-in data or say how to test."""
        if self.options.trainer.fast_dev_run:
            return
        best = self.run / "best.ckpt"
        metrics = self.run / "metrics.csv"
        if metrics.exists():
            from .pictures import draw_learning_curve

            picture = self.run / "learning_curve.png"
            draw_learning_curve(metrics, picture, chance=100 / self.datamodule.ways, title=self.run.name)
            print(f"learning curve: {picture}")
        if not best.exists():
            return
        trained = read_checkpoint(best)
        self.model.load_state_dict(trained["state_dict"])
        accuracy = trained["callbacks"]["KeepCheckpoints"]["best"]
        print(f"best validation accuracy {accuracy:.2f} % at step {trained['global_step']}: {best}")
        built_in = isinstance(self.datamodule, Glyphs)
        self._draw_episodes("test" if built_in else "val")
        if built_in:
            self.trainer.test(self.model, self.datamodule, ckpt_path=str(best), verbose=False)
            self._finish_scoring(best, [*self._comparisons(), *self.model.results])
        else:
            print(f"test it:  snail test --ckpt_path {self.run}")

    def after_validate(self) -> None:
        """Print and keep the results."""
        self._finish_scoring(self.checkpoint, self.model.results)

    def after_test(self) -> None:
        """Print and keep the results."""
        self._finish_scoring(self.checkpoint, self.model.results)

    def _comparisons(self) -> list[Result]:
        """What nothing learned scores on the same episodes: pixels compared, and the network before training."""
        data = self.datamodule
        return [
            evaluate(
                learner,
                data.episodes("test", shots=shots),
                note=note,
            )
            for learner, note in (
                (NearestNeighbour(data.ways), "on pixels"),
                (self.untrained, "untrained"),
            )
            for shots in data.eval_shots
        ]

    def _draw_episodes(self, part: str) -> None:
        from .pictures import draw_episodes

        shots = min(self.datamodule.eval_shots)
        picture = self.run / "episodes.png"
        self.model.eval().cpu()
        draw_episodes(
            self.model.learner,
            self.datamodule.episodes(part, shots=shots),
            picture,
            title=f"{self.datamodule.ways}-way {shots}-shot, {part} classes: label given, label answered",
        )
        print(f"episodes with answers: {picture}")

    def _finish_scoring(self, checkpoint: Path | None, results: list[Result]) -> None:
        about_checkpoint: dict[str, Any] = {"run": self.run.name, "precision": str(self.trainer.precision)}
        if checkpoint is not None:
            about_checkpoint |= {"checkpoint": file_hash(checkpoint), **training_facts(read_checkpoint(checkpoint))}
        records = []
        for result in results:
            record = result.record()
            if "note" in record:
                record["learner"] = f"{record['learner']} {record.pop('note')}"
            else:
                record |= about_checkpoint
            records.append(record)
        path = self.run / "results.json"
        if self.trainer.is_global_zero and not self.options.trainer.fast_dev_run:
            merge_results(path, records)
        print(f"\n{results_table(records)}\n\nresults: {path}")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
