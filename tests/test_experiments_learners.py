"""Every learner behind the same command: one YAML key changes the learner and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from snail.experiments import cli
from snail.experiments.cli import main

SMALL = [
    *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--keep_memory=false"),
    *("--data.steps_per_epoch=2", "--data.batch_size=2", "--data.val_episodes=3", "--data.test_episodes=4"),
    *("--data.train_shots=[1,2]", "--data.eval_shots=[1]"),
]
CONFIG = """\
model:
  learner:
    class_path: snail.SNAIL
    init_args:
      embedding:
        class_path: snail.Conv4
        init_args:
          filters: 4
      embedding_dim: 64
"""
TRAINED = ["SNAIL", "MAML", "FirstOrderMAML", "ANIL", "BOIL", "MetaSGD", "MAMLPlusPlus", "Reptile", "ImplicitMAML"]
METRIC = ["ProtoNet", "MatchingNetwork"]
FLOORS = ["NearestNeighbour", "FineTuning"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def swapped(learner: str) -> list[str]:
    """The config with the learner's name changed, as a user would."""
    Path("config.yaml").write_text(CONFIG.replace("snail.SNAIL", f"snail.{learner}"))
    return ["--config", "config.yaml"]


def results(run: str) -> list[dict[str, object]]:
    records: list[dict[str, object]] = json.loads(Path("runs", run, "results.json").read_text())
    return records


def sentence(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends in."""
    capfd.readouterr()
    assert main(argv) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("snail: error: ")
    return err


@pytest.mark.parametrize("learner", [*TRAINED, *METRIC])
def test_one_key_of_the_config_changes_the_learner(learner: str) -> None:
    given = swapped(learner)
    if learner in METRIC:
        Path("config.yaml").write_text(Path("config.yaml").read_text().replace("      embedding_dim: 64\n", ""))
    assert main(["fit", *given, "--name=run", *SMALL]) == 0
    record = results("run")[-1]
    assert (record["learner"], record["network"]) == (learner, "Conv-4 of 4, max-pooled")
    assert (record["dataset"], record["ways"], record["shots"], record["episodes"]) == ("glyphs", 5, 1, 4)
    assert record["batch_norm"] == "inductive"
    assert isinstance(record["training"], dict) and record["training"]["steps"] == 2


@pytest.mark.parametrize("learner", ["MAMLPlusPlus", "Reptile"])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(learner: str) -> None:
    config = [*swapped(learner), *SMALL, "--trainer.max_epochs=2", "--model.schedule=constant"]
    assert main(["fit", *config, "--name=whole"]) == 0
    assert main(["fit", *config, "--name=cut", "--trainer.max_steps=2"]) == 0
    assert main(["fit", "--ckpt_path=runs/cut", "--trainer.max_steps=-1"]) == 0
    whole, cut = (torch.load(f"runs/{run}/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, cut[name]), name
        else:
            assert value == cut[name], name


@pytest.mark.parametrize(("learner", "precision"), [("MAML", None), ("SNAIL", "bf16-mixed")])
def test_half_precision_is_taken_for_learners_that_keep_their_accuracy(
    learner: str, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snail.experiments.trainer_cli.bf16_is_fast", lambda accelerator: True)
    assert main(["fit", *swapped(learner), "--name=run", *SMALL]) == 0
    assert yaml.safe_load(Path("runs/run/config.yaml").read_text())["trainer"]["precision"] == precision
    assert results("run")[-1]["precision"] == precision or "32-true"


def test_an_option_that_is_null_is_so_when_the_run_is_read_again() -> None:
    Path("config.yaml").write_text(
        CONFIG.replace("snail.SNAIL", "snail.MAML")
        .replace("filters: 4", "filters: 4\n          out_features: null")
        .replace("embedding_dim: 64", "embedding_dim: 4")
    )
    assert main(["fit", "--config=config.yaml", "--name=run", *SMALL]) == 0
    written = yaml.safe_load(Path("runs/run/config.yaml").read_text())["model"]["learner"]["init_args"]
    assert written["embedding"]["init_args"]["out_features"] is None
    assert main(["test", "--ckpt_path=runs/run"]) == 0


# -- what is not trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", FLOORS)
def test_floors_are_scored_without_training(learner: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = swapped(learner)
    if learner == "NearestNeighbour":
        Path("config.yaml").write_text(Path("config.yaml").read_text().replace("      embedding_dim: 64\n", ""))
    assert main(["test", *given, "--name=floor", *SMALL]) == 0
    (record,) = results("floor")
    assert (record["learner"], record["episodes"], record["shots"]) == (learner, 4, 1)
    assert "checkpoint" not in record and "training" not in record
    assert yaml.safe_load(Path("runs/floor/config.yaml").read_text())["data"]["init_args"]["test_episodes"] == 4
    assert "score it with `snail test`" in sentence(["fit", *given, *SMALL], capfd)


def test_a_floors_record_tells_network_and_steps() -> None:
    given = [*swapped("FineTuning"), "--model.learner.embedding.strided=true", "--model.learner.steps=2"]
    assert main(["test", *given, "--name=floor", *SMALL]) == 0
    (record,) = results("floor")
    assert (record["network"], record["inner_steps"]) == ("Conv-4 of 4, strided", 2)


@pytest.mark.parametrize("name", ["omniglot_nearest_neighbour", "omniglot_fine_tuning"])
def test_configs_name_the_command_that_scores_a_floor(name: str) -> None:
    assert f"    snail test --config {name}" in cli.list_configs()


# -- training on more than the training classes, and on more ways than are scored ---------------------------------


def test_a_final_run_has_no_validation_and_says_what_it_trained_on(
    omniglot_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.root", str(omniglot_root), *SMALL[:-2], "--data.train_ways=7", "--data.eval_shots=[1]"]
    assert main(["fit", "--config=omniglot_protonet", *data, "--model.learner.embedding.filters=4"]) == 0
    printed = capfd.readouterr().out
    assert "there was no validation; the last weights, of step 2" in printed
    assert not Path("runs/omniglot_protonet/best.ckpt").exists()
    assert main(["test", "--ckpt_path=runs/omniglot_protonet", "--data.ways=20"]) == 0
    (record,) = results("omniglot_protonet")
    assert (record["ways"], record["learner"]) == (20, "ProtoNet")
    assert isinstance(record["training"], dict) and record["training"]["on"] == "training and validation characters"
    assert "nothing to validate on" in sentence(["validate", "--ckpt_path=runs/omniglot_protonet"], capfd)


def test_more_training_ways_than_a_learner_answers_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    found = sentence(["fit", *swapped("MAML"), *SMALL, "--data.train_ways=7"], capfd)
    assert "train_ways is 7, but MAML answers 5 ways" in found


# -- regression --------------------------------------------------------------------------------------------------


def test_the_sinusoids_are_trained_tested_and_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--trainer.max_epochs=1", "--data.steps_per_epoch=2", "--data.val_episodes=3", "--data.test_episodes=4"]
    assert main(["fit", "--config=sinusoid_maml", *small, "--trainer.accelerator=cpu", "--keep_memory=false"]) == 0
    assert "best validation mean squared error" in capfd.readouterr().out
    assert {"curves.png", "learning_curve.png"} <= {path.name for path in Path("runs/sinusoid_maml").iterdir()}
    assert main(["test", "--ckpt_path=runs/sinusoid_maml"]) == 0
    records = results("sinusoid_maml")
    assert [(r["shots"], r["inner_steps"]) for r in records] == [(k, n) for k in (5, 10, 20) for n in (0, 1, 5, 10)]
    for record in records:
        assert (record["dataset"], record["ways"], record["queries"], record["episodes"]) == ("sinusoid", None, 100, 4)
        assert isinstance(record["mse"], float) and "accuracy" not in record
    assert "mean squared error (95 % interval)" in capfd.readouterr().out


def test_a_classifier_is_refused_where_there_are_no_classes(capfd: pytest.CaptureFixture[str]) -> None:
    found = sentence(["fit", "--data=Sinusoid", *SMALL], capfd)
    assert "SNAIL answers with classes, of which snail.datasets.Sinusoid has none" in found


# -- what can go wrong in the inner loop --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.learner.init_args.inner_rate=1e30"], "the inner loop diverged at step 1 with the rate 1e+30"),
        (["--model.learner.init_args.embedding_dim=null"], "answers with (64,) values an item, but episodes have 5"),
        (["--model.learner.init_args.adapt=[body.*]"], "matches none of the parameters"),
        (["--model.learner.init_args.batch_norm=transductif"], "transductif"),
    ],
)
def test_bad_options_of_the_inner_loop_end_in_one_sentence(
    options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in sentence(["fit", *swapped("MAML"), *SMALL, *options], capfd)
    assert not Path("runs").exists()
