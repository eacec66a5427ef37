"""What the documentation shows, works: every Python block of README.md, README.zh.md and docs/**/*.md runs,
every recipe in TOML loads.

The Python blocks of a file run in order, in one namespace, in an empty directory. A block with a prompt
(`>>>`) runs as a doctest. A block
that cannot run in a test has the line `<!-- not run: the reason -->` above it.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from lehr.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<not_run><!-- not run: \S.*-->\n+)?^```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def _blocks(text: str, kind: str) -> list[tuple[int, str]]:
    """The blocks of a kind that are to run, each with the line that its code begins on."""
    return [
        (text.count("\n", 0, found.start("code")) + 1, found["code"])
        for found in BLOCK.finditer(text)
        if found["kind"] == kind and not found["not_run"]
    ]


def _with(kind: str) -> list[Path]:
    return [page for page in PAGES if _blocks(page.read_text(encoding="utf-8"), kind)]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", _with("python"), ids=_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run from top to bottom, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, code in _blocks(page.read_text(encoding="utf-8"), "python"):
        if ">>> " in code:
            example = doctest.DocTestParser().get_doctest(code, namespace, page.name, str(page), line - 1)
            result = doctest.DocTestRunner().run(example, clear_globs=False)
            namespace.update(example.globs)
            assert not result.failed
        else:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", _with("toml"), ids=_name)
def test_toml_recipes_load(page: Path, tmp_path: Path) -> None:
    """Every TOML block with stages is a recipe, and is read without a complaint."""
    for line, text in _blocks(page.read_text(encoding="utf-8"), "toml"):
        if "[[stages]]" in text:
            path = tmp_path / f"line{line}.toml"
            path.write_text(text, encoding="utf-8")
            assert load_recipe(path).stages


def test_blocks_are_found() -> None:
    """The reader of pages finds blocks with their lines and leaves out only what says why."""
    hidden = "<!-- not run: needs a network -->\n```python\nboom\n```\n"
    text = f"a\n```python\nx = 1\n```\n\n{hidden}```toml\ny = 2\n```\n"
    assert _blocks(text, "python") == [(3, "x = 1\n")]
    assert _blocks(text, "toml") == [(11, "y = 2\n")]
    assert ROOT / "docs" / "schedules.md" in _with("python")
