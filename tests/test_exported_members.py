"""The public surface is a list, and it costs nothing to import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lehr

HEAVY = (
    "torch",
    "pandas",
    "matplotlib",
    "pydantic",
    "torchvision",
    "timm",
    "torchmetrics",
    "numpy",
    "sklearn",
)


def loaded_by(program: str) -> set[str]:
    """The packages that are loaded after `program` has run in a fresh interpreter."""
    ask = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program + ask], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_all_is_sorted_and_equal_to_what_is_there() -> None:
    """`__all__` is sorted, lists each name once, and equals what the package gives; every name can be
    imported."""
    assert lehr.__all__ == sorted(set(lehr.__all__))
    assert dir(lehr) == lehr.__all__
    assert {*lehr._MODULE_OF, "__version__", "plan"} == set(lehr.__all__)
    for name in lehr.__all__:
        value = getattr(lehr, name)
        assert value is getattr(sys.modules[lehr._MODULE_OF.get(name, "lehr")], name)
    with pytest.raises(AttributeError, match="module 'lehr' has no attribute 'fitt'"):
        lehr.fitt  # noqa: B018


def test_the_surface_stays_small() -> None:
    """A person can read all public names in one glance."""
    assert len(lehr.__all__) <= 41


def test_every_public_name_says_what_it_is() -> None:
    """Every public function and class has a docstring of its own."""
    for name in set(lehr.__all__) - {"__version__"}:
        assert (getattr(lehr, name).__doc__ or "").strip(), name


def test_types_and_values_are_the_same_names() -> None:
    """What a type checker sees under TYPE_CHECKING is what there is when it runs."""
    tree = ast.parse(Path(lehr.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lehr.")
        for alias in node.names
    }
    used_here = {"ModelFacts"}  # in the signature of `plan` only
    assert {name: module for name, module in seen.items() if name not in used_here} == lehr._MODULE_OF


def test_importing_loads_nothing_heavy() -> None:
    """`import lehr` loads neither torch nor pandas nor matplotlib nor anything else that takes its time."""
    assert not loaded_by("import lehr; lehr.__all__; dir(lehr)").intersection(HEAVY)


def test_asking_for_help_loads_nothing_heavy() -> None:
    """`lehr --help` and `python -m lehr --help` load neither torch nor what shows and measures."""
    program = (
        "from lehr.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit as done: assert not done.code"
    )
    assert not loaded_by(program).intersection(HEAVY)
    program = (
        "import runpy, sys\nsys.argv = ['lehr', '--help']\n"
        "try: runpy.run_module('lehr', run_name='__main__')\nexcept SystemExit as done: assert not done.code"
    )
    assert not loaded_by(program).intersection(HEAVY)


def test_a_plan_needs_no_torch(tmp_path: Path) -> None:
    """From facts a plan is made, printed, read and written without torch."""
    program = """
import lehr
from lehr.selection import ModelFacts, ParameterFacts
parameters = (ParameterFacts("body.weight", (4, 4)), ParameterFacts("fc.weight", (2, 4)))
facts = ModelFacts("net", parameters, head=("fc",))
stages = [lehr.Stage("2 epochs", train="head", lr=0.1), lehr.Stage("9 steps", train="all", lr=0.01)]
recipe = lehr.Recipe(stages)
plan = lehr.plan(recipe, facts, samples=100)
assert "head" in str(plan) and len(list(plan)) == plan.total_steps == 17
plan.save("PLAN")
assert lehr.Plan.load("PLAN") == plan and plan.lr("head").shape == (17,)
"""
    program = program.replace("PLAN", str(tmp_path / "plan.json"))
    assert not loaded_by(program).intersection({"torch", "torchvision", "timm", "matplotlib", "pandas"})
