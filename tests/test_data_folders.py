"""Folders of images: what is found, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lehr.data import Finding, Listing, open_data
from lehr.data.listing import report, shown
from lehr.errors import DataError

FLOWERS = Path(__file__).parents[2] / "shared" / "data" / "flowers5"


def save(path: Path, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4)).save(path)
    return path


def folder(root: Path, classes: Iterable[str] = ("cat", "dog"), count: int = 5) -> Path:
    for name in classes:
        for number in range(count):
            save(root / name / f"{number}.png")
    return root


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        open_data(root, **options)  # type: ignore[arg-type]
    return str(caught.value)


def notes(listing: Listing) -> str:
    return "\n".join(listing.notes())


def paths(items: Iterable[object]) -> list[str]:
    return [item.path for item in items]  # type: ignore[attr-defined]


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    """A fifth of each class validates, nothing is in both halves, nothing is lost."""
    listing = open_data(folder(tmp_path, ("cat", "dog", "eel"), 10)).listing
    assert listing.kind == "folder"
    assert listing.classes == ("cat", "dog", "eel")
    assert listing.counts == {"cat": (8, 2), "dog": (8, 2), "eel": (8, 2)}
    assert len({*paths(listing.train), *paths(listing.valid)}) == 30
    assert all(
        listing.classes[item.label] == item.path.split("/")[0] for item in listing.train + listing.valid
    )
    assert listing.split == "stratified, 20 % of each class held out, seed 0"
    assert listing.size == (4, 6)
    assert listing.channels == 3
    assert listing.findings == ()


def test_the_split_depends_on_seed_and_names_alone(tmp_path: Path) -> None:
    """The same names split alike in another place and order; another seed, another split."""
    one, two = tmp_path / "one", tmp_path / "two"
    folder(one, ("cat", "dog"), 20)
    for name in ("dog", "cat"):
        for number in reversed(range(20)):
            save(two / name / f"{number}.png")
    assert open_data(one).listing.valid == open_data(two).listing.valid
    assert open_data(one, seed=1).listing.valid != open_data(one).listing.valid
    on_every_platform = ["cat/0.png", "cat/15.png", "cat/7.png", "cat/9.png", "dog/0.png", "dog/3.png"]
    assert paths(open_data(one).listing.valid)[:6] == on_every_platform


@pytest.mark.parametrize("half", ["val", "valid", "validation", "test", "Val", "TEST"])
def test_train_and_validation_folders_are_kept(tmp_path: Path, half: str) -> None:
    """A folder with train/ and a validation half under any usual name is used as it is split."""
    folder(tmp_path / "train", count=3)
    folder(tmp_path / half, count=2)
    listing = open_data(tmp_path).listing
    assert listing.counts == {"cat": (3, 2), "dog": (3, 2)}
    assert listing.split == f"the folders train/ and {half}/"
    assert {path.split("/")[0] for path in paths(listing.valid)} == {half}


def test_a_test_folder_beside_val_is_left_alone(tmp_path: Path) -> None:
    """Where there is val/, test/ is not used, and a note says so."""
    for half in ("train", "val", "test"):
        folder(tmp_path / half)
    listing = open_data(tmp_path).listing
    assert listing.split == "the folders train/ and val/"
    assert "ignored (1 entry): test/" in notes(listing)


def test_train_alone_is_split(tmp_path: Path) -> None:
    """A folder with train/ only has a part of train/ held out."""
    listing = open_data(folder(tmp_path / "train").parent).listing
    assert listing.counts == {"cat": (4, 1), "dog": (4, 1)}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """A class folder called train, beside other class folders, is a class."""
    assert open_data(folder(tmp_path, ("plane", "train"))).listing.classes == ("plane", "train")


@pytest.mark.parametrize(("count", "valid"), [(1, 0), (2, 1), (3, 1), (7, 1), (8, 2)])
def test_small_classes_are_in_both_halves_if_they_can(tmp_path: Path, count: int, valid: int) -> None:
    """A class of two images or more keeps one in each half; a class of one trains, and it is noted."""
    folder(tmp_path, ("big",), 10)
    folder(tmp_path, ("small",), count)
    listing = open_data(tmp_path).listing
    assert listing.counts["small"] == (count - valid, valid)
    assert ("classes of one image" in notes(listing)) == (count == 1)


def test_nothing_is_held_out_on_request(tmp_path: Path) -> None:
    """valid_share=0 holds nothing out; a share outside [0, 1) is refused."""
    folder(tmp_path)
    assert open_data(tmp_path, valid_share=0).listing.valid == ()
    for share in (1, -0.1, 20, float("nan")):
        assert "expected a share" in refusal(tmp_path, valid_share=share)


def test_every_problem_is_in_one_report(tmp_path: Path) -> None:
    """All bad files and empty classes come in one error, with paths, grouped, and with what to do."""
    folder(tmp_path)
    (tmp_path / "eel").mkdir()
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "cat" / "page.jpg").write_text("<html>")
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    (tmp_path / "dog" / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dog" / "notes.txt").write_text("none of this is fatal")
    text = refusal(tmp_path)
    for part in (
        "eel/",
        "cat/empty.jpg",
        "cat/page.jpg",
        "dog/cut.png",
        "dog/gone.png",
        "--skip-bad",
        "5 problems",
    ):
        assert part in text
    assert "notes.txt" not in text


def test_skip_bad_goes_on_without(tmp_path: Path) -> None:
    """With skip_bad the same folder trains without the bad files and empty classes, each noted."""
    folder(tmp_path)
    (tmp_path / "eel").mkdir()
    (tmp_path / "fox").mkdir()
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "fox" / "empty.jpg").touch()
    listing = open_data(tmp_path, skip_bad=True).listing
    assert listing.classes == ("cat", "dog")
    assert len(listing.train) + len(listing.valid) == 10
    assert not any(finding.fatal for finding in listing.findings)
    for part in ("cat/empty.jpg", "eel/", "fox/", "left out"):
        assert part in notes(listing)


def test_a_long_report_is_cut_and_counted() -> None:
    """A thousand bad files are about twenty lines and a number."""
    findings = [Finding(f"cat/{i}.jpg", "broken", fatal=True) for i in range(1000)]
    findings += [Finding(f"dog/{i}.jpg", "empty", fatal=True) for i in range(7)]
    lines = report("pets", findings).splitlines()
    assert len(lines) <= 24
    assert lines[0] == "pets: 1007 problems found before training."
    named = sum("/" in line for line in lines)
    assert f"and {1007 - named} more" in "\n".join(lines)


def test_many_files_left_out_are_one_line(tmp_path: Path) -> None:
    """Files left out are all recorded, and shown as one line where they are many."""
    folder(tmp_path)
    for number in range(30):
        (tmp_path / "cat" / f"bad{number}.jpg").touch()
    listing = open_data(tmp_path, skip_bad=True).listing
    assert len(listing.findings) == 30
    assert listing.notes() == ("left out: an empty file (0 bytes) (30 files): cat/bad0.jpg and 29 more",)


def test_odd_images_are_noted_once_a_kind(tmp_path: Path) -> None:
    """What was converted is one note for each kind, with a count; plain files need no note."""
    folder(tmp_path)
    for number in range(3):
        save(tmp_path / "cat" / f"clear{number}.png", "RGBA")
    save(tmp_path / "dog" / "print.jpg", "CMYK")
    found = open_data(tmp_path).listing.notes()
    assert found == (
        "CMYK, converted to RGB (1 file): dog/print.jpg",
        "transparency, laid on white (3 files): cat/clear0.png: the first",
    )


def test_litter_and_hidden_files_are_passed_over_in_silence(tmp_path: Path) -> None:
    """Hidden files and folders, Thumbs.db and the like leave no trace."""
    folder(tmp_path)
    for name in ("Thumbs.db", ".DS_Store", ".hidden.png"):
        (tmp_path / "cat" / name).write_bytes(bytes(9))
    folder(tmp_path / "__MACOSX")
    folder(tmp_path / ".cache")
    listing = open_data(tmp_path).listing
    assert listing.findings == ()
    assert len(listing.train) + len(listing.valid) == 10


def test_images_beside_the_class_folders_are_noted(tmp_path: Path) -> None:
    """An image of no class is not used, and a note says so."""
    save(folder(tmp_path) / "overview.png")
    listing = open_data(tmp_path).listing
    assert "beside the class folders, so of no class: ignored (1 file): overview.png" in notes(listing)
    assert "overview.png" not in paths(listing.train + listing.valid)


def test_folders_inside_a_class_are_read(tmp_path: Path) -> None:
    """Images at any depth below a class folder belong to it."""
    folder(tmp_path)
    save(tmp_path / "cat" / "black" / "small" / "x.png")
    listing = open_data(tmp_path, valid_share=0).listing
    assert "cat/black/small/x.png" in paths(listing.train)


def test_links_are_followed_but_loops_end(tmp_path: Path) -> None:
    """Links to files and folders count; a link upwards or to itself brings nothing in twice."""
    folder(tmp_path / "data")
    save(tmp_path / "elsewhere" / "linked.png")
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "here").symlink_to(tmp_path / "data" / "cat")
    listing = open_data(tmp_path / "data", valid_share=0).listing
    assert listing.counts == {"cat": (6, 0), "dog": (5, 0)}
    assert "cat/more/linked.png" in paths(listing.train)
    assert "not followed (2 links)" in notes(listing)
    (tmp_path / "data" / "dog" / "self.png").symlink_to(tmp_path / "data" / "dog" / "self.png")
    assert "dog/self.png" in refusal(tmp_path / "data")


def test_special_files_are_never_opened(tmp_path: Path) -> None:
    """A pipe called like an image is noted and not waited for."""
    os.mkfifo(folder(tmp_path) / "cat" / "pipe.png")
    assert "neither a file nor a folder, ignored (1 entry): cat/pipe.png" in notes(
        open_data(tmp_path).listing
    )


def test_one_class_is_refused(tmp_path: Path) -> None:
    """One class is an error, and skip_bad does not change that."""
    folder(tmp_path, ("cat",))
    assert "one class only (cat)" in refusal(tmp_path)
    assert "one class only (cat)" in refusal(tmp_path, skip_bad=True)


def test_a_folder_one_level_too_high_is_recognised(tmp_path: Path) -> None:
    """Where the only folder holds the class folders, it is named as what was meant."""
    folder(tmp_path / "pets")
    text = refusal(tmp_path)
    assert f'did you mean "{tmp_path}/pets", which holds cat, dog?' in text


def test_classes_that_only_validate_are_refused(tmp_path: Path) -> None:
    """A class that nothing trains is an error with both lists and the nearest name."""
    folder(tmp_path / "train", ("cat", "dog"))
    folder(tmp_path / "val", ("cats", "dog"))
    text = refusal(tmp_path, skip_bad=True)
    assert 'validation half only: cats; did you mean "cat"? The training half has cat, dog' in text


def test_classes_that_only_train_are_noted(tmp_path: Path) -> None:
    """A class without a validation image is a note."""
    folder(tmp_path / "train", ("cat", "dog", "eel"))
    folder(tmp_path / "val", ("cat", "dog"))
    assert "training half only, so nothing validates them: eel" in notes(open_data(tmp_path).listing)


@pytest.mark.parametrize("half", ["train", "val"])
def test_an_empty_half_is_refused(tmp_path: Path, half: str) -> None:
    """A half without class folders is an error that names it."""
    other = {"train": "val", "val": "train"}[half]
    folder(tmp_path / other)
    (tmp_path / half).mkdir()
    (tmp_path / half / "readme.txt").touch()
    assert f"{half}: no class folders; expected one folder of images for each class" in refusal(tmp_path)


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    """A folder with images and no class folders says what was expected."""
    save(tmp_path / "a.png")
    text = refusal(tmp_path)
    assert "expected one folder of images for each class" in text
    assert "1 file" in text


def test_names_of_any_language_work(tmp_path: Path) -> None:
    """Non-ASCII names are classes like any other, composed for display, however the system spells them."""
    decomposed = unicodedata.normalize("NFD", "été")
    folder(tmp_path, (decomposed, "снег", "猫"))
    data = open_data(tmp_path)
    assert data.classes == ("été", "снег", "猫")
    assert data.read(data.listing.train[0].path, 3).size == (6, 4)


def test_decomposed_names_match_composed_ones(tmp_path: Path) -> None:
    """The same accented class in both halves is one class, though spelled with other code points."""
    folder(tmp_path / "train", (unicodedata.normalize("NFD", "é"), "dog"))
    folder(tmp_path / "val", ("é", "dog"))
    assert open_data(tmp_path).classes == ("dog", "é")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_dangerous_names_are_shown_escaped(tmp_path: Path) -> None:
    """Line breaks, terminal codes, direction marks and broken bytes in names never reach the terminal."""
    folder(tmp_path)
    for name in (b"a\nb.png", b"\x1b[2Jc.png", "\u202egnp.d".encode(), b"bad\xff.png"):
        Path(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/" + name)).touch()
    text = refusal(tmp_path)
    for part in (r"a\nb.png", r"\x1b[2Jc.png", r"\u202egnp.d", r"bad\udcff.png"):
        assert part in text or part == r"\u202egnp.d"  # that one has no image suffix, so it is only a note
    assert all(line.isprintable() for line in text.splitlines())
    found = open_data(tmp_path, skip_bad=True).listing.notes()
    assert all(line.isprintable() for line in found)
    assert shown("plain é") == "plain é"


def test_a_listing_survives_json(tmp_path: Path) -> None:
    """A listing written as JSON and read back is equal, odd names and notes included."""
    folder(tmp_path, ("猫", "dog"))
    save(tmp_path / "dog" / "print.jpg", "CMYK")
    save(Path(os.fsdecode(os.fsencode(tmp_path / "dog") + b"/\xff.png")))
    listing = open_data(tmp_path).listing
    assert Listing.from_json(json.loads(json.dumps(listing.to_json()))) == listing
    assert listing.source == str(tmp_path)
    assert Path(listing.root).is_absolute()


def test_a_strange_listing_is_refused(tmp_path: Path) -> None:
    """JSON of another version, or with a part missing, is an error."""
    values = open_data(folder(tmp_path)).listing.to_json()
    with pytest.raises(DataError, match="version 99"):
        Listing.from_json({**values, "version": 99})
    del values["train"]
    with pytest.raises(DataError, match="train"):
        Listing.from_json(values)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """Progress is called with numbers that rise to the total."""
    seen: list[tuple[int, int]] = []
    open_data(folder(tmp_path, count=50), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == (100, 100)


def test_grey_folders_are_known_to_be_grey(tmp_path: Path) -> None:
    """Where every image is grey there is one channel; where sizes differ there is no common size."""
    for number, name in enumerate(("cat", "dog")):
        for index in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (5, 5 + number)).save(tmp_path / name / f"{index}.png")
    listing = open_data(tmp_path).listing
    assert listing.channels == 1
    assert listing.size is None


def test_unknown_places_say_what_is_accepted(tmp_path: Path) -> None:
    """A path that is not there names what is accepted and the nearest thing that is there."""
    folder(tmp_path / "flowers")
    text = refusal(tmp_path / "flower")
    assert 'did you mean "flowers"?' in text
    assert ".npz" in text
    with pytest.raises(DataError, match='did you mean "digits"'):
        open_data("digit")
    assert "no such file" in refusal(tmp_path / ("x" * 5000)) or "cannot be read" in refusal(
        tmp_path / ("x" * 5000)
    )
    (tmp_path / "pets.zip").touch()
    assert "unpack" in refusal(tmp_path / "pets.zip")


def test_importing_the_package_loads_no_torch() -> None:
    """`import lehr.data` loads neither torch nor torchvision nor scikit-learn."""
    import subprocess

    code = (
        "import sys, lehr.data; print([m for m in ('torch', 'torchvision', 'sklearn') if m in sys.modules])"
    )
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not FLOWERS.is_dir(), reason="the flower photographs are not in this checkout")
def test_real_photographs_are_checked_quickly() -> None:
    """Thousands of real JPEGs are checked and split, all without a finding, in seconds."""
    start = time.perf_counter()
    listing = open_data(FLOWERS).listing
    assert len(listing.train) + len(listing.valid) == 4317
    assert listing.findings == ()
    assert listing.size == (128, 128)
    assert abs(len(listing.valid) / 4317 - 0.2) < 0.001
    assert (
        time.perf_counter() - start < 60
    )  # seconds where nothing else runs; the bound allows for a busy machine


def test_pixels_come_from_the_files(tmp_path: Path) -> None:
    """The reader of a folder gives the pixels of the file that an item names."""
    folder(tmp_path)
    values = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "cat" / "0.png")
    data = open_data(tmp_path)
    np.testing.assert_array_equal(np.asarray(data.read("cat/0.png", 3)), values)
