"""The classical strategies on the trials of a test: the numbers, what is played again, what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from test_experiments_cli import fails

from snail.experiments import cli, rl_classical
from snail.experiments.cli import main
from snail.experiments.rl import read_returns
from snail.experiments.rl_classical import (
    BANDIT_COLUMNS,
    BAYES,
    IDENTITY,
    MDP_COLUMNS,
    RETURNS,
    SHARES,
    STRATEGIES,
    markdown_table,
    picture_hash,
    play_strategies,
    published_of,
    read_classical,
)
from snail.rl import Bandits, Environment, TabularMDPs
from snail.rl.scoring import score
from snail.rl.strategies import GRIDS, UCB1, EpsilonGreedy, Greedy, MDPGreedy, bayes_optimal_value, play

SMALL: dict[str, dict[str, Any]] = {
    "Bandits": {"trials": 8, "arms": 2, "steps": 4},
    "TabularMDPs": {"trials": 8, "episodes": 2, "horizon": 3, "states": 3, "actions": 2},
}
OPTIONS = ["--trials", "20", "--choice_trials", "30"]


def config(folder: Path, kind: str, **changed: Any) -> str:
    """A file with a small environment."""
    path = folder / f"{kind}.yaml"
    model = {"environment": {"class_path": f"snail.rl.{kind}", "init_args": SMALL[kind] | changed}}
    path.write_text(yaml.safe_dump({"model": model}))
    return str(path)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of two small settings."""
    folder = tmp_path_factory.mktemp("classical")
    configs = [config(folder, kind) for kind in SMALL]
    assert main(["rl", "classical", "--config", *configs, "--output", str(folder / "all.json"), *OPTIONS]) == 0
    return folder / "all.json"


def records(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    return {r["strategy"]: r for r in read_classical([path]) if r["environment"] == kind}


def make(trials: int, seed: int) -> Environment:
    return Bandits(trials, 2, 4, seed=seed)


# -- numbers -------------------------------------------------------------------------------------------------------


def test_every_strategy_of_both_environments_is_played(played: Path) -> None:
    assert list(records(played, "bandits")) == [row.name for row in STRATEGIES["bandits"]] + [BAYES]
    assert list(records(played, "tabular-mdps")) == [row.name for row in STRATEGIES["tabular-mdps"]]
    for record in read_classical([played]):
        assert (record["trials"], record["batch"], record["seed"]) == (20, 8, 1_000_000)
        assert record["strategy"] == BAYES or (record["ci95"] > 0 and record["hardware"] and record["versions"])


@pytest.mark.parametrize("kind", SMALL)
def test_a_score_is_what_the_strategy_earns_in_rounds_of_the_test(played: Path, kind: str) -> None:
    environment: Environment = {"Bandits": Bandits, "TabularMDPs": TabularMDPs}[kind](**SMALL[kind], seed=1_000_000)
    player = Greedy() if isinstance(environment, Bandits) else MDPGreedy()
    returns = torch.cat([play(environment, player).sum(dim=1).double() for _ in range(3)])[:20]
    record = records(played, str(environment.facts["environment"]))["greedy"]
    assert record["return"] == float(returns.mean())
    assert record["ci95"] == pytest.approx(1.96 * float(returns.std()) / 20**0.5)
    assert (record["against_greedy"], record["against_greedy_ci95"]) == (0, 0)


def test_differences_are_those_of_the_same_trials(played: Path) -> None:
    record, how = records(played, "bandits")["UCB1 of the textbook"], {"trials": 20, "seed": 1_000_000}
    environment = make(8, 0)
    returns, optimal = score(environment, UCB1(1.0, textbook=True), **how)
    more = returns - score(environment, Greedy(), **how)[0]
    assert record["options"] == {"constant": 1.0, "textbook": True} and record["return"] == float(returns.mean())
    assert record["against_greedy"] == pytest.approx(float(more.mean()))
    assert record["against_greedy_ci95"] == pytest.approx(1.96 * float(more.std()) / 20**0.5)
    assert optimal is not None and record["optimal"] == float(optimal.mean())


def test_constants_are_chosen_on_other_trials_than_are_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[int, int]] = []

    def watched(trials: int, seed: int) -> Environment:
        made.append((trials, seed))
        return make(trials, seed)

    row = next(row for row in STRATEGIES["bandits"] if row.name == "ε-greedy")
    monkeypatch.setitem(rl_classical.STRATEGIES, "bandits", (row,))
    found = play_strategies(watched, tmp_path / "x.json", batch=8, trials=20, choice_trials=30, say=lambda _: None)
    assert made == [(8, 1_000_000), *[(30, 2_000_000)] * len(GRIDS[EpsilonGreedy])]
    record = found[0]
    earned = [float(play(make(30, 2_000_000), EpsilonGreedy(e)).sum(dim=1).mean()) for e in GRIDS[EpsilonGreedy]]
    assert record["grid_returns"] == earned and record["grid"] == list(GRIDS[EpsilonGreedy])
    assert record["options"] == {"epsilon": record["grid"][earned.index(max(earned))]}
    assert (record["choice_trials"], record["choice_seed"], record["constant"]) == (30, 2_000_000, "epsilon")


def test_the_best_of_all_is_computed(played: Path) -> None:
    record = records(played, "bandits")[BAYES]
    assert record["return"] == bayes_optimal_value(2, 4) and record["ci95"] is None
    assert record["share"] == pytest.approx(100 * record["return"] / (4 * 2 / 3))
    assert BAYES not in records(played, "tabular-mdps")


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the players that are scored."""
    names: list[str] = []

    def watched(environment: Environment, player: Any, **how: Any) -> Any:
        names.append(type(player).__name__)
        return score(environment, player, **how)

    monkeypatch.setattr(rl_classical, "score", watched)
    return names


def test_what_a_file_holds_is_not_played_again(
    played: Path, tmp_path: Path, scored: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "all.json"
    output.write_text(played.read_text())
    command = ["rl", "classical", "--output", str(output), "--config", config(tmp_path, "Bandits")]
    assert main([*command, *OPTIONS]) == 0
    assert scored == [] and output.read_text() == played.read_text()
    assert capfd.readouterr().out.startswith("\n| bandits, 4 pulls of 2 arms |")

    kept = [r for r in json.loads(played.read_text()) if r["strategy"] not in ("UCB1", BAYES)]
    output.write_text(json.dumps(kept))
    assert main([*command, *OPTIONS]) == 0
    assert scored == ["Greedy", "UCB1"]  # the first for the differences
    assert records(output, "bandits") == records(played, "bandits")
    assert records(output, "tabular-mdps") == records(played, "tabular-mdps")


def test_each_strategy_is_kept_as_soon_as_it_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(environment: Environment, player: Any, **how: Any) -> Any:
        if isinstance(player, UCB1):
            raise KeyboardInterrupt
        return score(environment, player, **how)

    monkeypatch.setattr(rl_classical, "score", stopped)
    command = ["rl", "classical", "--config", config(tmp_path, "Bandits"), "--output", str(tmp_path / "x.json")]
    assert main([*command, *OPTIONS]) == 130
    assert list(records(tmp_path / "x.json", "bandits")) == ["random", "greedy", "ε-greedy"]


@pytest.mark.parametrize(
    "changed", [["--seed", "7"], ["--trials", "9"], ["--choice_seed", "7"], ["--choice_trials", "9"], ["batch"]]
)
def test_another_measurement_is_another_record(
    changed: list[str], played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tuple(row for row in STRATEGIES["bandits"] if row.name == "ε-greedy")
    monkeypatch.setitem(rl_classical.STRATEGIES, "bandits", chosen)
    output = tmp_path / "all.json"
    output.write_text(played.read_text())
    before = len(read_classical([output]))
    more, batch = ([], 4) if changed == ["batch"] else (changed, 8)
    settings = ["--config", config(tmp_path, "Bandits", trials=batch)]
    assert main(["rl", "classical", *settings, "--output", str(output), *OPTIONS, *more]) == 0
    assert len(read_classical([output])) == before + (1 if "--choice" in str(changed) else 2)  # BAYES is the other


def test_long_trials_are_not_played_with_tables_that_grow_with_their_cube(tmp_path: Path) -> None:
    def long(trials: int, seed: int) -> Environment:
        return Bandits(trials, 2, 101, seed=seed)

    found = play_strategies(long, tmp_path / "x.json", batch=2, trials=2, choice_trials=1, say=lambda _: None)
    assert {r["strategy"] for r in found} == {row.name for row in STRATEGIES["bandits"]} - {"Gittins, finite horizon"}


# -- tables --------------------------------------------------------------------------------------------------------


def row(strategy: str, **changed: Any) -> dict[str, Any]:
    facts = {"environment": "bandits", "arms": 5, "steps": 10, "seed": 1, "trials": 9, "batch": 4}
    scored = {"return": 6.6, "ci95": 0.03, "share": 79.1, "share_ci95": 0.4, "strategy": strategy, "options": {}}
    return facts | scored | changed


def agent(**changed: Any) -> dict[str, Any]:
    known = row("", agent="SNAILAgent", run="mine", checkpoint="ab", **changed)
    return known | {"config": {"environment": {"init_args": {"trials": known.pop("batch")}}}}


def test_the_table_has_agents_and_published_figures_beside_greedy_play() -> None:
    chosen = {"options": {"epsilon": 0.01}, "constant": "epsilon", "grid": [0.0, 0.01, 0.02]}
    chosen |= {"choice_trials": 1000, "choice_seed": 3, "against_greedy": -0.02, "against_greedy_ci95": 0.01}
    greedy = row("greedy", against_greedy=0.0, against_greedy_ci95=0.0)
    ends = chosen | {"options": {"constant": 0.01}, "constant": "constant", "grid": [0.0, 0.01]}
    agents = [agent(ci95=0.04), agent(against_greedy=0.1, against_greedy_ci95=0.02), agent(batch=5), agent(steps=9)]
    assert markdown_table(
        [row("UCB1", **ends), row("ε-greedy", **chosen), greedy, row(BAYES, ci95=None, share_ci95=None)], agents
    ) == (
        "| bandits, 10 pulls of 5 arms | constant | mean return (95 % interval) | of the optimum | more than greedy "
        "| published |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| greedy |  | 6.60 ± 0.03 | 79.1 ± 0.4 % |  | 6.6 |\n"
        "| ε-greedy | 0.01 | 6.60 ± 0.03 | 79.1 ± 0.4 % | -0.02 ± 0.01 | 6.6 |\n"
        "| UCB1 | 0.01 (end of grid) | 6.60 ± 0.03 | 79.1 ± 0.4 % | -0.02 ± 0.01 | 6.7 |\n"
        "| Bayes-optimal, computed |  | 6.60 | 79.1 % |  |  |\n"
        "| **SNAIL**, run mine |  | 6.60 ± 0.04 | 79.1 ± 0.4 % | +0.00 ± 0.05* | 6.6 ± 0.1 |\n"
        "| **SNAIL**, run mine |  | 6.60 ± 0.03 | 79.1 ± 0.4 % | +0.10 ± 0.02 | 6.6 ± 0.1 |\n"
        "| **SNAIL**, run mine† |  | 6.60 ± 0.03 | 79.1 ± 0.4 % |  | 6.6 ± 0.1 |\n"
        "\n"
        "9 trials of seed 1, 4 side by side. Constants chosen on 1,000 of seed 3: ε-greedy of 0, 0.01, 0.02; "
        "UCB1 of 0, 0.01. "
        "*Not paired: the interval is that of two independent means. "
        "†Tested on other trials than those of this table."
    )
    assert markdown_table([]) == "no results"


def test_an_output_is_shown_and_drawn(played: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    picture = tmp_path / "x.png"
    assert main(["rl", "classical", "--show", str(played), "--picture", str(picture)]) == 0
    printed = capfd.readouterr().out
    assert printed == markdown_table(read_classical([played])) + "\n"
    with Image.open(picture) as drawn:
        agents = read_returns(sorted(cli.SHIPPED.glob("results/rl/*/results.json")))
        assert drawn.width > 900 and drawn.info["Source"] == picture_hash(read_classical([played]), agents)


# -- published figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "published"),
    [
        ({}, (6.6, "6.6")),
        ({"steps": 100, "arms": 50}, (78.0, "78.0")),
        ({"steps": 1000, "arms": 50}, (None, "")),
        ({"steps": 7}, (None, "")),
        ({"strategy": "UCB1", "steps": 100, "arms": 10}, (82.4, "82.4")),
        ({"strategy": "UCB1 of the textbook"}, (None, "")),
        ({"strategy": "Gittins, discounted", "steps": 1000, "arms": 50}, (944.1, "944.1")),
        ({"environment": "tabular-mdps", "episodes": 10}, (134.8, "134.8")),
        ({"environment": "tabular-mdps", "episodes": 100, "strategy": "OPSRL"}, (1973.9, "1973.9, 95.1 %")),
        ({"environment": "tabular-mdps", "episodes": 10, "strategy": "UCRL2, prior 0"}, (146.6, "146.6, 70.6 %")),
        ({"environment": "tabular-mdps", "episodes": 10, "strategy": "value iteration"}, (None, "")),
        ({"environment": "tabular-mdps", "episodes": 10, "horizon": 5}, (None, "")),
    ],
)
def test_published_figures_are_those_of_the_setting(changed: dict[str, Any], published: tuple[Any, str]) -> None:
    assert published_of(row("greedy") | changed) == published


def test_published_returns_and_shares_of_mdps_are_of_one_optimum() -> None:
    assert all(len(figures) == len(BANDIT_COLUMNS) for figures in RETURNS["bandits"].values())
    for (episodes,), figures in RETURNS["tabular-mdps"].items():
        for name, earned, share in zip(MDP_COLUMNS, figures, SHARES[episodes,], strict=True):
            assert earned is not None and (share is None) == (name == "greedy")
            assert share is None or 100 * earned / share / episodes == pytest.approx(20.77, abs=0.05), (episodes, name)


@pytest.mark.parametrize("setting", RETURNS["bandits"])
def test_published_figures_are_those_that_a_config_tells(setting: tuple[int, int]) -> None:
    head = (cli.SHIPPED / "configs" / "rl" / f"bandit_{setting[0]}_{setting[1]}.yaml").read_text().splitlines()[0]
    assert head.endswith(f"Gittins {RETURNS['bandits'][setting][BANDIT_COLUMNS.index('Gittins')]}.")


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config", "nope"], "no config 'nope'"),
        (["--config", "empty.yaml"], "empty.yaml has no environment that the strategies play"),
        (["--config", "other.yaml"], "other.yaml has no environment that the strategies play"),
        (["--config", "untold.yaml"], "does not tell how many trials are played side by side"),
        (["--config", "Bandits.yaml", "--trials", "0"], "0 is not a whole number of at least 1"),
        (["--config", "Bandits.yaml", "--seed", "-1"], "seed"),
        (["--config", "Bandits.yaml", "--seed", "2000000"], "constants would be chosen on the trials that are scored"),
        (["--config", "Bandits.yaml", "--output", "none/x.json"], "must name a file in a folder that exists"),
        (["--config", "Bandits.yaml", "--output", "broken.json"], "is not valid JSON"),
        (["--config", "Bandits.yaml", "--output", "agents.json"], "has a record without 'batch'"),
        (["--show", "nope.json"], "there is no nope.json; `snail rl classical` writes it"),
        (["--show", "none.json", "--picture", "x.png"], "there is nothing to draw"),
        (["--show", "none.json", "--picture", "x.jpg"], "must name a .png file"),
        (["--show", "none.json", "--runs", "nope.json"], "there is no nope.json"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_changes_nothing(
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "Bandits")
    environment: Callable[..., str] = lambda **told: yaml.safe_dump({"model": {"environment": told}})  # noqa: E731
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "other.yaml").write_text(environment(class_path="snail.rl.FromGymnasium"))
    (tmp_path / "untold.yaml").write_text(environment(class_path="snail.rl.Bandits", init_args={"arms": 2}))
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "agents.json").write_text(json.dumps([{key: 1 for key in IDENTITY if key != "batch"}]))
    (tmp_path / "none.json").write_text("[]")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert sentence in fails(["rl", "classical", *argv], capfd)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_help_explains_options(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rl", "classical", "--help"])
    assert "is not played again" in " ".join(capfd.readouterr().out.split())
