"""The notes in two languages, and the README in two, say the same: the same topics, the same code, the same figures."""

from __future__ import annotations

import io
import re
import runpy
import tokenize
from pathlib import Path

import matplotlib.image
import pytest

ROOT = Path(__file__).parent.parent
NOTES = ("docs/notes.md", "docs/notes.zh.md")
READMES = ("README.md", "README.zh.md")
TOPICS = [
    ("Train mode, and the loop", "训练模式与训练循环"),
    ("Moving to the GPU", "把训练搬到 GPU 上"),
    ("Freezing a backbone, and thawing it", "冻结与解冻主干网络"),
    ("Cosine annealing", "余弦退火"),
    ("Warm-up", "学习率预热"),
    ("What is in optimizer.param_groups", "optimizer.param_groups 里有什么"),
    ("Progress bars", "进度条"),
    ("Two losses, two optimizers", "两个损失、两个优化器"),
]
PARTS = (["What goes wrong", "With lehr"], ["会出什么问题", "用 lehr"])
BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<file>[^)]+)\)")


def _page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _blocks(text: str) -> list[tuple[str, str]]:
    """The kind and the code of every block, without comments, which are in the language of the page."""
    return [(found["kind"], _bare(found["kind"], found["code"])) for found in BLOCK.finditer(text)]


def _bare(kind: str, code: str) -> str:
    if kind == "text" or ">>> " in code:  # what was printed is the same in every language
        return code
    lines = code.splitlines()
    if kind == "python":
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    else:
        lines = [re.sub(r"(^|\s+)#\s.*$", "", line) for line in lines]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _headings(text: str, level: int) -> list[str]:
    outside = BLOCK.sub("", text)
    return re.findall(rf"^{'#' * level} (.*)$", outside, re.MULTILINE)


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("pages", [NOTES, READMES], ids=lambda pages: pages[0])
def test_both_languages_have_the_same_code(pages: tuple[str, str]) -> None:
    """Block by block, both languages show the same code, commands and output; comments may be translated."""
    english, chinese = (_blocks(_page(name)) for name in pages)
    for number, (ours, theirs) in enumerate(zip(english, chinese, strict=False), 1):
        assert theirs == ours, (
            f"block {number} of {pages[1]} is not that of {pages[0]}; copy this one:\n{ours[1]}"
        )
    extra = (english if len(english) > len(chinese) else chinese)[min(len(english), len(chinese)) :]
    assert not extra, (
        f"{pages[0]} has {len(english)} blocks, {pages[1]} {len(chinese)}; only one has:\n{extra[0][1]}"
    )


def test_every_topic_has_its_heading() -> None:
    """Both pages treat every topic, in one order, each with its faults and with lehr's way."""
    for name, topics, parts in zip(NOTES, zip(*TOPICS, strict=True), PARTS, strict=True):
        assert _headings(_page(name), 2) == [f"{number}. {topic}" for number, topic in enumerate(topics, 1)]
        assert _headings(_page(name), 3) == parts * len(TOPICS)


def test_contents_lead_to_the_headings() -> None:
    """Every link within a page leads to a heading of it."""
    for name in (*NOTES, *READMES):
        anchors = {_anchor(heading) for level in (1, 2, 3) for heading in _headings(_page(name), level)}
        within = re.findall(r"\]\(#([^)]+)\)", _page(name))
        assert set(within) <= anchors
        assert len(within) == (len(TOPICS) if name in NOTES else 0)


def test_both_languages_have_the_same_tables_and_figures() -> None:
    """Tables have the same rows, by their code, in both languages, and figures are the same, with a text for those who
    do not see them.
    """
    for pages in (NOTES, READMES):
        english, chinese = (BLOCK.sub("", _page(name)) for name in pages)
        first, second = (re.findall(r"^\|.*\|$", page, re.MULTILINE) for page in (english, chinese))
        assert len(first) == len(second) > 0
        for ours, theirs in zip(first, second, strict=True):
            assert re.findall("`[^`]+`", theirs) == re.findall("`[^`]+`", ours)
        shown = [[(len(alt) > 20, file) for alt, file in IMAGE.findall(page)] for page in (english, chinese)]
        assert shown[0] == shown[1]
        assert all(described for described, _ in shown[0])


def test_pages_link_to_each_other() -> None:
    """A reader of one language finds the other at the top of the page."""
    for pages in (NOTES, READMES):
        for page, other in (pages, pages[::-1]):
            assert f"]({Path(other).name})" in _page(page)[:200]


def test_no_line_break_within_chinese_text() -> None:
    """A paragraph in Chinese is one line: a break in it would be shown as a space."""
    for name in (NOTES[1], READMES[1]):
        assert not re.search(r"[\u3000-\u9fff\uff00-\uffef]\n[^\n#|\-!`\d<>]", BLOCK.sub("\n", _page(name)))


def test_figures_are_drawn(tmp_path: Path) -> None:
    """`scripts/figures.py` draws every figure that the notes show, in the size that lies there, small enough for a page."""
    drawn = runpy.run_path(str(ROOT / "scripts" / "figures.py"))["main"](tmp_path)
    shown = {file for _, file in IMAGE.findall(_page(NOTES[0]))}
    assert {f"figures/{path.name}" for path in drawn} == shown
    for path in drawn:
        kept = ROOT / "docs" / "figures" / path.name
        assert kept.stat().st_size < 100_000
        assert matplotlib.image.imread(kept).shape == matplotlib.image.imread(path).shape


def test_comments_are_taken_out() -> None:
    """The comparison sees code and no comment, and a `#` within a text is code."""
    assert _bare("python", 'x = "# no"  # yes\n# all\n\ny = 1\n') == 'x = "# no"\ny = 1'
    assert _bare("console", "$ make demo     # why\n^C\n") == "$ make demo\n^C"
    assert _bare("text", "a # b\n") == "a # b\n"
