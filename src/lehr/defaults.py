"""The recipe of a person who said nothing, chosen by model and amount of data; a recipe as a file to edit.

Pure; every number has its reason beside it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import fields

from lehr.recipe import Recipe, Stage, stage_lines
from lehr.schedules import cosine, warmup
from lehr.selection import ModelFacts
from lehr.toml import toml_lines

SMALL_IMAGE = 48
"""Images up to this side are digits, icons and the like: mirrored they may be something else, so they are
shifted only.
"""

SMALL_NETWORK = 200_000
"""Parameters. A network below it was pretrained on little, and learns as fast when thawed as from scratch."""


HEAD_VIEWS = 1
"""Of each image while the head trains alone: the frozen backbone is computed so many times in all. Measured on held-out
flowers (benchmarks/views.py), 1,000 steps, the best epoch kept: four views, at four times the cost, against one are at
+0.000 ± 0.003 over 11 pairs: -0.012 ± 0.004 with 100 images, +0.004 ± 0.006 with 600 and with 3,453 (MobileNetV2, 3
splits each), +0.007 ± 0.005 with 600 (SqueezeNet, 2 splits). One view against 500 steps on fresh ones: +0.007 ± 0.007,
-0.002 ± 0.004, +0.000 ± 0.006; with SqueezeNet -0.010, which the thawed stages, that see fresh views, have to make up.
"""

UNJUDGED_VIEWS = 4
"""The same where nothing validates, so that the last weights count. There one view costs up to 0.029 ± 0.007 (600 images, 500
steps), four views 0.015 ± 0.004 at the most, eight 0.010 ± 0.001 at twice the cost.
"""


def default_recipe(
    facts: ModelFacts,
    *,
    samples: int,
    image_side: int,
    pretrained: bool = True,
    validated: bool = True,
    seed: int = 0,
) -> Recipe:
    """A recipe for `samples` training images: the head until it has converged, then everything, gently.

    Args:
        facts: of the model.
        samples: training samples.
        image_side: pixels that the model sees along the shorter side.
        pretrained: whether the backbone knows anything yet; if not, there is nothing to freeze.
        validated: whether there are images to validate with; if not, the last weights are the run's.
        seed: of everything random.

    Example:
        >>> from lehr.selection import ParameterFacts
        >>> parameters = ParameterFacts("a.weight", (4, 4)), ParameterFacts("fc.weight", (2, 4))
        >>> facts = ModelFacts("net", parameters, head=("fc",))
        >>> [stage.train for stage in default_recipe(facts, samples=3000, image_side=224).stages]
        [('head',), ('all',)]
    """
    batch = _batch(samples)
    return Recipe(
        _stages(facts, samples, batch, pretrained=pretrained, validated=validated),
        optimizer="adamw",
        schedule=warmup("5%") >> cosine(floor=0.01),
        batch_size=batch,
        weight_decay=0.05,
        label_smoothing=0.1,
        clip_norm=1.0,
        monitor="valid_accuracy",
        restore_best=validated,
        seed=seed,
        augment=default_augment(image_side),
    )


def default_augment(image_side: int) -> tuple[str, ...]:
    """How training images are changed at random where nobody said it.

    >>> default_augment(8), default_augment(224)
    (('shift',), ('crop', 'flip'))
    """
    return ("shift",) if image_side <= SMALL_IMAGE else ("crop", "flip")


def _stages(facts: ModelFacts, samples: int, batch: int, *, pretrained: bool, validated: bool) -> list[Stage]:
    steps_per_epoch = max(1, samples // batch)
    if not pretrained:
        return [Stage(_epochs(3000, steps_per_epoch, 20, 100), train="all", lr=1e-3)]
    if not facts.head:
        # Nothing can be trained first: all goes at a rate between a new head's and a pretrained backbone's.
        return [Stage(_epochs(1300, steps_per_epoch, 10, 70), train="all", lr=3e-4)]
    if facts.count() < SMALL_NETWORK:
        return [
            Stage(_epochs(12, steps_per_epoch, 2, 30), train="head", lr=1e-2),
            Stage(_epochs(36, steps_per_epoch, 4, 40), train="all", lr=3e-3),
        ]
    return [
        _head_alone(steps_per_epoch, validated=validated),
        # The backbone is only adjusted, after a warm-up for Adam's moments. Its norms stay as they were
        # pretrained: batches of this size are too small for their statistics, and Adam moves scales too far.
        Stage(
            _epochs(800, steps_per_epoch, 6, 40), train=_gently(facts), lr={"head": 1e-3, "backbone": 3e-4}
        ),
    ]


def _head_alone(steps_per_epoch: int, *, validated: bool) -> Stage:
    """A new head starts from noise; backwards through it, a thawed backbone would be spoilt first.

    Once each view was seen a step costs next to nothing, so the head is trained for longer than it improves: 1,000 steps
    are within 0.3 % of the best that 250 to 2,000 reach on one view, and the best epoch is kept. Where nothing says which
    one that was, 500 steps: from there on heads on few images lose (600 images: 0.678 after 500, 0.651 after 2,000 steps
    on fresh views).
    """
    if validated:
        return Stage(_epochs(1000, steps_per_epoch, 8, 60), train="head", lr=3e-3, views=HEAD_VIEWS)
    return Stage(_epochs(500, steps_per_epoch, 8, 30), train="head", lr=3e-3, views=UNJUDGED_VIEWS)


def _gently(facts: ModelFacts) -> tuple[str, ...]:
    return ("all", "!norm") if any(p.norm for p in facts.parameters) else ("all",)


def _batch(samples: int) -> int:
    """32, or less where an epoch would have fewer than ten steps."""
    for size in (32, 16, 8):
        if samples >= 10 * size:
            return size
    return 4


def _epochs(steps: int, steps_per_epoch: int, least: int, most: int) -> str:
    """So many epochs that there are about `steps` steps, within bounds."""
    return f"{min(most, max(least, -(-steps // steps_per_epoch)))} epochs"


def commented(recipe: Recipe, *, request: str, file: str) -> str:
    """The recipe as TOML for a person to edit: each key with a line that says what it does.

    `lehr.load_recipe` reads it back as an equal recipe.

    Args:
        recipe: what to write.
        request: what stands behind `lehr plan` on the command line, without `--recipe`.
        file: the name of the file that this text is for.
    """
    said = recipe.to_dict()
    stages = said.pop("stages")
    shown = [
        *(key for key in _SHOWN if key in said),
        *(f.name for f in fields(Recipe) if f.name in said and said[f.name] != f.default),
    ]
    lines = ["# A recipe for lehr. Change it, look at what it means, run it:"]
    lines += [f"#   lehr {verb} {_one_line(request)} --recipe {_one_line(file)}" for verb in ("plan", "fit ")]
    for key in dict.fromkeys(shown):
        lines += ["", *_comment(_ABOUT[key]), *toml_lines({key: said[key]})]
    lines += ["", *_comment(_STAGES)]
    for stage in stages:
        lines += [*stage_lines(stage), ""]
    return "\n".join([*lines, *_comment(_MORE)]) + "\n"


_SHOWN = (
    "optimizer", "schedule", "batch_size", "weight_decay", "no_decay", "label_smoothing", "clip_norm",
    "augment", "monitor", "restore_best", "seed",
)  # fmt: skip
"""What a person may want to change first; other keys are written where they differ from the default."""
_ABOUT = {
    "optimizer": 'Any class of torch.optim; a table gives its settings: { name = "sgd", momentum = 0.9 }.',
    "schedule": "How the rates run through each stage, as factors of each group's peak rate. Also: constant, "
    "linear, polynomial, exponential, step_decay, one_cycle, restarts, hold.",
    "batch_size": "Images in a batch; accumulate = 2 makes a step of two batches' gradients.",
    "weight_decay": "Pulls weights towards 0, except what no_decay names.",
    "no_decay": 'Patterns: a role (head, backbone, norm, bias), a module ("layer4"), a glob ("blocks.1?.*").',
    "label_smoothing": "The share of each target that is spread over all classes.",
    "clip_norm": "The largest norm of the gradients of a step.",
    "augment": "Random changes of the training images, of: crop, flip, shift, color, trivial, erase.",
    "monitor": 'What "best" means: valid_accuracy, valid_loss or train_loss.',
    "restore_best": "Whether each stage ends with its best weights, and the run with the best of all.",
    "seed": "Of the order and augmentation of the images, of dropout and of the new head.",
    "ema": "The decay of an average of the weights, which is what is validated and kept.",
    "min_lr": "The lowest rate, absolute.",
    "patience": "Stop after so many epochs of the last stage without a new best.",
    "layer_decay": "The further a layer is from the head, the lower its rate, by this factor a layer.",
    "lr_rule": '"linear": rates follow the number of images in a step.',
    "accumulate": "Batches whose gradients make one step.",
    "views": 'How many fixed random versions each image has, one an epoch in turn, or "fresh".',
    "cache": "Whether what a stage does not train is computed once for each view: auto, off, require.",
    "cache_budget": "The most memory that caches may take.",
    "cache_dtype": "The narrowest type that a cache may store: fp32, fp16, bf16.",
    "cache_exact": "Whether what is cached is computed to the same bits as the model's own.",
}
_STAGES = (
    "The stages: how long (in epochs or steps), what trains (patterns; one with a ! takes away), and its "
    "peak rate, or one for each pattern. All else is frozen. A stage may have its own schedule, batch_size, accumulate, weight_decay, "
    'layer_decay, restore_best, and end on evidence: until = "train_error < 0.80". With views = 4 each image has four fixed '
    "random versions, so that what is frozen is computed once for each."
)
_MORE = (
    'More keys: ema = 0.999 (average of the weights), min_lr = 1e-6, patience = "5 epochs" (stop early), '
    'layer_decay = 0.75 (lower rates far from the head), lr_rule = "linear" (rates follow the batch size), '
    'cache = "off", cache_budget = "4 GiB".'
)


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(text, 88, break_long_words=False, break_on_hyphens=False))


def _one_line(text: str) -> str:
    """A comment ends with its line, so no name of a folder may break it."""
    return "".join(c if c.isprintable() else "?" for c in text)
