"""What the import contracts in setup.cfg cannot see: thrown dice, and rooms without a door sign."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "moshpitd", ROOT / "clients/python/moshpit_client"]
PURE = PACKAGES[0] / "averaging"


def test_pure_rooms_throw_no_dice_of_their_own() -> None:
    thrown = [
        f"{path.relative_to(PURE)}:{line}: {what}"
        for path in sorted(PURE.rglob("*.py"))
        for line, what in dice(ast.parse(path.read_text()))
    ]
    assert thrown == []


@pytest.mark.parametrize(
    "source",
    [
        "import random\nx = random.random()",
        "import random as r\ndef f(): return r.choice([1])",
        "import random\nrng = random.Random(1)",
        "import random\nf = random.Random",
        "from random import Random\nrng = Random()",
        "from random import shuffle",
        "import random.x\n",
        "import numpy as np\nx = np.random.default_rng()",
        "from numpy import random",
        "from numpy.random import default_rng",
        "import uuid",
    ],
)
def test_dice_are_found_however_they_are_thrown(source: str) -> None:
    assert list(dice(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import random\ndef f(rng: random.Random) -> int: return rng.getrandbits(8)",
        "import random\nclass A:\n    rng: random.Random | None\n",
        "from random import Random\ndef f(*, rng: Random) -> Random: return rng",
    ],
)
def test_dice_handed_in_may_be_named(source: str) -> None:
    assert list(dice(ast.parse(source))) == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_folder_of_modules_is_a_package(package: Path) -> None:
    """A folder without `__init__.py` is left out of wheels, and unseen by the import contracts."""
    folders = {folder for path in package.rglob("*.py") for folder in path.parents if folder.is_relative_to(package)}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def dice(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every line that could draw chance, unless from a `random.Random` handed in, which may only be an annotation."""
    named = {id(node) for annotation in _annotations(tree) for node in ast.walk(annotation)}
    modules: set[str] = set()
    types: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    if name.name == "random":
                        modules.add(name.asname or name.name)
                    elif name.name.split(".")[0] in {"random", "uuid"} or name.name == "numpy.random":
                        yield node.lineno, f"import {name.name}"
            case ast.ImportFrom(module="random", names=[ast.alias(name="Random", asname=asname)]):
                types.add(asname or "Random")
            case ast.ImportFrom(module="random" | "uuid" | "numpy.random"):
                yield node.lineno, f"from {node.module}"
            case ast.ImportFrom(module="numpy", names=names) if any(name.name == "random" for name in names):
                yield node.lineno, "from numpy import random"
            case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"):
                yield node.lineno, "numpy.random"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in modules | types and id(node) not in named:
            yield node.lineno, node.id


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        match node:
            case ast.arg(annotation=ast.expr() as annotation) | ast.AnnAssign(annotation=annotation):
                yield annotation
            case ast.FunctionDef(returns=ast.expr() as annotation):
                yield annotation
