import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from snail import (
    ANIL,
    BOIL,
    MAML,
    SNAIL,
    Conv4,
    EmbeddingLearner,
    Episode,
    FewShot,
    FirstOrderMAML,
    ImplicitMAML,
    Learner,
    MAMLPlusPlus,
    MatchingNetwork,
    MetaSGD,
    NearestNeighbour,
    ProtoNet,
    Reptile,
    evaluate,
)
from snail.datasets import Episodes, ImageData, Images
from snail.datasets.module import TrainingBatches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]


class Tiny(ImageData):
    """Made-up images of 16x16 pixels."""

    dataset = "tiny"
    split = "halves"

    def load(self, part: str) -> Images:
        classes = {"train": 8, "val": 4, "test": 5}[part]
        noise = np.random.default_rng(classes)
        centre = noise.integers(108, 148, (classes, 1, 16, 16))
        array = centre + noise.integers(-100, 100, (classes, 6, 16, 16))
        return Images.from_classes(array.astype(np.uint8), [f"{part}{i}" for i in range(classes)])


def tiny(**changed: Any) -> Tiny:
    settings: dict[str, Any] = {"ways": 2, "train_shots": (1, 3), "batch_size": 3, "steps_per_epoch": 3}
    settings |= {"eval_shots": [1, 2], "val_episodes": 9, "test_episodes": 8, "eval_queries": 2}
    return Tiny(**(settings | changed))


def snail(ways: int = 2) -> SNAIL:
    return SNAIL(Conv4(filters=4, image_size=16, out_features=4), 4, ways=ways, max_shots=3)


class Dropping(EmbeddingLearner):
    """A small learner whose training needs a random generator and running statistics."""

    def __init__(self, dropout: float = 0.3) -> None:
        convolution = nn.Sequential(nn.Conv2d(1, 3, 8, stride=4), nn.BatchNorm2d(3), nn.ReLU())
        super().__init__(nn.Sequential(convolution, nn.Dropout(dropout), nn.Flatten(), nn.Linear(27, 4)))

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        of_class = nn.functional.one_hot(support_y, 2).to(support.dtype)
        centre = of_class.mT @ support / of_class.sum(1)[..., None]
        return -torch.cdist(query, centre)


class Constant(Learner):
    """A learner whose loss is a number times its parameter, which starts at one."""

    def __init__(self, loss: float = 1.0) -> None:
        super().__init__()
        self.scale = loss
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Episode] = []

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return self.weight * query_x.flatten(2).mean(-1, keepdim=True) * torch.ones(2)

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(episode)
        return self.scale * self.weight, {"weight": self.weight.detach()}


def trainer(**changed: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return Trainer(**(quiet | changed))


# -- it runs -----------------------------------------------------------------------------------------------------


def gradient_based(kind: Callable[..., Learner]) -> Callable[[], Learner]:
    return lambda: kind(Conv4(filters=4, image_size=16, out_features=None, strided=True), 4, 2)


def metric_based(kind: Callable[..., Learner]) -> Callable[[], Learner]:
    return lambda: kind(Conv4(filters=4, image_size=16))


GRADIENT_BASED = (MAML, FirstOrderMAML, ANIL, BOIL, MetaSGD, MAMLPlusPlus, Reptile, ImplicitMAML)
LEARNERS = {"SNAIL": snail, "Dropping": Dropping}
LEARNERS |= {kind.__name__: gradient_based(kind) for kind in GRADIENT_BASED}
LEARNERS |= {kind.__name__: metric_based(kind) for kind in (ProtoNet, MatchingNetwork)}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
def test_fast_dev_run(learner: Callable[[], Learner], stage: str) -> None:
    run = trainer(fast_dev_run=True)
    getattr(run, stage)(FewShot(learner()), datamodule=tiny())
    names = {"fit": {"train/loss", "val/accuracy"}, "validate": {"val/accuracy", "val/accuracy_1shot"}, "test": set()}
    assert names[stage] <= set(run.callback_metrics)
    assert run.state.finished


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_fit_without_validation_episodes_runs() -> None:
    run = trainer(max_epochs=1)
    run.fit(FewShot(Dropping()), datamodule=tiny(val_episodes=0))
    assert run.state.finished and run.global_step == 3
    assert "val/accuracy" not in run.callback_metrics


def losses_of_60_steps(module: FewShot) -> list[float]:
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer(max_epochs=1, callbacks=[Watch()]).fit(
        module, datamodule=tiny(steps_per_epoch=60, batch_size=8, val_episodes=2)
    )
    assert len(losses) == 60
    return losses


def test_training_learns_something() -> None:
    torch.manual_seed(0)
    module = FewShot(Dropping(dropout=0), optimizer=partial(torch.optim.Adam, lr=0.03), warmup=0)
    losses = losses_of_60_steps(module)
    assert sum(losses[-15:]) < 0.5 * sum(losses[:15])


def test_training_step_is_one_step_down_the_learners_loss() -> None:
    learner = Constant(loss=2.0)
    module = FewShot(learner, optimizer=partial(torch.optim.SGD, lr=0.25), schedule="constant", warmup=0)
    trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=tiny())
    assert learner.weight.item() == 0.5


def test_forward_is_the_learners_answer() -> None:
    episode = tiny().episodes("val", shots=1)[0]
    learner = NearestNeighbour(2)
    given = (episode.support_x, episode.support_y, episode.query_x)
    assert torch.equal(FewShot(learner)(*given), learner(*given))


@pytest.fixture
def every_warning() -> Iterator[None]:
    """Torch gives some warnings once in a process; here each time, so that the order of tests does not matter."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_training(loss: float) -> None:
    learner = Constant(loss)
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(FloatingPointError, match=rf"the training loss is {loss} at step 0; lower the learning rate"):
        run.fit(FewShot(learner), datamodule=tiny())
    assert learner.weight.item() == 1


@pytest.mark.usefixtures("every_warning")
@pytest.mark.parametrize(("every", "looked"), [(2, [0, 2, 4]), (3, [0, 3])])
def test_on_other_devices_the_loss_is_looked_at_now_and_then(
    every: int, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    module = FewShot(Constant())
    monkeypatch.setattr(FewShot, "device", torch.device("meta"))
    monkeypatch.setattr(module, "_check_loss", lambda: steps.append(module.global_step))
    run = trainer(max_steps=5, num_sanity_val_steps=0, log_every_n_steps=every, limit_val_batches=0)
    run.fit(module, datamodule=tiny(steps_per_epoch=5))
    assert steps == looked


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    module = FewShot(Constant())
    module._last_loss = torch.tensor(math.nan)
    with pytest.raises(FloatingPointError, match="the training loss is nan"):
        module.on_save_checkpoint({})


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_loss_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: plain(function, backend="eager", **options))
    torch.manual_seed(0)
    learner = snail()
    weights = []
    for compiled in (False, True):
        module = FewShot(copy.deepcopy(learner), optimizer=torch.optim.SGD, compile=compiled)
        run = trainer(max_steps=4, num_sanity_val_steps=0, limit_val_batches=0)
        run.fit(module, datamodule=tiny())
        weights.append(module.learner.state_dict())
    assert_same(*weights)


def test_a_learner_that_takes_gradients_in_its_loss_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match="MAML takes gradients in its loss and cannot be compiled"):
        FewShot(MAML(nn.Linear(2, 2), ways=2), compile=True)


# -- learning from a teacher ---------------------------------------------------------------------------------------


def test_a_learner_with_a_teacher_comes_near_it_and_keeps_none_of_it() -> None:
    torch.manual_seed(0)
    teacher = Conv4(filters=6, image_size=16)
    before = copy.deepcopy(teacher.state_dict())
    module = FewShot(ProtoNet(Conv4(filters=4, image_size=16)), partial(torch.optim.Adam, lr=0.01), warmup=0)
    names = module.state_dict().keys()
    module.learn_from(teacher)
    losses = losses_of_60_steps(module)
    assert sum(losses[-15:]) < 0.5 * sum(losses[:15])
    assert module.state_dict().keys() == names
    assert_same(before, teacher.state_dict())  # nor was its batch norm moved
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_learner_without_an_embedding_learns_from_no_teacher() -> None:
    with pytest.raises(ValueError, match="MAML has no embedding that could learn from a teacher"):
        FewShot(MAML(nn.Linear(2, 2), ways=2)).learn_from(nn.Linear(2, 2))


# -- the learning rate -------------------------------------------------------------------------------------------


def rates(steps: int, **changed: Any) -> list[float]:
    """The learning rate of each of some optimiser steps, with 6 of them in the run."""
    module = FewShot(Constant(), optimizer=partial(torch.optim.SGD, lr=0.1), **changed)
    module.trainer = SimpleNamespace(estimated_stepping_batches=6)  # type: ignore[assignment]
    configured = module.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    found = []
    for _ in range(steps):
        found.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    return found


def test_schedule_is_a_cosine_to_zero_after_a_warmup() -> None:
    # The factors of the warm-up are 1/3, 2/3, 1; those of the cosine (1 + cos(30 degrees * step)) / 2.
    by_hand = [0.1 / 3, 0.1 * 2 / 3 * 0.9330127, 0.075, 0.05, 0.025, 0.00669873, 0, 0]
    assert rates(8, warmup=2) == pytest.approx(by_hand, abs=1e-9)


def test_schedule_constant_only_warms_up() -> None:
    assert rates(8, schedule="constant", warmup=3) == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 5)


def test_schedule_is_a_line_to_zero_after_a_warmup() -> None:
    by_hand = [0.1 / 2, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.1 * 3 / 6, 0.1 * 2 / 6, 0.1 / 6, 0, 0]
    assert rates(8, schedule="linear", warmup=1) == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_without_warmup_starts_at_the_optimisers_own_rate(schedule: str) -> None:
    assert rates(1, schedule=schedule, warmup=0) == [0.1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule_counts_optimiser_steps_over_all_epochs(accumulate: int) -> None:
    found = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            found.append(optimizer.param_groups[0]["lr"])

    module = FewShot(Constant(), optimizer=partial(torch.optim.SGD, lr=0.1), warmup=2)
    run = trainer(max_epochs=2, accumulate_grad_batches=accumulate, limit_val_batches=0, callbacks=[Watch()])
    run.fit(module, datamodule=tiny())
    assert found == pytest.approx(rates(6, warmup=2))


# -- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", [snail, partial(NearestNeighbour, 2)], ids=["SNAIL", "NearestNeighbour"])
def test_validation_equals_evaluate(learner: Callable[[], Learner]) -> None:
    torch.manual_seed(0)
    model, data, run = learner(), tiny(val_episodes=150), trainer()
    module = FewShot(model)
    run.validate(module, datamodule=data, verbose=False)
    expected = [evaluate(model, tiny(val_episodes=150).episodes("val", shots=shots)) for shots in (1, 2)]
    assert [(r.accuracy, r.ci95, r.episodes) for r in module.results] == [
        (r.accuracy, r.ci95, r.episodes) for r in expected
    ]
    assert 0 < expected[0].accuracy < 100
    logged = {f"val/accuracy_{shots}shot": r.accuracy for shots, r in zip((1, 2), expected, strict=True)}
    logged["val/accuracy"] = (expected[0].accuracy + expected[1].accuracy) / 2
    assert {name: float(value) for name, value in run.callback_metrics.items()} == {
        name: float(torch.tensor(value)) for name, value in logged.items()
    }


def test_test_results_are_those_of_evaluate_with_their_facts() -> None:
    module = FewShot(NearestNeighbour(2))
    trainer().test(module, datamodule=tiny(), verbose=False)
    data = tiny()
    for shots, result in zip((1, 2), module.results, strict=True):
        record, expected = result.record(), evaluate(module.learner, data.episodes("test", shots=shots)).record()
        assert record.pop("seconds") >= 0
        expected.pop("seconds")
        assert record == expected


class Plain(Dataset[Episode]):
    """Batches that carry their items, and know nothing else."""

    def __init__(self, batches: Iterable[Episode]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Episode:
        return self.batches[index]


@pytest.mark.parametrize(
    "loader", [lambda here: DataLoader(Plain(here), batch_size=None), lambda here: here], ids=["DataLoader", "Episodes"]
)
def test_scores_of_loaders_that_carry_their_items_equal_evaluate(loader: Callable[[Episodes], Any]) -> None:
    module, here = FewShot(NearestNeighbour(2)), tiny(val_episodes=150).episodes("val", shots=1)
    trainer().validate(module, dataloaders=loader(here), verbose=False)
    (result,) = module.results
    expected = evaluate(module.learner, here)
    assert (result.accuracy, result.ci95, result.episodes) == (expected.accuracy, expected.ci95, 150)


def test_scores_of_a_transductive_learner_are_marked() -> None:
    class Crowd(NearestNeighbour):
        transductive = True

    module = FewShot(Crowd(2))
    trainer().validate(module, datamodule=tiny(), verbose=False)
    assert {result.record()["batch_norm"] for result in module.results} == {"transductive"}


class Passing(nn.Flatten):
    """Pixels as they are, and a count of the images that passed."""

    images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return super().forward(images)


def test_scoring_embeds_each_image_once_for_all_settings() -> None:
    embedding = Passing()
    trainer().validate(FewShot(NearestNeighbour(2, embedding)), datamodule=tiny(), verbose=False)
    assert embedding.images == 4 * 6


def test_scoring_does_not_keep_embeddings_from_before() -> None:
    learner = NearestNeighbour(2, nn.Sequential(nn.Flatten(), nn.Linear(256, 2)))
    module, data, run = FewShot(learner), tiny(val_episodes=60), trainer()
    for seed in range(3):
        torch.manual_seed(seed)
        learner.embedding[1].reset_parameters()
        run.validate(module, datamodule=data, verbose=False)
        assert module.results[0].accuracy == evaluate(learner, data.episodes("val", shots=1)).accuracy


def test_validation_during_training_leaves_training_as_it_was() -> None:
    torch.manual_seed(0)
    one, other = FewShot(Dropping()), FewShot(Dropping())
    other.load_state_dict(one.state_dict())
    for module, often in ((one, 3), (other, 1)):
        torch.manual_seed(1)
        trainer(max_epochs=3, check_val_every_n_epoch=often, num_sanity_val_steps=0).fit(module, datamodule=tiny())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# -- training batches --------------------------------------------------------------------------------------------


def test_training_sees_the_episodes_of_its_steps_in_order() -> None:
    learner, data = Constant(), tiny()
    trainer(max_epochs=2, limit_val_batches=1).fit(FewShot(learner), datamodule=data)
    assert len(learner.seen) == 6
    loader = batches(data)
    images = data.images("train")
    for seen, expected in zip(learner.seen, loader, strict=False):
        assert torch.equal(seen.support_x, images.take(expected.support_x))
        assert torch.equal(seen.query_x, images.take(expected.query_x))
        assert torch.equal(seen.support_y, expected.support_y)


def batches(data: Tiny, **changed: Any) -> TrainingBatches:
    """What the data give a trainer of this rank, at this step."""
    state = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, "global_step": 0}
    data.trainer = SimpleNamespace(
        **(state | changed), training=True, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    return data.train_dataloader()


def first(loader: TrainingBatches, count: int) -> list[list[tuple[Any, ...]]]:
    """The episodes of some batches, as lists."""
    found = []
    for _, batch in zip(range(count), loader, strict=False):
        fields = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        found.append([tuple(row) for row in zip(*(field.tolist() for field in fields), strict=True)])
    return found


def test_training_batch_of_a_step_holds_the_episodes_of_its_indices() -> None:
    loader = batches(tiny())
    for step, batch in zip(range(5), loader, strict=False):
        shots = batch.support_x.shape[1] // 2
        expected = loader.samplers[shots].draw(3 * step, 3 * step + 3)
        assert torch.equal(batch.support_x, expected.support_x)
        assert torch.equal(batch.query_y, expected.query_y)


def test_training_batches_have_the_length_of_an_epoch_and_no_end() -> None:
    loader = batches(tiny(), accumulate_grad_batches=2)
    assert len(loader) == 6
    assert len(first(loader, 20)) == 20


def test_training_shots_are_drawn_for_each_step_from_the_whole_range() -> None:
    shots = [len(batch[0][0]) // 2 for batch in first(batches(tiny()), 60)]
    assert set(shots) == {1, 2, 3}
    assert len(set(itertools.pairwise(shots))) == 9


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_training_ranks_share_the_batch_of_one_process(world: int, accumulate: int) -> None:
    whole = first(batches(tiny(batch_size=6), accumulate_grad_batches=accumulate), 4)
    parts = [
        batches(tiny(batch_size=6 // world), global_rank=rank, world_size=world, accumulate_grad_batches=accumulate)
        for rank in range(world)
    ]
    for together, *shards in zip(whole, *(first(part, 4) for part in parts), strict=True):
        assert [episode for shard in shards for episode in shard] == together
        assert len(set(map(str, together))) == 6


def test_training_accumulation_shares_the_shots_of_one_step() -> None:
    parted = first(batches(tiny(batch_size=2), accumulate_grad_batches=3), 90)
    whole = first(batches(tiny(batch_size=6)), 30)
    assert [parted[i] + parted[i + 1] + parted[i + 2] for i in range(0, 90, 3)] == whole
    assert len({len(batch[0][0]) for batch in whole}) == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_batches_go_on_where_the_trainer_is(accumulate: int) -> None:
    here = batches(tiny(), accumulate_grad_batches=accumulate)
    there = batches(tiny(), accumulate_grad_batches=accumulate, global_step=7)
    assert first(there, 4) == first(here, 7 * accumulate + 4)[7 * accumulate :]


def test_training_batches_ask_for_the_position_when_they_start() -> None:
    position = 0
    loader = batches(tiny())
    loader.position = lambda: position
    begin = first(loader, 1)
    position = 1
    assert first(loader, 1) != begin


def test_training_batches_differ_by_seed() -> None:
    assert first(batches(tiny()), 1) != first(batches(tiny(seed=1)), 1)


# -- going on after a kill ---------------------------------------------------------------------------------------


def restored(change: Callable[[], Any], read: Callable[[], Any], path: Path) -> tuple[Any, Any]:
    """What a generator gives after a checkpoint, and what it gives once the checkpoint is loaded again."""
    module = FewShot(Constant())
    checkpoint: dict[str, Any] = {}
    change()
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    expected = read()
    module.on_load_checkpoint(torch.load(path, weights_only=True))
    return expected, read()


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda: torch.manual_seed(3), lambda: torch.rand(5).tolist()),
        (lambda: (random.seed(3), random.gauss(0, 1)), lambda: [random.gauss(0, 1) for _ in range(5)]),
        (lambda: np.random.seed(3), lambda: np.random.rand(5).tolist()),
    ],
    ids=["torch", "python", "numpy"],
)
def test_checkpoint_keeps_the_generators(change: Callable[[], Any], read: Callable[[], Any], tmp_path: Path) -> None:
    expected, found = restored(change, read, tmp_path / "checkpoint")
    assert found == expected


def test_checkpoint_without_generators_loads() -> None:
    FewShot(Constant()).on_load_checkpoint({})


class Saving(Callback):
    """Writes a checkpoint after some optimiser steps, and after the validations and epochs that end with them."""

    def __init__(self, folder: Path, steps: Iterable[int]) -> None:
        self.folder = folder
        self.steps = steps

    def save(self, trainer: Trainer, moment: str) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{moment}{trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0:
            self.save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")


def run(
    learner: Callable[[], Learner],
    *,
    seed: int = 0,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    **changed: Any,
) -> tuple[dict[str, Any], list[float]]:
    """Train three epochs of three steps; what is left in the end, and the loss of each batch."""
    torch.manual_seed(seed)
    random.seed(seed)
    module = FewShot(learner(), optimizer=partial(torch.optim.Adam, lr=0.01), warmup=2)
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    fit = trainer(max_epochs=3, **{**changed, "callbacks": [Watch(), *changed.get("callbacks", [])]})
    fit.fit(module, datamodule=tiny(**(data or {})), ckpt_path=resume, weights_only=True)
    assert fit.global_step == 9
    left = {"weights": module.state_dict(), "optimizer": fit.optimizers[0].state_dict()["state"]}
    left["rate"] = fit.optimizers[0].param_groups[0]["lr"]
    left["results"] = [result.accuracy for result in module.results]
    left["generator"] = torch.get_rng_state()
    return left, losses


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, however nested."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


LEARNERS: dict[str, Callable[[], Learner]] = {"dropout": Dropping, "SNAIL": snail}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any], list[float]]]:
    """A run that was never killed, and the folder of its checkpoints, made once for each setting."""
    made: dict[str, tuple[Path, dict[str, Any], list[float]]] = {}

    def make(
        name: str, steps: Iterable[int] = range(1, 10), **changed: Any
    ) -> tuple[Path, dict[str, Any], list[float]]:
        key = f"{name} {changed}"
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            made[key] = (folder, *run(LEARNERS[name], callbacks=[Saving(folder, steps)], **changed))
        return made[key]

    return make


def test_run_with_a_seed_is_repeatable_and_checkpoints_do_not_change_it(whole: Callable[..., Any]) -> None:
    _, left, losses = whole("dropout")
    again, losses_again = run(Dropping)
    assert_same(again, left)
    assert losses_again == losses
    assert len(set(losses)) == 9


@pytest.mark.parametrize(
    "moment", [*(f"batch{i}" for i in range(1, 10)), "validation3", "validation6", "epoch3", "epoch6"]
)
def test_resume_ends_with_the_same_weights(moment: str, whole: Callable[..., Any]) -> None:
    folder, left, losses = whole("dropout")
    resumed, rest = run(Dropping, seed=99, resume=folder / moment)
    assert rest == losses[int(moment[-1]) :]
    if moment == "batch9":  # Lightning takes an epoch whose last batch is done for done, and validates no more
        assert resumed.pop("results") == []
    assert_same(resumed, {key: left[key] for key in resumed})


@pytest.mark.parametrize("step", [2, 3])
def test_resume_of_snail_ends_with_the_same_weights(step: int, whole: Callable[..., Any]) -> None:
    folder, left, losses = whole("SNAIL", steps=[2, 3])
    resumed, rest = run(snail, seed=99, resume=folder / f"batch{step}")
    assert rest == losses[step:]
    assert_same(resumed, left)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_resume_with_accumulation_ends_with_the_same_weights(step: int, whole: Callable[..., Any]) -> None:
    folder, left, losses = whole("dropout", accumulate_grad_batches=2)
    resumed, rest = run(Dropping, seed=99, resume=folder / f"batch{step}", accumulate_grad_batches=2)
    assert rest == losses[2 * step :]
    assert_same(resumed, left)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_resume_with_validation_inside_the_epoch_ends_with_the_same_weights(
    step: int, whole: Callable[..., Any]
) -> None:
    folder, left, losses = whole("dropout", val_check_interval=1)
    resumed, rest = run(Dropping, seed=99, resume=folder / f"validation{step}", val_check_interval=1)
    assert rest == losses[step:]
    assert_same(resumed, left)


def test_checkpoint_holds_nothing_that_runs(whole: Callable[..., Any]) -> None:
    folder, _, _ = whole("dropout")
    for path in sorted(folder.iterdir()):
        assert "generators" in torch.load(path, weights_only=True)
