from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from snail import SNAIL, Episode, FewShot, Result, evaluate
from snail.datasets import Glyphs
from snail.experiments import cli, pictures, runs, trainer_cli
from snail.experiments.cli import main
from snail.experiments.pictures import draw_learning_curve, results_hash
from snail.experiments.published import with_published
from snail.files import file_hash
from snail.results import read_results, record_text

SMALL = [
    *("--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true"),
    *("--data.steps_per_epoch=3", "--data.batch_size=2", "--data.val_episodes=4", "--data.test_episodes=5"),
    *("--data.train_shots=[1,2]", "--data.eval_shots=[1]", "--model.learner.embedding.filters=4"),
    "--keep_memory=false",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small run in runs/small."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--name=small", *SMALL]) == 0
    return folder


@pytest.fixture
def copy_of_run(trained: Path, here: Path) -> Path:
    shutil.copytree(trained / "runs", here / "runs")
    return here / "runs" / "small"


def fails(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends in, after a look that it is one and that the status tells."""
    capfd.readouterr()
    assert main(argv) != 0
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert err.count("\n") == 1 and err.startswith("snail: error: ")
    return err


# -- training -----------------------------------------------------------------------------------------------------


def test_fit_leaves_everything_in_the_runs_folder(trained: Path) -> None:
    found = {path.name for path in (trained / "runs" / "small").iterdir()}
    drawn = {"learning_curve.png", "episodes.png", "mistakes.png"}
    assert found == {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "results.json"} | drawn


def test_fit_says_which_levers_it_took_and_each_can_be_switched_off(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last_layout: list[bool] = []
    real = FewShot.training_step

    def watched(self: FewShot, batch: Episode, batch_idx: int) -> Tensor:
        weight = self.learner.embedding.layers[4].weight
        last_layout.append(weight.is_contiguous(memory_format=torch.channels_last))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(FewShot, "training_step", watched)
    quick = [*SMALL[:-1], "--trainer.max_epochs=1", "--data.val_episodes=0"]
    monkeypatch.setattr(trainer_cli, "bf16_is_fast", lambda accelerator: True)
    monkeypatch.setattr(trainer_cli, "keep_memory", lambda: True)
    assert main(["fit", *[arg for arg in quick if "precision" not in arg]]) == 0
    assert "; precision bf16-mixed, channels last, memory kept; run folder" in capfd.readouterr().out
    assert set(last_layout) == {True}
    last_layout.clear()
    monkeypatch.setattr(trainer_cli, "bf16_is_fast", lambda accelerator: False)
    monkeypatch.setattr(trainer_cli, "keep_memory", lambda: False)
    assert main(["fit", "--channels_last=false", *[arg for arg in quick if "precision" not in arg]]) == 0
    assert "; precision 32-true (no fast bf16 here), memory not kept (no glibc); run" in capfd.readouterr().out
    assert set(last_layout) == {False}
    monkeypatch.setattr(trainer_cli, "keep_memory", lambda: pytest.fail("it was switched off"))
    assert main(["fit", "--keep_memory=false", *quick]) == 0
    assert "; precision 32-true, channels last; run folder" in capfd.readouterr().out


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_an_end_of_another_process_is_told_in_one_sentence(
    how: str, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"[gloo/transport/tcp/pair.cc:554] Connection {how} by peer [127.0.0.1]:23456")

    monkeypatch.setattr(FewShot, "training_step", fail)
    assert "another process of this training ended" in fails(["fit", *SMALL], capfd)


def test_fit_on_built_in_data_prints_and_keeps_result_and_comparisons(trained: Path) -> None:
    records = json.loads((trained / "runs" / "small" / "results.json").read_text())
    names, built_in = [(r["learner"], r["note"]) for r in records], "prototype loss 1 over the batch"
    assert names == [("NearestNeighbour", "on pixels"), ("SNAIL", "untrained"), ("SNAIL", built_in)]
    for record in records:
        assert (record["dataset"], record["split"]) == ("glyphs", "seed0/test")
        assert (record["ways"], record["shots"], record["episodes"], record["seed"]) == (5, 1, 5, 0)
        assert record["batch_norm"] == "inductive" and 0 <= record["accuracy"] <= 100 and record["ci95"] >= 0
    assert records[-1]["checkpoint"] == file_hash(trained / "runs" / "small" / "best.ckpt")


def test_fit_of_a_taken_name_gets_a_number(copy_of_run: Path) -> None:
    before = (copy_of_run / "config.yaml").read_text()
    assert main(["fit", "--name=small", *SMALL, "--trainer.max_epochs=1"]) == 0
    assert (copy_of_run.parent / "small-2" / "last.ckpt").is_file()
    assert (copy_of_run / "config.yaml").read_text() == before


def test_fit_says_nothing_but_its_own(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snail.experiments", "fit", "--name=quiet", *SMALL],
        capture_output=True, text=True, cwd=here, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    for noise in ("Tip", "GPU", "TPU", "deprecated", "warn", "Seed set"):
        assert noise not in done.stdout
    assert "step 3/6" in done.stdout and "step 6/6" in done.stdout  # progress without a terminal
    assert "runs/quiet/results.json" in done.stdout


def test_fit_ends_in_one_sentence_when_the_loss_is_not_a_number(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SNAIL, "answer", lambda self, s, y, q: (q.sum(-1, keepdim=True) * torch.nan).expand(-1, -1, 5))
    assert "loss is nan at step 0" in fails(["fit", *SMALL], capfd)


def test_fast_dev_run_writes_nothing(here: Path) -> None:
    assert main(["fit", *SMALL, "--trainer.fast_dev_run=true"]) == 0
    assert not (here / "runs").exists()


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_fit_works_in_every_precision(here: Path, precision: str) -> None:
    assert main(["fit", "--name=precise", *SMALL, "--trainer.max_epochs=1", f"--trainer.precision={precision}"]) == 0


def test_fit_without_validation_ends_with_what_it_has(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--name=blind", *SMALL, "--trainer.limit_val_batches=0"]) == 0
    assert "there was no validation; the last weights, of step 6" in capfd.readouterr().out
    assert json.loads((here / "runs" / "blind" / "results.json").read_text())[-1]["learner"] == "SNAIL"


def test_fit_on_omniglot_ends_with_the_test_command(
    here: Path, omniglot_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "omniglot_5way", "--data.root", str(omniglot_root), *SMALL]) == 0
    assert "snail test --ckpt_path runs/omniglot_5way" in capfd.readouterr().out
    assert not (here / "runs" / "omniglot_5way" / "results.json").exists()
    assert main(["test", "--ckpt_path", "runs/omniglot_5way"]) == 0
    (record,) = json.loads((here / "runs" / "omniglot_5way" / "results.json").read_text())
    assert (record["dataset"], record["split"], record["episodes"]) == ("omniglot", "vinyals/test", 5)


# -- kill and resume ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lightning.pytorch import Callback
from snail.experiments import cli, pictures, runs, trainer_cli

class Kill(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

instantiate = trainer_cli.SnailCLI.instantiate_trainer
def with_kill(self):
    trainer = instantiate(self)
    trainer.callbacks.insert(0, Kill())
    return trainer
trainer_cli.SnailCLI.instantiate_trainer = with_kill
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("step", [2, 3, 4, 6])  # within an epoch, at the end of one, after it, at the end of all
def test_fit_killed_and_resumed_ends_with_the_same_bits(copy_of_run: Path, here: Path, step: int) -> None:
    options = ["fit", "--name=killed", *SMALL, "--checkpoint_minutes=0"]
    command = [sys.executable, "-c", KILLED, str(step), "SIGKILL", *options]
    killed = subprocess.run(command, cwd=here, capture_output=True)
    assert killed.returncode == -9
    left = torch.load(here / "runs" / "killed" / "last.ckpt", weights_only=True)
    assert left["global_step"] == step - 1  # the checkpoint of the step before the kill
    assert main([*options, "--ckpt_path=last"]) == 0
    assert not (here / "runs" / "killed-2").exists()
    resumed = torch.load(here / "runs" / "killed" / "last.ckpt", weights_only=True)
    whole = torch.load(copy_of_run / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 6
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    assert (here / "runs" / "killed" / "metrics.csv").read_text() == (copy_of_run / "metrics.csv").read_text()
    scores = [json.loads((here / "runs" / run / "results.json").read_text())[-1] for run in ("killed", "small")]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]


def test_what_is_drawn_for_distorted_images_goes_on_after_a_kill(here: Path) -> None:
    options = [*SMALL, "--data.distortion=1", "--checkpoint_minutes=0"]
    assert main(["fit", "--name=whole", *options]) == 0
    command = [sys.executable, "-c", KILLED, "2", "SIGKILL", "fit", "--name=killed", *options]
    assert subprocess.run(command, cwd=here, capture_output=True).returncode == -9
    assert main(["fit", "--name=killed", *options, "--ckpt_path=last"]) == 0
    resumed, whole = (
        torch.load(here / "runs" / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("killed", "whole")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(("signal", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_fit_interrupted_says_how_to_go_on_and_leaves_its_curve(here: Path, signal: str, status: int) -> None:
    command = [sys.executable, "-c", KILLED, "4", signal, "fit", *SMALL, "--checkpoint_minutes=0"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr == (
        "interrupted; the same command with --ckpt_path last goes on from the last checkpoint, if one was due\n"
    )
    run = here / "runs" / "glyphs_5way"
    assert (run / "last.ckpt").is_file()
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_fit_last_with_none_found_is_an_error(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no run of the name 'glyphs_5way'" in fails(["fit", "--ckpt_path", "last"], capfd)
    assert not (here / "runs").exists()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(
    copy_of_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_hash(copy_of_run / "last.ckpt")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, copy_of_run / "last.ckpt")
    assert file_hash(copy_of_run / "last.ckpt") == before


# -- validate and test --------------------------------------------------------------------------------------------


def test_test_uses_the_runs_own_config_and_flags_override_it(copy_of_run: Path) -> None:
    assert main(["test", "--ckpt_path", str(copy_of_run), "--data.test_episodes=7", "--data.seed=3"]) == 0
    record = json.loads((copy_of_run / "results.json").read_text())[-1]
    assert (record["episodes"], record["seed"], record["shots"]) == (7, 3, 1)


def test_test_scores_as_evaluate_does(copy_of_run: Path) -> None:
    config = yaml.safe_load((copy_of_run / "config.yaml").read_text())
    from snail import Conv4

    learner = SNAIL(Conv4(filters=4), 64, ways=5, max_shots=config["data"]["init_args"]["train_shots"][1])
    state = torch.load(copy_of_run / "best.ckpt", weights_only=True)["state_dict"]
    learner.load_state_dict({name.removeprefix("learner."): weight for name, weight in state.items()})
    result = evaluate(learner, Glyphs().episodes("test", shots=1, count=5))
    record = json.loads((copy_of_run / "results.json").read_text())[-1]
    assert (record["accuracy"], record["ci95"]) == (result.accuracy, result.ci95)
    assert record["half_of_mistakes"] == result.half_of_mistakes > 0


@pytest.mark.parametrize("mistaken", [True, False])
def test_test_draws_what_was_mistaken(copy_of_run: Path, monkeypatch: pytest.MonkeyPatch, mistaken: bool) -> None:
    drawn: list[tuple[str, Tensor]] = []

    def draw(rows: list[tuple[str, Tensor]], picture: Path, **about: object) -> None:
        drawn.extend(rows)
        real(rows, picture, **about)

    real = pictures.draw_images
    monkeypatch.setattr(pictures, "draw_images", draw)
    if not mistaken:
        monkeypatch.setattr(Result, "half_of_mistakes", 0)
    (copy_of_run / "mistakes.png").unlink()
    assert main(["test", "--ckpt_path", str(copy_of_run)]) == 0
    assert (copy_of_run / "mistakes.png").exists() == bool(drawn) == mistaken
    images = Glyphs().images("test")
    for name, row in drawn:
        which, told = name.split("\n")
        wrong, asked = map(int, told.removesuffix(" wrong").split(" of "))
        assert 0 < wrong <= asked and len(row) == 8
        number, each = images.class_names.index(which), images.counts[0]
        of_class = images.take(torch.arange(each * number, each * (number + 1)))
        assert all((of_class == image).flatten(1).all(1).any() for image in row)


def test_a_test_of_nothing_draws_nothing(copy_of_run: Path) -> None:
    (copy_of_run / "mistakes.png").unlink()
    assert main(["test", "--ckpt_path", str(copy_of_run), "--trainer.limit_test_batches=0"]) == 0
    assert not (copy_of_run / "mistakes.png").exists()


def test_test_keeps_the_models_own_shots(copy_of_run: Path) -> None:
    """A model built for 2 shots is scored at 1, also where its data are then asked for 1 only."""
    assert main(["test", "--ckpt_path", str(copy_of_run), "--data.train_shots=[1,1]", "--data.eval_shots=[1]"]) == 0


def test_resuming_from_an_older_checkpoint_is_a_run_of_its_own(copy_of_run: Path) -> None:
    last = file_hash(copy_of_run / "last.ckpt")
    assert main(["fit", "--ckpt_path", str(copy_of_run / "best.ckpt")]) == 0
    assert (copy_of_run.parent / "small-2" / "last.ckpt").exists()
    assert file_hash(copy_of_run / "last.ckpt") == last


def test_a_resume_that_fails_leaves_the_config(copy_of_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (copy_of_run / "config.yaml").read_text()
    fails(["fit", "--ckpt_path", str(copy_of_run), "--model.learner.embedding.filters=8"], capfd)
    assert (copy_of_run / "config.yaml").read_text() == before


def test_a_checkpoint_file_alone_is_enough(copy_of_run: Path, here: Path) -> None:
    alone = here / "elsewhere" / "model.ckpt"
    alone.parent.mkdir()
    shutil.copy(copy_of_run / "best.ckpt", alone)
    assert main(["validate", "--ckpt_path", str(alone)]) == 0
    (record,) = json.loads((alone.parent / "results.json").read_text())
    assert (record["split"], record["episodes"]) == ("seed0/val", 4)


def test_a_second_test_replaces_its_record(copy_of_run: Path) -> None:
    before = json.loads((copy_of_run / "results.json").read_text())
    assert main(["test", "--ckpt_path", str(copy_of_run)]) == 0
    after = json.loads((copy_of_run / "results.json").read_text())
    assert [r["accuracy"] for r in after] == [r["accuracy"] for r in before]


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["fitt"], "no command 'fitt'"),
        (["fit", "--config", "nope"], "no config 'nope'"),
        (["fit", "--config", "broken.yaml"], "parsing config"),
        (["fit", "--config", "misspelt.yaml"], "model.schedul"),
        (["fit", "--model.schedul=cosine2"], "cosine2"),
        (["fit", "--data.ways=x"], "ways"),
        (["fit", "--data.ways=0"], "ways is 0"),
        (["fit", "--data.ways=500"], "500 ways are asked of 'glyphs/seed0/val', which has 100 classes"),
        (["fit", "--data.queries=30"], "30 queries need"),
        (["fit", "--data.train_shots=[5,1]"], r"train_shots is \[5, 1\]"),
        (["fit", "--data.eval_shots=[]"], "eval_shots is empty"),
        (["fit", "--data.nonsense=1"], "nonsense"),
        (["fit", "--trainer.max_epoch=1"], "max_epoch"),
        (["fit", "--data.test_episodes=0"], "0 episodes"),
        (["fit", "--model.warmup=-1"], "warmup is -1"),
        (["fit", "--name=a/b"], "cannot be called 'a/b'"),
        (["fit", "--model.learner.embedding=torch.nn.Flatten"], "784 channels, but embedding_dim is 64"),
        (["fit", "--config", "resume.yaml"], "give --ckpt_path as an option"),
        (["fit", "--data=Omniglot", "--data.root=empty"], "empty"),
        (["test"], "needs --ckpt_path RUN"),
        (["test", "--ckpt_path", "nope"], "nope does not exist"),
        (["test", "--ckpt_path", "empty"], "holds no best.ckpt"),
        (["test", "--ckpt_path", "cut.ckpt"], "cut.ckpt cannot be read"),
        (["test", "--ckpt_path", "plain.ckpt"], "no config of a snail run"),
        (["test", "--ckpt_path", "small", "--model.learner.embedding.filters=8"], "does not fit the model"),
        (["test", "--ckpt_path", "small", "--data.ways=4"], "ways = 5, but 4 are asked for"),
        (["test", "--ckpt_path", "small", "--data.eval_shots=[3]"], "max_shots = 2, but 3 are asked for"),
        (["results", "nope.json"], "there is no nope.json"),
        (["predict", "--ckpt_path", "nope", "--support", "a", "--query", "b"], "nope does not exist"),
        (["predict", "--ckpt_path", "small"], "required: --support, --query"),
        (["data", "check", "folder", "--root", "empty"], "no folder with pictures"),
        (["bench", "sharing", "--pairs=0"], "pairs"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_changes_nothing(
    argv: list[str], sentence: str, trained: Path, here: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", no_network)
    monkeypatch.setattr("snail.datasets.download._PAUSE", 0)
    whole = (trained / "runs" / "small" / "best.ckpt").read_bytes()
    (here / "broken.yaml").write_text("model: [unclosed")
    (here / "misspelt.yaml").write_text("model:\n  schedul: cosine\n")
    (here / "resume.yaml").write_text("ckpt_path: last\n")
    (here / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, here / "plain.ckpt")
    (here / "small").mkdir()
    (here / "small" / "best.ckpt").write_bytes(whole)
    (here / "empty").mkdir()
    before = sorted(here.rglob("*"))
    assert __import__("re").search(sentence, fails(argv, capfd))
    assert [path for path in sorted(here.rglob("*")) if "cache" not in path.parts] == before


def test_debug_shows_the_traceback(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--data.ways=0", "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


# -- trust --------------------------------------------------------------------------------------------------------


class Command:
    """A pickle of this runs a command when it is loaded the ordinary way."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch owned",)


def test_a_checkpoint_that_would_run_code_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "snail_config": Command()}, here / "evil.ckpt")
    (here / "evil2.ckpt").write_bytes(pickle.dumps(Command()))
    for name in ("evil.ckpt", "evil2.ckpt"):
        assert "cannot be read as a checkpoint" in fails(["test", "--ckpt_path", name], capfd)
    assert not (here / "owned").exists()


def embedding(value: object) -> dict[str, object]:
    return {"model": {"learner": {"class_path": "snail.SNAIL", "init_args": {"embedding": value}}}}


def optimizer(class_path: str, **init_args: object) -> dict[str, object]:
    return {"model": {"optimizer": {"class_path": class_path, "init_args": init_args}}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"learner": {"class_path": "foreign.Learner"}}},
        {"model": {"optimizer": "foreign.Optimizer"}},
        {"trainer": {"callbacks": [{"class_path": "foreign.Callback"}]}},
        {"data": {"class_path": "foreign"}},
    ],
)
def test_a_config_that_names_a_foreign_package_is_refused_unless_trusted(change: dict[str, object]) -> None:
    checkpoint = {"snail_config": yaml.safe_dump(change)}
    with pytest.raises(ValueError, match=r"names 'foreign.*add --trust foreign"):
        runs.checkpoint_config(checkpoint, Path("x.ckpt"))
    assert runs.checkpoint_config(checkpoint, Path("x.ckpt"), ["foreign"]) == change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (optimizer("torch.os.system", command="touch owned"), "no network, optimiser or data"),
        (optimizer("torch.hub.load", source="local"), "no network, optimiser or data"),
        (optimizer("torch.hub.load_state_dict_from_url", url="file:///x"), "no network, optimiser or data"),
        (optimizer("torch.load", weights_only=False), "no network, optimiser or data"),
        (optimizer("torch.utils.cpp_extension.subprocess.Popen"), "no network, optimiser or data"),
        (optimizer("snail.experiments.runs.hashlib.os.system"), "no network, optimiser or data"),
        (embedding({"class_path": "torchvision.os.system"}), "no network, optimiser or data"),
        (embedding("{class_path: foreign.Network}"), "hides a config"),
        (embedding("class_path: foreign.Network"), "hides a config"),
        (embedding("x\n{class_path: foreign.Network}"), "hides a config"),
        (embedding("file-without-ending"), "points to another file"),
        ({"model": "/somewhere/else.yaml"}, "points to another file"),
        ({"config": "elsewhere"}, "not that of a snail run"),
        ({"model.learner": "foreign.Network"}, "not that of a snail run"),
        ({"model": {"learner.class_path": "foreign.Network"}}, "keys are words without a dot"),
    ],
)
def test_a_config_that_would_do_more_than_name_networks_is_refused(
    change: dict[str, object], sentence: str, here: Path
) -> None:
    (here / "file-without-ending").write_text("class_path: foreign.Network")
    with pytest.raises(ValueError, match=sentence):
        runs.checkpoint_config({"snail_config": yaml.safe_dump(change)}, Path("x.ckpt"))


def test_a_config_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="nested more than"):
        runs.checkpoint_config({"snail_config": "model: &a\n  learner: *a\n"}, Path("x.ckpt"))


def test_names_and_roots_with_dots_are_no_classes() -> None:
    config = {"name": "my.run", "data": {"class_path": "snail.datasets.Omniglot", "init_args": {"root": "my.data"}}}
    assert runs.checkpoint_config({"snail_config": yaml.safe_dump(config)}, Path("x.ckpt")) == config


# -- configs and help ---------------------------------------------------------------------------------------------

CONFIGS = sorted(path.stem for path in (cli.SHIPPED / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_builds_its_model(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", name, "--print_config"])
    assert done.value.code in (None, 0)
    config = yaml.safe_load(capfd.readouterr().out)
    assert config["model"]["learner"]["class_path"].startswith("snail.")
    assert (cli.SHIPPED / "configs" / f"{name}.yaml").read_text().startswith("# ")
    size = {"Glyphs": (1, 28, 28), "Omniglot": (1, 28, 28), "MiniImageNet": (3, 84, 84)}
    image = size.get(config["data"]["class_path"].rpartition(".")[2])
    learner = config["model"]["learner"]["init_args"]
    if image is not None and learner.get("embedding"):  # it takes such images and gives what the learner awaits
        embedding = locate(learner["embedding"]["class_path"])(**learner["embedding"]["init_args"]).eval()
        with torch.no_grad():
            channels = embedding(torch.zeros(2, *image)).shape[1]
        assert channels == learner.get("embedding_dim", channels)


def test_another_embedding_has_its_own_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.learner.embedding=snail.ResidualEmbedding", "--print_config"])
    embedding = yaml.safe_load(capfd.readouterr().out)["model"]["learner"]["init_args"]["embedding"]
    assert (embedding["init_args"]["in_channels"], embedding["init_args"]["out_features"]) == (3, 384)


def test_configs_lists_every_config_with_the_results_it_gave(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    printed = capfd.readouterr().out
    for name in CONFIGS:
        assert name in printed
        results = cli.SHIPPED / "results" / name / "results.json"
        for record in json.loads(results.read_text()) if results.exists() else []:
            assert record_text(record) in printed


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_names_every_command(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = capfd.readouterr().out
    for command in ("fit", "validate", "test", "predict", "export", "data", "configs", "results", "bench"):
        assert f"\n  {command} " in printed


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (
            ["fit", "--help"],
            ["Optimiser steps over which the learning rate", "Name of the run", "--trainer.max_epochs"],
        ),
        (
            ["fit", "--data.help=Omniglot"],
            ["Folder that holds", "Queries of each class (of each task) in a"],
        ),
        (["fit", "--model.learner.help=SNAIL"], ["First dilation of the temporal convolutions"]),
    ],
)
def test_help_explains_options_with_their_docstrings(
    argv: list[str], lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code in (None, 0)
    printed = " ".join(capfd.readouterr().out.split())
    for line in lines:
        assert line in printed


def test_results_prints_tables(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(trained / "runs" / "small"), "--markdown"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("**glyphs seed0/test**: accuracy in %") == 1 and printed.count("| inductive | 5 |") == 3


class Volumes(torch.nn.Module):
    """An embedding with a convolution of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv3d(1, 2, (1, 14, 14), stride=14)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.convolution(images.unsqueeze(2)).flatten(1)
        return features


def test_a_network_without_such_a_layout_trains_too(here: Path) -> None:
    small = [arg for arg in SMALL if "embedding" not in arg]
    embedding = [f"--model.learner.embedding={Volumes.__module__}.Volumes", "--model.learner.embedding_dim=8"]
    assert main(["fit", *small, *embedding, "--trainer.max_epochs=1", "--data.val_episodes=0"]) == 0


def test_results_that_ship_begin_with_the_papers_data_and_learner(capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["results", "--markdown"]) == 0
    tables = [text.splitlines() for text in capfd.readouterr().out.strip().split("\n\n**")]
    titles = [lines[0].strip("*").split("**")[0] for lines in tables]
    assert titles[0] == "omniglot random/test" and titles[1].startswith("omniglot ")
    for lines in tables:
        learners = [line.split(" | ")[0].strip("| ").startswith("SNAIL") for line in lines if line.startswith("| ")][2:]
        assert learners == sorted(learners, reverse=True)


@pytest.mark.parametrize(("heads", "panels"), [("step,train/loss", 1), ("step,train/loss,val/accuracy_1shot", 2)])
def test_a_learning_curve_has_a_panel_for_validation_where_there_was_one(
    heads: str, panels: int, tmp_path: Path
) -> None:
    (tmp_path / "metrics.csv").write_text(f"{heads}\n1,0.5{',40' * (panels - 1)}\n2,0.4{',50' * (panels - 1)}\n")
    draw_learning_curve(tmp_path / "metrics.csv", tmp_path / "curve.png", chance=20, title="a run")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width == 540 * panels


def test_results_of_the_data_that_is_asked_for_and_without_stages(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = {"dataset": "a", "split": "s/test", "learner": "L", "run": "first", "ways": 5, "shots": 1, "episodes": 2}
    first |= {"batch_norm": "inductive", "accuracy": 50.0, "ci95": 1.0}
    second = first | {"run": "second", "training": {"started_from": {"run": "first"}}}
    Path("both.json").write_text(json.dumps([first, second, first | {"dataset": "b", "run": "other"}]))
    for options, expected in (
        ([], ["first", "second", "other"]),
        (["--outcomes"], ["second", "other"]),
        (["--data", "a"], ["first", "second"]),
        (["--data=a", "--data", "b", "--outcomes", "--markdown"], ["second", "other"]),
    ):
        capfd.readouterr()
        assert main(["results", "both.json", *options]) == 0
        printed = capfd.readouterr().out
        assert [run for run in ("first", "second", "other") if run in printed] == expected
    assert "there is no result on 'c'; leave --data out" in fails(["results", "--data=c", "both.json"], capfd)


def test_results_are_drawn(trained: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = trained / "runs" / "small"
    assert main(["results", "--picture=drawn.png", str(run)]) == 0
    records = [with_published(record) for record in read_results([run / "results.json"])]
    with Image.open("drawn.png") as picture:
        assert picture.width > 300 and picture.info["Source"] == results_hash(records)
    other = [records[0] | {"accuracy": records[0]["accuracy"] + 1}, *records[1:]]
    assert results_hash(other) != results_hash(records)
    assert "needs a value" in fails(["results", "--picture"], capfd)
    assert "there is no option --image=x.png; it is snail results [--markdown] [--outcomes] [--data NAME]" in fails(
        ["results", "--image=x.png"], capfd
    )
    Path("none.json").write_text("[]")
    assert "no accuracy among the results" in fails(["results", "--picture=none.png", "none.json"], capfd)
