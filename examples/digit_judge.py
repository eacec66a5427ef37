"""How good are generated digits? Figures that need nothing but the 1,797 real ones, and a bar for them.

    python examples/digit_judge.py

shows what the judge says of real digits that nobody trained on, of noise, and of cheats. It knows pictures as rows
of 64 numbers in [-1, 1]; it must not know who made them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

Rows = npt.NDArray[np.float64]
CLASSES = 10
HELD_OUT = 360  # images that neither the judge nor a network is trained on
CONFIDENT = 0.4  # share of the trees; 95 % of held-out real digits have more


@dataclass(frozen=True)
class Digits:
    """The two halves of scikit-learn's digits, stratified, the same always: pixels in [-1, 1], and labels."""

    train: Rows
    train_labels: npt.NDArray[np.int64]
    held_out: Rows
    held_out_labels: npt.NDArray[np.int64]


def digits() -> Digits:
    """1,437 images to train on, and 360 that are held out; pixels of 0 to 16 become -1 to 1.

    >>> digits().train.shape, digits().held_out.shape
    ((1437, 64), (360, 64))
    """
    bundle = load_digits()
    train, held_out, labels, held_out_labels = train_test_split(
        bundle.data / 8 - 1, bundle.target, test_size=HELD_OUT, stratify=bundle.target, random_state=0
    )
    return Digits(train, labels, held_out, held_out_labels)


@dataclass(frozen=True)
class Verdict:
    """What the judge found in a set of pictures; see `Judge` for the words."""

    recognised: float
    confidence: float
    classes: int
    entropy: float
    variety: float
    distance: float
    copies: float

    def misses(self, bar: Bar) -> list[str]:
        """What of the bar is not reached, in words; nothing where all of it is."""
        checks = {
            f"recognised {self.recognised:.3f}, expected {bar.recognised} or more": self.recognised
            >= bar.recognised,
            f"classes {self.classes}, expected {bar.classes} or more": self.classes >= bar.classes,
            f"entropy {self.entropy:.3f}, expected {bar.entropy} or more": self.entropy >= bar.entropy,
            f"variety {self.variety:.3f}, expected {bar.variety} or more": self.variety >= bar.variety,
            f"distance {self.distance:.3f}, expected {bar.nearest} to {bar.farthest}": bar.nearest
            <= self.distance
            <= bar.farthest,
            f"copies {self.copies:.3f}, expected {bar.copies} or less": self.copies <= bar.copies,
        }
        return [said for said, met in checks.items() if not met]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Bar:
    """What pictures have to reach, figure by figure."""

    recognised: float
    classes: int
    entropy: float
    variety: float
    nearest: float
    farthest: float
    copies: float


BAR = Bar(recognised=0.7, classes=9, entropy=0.95, variety=0.85, nearest=0.7, farthest=1.3, copies=0.02)


class Judge:
    """Trained on the real digits of the training half; judges any set of pictures.

    Two classifiers of different kinds look at each picture: a support vector machine and 300 extremely randomised
    trees. The trees are unsure of what is no digit, where the other is not.

    - *recognised*: the share of pictures to which both give the same digit, the trees with more than 0.4 of their votes.
    - *confidence*: the mean share of the trees' votes that the winning digit has.
    - *classes*: of the ten digits, how many make up at least half their fair share (5 %) of the recognised pictures.
    - *entropy* of the recognised digits' histogram, as a share of the largest there is, log 10.
    - *variety*: the mean distance between two recognised pictures of the same digit, over that of real ones; the mean
      over the digits that were found.
    - *distance*: the median distance of a picture to the nearest training image, over that of held-out real digits.
      Near 0 for copies; far above 1 for what is no digit.
    - *copies*: the share of pictures that lie nearer to a training image than 99 % of the held-out real digits do.
    """

    def __init__(self, data: Digits) -> None:
        self._data = data
        self._machine = SVC(gamma=0.05, C=10).fit(data.train, data.train_labels)
        self._trees = ExtraTreesClassifier(300, random_state=0).fit(data.train, data.train_labels)
        self._near = NearestNeighbors(n_neighbors=1).fit(data.train)

    @cached_property
    def accuracy(self) -> tuple[float, float]:
        """The share of held-out real digits that each classifier names rightly: the machine, the trees."""
        real = self._data.held_out, self._data.held_out_labels
        return float(self._machine.score(*real)), float(self._trees.score(*real))

    @cached_property
    def _held_out_distances(self) -> Rows:
        return self._distances(self._data.held_out)

    @cached_property
    def _spread(self) -> list[float]:
        return [_spread(self._data.train[self._data.train_labels == digit]) for digit in range(CLASSES)]

    def __call__(self, pictures: Rows) -> Verdict:
        """The verdict on pictures, shape [N, 64], values in [-1, 1]."""
        votes = self._trees.predict_proba(pictures)
        named, sure = votes.argmax(1), votes.max(1)
        known = (self._machine.predict(pictures) == named) & (sure > CONFIDENT)
        shares = np.bincount(named[known], minlength=CLASSES) / max(1, known.sum())
        there = shares[shares > 0]
        spreads = [
            _spread(pictures[known & (named == digit)]) / self._spread[digit]
            for digit in np.flatnonzero(shares)
        ]
        distances = self._distances(pictures)
        return Verdict(
            recognised=float(known.mean()),
            confidence=float(sure.mean()),
            classes=int((shares >= 0.5 / CLASSES).sum()),
            entropy=abs(float((there * np.log(there)).sum()) / np.log(CLASSES)),
            variety=float(np.mean(spreads)) if spreads else 0.0,
            distance=float(np.median(distances) / np.median(self._held_out_distances)),
            copies=float((distances < np.quantile(self._held_out_distances, 0.01)).mean()),
        )

    def _distances(self, pictures: Rows) -> Rows:
        """Of each picture to the nearest training image, Euclidean."""
        distances: Rows = self._near.kneighbors(pictures)[0][:, 0]
        return distances


def _spread(pictures: Rows) -> float:
    """The mean distance between two different ones; 0 for fewer than two."""
    squares = (pictures**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * pictures @ pictures.T, 0))
    return float(distances.sum() / max(1, len(pictures) * (len(pictures) - 1)))


def cheats(data: Digits, count: int = 1000) -> dict[str, Rows]:
    """Pictures that must not pass: each is bad in one way."""
    draw = np.random.default_rng(0)
    rows = data.train[draw.integers(len(data.train), size=(2, count))]
    return {
        "noise": draw.uniform(-1, 1, (count, 64)),
        "real digits, pixels shuffled": draw.permuted(rows[0], axis=1),
        "means of two real digits": rows.mean(0),
        "training images": rows[0],
        "only the digit 3": np.resize(data.held_out[data.held_out_labels == 3], (count, 64)),
        "one image of each digit": np.resize(data.held_out[_first(data.held_out_labels)], (count, 64)),
    }


def _first(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    return np.unique(labels, return_index=True)[1]


def main() -> None:
    """Judge real digits, and what must not pass."""
    data = digits()
    judge = Judge(data)
    print("accuracy on held-out real digits: machine {:.3f}, trees {:.3f}".format(*judge.accuracy))
    for name, pictures in {"held-out real digits": data.held_out, **cheats(data)}.items():
        verdict = judge(pictures)
        print(f"{name}: {verdict}; {'; '.join(verdict.misses(BAR)) or 'passes'}")


if __name__ == "__main__":
    main()
