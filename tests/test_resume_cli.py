"""`lehr resume`, as a person meets it: what is printed, what is written, how it ends."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from lehr.__main__ import main
from lehr.events import Note, Resumed, RunEnded
from lehr.planning import Plan
from lehr.recipe_file import load_recipe
from lehr.run import compiling
from lehr.run.update import Update
from small_run import checkpoints, content, events, fit, forge, losses

STOP = 5


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


def command(*arguments: object) -> int:
    """The exit code of a command in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def lehr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Runs a command in an empty directory; no traceback, and no line that only lehr's authors understand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEHR_TRACEBACK", raising=False)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        said = Said(command(*arguments), *capsys.readouterr())
        assert "Traceback" not in said.err
        assert "a mistake in lehr" not in said.err
        return said

    return run


class Templates(NamedTuple):
    data: Path
    stopped: Path
    ended: Path


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    """A folder of tiny images; a run on it that was stopped by Ctrl-C in its second stage, and one that has ended."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("resume")
    random = np.random.default_rng(3)
    for name, level in (("dark", 60), ("light", 190)):
        (root / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(level - 50, level + 50, (10, 10), np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f"{number}.png")
    recipe = root / "recipe.toml"
    lines = (
        '[[stages]]\nlength = "1 epochs"\ntrain = "head"\nlr = 0.05',
        '[[stages]]\nlength = "2 epochs"\ntrain = "all"\nlr = 0.01',
    )
    recipe.write_text(
        "\n".join(["batch_size = 8", 'schedule = { shape = "constant" }', "ema = 0.9", *lines]) + "\n"
    )
    said = (
        "--recipe",
        recipe,
        "--model",
        "digits_net",
        "--no-scratch",
        "--workers",
        "0",
        "--checkpoint",
        "1000 steps",
    )
    with stopping_in(STOP):
        assert command("fit", root / "data", *said, "--out", root / "stopped") == 130
    assert command("fit", root / "data", *said, "--out", root / "ended") == 0
    return Templates(root / "data", root / "stopped", root / "ended")


class stopping_in:  # noqa: N801 - a context, as in `with stopping_in(5):`
    """Ctrl-C comes in the `count`-th update."""

    def __init__(self, count: int, number: signal.Signals = signal.SIGINT) -> None:
        self.left, self.number, self.update = count, number, Update.__call__

    def __enter__(self) -> None:
        def call(update: Update, window: Any, step: int) -> Any:
            self.left -= 1
            if not self.left:
                signal.raise_signal(self.number)
            return self.update(update, window, step)

        Update.__call__ = call  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Update.__call__ = self.update  # type: ignore[method-assign]


@pytest.fixture
def stopped(templates: Templates, tmp_path: Path) -> Path:
    """A copy of the run that was stopped."""
    return Path(shutil.copytree(templates.stopped, tmp_path / "run"))


@pytest.fixture
def ended(templates: Templates, tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates.ended, tmp_path / "run"))


@pytest.fixture
def pets(templates: Templates, tmp_path: Path) -> Path:
    """A copy of the data."""
    return Path(shutil.copytree(templates.data, tmp_path / "moved"))


def same_as(ended: Path, run: Path) -> bool:
    """Whether two runs have come to the same bits and losses."""
    best = [(folder / "best.safetensors").read_bytes() for folder in (ended, run)]
    return best[0] == best[1] and losses(ended) == losses(run)


# --- going on ---


def test_a_stopped_run_ends_as_if_it_had_not_been(
    templates: Templates, stopped: Path, lehr: Callable[..., Said]
) -> None:
    """`lehr resume RUN` ends with the bits of the run that nobody stopped, and says what to do next."""
    assert len(losses(stopped)) == STOP
    said = lehr("resume", stopped)
    assert said.code == 0, said.err
    assert not said.out
    assert said.last.startswith("next: lehr predict")
    assert same_as(templates.ended, stopped)
    assert [event.step for event in events(stopped) if isinstance(event, Resumed)] == [STOP]


def test_a_compiled_run_goes_on_compiled(
    templates: Templates, tmp_path: Path, lehr: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began with `--compile` is compiled when it goes on, and says how it is not where that is said."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "_INDUCTOR", "eager")  # which needs no time
    recipe = templates.data.parent / "recipe.toml"
    said = ("--recipe", recipe, "--model", "digits_net", "--no-scratch", "--workers", "0", "--compile")
    for name in ("run", "other"):
        with stopping_in(STOP):
            assert lehr("fit", templates.data, *said, "--out", name).code == 130
    assert lehr("resume", "run").code == 0
    assert same_as(templates.ended, tmp_path / "run")
    assert lehr("resume", "other", "--no-compile").code == 0
    told = [
        [e.text for e in events(tmp_path / name) if isinstance(e, Note) and "compile" in e.text]
        for name in ("run", "other")
    ]
    assert [len([text for text in texts if "compiled by eager" in text]) for texts in told] == [2, 1]
    assert not any("close, not the same" in text for text in told[0])
    assert "compile off, was eager" in told[1][-1]


def test_the_way_on_is_said(templates: Templates, lehr: Callable[..., Said], tmp_path: Path) -> None:
    """A run that is stopped says how to go on, and that is the command that goes on; again and again."""
    run = Path(shutil.copytree(templates.stopped, tmp_path / "a run; with spaces"))
    with stopping_in(1):
        said = lehr("resume", run)
    assert said.code == 130
    (way,) = [line for line in said.err.splitlines() if line.startswith("to go on: ")]
    assert lehr(*shlex.split(way.removeprefix("to go on: lehr "))).code == 0
    assert same_as(templates.ended, run)


def test_sigterm_is_143(stopped: Path, lehr: Callable[..., Said]) -> None:
    """What asks a process to end leaves a checkpoint, and the exit code that says so."""
    with stopping_in(2, signal.SIGTERM):
        said = lehr("resume", stopped)
    assert said.code == 143
    assert checkpoints(stopped)[-1].stem.endswith(f"step-{STOP + 2}")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_number_of_workers_does_not_matter(
    templates: Templates, stopped: Path, lehr: Callable[..., Said]
) -> None:
    """A run that was begun without workers may go on with one: the bits are the same."""
    said = lehr("resume", stopped, "--workers", "1")
    assert said.code == 0, said.err
    assert same_as(templates.ended, stopped)


def test_an_ended_run_is_left_alone(ended: Path, lehr: Callable[..., Said]) -> None:
    """Of a run that has ended it is said so, and nothing in it changes."""
    before = content(ended)
    said = lehr("resume", ended)
    assert said.code == 0
    assert "has ended already" in said.err
    assert content(ended) == before


def test_settings_of_saving_stay_unless_they_are_said(stopped: Path, lehr: Callable[..., Said]) -> None:
    """How often a run is saved, and how much is kept, is as it was begun, but for what is said anew."""
    with stopping_in(1):
        lehr("resume", stopped, "--keep", "7")
    state = json.loads(checkpoints(stopped)[-1].read_text())
    assert state["settings"] == {"every": "1000 steps", "keep": 7, "keep_best": 1}


# --- other data ---


def test_data_that_have_moved(
    templates: Templates, stopped: Path, pets: Path, lehr: Callable[..., Said]
) -> None:
    """Data that lie elsewhere now are found with `--data`; the bits are the same."""
    said = lehr("resume", stopped, "--data", pets)
    assert said.code == 0, said.err
    assert same_as(templates.ended, stopped)


def test_data_that_are_gone(stopped: Path, tmp_path: Path, lehr: Callable[..., Said]) -> None:
    """Where the data are not where they were, it is said how to say where they are."""
    listing = stopped / "data.json"
    listing.write_text(
        listing.read_text().replace(str(json.loads(listing.read_text())["root"]), str(tmp_path / "gone"))
    )
    said = lehr("resume", stopped)
    assert said.code == 2
    assert "--data" in said.err


def changed(folder: Path) -> str:
    name = "dark/3.png"
    Image.fromarray(np.full((10, 10), 61, np.uint8)).save(folder / name)
    return name


def deleted(folder: Path) -> str:
    (folder / "light" / "5.png").unlink()
    return "light/5.png"


def added(folder: Path) -> str:
    shutil.copy(folder / "dark" / "1.png", folder / "light" / "new.png")
    return "light/new.png"


def broken(folder: Path) -> str:
    (folder / "light" / "7.png").write_bytes(b"no image")
    return "light/7.png"


@pytest.mark.parametrize("change", [changed, deleted, added, broken])
def test_an_image_that_is_another_is_named(
    change: Callable[[Path], str], stopped: Path, pets: Path, lehr: Callable[..., Said]
) -> None:
    """Data that are not as they were are refused, and the image is named; the run is as it was."""
    before, name = content(stopped), change(pets)
    said = lehr("resume", stopped, "--data", pets)
    assert said.code == 2
    assert name in said.err.replace("\n", " ")
    assert {k: v for k, v in content(stopped).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


# --- a changed plan ---


@pytest.mark.parametrize("which", ["ended", "stopped"])
def test_a_longer_run(which: str, templates: Templates, lehr: Callable[..., Said], tmp_path: Path) -> None:
    """`--extend` shows the old and the new rates, trains on, and leaves recipe, plan and picture of the longer run."""
    run = Path(shutil.copytree(getattr(templates, which), tmp_path / "run"))
    old, picture = losses(run), (run / "plan.png").read_bytes()
    said = lehr("resume", run, "--extend", "1 epochs")
    assert said.code == 0, said.err
    assert "changed: stage 2: steps" in said.err
    assert losses(run)[: len(old)] == old
    plan = Plan.load(run / "plan.json")
    assert len(losses(run)) == plan.total_steps > len(losses(templates.ended))
    assert load_recipe(run / "recipe.toml").stages[-1].length == "3 epochs"
    assert (run / "plan.png").read_bytes() != picture
    assert [e.step for e in events(run) if isinstance(e, RunEnded)][-1] == plan.total_steps
    assert lehr("resume", run).code == 0


def test_another_rate(stopped: Path, lehr: Callable[..., Said]) -> None:
    """`--set` changes what can be changed in the middle, and shows it; then it is the run's recipe."""
    said = lehr("resume", stopped, "--set", "stages.1.lr=1e-3")
    assert said.code == 0, said.err
    assert "0.001, was 0.01" in said.err
    assert load_recipe(stopped / "recipe.toml").stages[-1].lr == 1e-3


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--set", "batch_size=4"), "stage 1 is done"),
    (("--set", "optimizer=sgd"), "the optimizer is sgd"),
    (("--set", "stages.0.lr=x"), "stages"),
    (("--set", "nothing=1"), "nothing"),
    (("--set", "lr"), "lr"),
    (("--set", "stages.7.lr=1"), "stages"),
    (("--set", "monitor=loss"), "monitor"),
    (("--extend", "5"), "no unit"),
    (("--extend", "10%"), "is a share"),
    (("--extend", "0 epochs"), "adds nothing"),
    (("--extend", "20 steps"), "cannot be added to"),
    (("--extend", "-1 epochs"), "extend"),
    (("--extend", "x" * 10_000), "extend"),
    (("--extend", ""), "extend"),
    (("--checkpoint", "5"), "no unit"),
    (("--checkpoint", "0 steps"), "never passes"),
    (("--keep", "0"), "1 or more"),
    (("--device", "tpu"), "device"),
    (("--batch-size", "4"), "no such option"),
    (("--workers", "-1"), "0 or more"),
    (("--data", "nowhere"), "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    REFUSED,
    ids=lambda value: value[-1][:30] if isinstance(value, tuple) else "refused",
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...], words: str, stopped: Path, lehr: Callable[..., Said]
) -> None:
    """What cannot be done ends with exit code 2 and a line that names it, and the run is as it was."""
    before = content(stopped)
    said = lehr("resume", stopped, *arguments)
    assert said.code == 2, said.err
    assert words in said.err
    assert len(said.err) < 3000
    assert "to go on: lehr resume" not in said.err
    assert {k: v for k, v in content(stopped).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


# --- no run ---


def test_a_folder_that_is_no_run(pets: Path, lehr: Callable[..., Said]) -> None:
    """A folder that is no run is called so, and nothing is written into it."""
    before = content(pets)
    said = lehr("resume", pets)
    assert (said.code, content(pets)) == (2, before)
    assert "not a run directory" in said.last


def test_no_such_folder(stopped: Path, lehr: Callable[..., Said]) -> None:
    """A name that is nearly that of a run is answered with that."""
    said = lehr("resume", str(stopped) + "n")
    assert said.code == 2
    assert 'did you mean "run"' in said.last
    assert not Path(str(stopped) + "n").exists()


def test_a_file_is_no_run(stopped: Path, lehr: Callable[..., Said]) -> None:
    """A file is no run, nor is a path that no system takes."""
    for name in (stopped / "recipe.toml", "a\0b", ""):
        assert lehr("resume", name).code == 2


def test_a_run_of_one_s_own_model(tmp_path: Path, lehr: Callable[..., Said]) -> None:
    """A run of lehr.fit is gone on with in Python, and it is said how."""
    fit(tmp_path / "own", stop=5)
    said = lehr("resume", tmp_path / "own")
    assert said.code == 2
    assert 'resume="auto"' in said.last


def test_a_run_without_checkpoints(stopped: Path, lehr: Callable[..., Said]) -> None:
    """A run that has no checkpoint is refused in words."""
    shutil.rmtree(stopped / "checkpoints")
    said = lehr("resume", stopped)
    assert said.code == 2
    assert "holds no checkpoint" in said.last


# --- damage ---

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda _: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "other": lambda _: b"\x89PNG\r\n\x1a\n",
    "list": lambda _: b"[1, 2]",
    "deep": lambda _: b"[" * 10**5,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["recipe.toml", "model.json", "data.json"])
def test_a_damaged_file_is_named(name: str, damage: str, stopped: Path, lehr: Callable[..., Said]) -> None:
    """A damaged file of the run is named with what is wrong, in a line or two; the run is as it was."""
    path = stopped / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = content(stopped)
    said = lehr("resume", stopped)
    assert said.code == 2, said.err
    assert name in said.err or (name, damage) == ("recipe.toml", "empty")
    assert len(said.err) < 2000
    assert content(stopped) == before


@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
def test_a_damaged_plan(damage: str, templates: Templates, stopped: Path, lehr: Callable[..., Said]) -> None:
    """plan.json is needed to judge a change, and then named; without a change the run goes on without it."""
    path = stopped / "plan.json"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    said = lehr("resume", stopped, "--extend", "1 epochs")
    assert said.code == 2, said.err
    assert "plan.json" in said.err
    assert lehr("resume", stopped).code == 0
    assert same_as(templates.ended, stopped)


@pytest.mark.parametrize("name", ["recipe.toml", "model.json", "data.json"])
def test_a_missing_file_is_named(name: str, stopped: Path, lehr: Callable[..., Said]) -> None:
    """A file of the run that is missing is refused in words."""
    (stopped / name).unlink()
    said = lehr("resume", stopped)
    assert said.code == 2, said.err


def test_checkpoints_that_are_all_damaged(stopped: Path, lehr: Callable[..., Said]) -> None:
    """Where no checkpoint is good, each is named; it is not said that there is none."""
    for path in checkpoints(stopped):
        path.write_text("{}")
    said = lehr("resume", stopped)
    assert said.code == 2
    assert "no checkpoint is good" in said.err
    assert all(path.stem in said.err for path in checkpoints(stopped))


def test_a_damaged_checkpoint_is_passed_over(
    templates: Templates, stopped: Path, lehr: Callable[..., Said]
) -> None:
    """The newest checkpoint is damaged: it is named, and the run goes on from the one before to the same bits."""
    last = checkpoints(stopped)[-1]
    last.with_suffix(".safetensors").write_bytes(b"")
    said = lehr("resume", stopped)
    assert said.code == 0
    assert any(isinstance(e, Note) and last.stem in e.text for e in events(stopped))
    assert same_as(templates.ended, stopped)


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "device": lambda s: s["made"].update(device="\x1b[2Jcuda:99"),
    "precision": lambda s: s["made"].update(precision="fp8"),
    "every": lambda s: s["settings"].update(every="now and then"),
    "long": lambda s: s["settings"].update(every="9" * 10**6 + " steps"),
    "place": lambda s: s["at"].update(stage=10**6),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_checkpoint_is_refused(what: str, stopped: Path, lehr: Callable[..., Said]) -> None:
    """What a forged checkpoint says of device, precision or saving is checked like a person's own words."""
    for path in checkpoints(stopped):
        forge(path, FORGED[what])
    said = lehr("resume", stopped)
    assert said.code == 2, said.err
    assert "\x1b" not in said.err
    assert len(said.err) < 2000
    assert "to go on: " not in said.err


def test_words_from_a_file_are_escaped(stopped: Path, lehr: Callable[..., Said]) -> None:
    """What a checkpoint says of the machine is shown without what a terminal would act on."""
    forge(checkpoints(stopped)[-1], lambda state: state["made"].update(torch="\x1b[2J\x07evil"))
    said = lehr("resume", stopped)
    assert said.code == 0
    assert "close, not the same" in said.err
    assert "\x1b[2J" not in said.err + said.out
    assert "\x07" not in said.err + said.out
