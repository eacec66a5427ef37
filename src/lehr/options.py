"""The options that commands share, as click decorators. Only click is imported here.

What an option means is for the command; this file must not know what a job or a run is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def at_least(least: int) -> Callable[[str], int]:
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


def job_options(command: F) -> F:
    """The options of every command that begins with data, a model and a recipe."""
    return _together(
        click.argument("data"),
        click.option(
            "--model",
            metavar="NAME",
            help="A timm model, torchvision/NAME, digits_net, or cifar_resnet110 (56, 44, 32, 20).  [default: mobilenetv3_large_100]",
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
        setting_option,
        click.option(
            "--size",
            type=at_least(1),
            metavar="PIXELS",
            help="Side of the images that the model sees.  [default: the model's own]",
        ),
        click.option(
            "--skip-bad", is_flag=True, help="Leave out files that cannot be read instead of refusing them."
        ),
    )(command)


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorated(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


setting_option = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change one thing of the recipe: stages.0.lr=1e-3",
)


def run_options(*, begun: bool) -> Callable[[F], F]:
    """The options of what trains; of a run that was `begun`, what is left out is as it was."""

    def said(default: str) -> str:
        return f"[default: {'as the run began' if begun else default}]"

    return _together(
        click.option("--device", metavar="NAME", help=f"auto, cpu, cuda, cuda:N or mps.  {said('auto')}"),
        click.option(
            "--precision",
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            help=f"auto: bf16 on CUDA that has it, else fp32.  {said('auto')}",
        ),
        click.option(
            "--workers",
            type=at_least(0),
            metavar="N",
            help="Processes that load images.  [default: one less than the cores, at most 8]",
        ),
        click.option(
            "--checkpoint",
            "every",
            metavar="EVERY",
            help=f'How often the run is saved: "10 minutes", "500 steps", "1 epoch".  {said("10 minutes")}',
        ),
        click.option(
            "--keep", type=at_least(1), metavar="N", help=f"Checkpoints to keep, the newest.  {said('2')}"
        ),
        click.option(
            "--keep-best",
            type=at_least(1),
            metavar="N",
            help=f"Best epochs whose weights to keep.  {said('1')}",
        ),
        click.option(
            "--cache-dir",
            metavar="DIR",
            help="Keep what frozen parts compute of the images, for later runs.  [default: for this run alone]",
        ),
        click.option(
            "--compile/--no-compile",
            "compile",
            default=None,
            help=f"Have torch.compile make code of the model, once a stage.  {said('no')}",
        ),
        click.option("--tensorboard", is_flag=True, help="Write for TensorBoard, too, into the run."),
    )
