"""What the documentation lists is what there is: the tree, the order of imports, keys, names, links."""

from __future__ import annotations

import inspect
import json
import re
from configparser import ConfigParser
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lehr
from lehr.__main__ import main
from lehr.curves import Schedule
from lehr.data.images import FORMATS
from lehr.data.transforms import AUGMENTS
from lehr.planning import Plan, PlannedStage
from lehr.recipe_file import recipe_from
from lehr.recipe_values import optimizer_named
from lehr.selection import ROLES, ModelFacts, ParameterFacts, select

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
STAGES = [{"length": "1 epoch", "train": "all", "lr": 1e-3}]


def _page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _section(page: str, heading: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    level = heading.split(" ")[0]
    _, _, rest = page.partition(f"\n{heading}\n")
    assert rest, f"no heading {heading!r}"
    return re.split(rf"\n#{{1,{len(level)}}} ", rest)[0]


def _rows(section: str) -> list[list[str]]:
    """The cells of the rows of the tables in a section, without header and rule."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rules = [index for index, line in enumerate(lines) if set(line) <= set("|-: ")]
    skip = {index for rule in rules for index in (rule - 1, rule)}
    cells = (line.split("|")[1:-1] for index, line in enumerate(lines) if index not in skip)
    return [[cell.strip() for cell in row] for row in cells]


def _code(cell: str) -> str:
    """What stands between the first backticks of a cell."""
    return cell.split("`")[1]


def _blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _tree(block: str) -> list[str]:
    """The paths of a drawn tree, folders with a slash at the end."""
    paths: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        drawn = re.match(r"(?P<bars>[│ ]*)[├└]── (?P<name>\S+)", line)
        if drawn:
            depth = len(drawn["bars"]) // 4
            folders = [*folders[:depth], drawn["name"]]
            paths.append("".join(folders))
    return paths


def test_architecture_has_the_tree_that_is_there() -> None:
    """The tree in ARCHITECTURE.md names every file and folder of the package, and no other."""
    block = next(block for block in _blocks(_page("ARCHITECTURE.md"), "") if block.startswith("src/lehr/"))
    package = ROOT / "src" / "lehr"
    there = {
        path.relative_to(package).as_posix() + "/" * path.is_dir()
        for path in package.rglob("*")
        if "__pycache__" not in path.parts
    }
    drawn = _tree(block)
    assert sorted(drawn) == sorted(there)


def test_architecture_has_the_contract_of_imports() -> None:
    """The order of imports in ARCHITECTURE.md is the one that import-linter checks."""
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:layers"]["layers"].replace("lehr.", "").split("\n")
    assert [line for line in layers if line] == _blocks(
        _section(_page("ARCHITECTURE.md"), "## Imports go one way"), ""
    )[0].splitlines()


@pytest.mark.parametrize(
    ("heading", "cls"), [("## Recipe keys", lehr.Recipe), ("## Stage keys", lehr.Stage)], ids=str
)
def test_recipe_page_has_every_key(heading: str, cls: type) -> None:
    """docs/recipe.md has one row for each field of Recipe and Stage, in their order, and no other."""
    rows = _rows(_section(_page("docs/recipe.md"), heading))
    assert [_code(row[0]) for row in rows] == [f.name for f in fields(cls)]


def test_recipe_page_has_the_defaults() -> None:
    """Every default in the table of recipe keys is the one that Recipe has; one in words stands for None."""
    written = {_code(row[0]): row[3] for row in _rows(_section(_page("docs/recipe.md"), "## Recipe keys"))}
    for field in fields(lehr.Recipe):
        cell = written[field.name]
        if field.default is MISSING:
            assert not cell
        elif "`" not in cell:
            assert cell
            assert field.default is None
        else:
            assert _plain(field.default) == tomlkit.parse(f"x = {_code(cell)}").unwrap()["x"]


def _plain(default: Any) -> Any:
    """A default in the form that TOML has."""
    if isinstance(default, tuple):
        return list(default)
    return str(default) if isinstance(default, Schedule) else default


GOES_WITH = {"every": {"until": "train_error < 0.8"}, "reduce": {"until": "valid_loss plateaus 3 epochs"}}


def test_recipe_page_examples_are_understood() -> None:
    """Every example in the tables of keys is a value that a recipe or a stage takes."""
    page = _page("docs/recipe.md")
    for row in _rows(_section(page, "## Recipe keys"))[1:]:
        recipe_from({"stages": STAGES, _code(row[0]): _value(_code(row[4]))})
    for row in _rows(_section(page, "## Stage keys")):
        for example in re.findall("`([^`]+)`", row[4]):
            key = _code(row[0])
            usual = {k: v for k, v in STAGES[0].items() if key != "objectives" or k == "length"}
            recipe_from({"stages": [{**usual, **GOES_WITH.get(key, {}), key: _value(example)}]})


def _value(written: str) -> Any:
    return tomlkit.parse(f"x = {written}").unwrap()["x"]


def test_recipe_page_optimizers_can_be_made() -> None:
    """Every line in the table of optimizers makes an optimizer with the settings that it says."""
    net = nn.Linear(4, 2)
    rows = _rows(_section(_page("docs/recipe.md"), "## Optimizers"))
    assert len(rows) >= 5
    for row in rows:
        recipe = recipe_from({"stages": STAGES, **tomlkit.parse(_code(row[0])).unwrap()})
        made = lehr.optimizer(lehr.plan(recipe, net, samples=32), net)
        name, said = optimizer_named(recipe.optimizer)
        assert type(made).__name__.lower() == name
        for key, value in said.items():
            assert made.defaults[key] == (tuple(value) if isinstance(value, list) else value)


def test_recipe_page_has_every_role() -> None:
    """The table of patterns has every role, and each of its patterns finds something in a model."""
    names = ["layer4.weight", "blocks.9.attn.weight", "blocks.10.attn.weight", "blocks.10.bias", "fc.weight"]
    parameters = [ParameterFacts(name, (2,), bias=name.endswith("bias")) for name in names]
    parameters.append(ParameterFacts("norm.weight", (2,), norm=True))
    facts = ModelFacts("net", tuple(parameters), head=("fc",), blocks=(("blocks.9",), ("blocks.10",)))
    rows = _rows(_section(_page("docs/recipe.md"), "## Patterns and roles"))
    patterns = [pattern for row in rows for pattern in re.findall('`"([^"]+)"`', row[0])]
    assert {*ROLES, "last 2 blocks"} <= set(patterns)
    assert all(select(pattern, facts).names for pattern in patterns)


def test_data_page_has_every_augmentation_and_format() -> None:
    """docs/data.md has a row for each augmentation and no other, and names every format that is read."""
    page = _page("docs/data.md")
    names = [_code(row[0]) for row in _rows(_section(page, "## Augmentation"))]
    assert sorted(names) == sorted(AUGMENTS)
    assert all(name in _section(page, "## How images are read") for name in FORMATS)


def test_fit_page_has_every_argument() -> None:
    """docs/fit.md has one row for each argument of `lehr.fit`, in their order, with the default that it has."""
    rows = _rows(_section(_page("docs/fit.md"), "## Arguments"))
    arguments = inspect.signature(lehr.fit).parameters
    assert [_code(row[0]) for row in rows] == list(arguments)
    for row in rows:
        default = arguments[_code(row[0])].default
        if default is inspect.Parameter.empty:
            assert not row[3]
        else:
            assert _code(row[3]).replace('"', "'") == repr(default)


def test_fit_page_has_what_a_result_has() -> None:
    """docs/fit.md has a row for each field of Result, in their order, and one error a row, all of them public."""
    page = _page("docs/fit.md")
    named = [_code(row[0]) for row in _rows(_section(page, "## Result"))]
    assert named == [f.name for f in fields(lehr.Result)]
    errors = [_code(row[0]) for row in _rows(_section(page, "## Errors"))]
    assert set(errors) <= set(lehr.__all__)
    assert len(set(errors)) == len(errors) > 5


def _run_table() -> dict[str, str]:
    """Every file that docs/run.md names, and who writes it."""
    return {_code(row[0]): row[1] for row in _rows(_preamble(_page("docs/run.md")))}


def _preamble(page: str) -> str:
    return page.partition("\n## ")[0]


def _there(folder: Path) -> set[str]:
    return {path.name + "/" * path.is_dir() for path in folder.iterdir()}


def test_run_page_has_every_file_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in docs/run.md names every file and folder that `lehr fit` leaves, and no other."""
    monkeypatch.chdir(tmp_path)
    short = [word for k in (0, 1) for word in ("--set", f"stages.{k}.length=2 steps")]
    main(["fit", "digits", "--no-scratch", "--tensorboard", "--out", "run", *short])
    assert _there(tmp_path / "run") == set(_run_table())


def test_run_page_has_every_file_of_fit(tmp_path: Path) -> None:
    """The table in docs/run.md says "both" of the files that `lehr.fit` leaves, and of no other."""
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    lehr.fit(nn.Linear(4, 2), data, data, recipe=recipe_from({"stages": STAGES}), out=tmp_path, device="cpu")
    assert _there(tmp_path) == {name for name, writer in _run_table().items() if writer == "both"}


def test_run_page_has_every_key_of_a_plan(tmp_path: Path) -> None:
    """docs/run.md has every key of plan.json and of its stages, in their order, and no other."""
    lehr.plan(recipe_from({"stages": STAGES}), nn.Linear(4, 2), samples=32).save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    stage = plan["stages"][0]
    whole, stages = _section(_page("docs/run.md"), "## plan.json").split("\nEach stage:\n")
    assert [_code(row[0]) for row in _rows(whole)] == list(plan)
    assert [_code(row[0]) for row in _rows(stages)] == list(stage)
    assert list(plan)[2:] == [f.name for f in fields(Plan)]
    assert list(stage) == [f.name for f in fields(PlannedStage)]
    assert f"the version of the format: `{plan['format']}`" in whole
    assert re.fullmatch("[0-9a-f]{64}", plan["hash"])


def test_index_has_every_page() -> None:
    """docs/README.md has one line for each page in docs, and no other page."""
    rows = _rows(_page("docs/README.md"))
    linked = [re.findall(r"\]\(([^)]+)\)", row[0]) for row in rows]
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert sorted(target for targets in linked for target in targets) == sorted([*pages, "decisions/"])
    assert all(row[1] for row in rows)


def test_nothing_is_left_to_fill_in() -> None:
    """README.md has no place that waits for a transcript or for numbers."""
    assert not re.findall(r"<!-- (?:transcript|numbers)[^>]*", _page("README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of the repository leads to one that is there."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
