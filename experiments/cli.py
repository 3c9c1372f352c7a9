"""The ``snail`` command: what was asked for, configs by bare name, checkpoints by run, errors in one sentence."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from importlib import import_module, resources
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml

from snail.results import outcomes, read_results, record_text, results_markdown, results_table

from .options import check_picture, take
from .published import with_published

__all__ = ["config_path", "main", "run_trainer", "shipped_configs"]

SHIPPED = Path(str(resources.files("snail.experiments")))  # configs and the results that they gave
TRAINER_COMMANDS = ("fit", "validate", "test")
OWN_COMMANDS = {  # and where their main is
    "predict": ".predict",
    "export": ".loading",
    "data": ".data_command",
    "bench": ".bench.command",
}
BUILT_IN = "glyphs_5way"  # what `snail fit` without a config is called

HELP = """usage: snail <command> [options]

Few-shot learning with SNAIL, MAML and its family, and metric baselines.

commands:
  fit        train; with no option at all: SNAIL on the built-in data, tested at the end
  validate   score a run on validation classes    (--ckpt_path RUN, or the --config of what needs no training)
  test       score a run on test classes          (likewise)
  predict    sort a folder of pictures into classes of which a few pictures each are given, with a trained run
  export     write a run's weights and config without what only training needs, to be kept or handed on
  data       make a data set ready and check it: miniImageNet in all its forms, Omniglot, your own folder
  configs    list the configs that ship with the package, with the figure each should give
  results    print results.json of one or more runs as a table  (snail results RUN ...)
  rl         train and test agents that learn within a trial: bandits and tabular MDPs  (snail rl --help)
  bench      time what this package does against the plain way, on this machine  (snail bench NAME)

`snail <command> --help` explains the options. --debug anywhere shows the traceback of an error. --trust PACKAGE lets
the config that comes with a checkpoint name classes of a package besides snail, torch and torchvision."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the ``snail`` command.

    Args:
        args: The command line without the program's name; by default the process's own.

    Returns:
        The exit status: 0 if all went well.
    """
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        return _run(argv, debug)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns an interrupt into an exit.
        terminated = type(stop).__name__ == "SIGTERMException"
        if not terminated and KeyboardInterrupt not in (type(stop), type(stop.__context__)):
            raise
        how = (
            "; the same command with --ckpt_path last goes on from the last checkpoint, if one was due"
            if argv[:1] == ["fit"] or argv[:2] == ["rl", "fit"]
            else ""
        )
        print(f"interrupted{how}", file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough of it
        sys.stdout = None  # so that nothing is flushed into the pipe at the end
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"snail: error: {_one_sentence(error)}", file=sys.stderr)
        return 1


def _quiet() -> None:
    """Silence what libraries say about themselves, once they are imported: advertisements, deprecations, devices."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of several processes, the first says which of the others ended and that it ends too.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)


def _run(argv: list[str], debug: bool) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    command, rest = argv[0], argv[1:]
    if command == "configs":
        print(list_configs())
        return 0
    if command == "results":
        print(list_results(rest))
        return 0
    if command == "rl":
        from .rl import main as rl

        if not debug:
            _quiet()
        return rl(rest)
    if command in OWN_COMMANDS:
        run = import_module(OWN_COMMANDS[command], __package__)  # only when asked for: torch is slow to import
        status: int = run.main(rest)
        return status
    if command not in TRAINER_COMMANDS:
        known = ", ".join([*TRAINER_COMMANDS, "configs", "results", "rl", *OWN_COMMANDS])
        raise ValueError(f"there is no command {command!r}; choose one of {known}")
    from .trainer_cli import SnailCLI  # Lightning is slow to import; the other commands do without

    if not debug:
        _quiet()
    run_trainer(SnailCLI, command, rest, configs="configs", built_in=BUILT_IN, starts={"--data"})
    return 0


def run_trainer(
    make: Callable[..., Any], command: str, rest: list[str], *, configs: str, built_in: str, starts: Set[str]
) -> None:
    """Run a command of the trainer: configs by bare name, a checkpoint with the config of its run.

    Args:
        make: Parses the command line and runs the command, such as ``SnailCLI``.
        command: Which one.
        rest: What stands behind it.
        configs: Folder of the shipped configs in the package.
        built_in: The config, and the name, of a run for which none is given.
        starts: Options that say as much as a config.
    """
    from snail.pretrained import WEIGHTS

    from .runs import LINKED_KEY, RUNS, STARTED_KEY, checkpoint_config, find_checkpoint, latest_run, read_checkpoint

    if {"-h", "--help"} & set(rest):
        make([command, *_configs_by_name(rest, configs, built_in)[0]], name=built_in)
        return
    if command == "fit" and not {"--config", "-c", "--ckpt_path", *starts} & {arg.split("=", 1)[0] for arg in rest}:
        rest = ["--config", built_in, *rest]
    rest, name = _configs_by_name(rest, configs, built_in)
    rest, trust = take(rest, "--trust")
    rest, given = take(rest, "--ckpt_path")
    if given:
        _, names = take(rest, "--name")
        by_name = given[-1] in ("last", "best") and not Path(given[-1]).exists()
        path = latest_run(RUNS, names[-1] if names else name) if by_name else Path(given[-1])
        prefer = "last.ckpt" if command == "fit" or given[-1] == "last" else "best.ckpt"
        checkpoint = find_checkpoint(path, prefer=prefer)
        if command == "fit" and checkpoint.suffix == Path(WEIGHTS).suffix:
            raise ValueError(f"{checkpoint} holds weights only; a run can begin with them: --start_from {checkpoint}")
        content = read_checkpoint(checkpoint)
        config = checkpoint_config(content, checkpoint, trust)
        rest, _ = take(rest, "--config")  # it named the run; the run's own config and the flags count
        rest = ["--config", yaml.safe_dump(config, sort_keys=False), *rest]
        told = {"linked": content.get(LINKED_KEY, {}), "started_from": content.get(STARTED_KEY, {})}
        make([command, *rest], name=config.get("name", name), checkpoint=checkpoint, trust=trust, **told)
        return
    make([command, *rest], name=name, trust=trust)


def _configs_by_name(argv: list[str], configs: str, built_in: str) -> tuple[list[str], str]:
    """Put the path of a shipped config in the place of its bare name; also the last config's name."""
    found, name, expects = [], built_in, False
    for arg in argv:
        if expects or arg.startswith("--config="):
            value = arg.split("=", 1)[1] if not expects else arg
            path = config_path(value, configs)
            name = path.stem
            arg = str(path) if expects else f"--config={path}"
        expects = arg in ("--config", "-c")
        found.append("--config" if expects else arg)
    return found, name


def config_path(value: str, configs: str) -> Path:
    """A config by its path, or by the bare name of one in a folder of the package.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    path = Path(value)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_configs(configs)}
    if value.removesuffix(".yaml") in shipped:
        return shipped[value.removesuffix(".yaml")]
    raise FileNotFoundError(f"there is no config {value!r}: neither a file nor one of {', '.join(sorted(shipped))}")


def shipped_configs(configs: str = "configs") -> list[Path]:
    """The configs in a folder of the package, by name."""
    return sorted((SHIPPED / configs).glob("*.yaml"))


def list_configs() -> str:
    """The shipped configs, each with the comment at its head and the results that it gave."""
    lines = []
    for path in shipped_configs():
        head = config_head(path)
        command = "fit" if _needs_training(path) else "test"
        lines += [path.stem, *(f"    {line}" for line in head), f"    snail {command} --config {path.stem}"]
        for record in read_results([SHIPPED / "results" / path.stem / "results.json"]):
            lines.append(f"    gave {record_text(record)}")
    return "\n".join(lines)


def config_head(config: Path) -> list[str]:
    """The comment at the head of a config, line by line."""
    return [line[1:].strip() for line in config.read_text().splitlines() if line.startswith("#")]


def _needs_training(config: Path) -> bool:
    learner = yaml.safe_load(config.read_text()).get("model", {}).get("learner", {}).get("class_path")
    return learner is None or getattr(locate(learner), "needs_training", True)


def list_results(argv: Sequence[str]) -> str:
    """The results of runs (by default of all that ship with the package, the paper's first) as a table.

    Args:
        argv: Runs' folders or ``results.json`` files; ``--markdown`` for tables to paste, a line for each run;
            ``--picture FILE`` to draw them too; ``--data NAME`` for those on a data set alone, ``--outcomes`` without
            runs that another of the same learner goes on from.
    """
    argv, pictures = take(argv, "--picture")
    argv, data = take(argv, "--data")
    for picture in pictures:
        check_picture(Path(picture))
    if unknown := [arg for arg in argv if arg.startswith("-") and arg not in ("--markdown", "--outcomes")]:
        raise ValueError(
            f"there is no option {unknown[0]}; it is snail results [--markdown] [--outcomes] [--data NAME] "
            f"[--picture FILE] [RUN ...]"
        )
    given = [Path(arg) for arg in argv if not arg.startswith("-")]
    paths = given or sorted(SHIPPED.glob("results/*/results.json"))
    found = read_results([path / "results.json" if path.is_dir() else path for path in paths], must_exist=True)
    if strange := sorted(set(data) - {record["dataset"] for record in found}):
        raise ValueError(f"there is no result on {strange[0]!r}; leave --data out to see all")
    found = [record for record in found if not data or record["dataset"] in data]
    found = outcomes(found) if "--outcomes" in argv else found
    records = [with_published(record) for record in (found if given else sorted(found, key=_the_papers_first))]
    for picture in pictures:
        from .pictures import draw_results

        draw_results(records, Path(picture))
    show = results_markdown if "--markdown" in argv else results_table
    return show(records)


def _the_papers_first(record: Mapping[str, Any]) -> tuple[Any, ...]:
    dataset, papers = record["dataset"], ("omniglot", "mini_imagenet")
    place = papers.index(dataset) if dataset in papers else len(papers)
    return place, dataset, record["split"], record["learner"] != "SNAIL"


def _one_sentence(error: Exception) -> str:
    """An error's message on one line, without the candidates that a parser tried."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        return f"the key {text} is missing in what was read; was it written by another program or version?"
    if "Error(s) in loading state_dict" in text:
        first = " ".join(text.splitlines()[1:2]).strip()
        return f"the checkpoint does not fit the model of its config and the options given ({first}); leave these out"
    if "gloo" in text and ("closed by peer" in text or "reset by peer" in text):
        return (
            "another process of this training ended, so that this one cannot go on; the same command with "
            "--ckpt_path last goes on from the last checkpoint, if one was due"
        )
    text = text.split("Given value")[0]
    noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>")
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    kept = " ".join(line for line in lines if line and not line.startswith(noise))
    return f"{kept}; `snail fit --help` lists the options" if "does not accept option" in kept else kept


if __name__ == "__main__":
    sys.exit(main())
