"""Transforms and samples: what a model sees, and that it depends on (seed, view, index) alone."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lehr.data import Data, Transform, open_data
from lehr.data.datasets import ImageSamples, pure
from lehr.data.purity import preserved, preserved_torch, seed_all, seed_of
from lehr.data.transforms import AUGMENTS, INTERPOLATIONS
from lehr.errors import DataError, RecipeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Transform((16, 16), 16, MEAN, STD)
ALL = replace(PLAIN, augment=AUGMENTS)


def photo(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    noise = np.random.default_rng(0).integers(0, 256, x.shape)
    return Image.fromarray(np.stack([x, y, noise], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("pets")
    for number in range(12):
        path = root / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        photo(24 + number, 20).save(path)
    return open_data(root)


def states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]  # type: ignore[index]


# --- transforms ---


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (40, 40), (10, 200)])
@pytest.mark.parametrize("resize", [20, 24, (22, 30)])
def test_validation_is_what_torchvision_does(
    interpolation: str, width: int, height: int, resize: int | tuple[int, int]
) -> None:
    """Resize, centre crop, to tensor, normalise: equal to torchvision's own, to the last bit."""
    from torchvision import transforms as tv

    ours = Transform((16, 20), resize, MEAN, STD, interpolation=interpolation).valid()(photo(width, height))
    theirs = tv.Compose(
        [
            tv.Resize(resize, tv.InterpolationMode(interpolation)),
            tv.CenterCrop((16, 20)),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )(photo(width, height))
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_augmentation_changes_pixels_and_keeps_the_shape(name: str, channels: int) -> None:
    """Each augmentation gives tensors of the right shape, varies over draws, and is off in validation."""
    transform = Transform(
        (16, 12), (16, 12), MEAN[:channels], STD[:channels], channels=channels, augment=(name,)
    )
    image = photo(12, 16)
    with preserved_torch():
        torch.manual_seed(0)
        made = [transform.train()(image) for _ in range(20)]
    plain = transform.valid()(image)
    assert all(tensor.shape == (channels, 16, 12) and tensor.dtype == torch.float32 for tensor in made)
    assert any(not torch.equal(tensor, plain) for tensor in made)
    assert len({tuple(tensor.flatten().tolist()) for tensor in made}) > 1
    assert torch.equal(transform.valid()(image), plain)


def test_flip_and_shift_do_what_they_say() -> None:
    """A flip mirrors or does nothing; a shift moves the picture by at most an eighth, black coming in."""
    image = photo(16, 16)
    plain = PLAIN.valid()(image)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    with preserved_torch():
        torch.manual_seed(0)
        flips = [replace(PLAIN, augment=("flip",)).train()(image) for _ in range(40)]
        shifts = [replace(PLAIN, augment=("shift",)).train()(image) for _ in range(40)]
    assert {torch.equal(tensor, plain) for tensor in flips} == {True, False}
    assert all(torch.equal(tensor, plain) or torch.equal(tensor, plain.flip(-1)) for tensor in flips)
    padded = black.view(3, 1, 1).expand(3, 20, 20).clone()
    padded[:, 2:18, 2:18] = plain
    windows = [padded[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    assert all(any(torch.allclose(tensor, window) for window in windows) for tensor in shifts)


def test_a_random_crop_takes_at_least_half_of_the_area() -> None:
    """The random part covers 50 to 100 % of a picture of the same shape, stretched by at most 4 : 3."""
    ramp = np.stack(np.meshgrid(np.arange(240), np.arange(240)), axis=-1).astype(np.uint8)  # pixel = position
    image = Image.fromarray(np.concatenate([ramp, ramp[..., :1]], axis=-1))
    crop = Transform(
        (60, 60), 60, (0.0,) * 3, (1 / 255,) * 3, interpolation="nearest", augment=("crop",)
    ).train()
    shares = []
    with preserved_torch():
        torch.manual_seed(0)
        for _ in range(200):
            made = crop(image)
            width, height = ((float(made[axis].max() - made[axis].min())) * 60 / 59 for axis in (0, 1))
            shares.append(width * height / 240**2)
            assert 0.73 < width / height < 1.37
    assert min(shares) > 0.48
    assert max(shares) < 1.02
    assert max(shares) - min(shares) > 0.3


def test_the_order_of_names_does_not_matter() -> None:
    """Augmentations are applied in one order, whatever order they are named in."""
    image, made = photo(20, 20), []
    for names in (AUGMENTS, AUGMENTS[::-1]):
        with preserved_torch():
            torch.manual_seed(3)
            made.append(replace(PLAIN, augment=names).train()(image))
    assert torch.equal(*made)


@given(
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    extra=st.integers(0, 30),
    channels=st.sampled_from([1, 3]),
    augment=st.lists(st.sampled_from(AUGMENTS), unique=True).map(tuple),
    interpolation=st.sampled_from(INTERPOLATIONS),
)
@settings(deadline=None)
def test_transforms_survive_json(
    size: tuple[int, int], extra: int, channels: int, augment: tuple[str, ...], interpolation: str
) -> None:
    """A transform written as JSON and read back is equal, and so is its hash."""
    numbers = (0.5,) * channels
    made = Transform(size, max(size) + extra, numbers, numbers, interpolation, channels, augment)
    again = Transform.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert hash(again) == hash(made)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"augment": ("flp",)}, RecipeError, 'did you mean "flip"'),
        ({"augment": ("mixup",)}, RecipeError, "Expected color, crop"),
        ({"interpolation": "bicubik"}, DataError, 'did you mean "bicubic"'),
        ({"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}, DataError, "expected 1 (grey) or 3"),
        ({"size": (0, 8)}, DataError, "at least 1"),
        ({"size": (8.0, 8.0)}, DataError, "in pixels"),
        ({"resize": 12}, DataError, "cannot be cropped"),
        ({"resize": (16, 12)}, DataError, "cannot be cropped"),
        ({"mean": (0.5,)}, DataError, "expected 3 finite"),
        ({"std": (0.5, 0.5, float("nan"))}, DataError, "expected 3 finite"),
        ({"std": (0.5, 0.5, 0.0)}, DataError, "above 0"),
    ],
)
def test_impossible_transforms_say_why(change: dict[str, Any], error: type[Exception], word: str) -> None:
    """Each impossible value is refused in words that say what was expected."""
    with pytest.raises(error) as caught:
        replace(PLAIN, **change)
    assert word in str(caught.value)


def test_foreign_json_is_no_transform() -> None:
    """Unknown and missing names in JSON are errors with the nearest name."""
    with pytest.raises(DataError, match='did you mean "mean"'):
        Transform.from_json({**PLAIN.to_json(), "means": []})
    with pytest.raises(DataError, match="without resize"):
        Transform.from_json({"size": [8, 8], "mean": [0.5], "std": [0.5]})


# --- purity ---


def test_seeds_are_the_same_everywhere_and_for_ever() -> None:
    """The seed of given numbers never changes; order and grouping matter, the kind of integer does not."""
    assert seed_of(0, 1, 2) == 9058871843155686531
    assert seed_of(12, 3) != seed_of(1, 23) != seed_of(123)
    assert seed_of(np.int64(7), torch.tensor(8).item(), -1) == seed_of(7, 8, -1)  # type: ignore[arg-type]
    assert len({seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000
    with pytest.raises(ValueError, match="format"):
        seed_of(0.5)  # type: ignore[arg-type]


def test_states_are_restored_even_after_an_error() -> None:
    """All three generators go on as if nothing had been drawn, also when the block fails."""
    torch.rand(3), random.gauss(0, 1), np.random.standard_normal()
    before = states()
    with preserved():
        seed_all(5)
        torch.rand(3), random.gauss(0, 1), np.random.standard_normal(3)
    assert states() == before
    with contextlib.suppress(KeyError), preserved():
        seed_all(6)
        raise KeyError
    assert states() == before


def test_torch_and_numpy_get_different_streams() -> None:
    """torch and numpy run the same generator, so they must not start from the same seed."""

    def agree() -> bool:
        words = np.random.randint(0, 2**32, 8, np.uint32)
        return bool(((words & 0xFFFFFF) / 2**24 == torch.rand(8).numpy()).all())

    with preserved():
        torch.manual_seed(77)
        np.random.seed(77)
        assert agree()  # else the comparison would say nothing
        seed_all(seed_of(1))
        assert not agree()


def test_a_sample_is_a_function_of_seed_view_and_index(data: Data) -> None:
    """The same (seed, view, index) gives the same bits whatever ran before; others give others."""
    samples = data.train(ALL, seed=3)
    first = [samples.sample(index, 1)[0] for index in range(len(samples))]
    seed_all(99)
    random.random()
    again = [data.train(ALL, seed=3)[index, 1][0] for index in reversed(range(len(samples)))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [data.train(ALL, seed=4).sample(0, 1)[0], samples.sample(0, 2)[0], samples[0][0]]
    assert len({tuple(tensor.flatten().tolist()) for tensor in (first[0], *others)}) == 4
    assert torch.equal(samples[0][0], samples.sample(0, 0)[0])
    assert torch.equal(samples[-1][0], samples[len(samples) - 1][0])


def test_samples_leave_the_random_states_alone(data: Data) -> None:
    """Taking samples, augmented or not, changes no global generator."""
    before = states()
    data.train(ALL, seed=3).sample(0, 5)
    data.valid(ALL).sample(0)
    noisy = pure(Noisy(), seed=0)
    noisy.sample(1, 1)
    noisy.__getitems__([(0, 1), (2, 1)])
    assert states() == before


def test_samples_do_not_depend_on_numpy_or_random(data: Data) -> None:
    """Augmentation draws from torch alone, so nothing done to the other generators can change it."""
    samples = data.train(ALL, seed=0)
    made = []
    for seed in (1, 2):
        with preserved():
            np.random.seed(seed)
            random.seed(seed)
            before = states()[1:]
            made.append([samples.sample(i, view)[0] for i in range(len(samples)) for view in range(4)])
            assert states()[1:] == before
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


class Noisy(Dataset[tuple[torch.Tensor, int]]):
    """A user's dataset that draws from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand(), index]), index


def batches(dataset: Dataset[Any], workers: int, view: int) -> list[torch.Tensor]:
    keys = [[(index, view) for index in range(start, start + 4)] for start in (4, 0)]
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers else None,
    )
    return [batch[0] for batch in loader]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(data: Data) -> None:
    """Augmented batches drawn by (index, view) are equal to the bit with no workers and with two."""
    for dataset in (data.train(ALL, seed=1), pure(Noisy(), seed=1)):
        alone, shared = (batches(dataset, workers, view=2) for workers in (0, 2))
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
        assert not torch.equal(alone[0], batches(dataset, 0, view=3)[0])


def test_a_users_random_dataset_becomes_pure() -> None:
    """What a user's dataset draws from torch, random or numpy is the same for the same (view, index)."""
    dataset = pure(Noisy(), seed=7)
    one, other = dataset.sample(3, 2)[0], dataset.sample(3, 1)[0]
    assert len(dataset) == 12
    assert torch.equal(one, dataset.sample(3, 2)[0])
    assert torch.equal(one, dataset.__getitems__([(5, 2), (3, 2)])[1][0])
    assert torch.equal(one, dataset[3, 2][0])
    assert torch.equal(dataset[3][0], dataset.sample(3, 0)[0])
    assert (one[:3] != other[:3]).all()
    assert (one[:3] != pure(Noisy(), seed=8).sample(3, 2)[0][:3]).all()


def test_tensors_in_memory_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorDataset draws nothing, so no time is spent on its randomness."""
    monkeypatch.setattr("lehr.data.datasets.seed_all", lambda _: pytest.fail("seeded for nothing"))
    dataset = pure(TensorDataset(torch.arange(4)), seed=0)
    assert dataset.sample(2, 1)[0].item() == 2
    assert dataset.__getitems__([(3, 1), (0, 1)])[0][0].item() == 3
    assert pure(dataset, seed=1) is dataset


def test_a_subset_of_samples_keeps_its_views(data: Data) -> None:
    """A Subset of lehr's samples is augmented anew in each view, not with the first view for ever."""
    samples = data.train(ALL, seed=3)
    part = pure(Subset(samples, [4, 2]), seed=0)
    assert isinstance(part, ImageSamples)
    assert [item.path for item in part.items] == [samples.items[4].path, samples.items[2].path]
    assert not torch.equal(part.sample(0, 0)[0], part.sample(0, 1)[0])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("dataset", [Stream(), Endless(), 5])
def test_what_has_no_length_or_index_is_refused(dataset: Any) -> None:
    """A dataset that cannot be indexed or has no length is an error that says what is needed."""
    with pytest.raises(DataError, match="map-style"):
        pure(dataset, seed=0)


def test_halves_behave_like_lists(data: Data) -> None:
    """Halves have a length, targets and IndexError past the end, and survive pickling for spawned workers."""
    samples = data.train(PLAIN)
    assert isinstance(samples, Dataset)
    assert len(samples) == len(data.listing.train)
    assert list(samples.targets) == [target for _, target in samples]  # ends by IndexError
    with pytest.raises(IndexError):
        samples[len(samples)]
    copied = pickle.loads(pickle.dumps(samples))
    assert torch.equal(copied[0][0], samples[0][0])


def test_validation_is_not_augmented(data: Data) -> None:
    """The validation half is the same in every view, whatever the transform augments."""
    samples = data.valid(ALL)
    assert torch.equal(samples.sample(0, 0)[0], samples.sample(0, 7)[0])
    assert torch.equal(samples[0][0], data.valid(PLAIN)[0][0])


def test_a_file_that_goes_bad_later_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that broke after the check, and whose pixels were not kept, is a DataError with its path, not a decoder's
    traceback.
    """
    monkeypatch.setenv("LEHR_DECODED", "off")
    for number in range(4):
        path = tmp_path / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        photo(20, 20).save(path)
    samples = open_data(tmp_path, valid_share=0).train(PLAIN)
    (tmp_path / samples.items[1].path).write_bytes(b"")
    with pytest.raises(DataError, match=samples.items[1].path):
        samples[1]


def test_digits_can_be_trained_on() -> None:
    """The built-in digits give 1 x 8 x 8 tensors, shifted differently in different views."""
    samples = open_data("digits").train(Transform((8, 8), 8, (0.3,), (0.3,), channels=1, augment=("shift",)))
    tensor, target = samples[0]
    assert tensor.shape == (1, 8, 8)
    assert 0 <= target < 5
    assert len({tuple(samples.sample(0, view)[0].flatten().tolist()) for view in range(12)}) > 3
