"""Listings: what a sample is known by, and that nothing in a listing's file is believed unseen."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lehr.data import Finding, Item, Listing, open_data
from lehr.errors import DataError

SMALL = Listing(
    "pets",
    "/home/pets",
    "folder",
    ("cat", "dog"),
    (Item("cat/1.png", 0, "0123456789abcdef"), Item("dog/1.png", 1)),
    (Item("dog/2.png", 1, "fedcba9876543210"),),
    (Finding("cat/3.png", "left out: broken", fatal=False, detail="x"),),
    "stratified",
    size=(4, 6),
)


def digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def refusal(values: Any) -> str:
    with pytest.raises(DataError) as caught:
        Listing.from_json(values)
    return str(caught.value)


def written(**changes: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(SMALL.to_json()))
    assert set(changes) <= set(values)
    return {**values, **changes}


def half(paths: list[Any], labels: list[Any], digests: list[Any]) -> dict[str, list[Any]]:
    return {"paths": paths, "labels": labels, "digests": digests}


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    """The digest of an image in a folder is blake2b of the whole file, whatever its pixels are."""
    for name in ("cat/1.png", "dog/1.png", "dog/2.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 200)).save(tmp_path / name)
    items = open_data(tmp_path, valid_share=0).listing.train
    assert [item.digest for item in items] == [digest((tmp_path / item.path).read_bytes()) for item in items]
    assert [(item.path, item.digest == items[0].digest) for item in items] == [
        ("cat/1.png", True),
        ("dog/1.png", True),
        ("dog/2.bmp", False),
    ]


def test_a_row_is_known_by_its_bytes(tmp_path: Path) -> None:
    """The digest of an array's sample is blake2b of its row of 8-bit pixels, in both halves."""
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", x_train=images[:4], y_train=labels[:4], x_val=images[4:], y_val=labels[4:])
    listing = open_data(tmp_path / "a.npz").listing
    assert [i.digest for i in listing.train + listing.valid] == [digest(row.tobytes()) for row in images]


def test_built_in_digits_have_digests() -> None:
    """Every built-in sample has the digest of its own 64 bytes, 16 hexadecimal digits."""
    listing = open_data("digits").listing
    assert all(len(item.digest) == 16 for item in listing.train + listing.valid)
    assert len({item.digest for item in listing.train}) == len(listing.train)


@given(
    names=st.lists(
        st.text(min_size=1).filter(lambda s: not set(s) & set("/\\\0") and s not in (".", "..")),
        min_size=1,
        unique=True,
    ),
    grey=st.booleans(),
    size=st.none() | st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
)
def test_a_listing_comes_back_from_json_as_it_was(
    names: list[str], grey: bool, size: tuple[int, int] | None
) -> None:
    """Listings of files with any names go to JSON and come back equal."""
    items = tuple(Item(f"class {name}/{name}", i, digest(name.encode())) for i, name in enumerate(names))
    was = replace(SMALL, classes=tuple(names), train=items, valid=(), channels=1 if grey else 3, size=size)
    assert Listing.from_json(json.loads(json.dumps(was.to_json()))) == was


@pytest.mark.parametrize(
    "name", ["a\\b.png", "A: early/1.png", "x..y/..z", "new\nline/1.png", "\udcff/1.png", "..."]
)
def test_odd_names_are_names(name: str) -> None:
    """What a file system takes for a name below its folder is taken from a listing as well."""
    was = replace(SMALL, train=(Item(name, 0),), valid=())
    assert Listing.from_json(json.loads(json.dumps(was.to_json()))) == was


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x.png",
        "a/../../x.png",
        "a/..",
        "a\\..\\..\\x",
        "C:/x.png",
        "C:\\x.png",
        "\\\\host\\x",
        *["a\0b", "", ".", "./a", "a//b", "a/", "a/./b", None, 7, ["a"]],
    ],
)
def test_paths_that_lead_elsewhere_are_refused(path: object) -> None:
    """A path from a listing never leads out of the data, and is never something other than a path."""
    assert "is no path inside the data" in refusal(written(train=half([path], [0], [""])))


@pytest.mark.parametrize("label", [-1, 2, True, 1.0, "1", None, 10**1000])
def test_labels_are_whole_numbers_of_a_class(label: object) -> None:
    """A label that no class has is refused in words, however large it is."""
    assert "train: the label" in refusal(written(train=half(["a"], [label], [""])))


@pytest.mark.parametrize("wrong", ["xyz", "0123456789ABCDEF", "0" * 15, "0" * 17, "0" * 16 + "\n", None, 5])
def test_digests_are_sixteen_hexadecimal_digits(wrong: object) -> None:
    """A digest is 16 hexadecimal digits, or nothing."""
    assert "expected 16 hexadecimal digits" in refusal(written(train=half(["a"], [0], [wrong])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": half(["a", "b"], [0], [""])}, "train: 2 paths, 1 labels, 1 digests"),
        ({"train": half(["a", "a"], [0, 1], ["", ""])}, '"a" comes 2 times'),
        ({"train": half(["dog/2.png"], [0], [""])}, '"dog/2.png" comes 2 times'),
        ({"train": {"paths": [], "labels": []}}, "train: expected an object of paths, labels and digests"),
        ({"valid": half("ab", [0, 0], ["", ""])}, 'valid: paths: "ab"; expected a list'),  # type: ignore[arg-type]
        ({"valid": []}, "valid: expected an object"),
        ({"size": [0, 4]}, "size: a list"),
        ({"size": [4]}, "size: a list"),
        ({"size": [4, True]}, "size: a list"),
        ({"size": 4}, "size: 4; expected height and width"),
        ({"channels": 2}, "channels: 2; expected 1 or 3"),
        ({"channels": True}, "channels: true; expected 1 or 3"),
        ({"channels": 3.0}, "channels: 3.0; expected 1 or 3"),
        ({"kind": "video"}, 'kind: "video"; expected cifar, digits, folder, npz'),
        ({"kind": ["folder"]}, "kind: a list"),
        ({"classes": "cat"}, 'classes: "cat"; expected a list'),
        ({"classes": [0, 1]}, "classes: 0; expected a text"),
        ({"root": None}, "root: null; expected a text"),
        ({"root": "/a\0b"}, "zero character"),
        ({"split": {}}, "split: a dict; expected a text"),
        ({"findings": [{"path": "a", "what": "b", "fatal": False}]}, "findings: expected objects"),
        ({"findings": [{"path": "a", "what": "b", "fatal": 0, "detail": ""}]}, "fatal is 0"),
        ({"findings": ["a"]}, "findings: expected objects"),
    ],
)
def test_every_wrong_value_is_named(changes: dict[str, Any], words: str) -> None:
    """What is wrong in a listing's file is said with its name and value, and what to do."""
    message = refusal(written(**changes))
    assert words in message
    assert message.isprintable()
    assert "put back the data.json that the run wrote" in message


@pytest.mark.parametrize("name", [*Listing.__dataclass_fields__])
def test_nothing_may_be_missing(name: str) -> None:
    """A listing without one of its values is refused by the name of it."""
    values = written()
    del values[name]
    assert f'"{name}" is missing' in refusal(values)


def test_nothing_may_be_unknown() -> None:
    """A value that this version does not know is refused by its name, escaped."""
    assert '"\\x1b[2J" is unknown' in refusal({**written(), "\x1b[2J": 1})


def test_a_listing_of_an_older_lehr_says_so() -> None:
    """Version 1 had no digests: it is refused in words that say who made it and what to do."""
    assert "made by an older lehr" in refusal(written(version=1))
    assert "begin a new run" in refusal(written(version=1))


@pytest.mark.parametrize("version", [3, 0, -1, "2", True, 2.0, None, 10**1000, [2]])
def test_other_versions_are_refused(version: object) -> None:
    """A version that this lehr does not read is refused, not guessed at."""
    assert "this lehr reads version 2" in refusal(written(version=version))


@pytest.mark.parametrize("values", [None, [], "text", 3, True])
def test_a_listing_is_an_object(values: object) -> None:
    """Any other JSON is refused."""
    assert "expected an object" in refusal(values)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    name=st.sampled_from([*written()]),
    within=st.sampled_from(["", "paths", "labels", "digests"]),
    value=_ANYTHING,
)
def test_anything_in_place_of_a_value_is_read_or_refused(name: str, within: str, value: Any) -> None:
    """Any JSON in place of any value gives a listing or a DataError, never another error."""
    values = written()
    if within and name in ("train", "valid"):
        values[name][within] = value
    else:
        values[name] = value
    try:
        assert isinstance(Listing.from_json(values), Listing)
    except DataError as error:
        assert str(error).isprintable()  # noqa: PT017
