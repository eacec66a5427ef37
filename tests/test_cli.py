"""The command line, as a person meets it: what is printed where, what is written, and how it ends."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lehr import job as jobs
from lehr.__main__ import main
from lehr.errors import DataError, RequestError
from lehr.events import ConditionMet, RunEnded
from lehr.journal import read_journal
from lehr.planning import Plan
from lehr.recipe_file import load_recipe
from lehr.resolving import resolve
from lehr.run import files, models, weights
from lehr.run.folder import opened
from lehr.run.update import Update

SHORT = ("--set", "stages.0.length=1 epochs", "--set", "stages.1.length=1 epochs")
QUICK = ("digits", "--no-scratch", *SHORT)


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


Lehr = Callable[..., Said]


@pytest.fixture
def lehr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lehr:
    """Runs a command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEHR_TRACEBACK", raising=False)

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        try:
            main(arguments)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the built-in digits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli") / "a run"
    main(["fit", *QUICK, "--out", str(folder)])
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images in two folders, one of them broken, and other files."""
    folder = tmp_path / "images"
    (folder / "more" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "more/é.JPG", "more/.hidden/c.png"):
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(folder / name)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "notes.txt").write_text("notes", encoding="utf-8")
    return folder


def journal(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "journal.jsonl").read_text("utf-8").splitlines()]


def test_help_needs_no_torch() -> None:
    """`lehr --help` lists the commands without loading anything slow."""
    program = "import sys\nfrom lehr.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'torch', 'numpy', 'matplotlib', 'pydantic', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program + heavy], capture_output=True, text=True, check=True)
    assert all(f"\n  {command} " in done.stdout for command in ("fit", "init", "plan", "predict"))
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["fit", "plan", "init", "predict"])
def test_every_command_has_help(command: str, lehr: Lehr) -> None:
    """Each command explains itself on standard output and ends well."""
    said = lehr(command, "--help")
    assert said.code == 0
    assert "Usage: lehr" in said.out
    assert not said.err


def test_a_plan_is_a_page_and_trains_nothing(lehr: Lehr, tmp_path: Path) -> None:
    """`lehr plan` prints the page and what to do next, and writes nothing."""
    said = lehr("plan", "digits", "--set", "seed=3")
    assert said.code == 0
    for words in (
        "lehr plan: digits_net",
        "Stages",
        "Groups",
        "Schedules",
        "seed 3",
        "- data: ",
        "- weights: ",
    ):
        assert words in said.out
    assert said.err == "next: lehr fit digits --set seed=3\n"
    assert not list(tmp_path.iterdir())


def test_a_plan_as_json_is_the_plan(lehr: Lehr, tmp_path: Path) -> None:
    """`lehr plan --json` prints nothing but a plan that reads back, the one that `lehr fit` would
    follow."""
    said = lehr("plan", "digits", "--json", *SHORT)
    (tmp_path / "plan.json").write_text(said.out, encoding="utf-8")
    lehr("fit", *QUICK, "--out", "run")
    planned, followed = (Plan.load(tmp_path / name) for name in ("plan.json", "run/plan.json"))
    assert planned.hash == followed.hash


def test_a_plan_can_be_drawn(lehr: Lehr, tmp_path: Path) -> None:
    """`--png FILE` draws the plan as well."""
    said = lehr("plan", "digits", "--png", "plan.png")
    assert "drew plan.png" in said.err
    assert said.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_init_writes_what_fit_would_do(lehr: Lehr, tmp_path: Path) -> None:
    """The recipe of `lehr init` gives the plan that no recipe gives, settings included; nothing is
    overwritten."""
    said = lehr("init", "digits", "--set", "batch_size=8", "--out", "my recipe.toml")
    assert said.err == "wrote my recipe.toml\nnext: lehr plan digits --recipe 'my recipe.toml'\n"
    assert load_recipe(tmp_path / "my recipe.toml").batch_size == 8
    plans = [
        json.loads(lehr("plan", "digits", "--json", *more).out)["hash"]
        for more in (("--recipe", "my recipe.toml"), ("--set", "batch_size=8"))
    ]
    assert plans[0] == plans[1]
    before = (tmp_path / "my recipe.toml").read_bytes()
    again = lehr("init", "digits", "--out", "my recipe.toml")
    assert again.code == 2
    assert "exists already, and nothing is overwritten" in again.last
    assert (tmp_path / "my recipe.toml").read_bytes() == before


def test_init_names_a_place_that_cannot_be_written(lehr: Lehr) -> None:
    """A recipe that cannot be written is a wrong request."""
    said = lehr("init", "digits", "--out", "no/recipe.toml")
    assert said.code == 2
    assert "no/recipe.toml: cannot be written" in said.last


def test_fit_writes_a_whole_run(run: Path) -> None:
    """A run holds recipe, plan, picture, environment, journal, weights, card, listing and checkpoints, and
    nothing half written."""
    names = {p.name for p in run.iterdir()}
    assert names == {
        ".lock", "best.safetensors", "checkpoints", "data.json", "environment.json", "journal.jsonl", "model.json",
        "plan.json", "plan.png", "recipe.toml",
    }  # fmt: skip
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert {re.sub(r"\d+", "N", name) for name in kept} == {
        "N-step-N.json", "N-step-N.safetensors", "best-N.safetensors"
    }  # fmt: skip
    assert journal(run)[0] == "run_started"
    assert journal(run)[-1] == "run_ended"
    assert load_recipe(run / "recipe.toml").augment == ("shift",)
    assert json.loads((run / "model.json").read_text("utf-8"))["weights"] == {"source": "published"}


def test_fit_takes_the_next_free_name_and_overwrites_nothing(lehr: Lehr, tmp_path: Path) -> None:
    """Runs are numbered; a directory that holds one is refused and stays as it is."""
    for number in (1, 2):
        said = lehr("fit", *QUICK)
        assert said.code == 0
        folder = f"runs/digits-digits_net-{number}"
        assert said.err.splitlines()[-2:] == [
            f"kept in {folder}: best.safetensors, recipe.toml, plan.json, plan.png, journal.jsonl",
            f"next: lehr predict {folder} IMAGE...",
        ]
    assert not said.out
    before = (tmp_path / "runs/digits-digits_net-1/journal.jsonl").read_bytes()
    again = lehr("fit", *QUICK, "--out", "runs/digits-digits_net-1")
    assert again.code == 2
    assert "holds a run already" in again.last
    assert (tmp_path / "runs/digits-digits_net-1/journal.jsonl").read_bytes() == before


def test_the_built_in_digits_go_on_with_images_at_hand(lehr: Lehr, tmp_path: Path) -> None:
    """Where the example images are, the next step names them; there is one of each class, and it works."""
    shutil.copytree(Path(__file__).parent.parent / "examples" / "digits", tmp_path / "examples" / "digits")
    said = lehr("fit", "digits", "--no-scratch", "--out", "run")
    assert said.last == "next: lehr predict run examples/digits"
    rows = json.loads(lehr("predict", "run", "examples/digits", "--json").out)
    right = dict(zip("56789", ("five", "six", "seven", "eight", "nine"), strict=True))
    assert {Path(row["path"]).stem for row in rows} == set(right.values())
    assert sum(right[row["top"][0]["class"]] == Path(row["path"]).stem for row in rows) >= 4


def test_what_is_known_of_data_and_weights_is_in_the_journal(run: Path) -> None:
    """A run keeps what was said of data, images and weights before it began."""
    lines = (run / "journal.jsonl").read_text("utf-8").splitlines()
    notes = [event["text"] for event in map(json.loads, lines) if event["event"] == "note"]
    for words in ("data: ", "images: 8 x 8 pixels", "weights: pretrained on the digits 0 to 4"):
        assert sum(note.startswith(words) for note in notes) == 1


def test_from_scratch_makes_the_same_updates() -> None:
    """The other network has the last stage's peak, batch and accumulation, and as many updates."""
    settings = ("stages.1.accumulate=2", "stages.1.batch_size=2", "lr_rule=linear")
    job = jobs.prepare(jobs.Request("digits", settings=settings), fetch=False)
    _, recipe = jobs.from_scratch(job, job.plan.total_steps)
    plan = resolve(recipe, job.facts, samples=len(job.data.listing.train))
    last = job.plan.stages[-1]
    assert (plan.stages[0].accumulate, plan.stages[0].batch_size) == (2, 2)
    assert plan.total_steps == job.plan.total_steps
    assert max(plan.stages[0].peak_lr.values()) == max(last.peak_lr.values())


def test_help_is_short_and_whole(lehr: Lehr) -> None:
    """The help names values by words, keeps its example on a line, and `lehr` alone is the help."""
    assert "  Try: lehr fit digits\n" in lehr().out
    text = lehr("fit", "--help").out
    assert "--workers N " in text
    assert "--size PIXELS " in text
    assert "auto: bf16 on CUDA that has it, else fp32." in " ".join(text.split())
    assert "--top N " in lehr("predict", "--help").out
    assert "x>=" not in text


def test_fit_compares_with_the_same_network_from_scratch(lehr: Lehr) -> None:
    """With `--scratch` the same network is trained from nothing for as many updates, and the difference
    is said."""
    said = lehr("fit", "digits", *SHORT, "--scratch", "--tensorboard", "--out", "run")
    assert said.code == 0, said.err
    assert "the same network from scratch, as many updates (12):" in said.err
    assert said.err.count("12 steps") == 4  # both runs say it at the start and at the end
    line = next(line for line in said.err.splitlines() if line.startswith("valid_accuracy: "))
    assert re.fullmatch(
        r"valid_accuracy: [\d.]+ % fine-tuned, [\d.]+ % from scratch: ([\d.]+ points (better|worse)|no difference)",
        line,
    )
    assert len(list(Path("run/tensorboard").glob("events*"))) == 1


def test_a_folder_of_images_from_end_to_end(lehr: Lehr, tmp_path: Path) -> None:
    """Class folders, a timm model, weights from a file: trained, kept, and used to predict."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("rot", "grün")):
        (tmp_path / "bilder" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 50, (20, 24, 3), np.uint8)
            pixels[..., label] += 200
            Image.fromarray(pixels).save(tmp_path / "bilder" / name / f"{number}.png")
    model = "mobilenetv3_small_050"
    weights.write_weights(timm.create_model(model, num_classes=9).state_dict(), tmp_path / "w.safetensors")
    asked = ("--model", model, "--weights", "w.safetensors", "--size", "32", "--workers", "0", *SHORT)
    said = lehr("fit", "bilder", *asked)
    assert said.code == 0, said.err
    assert "10 to train on, 2 to validate (stratified" in said.err
    assert "crop" not in said.err
    assert "tensors loaded" in said.err
    assert "of another shape" in said.err
    folder = f"runs/bilder-{model}-1"
    origin = json.loads(Path(folder, "model.json").read_text("utf-8"))["weights"]
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert origin == {"source": "w.safetensors", "sha256": digest}
    listing = json.loads(Path(folder, "data.json").read_text("utf-8"))
    assert len(listing["train"]["paths"]) == 10
    assert listing["classes"] == ["grün", "rot"]
    rows = json.loads(lehr("predict", folder, "bilder", "--json").out)
    assert len(rows) == 12
    assert {entry["class"] for entry in rows[0]["top"]} == {"grün", "rot"}


def test_classes_of_one_image_train_without_validation(lehr: Lehr, tmp_path: Path) -> None:
    """Where nothing can be held out, the default recipe asks for no best weights, and a recipe that does
    is refused."""
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 99).save(tmp_path / "data" / name / "1.png")
    asked = ("fit", "data", "--model", "digits_net", "--out", "run", *SHORT)
    said = lehr(*asked, "--set", "restore_best=true")
    assert said.code == 2
    assert "is never measured" in said.last
    assert not (tmp_path / "run").exists()
    said = lehr(*asked, "--scratch")
    assert said.code == 0, said.err
    assert re.search(r"^train_loss: \S+ fine-tuned, \S+ from scratch: ", said.err, re.MULTILINE)


WRONG = {
    "data": (("digit",), r'did you mean "digits"?'),
    "model": (("digits", "--model", "mobilenetv2_10"), 'did you mean "mobilenetv2_100"?'),
    "weights": (("digits", "--weights", "no.pth"), "no.pth: no such file"),
    "weights and none": (("digits", "--weights", "no.pth", "--no-pretrained"), "exclude each other"),
    "recipe": (("digits", "--recipe", "no.toml"), "no.toml: cannot be read"),
    "recipe key": (
        ("digits", "--recipe", "bad.toml"),
        'bad.toml: optimiser: no such key in a recipe; did you mean "optimizer"?',
    ),
    "set key": (("digits", "--set", "stages.0.lrr=1"), 'did you mean "lr"?'),
    "set value": (("digits", "--set", "batch_size=many"), "batch_size"),
    "set nothing": (("digits", "--set", "lr"), "expected KEY=VALUE"),
    "set seed": (
        ("digits", "--set", "seed=-1"),
        "--set seed=-1: expected a whole number from 0 to 2**63 - 1",
    ),
    "set a huge seed": (
        ("digits", "--set", "seed=99999999999999999999"),
        "--set seed=99999999999999999999: expected a whole number from 0 to 2**63 - 1",
    ),
    "pattern": (("digits", "--set", "stages.0.train=heed"), "did you mean"),
    "augment": (("digits", "--set", "augment=flipp"), 'did you mean "flip"?'),
    "monitor": (("digits", "--set", "monitor=valid_acuracy"), 'did you mean "valid_accuracy"'),
    "optimizer": (("digits", "--set", "optimizer=adamx"), "adamw"),
    "size": (
        ("digits", "--model", "torchvision/squeezenet1_1", "--no-pretrained", "--size", "5"),
        "cannot take images of 5 x 5",
    ),
    "option": (("digits", "--sett", "x"), 'lehr: no such option --sett; did you mean "--set"'),
    "rate": (
        ("digits", "--lr", "1"),
        "no such option --lr; it is said in the recipe: --set stages.0.lr=...; see lehr ",
    ),
    "batch": (
        (
            "digits",
            "--batch-size=8",
        ),
        "it is said in the recipe: --set batch_size=...; see lehr ",
    ),
    "epochs": (
        ("digits", "--epochs", "5"),
        'it is said in the recipe: --set "stages.0.length=5 epochs"; see ',
    ),
    "argument": ((), "lehr: missing argument 'DATA'; see lehr "),
    "pixels": (("digits", "--size", "0"), "'--size': 0; expected a whole number, 1 or more; see lehr "),
}


@pytest.mark.parametrize("command", ["plan", "fit"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_request_is_one_clear_message(wrong: str, command: str, lehr: Lehr, tmp_path: Path) -> None:
    """What a person got wrong ends with 2 and a message that helps: no traceback, nothing printed,
    nothing written."""
    (tmp_path / "bad.toml").write_text(
        'optimiser = "adamw"\n[[stages]]\nlength = "1 epoch"\ntrain = "all"\nlr = 1.0\n'
    )
    arguments, words = WRONG[wrong]
    said = lehr(command, *arguments)
    assert said.code == 2
    assert words in said.err
    assert said.last.startswith("lehr: ")
    assert "Traceback" not in said.err
    assert "Usage" not in said.err
    assert not said.out
    assert [p.name for p in tmp_path.iterdir()] == ["bad.toml"]


@pytest.mark.parametrize(
    "option", [("--device", "gpu"), ("--precision", "fp8"), ("--workers", "-1"), ("--out", "file")]
)
def test_where_to_train_is_checked_before_anything_is_written(
    option: tuple[str, str], lehr: Lehr, tmp_path: Path
) -> None:
    """A wrong device, precision, number of workers or directory ends with 2 and leaves nothing behind."""
    (tmp_path / "file").touch()
    said = lehr("fit", *QUICK, *option)
    assert said.code == 2
    assert "Traceback" not in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_compiling_is_refused_before_the_data_are_read(
    lehr: Lehr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--compile` without a compiler ends with 2, though the data are not there either."""
    monkeypatch.setattr("lehr.run.compiling.cannot_compile", lambda *_: "there is no compiler")
    said = lehr("fit", "nowhere", "--compile")
    assert (said.code, said.last) == (2, "lehr: --compile: there is no compiler")
    assert not list(tmp_path.iterdir())


def test_what_stops_a_run_before_it_begins_leaves_only_what_was_there(
    lehr: Lehr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that a person made keeps the person's files, and loses what lehr had put beside them."""

    def refuse(*_: object, **__: object) -> None:
        raise DataError("not these data")

    monkeypatch.setattr("lehr.run.loop.fit", refuse)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.json").write_text("mine", encoding="utf-8")
    for out in ("mine", "new/run"):
        said = lehr("fit", *QUICK, "--out", out, "--tensorboard")
        assert (said.code, said.last) == (2, "lehr: not these data")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["model.json"]
    assert not (tmp_path / "new" / "run").exists()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
    """Let update number `at` raise `error`."""
    update = Update.__call__

    def stopped(self: Update, window: object, step: int) -> object:
        if step == at:
            raise error
        return update(self, window, step)  # type: ignore[arg-type]

    monkeypatch.setattr(Update, "__call__", stopped)


def test_an_interrupted_run_says_so(lehr: Lehr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with 130, the journal's last event says interrupted, and the best weights so far can
    be used."""
    failing(monkeypatch, KeyboardInterrupt(), 8)
    said = lehr("fit", *QUICK, "--out", "run")
    assert said.code == 130
    assert said.last == "to go on: lehr resume run"
    assert "the best weights so far are kept: lehr predict run IMAGE..." in said.err
    assert journal(tmp_path / "run")[-1] == "interrupted"


WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py"
lehr.errors.DataError: a.jpg: gone"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "run/x"),
            "run/x: No space left on device; free some space",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            "out of memory: CUDA out of memory.; try a smaller batch_size",
        ),
        (MemoryError(), "out of memory: MemoryError; try a smaller batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers 0)"),
        (RuntimeError("cuDNN error\nmore"), "RuntimeError: cuDNN error  [LEHR_TRACEBACK=1 shows where]"),
        (DataError(WORKER), "a.jpg: gone"),
    ],
    ids=["disk", "gpu memory", "memory", "worker killed", "torch", "image gone"],
)
def test_a_failed_run_ends_with_one_line(
    error: Exception, said: str, lehr: Lehr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails after the run has begun ends with 1 and one line that says why; the journal has it,
    too."""
    failing(monkeypatch, error, 3)
    done = lehr("fit", *QUICK, "--out", "run")
    assert done.code == 1
    assert done.last.startswith("lehr: ")
    assert said in done.last
    assert "Traceback" not in done.err
    assert done.err.count(said) == 1
    assert journal(tmp_path / "run")[-1] == "run_failed"


def test_a_mistake_in_lehr_keeps_its_traceback(lehr: Lehr, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a mistake of ours explains is not hidden: it is said to be one, and the traceback
    follows."""
    failing(monkeypatch, KeyError("oops"), 3)
    with pytest.raises(KeyError, match="oops"):
        lehr("fit", *QUICK, "--out", "run")


def test_a_traceback_can_be_asked_for(lehr: Lehr, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LEHR_TRACEBACK set, what another package raised comes whole."""
    failing(monkeypatch, RuntimeError("cuDNN error"), 3)
    monkeypatch.setenv("LEHR_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="cuDNN error"):
        lehr("fit", *QUICK, "--out", "run")


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the disk of the run full for files whose name begins so; elsewhere there is room."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    save = files.save_file

    def make(beginning: str) -> None:
        def limited(tensors: dict[str, torch.Tensor], path: Path, **said: object) -> None:
            if path.name.removeprefix(".").startswith(beginning) and "elsewhere" not in path.parts:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            save(tensors, path, **said)

        monkeypatch.setattr(files, "save_file", limited)

    return make


def test_weights_that_cannot_be_written_end_the_run(
    lehr: Lehr, full: Callable[[str], None], tmp_path: Path
) -> None:
    """A disk that is full when the best weights are written stops no training; the run ends with 1, names the
    file, and says where the weights are instead."""
    full("best")
    said = lehr("fit", *QUICK, "--out", "run")
    assert said.code == 1
    found = re.fullmatch(
        r"lehr: run: the run is done, but this directory is not whole: No space left on device: best-\d\.safetensors; "
        r"the weights are in (\S+/best\.safetensors)",
        said.last,
    )
    assert found, said.err
    assert set(weights.read_weights(Path(found[1]))) == set(
        jobs.make_model("digits_net", 5).module.state_dict()
    )
    told = journal(tmp_path / "run")
    assert "checkpoint_failed" in told
    assert told[-1] == "run_ended"
    assert Path(found[1]).is_relative_to(tmp_path / "elsewhere")


def test_a_run_that_cannot_be_saved_at_its_start_is_not_begun(
    lehr: Lehr, full: Callable[[str], None], tmp_path: Path
) -> None:
    """A disk that is full before the first step ends the run with 1 and words, and nothing is left of it."""
    full("0")
    said = lehr("fit", *QUICK, "--out", "run")
    assert said.code == 1
    assert (
        "lehr: run: the run cannot be saved, so it was not begun: No space left on device: 0001-step-0"
        in said.last
    )
    assert "epoch 1" not in said.err
    assert not (tmp_path / "run").exists()


def test_published_weights_are_announced_and_their_absence_explained(
    lehr: Lehr, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights may have to be fetched that is said; where they cannot be, the message says two
    ways out."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    said = lehr("fit", "digits", "--model", "mobilenetv2_100")
    first, second = said.err.splitlines()
    assert first.startswith("mobilenetv2_100: fetching its published weights")
    assert said.code == 2
    assert "(no network)" in second
    assert "--weights FILE" in second
    assert "--no-pretrained" in second


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "torchvision/squeezenet1_1"])
def test_planning_fetches_no_weights(
    model: str, lehr: Lehr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lehr plan` and `lehr init` choose the recipe of a pretrained model without its weights, say who fetches
    them, and their plan is the one that the weights would have given."""
    asked = ("digits", "--model", model, "--size", "32", "--recipe", "recipe.toml")
    said = lehr("init", *asked[:-2])
    assert said.code == 0, said.err
    assert "fetching" not in said.err
    assert load_recipe(tmp_path / "recipe.toml").stages[0].train == ("head",)
    assert "  - weights: published, fetched by lehr fit" in lehr("plan", *asked).out
    planned = json.loads(lehr("plan", *asked, "--json").out)["hash"]
    made = models.make_model(
        model, 5, pretrained=False, size=32
    )  # as it would be with its weights, but for them
    wanted: list[bool] = []

    def make(*_: object, pretrained: bool, **__: object) -> models.Made:
        wanted.append(pretrained)
        return made

    monkeypatch.setattr(jobs, "make_model", make)
    fetched = jobs.prepare(jobs.Request("digits", model=model, size=32, recipe="recipe.toml"), fetch=True)
    assert wanted == [True]
    assert planned == fetched.plan.hash


@pytest.mark.usefixtures("images")
def test_predict_prints_a_table(lehr: Lehr, run: Path) -> None:
    """A row for each image in a folder, in columns; a broken one is a row with its error, and the end is
    1."""
    said = lehr("predict", str(run), "images", "--top", "2")
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines] == ["images/a.png", "images/bad.png", "images/more/é.JPG"]
    assert lines[0].count("%") == 2
    assert "error: " in lines[1]
    assert lines[0].index("%") == lines[2].index("%")
    assert said.code == 1
    assert "mend" not in lines[1]
    assert said.last == "1 image could not be read; its row has the error"


@pytest.mark.usefixtures("images")
def test_predict_prints_csv(lehr: Lehr, run: Path) -> None:
    """`--csv` has a line for each class of each image, under a header that names the columns."""
    rows = list(csv.DictReader(io.StringIO(lehr("predict", str(run), "images", "--csv", "--top", "2").out)))
    assert [row["rank"] for row in rows] == ["1", "2", "", "1", "2"]
    assert rows[2]["path"] == "images/bad.png"
    assert rows[2]["error"]
    assert not rows[2]["class"]
    assert {row["class"] for row in rows} <= {"", *"56789"}
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])


@pytest.mark.usefixtures("images")
def test_predict_prints_json(lehr: Lehr, run: Path) -> None:
    """`--json` is one list, and nothing else on standard output; probabilities of all classes sum to 1."""
    said = lehr(
        "predict", str(run), "images/a.png", "images/more/*.JPG", "images/a.png", "--json", "--top", "5"
    )
    rows = json.loads(said.out)
    assert said.code == 0
    assert [row["path"] for row in rows] == ["images/a.png", "images/more/é.JPG"]
    assert all(sum(entry["probability"] for entry in row["top"]) == pytest.approx(1) for row in rows)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.png",), "nowhere.png: no such file or folder, and as a glob it matches nothing"),
        (("images/more/.hidden/*.tif",), "matches nothing"),
        (("empty",), "empty: no image below this folder; known endings: "),
        (("images", "--csv", "--json"), "exclude each other"),
        (("images", "--device", "gpu"), "device"),
        ((), "missing argument"),
    ],
)
def test_a_wrong_prediction_is_refused(
    arguments: tuple[str, ...], words: str, lehr: Lehr, run: Path, tmp_path: Path
) -> None:
    """Paths that mean nothing and options that contradict each other end with 2 and say so."""
    (tmp_path / "empty").mkdir()
    said = lehr("predict", str(run), *arguments)
    assert said.code == 2
    assert words in said.err
    assert not said.out
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("images")
def test_a_run_that_is_none_is_refused(lehr: Lehr) -> None:
    """Predicting with something that is no run ends with 2."""
    said = lehr("predict", "images", "images")
    assert said.code == 2
    assert said.last == "lehr: images: not a run directory. Expected a directory that lehr fit made"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """`lehr plan digits | head` shows no traceback."""
    command = [sys.executable, "-m", "lehr", "plan", "digits"]
    here = {**os.environ, "PYTHONPATH": str(Path(jobs.__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=here
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said in ("", "next: lehr fit digits\n")


def test_a_directory_that_another_run_has_taken_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that begin in one directory at the same moment, the one that is refused takes nothing away."""
    monkeypatch.chdir(tmp_path)
    job = jobs.prepare(jobs.Request("digits"), fetch=False)
    with jobs.new_run(job, "run") as first, ExitStack() as training:
        with pytest.raises(RequestError, match="holds a run"), jobs.new_run(job, "run") as second:  # noqa: PT012
            training.enter_context(opened(first.path, resume=False))
            first.journal.touch()
            opened(second.path, resume=False).__enter__()
        assert first.journal.exists()
        assert (first.path / "model.json").is_file()


def test_a_longer_run_after_an_early_end(lehr: Lehr) -> None:
    """A run in which a stage has ended on evidence is made longer from where it is: the rates that are shown are those of
    the run as it went, and it ends as long as it is said.
    """
    said = lehr(
        "fit", "digits", "--no-scratch", "--out", "run", "--set", "stages.0.length=10 epochs",
        "--set", "stages.0.until=train_error < 0.99", "--set", "stages.1.length=2 epochs",
    )  # fmt: skip
    assert said.code == 0, said.err
    (before,) = (
        r.event for r in read_journal(Path("run/journal.jsonl")) if isinstance(r.event, ConditionMet)
    )
    assert before.total_steps < 10 * 6
    said = lehr("resume", "run", "--extend", "1 epoch")
    assert said.code == 0, said.err
    assert re.search(rf"^ +step .*\n +{before.total_steps} ", said.err, re.MULTILINE)  # from where the run is
    ends = [r.event for r in read_journal(Path("run/journal.jsonl")) if isinstance(r.event, RunEnded)]
    assert [end.step for end in ends] == [before.total_steps, before.total_steps + 6]


OBJECTIVES = """
[[stages]]
length = "2 epochs"
[[stages.objectives]]
name = "a"
train = "head"
lr = 1e-3
[[stages.objectives]]
name = "b"
train = "backbone"
lr = 1e-4
"""


def test_objectives_on_the_command_line(lehr: Lehr) -> None:
    """A recipe with objectives is planned, and refused where it would be trained: functions cannot stand in a file."""
    Path("two.toml").write_text(OBJECTIVES, encoding="utf-8")
    said = lehr("plan", "digits", "--recipe", "two.toml")
    assert said.code == 0, said.err
    assert "a: head, b: backbone" in said.out
    assert said.err.splitlines()[-1].startswith("next: in Python, lehr.fit(")
    said = lehr("fit", "digits", "--recipe", "two.toml", "--out", "run")
    assert said.code == 2
    assert "stages.0.objectives: 'a' has no loss function; give it in Python" in said.err
    assert not Path("run").exists()
    said = lehr("verify", "two.toml", "--data", "digits")
    assert said.code == 2
    assert "objectives have loss functions, which only Python can give" in said.err


def test_a_condition_that_nothing_measures(lehr: Lehr) -> None:
    """A condition on what the command line does not measure is refused before it is planned, with the nearest name."""
    said = lehr("plan", "digits", "--set", "stages.0.until=train_eror < 0.8")
    assert said.code == 2
    assert "stages.0.until: 'train_eror' is not measured; did you mean \"train_error\"" in said.err
