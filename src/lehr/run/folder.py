"""A run's directory: what is in it, under which name.

Nothing in it is a pickle; every file is written aside and renamed into place.

recipe.toml  plan.json  environment.json  journal.jsonl  checkpoints/  best.safetensors
"""

from __future__ import annotations

import errno
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lehr import plan_json
from lehr._version import __version__
from lehr.errors import RecipeError, RequestError, RunError
from lehr.planning import Plan
from lehr.recipe import Recipe
from lehr.run.files import write_text
from lehr.run.lock import locked
from lehr.run.precision import Arithmetic

_NAMED_VERSIONS = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "safetensors")


_WRITTEN = (
    "journal.jsonl",
    "recipe.toml",
    "plan.json",
    "environment.json",
    "checkpoints",
    "best.safetensors",
)


@dataclass(frozen=True)
class RunFolder:
    """The directory of one run."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, *, resume: bool = False) -> RunFolder:
        """A directory for a new run; it may exist, but hold nothing that a run writes, unless with `resume`.

        Raises:
            RequestError: where it holds one, or cannot be made.
        """
        folder = Path(path)
        there = [name for name in _WRITTEN if (folder / name).exists()]
        if there and not resume:
            what = "a run" if "journal.jsonl" in there else ", ".join(there)
            raise RequestError(
                f"{folder}: holds {what} already, and nothing is overwritten; go on with it "
                f'(lehr resume {folder}; in Python resume="auto"), choose another directory, or remove it'
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"{folder}: cannot be made: {error.strerror}; choose another directory"
            ) from None
        return cls(folder)

    @property
    def journal(self) -> Path:
        """Every event of the run, a line each."""
        return self.path / "journal.jsonl"

    @property
    def weights(self) -> Path:
        """The best weights, or the last ones where nothing said which were best."""
        return self.path / "best.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, and of the weights of the best epochs."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """The file that a process holds a lock on while it trains here."""
        return self.path / ".lock"

    def describe(self, recipe: Recipe, plan: Plan, on: Arithmetic) -> None:
        """Write what is known before the first batch: recipe, plan, environment."""
        self.write_plan(recipe, plan)
        self.write_json("environment.json", environment(on))

    def write_plan(self, recipe: Recipe, plan: Plan) -> None:
        """Write the recipe and the plan that is made of it."""
        self.write_text("recipe.toml", recipe.to_toml())
        self.write_text("plan.json", plan_json.dumps(plan.to_dict()))

    def has_plan(self, plan: Plan) -> bool:
        """Whether the plan that is written down is `plan`."""
        try:
            return Plan.load(self.path / "plan.json").hash == plan.hash
        except RecipeError:
            return False

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `value` as JSON, readable; in ASCII where it holds a file name that is no Unicode text."""
        text = json.dumps(value, indent=1, ensure_ascii=False)
        plain = text.isascii() or text.encode("utf-8", "replace").decode() == text
        self.write_text(name, (text if plain else json.dumps(value, indent=1)) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, all of it or nothing.

        Raises:
            RequestError: where it may not be written.
            RunError: where it cannot be written.
        """
        try:
            write_text(self.path / name, text)
        except OSError as error:
            said = f"{self.path / name}: cannot be written: {error.strerror or error}; "
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise RequestError(f"{said}choose another directory") from None
            raise RunError(f"{said}free some space, or choose another directory") from None


@contextmanager
def opened(path: str | Path, *, resume: bool) -> Iterator[RunFolder]:
    """The directory of a new run, or with `resume` of one that may be there; no other process trains in it.

    Raises:
        RequestError: where it holds a run and `resume` is not wanted, is locked, or cannot be made.
    """
    folder = RunFolder.create(path, resume=resume)
    with locked(folder.lock):
        yield folder


def environment(on: Arithmetic) -> dict[str, Any]:
    """Where a run happens: versions and device. No names of people, hosts or folders."""
    device = (
        torch.cuda.get_device_name(on.device)
        if on.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "lehr": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(on.device),
        "device_name": device,
        "precision": on.precision,
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in _NAMED_VERSIONS if (version := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
