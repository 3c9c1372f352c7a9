"""Training, validation and test as a LightningCLI: every trainer flag works, every class of the config is an option.

What is added: run folders, checkpoints that bring their own config, and what is drawn and printed at the end.
"""

from __future__ import annotations

import copy
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from snail import NearestNeighbour, evaluate
from snail.datasets import EpisodeData, Glyphs
from snail.evaluation import Result, as_parameters
from snail.files import file_hash
from snail.inner_loop import GradientLearner
from snail.module import FewShot
from snail.results import merge_results, read_results, results_table

from .levers import bf16_is_fast, keep_memory
from .loading import load_teacher, start_from
from .runs import (
    RUNS,
    AtomicCheckpointIO,
    KeepCheckpoints,
    KeepConfig,
    best_score,
    new_run,
    read_checkpoint,
    training_facts,
)
from .terminal import MetricsCsv, RunProgress

__all__ = ["RunCLI", "SnailCLI"]

COMPARED = ("on pixels", "untrained")  # how results name what nothing was learned for


class RunCLI(LightningCLI, ABC):
    """LightningCLI whose runs have folders: what is the same whatever is trained.

    Attributes:
        default_name: What to call the run if ``--name`` does not.
        checkpoint: The checkpoint that ``--ckpt_path`` was found to mean.
        started_from: What is known of the run whose weights training began with.
        teacher: What is known of the run whose embedding is learned from.
        run: The run's folder, once there is a trainer.
    """

    default_name: str
    checkpoint: Path | None
    started_from: dict[str, Any]
    teacher: dict[str, Any]
    run: Path
    progress: type[RunProgress] = RunProgress
    keep: type[KeepCheckpoints] = KeepCheckpoints

    def __init__(
        self,
        model: type[LightningModule],
        data: type[LightningDataModule] | None = None,
        *,
        args: list[str],
        prog: str,
        name: str,
        checkpoint: Path | None,
        started_from: Mapping[str, Any] | None,
        trainer_defaults: dict[str, Any],
    ) -> None:
        self.default_name = name
        self.checkpoint = checkpoint
        self.started_from = dict(started_from or {})
        self.teacher = {}
        parser = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            model,
            data,
            subclass_mode_data=data is not None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, **trainer_defaults},
            parser_kwargs={"prog": prog, **parser, **{command: parser for command in self.subcommands()}},
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a copy of the parent's method without its warning about calls from Python."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's config came first on the command line."""

    @property
    def options(self) -> Namespace:
        """The options of the command that runs."""
        options: Namespace = self.config[str(self.subcommand)]
        return options

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run's folder behind it, which is made here."""
        settings = self._get(self.config_init, "trainer")
        self.run = self._run_folder(bool(settings["fast_dev_run"]))
        callbacks: list[Any] = []
        keeps, training = not settings["fast_dev_run"], self.subcommand == "fit"
        if settings["enable_progress_bar"] is not False:
            callbacks.append(self.progress())
        if keeps and (training or self.checkpoint is None):
            told = self._config_text(), self._linked_arguments(), self.started_from, self.teacher
            callbacks.append(KeepConfig(self.run, *told))
        if keeps and training and settings["enable_checkpointing"] is not False:
            callbacks.append(self.keep(self.run, timedelta(minutes=self.options.checkpoint_minutes)))
        kwargs |= {"callbacks": [*_as_list(settings["callbacks"]), *callbacks]}
        kwargs |= {"plugins": [*_as_list(settings["plugins"]), AtomicCheckpointIO()]}
        if settings["logger"] in (None, True):
            kwargs["logger"] = self._loggers() if self.subcommand == "fit" else False
        return super().instantiate_trainer(**kwargs)

    def _run_folder(self, fast_dev_run: bool) -> Path:
        """A new run's folder; that of the checkpoint to score, or to go on from where that is its run's last."""
        if self.checkpoint is not None and (self.subcommand != "fit" or self.checkpoint.name == "last.ckpt"):
            run: Path = self.checkpoint.parent
            if self.subcommand != "fit":
                # That it can be read and written is known before hours of work.
                self._check_results(run / "results.json")
                if not os.access(run, os.W_OK):
                    raise PermissionError(
                        f"{run} cannot be written, but the results go there; copy the checkpoint elsewhere"
                    )
            return run
        if fast_dev_run:
            return RUNS / str(self.options.name)  # Lightning writes nothing then
        another = cast(Any, rank_zero_only).rank > 0 or int(os.environ.get("NODE_RANK", 0)) > 0
        if another:  # the first process makes the folder; it alone writes, and tells the others later
            return RUNS / str(self.options.name)
        return new_run(RUNS, str(self.options.name))

    def _check_results(self, path: Path) -> None:
        """Refuse a file of results that cannot be added to."""
        read_results([path])

    def _linked_arguments(self) -> dict[str, int]:
        """The model's arguments that came from the data."""
        return {}

    def _config_text(self) -> str:
        config = self.options.clone()
        config.pop("config", None)
        config.pop("ckpt_path", None)
        text: str = self._parser(self.subcommand).dump(config, skip_none=False, skip_check=True, format="yaml")
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

    def fit(self, **kwargs: Any) -> None:
        """Train and draw the learning curve, that of a training that was stopped too."""
        try:
            self.trainer.fit(**kwargs)
        finally:
            metrics, picture = self.run / "metrics.csv", self.run / "learning_curve.png"
            if self.trainer.is_global_zero and metrics.exists() and not self.options.trainer.fast_dev_run:
                self._draw_learning_curve(metrics, picture)
                self._say(f"learning curve: {picture}")

    @abstractmethod
    def _draw_learning_curve(self, metrics: Path, picture: Path) -> None:
        """Draw what was logged."""

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text, flush=True)


FIRST = ("--data=snail.datasets.Glyphs", "--model.learner.init_args.embedding=snail.Conv4")
"""Said first, not set as defaults: a default leaves its arguments to whatever class is named later."""


class SnailCLI(RunCLI):
    """LightningCLI over ``FewShot`` and ``EpisodeData``.

    Args:
        args: The command line, without the program's name; the command comes first.
        name: What to call the run if ``--name`` does not.
        checkpoint: The checkpoint that ``--ckpt_path`` was found to mean.
        linked: The model's ways and shots in that checkpoint; they stay as they are whatever the data's options say.
        started_from: What that checkpoint tells of the run whose weights its training began with.
        trust: Packages besides snail, torch and torchvision whose classes another run's config may name.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        name: str,
        checkpoint: Path | None = None,
        linked: Mapping[str, int] | None = None,
        started_from: Mapping[str, Any] | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        self.linked = linked or {}
        self.trust = trust
        super().__init__(
            FewShot,
            EpisodeData,
            args=[args[0], *FIRST, *args[1:]],
            prog="snail",
            name=name,
            checkpoint=checkpoint,
            started_from=started_from,
            trainer_defaults={"max_epochs": 20, "log_every_n_steps": 25},
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
            (
                "--start_from",
                str | None,
                None,
                "A run, or a checkpoint, whose parts a new run begins with where they are built alike.",
            ),
            (
                "--teacher",
                str | None,
                None,
                "A run, or a checkpoint, whose embedding the learner's is trained to be, in the place of its own loss.",
            ),
            ("--checkpoint_minutes", float, 1.0, "Minutes between checkpoints within an epoch; 0: after every step."),
            ("--keep_memory", bool, True, "Let the C library keep freed memory (glibc; faster on the CPU)."),
            ("--channels_last", bool, True, "Lay out images and their convolutions channels last (faster)."),
        ):
            parser.add_argument(option, type=kind, default=default, help=description)
        parser.set_defaults(
            {
                "model.learner": {
                    "class_path": "snail.SNAIL",
                    "init_args": {"embedding_dim": 64},
                },
            }
        )
        parser.link_arguments("data.init_args.ways", "model.learner.init_args.ways")
        parser.link_arguments(
            ("data.init_args.train_shots", "data.init_args.eval_shots"),
            "model.learner.init_args.max_shots",
            compute_fn=lambda train, evaluated: max(*train, *evaluated),
        )

    # -- making things -----------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Take the levers that make a run faster."""
        self.memory_kept = self.options.keep_memory and keep_memory()
        learner = cast(Any, locate(self.options.model.learner.class_path))
        trainer, keeps_accuracy = self.options.trainer, getattr(learner, "half_precision", True)
        self.bf16_is_missing = trainer.precision is None and not bf16_is_fast(str(trainer.accelerator))
        if trainer.precision is None and keeps_accuracy and not self.bf16_is_missing:
            trainer.precision = "bf16-mixed"
        if self.options.ckpt_path is not None:
            raise ValueError(
                f"ckpt_path {str(self.options.ckpt_path)!r} stands in a config; give --ckpt_path as an option"
            )
        self._check_learner(learner)
        learner, data = self.options.model.learner.init_args, self.options.data.init_args
        for key, trained in self.linked.items():
            asked = data.get("ways") if key == "ways" else max(data.eval_shots)
            if asked is None or asked > trained or (key == "ways" and asked != trained):
                raise ValueError(
                    f"the model of {self.checkpoint} was built for {key} = {trained}, but {asked} are asked for"
                )
            learner[key] = trained

    def _check_learner(self, learner: Any) -> None:
        """Refuse to train what learns nothing, to score what was not trained, and a classifier where are no classes."""
        needs_training, data = getattr(learner, "needs_training", True), self.options.data
        if self.subcommand == "fit" and not needs_training:
            raise ValueError(f"{learner.__name__} learns nothing between episodes; score it with `snail test` instead")
        if self.subcommand != "fit" and needs_training and self.checkpoint is None:
            raise ValueError(
                f"`snail {self.subcommand}` needs --ckpt_path RUN: a run's folder, such as "
                f"{RUNS / self.default_name}, or a checkpoint"
            )
        ways = inspect.signature(learner).parameters.get("ways")
        if "ways" not in data.init_args and ways is not None and ways.default is ways.empty:
            raise ValueError(
                f"{learner.__name__} answers with classes, of which {data.class_path} has none; use a learner that "
                f"answers with numbers too, such as snail.MAML"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """See ``RunCLI.instantiate_trainer``; all else is known to be in order then."""
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        for parameter in self.model.parameters():
            if parameter.ndim == 4:  # of a convolution of images; those of volumes have no such layout
                parameter.data = parameter.data.contiguous(memory_format=layout)
        self.datamodule.prepare_data()
        learner, data = self.model.learner, self.datamodule
        if self.subcommand == "fit" and self.checkpoint is None and self.options.start_from is not None:
            self.started_from = start_from(learner, data, self.options.start_from, trust=self.trust)
        if self.subcommand == "fit" and self.options.teacher is not None:
            teacher, self.teacher = load_teacher(self.datamodule, self.options.teacher, trust=self.trust)
            self.model.learn_from(teacher)
        self._check_episodes()
        if self.subcommand == "fit" and self.checkpoint is None:
            parts = {name.split(".")[0] for name in learner.state_dict()} - {"_extra_state"}
            if not parts <= set(self.started_from.get("parts", ())):  # one that starts whole keeps what it has learned
                self._begin()
        return super().instantiate_trainer(**kwargs)

    def _begin(self) -> None:
        """Show the learner an episode, the same one in every process."""
        data, learner = self.datamodule, self.model.learner
        options = {"ways": data.train_ways, "shots": max(data.train_shots), "queries": data.queries, "seed": data.seed}
        episode, images = data.sampler("train", **options).draw(0, 1), data.images("train")
        items = torch.cat([episode.support_x, episode.query_x], dim=1)[0]
        learner.begin(as_parameters(items if images is None else images.take(items), learner))

    def _check_episodes(self) -> None:
        """Make a sampler of each kind and answer one episode: what cannot work is said before anything is written."""
        data = self.datamodule
        parts = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[str(self.subcommand)]
        if not data.eval_episodes["val"] and "val" in parts:
            if self.subcommand == "validate":
                raise ValueError("there is nothing to validate on: val_episodes is 0, or training took the classes")
            parts.remove("val")
        if self.subcommand == "fit" and isinstance(data, Glyphs):
            parts.append("test")
        built_for = self.model.learner.ways
        if "train" in parts and built_for not in (None, data.train_ways):
            raise ValueError(
                f"train_ways is {data.train_ways}, but {type(self.model.learner).__name__} answers {built_for} ways; "
                f"leave train_ways out, or use a learner of any number of ways, such as snail.ProtoNet"
            )
        for part in parts:
            training = part == "train"
            for shots in data.train_shots if training else data.eval_shots:
                ways, queries = (data.train_ways, data.queries) if training else (data.ways, data.eval_queries)
                episodes = data.episodes(part, shots=shots, ways=ways, queries=queries)
        try:
            evaluate(self.model.learner, [episodes[0]])
        except RuntimeError as error:  # from within a network, which knows nothing of episodes
            raise ValueError(
                f"{type(self.model.learner).__name__} cannot answer an episode of {data.dataset}, with items of shape "
                f"{tuple(episodes[0].query_x.shape[2:])}: {error}"
            ) from error

    def _linked_arguments(self) -> dict[str, int]:
        arguments = self.options.model.learner.init_args
        return {key: arguments[key] for key in ("ways", "max_shots") if arguments.get(key) is not None}

    # -- the commands ------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Say what starts, and keep the network as it is before training, for comparison."""
        self.untrained = copy.deepcopy(self.model.learner)
        size = sum(p.numel() for p in self.model.learner.parameters())
        ways = f", {self.datamodule.ways}-way" if self.datamodule.ways else ""
        if self.started_from:
            ways += f", begun with {' and '.join(self.started_from['parts'])} of {self.started_from['run']}"
        if self.teacher:
            ways += f", taught by {self.teacher['run']}"
        self._say(
            f"{type(self.model.learner).__name__}, {size / 1e6:.2f} M parameters, on {self.datamodule.dataset} "
            f"({self.datamodule.split}){ways}; {', '.join(self._levers())}; run folder {self.run}"
        )

    def _levers(self) -> list[str]:
        """What was chosen to make the run faster."""
        levers = [f"precision {self.trainer.precision}" + " (no fast bf16 here)" * self.bf16_is_missing]
        if self.options.channels_last:
            levers.append("channels last")
        if self.options.keep_memory:
            levers.append("memory kept" if self.memory_kept else "memory not kept (no glibc)")
        if isinstance(self.model.learner, GradientLearner):
            levers.append(self._tasks_at_once(self.model.learner))
        if self.trainer.world_size > 1:
            levers.append(f"{self.trainer.world_size} processes")
        return levers

    def _tasks_at_once(self, learner: GradientLearner) -> str:
        (episode,) = self.datamodule.episodes("train", shots=max(self.datamodule.train_shots), count=1)
        support_x, tasks = episode.support_x.to(self.trainer.strategy.root_device), self.datamodule.batch_size
        support_x = support_x.expand(tasks, *support_x.shape[1:])
        threads = learner.groups_side_by_side(support_x)
        together = f"{min(learner.tasks_together(support_x), tasks)} tasks at once"
        return together if threads == 1 else f"{together} on each of {threads} threads"

    def after_fit(self) -> None:
        """Draw episodes, and test on the built-in data or say how to test."""
        if self.options.trainer.fast_dev_run:
            return
        self.run = Path(self.trainer.strategy.broadcast(str(self.run)))
        best, last = self.run / "best.ckpt", self.run / "last.ckpt"
        kept = best if best.exists() else last
        if not kept.exists():
            self._say("no checkpoint was kept, so there is nothing to score")
            return
        trained = read_checkpoint(kept)
        self.model.load_state_dict(trained["state_dict"])
        if kept == best:
            metric, score = best_score(trained)
            self._say(f"best validation {metric.title} {metric.text(score)} at step {trained['global_step']}: {best}")
        else:
            self._say(f"there was no validation; the last weights, of step {trained['global_step']}: {last}")
        built_in = isinstance(self.datamodule, Glyphs)
        if self.trainer.is_global_zero:
            draw = self._draw_episodes if self.datamodule.ways else self._draw_curves
            draw("test" if built_in else "val" if self.datamodule.eval_episodes["val"] else "train")
        if built_in:
            self.trainer.test(self.model, self.datamodule, ckpt_path=str(kept), verbose=False)
            self._finish_scoring(kept, [*self._comparisons(), *self.model.results])
            self._draw_mistakes()
        else:
            self._say(f"test it:  snail test --ckpt_path {self.run}")

    def _draw_learning_curve(self, metrics: Path, picture: Path) -> None:
        from .pictures import draw_learning_curve

        chance = 100 / self.datamodule.ways if self.datamodule.ways else None
        draw_learning_curve(metrics, picture, chance=chance, title=self.run.name)

    def after_validate(self) -> None:
        """Print and keep the results."""
        self._finish_scoring(self.checkpoint, self.model.results)

    def after_test(self) -> None:
        """Print and keep the results, and draw what was mistaken."""
        self._finish_scoring(self.checkpoint, self.model.results)
        self._draw_mistakes()

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
                (NearestNeighbour(data.ways), COMPARED[0]),
                (self.untrained, COMPARED[1]),
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
            ink=self.datamodule.ink,
        )
        self._say(f"episodes with answers: {picture}")

    def _draw_mistakes(self) -> None:
        """Draw which test images were mistaken most often in the last setting, where that is known."""
        for result in self.model.results[-1:]:  # there is none where the trainer was told to test nothing
            if not result.half_of_mistakes or not self.trainer.is_global_zero or self.options.trainer.fast_dev_run:
                return
            from .pictures import draw_mistakes

            data, picture = self.datamodule, self.run / "mistakes.png"
            draw_mistakes(result, data.images("test"), picture, title=self.run.name, ink=data.ink)
            self._say(f"what was mistaken most often: {picture}")

    def _draw_curves(self, part: str) -> None:
        from .pictures import draw_curves

        shots, tasks = min(self.datamodule.eval_shots), 4
        learner, picture = self.model.eval().cpu().learner, self.run / "curves.png"
        (episodes,) = self.datamodule.episodes(part, shots=shots, queries=200, count=tasks)
        given = (as_parameters(x, learner) for x in (episodes.support_x, episodes.support_y, episodes.query_x))
        with torch.no_grad():
            answers = learner.answers(*given)
        draw_curves(
            episodes,
            answers,
            [_variant_label(variant) for variant in learner.variants],
            picture,
            title=f"{self.run.name}: {shots} points shown, {part} tasks",
        )
        self._say(f"curves with answers: {picture}")

    def _finish_scoring(self, checkpoint: Path | None, results: list[Result]) -> None:
        about_checkpoint: dict[str, Any] = {"run": self.run.name, "precision": str(self.trainer.precision)}
        about_checkpoint["processes"] = self.trainer.world_size
        if checkpoint is not None:
            training = training_facts(read_checkpoint(checkpoint))
            training |= self.datamodule.training_notes
            about_checkpoint |= {"checkpoint": file_hash(checkpoint), "training": training}
        records = []
        for result in results:
            record = result.record()
            records.append(record if result.facts.get("note") in COMPARED else record | about_checkpoint)
        self._say(f"\n{results_table(records)}\n")
        if self.trainer.is_global_zero and not self.options.trainer.fast_dev_run:
            merge_results(self.run / "results.json", records)
            self._say(f"results: {self.run / 'results.json'}")


def _variant_label(variant: Mapping[str, Any]) -> str:
    steps = variant.get("inner_steps")
    if steps is None:
        return "answer"
    return "before adaptation" if steps == 0 else f"after {steps} inner step{'s' * (steps > 1)}"


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
