"""The package as it is installed: what a wheel holds, what imports what, what importing costs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import snail

ROOT = Path(__file__).parents[1]
ROOMS = {"snail": "snail", "datasets": "snail/datasets", "experiments": "snail/experiments"}


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(snail.__path__, "snail.")]
    for room in ("datasets", "experiments"):
        names.append(f"snail.{room}")
        package = importlib.import_module(f"snail.{room}")
        names += [module.name for module in pkgutil.iter_modules(package.__path__, f"snail.{room}.")]
    return sorted({name for name in names if not name.endswith("__main__")})


@pytest.mark.parametrize("name", modules())
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_importing_the_blocks_does_not_import_lightning() -> None:
    code = (
        "import snail, sys; assert snail.SNAIL and not {'lightning', 'matplotlib', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_library_changes_nothing_in_the_process() -> None:
    code = """
import logging, os, random, sys, warnings
import numpy, torch
import lightning.pytorch, matplotlib, jsonargparse  # what these change at import is not ours

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "backends": (torch.backends.mkldnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "modes": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()),
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "generators": (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "loggers": [logging.getLogger(name).level for name in (None, "lightning", "lightning.pytorch", "torch")],
        "hooks": (sys.excepthook, sys.getrecursionlimit(), numpy.geterr()),
    }

before = state()
import snail, snail.datasets, snail.experiments.cli, snail.experiments.trainer_cli, snail.experiments.predict
assert snail.FewShot
after = state()
assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("room", "never"), [("snail", ("snail.datasets", "snail.experiments")), ("datasets", ("snail.experiments",))]
)
def test_imports_run_one_way(room: str, never: tuple[str, ...]) -> None:
    for path in (ROOT / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path}: an import from above its room"
                names = [] if node.level else [node.module or ""]
            assert not [n for n in names if n.startswith(never)], f"{path} imports {names}"


def test_a_wheel_holds_every_file_of_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "data", "tests")
    shutil.copytree(ROOT, source, ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    built = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tree = {
        f"{place}/{path.relative_to(source / room).as_posix()}"
        for room, place in ROOMS.items()
        for path in (source / room).rglob("*")
        if path.is_file() and path.name != "README.md" and path.suffix != ".safetensors"  # those stay in the repository
    }
    assert packed == tree
