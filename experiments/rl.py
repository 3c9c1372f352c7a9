"""``snail rl``: agents that learn within a trial, trained with PPO and tested on bandits and tabular MDPs.

A run has a folder like any other: config, metrics, checkpoint, curve, results. A record of its ``results.json`` is the
mean return over new trials, with what is needed to get it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from snail.evaluation import machine
from snail.files import file_hash
from snail.records import markdown_rows, merge_records, read_records, text_table
from snail.rl import PPO
from snail.rl.scoring import greedy_player, score

from .cli import SHIPPED, config_head, run_trainer, shipped_configs
from .levers import keep_memory
from .runs import RUNS, KeepCheckpoints, read_checkpoint, training_facts
from .terminal import RunProgress
from .trainer_cli import RunCLI

__all__ = [
    "RLCLI",
    "against",
    "figure_text",
    "main",
    "merge_returns",
    "published_text",
    "read_returns",
    "returns_table",
    "scores",
    "setting_text",
    "share_text",
]

COMMANDS = ("fit", "test", "classical", "configs", "results")
CONFIGS = "configs/rl"  # in the package
BUILT_IN = "bandit_10_5"

HELP = """usage: snail rl <command> [options]

Agents that learn within a trial, SNAIL and RL², trained with PPO.

commands:
  fit        train                                      (snail rl fit --config bandit_10_5)
  test       play new trials with a trained agent       (snail rl test --ckpt_path RUN)
  classical  play the strategies of the textbooks on the trials of a test, beside published figures and trained agents
  configs    list the configs that ship with the package, with what the paper reports
  results    print results.json of one or more runs     (snail rl results [--markdown] [RUN ...])

--model.agent snail.rl.RL2Agent trains RL² in the place of SNAIL; --ckpt_path last goes on from a run's last
checkpoint. `snail rl <command> --help` explains the options."""

# Mishra et al., 2018, tables 3 (mean return of a trial) and 4 (percent of what value iteration reaches).
PUBLISHED: dict[str, dict[tuple[int, ...], dict[str, str]]] = {
    "bandits": {  # by steps and arms
        (10, 5): {"SNAILAgent": "6.6 ± 0.1", "RL2Agent": "6.7"},
        (10, 10): {"SNAILAgent": "6.7 ± 0.1", "RL2Agent": "6.7"},
        (10, 50): {"SNAILAgent": "6.7 ± 0.1", "RL2Agent": "6.8"},
        (100, 5): {"SNAILAgent": "79.1 ± 1.0", "RL2Agent": "78.7"},
        (100, 10): {"SNAILAgent": "83.5 ± 0.8", "RL2Agent": "83.5"},
        (100, 50): {"SNAILAgent": "85.1 ± 0.6", "RL2Agent": "84.9"},
        (500, 5): {"SNAILAgent": "408.1 ± 4.9", "RL2Agent": "401.5"},
        (500, 10): {"SNAILAgent": "432.4 ± 3.5", "RL2Agent": "432.5"},
        (500, 50): {"SNAILAgent": "442.6 ± 2.5", "RL2Agent": "438.9"},
        (1000, 50): {"SNAILAgent": "889.8 ± 5.6", "RL2Agent": "847.43"},
    },
    "tabular-mdps": {  # by episodes
        (10,): {"SNAILAgent": "76.6 ± 0.1 %", "RL2Agent": "75.2 %"},
        (25,): {"SNAILAgent": "86.2 ± 0.1 %", "RL2Agent": "85.9 %"},
        (50,): {"SNAILAgent": "90.8 ± 0.3 %", "RL2Agent": "90.2 %"},
        (75,): {"SNAILAgent": "93.0 ± 0.2 %", "RL2Agent": "91.8 %"},
        (100,): {"SNAILAgent": "94.1 ± 0.3 %", "RL2Agent": "92.2 %"},
    },
}
SETTINGS = {"bandits": ("steps", "arms"), "tabular-mdps": ("episodes",)}
USUAL = {"horizon": 10, "states": 10, "actions": 5}  # of the published tabular MDPs


# -- the command ---------------------------------------------------------------------------------------------------


class RLProgress(RunProgress):
    """A bar over the iterations; where no terminal listens, a line for each twentieth of them."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """See ``RunProgress.on_train_batch_end``."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        total, step = int(trainer.estimated_stepping_batches), trainer.global_step
        if not self._live and not self._silent and (step % max(1, total // 20) == 0 or step == total):
            print(f"iteration {step}/{total}  {self._figures(trainer)}", flush=True)

    @staticmethod
    def _figures(trainer: Trainer) -> str:
        logged = trainer.callback_metrics
        return "  ".join(f"{name} {float(logged[f'train/{name}']):.3f}" for name in ("return", "entropy"))


class KeepIterations(KeepCheckpoints):
    """``KeepCheckpoints`` that also saves where the process is told to end, between two iterations."""

    @property
    def state_key(self) -> str:
        """That of ``KeepCheckpoints``, where what a training took is read."""
        return KeepCheckpoints.__qualname__

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if this is the polite end; Lightning raises it between iterations only."""
        if isinstance(exception, SIGTERMException):
            self._save(trainer, "last.ckpt")


class RLCLI(RunCLI):
    """LightningCLI over ``PPO``.

    Args:
        args: The command line, without the program's name; the command comes first.
        name: What to call the run if ``--name`` does not.
        checkpoint: The checkpoint that ``--ckpt_path`` was found to mean.
        linked: Not used; of checkpoints of other trainings.
        started_from: What that checkpoint tells of the run whose weights its training began with.
        trust: Packages besides snail, torch and torchvision whose classes another run's config may name.
    """

    progress = RLProgress
    keep = KeepIterations

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
        defaults = {"max_epochs": 1, "devices": 1, "log_every_n_steps": 1}
        super().__init__(
            PPO,
            args=list(args),
            prog="snail rl",
            name=name,
            checkpoint=checkpoint,
            started_from=started_from,
            trainer_defaults=defaults,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, and which of their arguments are not options."""
        same = {"model", "datamodule", "weights_only", "verbose"}
        return {"fit": same | {"train_dataloaders", "val_dataloaders"}, "test": same | {"dataloaders"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside those of trainer and model."""
        add = parser.add_argument
        add("--name", type=str, default=self.default_name, help="Name of the run; its folder is runs/<name>.")
        add("--checkpoint_minutes", type=float, default=1.0, help="Minutes between checkpoints; 0: every iteration.")
        add("--keep_memory", type=bool, default=True, help="Let the C library keep freed memory (glibc; faster).")
        parser.set_defaults({"model.agent": {"class_path": "snail.rl.SNAILAgent"}})

    def before_instantiate_classes(self) -> None:
        """Take the lever that makes a run faster."""
        if self.options.ckpt_path is not None:
            raise ValueError(
                f"ckpt_path {str(self.options.ckpt_path)!r} stands in a config; give --ckpt_path as an option"
            )
        if self.options.keep_memory:
            keep_memory()

    def _check_results(self, path: Path) -> None:
        """Refuse a file of results that cannot be added to."""
        read_returns([path])

    def before_fit(self) -> None:
        """Say what starts."""
        agent, environment = self.model.agent, self.model.environment
        sizes = [sum(p.numel() for p in part.parameters()) for part in (agent.policy, agent.value)]
        self._say(
            f"{type(agent).__name__}, {sizes[0]:,} parameters and {sizes[1]:,} of its value function, on "
            f"{setting_text(environment.facts)}, {environment.trials:,} trials an iteration; run folder {self.run}"
        )

    def _draw_learning_curve(self, metrics: Path, picture: Path) -> None:
        from .pictures import draw_returns

        facts = self.model.environment.facts
        published = published_text(facts, type(self.model.agent).__name__)
        level = None if published is None or published.endswith("%") else float(published.split(" ± ")[0])
        draw_returns(metrics, picture, published=level, title=f"{self.run.name}: {setting_text(facts)}")

    def after_fit(self) -> None:
        """Say how to test."""
        if not self.options.trainer.fast_dev_run:
            self._say(f"test it:  snail rl test --ckpt_path {self.run}")

    def after_test(self) -> None:
        """Print and keep the result."""
        assert self.checkpoint is not None  # or there was no test
        content = read_checkpoint(self.checkpoint)
        agent, environment, training = self.model.agent, self.model.environment, training_facts(content)
        if "steps" in training:
            training["trials"] = training["steps"] * self._trained_trials(content)
            training["environment_steps"] = training["trials"] * environment.steps
        record = {
            **environment.facts,
            "agent": type(agent).__name__,
            **scores(self.model.returns, self.model.optimal),
            **self._against_greedy(),
            "parameters": sum(p.numel() for p in agent.parameters()),
            **machine(self.trainer.strategy.root_device),
            "run": self.run.name,
            "checkpoint": file_hash(self.checkpoint),
            "training": training,
            "config": yaml.safe_load(self._config_text())["model"],
        }
        self._say(f"\n{returns_table([record])}\n")
        merge_returns(self.run / "results.json", [record])
        self._say(f"results: {self.run / 'results.json'}")

    def _against_greedy(self) -> dict[str, Any]:
        model, greedy = self.model, greedy_player(self.model.environment)
        if greedy is None:
            return {}
        others, _ = score(model.environment, greedy, trials=len(model.returns), seed=model.test_seed)
        return against(model.returns, others)

    def _trained_trials(self, content: Mapping[str, Any]) -> int:
        state = content.get("environment", {})
        return int(state.get("trials", self.model.environment.trials))


def main(argv: Sequence[str]) -> int:
    """Run ``snail rl``.

    Args:
        argv: The command line behind ``rl``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If there is no such command, or an option is wrong.
        FileNotFoundError: If there is no such config, checkpoint or result.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    command, rest = argv[0], list(argv[1:])
    if command not in COMMANDS:
        raise ValueError(f"there is no command {command!r} of snail rl; choose one of {', '.join(COMMANDS)}")
    if command == "configs":
        print(list_configs())
    elif command == "classical":
        from . import rl_classical

        return rl_classical.main(rest)
    elif command == "results":
        print(list_results(rest))
    else:
        named = {arg.split("=", 1)[0] for arg in rest}
        if command == "test" and not named & {"--ckpt_path", "--help", "-h"}:
            run = RUNS / BUILT_IN
            raise ValueError(f"`snail rl test` needs --ckpt_path RUN: a run's folder, such as {run}, or a checkpoint")
        starts = {"--model.environment"}
        run_trainer(RLCLI, command, rest, configs=CONFIGS, built_in=BUILT_IN, starts=starts)
    return 0


def list_configs() -> str:
    """The shipped configs, each with the comment at its head and the results that it gave."""
    lines = []
    for path in shipped_configs(CONFIGS):
        lines += [path.stem, *(f"    {line}" for line in config_head(path)), f"    snail rl fit --config {path.stem}"]
        for record in read_returns([SHIPPED / "results" / "rl" / path.stem / "results.json"]):
            lines.append(f"    gave {figure_text(record)}  {record['agent']}, {record['trials']:,} trials")
    return "\n".join(lines)


def list_results(argv: Sequence[str]) -> str:
    """The results of runs (by default of all that ship with the package) as a table; see ``returns_table``."""
    if unknown := [arg for arg in argv if arg.startswith("-") and arg != "--markdown"]:
        raise ValueError(f"there is no option {unknown[0]}; it is snail rl results [--markdown] [RUN ...]")
    paths = [Path(arg) for arg in argv if not arg.startswith("-")]
    paths = paths or sorted(SHIPPED.glob("results/rl/*/results.json"))
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    return returns_table(read_returns(files, must_exist=True), markdown="--markdown" in argv)


# -- results -------------------------------------------------------------------------------------------------------

NEEDED = ("environment", "seed", "agent", "trials", "return", "ci95", "checkpoint")
IDENTITY = (
    *("environment", *(key for keys in SETTINGS.values() for key in keys), *USUAL),
    *("seed", "agent", "trials", "checkpoint"),
)
"""What makes two records the same measurement."""


def read_returns(paths: Iterable[Path], *, must_exist: bool = False) -> list[dict[str, Any]]:
    """The records of some ``results.json`` files of ``snail rl``, in order.

    Raises:
        ValueError: If a file is not a list of such records.
        FileNotFoundError: If ``must_exist`` and one is missing.
    """
    return read_records(paths, _fault, written_by="snail rl test", must_exist=must_exist)


def _fault(record: Mapping[str, Any]) -> str | None:
    missing = [key for key in NEEDED if key not in record]
    return f"without {missing[0]!r}" if missing else None


def merge_returns(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write ``records`` into the list at ``path``, each in the place of an earlier one of the same measurement.

    Raises:
        ValueError: If the file is there but is not a list of records.
    """
    merge_records(path, read_returns([path]), records, IDENTITY)


def returns_table(records: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Records as a table, a line each, with the published figure where there is one."""
    heads = ["agent", "environment", "mean return (95 % interval)", "of the optimum", "paper", "trials", "trained"]
    rows = [
        [
            str(record["agent"]),
            setting_text(record),
            figure_text(record),
            share_text(record),
            published_text(record, str(record["agent"])) or "",
            f"{record['trials']:,}",
            _trained(record.get("training", {})),
        ]
        for record in records
    ]
    if not rows:
        return "no results"
    return "\n".join(markdown_rows([heads, *rows])) if markdown else text_table([heads, *rows])


def scores(returns: Tensor, optimal: Tensor | None) -> dict[str, Any]:
    """Mean return with its 95 % interval, and its share of what one who knows the tasks expects, in percent.

    Args:
        returns: ``(e,)``.
        optimal: Likewise; ``None`` where it is not known.
    """
    told: dict[str, Any] = {"trials": len(returns), "return": float(returns.mean()), "ci95": _interval(returns)}
    if optimal is not None:
        share, scale = float(returns.mean() / optimal.mean()), float(optimal.mean())
        around = _interval(100 * (returns - share * optimal) / scale)  # of a ratio of means
        told |= {"optimal": scale, "share": 100 * share, "share_ci95": around}
    return told


def against(returns: Tensor, greedy: Tensor) -> dict[str, Any]:
    """How much more is earned than by greedy play of the same trials, with the 95 % interval of paired differences.

    Args:
        returns: ``(e,)``.
        greedy: Likewise.
    """
    more = returns - greedy
    return {"against_greedy": float(more.mean()), "against_greedy_ci95": _interval(more)}


def _interval(each: Tensor) -> float | None:
    return 1.96 * float(each.std(correction=1)) / math.sqrt(len(each)) if len(each) > 1 else None


def published_text(facts: Mapping[str, Any], agent: str) -> str | None:
    """What the paper reports of an agent in a setting, if it does."""
    kind = str(facts["environment"])
    if kind not in PUBLISHED or any(facts.get(key, usual) != usual for key, usual in USUAL.items()):
        return None
    setting = tuple(facts[key] for key in SETTINGS[kind])
    return PUBLISHED[kind].get(setting, {}).get(agent)


def setting_text(facts: Mapping[str, Any]) -> str:
    """What was played, in words."""
    kind = str(facts["environment"])
    if kind == "bandits":
        return f"bandits, {facts['steps']:,} pulls of {facts['arms']} arms"
    if kind == "tabular-mdps":
        return f"tabular MDPs, {facts['episodes']} episodes of {facts['horizon']} steps"
    return kind


def figure_text(record: Mapping[str, Any]) -> str:
    """The mean return with its interval."""
    interval = "" if record["ci95"] is None else f" ± {record['ci95']:.2f}"
    return f"{record['return']:.2f}{interval}"


def share_text(record: Mapping[str, Any]) -> str:
    """The share of the optimum with its interval; nothing where it is not known."""
    if record.get("share") is None:
        return ""
    interval = "" if record.get("share_ci95") is None else f" ± {record['share_ci95']:.1f}"
    return f"{record['share']:.1f}{interval} %"


def _trained(training: Mapping[str, Any]) -> str:
    if not {"steps", "seconds", "hardware", "trials"} <= set(training):
        return ""
    minutes = f"{training['seconds'] / 60:.0f} min on {training['hardware']}"
    return f"{training['steps']:,} iterations, {training['trials']:,} trials, {minutes}"
