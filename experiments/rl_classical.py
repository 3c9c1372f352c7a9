"""``snail rl classical``: the strategies of the textbooks, on the very trials that ``snail rl test`` scores agents on.

A record of the file that it writes is one strategy in one setting: mean return, what it earns more than greedy play of
the same trials, and the constant that was chosen for it on other trials. The table has published figures beside, and
the rows of trained agents below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from snail.evaluation import machine
from snail.records import markdown_rows, merge_records, read_records
from snail.rl import Bandits, Environment, TabularMDPs
from snail.rl.scoring import TEST_SEED, TEST_TRIALS, greedy_player, score
from snail.rl.strategies import (
    GRIDS,
    OPSRL,
    PSRL,
    UCB1,
    UCRL2,
    EpsilonGreedy,
    Gittins,
    Greedy,
    KnownMDP,
    LikeliestThompson,
    MDPEpsilonGreedy,
    MDPGreedy,
    OptimisticThompson,
    Random,
    Thompson,
    bayes_optimal_value,
    choose,
)

from .cli import SHIPPED, config_path
from .options import OptionParser, check_output, check_picture, whole_number
from .rl import (
    CONFIGS,
    SETTINGS,
    USUAL,
    against,
    figure_text,
    published_text,
    read_returns,
    scores,
    setting_text,
    share_text,
)

__all__ = [
    "Strategy",
    "by_setting",
    "draw",
    "main",
    "markdown_table",
    "picture_hash",
    "play_strategies",
    "published_of",
    "read_classical",
]

TRAINED = ("bandit_10_5", "bandit_100_10", "mdp_10")  # the settings played by default
CHOICE_SEED = 2_000_000  # of the trials on which constants are chosen

# Mean returns that Duan et al., 2016 (RL²) report; Mishra et al., 2018 (SNAIL), repeat some of them.
BANDIT_COLUMNS = ("random", "Gittins", "TS", "OTS", "UCB1", "ε-greedy", "greedy")
MDP_COLUMNS = ("random", "PSRL", "OPSRL", "UCRL2", "ε-greedy", "greedy")
RETURNS: dict[str, dict[tuple[int, ...], tuple[float | None, ...]]] = {
    "bandits": {  # by steps and arms
        (10, 5): (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6),
        (10, 10): (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6),
        (10, 50): (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5),
        (100, 5): (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8),
        (100, 10): (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1),
        (100, 50): (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0),
        (500, 5): (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6),
        (500, 10): (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0),
        (500, 50): (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8),
        (1000, 50): (499.8, 944.1, None, None, None, None, None),
    },
    "tabular-mdps": {  # by episodes
        (10,): (100.1, 138.1, 144.1, 146.6, 132.8, 134.8),
        (25,): (250.2, 408.8, 425.2, 424.1, 377.3, 368.8),
        (50,): (499.7, 904.4, 930.7, 918.9, 823.3, 769.3),
        (75,): (749.9, 1417.1, 1449.2, 1427.6, 1293.9, 1172.9),
        (100,): (999.4, 1939.5, 1973.9, 1942.1, 1778.2, 1578.5),
    },
}
# The same in percent of what value iteration reaches, as Mishra et al. give it.
SHARES: dict[tuple[int, ...], tuple[float | None, ...]] = {
    (10,): (48.2, 66.5, 69.4, 70.6, 64.0, None),
    (25,): (48.2, 78.8, 81.9, 81.7, 72.7, None),
    (50,): (48.1, 87.1, 89.7, 88.5, 79.3, None),
    (75,): (48.2, 91.0, 93.1, 91.7, 83.1, None),
    (100,): (48.1, 93.4, 95.1, 93.6, 85.7, None),
}


@dataclass(frozen=True)
class Strategy:
    """A row of the table.

    Attributes:
        name: What it is called there.
        player: Its class.
        options: What the class is given.
        constant: The option that is chosen from the class's grid, if one is.
        published: The column of the published figures that stand beside it, if there are any.
        longest: Steps of the longest trials that it plays; its tables grow with the cube of them.
    """

    name: str
    player: type[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    constant: str | None = None
    published: str | None = None
    longest: float = math.inf


PESSIMIST = {"prior_mean": 0.0}
STRATEGIES: dict[str, tuple[Strategy, ...]] = {
    "bandits": (
        Strategy("random", Random, published="random"),
        Strategy("greedy", Greedy, published="greedy"),
        Strategy("ε-greedy", EpsilonGreedy, constant="epsilon", published="ε-greedy"),
        Strategy("UCB1", UCB1, constant="constant", published="UCB1"),
        Strategy("UCB1 of the textbook", UCB1, {"constant": 1.0, "textbook": True}),
        Strategy("Thompson", Thompson, published="TS"),
        Strategy("Thompson, optimistic", OptimisticThompson, published="OTS"),
        Strategy("Thompson, likeliest draw", LikeliestThompson, constant="samples", published="OTS"),
        Strategy("Gittins, discounted", Gittins, constant="discount", published="Gittins"),
        Strategy("Gittins, finite horizon", Gittins, published="Gittins", longest=100),
    ),
    "tabular-mdps": (
        Strategy("random", Random, published="random"),
        Strategy("greedy", MDPGreedy, published="greedy"),
        Strategy("ε-greedy", MDPEpsilonGreedy, constant="epsilon", published="ε-greedy"),
        Strategy("PSRL", PSRL, published="PSRL"),
        Strategy("OPSRL", OPSRL, constant="samples", published="OPSRL"),
        Strategy("UCRL2", UCRL2, constant="constant", published="UCRL2"),
        Strategy("greedy, prior 0", MDPGreedy, PESSIMIST, published="greedy"),
        Strategy("ε-greedy, prior 0", MDPEpsilonGreedy, PESSIMIST, constant="epsilon", published="ε-greedy"),
        Strategy("PSRL, prior 0", PSRL, PESSIMIST, published="PSRL"),
        Strategy("OPSRL, prior 0", OPSRL, PESSIMIST, constant="samples", published="OPSRL"),
        Strategy("UCRL2, prior 0", UCRL2, PESSIMIST, constant="constant", published="UCRL2"),
        Strategy("value iteration", KnownMDP),
    ),
}
BAYES = "Bayes-optimal, computed"  # not played
BAYES_STEPS = 10  # of the longest trials for which it takes seconds
AGENTS = {"SNAILAgent": "SNAIL", "RL2Agent": "RL²"}


# -- playing -------------------------------------------------------------------------------------------------------


def play_strategies(
    make: Callable[[int, int], Environment],
    output: Path,
    *,
    batch: int,
    trials: int = TEST_TRIALS,
    seed: int = TEST_SEED,
    choice_trials: int = TEST_TRIALS,
    choice_seed: int = CHOICE_SEED,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Play all strategies of an environment that a file does not hold yet; each is written as soon as it is scored.

    Args:
        make: Makes the environment from the number of trials side by side and a seed.
        output: The file.
        batch: Trials side by side: that of the agents that are to be compared, or the trials are others.
        trials: Trials to score.
        seed: Their seed.
        choice_trials: Trials on which constants are chosen.
        choice_seed: Their seed, another.
        say: Told how far it is.

    Returns:
        What the file holds of this setting and these options.

    Raises:
        ValueError: If the seeds are one, or the file is not one of this command.
    """
    if seed == choice_seed:
        raise ValueError(f"constants would be chosen on the trials that are scored, seed {seed}; choose another seed")
    environment, held = make(batch, seed), read_classical([output])
    kind, setting = str(environment.facts["environment"]), setting_text(environment.facts)
    rows = [row for row in STRATEGIES[kind] if environment.steps <= row.longest]
    common = {**environment.facts, "trials": trials, "batch": batch}
    choice = {"choice_trials": choice_trials, "choice_seed": choice_seed}
    known = {_identity(record): record for record in held}
    greedy: Tensor | None = None
    found = []
    for number, row in enumerate(rows, 1):
        grid = list(GRIDS[row.player]) if row.constant is not None else None
        record = {**common, "strategy": row.name, "options": dict(row.options)}
        record |= {"grid": grid, **(choice if grid else dict.fromkeys(choice))}
        if _identity(record) in known:
            found.append(known[_identity(record)])
            continue
        say(f"{setting}: {row.name}, {number} of {len(rows)}")
        if greedy is None:
            cautious = greedy_player(environment)
            assert cautious is not None
            greedy, _ = score(environment, cautious, trials=trials, seed=seed)
        record |= _choose(row, make, choice_trials, choice_seed)
        returns, optimal = score(environment, row.player(**record["options"]), trials=trials, seed=seed)
        record |= {**scores(returns, optimal), **against(returns, greedy), **machine(environment.device)}
        held = merge_records(output, held, [record], IDENTITY)
        found.append(record)
    if kind == "bandits" and environment.steps <= BAYES_STEPS:
        record = {**common, "strategy": BAYES}
        if _identity(record) not in known:
            arms, steps = environment.actions, environment.steps
            value = bayes_optimal_value(arms, steps)
            share = 100 * value / (steps * arms / (arms + 1))  # the best of A uniform numbers is A / (A + 1) on average
            known[_identity(record)] = record | {"return": value, "ci95": None, "share": share}
            merge_records(output, held, [known[_identity(record)]], IDENTITY)
        found.append(known[_identity(record)])
    return found


def _choose(row: Strategy, make: Callable[[int, int], Environment], trials: int, seed: int) -> dict[str, Any]:
    """The options of a strategy with its constant, and what each of the grid earned."""
    if row.constant is None:
        return {}
    name = row.constant
    best, returns = choose(
        lambda constant: row.player(**{name: constant}, **row.options), GRIDS[row.player], lambda: make(trials, seed)
    )
    return {"options": {**row.options, name: best}, "constant": name, "grid_returns": list(returns.values())}


NEEDED = ("environment", "seed", "trials", "batch", "strategy", "return", "ci95")
PLAYED = ("environment", *(key for keys in SETTINGS.values() for key in keys), *USUAL)
SETTING = (*PLAYED, "seed", "trials", "batch")  # with what tells which trials
IDENTITY = (*SETTING, "strategy", "grid", "choice_trials", "choice_seed")
"""What makes two records the same measurement."""


def _identity(record: Mapping[str, Any], keys: Sequence[str] = IDENTITY) -> str:
    return json.dumps([record.get(key) for key in keys])


def read_classical(paths: Iterable[Path], *, must_exist: bool = False) -> list[dict[str, Any]]:
    """The records of some files of ``snail rl classical``, in order.

    Raises:
        ValueError: If a file is not a list of such records.
        FileNotFoundError: If ``must_exist`` and one is missing.
    """

    def fault(record: Mapping[str, Any]) -> str | None:
        missing = [key for key in NEEDED if key not in record]
        return f"without {missing[0]!r}" if missing else None

    return read_records(paths, fault, written_by="snail rl classical", must_exist=must_exist)


# -- what is printed -----------------------------------------------------------------------------------------------


def by_setting(
    records: Iterable[Mapping[str, Any]], agents: Iterable[Mapping[str, Any]] = ()
) -> list[tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]]:
    """Records of strategies, a list for each setting and in the order of the table, with the agents tested in it.

    Args:
        records: Of strategies.
        agents: Of agents, as ``snail rl test`` writes them; each is put to the strategies that played the same trials,
            or else to the first ones that played the same environment.
    """
    order = {row.name: i for rows in STRATEGIES.values() for i, row in enumerate(rows)}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(_identity(record, SETTING), []).append(record)
    placed = {key: list[Mapping[str, Any]]() for key in groups}
    for agent in agents:
        alike = [key for key, group in groups.items() if _identity(agent, PLAYED) == _identity(group[0], PLAYED)]
        same = [key for key in alike if _same_trials(agent, groups[key][0])]
        if alike:
            placed[(same or alike)[0]].append(agent)
    return [
        (sorted(group, key=lambda record: order.get(str(record["strategy"]), len(order))), placed[key])
        for key, group in groups.items()
    ]


def _same_trials(agent: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether an agent was tested on the trials of a strategy's record."""
    batch = agent.get("config", {}).get("environment", {}).get("init_args", {}).get("trials")
    return _identity({**agent, "batch": batch}, SETTING) == _identity(record, SETTING)


def markdown_table(records: Iterable[Mapping[str, Any]], agents: Iterable[Mapping[str, Any]] = ()) -> str:
    """A table for each setting, as the page shows them.

    Args:
        records: Of strategies, as this command writes them.
        agents: Of agents, as ``snail rl test`` writes them.
    """
    return "\n\n".join(_one_table(*group) for group in by_setting(records, agents)) or "no results"


def _one_table(records: Sequence[Mapping[str, Any]], agents: Sequence[Mapping[str, Any]]) -> str:
    first, setting = records[0], setting_text(records[0])
    heads = [setting, "constant", "mean return (95 % interval)", "of the optimum", "more than greedy", "published"]
    greedy = next((record for record in records if record["strategy"] == "greedy"), None)
    rows = [heads]
    for record in records:
        value = record.get("options", {}).get(record.get("constant", "constant"))
        constant = "" if value is None else f"{value:g}"
        if record.get("grid") and value != 0 and value in (min(record["grid"]), max(record["grid"])):
            constant += " (end of grid)"  # beyond it might be better
        scored = [figure_text(record), share_text(record), _against_text(record)]
        rows.append([str(record["strategy"]), constant, *scored, published_of(record)[1]])
    notes: dict[str, None] = {}
    for agent in agents:
        name, more, mark = str(agent["agent"]), _against_text(agent), ""
        if not _same_trials(agent, first):
            mark = "†"
            notes["†Tested on other trials than those of this table."] = None
        elif not more and greedy is not None:
            around = math.hypot(agent["ci95"] or 0, greedy["ci95"] or 0) or None
            more = f"{agent['return'] - greedy['return']:+.2f}{'' if around is None else f' ± {around:.2f}'}*"
            notes["*Not paired: the interval is that of two independent means."] = None
        told = [figure_text(agent), share_text(agent), more, published_text(agent, name) or ""]
        rows.append([f"**{AGENTS.get(name, name)}**, run {agent['run']}{mark}", "", *told])
    told = [f"{first['trials']:,} trials of seed {first['seed']:,}, {first['batch']:,} side by side."]
    grids: dict[str, None] = {}
    for record in records:
        if record.get("grid"):
            values = ", ".join(f"{value:g}" for value in record["grid"])
            grids[f"{str(record['strategy']).removesuffix(', prior 0')} of {values}"] = None
    choices = {(r["choice_trials"], r["choice_seed"]): None for r in records if r.get("grid")}
    for trials, seed in choices:
        told.append(f"Constants chosen on {trials:,} of seed {seed:,}: {'; '.join(grids)}.")
    return "\n".join([*markdown_rows(rows), "", " ".join([*told, *notes])])


def _against_text(record: Mapping[str, Any]) -> str:
    if record.get("against_greedy") is None or record.get("strategy") == "greedy":
        return ""
    interval = record.get("against_greedy_ci95")
    return f"{record['against_greedy']:+.2f}" + ("" if interval is None else f" ± {interval:.2f}")


def published_of(record: Mapping[str, Any]) -> tuple[float | None, str]:
    """The published mean return of a strategy's record, if there is one, and how the table shows it.

    Args:
        record: As this command writes it.
    """
    kind = str(record["environment"])
    column = {row.name: row.published for row in STRATEGIES.get(kind, ())}.get(str(record["strategy"]))
    if column is None or any(record.get(key, usual) != usual for key, usual in USUAL.items()):
        return None, ""
    columns = BANDIT_COLUMNS if kind == "bandits" else MDP_COLUMNS
    setting, place = tuple(record[key] for key in SETTINGS[kind]), columns.index(column)
    figure = RETURNS[kind].get(setting, (None,) * len(columns))[place]
    if figure is None:
        return None, ""
    share = SHARES[setting][place] if kind == "tabular-mdps" else None
    return figure, f"{figure}" if share is None else f"{figure}, {share} %"


# -- the command ---------------------------------------------------------------------------------------------------


def picture_hash(records: Iterable[Mapping[str, Any]], agents: Iterable[Mapping[str, Any]]) -> str:
    """What the picture carries in its ``Source``, so that it can be told whether it is of these results."""
    return hashlib.sha256(markdown_table(records, agents).encode()).hexdigest()


def draw(records: Sequence[Mapping[str, Any]], agents: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Draw the tables.

    Args:
        records: Of strategies.
        agents: Of agents.
        picture: The PNG to write.

    Raises:
        ValueError: If there is nothing to draw.
    """
    from .pictures import Dot, draw_strategies

    panels: dict[str, list[Dot]] = {}
    for group, trained in by_setting(records, agents):
        dots = []
        for record in group:
            if record["strategy"] != "value iteration":  # so far off that all others would be one dot
                dots.append(Dot(str(record["strategy"]), record["return"], record["ci95"], published_of(record)[0]))
        for agent in trained:
            figure = published_text(agent, str(agent["agent"])) or "%"
            level = None if figure.endswith("%") else float(figure.split(" ± ")[0])
            name = AGENTS.get(str(agent["agent"]), str(agent["agent"]))
            dots.append(Dot(f"{name}, trained", agent["return"], agent["ci95"], level, trained=True))
        panels[setting_text(group[0])] = dots
    draw_strategies(panels, picture, source=picture_hash(records, agents))


def _environment(config: Path) -> tuple[Callable[[int, int], Environment], int, Mapping[str, Any]]:
    """What makes the environment of a config, its trials side by side, and the model's options."""
    content = yaml.safe_load(config.read_text())
    model = content.get("model") if isinstance(content, dict) else None
    told = model.get("environment") if isinstance(model, dict) else None
    kinds = {"snail.rl.Bandits": Bandits, "snail.rl.TabularMDPs": TabularMDPs}
    if not isinstance(model, dict) or not isinstance(told, dict) or told.get("class_path") not in kinds:
        raise ValueError(f"{config} has no environment that the strategies play: {' or '.join(kinds)}")
    kind: Any = kinds[told["class_path"]]
    settings = dict(told.get("init_args") or {})
    if not isinstance(settings.get("trials"), int):
        raise ValueError(f"{config} does not tell how many trials are played side by side")
    return lambda trials, seed: kind(**{**settings, "trials": trials, "seed": seed}), settings["trials"], model


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="snail rl classical",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""Play the strategies of the textbooks on the trials on which `snail rl test` scores agents, with
constants that were chosen on other trials, and print them beside published figures and the agents that were trained.

A strategy that the output holds already is not played again, so that the same command goes on after an interrupt.""",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--config", nargs="+", action="extend", metavar="NAME", help=f"settings (default: {' '.join(TRAINED)})")
    add("--output", type=Path, default="classical.json", help="file for every number, added to" + default)
    add("--trials", type=whole_number, help=f"trials to score (default: those of the config's test, or {TEST_TRIALS})")
    add("--seed", type=_seed, help=f"their seed (default: that of the config's test, or {TEST_SEED})")
    add("--choice_trials", type=whole_number, default=TEST_TRIALS, help="trials to choose constants on" + default)
    add("--choice_seed", type=_seed, default=CHOICE_SEED, help="their seed" + default)
    add(
        "--runs", type=Path, nargs="+", metavar="RUN", help="agents to show (default: those that ship with the package)"
    )
    add("--picture", type=Path, metavar="FILE", help="draw them too")
    add("--show", type=Path, metavar="FILE", help="play nothing; print the tables of an earlier output")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run ``snail rl classical``.

    Args:
        argv: The command line behind ``rl classical``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or a file is not what it should be.
        FileNotFoundError: If there is no such config, run or output.
    """
    options = _options(argv)
    if options.picture is not None:
        check_picture(options.picture)
    runs = options.runs or sorted(SHIPPED.glob("results/rl/*/results.json"))
    files = [run / "results.json" if run.is_dir() else run for run in runs]
    agents = read_returns(files, must_exist=True)
    if options.show is not None:
        records = read_classical([options.show], must_exist=True)
    else:
        check_output(options.output)
        settings = [_environment(config_path(name, CONFIGS)) for name in options.config or TRAINED]
        records = []
        for make, batch, model in settings:
            records += play_strategies(
                make,
                options.output,
                batch=batch,
                trials=options.trials or model.get("test_trials", TEST_TRIALS),
                seed=model.get("test_seed", TEST_SEED) if options.seed is None else options.seed,
                choice_trials=options.choice_trials,
                choice_seed=options.choice_seed,
                say=lambda line: print(line, flush=True),
            )
        print()
    print(markdown_table(records, agents))
    if options.picture is not None:
        draw(records, agents, options.picture)
    if options.show is None:
        print(f"\nevery number: {options.output}")
    return 0
