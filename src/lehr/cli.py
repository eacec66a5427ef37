"""The command line. It says what happens and what to do next; all that it does is in the package.

Only click is imported here at the top, so that `lehr --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lehr._version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from lehr.job import Job, Request
    from lehr.journal import Observer

F = TypeVar("F", bound=Callable[..., Any])
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


def _at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number; click's own writes its range into the help as [x>=1]."""

    def read(said: str) -> int:
        try:
            number = int(said)
        except ValueError:
            number = least - 1
        if number < least:
            raise click.BadParameter(f"{said}; expected a whole number, {least} or more")
        return number

    return read


def _job_options(command: F) -> F:
    """The options of every command that begins with data, a model and a recipe."""
    options = (
        click.argument("data"),
        click.option(
            "--model",
            metavar="NAME",
            help="A timm model, torchvision/NAME, or digits_net.  [default: mobilenetv3_large_100]",
        ),
        click.option(
            "--weights",
            metavar="FILE",
            help="Local .safetensors or .pth file instead of the published weights.",
        ),
        click.option(
            "--no-pretrained",
            "pretrained",
            flag_value=False,
            default=True,
            help="Start from nothing instead of published weights.",
        ),
        click.option(
            "--recipe",
            metavar="FILE",
            help="Recipe to follow (see lehr init).  [default: chosen for model and data]",
        ),
        click.option(
            "--set",
            "settings",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change one thing of the recipe: stages.0.lr=1e-3",
        ),
        click.option(
            "--size",
            type=_at_least(1),
            metavar="PIXELS",
            help="Side of the images that the model sees.  [default: the model's own]",
        ),
        click.option(
            "--skip-bad", is_flag=True, help="Leave out files that cannot be read instead of refusing them."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@_job_options
@click.option("--out", metavar="DIR", help="New directory for the run.  [default: runs/DATA-MODEL-N]")
@click.option(
    "--device", default="auto", metavar="NAME", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="auto: bf16 on CUDA that has it, else fp32.",
)
@click.option(
    "--workers",
    type=_at_least(0),
    metavar="N",
    help="Processes that load images.  [default: one less than the cores, at most 8]",
)
@click.option(
    "--scratch/--no-scratch",
    default=None,
    help="Train the same network from scratch, too, and compare.  [default: for digits only]",
)
@click.option("--tensorboard", is_flag=True, help="Write for TensorBoard, too, into the run.")
def fit(
    out: str | None,
    device: str,
    precision: str,
    workers: int | None,
    scratch: bool | None,
    tensorboard: bool,
    **asked: Any,
) -> None:
    """Fine-tune a model on DATA, in stages."""
    from lehr.run.precision import arithmetic

    arithmetic(device, precision)  # refused before the data are read
    job = _prepared(_request(asked), fetch=True)
    from lehr import job as jobs
    from lehr.run.loop import fit as run_fit

    with jobs.new_run(job, out) as folder:
        observers: list[Any] = [_bar()]
        if tensorboard:
            from lehr.run.tensorboard import tensorboard as to_tensorboard

            observers.append(to_tensorboard(folder.path / "tensorboard"))
        _say(f"{job.model_name} on {job.request.data}: {len(job.data.classes)} classes, run in {folder.path}")
        on: dict[str, Any] = {"device": device, "precision": precision, "workers": _workers(job, workers)}
        train = job.data.train(job.transform, seed=job.recipe.seed)
        valid = job.data.valid(job.transform)
        halves = (train, valid if len(valid) else None)
        try:
            result = run_fit(
                job.made.module,
                *halves,
                recipe=job.recipe,
                out=folder.path,
                observers=observers,
                notes=job.notes,
                **on,
            )
        except BaseException:
            if folder.weights.is_file():
                _say(f"the best weights so far are kept: lehr predict {_quoted(folder.path)} IMAGE...")
            raise
    if scratch if scratch is not None else job.request.data == "digits":
        _compare(job, result.best, halves, on)
    kept = (name for name in _KEPT if (folder.path / name).is_file())
    _say(f"kept in {folder.path}: {', '.join(kept)}")
    _say(f"next: lehr predict {_quoted(folder.path)} {_to_predict(job)}")


def _to_predict(job: Job) -> str:
    """Images that are at hand for the built-in data, in a checkout; a person has others."""
    from pathlib import Path

    return _EXAMPLES if job.request.data == "digits" and Path(_EXAMPLES).is_dir() else "IMAGE..."


def _compare(job: Job, best: Any, halves: tuple[Any, Any], on: dict[str, Any]) -> None:
    """Train the same network from scratch for as many updates, and say by how much fine-tuning beats it."""
    from lehr.job import from_scratch
    from lehr.run.loop import fit as run_fit

    _say(f"the same network from scratch, as many updates ({job.plan.total_steps:,}):")
    made, recipe = from_scratch(job)
    other = run_fit(made.module, *halves, recipe=recipe, observers=[_bar()], **on).best
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
@_job_options
@click.option("--json", "as_json", is_flag=True, help="Print plan.json instead of the page.")
@click.option("--png", metavar="FILE", help="Draw the learning rates, too.")
def plan(as_json: bool, png: str | None, **asked: Any) -> None:
    """Show what would train when, at which rate, without training."""
    from lehr import plan_json

    job = _prepared(_request(asked), fetch=False)
    if png:
        from lehr.report.picture import draw_plan

        draw_plan(job.plan, png)
    if as_json:
        click.echo(plan_json.dumps(job.plan.to_dict()), nl=False)
    else:
        click.echo("\n".join([str(job.plan), *(f"  - {note}" for note in job.notes)]))
    if png:
        _say(f"drew {png}")
    _say(f"next: lehr fit {_again(job.request)}")


@main.command()
@_job_options
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
    type=_at_least(1),
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
    from lehr.journal import RunFailed
    from lehr.progress import progress

    draw = progress()
    return lambda event: draw(replace(event, error="see below") if isinstance(event, RunFailed) else event)


def _request(asked: dict[str, Any]) -> Request:
    from lehr.job import Request

    return Request(**asked)


def _prepared(request: Request, *, fetch: bool) -> Job:
    """The job, with a bar while many files are checked."""
    from lehr.job import prepare

    quiet = not sys.stderr.isatty()
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
        return prepare(request, fetch=fetch, progress=checked, tell=_say)
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
    """A line for the person; standard output is for what was asked for."""
    click.echo(line, err=True)
