"""The command line. It says what happens and what to do next; all that it does is in the package.

Only click is imported here at the top, so that `lehr --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

import click

from lehr._version import __version__
from lehr.options import at_least, job_options, run_options, setting_option
from lehr.untrusted import printable_lines

if TYPE_CHECKING:
    from pathlib import Path

    from lehr.events import Observer
    from lehr.job import Change, Job, Request
    from lehr.run.folder import RunFolder

_KEPT = ("best.safetensors", "recipe.toml", "plan.json", "plan.png", "journal.jsonl")
_EXAMPLES = "examples/digits"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(__version__, prog_name="lehr")
@click.pass_context
def main(context: click.Context) -> None:
    """Fine-tune PyTorch models in stages: freeze, warm up, train the head, thaw, anneal.

    DATA is a folder of class folders (or one with train/ and val/), a .npz file, a folder with CIFAR-10's
    files, or the built-in name "digits".

    \b
    Try: lehr fit digits
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@job_options
@click.option("--out", metavar="DIR", help="New directory for the run.  [default: runs/DATA-MODEL-N]")
@run_options(begun=False)
@click.option(
    "--scratch/--no-scratch",
    default=None,
    help="Train the same network from scratch, too, and compare.  [default: for digits only]",
)
def fit(out: str | None, scratch: bool | None, **asked: Any) -> None:
    """Fine-tune a model on DATA, in stages."""
    from lehr import job as jobs

    said = _run_said(asked)
    _check_machine(said)
    _check_every(said)
    job = _prepared(_request(asked), fetch=True)
    with jobs.new_run(job, out) as folder:
        _say(f"{job.model_name} on {job.request.data}: {len(job.data.classes)} classes, run in {folder.path}")
        result = _train(job, folder, said)
    try:
        if scratch if scratch is not None else job.request.data == "digits":
            _compare(job, result, said)
    finally:  # the run is done, whatever becomes of the comparison
        _kept(job, folder)


@main.command(short_help="Go on with RUN from its last checkpoint.")
@click.argument("run")
@click.option("--extend", metavar="LENGTH", help='Train the last stage longer: "10 epochs", "400 steps".')
@setting_option
@click.option("--data", metavar="DATA", help="Where the data are now, if they have moved.")
@run_options(begun=True)
def resume(run: str, extend: str | None, data: str | None, settings: tuple[str, ...], **asked: Any) -> None:
    """Go on with RUN from its last checkpoint: it ends as if it had not been stopped."""
    from lehr import job as jobs

    said = _run_said(asked)
    _check_every(said)
    job = _with_bar(
        lambda checked: jobs.prepare_again(run, data=data, settings=settings, extend=extend, progress=checked)
    )
    folder, begun = jobs.begun_run(run)
    said = {**begun, **said, "checkpoint": {**begun["checkpoint"], **said["checkpoint"]}}
    changed = extend is not None or bool(settings)
    change = jobs.change(job, folder) if changed else None
    _say(f"{job.model_name} on {job.request.data}: {len(job.data.classes)} classes, run in {folder.path}")
    if change:
        _say(str(change))
    _train(job, folder, {**said, "resume": "changed" if changed else True}, change)
    _kept(job, folder)


@main.command(short_help="Prove that a stopped run ends with the same bits.")
@click.argument("what", metavar="RECIPE|RUN")
@click.option(
    "--data", metavar="DATA", help="The recipe's data, or where a run's are now.  [default: digits]"
)
@click.option("--model", metavar="NAME", help="The recipe's model, as in lehr fit.")
@click.option(
    "--weights", metavar="FILE", help="Begin with the weights in this file.  [default: random ones]"
)
@click.option("--size", type=at_least(1), metavar="PIXELS", help="Side of the images, as in lehr fit.")
@click.option("--no-pretrained", "pretrained", flag_value=False, default=True, help="As in lehr fit.")
@click.option(
    "--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.  [default: as the run, or auto]"
)
@click.option("--kills", type=at_least(1), metavar="N", default=3, show_default=True, help="Runs to stop.")
@click.option(
    "--seed", type=at_least(0), metavar="N", default=0, show_default=True, help="Of the places to stop at."
)
@click.option("--keep-files", metavar="DIR", help="Keep what is written in this new directory.")
def verify(
    what: str, device: str | None, kills: int, seed: int, keep_files: str | None, **asked: Any
) -> None:
    """Prove that a stopped run ends with the same bits, on this machine.

    A short version of the run is trained once whole; then it is killed at random places, gone on with, and every
    tensor and loss that it ends with is compared.
    """
    from lehr import verification
    from lehr.errors import RunError

    job = _with_bar(lambda checked: verification.job_of(what, asked, progress=checked))
    on = verification.place_of(what, device)
    verdict = verification.verify(job, on, kills=kills, seed=seed, keep_files=keep_files, tell=_say)
    click.echo(str(verdict))
    if verdict.difference:
        raise RunError("\n  ".join(["what differs first:", *verdict.difference, verdict.cause]))


def _run_said(asked: dict[str, Any]) -> dict[str, Any]:
    """What was said of how to train, taken out of `asked`; what was not said is left out."""
    checkpoint = {key: asked.pop(key) for key in ("every", "keep", "keep_best")}
    said = {
        key: asked.pop(key)
        for key in ("device", "precision", "workers", "cache_dir", "compile", "tensorboard")
    }
    return {
        **{key: value for key, value in said.items() if value is not None},
        "checkpoint": {key: value for key, value in checkpoint.items() if value is not None},
    }


def _check_machine(said: dict[str, Any]) -> None:
    """Refuse a device, a precision or compiling that this machine does not have, before the data are read."""
    from lehr.errors import RequestError
    from lehr.run.precision import arithmetic

    on = arithmetic(said.get("device", "auto"), said.get("precision", "auto"))
    if said.get("compile"):
        from lehr.run.compiling import cannot_compile

        if why := cannot_compile(on):
            raise RequestError(f"--compile: {why}")


def _check_every(said: dict[str, Any]) -> None:
    """Refuse a `--checkpoint` that does not say how often, before anything is read."""
    from lehr.cadence import Every

    if "every" in said["checkpoint"]:
        Every.parse(said["checkpoint"]["every"], where="--checkpoint")


def _train(job: Job, folder: RunFolder, said: dict[str, Any], change: Change | None = None) -> Any:
    """Train into `folder`, and say how to go on where it ends early; the result of `fit`."""
    from lehr.errors import RequestError
    from lehr.events import Resumed
    from lehr.job import PICTURE
    from lehr.report.following import PlanPicture
    from lehr.run.loop import fit as run_fit

    observers: list[Any] = [_bar(), PlanPicture(job.plan, folder.path / PICTURE, folder.journal)]
    if said["tensorboard"]:
        from lehr.run.tensorboard import tensorboard as to_tensorboard

        observers.append(to_tensorboard(folder.path / "tensorboard"))
    if change:  # drawn when the run has taken it up
        observers.append(lambda event: change.draw() if isinstance(event, Resumed) else None)
    try:
        return run_fit(
            job.made.module,
            *_halves(job),
            recipe=job.recipe,
            out=folder.path,
            observers=observers,
            notes=job.notes,
            workers=_workers(job, said.get("workers")),
            **{
                key: said[key]
                for key in ("device", "precision", "checkpoint", "resume", "cache_dir", "compile")
                if key in said
            },
        )
    except RequestError:  # nothing was changed: another process trains there, say
        raise
    except KeyboardInterrupt:  # the last line is the one to copy
        _say_what_is_left(folder)
        sys.exit(130)
    except BaseException:
        _say_what_is_left(folder)
        raise


def _say_what_is_left(folder: RunFolder) -> None:
    """What can be done with a run that has ended early."""
    from lehr.run.checkpoint import CheckpointFolder
    from lehr.run.state import DamageError

    with suppress(OSError, DamageError):  # where it cannot be read, there is nothing to say
        if folder.weights.is_file():
            _say(f"the best weights so far are kept: lehr predict {_quoted(folder.path)} IMAGE...")
        if CheckpointFolder(folder.checkpoints).newest_state():
            _say(f"to go on: lehr resume {_quoted(folder.path)}")


def _halves(job: Job) -> tuple[Any, Any]:
    valid = job.data.valid(job.transform)
    return job.data.train(job.transform, seed=job.recipe.seed), valid if len(valid) else None


def _kept(job: Job, folder: RunFolder) -> None:
    kept = (name for name in _KEPT if (folder.path / name).is_file())
    _say(f"kept in {folder.path}: {', '.join(kept)}")
    _say(f"next: lehr predict {_quoted(folder.path)} {_to_predict(job)}")


def _to_predict(job: Job) -> str:
    """Images that are at hand for the built-in data, in a checkout; a person has others."""
    from pathlib import Path

    return _EXAMPLES if job.request.data == "digits" and Path(_EXAMPLES).is_dir() else "IMAGE..."


def _compare(job: Job, result: Any, said: dict[str, Any]) -> None:
    """Train the same network from scratch for as many updates, and say by how much fine-tuning beats it."""
    from lehr.job import from_scratch
    from lehr.run.loop import fit as run_fit

    best, steps = result.best, result.plan.total_steps  # fewer than planned, where evidence ended a stage
    _say(f"the same network from scratch, as many updates ({steps:,}):")
    made, recipe = from_scratch(job, steps)
    on = {key: said[key] for key in ("device", "precision", "compile") if key in said}
    workers = _workers(job, said.get("workers"))
    other = run_fit(made.module, *_halves(job), recipe=recipe, observers=[_bar()], workers=workers, **on).best
    monitor = job.recipe.monitor if job.recipe.monitor in best else "train_loss"
    _say(_difference(monitor, best[monitor], other[monitor]))


def _difference(metric: str, tuned: float, scratch: float) -> str:
    """Both numbers as they are shown, and what lies between them as they are shown.

    >>> _difference("valid_accuracy", 0.88647, 0.8591)
    'valid_accuracy: 88.6 % fine-tuned, 85.9 % from scratch: 2.7 points better'
    >>> _difference("valid_loss", 0.5, 0.4)
    'valid_loss: 0.5000 fine-tuned, 0.4000 from scratch: 0.1000 worse'
    """
    percent = metric == "valid_accuracy"
    digits, factor, unit, points = (1, 100, " %", " points") if percent else (4, 1, "", "")
    ours, theirs = (round(factor * value, digits) for value in (tuned, scratch))
    gain = round(ours - theirs if percent else theirs - ours, digits)  # all the others are losses
    verdict = (
        f"{abs(gain):.{digits}f}{points} {'better' if gain > 0 else 'worse'}" if gain else "no difference"
    )
    return f"{metric}: {ours:.{digits}f}{unit} fine-tuned, {theirs:.{digits}f}{unit} from scratch: {verdict}"


@main.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print plan.json instead of the page.")
@click.option("--png", metavar="FILE", help="Draw the learning rates, too.")
@click.option(
    "--costs/--no-costs",
    default=True,
    help="Time a few steps of each stage: what it takes in seconds and memory, and what is computed only once.",
)
def plan(as_json: bool, png: str | None, costs: bool, **asked: Any) -> None:
    """Show what would train when, at which rate, without training."""
    from lehr import job as jobs
    from lehr import plan_json
    from lehr.costs import costs_text

    job = _prepared(_request(asked), fetch=False)
    if png:
        from lehr.report.picture import draw_plan

        draw_plan(job.plan, png)
    if as_json:
        click.echo(plan_json.dumps(job.plan.to_dict()), nl=False)
    else:
        click.echo("\n".join([str(job.plan), *(f"  - {note}" for note in job.notes)]))
    if costs and not as_json and not any(job.plan.objectives):
        click.echo("\n" + costs_text(tuple(jobs.costs(job))))
    if png:
        _say(f"drew {png}")
    if any(job.plan.objectives):  # names; their loss functions cannot stand in a file
        _say(
            'next: in Python, lehr.fit(model, data, recipe=lehr.load_recipe(FILE), loss={"NAME": function, ...})'
        )
        return
    _say(f"next: lehr fit {_again(job.request)}")


@main.command()
@job_options
@click.option(
    "--out", metavar="FILE", default="recipe.toml", show_default=True, help="Where to write the recipe."
)
def init(out: str, **asked: Any) -> None:
    """Write the recipe that lehr would follow, commented, to edit."""
    from pathlib import Path

    from lehr.defaults import commented
    from lehr.errors import RequestError

    if Path(out).exists():
        raise RequestError(
            f"{out}: exists already, and nothing is overwritten; choose another name with --out, or remove it"
        )
    job = _prepared(_request(asked), fetch=False)
    request = _again(replace(job.request, recipe=None, settings=()))
    try:
        Path(out).write_text(commented(job.recipe, request=request, file=shlex.quote(out)), encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"{out}: cannot be written: {error.strerror}; choose another place with --out"
        ) from None
    _say(f"wrote {out}")
    _say(f"next: lehr plan {request} --recipe {shlex.quote(out)}")


@main.command()
@click.argument("run")
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--top",
    type=at_least(1),
    metavar="N",
    default=3,
    show_default=True,
    help="How many classes to show.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
def predict(run: str, paths: tuple[str, ...], top: int, as_csv: bool, as_json: bool, device: str) -> None:
    """Say what is in images, with the model of RUN. PATHS are images, folders, or quoted globs."""
    from lehr import prediction

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    style = "csv" if as_csv else "json" if as_json else "table"
    failed = prediction.predict_paths(run, paths, top=top, style=style, device=device)
    if failed:
        many = failed > 1
        _say(
            f"{failed} image{'s' if many else ''} could not be read; "
            f"{'their rows have' if many else 'its row has'} the error"
        )
        sys.exit(1)


def _bar() -> Observer:
    """The bar, silent on why a run failed: that is said once, in the last line."""
    from lehr.events import RunFailed
    from lehr.progress import progress

    draw = progress()
    return lambda event: draw(replace(event, error="see below") if isinstance(event, RunFailed) else event)


def _request(asked: dict[str, Any]) -> Request:
    from lehr.job import Request

    return Request(**asked)


def _prepared(request: Request, *, fetch: bool) -> Job:
    """The job of a request."""
    from lehr.job import prepare

    return _with_bar(lambda checked: prepare(request, fetch=fetch, progress=checked, tell=_say))


def _with_bar(work: Callable[[Callable[[int, int], None]], Job]) -> Job:
    """What `work` makes, with a bar while many files are checked."""
    quiet = sys.stderr is None or not sys.stderr.isatty()  # None where it was closed from the start
    bar: Any = None

    def checked(done: int, total: int) -> None:
        nonlocal bar
        if quiet or total < 500:
            return
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(total=total, desc="checking images", unit="file", leave=False)
        bar.update(done - bar.n)

    try:
        return work(checked)
    finally:
        if bar is not None:
            bar.close()


def _workers(job: Job, asked: int | None) -> int:
    """Arrays are in memory and need none; files are decoded beside the training."""
    if asked is not None:
        return asked
    return 0 if job.data.listing.kind != "folder" else max(1, min(8, (os.cpu_count() or 2) - 1))


def _again(request: Request) -> str:
    """The arguments that say `request` again."""
    said = [request.data]
    for flag, value in (
        ("--model", request.model),
        ("--weights", request.weights),
        ("--recipe", request.recipe),
        ("--size", request.size),
    ):
        said += [flag, str(value)] if value is not None else []
    said += [part for setting in request.settings for part in ("--set", setting)]
    said += [
        flag
        for flag, on in (("--no-pretrained", not request.pretrained), ("--skip-bad", request.skip_bad))
        if on
    ]
    return shlex.join(said)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _say(line: str) -> None:
    """A line for the person; standard output is for what was asked for. One whose terminal has closed is not
    told, and nothing else changes.
    """
    try:
        click.echo(printable_lines(line), err=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Send what a stream still holds, and all that comes, nowhere: its reader has gone, and others who write to it,
    click, and Python at its exit, would fail over that.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
