"""The recipe of a person who said nothing: chosen by the model and the amount of data. Pure; every number has its reason beside it."""

from __future__ import annotations

from lehr.recipe import Recipe, Stage
from lehr.schedules import cosine, warmup
from lehr.selection import ModelFacts

SMALL_IMAGE = 48
"""Images up to this side are digits, icons and the like: mirrored they may be something else, so they are shifted only."""

SMALL_NETWORK = 1_000_000
"""Parameters. A network below it was pretrained on little, and learns as fast when thawed as from scratch."""


def default_recipe(
    facts: ModelFacts, *, samples: int, image_side: int, pretrained: bool = True, seed: int = 0
) -> Recipe:
    """A recipe for `samples` training images: the head until it has converged, then everything, gently.

    Args:
        facts: of the model.
        samples: training samples.
        image_side: pixels that the model sees along the shorter side.
        pretrained: whether the backbone knows anything yet; if not, there is nothing to freeze.
        seed: of everything random.

    Example:
        >>> from lehr.selection import ParameterFacts
        >>> facts = ModelFacts("net", (ParameterFacts("a.weight", (4, 4)), ParameterFacts("fc.weight", (2, 4))), head=("fc",))
        >>> [stage.train for stage in default_recipe(facts, samples=3000, image_side=224).stages]
        [('head',), ('all',)]
    """
    batch = _batch(samples)
    return Recipe(
        _stages(facts, samples, batch, pretrained),
        optimizer="adamw",
        schedule=warmup("5%") >> cosine(floor=0.01),
        batch_size=batch,
        weight_decay=0.05,
        label_smoothing=0.1,
        clip_norm=1.0,
        monitor="valid_accuracy",
        restore_best=True,
        seed=seed,
        augment=["shift"] if image_side <= SMALL_IMAGE else ["crop", "flip"],
    )


def _stages(facts: ModelFacts, samples: int, batch: int, pretrained: bool) -> list[Stage]:
    steps_per_epoch = max(1, samples // batch)
    if not pretrained or not facts.head:
        return [Stage(_epochs(3000, steps_per_epoch, 20, 100), train="all", lr=1e-3)]
    if facts.count() < SMALL_NETWORK:
        return [
            Stage(_epochs(60, steps_per_epoch, 4, 30), train="head", lr=1e-2),
            Stage(_epochs(120, steps_per_epoch, 6, 40), train="all", lr=3e-3),
        ]
    return [
        # A new head starts from noise; backwards through it, a thawed backbone would be spoilt first. About
        # 500 steps bring a linear head within reach of its optimum; a few epochs do where there is much data.
        Stage(_epochs(500, steps_per_epoch, 4, 30), train="head", lr=3e-3),
        # The backbone is only adjusted: a tenth of the head's rate, after a warm-up that fills Adam's moments.
        Stage(_epochs(800, steps_per_epoch, 6, 40), train="all", lr={"head": 1e-3, "backbone": 1e-4}),
    ]


def _batch(samples: int) -> int:
    """32, or less where an epoch would have fewer than ten steps."""
    for size in (32, 16, 8):
        if samples >= 10 * size:
            return size
    return 4


def _epochs(steps: int, steps_per_epoch: int, least: int, most: int) -> str:
    """So many epochs that there are about `steps` steps, within bounds."""
    return f"{min(most, max(least, -(-steps // steps_per_epoch)))} epochs"


def commented(recipe: Recipe, *, data: str, model: str) -> str:
    """The recipe as TOML for a person to edit: each key with a line that says what it does.

    `lehr.load_recipe` reads it back as an equal recipe.
    """
    plain = recipe.to_dict()
    stages = plain.pop("stages")
    lines = [
        f"# A recipe for {model} on {data}. Change it, look at it, run it:",
        f"#   lehr plan {data} --model {model} --recipe THIS_FILE",
        f"#   lehr fit  {data} --model {model} --recipe THIS_FILE",
        "# Durations have units: epochs, steps, or % of the stage.",
        "",
    ]
    plain.setdefault("no_decay", list(recipe.no_decay))
    plain.setdefault("seed", recipe.seed)
    for key, value in plain.items():
        lines += [f"# {line}" for line in _ABOUT.get(key, ())] + [f"{key} = {_toml(value)}", ""]
    for index, stage in enumerate(stages):
        lines += (
            ["# What trains, how long, at which peak rate; all else is frozen: weights, buffers, dropout."]
            if not index
            else []
        )
        lines += ["[[stages]]", *(f"{key} = {_toml(value)}" for key, value in stage.items()), ""]
    lines += [f"# {line}" for line in _MORE]
    return "\n".join(lines) + "\n"


_ABOUT = {
    "optimizer": ("any class of torch.optim; a table gives its settings: { name = \"sgd\", momentum = 0.9, nesterov = true }",),
    "schedule": ("of every stage, over the stage's own steps, times each group's peak rate; also linear, polynomial, one_cycle, restarts, ...",),
    "batch_size": ("samples in a batch; accumulate = 2 adds the gradients of two batches before a step",),
    "weight_decay": ("pulls weights towards 0; no_decay says which are left alone",),
    "no_decay": ("patterns: a role (norm, bias, head, backbone), a module (\"layer4\") or a glob (\"blocks.1?.*\")",),
    "label_smoothing": ("how much of the target is spread over the other classes",),
    "clip_norm": ("the largest norm of the gradients",),
    "monitor": ("what \"best\" means",),
    "restore_best": ("go on from, and end with, the best weights",),
    "augment": ("random changes of the training images, of: crop, flip, shift, color, trivial, erase",),
    "seed": ("of the order of the data, the augmentation, dropout and the new head",),
}  # fmt: skip
_MORE = (
    "More keys: ema = 0.999 (average of the weights), min_lr = 1e-6 (absolute), patience = \"5 epochs\" (early stop),",
    "layer_decay = 0.75 (lower rates far from the head), lr_rule = \"linear\" (rates follow a stage's batch size).",
    "A stage may have its own: schedule, batch_size, accumulate, weight_decay, layer_decay, restore_best.",
)  # fmt: skip


def _toml(value: object) -> str:
    """A value as TOML writes it; tables inline."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return (
            f"'{value}'"
            if '"' in value and "'" not in value
            else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        )
    return repr(value)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _toml(name)
