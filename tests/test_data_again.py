"""The same data again: what counts as a difference, in which words, and what comes back when there is none."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lehr.data import Finding, Item, Listing, digits_pretraining, listing_differences, open_data, reopened
from lehr.data.transforms import Transform
from lehr.errors import DataError

TRANSFORM = Transform((4, 4), 4, (0.5,) * 3, (0.5,) * 3, augment=("flip", "shift"))


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of ten different images."""
    for number in range(20):
        picture(tmp_path / "pets" / ("cat" if number % 2 else "dog") / f"{number}.png", number)
    return tmp_path / "pets"


def kept(listing: Listing) -> Listing:
    """A listing as a run's directory gives it back."""
    return Listing.from_json(json.loads(json.dumps(listing.to_json())))


def refusal(was: Listing, where: str | Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        reopened(was, where)
    return str(caught.value)


def listing(
    train: Sequence[Item], valid: Sequence[Item] = (), classes: Sequence[str] = ("cat", "dog")
) -> Listing:
    return Listing("pets", "/pets", "folder", tuple(classes), tuple(train), tuple(valid), (), "split")


# --- differences ---

A, B, C = Item("cat/a.png", 0, "a" * 16), Item("dog/b.png", 1, "b" * 16), Item("dog/c.png", 1, "c" * 16)


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (listing([A, B], [C]), ()),
        (listing([B, A], [C]), ()),
        (listing([A], [C]), ("1 sample is gone or cannot be read: dog/b.png",)),
        (listing([A, B, Item("dog/x.png", 1, "0" * 16)], [C]), ("1 sample is new: dog/x.png",)),
        (listing([A, replace(B, digest="0" * 16)], [C]), ("1 sample has other content: dog/b.png",)),
        (listing([A, replace(B, digest="")], [C]), ()),
        (listing([A], [B, C]), ("1 sample trained and now validates: dog/b.png",)),
        (listing([A, B, C]), ("1 sample validated and now trains: dog/c.png",)),
        (
            listing([A, replace(B, label=0)], [C]),
            ("1 sample is of another class: dog/b.png (was dog, is cat)",),
        ),
        (
            listing([A, replace(B, path="dog/x.png")], [C]),
            ("1 sample was renamed: dog/b.png (now dog/x.png)",),
        ),
        (
            listing([A, Item("cat/b.png", 0, B.digest)], [C]),
            ("1 sample is of another class: dog/b.png (was dog, is cat)",),
        ),
        (
            listing([replace(A, label=1), replace(B, label=0)], [replace(C, label=0)], ("dog", "cat")),
            ("classes in another order: dog, cat, where it was cat, dog",),
        ),
        (listing([A, B], [C], ("cat", "dog", "eel")), ("1 class is new: eel",)),
        (replace(listing([A, B], [C]), channels=1), ("images grey, where they were in colour",)),
        (
            replace(listing([A, B], [C]), size=(8, 9)),
            ("images of 8 x 9 pixels, in colour, where they were in colour",),
        ),
        (replace(listing([A, B], [C]), kind="npz"), ("the kind of data: npz, where it was folder",)),
    ],
)
def test_each_difference_has_its_words(now: Listing, lines: tuple[str, ...]) -> None:
    """Each way in which data can differ is one line with a count and names; the order of samples is none."""
    assert listing_differences(listing([A, B], [C]), now) == lines


def test_where_the_data_lie_is_no_difference() -> None:
    """Another place, another wording of the split and other findings are the same data."""
    was = listing([A, B], [C])
    moved = replace(was, source="x", root="/x", split="otherwise", findings=(Finding("", "note", False),))
    assert listing_differences(was, moved) == ()


def test_composed_and_decomposed_names_are_the_same() -> None:
    """A file system that hands out accents in another form has not changed the data."""
    was, now = (
        listing(
            [Item(unicodedata.normalize(form, "é/ü.png"), 0, "a" * 16)],
            (),
            [unicodedata.normalize(form, "é")],
        )
        for form in ("NFC", "NFD")
    )
    assert was != now
    assert listing_differences(was, now) == ()


def test_many_differences_stay_few_lines() -> None:
    """However much differs, there are at most eleven lines, each with three names and a count, all printable."""
    names = ["\x1b[2J", "b\nb", *map(str, range(50))]
    was = listing([Item(f"{c}/{i}", i, f"{i:016x}") for i, c in enumerate(names)], (), names)
    other = [Item(f"z{c}/{i}", i, f"{i + 999:016x}") for i, c in enumerate(reversed(names))]
    now = replace(listing(other, (), [f"z{name}" for name in names]), kind="npz", channels=1)
    lines = listing_differences(was, now)
    assert 5 <= len(lines) <= 11
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    assert any(line.startswith("52 samples are gone") and line.endswith("and 49 more") for line in lines)
    assert any(line.startswith("52 classes are gone") and line.endswith("and 42 more") for line in lines)


_ITEMS = st.lists(
    st.builds(
        Item, st.sampled_from("abcdefg"), st.integers(0, 1), st.sampled_from(["", *(c * 16 for c in "0123")])
    ),
    unique_by=lambda item: item.path,
)


@given(was=_ITEMS, now=_ITEMS, cut=st.integers(0, 7))
def test_no_difference_means_the_same_samples(was: list[Item], now: list[Item], cut: int) -> None:
    """Nothing is reported exactly where every sample has its path, class and half, and no other content."""
    first, second = (listing(items[:cut], items[cut:]) for items in (was, now))

    def facts(one: Listing, other: Listing) -> dict[str, tuple[object, ...]]:
        theirs = {item.path: item.digest for item in other.train + other.valid}
        return {
            item.path: (item.label, half, item.digest if theirs.get(item.path) else "")
            for half, items in enumerate((one.train, one.valid))
            for item in items
        }

    same = facts(first, second) == facts(second, first)
    assert (listing_differences(first, second) == ()) == same
    assert listing_differences(first, first) == ()


# --- opened again ---


def folder_in_one_piece(root: Path) -> Path:
    for number in range(20):
        picture(root / ("cat" if number % 2 else "dog") / f"{number}.png", number)
    return root


def folder_in_halves(root: Path) -> Path:
    folder_in_one_piece(root / "train")
    for number in range(6):
        picture(root / "val" / ("cat" if number % 2 else "dog") / f"{number}.png", 100 + number)
    return root


def npz_in_one_piece(root: Path) -> Path:
    root.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    np.savez(root / "a.npz", x=images, y=np.arange(20) % 2)
    return root / "a.npz"


def npz_in_halves(root: Path) -> Path:
    root.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    half = np.arange(10) % 2
    np.savez(root / "a.npz", x_train=images[:10], y_train=half, x_val=images[10:], y_val=half)
    return root / "a.npz"


def cifar(root: Path) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (root / f"{name}.bin").write_bytes(rows.tobytes())
    return root


KINDS = (folder_in_one_piece, folder_in_halves, npz_in_one_piece, npz_in_halves, cifar)


@pytest.mark.parametrize("make", KINDS)
def test_the_same_samples_come_back(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Any kind of data comes back with the same listing and, to the bit, the same samples in the same order."""
    where = make(tmp_path / "data")
    data = open_data(where, seed=7, valid_share=0.3)
    again = reopened(kept(data.listing))
    assert again.listing == data.listing
    for first, second in (
        (data.train(TRANSFORM, seed=1), again.train(TRANSFORM, seed=1)),
        (data.valid(TRANSFORM), again.valid(TRANSFORM)),
    ):
        assert len(first) == len(second) > 0
        pairs = [(first[index, 2], second[index, 2]) for index in range(len(first))]
        assert all(one[0].equal(two[0]) and one[1] == two[1] for one, two in pairs)


@pytest.mark.parametrize("make", KINDS)
def test_data_may_be_moved(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Data found in another place are the same data; the place is the new one from then on."""
    where = make(tmp_path / "data")
    data = open_data(where)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    message = refusal(data.listing)
    assert "lehr resume RUN --data" in message
    assert str(where) in message.splitlines()[0]
    new = tmp_path / "elsewhere" / where.relative_to(tmp_path / "data")
    again = reopened(kept(data.listing), str(new))
    assert again.listing == replace(data.listing, source=str(new), root=str(new))
    assert again.train(TRANSFORM)[0][0].equal(reopened(data.listing, new).train(TRANSFORM)[0][0])


def test_an_edited_order_is_kept(pets: Path) -> None:
    """The order and the halves are those of the listing, not those of another split or of the file system."""
    was = open_data(pets).listing
    shuffled = replace(was, train=was.valid[::-1] + was.train[:3], valid=was.train[:2:-1])
    assert reopened(shuffled).listing == shuffled


def test_the_built_in_data_come_back() -> None:
    """The digits need no place: they are where lehr is; so are those for pretraining."""
    for data in (open_data("digits"), digits_pretraining(seed=3)):
        again = reopened(kept(data.listing))
        assert again.listing == data.listing
        assert (
            again.read(data.listing.train[0].path, 1).tobytes()
            == data.read(data.listing.train[0].path, 1).tobytes()
        )


def test_what_changed_is_named(pets: Path) -> None:
    """Files that are gone, changed, new or in another class folder are all named in one error."""
    was = open_data(pets).listing
    (pets / "cat/1.png").unlink()
    picture(pets / "cat/3.png", 999)
    picture(pets / "cat/new.png", 998)
    (pets / "cat/5.png").rename(pets / "dog/5.png")
    lines = refusal(kept(was)).splitlines()
    assert lines[0] == (
        f"{pets}: not the data that this run began with; put them back as they were, or begin a new run: "
        f"lehr fit {pets}"
    )
    assert [line.strip() for line in lines[1:]] == [
        "1 sample is gone or cannot be read: cat/1.png",
        "1 sample has other content: cat/3.png",
        "1 sample is of another class: cat/5.png (was cat, is dog)",
        "1 sample is new: cat/new.png",
    ]


def test_a_renamed_class_is_named(pets: Path) -> None:
    """A class folder with another name is a class gone, a class new, and its samples of another class."""
    was = open_data(pets).listing
    (pets / "cat").rename(pets / "tiger")
    lines = [line.strip() for line in refusal(was).splitlines()[1:]]
    assert lines[:2] == ["1 class is gone: cat", "1 class is new: tiger"]
    assert lines[2].startswith("10 samples are of another class: cat/")
    assert len(lines) == 3


def test_a_moved_half_is_named(tmp_path: Path) -> None:
    """An image that was moved from train/ to val/ is named as one that trained and now validates."""
    root = folder_in_halves(tmp_path / "pets")
    was = open_data(root).listing
    (root / "train/cat/1.png").rename(root / "val/cat/one.png")
    assert refusal(was).splitlines()[1:] == ["  1 sample trained and now validates: train/cat/1.png"]


def test_a_renamed_held_out_image_keeps_its_half(pets: Path) -> None:
    """Where lehr split, a renamed image is one that was renamed, not one that changed halves."""
    was = open_data(pets).listing
    held_out = was.valid[0].path
    (pets / held_out).rename(pets / held_out.replace(".png", "x.png"))
    assert refusal(was).splitlines()[1:] == [f"  1 sample was renamed: {held_out} (now {held_out[:-4]}x.png)"]


def test_junk_is_no_difference(pets: Path) -> None:
    """What no opening would take for a sample may come and go: hidden files, text, broken images, empty folders."""
    (pets / "cat/notes.txt").write_text("cats")
    was = open_data(pets).listing
    (pets / "cat/notes.txt").unlink()
    (pets / "cat/.DS_Store").write_bytes(b"\0\1")
    (pets / "dog/readme.md").write_text("dogs")
    (pets / "dog/half.png").write_bytes((pets / "dog/2.png").read_bytes()[:40])
    (pets / "eel").mkdir()
    assert reopened(kept(was)).listing == was


def test_what_was_left_out_stays_out(pets: Path) -> None:
    """Files that skip_bad left out are passed over again; one that was mended since is a new sample."""
    good = (pets / "cat/1.png").read_bytes()
    (pets / "cat/1.png").write_bytes(good[:50])
    (pets / "eel").mkdir()
    was = open_data(pets, skip_bad=True).listing
    assert reopened(kept(was)).listing == was
    (pets / "cat/1.png").write_bytes(good)
    assert refusal(was).splitlines()[1:] == ["  1 sample is new: cat/1.png"]


def test_a_sample_that_broke_has_other_content(pets: Path) -> None:
    """A truncated image is one with other content, though its name and date are as they were."""
    was = open_data(pets).listing
    file = pets / "cat/1.png"
    times = file.stat()
    file.write_bytes(file.read_bytes()[:-20])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert refusal(was).splitlines()[1:] == ["  1 sample has other content: cat/1.png"]


def test_one_bit_of_an_array_is_noticed(tmp_path: Path) -> None:
    """One changed bit of one image, or one changed label, of a .npz file is found and named."""
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 5), dtype=np.uint8)
    labels = np.arange(20) % 2
    path = tmp_path / "a.npz"
    np.savez(path, x=images, y=labels)
    was = open_data(path).listing
    images[13, 0, 0] ^= 1
    np.savez(path, x=images, y=labels)
    assert refusal(was).splitlines()[1:] == ["  1 sample has other content: x/13"]
    images[13, 0, 0] ^= 1
    labels[4] = 1
    np.savez(path, x=images, y=labels)
    assert refusal(was).splitlines()[1:] == ["  1 sample is of another class: x/4 (was 0, is 1)"]
    np.savez(path, x=images.reshape(20, 5, 6), y=np.arange(20) % 2)
    assert refusal(was).splitlines()[1:] == [
        "  images of 5 x 6 pixels, grey, where they were of 6 x 5 pixels, grey"
    ]


def test_another_kind_of_data_is_named(pets: Path, tmp_path: Path) -> None:
    """A folder where a file was, or built-in data where a folder was, is said to be another kind first."""
    was = open_data(pets).listing
    assert refusal(was, "digits").splitlines()[1] == "  the kind of data: digits, where it was folder"
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 3), np.uint8), y=np.arange(4) % 2)
    assert refusal(was, tmp_path / "a.npz").splitlines()[1] == "  the kind of data: npz, where it was folder"


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda root: (shutil.rmtree(root), root.mkdir())])
def test_data_that_cannot_be_opened_say_how_to_point_to_them(
    pets: Path, spoil: Callable[[Path], object]
) -> None:
    """Where the place is gone or empty (a disk that is not mounted), the error says how to name another."""
    was = open_data(pets).listing
    spoil(pets)
    first, *rest = refusal(was).splitlines()
    assert first.startswith(
        f"{pets}: the data of this run cannot be opened again; put them back, or say where"
    )
    assert "lehr resume RUN --data" in first
    assert rest
    assert "(" + str(pets) + " at first)" in refusal(was, pets / "nowhere")


def test_only_what_was_found_is_opened(pets: Path, tmp_path: Path) -> None:
    """A path in an edited listing is never opened: what is not found below the place is gone."""
    secret = picture(tmp_path / "secret/cat/1.png", 1)
    was = open_data(pets).listing
    digest = was.train[0].digest
    edited = replace(
        was, train=(*was.train, Item("../secret/cat/1.png", 0, digest), Item(str(secret), 0, digest))
    )
    assert "2 samples are gone or cannot be read" in refusal(edited)


def test_known_files_are_read_but_not_decoded(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening again takes a look at the bytes of known files only: it decodes none of them."""
    was = open_data(pets).listing

    def decode(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr("lehr.data.checking.read_picture", decode)
    assert reopened(was).listing == was


def test_progress_is_told(pets: Path) -> None:
    """Opening again tells how many files are done, to the last."""
    was, told = open_data(pets).listing, []
    reopened(was, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (20, 20)


def test_without_digests_content_is_not_compared(pets: Path) -> None:
    """A listing made without digests can be opened again; its files are decoded, and named the same."""
    was = open_data(pets).listing
    bare = replace(was, train=tuple(replace(item, digest="") for item in was.train))
    assert reopened(bare).listing == was


@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission there")
def test_a_file_that_cannot_be_read_is_named(pets: Path) -> None:
    """A file whose name is there but whose content is not is named among those that cannot be read."""
    was = open_data(pets).listing
    (pets / "cat/1.png").unlink()
    (pets / "cat/1.png").symlink_to("nowhere.png")
    assert refusal(was).splitlines()[1:] == ["  1 sample is gone or cannot be read: cat/1.png"]


@pytest.mark.skipif(sys.platform == "darwin", reason="this file system takes both forms for one")
def test_a_folder_in_other_unicode_comes_back(tmp_path: Path) -> None:
    """After a copy that decomposed every accent, the samples come back under the names that are there now."""
    for number in range(8):
        picture(
            tmp_path
            / "a"
            / unicodedata.normalize("NFC", "hüte" if number % 2 else "bälle")
            / f"ü{number}.png",
            number,
        )
    was = open_data(tmp_path / "a").listing
    for item in was.train + was.valid:
        target = tmp_path / "b" / unicodedata.normalize("NFD", item.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a" / item.path, target)
    again = reopened(was, tmp_path / "b")
    assert [i.digest for i in again.listing.train] == [i.digest for i in was.train]
    assert again.listing.classes == was.classes
    old, new = open_data(tmp_path / "a").train(TRANSFORM), again.train(TRANSFORM)
    assert all(old[i][0].equal(new[i][0]) for i in range(len(old)))
