"""A run's directory: what is in it, under which name.

Nothing in it is a pickle; every file is written aside and renamed into place.

recipe.toml  plan.json  environment.json  journal.jsonl  best.safetensors
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lehr._version import __version__
from lehr.errors import RequestError
from lehr.planning import Plan
from lehr.recipe import Recipe
from lehr.run.precision import Arithmetic
from lehr.run.weights import write_weights

_NAMED_VERSIONS = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "safetensors")


_WRITTEN = ("journal.jsonl", "recipe.toml", "plan.json", "environment.json", "best.safetensors")


@dataclass(frozen=True)
class RunFolder:
    """The directory of one run."""

    path: Path

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A directory for a new run; it may exist, but hold nothing that a run writes.

        Raises:
            RequestError: where it holds one, or cannot be made.
        """
        folder = Path(path)
        there = [name for name in _WRITTEN if (folder / name).exists()]
        if there:
            what = "a run" if "journal.jsonl" in there else ", ".join(there)
            raise RequestError(
                f"{folder}: holds {what} already, and nothing is overwritten; "
                "choose another directory, or remove it"
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

    def describe(self, recipe: Recipe, plan: Plan, on: Arithmetic) -> None:
        """Write what is known before the first batch: recipe, plan, environment."""
        self.write_text("recipe.toml", recipe.to_toml())
        plan.save(self.path / "plan.json")
        self.write_json("environment.json", environment(on))

    def save_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Write the weights to keep."""
        write_weights(state, self.weights)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `value` as JSON, readable; in ASCII where it holds a file name that is no Unicode text."""
        text = json.dumps(value, indent=1, ensure_ascii=False)
        plain = text.isascii() or text.encode("utf-8", "replace").decode() == text
        self.write_text(name, (text if plain else json.dumps(value, indent=1)) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, all of it or nothing."""
        aside = self.path / f".{name}.part"
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.path / name)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


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
