"""``snail rl``: a run's files, its result, its resume, and errors in one sentence."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_experiments_cli import fails

from snail.experiments import cli, rl
from snail.experiments.cli import main
from snail.experiments.rl import merge_returns, read_returns, returns_table
from snail.files import file_hash
from snail.rl import Bandits, RL2Agent, SNAILAgent, TabularMDPs, roll_out
from snail.rl.scoring import score
from snail.rl.strategies import Greedy

SMALL = [
    *("--trainer.accelerator=cpu", "--model.iterations=4", "--model.environment.trials=8", "--model.minibatches=2"),
    *("--model.epochs=2", "--model.agent.features=4", "--model.test_trials=20", "--keep_memory=false"),
]
CONFIGS = sorted(path.stem for path in (cli.SHIPPED / "configs" / "rl").glob("*.yaml"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small run in runs/small, tested."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["rl", "fit", "--name=small", *SMALL]) == 0
        assert main(["rl", "test", "--ckpt_path", "runs/small"]) == 0
    return folder / "runs" / "small"


@pytest.fixture
def copy_of_run(trained: Path, here: Path) -> Path:
    shutil.copytree(trained, here / "runs" / "small")
    return here / "runs" / "small"


# -- training and testing ------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_folder(trained: Path) -> None:
    found = {path.name for path in trained.iterdir()}
    assert found == {"config.yaml", "metrics.csv", "last.ckpt", "learning_curve.png", "results.json"}
    rows = (trained / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 and {"step", "train/return", "train/entropy"} <= set(rows[0].split(","))
    with Image.open(trained / "learning_curve.png") as picture:
        assert picture.width > 300


def test_a_result_has_everything_that_is_needed_to_get_it_again(trained: Path) -> None:
    (record,) = read_returns([trained / "results.json"])
    assert (record["environment"], record["steps"], record["arms"], record["seed"]) == ("bandits", 10, 5, 1_000_000)
    assert (record["agent"], record["trials"], record["run"]) == ("SNAILAgent", 20, "small")
    assert 0 <= record["return"] <= record["optimal"] + 3 * record["ci95"] and record["ci95"] > 0
    assert record["share"] == pytest.approx(100 * record["return"] / record["optimal"])
    assert record["checkpoint"] == file_hash(trained / "last.ckpt")
    training = record["training"]
    assert (training["steps"], training["trials"], training["environment_steps"]) == (4, 32, 320)
    assert training["seconds"] > 0 and training["hardware"] and record["hardware"] and record["versions"]["torch"]
    assert record["config"] == yaml.safe_load((trained / "config.yaml").read_text())["model"]


def test_a_result_stands_beside_greedy_play_of_the_same_trials(trained: Path) -> None:
    (record,) = read_returns([trained / "results.json"])
    returns, optimal = score(Bandits(8, 5, 10), Greedy(), trials=20, seed=1_000_000)
    assert optimal is not None and record["optimal"] == float(optimal.mean())
    assert record["against_greedy"] == pytest.approx(record["return"] - float(returns.mean()))
    assert record["against_greedy_ci95"] > 0


def test_a_test_plays_what_the_checkpoint_holds(trained: Path) -> None:
    agent = SNAILAgent(0, 5, 10, features=4)
    state = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    agent.load_state_dict({name.removeprefix("agent."): weight for name, weight in state.items()})
    (record,) = read_returns([trained / "results.json"])
    many = roll_out(agent, Bandits(2000, 5, 10, seed=9)).returns
    assert abs(float(many.mean()) - record["return"]) < 2.5 * record["ci95"] + 0.1


def test_a_second_test_replaces_its_record_and_another_number_of_trials_is_another(copy_of_run: Path) -> None:
    (before,) = read_returns([copy_of_run / "results.json"])
    assert main(["rl", "test", "--ckpt_path", "runs/small"]) == 0
    (after,) = read_returns([copy_of_run / "results.json"])
    assert after["return"] == before["return"]
    assert main(["rl", "test", "--ckpt_path", "runs/small", "--model.test_trials=9"]) == 0
    assert [record["trials"] for record in read_returns([copy_of_run / "results.json"])] == [20, 9]


def test_rl2_takes_the_place_of_snail_and_mdps_that_of_bandits(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = [arg for arg in SMALL if "features" not in arg]
    options = ["--model.agent=snail.rl.RL2Agent", "--model.agent.units=4", "--model.environment.episodes=2"]
    assert main(["rl", "fit", "--config", "mdp_10", *small, *options]) == 0
    assert main(["rl", "test", "--ckpt_path", "runs/mdp_10"]) == 0
    (record,) = read_returns([here / "runs" / "mdp_10" / "results.json"])
    assert (record["agent"], record["environment"], record["episodes"]) == ("RL2Agent", "tabular-mdps", 2)
    printed = capfd.readouterr().out
    assert "RL2Agent, " in printed and "iteration 4/4  return " in printed
    assert "tabular MDPs, 2 episodes of 10 steps" in printed and "test it:  snail rl test --ckpt_path runs" in printed


def test_fast_dev_run_writes_nothing(here: Path) -> None:
    assert main(["rl", "fit", *SMALL, "--trainer.fast_dev_run=true"]) == 0
    assert not (here / "runs").exists()


# -- kill and resume -----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lightning.pytorch import Callback
from snail.experiments import cli, rl

class Kill(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

instantiate = rl.RLCLI.instantiate_trainer
def with_kill(self):
    trainer = instantiate(self)
    trainer.callbacks.insert(0, Kill())
    return trainer
rl.RLCLI.instantiate_trainer = with_kill
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("signal", "status", "minutes", "kept"), [("SIGKILL", -9, 0, 2), ("SIGTERM", 143, 60, 3)])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(
    copy_of_run: Path, here: Path, signal: str, status: int, minutes: int, kept: int
) -> None:
    options = ["rl", "fit", "--name=killed", *SMALL, f"--checkpoint_minutes={minutes}"]
    command = [sys.executable, "-c", KILLED, "3", signal, *options]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == status
    if signal == "SIGTERM":
        assert done.stderr == (
            "interrupted; the same command with --ckpt_path last goes on from the last checkpoint, if one was due\n"
        )
        assert (here / "runs" / "killed" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    left = torch.load(here / "runs" / "killed" / "last.ckpt", weights_only=True)
    assert left["global_step"] == kept
    assert main([*options, "--ckpt_path=last"]) == 0
    assert not (here / "runs" / "killed-2").exists()
    resumed = torch.load(here / "runs" / "killed" / "last.ckpt", weights_only=True)
    whole = torch.load(copy_of_run / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 4
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    assert (here / "runs" / "killed" / "metrics.csv").read_text() == (copy_of_run / "metrics.csv").read_text()


# -- configs, tables, help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_that_of_its_name(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["rl", "fit", "--config", name, "--print_config"])
    assert done.value.code in (None, 0)
    config = yaml.safe_load(capfd.readouterr().out)["model"]
    settings = dict(config["environment"]["init_args"])
    kind = {"snail.rl.Bandits": Bandits, "snail.rl.TabularMDPs": TabularMDPs}[config["environment"]["class_path"]]
    environment = kind(**settings)
    agent = SNAILAgent(environment.observation_size, environment.actions, environment.steps)
    assert config["agent"] == {"class_path": "snail.rl.SNAILAgent", "init_args": {"features": 32}}
    assert agent.actions == environment.actions and config["minibatches"] <= environment.trials
    sizes = [int(size) for size in name.split("_")[1:]]
    assert sizes == ([settings["steps"], settings["arms"]] if kind is Bandits else [settings["episodes"]])
    assert (cli.SHIPPED / "configs" / "rl" / f"{name}.yaml").read_text().startswith("# ")


def test_there_is_a_config_for_every_published_setting(capfd: pytest.CaptureFixture[str]) -> None:
    published = {f"bandit_{n}_{k}" for n, k in rl.PUBLISHED["bandits"]}
    published |= {f"mdp_{n}" for (n,) in rl.PUBLISHED["tabular-mdps"]}
    assert published == set(CONFIGS) and len(published) == 15
    assert main(["rl", "configs"]) == 0
    printed = capfd.readouterr().out
    for name in CONFIGS:
        assert f"    snail rl fit --config {name}\n" in printed + "\n"


def test_a_config_tells_the_published_figures() -> None:
    for kind, figures in rl.PUBLISHED.items():
        for setting, by_agent in figures.items():
            name = "_".join(["bandit" if kind == "bandits" else "mdp", *map(str, setting)])
            head = (cli.SHIPPED / "configs" / "rl" / f"{name}.yaml").read_text().splitlines()[0]
            for agent, label in (("SNAILAgent", "SNAIL"), ("RL2Agent", "RL²")):
                assert f"{label} {by_agent[agent].removesuffix(' %')}" in head


def record(**changed: object) -> dict[str, object]:
    facts = {"environment": "bandits", "steps": 100, "arms": 5, "seed": 1_000_000, "agent": "SNAILAgent"}
    scores = {"trials": 10_000, "return": 78.126, "ci95": 0.25, "optimal": 83.3, "share": 93.76, "share_ci95": 0.11}
    training = {"steps": 500, "trials": 250_000, "seconds": 3600.0, "hardware": "a processor"}
    return {**facts, **scores, "checkpoint": "ab", "training": training, **changed}


def test_the_table_shows_a_score_beside_the_published_one() -> None:
    mdp = {"environment": "tabular-mdps", "episodes": 10, "horizon": 10, "states": 10, "actions": 5}
    records = [record(), record(**mdp, agent="RL2Agent"), record(**mdp | {"horizon": 5}, ci95=None, training={})]
    assert returns_table(records, markdown=True).splitlines()[2:] == [
        "| SNAILAgent | bandits, 100 pulls of 5 arms | 78.13 ± 0.25 | 93.8 ± 0.1 % | 79.1 ± 1.0 | 10,000 "
        "| 500 iterations, 250,000 trials, 60 min on a processor |",
        "| RL2Agent | tabular MDPs, 10 episodes of 10 steps | 78.13 ± 0.25 | 93.8 ± 0.1 % | 75.2 % | 10,000 "
        "| 500 iterations, 250,000 trials, 60 min on a processor |",
        "| SNAILAgent | tabular MDPs, 10 episodes of 5 steps | 78.13 | 93.8 ± 0.1 % |  | 10,000 |  |",
    ]
    assert returns_table([]) == "no results"


def test_scores_by_hand() -> None:
    returns, optimal = torch.tensor([1.0, 3.0]).double(), torch.tensor([4.0, 4.0]).double()
    scores = rl.scores(returns, optimal)
    half = 1.96 * math.sqrt(2) / math.sqrt(2)
    assert scores == pytest.approx(
        {"trials": 2, "return": 2, "ci95": half, "optimal": 4, "share": 50, "share_ci95": 100 * half / 4}
    )
    assert rl.scores(returns[:1], None) == {"trials": 1, "return": 1.0, "ci95": None}
    differences = rl.against(returns, torch.tensor([1.0, 1.0]).double())
    assert differences == pytest.approx({"against_greedy": 1, "against_greedy_ci95": half})


def test_records_are_merged_by_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge_returns(path, [record()])
    merge_returns(path, [record(**{"return": 1.0}), record(agent="RL2Agent")])
    found = json.loads(path.read_text())
    assert [(r["agent"], r["return"]) for r in found] == [("SNAILAgent", 1.0), ("RL2Agent", 78.126)]


def test_results_are_printed(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "results", str(trained), "--markdown"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("| agent | environment |") and "bandits, 10 pulls of 5 arms" in printed


@pytest.mark.parametrize("argv", [["rl"], ["rl", "--help"]])
def test_help_names_every_command(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = capfd.readouterr().out
    for command in rl.COMMANDS:
        assert f"\n  {command} " in printed
    assert main([]) == 0
    assert "\n  rl " in capfd.readouterr().out


def test_help_explains_options(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rl", "fit", "--help"])
    printed = " ".join(capfd.readouterr().out.split())
    assert "Longest gradient of the policy, and of the value function" in printed and "--model.lambda_" in printed


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["fitt"], "no command 'fitt' of snail rl; choose one of fit, test, classical, configs, results"),
        (["fit", "--config", "nope"], "no config 'nope': neither a file nor one of bandit_1000_50"),
        (["fit", "--model.iterations=0"], "iterations is 0; it must be at least 1"),
        (["fit", "--model.environment.trials=0"], "trials is 0; it must be at least 1"),
        (["fit", "--model.environment.trials=3"], "3 trials cannot be cut into 4 minibatches"),
        (["fit", "--model.nonsense=1"], "nonsense"),
        (["fit", "--model.environment.seed=1000000"], "training and test have one seed"),
        (["fit", "--name=a/b"], "cannot be called 'a/b'"),
        (["fit", "--ckpt_path", "last"], "no run of the name 'bandit_10_5'"),
        (["fit", "--ckpt_path", "small", "--model.environment.trials=9"], "the state is of 8 trials"),
        (["test"], "needs --ckpt_path RUN"),
        (["test", "--ckpt_path", "nope"], "nope does not exist"),
        (["test", "--ckpt_path", "small", "--model.agent.features=6"], "does not fit the model"),
        (["test", "--ckpt_path", "other"], "other/results.json has a record without "),
        (["results", "nope.json"], "there is no nope.json"),
        (["results", "--picture=x.png"], "there is no option --picture=x.png"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_changes_nothing(
    argv: list[str], sentence: str, trained: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("small", "other"):
        (here / name).mkdir()
        shutil.copy(trained / "last.ckpt", here / name / "last.ckpt")
    (here / "other" / "results.json").write_text('[{"accuracy": 1}]')
    before = sorted(here.rglob("*"))
    assert sentence in fails(["rl", *argv], capfd)
    left = [path for path in sorted(here.rglob("*")) if "cache" not in path.parts and path.name != "runs"]
    assert [path for path in left if path not in before and not path.is_dir()] == []


def test_a_few_shot_command_does_not_take_such_a_run(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "agent" in fails(["test", "--ckpt_path", str(trained)], capfd)


def test_agents_are_made_alike() -> None:
    for kind in (SNAILAgent, RL2Agent):
        assert kind(0, 5, 10).actions == 5
