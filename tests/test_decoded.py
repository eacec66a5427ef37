"""Decoded images: read once, kept within their budget, and the same samples to the bit."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lehr.data import Transform, decoded, open_data
from lehr.data.datasets import ImageSamples
from lehr.data.decoded import Decoded, KeptReader, decoded_budget
from lehr.data.opening import reopened
from lehr.errors import RecipeError

TRANSFORM = Transform((8, 8), 9, (0.5,) * 3, (0.25,) * 3, augment=("crop", "flip"))
COUNT = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, some grey, some with an EXIF rotation, of several sizes."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        shape = (10 + number, 14) if number % 3 == 0 else (10 + number, 14, 3)
        image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 2 else 1
        path = (
            tmp_path
            / ("cat" if number < COUNT // 2 else "dog")
            / f"{number}.{'jpg' if number % 2 else 'png'}"
        )
        path.parent.mkdir(exist_ok=True)
        image.save(path, exif=exif)
    return tmp_path


def every(samples: ImageSamples) -> list[torch.Tensor]:
    return [samples.sample(index, view)[0] for view in (-1, 0, 3) for index in range(len(samples))]


def test_kept_images_give_the_same_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, kept in part, and read from the files each time, every view of every sample has the same bits."""
    found = {}
    for said in ("off", "2000 bytes", "1 GiB"):
        monkeypatch.setenv(decoded.SET_BY, said)
        data = open_data(folder, valid_share=0)
        assert isinstance(data.read, KeptReader)
        found[said] = (len(data.read.decoded), every(data.train(TRANSFORM, seed=1)))
    assert found["off"][0] == 0 < found["2000 bytes"][0] < found["1 GiB"][0] == COUNT
    for said in ("2000 bytes", "1 GiB"):
        assert all(torch.equal(a, b) for a, b in zip(found[said][1], found["off"][1], strict=True))


def test_no_file_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the check the files may go: every sample is there, for processes that load samples too, where they are forked."""
    monkeypatch.setenv(decoded.SET_BY, "1 GiB")
    samples = open_data(folder, valid_share=0).train(TRANSFORM)
    before = every(samples)
    for path in folder.glob("*/*"):
        path.unlink()
    assert all(torch.equal(a, b) for a, b in zip(every(samples), before, strict=True))
    if os.name == "posix":
        loader = DataLoader(samples, batch_size=2, num_workers=2, multiprocessing_context="fork")
        loaded = torch.cat([images for images, _ in loader])
        assert torch.equal(loaded, torch.stack(before[COUNT : 2 * COUNT]))


def test_where_a_run_goes_on_a_file_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened again, files are decoded when they are first wanted, and not a second time; the samples are the same."""
    monkeypatch.setenv(decoded.SET_BY, "1 GiB")
    was = open_data(folder, valid_share=0)
    data = reopened(was.listing)
    assert isinstance(data.read, KeptReader)
    assert not len(data.read.decoded)
    first = every(data.train(TRANSFORM))
    for path in folder.glob("*/*"):
        path.unlink()
    for other in (data, was):
        assert all(torch.equal(a, b) for a, b in zip(every(other.train(TRANSFORM)), first, strict=True))


def test_the_budget_is_never_exceeded() -> None:
    """Many threads together keep no more bytes than there is room for, and what is kept is whole."""
    kept = Decoded(budget=10 * 3 * 16)
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: kept.keep(str(n), images[n]), range(40)))
    assert sum(done) == len(kept) == 10
    assert kept.used == kept.budget
    for number, was_kept in enumerate(done):
        image = kept.get(str(number))
        assert (image is not None) == was_kept
        assert image is None or image.tobytes() == images[number].tobytes()


def test_an_image_that_is_handed_out_is_ones_own() -> None:
    """Who draws on an image that was kept changes no other."""
    kept = Decoded(budget=1000)
    kept.keep("a", Image.new("L", (4, 4)))
    for _ in range(2):
        image = kept.get("a")
        assert image is not None
        assert image.getpixel((0, 0)) == 0
        image.putpixel((0, 0), 255)


def test_a_copy_for_another_process_is_empty() -> None:
    """What is pickled for a process that is started anew carries no pixels, and keeps none."""
    kept = Decoded(budget=1000)
    kept.keep("a", Image.new("L", (4, 4)))
    copy = pickle.loads(pickle.dumps(kept))
    assert (len(copy), copy.keep("a", Image.new("L", (4, 4)))) == (0, False)


def test_it_says_what_it_keeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence says how much, and how to turn it off; let go of, there is nothing to say."""
    monkeypatch.setenv(decoded.SET_BY, "1 GiB")
    read = open_data(folder, valid_share=0).read
    assert isinstance(read, KeptReader)
    assert f"{COUNT} are kept" in read.said
    assert "LEHR_DECODED=off" in read.said
    read.decoded.clear()
    assert read.said == ""
    assert read.decoded.used == 0


def test_the_budget_is_a_persons_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """An amount of memory, off, or else an eighth of what is free; anything else is refused with what to write."""
    monkeypatch.setattr(decoded, "free_memory", lambda: 800)
    assert decoded_budget({}) == 100
    assert decoded_budget({"LEHR_DECODED": "off"}) == 0
    assert decoded_budget({"LEHR_DECODED": "1 MiB"}) == 2**20
    with pytest.raises(
        RecipeError, match="LEHR_DECODED: 'much' is no amount of memory; expected a number and a unit"
    ):
        decoded_budget({"LEHR_DECODED": "much"})
