import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_datasets_omniglot_reader import NAMES

from snail import NearestNeighbour, evaluate
from snail.datasets import Glyphs, ImageData, Images, Omniglot, omniglot
from snail.datasets.augmentation import mirror, recolour
from snail.datasets.images import split_hash
from snail.datasets.sampler import EpisodeSampler


class Tiny(ImageData):
    """Made-up images of 2x2 pixels, which notes what it is asked to load."""

    dataset = "tiny"
    split = "halves"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loaded: list[str] = []

    def load(self, part: str) -> Images:
        self.loaded.append(part)
        array = np.random.default_rng(len(part)).integers(0, 256, (6, 8, 2, 2), dtype=np.uint8)
        return Images.from_classes(array, [f"{part}{i}" for i in range(6)])


def training(**changed: Any) -> Any:
    """As much of a trainer as a data module looks at."""
    state = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, "global_step": 0, "training": True}
    return SimpleNamespace(**(state | changed), strategy=SimpleNamespace(root_device=torch.device("cpu")))


# -- what every data set has -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_shots", [(0, 5), (3, 2), (-1, -1)], ids=str)
def test_episode_data_rejects_train_shots_that_are_no_range(train_shots: tuple[int, int]) -> None:
    fewest, most = train_shots
    with pytest.raises(ValueError, match=rf"train_shots is \[{fewest}, {most}\]; it must be \[fewest, most\]"):
        Tiny(train_shots=train_shots)


def test_episode_data_rejects_no_eval_shots() -> None:
    with pytest.raises(ValueError, match="eval_shots is empty; name at least one number of shots"):
        Tiny(eval_shots=[])


@pytest.mark.parametrize("changed", [{"batch_size": 0}, {"steps_per_epoch": 0}, {"batch_size": -1}], ids=str)
def test_episode_data_rejects_empty_steps_and_epochs(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"batch_size is .* and steps_per_epoch is .*; both must be at least 1"):
        Tiny(**changed)


@pytest.mark.parametrize("part", ["val", "test"])
def test_episode_data_rejects_no_episodes(part: str) -> None:
    with pytest.raises(ValueError, match=r"0 episodes|test_episodes is 0"):
        Tiny(**{f"{part}_episodes": 0}).episodes(part, shots=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ways": 7}, "7 ways are asked of 'tiny/halves/train', which has 6 classes"),
        ({"train_shots": (1, 8)}, "8 shots and 1 queries need 9 images a class, but class 'train0'"),
        ({"queries": 0}, "queries is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_episode_data_names_what_the_images_cannot_give(changed: dict[str, Any], message: str) -> None:
    data = Tiny(**changed)
    data.trainer = training()
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()


@pytest.mark.parametrize("part", ["dev", "", "Train"])
def test_episode_data_rejects_an_unknown_part(part: str) -> None:
    with pytest.raises(ValueError, match=f"there is no part '{part}'; choose train, val or test"):
        Tiny().images(part)


def test_episode_data_trains_with_a_trainer_only() -> None:
    with pytest.raises(RuntimeError, match="train_dataloader needs a Lightning trainer"):
        Tiny().train_dataloader()


def test_episode_data_loads_each_part_once_and_only_when_needed() -> None:
    data = Tiny(eval_shots=[1, 2, 3])
    assert data.loaded == []
    data.val_dataloader()
    assert data.images("val") is data.images("val")
    assert data.loaded == ["val"]


def test_episode_data_scores_each_number_of_shots_on_its_own_episodes() -> None:
    data = Tiny(eval_shots=[1, 4], eval_queries=3, ways=2, val_episodes=11, test_episodes=12, seed=5)
    for part, loaders in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        facts = [loader.episodes.facts for loader in loaders]
        assert [some["shots"] for some in facts] == [1, 4]
        assert {some["split"] for some in facts} == {f"halves/{part}"}
        assert {some["split_hash"] for some in facts} == {split_hash(f"{part}{i}" for i in range(6))}
        assert {(some["ways"], some["queries"], some["seed"], some["dataset"]) for some in facts} == {(2, 3, 5, "tiny")}
        assert {some["episodes"] for some in facts} == {11 if part == "val" else 12}
        assert [next(iter(loader)).support_x.shape[1] for loader in loaders] == [2, 8]


def test_episode_data_episodes_take_what_is_given_over_what_was_set_up() -> None:
    data = Tiny(ways=2, eval_queries=3, seed=5)
    assert data.episodes("val", shots=1, ways=4, queries=2, count=9, seed=0).facts == {
        "dataset": "tiny",
        "split": "halves/val",
        "split_hash": split_hash(f"val{i}" for i in range(6)),
        "ways": 4,
        "shots": 1,
        "queries": 2,
        "episodes": 9,
        "seed": 0,
    }


def test_episode_data_draws_from_training_classes_for_training() -> None:
    data = Tiny(ways=2)
    data.trainer = training()
    loader = data.train_dataloader()
    assert data.loaded == ["train"]
    assert sorted(loader.samplers) == [1, 2, 3, 4, 5]
    assert isinstance(loader.samplers[1], EpisodeSampler)
    batch = next(iter(loader))
    assert len(batch) == 32
    assert (batch.ways, batch.query_x.shape) == (2, (32, 2))


def test_episode_data_puts_images_in_the_place_of_indices_in_training_alone() -> None:
    data = Tiny(ways=2, batch_size=3)
    data.trainer = training()
    batch = next(iter(data.train_dataloader()))
    ready = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(ready.support_x, data.images("train").take(batch.support_x))
    data.trainer = training(training=False)
    assert data.on_after_batch_transfer(batch, 0) is batch


def test_training_images_are_distorted_when_asked_and_no_others() -> None:
    data = Tiny(ways=2, distortion=0.5)
    data.trainer = training()
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    first, second = data.on_after_batch_transfer(batch, 0), data.on_after_batch_transfer(batch, 0)
    assert first.support_x.shape == (32, first.support_x.shape[1], 1, 2, 2)
    assert not torch.equal(first.support_x, second.support_x)
    plain = data.images("train").take(batch.support_x)
    assert 0 < (first.support_x - plain).abs().mean() < 0.3
    data.trainer = training(training=False)
    assert data.on_after_batch_transfer(batch, 0) is batch
    ready, again = (data.episodes("val", shots=1, count=2)[0].support_x for _ in range(2))
    assert torch.equal(ready, again)
    with pytest.raises(ValueError, match="distortion is -1; it must be at least 0"):
        Tiny(distortion=-1)


def test_training_photographs_are_mirrored_and_recoloured_when_asked_and_reflected_at_their_edges() -> None:
    data = Tiny(ways=2, mirrored_at_random=True, recolouring=0.5)
    data.trainer = training()
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    plain, seen = data.images("train").take(batch.support_x), data.on_after_batch_transfer(batch, 0).support_x
    torch.manual_seed(0)
    assert torch.equal(seen, recolour(mirror(plain), 0.5))
    assert data.training_notes == {"note": "mirrored at random, recoloured by 0.5"}
    with pytest.raises(ValueError, match="recolouring is -1; it must be at least 0"):
        Tiny(recolouring=-1)

    edges = []
    for ink in (False, True):
        data = Tiny(ways=2, distortion=1)
        data.ink, data.trainer = ink, training()
        data._images["train"] = replace(data.images("train"), pixels=torch.full_like(data.images("train").pixels, 255))
        edges.append(data.on_after_batch_transfer(batch, 0).support_x.min())
    assert edges[0] == pytest.approx(1) and edges[1] < 0.9


def test_few_training_classes_are_the_first_of_them_and_told() -> None:
    data = Tiny(ways=2, train_classes=3, fixed_labels=True)
    assert data.images("train").class_names == ("train0", "train1", "train2")
    assert len(data.images("val").class_names) == len(data.images("test").class_names) == 6
    assert data.training_notes == {"note": "3 classes, each class with one label"}
    with pytest.raises(ValueError, match="the first 7 of 6 classes cannot be had"):
        Tiny(train_classes=7).images("train")


def test_episode_data_works_without_a_trainer() -> None:
    result = evaluate(NearestNeighbour(3), Tiny().episodes("test", shots=1, ways=3, count=30))
    assert result.episodes == 30
    assert result.facts["split"] == "halves/test"


def test_episode_data_counts_the_episodes_that_results_are_quoted_on() -> None:
    assert Tiny().eval_episodes == {"val": 1000, "test": 10_000}
    assert Omniglot().eval_episodes["test"] == 10_000
    assert Glyphs().eval_episodes["test"] == 1000
    assert Glyphs(test_episodes=77).eval_episodes["test"] == 77


# -- glyphs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glyphs() -> dict[str, Images]:
    data = Glyphs()
    return {part: data.images(part) for part in ("train", "val", "test")}


@pytest.mark.parametrize(("part", "classes", "names"), [("train", 1000, 0), ("val", 100, 1000), ("test", 200, 1100)])
def test_glyphs_has_its_size(part: str, classes: int, names: int, glyphs: dict[str, Images]) -> None:
    images = glyphs[part]
    assert images.counts == (20,) * classes
    assert images.pixels.shape == (20 * classes, 1, 28, 28)
    assert images.class_names == tuple(f"seed0/glyph{names + i:04d}" for i in range(classes))


def test_glyphs_splits_are_disjoint(glyphs: dict[str, Images]) -> None:
    assert len({name for images in glyphs.values() for name in images.class_names}) == 1300
    drawings = [{image.tobytes() for image in images.pixels.numpy()} for images in glyphs.values()]
    assert len(set.union(*drawings)) == sum(map(len, drawings)) == 26_000


def test_glyphs_are_the_same_pixels_each_time(glyphs: dict[str, Images]) -> None:
    assert torch.equal(Glyphs(ways=20, seed=3).images("val").pixels, glyphs["val"].pixels)
    digest = hashlib.sha256(glyphs["val"].pixels.numpy().tobytes()).hexdigest()
    assert digest == "e4d1644d0d0f02b39a381bfb9e34b054575bedf7199ddb7000b7978119ffb5e5"


def test_glyphs_of_another_seed_are_another_data_set(glyphs: dict[str, Images]) -> None:
    other = Glyphs(glyph_seed=1)
    assert (other.images("val").pixels != glyphs["val"].pixels).any(dim=(1, 2, 3)).all()
    facts = other.episodes("val", shots=1).facts, Glyphs().episodes("val", shots=1).facts
    assert [some["split"] for some in facts] == ["seed1/val", "seed0/val"]


# -- omniglot ----------------------------------------------------------------------------------------------------


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Every character by its real name, its drawings made of noise."""
    made = np.random.default_rng(0).integers(0, 256, (1623, 3, 4, 4), dtype=np.uint8)
    monkeypatch.setattr(omniglot, "read_omniglot", lambda root: (list(NAMES), made))
    return made


SIZES = {"train": 1028, "val": 172, "test": 423}


@pytest.mark.parametrize("split", ["vinyals", "random"])
def test_splits_disjoint_and_hash(split: str, drawings: np.ndarray) -> None:
    data = Omniglot(split=split, rotations=False)
    parts = {part: data.images(part).class_names for part in SIZES}
    assert {part: len(names) for part, names in parts.items()} == SIZES
    assert sorted(name for names in parts.values() for name in names) == sorted(NAMES)
    for part, names in parts.items():
        by_hand = hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()
        assert data.episodes(part, shots=1, ways=5, count=1).facts["split_hash"] == by_hand


@pytest.mark.parametrize("split", ["vinyals", "random"])
def test_rotations_stay_in_split(split: str, drawings: np.ndarray) -> None:
    data = Omniglot(split=split)
    names = {part: data.images(part).class_names for part in SIZES}
    assert {part: len(some) for part, some in names.items()} == SIZES | {"train": 4 * 1028}
    characters = {part: {name.split("/rot")[0] for name in some} for part, some in names.items()}
    assert sum(map(len, characters.values())) == len(set.union(*characters.values())) == 1623
    assert all(len([*data.images(part).pixels]) == 3 * len(names[part]) for part in SIZES)


def test_rotations_of_a_character_are_of_its_own_drawings(drawings: np.ndarray) -> None:
    images = Omniglot().images("train")
    for place in (0, 700, 1028 + 5, 3 * 1028 + 1027):
        character, turn = images.class_names[place].split("/rot")
        turned = np.rot90(drawings[NAMES.index(character)], int(turn) // 90, (1, 2))
        assert np.array_equal(images.pixels[3 * place : 3 * place + 3, 0].numpy(), turned)


def test_rotations_can_be_left_out(drawings: np.ndarray) -> None:
    assert len(Omniglot(rotations=False).images("train").class_names) == 1028


def test_mirror_images_are_trained_on_if_asked_for_and_are_told(drawings: np.ndarray) -> None:
    data, plain = Omniglot(mirrored=True, distortion=0.5), Omniglot(distortion=0.5)
    names = data.images("train").class_names
    assert names == plain.images("train").class_names + tuple(f"{n}/mirrored" for n in names[: 4 * 1028])
    assert data.images("test").class_names == plain.images("test").class_names
    assert data.training_notes == {"note": "mirror images too, images distorted by 0.5"}
    assert plain.training_notes == {"note": "images distorted by 0.5"}
    assert Omniglot().training_notes == {}


def test_omniglot_gives_each_class_its_own_drawings(drawings: np.ndarray) -> None:
    images = Omniglot(split="random").images("test")
    for place in (0, 222, 422):
        mine = images.pixels[3 * place : 3 * place + 3, 0].numpy()
        assert np.array_equal(mine, drawings[NAMES.index(images.class_names[place])])


def test_omniglot_names_its_split_in_results(drawings: np.ndarray) -> None:
    facts = Omniglot(split="random").episodes("test", shots=1, count=1).facts
    assert (facts["dataset"], facts["split"]) == ("omniglot", "random/test")


def test_omniglot_rejects_an_unknown_split(drawings: np.ndarray) -> None:
    with pytest.raises(ValueError, match="split must be one of vinyals, random, got 'lake'"):
        Omniglot(split="lake").images("train")


def test_omniglot_reads_and_downloads_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(omniglot, "download_omniglot", lambda root: asked.append(("download", root)))

    def read(root: Path) -> tuple[list[str], np.ndarray]:
        asked.append(("read", root))
        return list(NAMES), np.zeros((1623, 1, 2, 2), np.uint8)

    monkeypatch.setattr(omniglot, "read_omniglot", read)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = Omniglot(root=Path("~/somewhere"))
    assert asked == []  # nothing is read or fetched before it is needed
    data.prepare_data()
    data.images("val")
    data.images("test")
    assert asked == [("download", tmp_path / "somewhere"), ("read", tmp_path / "somewhere")]


def test_no_validation_episodes_are_no_loaders() -> None:
    assert Tiny(val_episodes=0).val_dataloader() == []


def test_a_final_run_trains_on_validation_characters_and_validates_on_nothing(omniglot_root: Path) -> None:
    data, plain = Omniglot(omniglot_root, train_on_validation=True), Omniglot(omniglot_root)
    names = {part: plain.images(part).class_names for part in ("train", "val", "test")}
    trained = data.images("train").class_names
    whole = {name.rsplit("/rot", 1)[0] for name in trained}
    assert whole == {name.rsplit("/rot", 1)[0] for name in names["train"]} | set(names["val"])
    assert len(trained) == 4 * 1200 and not whole & set(names["test"])
    assert data.val_dataloader() == []
    assert (data.trained_on, plain.trained_on) == ("training and validation characters", "")


def test_training_may_have_more_ways_than_scoring() -> None:
    data = Tiny(ways=2, train_ways=5)
    data.trainer = training()
    batch = next(iter(data.train_dataloader()))
    assert batch.ways == 5 and data.episodes("val", shots=1)[0].ways == 2
    assert Tiny(ways=3).train_ways == 3
