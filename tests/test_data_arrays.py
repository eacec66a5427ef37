"""Arrays, CIFAR-10's files and the built-in digits."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lehr.data import Data, digits_pretraining, open_data
from lehr.errors import DataError

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_lossless_subset.npz"
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), np.uint8)  # (n, h, w, c)
LABELS = np.arange(20) % 2


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_data(path)
    return str(caught.value)


def pixels(data: Data, half: str = "train", index: int = 0) -> np.ndarray:
    items = data.listing.train if half == "train" else data.listing.valid
    return np.asarray(data.read(items[index].path, data.listing.channels))


@pytest.mark.parametrize("form", ["nhwc", "nchw", "nhw", "nhw1", "n1hw"])
def test_every_layout_gives_the_same_pixels(tmp_path: Path, form: str) -> None:
    """Channels last, channels first and grey are told apart by shape, and no pixel changes."""
    grey = COLOUR[..., 0]
    arrays = {
        "nhwc": COLOUR,
        "nchw": COLOUR.transpose(0, 3, 1, 2),
        "nhw": grey,
        "nhw1": grey[..., None],
        "n1hw": grey[:, None],
    }
    data = open_data(saved(tmp_path, x=arrays[form], y=LABELS), valid_share=0)
    expected = COLOUR if form in ("nhwc", "nchw") else grey
    assert data.listing.kind == "npz"
    assert data.listing.size == (5, 6)
    assert data.listing.channels == (3 if form in ("nhwc", "nchw") else 1)
    for index in (0, 19):
        np.testing.assert_array_equal(pixels(data, index=index), expected[index])


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("x_train", "y_train", "x_val", "y_val"),
        ("X_train", "Y_train", "X_valid", "Y_valid"),
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("x", "y", None, None),
        ("images", "labels", None, None),
    ],
)
def test_usual_key_names_are_understood(tmp_path: Path, names: tuple[str | None, ...]) -> None:
    """The key names that people use are read, in either case, with or without a validation half."""
    arrays = {names[0]: COLOUR, names[1]: LABELS}
    if names[2]:
        arrays |= {names[2]: COLOUR[:4], names[3]: LABELS[:4]}
    data = open_data(saved(tmp_path, **arrays))  # type: ignore[arg-type]
    assert data.classes == ("0", "1")
    assert data.listing.counts == ({"0": (10, 2), "1": (10, 2)} if names[2] else {"0": (8, 2), "1": (8, 2)})
    half = COLOUR[int(data.listing.valid[0].path.split("/")[1])]
    np.testing.assert_array_equal(pixels(data, "valid"), half)


@pytest.mark.parametrize(
    ("array", "expected", "word"),
    [
        (COLOUR / 255, COLOUR, "[0, 1]"),
        ((COLOUR / 255).astype(np.float32), COLOUR, "[0, 1]"),
        (COLOUR.astype(np.float64), COLOUR, "[0, 255]"),
        (COLOUR.astype(np.int64), COLOUR, "[0, 255]"),
        (COLOUR.astype(np.uint16) * 257, COLOUR, "uint16"),
    ],
)
def test_other_numbers_become_8_bits_and_say_so(
    tmp_path: Path, array: np.ndarray, expected: np.ndarray, word: str
) -> None:
    """Floats and wider integers are scaled by the range they have, to the nearest level, with a note."""
    data = open_data(saved(tmp_path, x=array, y=LABELS), valid_share=0)
    np.testing.assert_array_equal(pixels(data), expected[0])
    assert word in "\n".join(data.listing.notes())


def test_transparency_in_arrays_is_laid_on_white(tmp_path: Path) -> None:
    """A fourth channel is transparency, as in files."""
    clear = np.concatenate([COLOUR, np.zeros_like(COLOUR[..., :1])], axis=-1)
    data = open_data(saved(tmp_path, x=clear, y=LABELS))
    assert (pixels(data) == 255).all()
    assert data.listing.channels == 3


def test_class_names_come_from_the_file(tmp_path: Path) -> None:
    """`classes` names the labels from 0 on; a name without an image is noted; texts may be labels too."""
    data = open_data(saved(tmp_path, x=COLOUR, y=LABELS, classes=np.array(["cat", "dog", "eel"])))
    assert data.classes == ("cat", "dog", "eel")
    assert "no image: eel" in "\n".join(data.listing.notes())
    data = open_data(saved(tmp_path, x=COLOUR, y=np.array(["dog", "cat"])[LABELS]), valid_share=0)
    assert data.classes == ("cat", "dog")
    assert data.listing.train[0].label == 1


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"pictures": COLOUR}, "expected x_train and y_train"),
        ({"x_trai": COLOUR, "y_train": LABELS}, 'did you mean "x_train"'),
        ({"x": COLOUR, "y": LABELS[:5]}, "5 labels for 20 images"),
        ({"x": COLOUR, "y": np.eye(2)[LABELS]}, "argmax"),
        ({"x": COLOUR, "y": LABELS * 0.5}, "whole numbers or texts"),
        ({"x": COLOUR[0, 0], "y": LABELS[:6]}, "expected images as"),
        ({"x": COLOUR[:0], "y": LABELS[:0]}, "at least one"),
        ({"x": np.zeros((4, 3, 5, 3), np.uint8), "y": LABELS[:4]}, "both ends could be channels"),
        ({"x": np.zeros((4, 5, 5, 2), np.uint8), "y": LABELS[:4]}, "no axis has 1, 3 or 4"),
        ({"x": (COLOUR - 128.0) / 64, "y": LABELS}, "before they are normalised"),
        ({"x": COLOUR * np.nan, "y": LABELS}, "nan"),
        ({"x": COLOUR.astype(np.int64) * 1000, "y": LABELS}, "values up to"),
        ({"x": COLOUR > 5, "y": LABELS}, "type bool"),
        ({"x": COLOUR, "y": LABELS * 0}, "one class only (0)"),
        ({"x": COLOUR, "y": LABELS, "classes": np.array(["cat"])}, "a label 1 has no name"),
        ({"x": COLOUR, "y": LABELS, "classes": np.array(["cat", "cat"])}, "a name comes twice"),
        (
            {"x_train": COLOUR, "y_train": LABELS, "x_test": COLOUR[:, :, 1:], "y_test": LABELS},
            "different sizes",
        ),
        (
            {"x_train": COLOUR, "y_train": LABELS, "x_test": COLOUR, "y_test": LABELS + 1},
            "validation half only: 2",
        ),
    ],
)
def test_arrays_that_cannot_be_trained_on_say_why(tmp_path: Path, arrays: dict[str, Any], word: str) -> None:
    """Each way in which arrays can be wrong has a message that says what was found and expected."""
    assert word in refusal(saved(tmp_path, **arrays))


def test_nothing_in_an_npz_is_unpickled(tmp_path: Path) -> None:
    """An array of Python objects is refused, and what it would have run did not run."""
    witness = tmp_path / "ran"
    path = tmp_path / "a.npz"
    np.savez(path, x=COLOUR, y=LABELS, classes=np.array([Runs(witness), "dog"], dtype=object))
    assert "never unpickled" in refusal(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 broken", b"text", "cut", "flipped"])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes | str) -> None:
    """A damaged or foreign file called .npz is an error that names it."""
    np.savez_compressed(tmp_path / "a.npz", x=COLOUR, y=LABELS)
    whole = (tmp_path / "a.npz").read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "flipped": whole[:200] + b"\xff" * 50 + whole[250:]}
    (tmp_path / "a.npz").write_bytes(content if isinstance(content, bytes) else damaged[content])
    assert "a.npz is not a whole .npz file" in refusal(tmp_path / "a.npz")


# --- CIFAR-10 ---


class Runs:
    """Unpickled by a plain unpickler, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


ROWS = np.random.default_rng(0).integers(0, 256, (60, 3072), np.uint8)
TARGETS = [number % 10 for number in range(60)]
NAMES = [f"name{number}" for number in range(10)]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def python2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote it: byte strings, and numpy's old module names."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    number = [b"K" + bytes([label]) for label in labels]
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\1\x87R(K\3"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    shape = b"(K" + bytes([len(rows)]) + b"M\0\x0ct"
    state = b"(K\1" + shape + dtype + b"\x89" + text(rows.tobytes()) + b"tb"
    return b"\x80\2}(" + text(b"data") + array + state + text(b"labels") + b"](" + b"".join(number) + b"eu."


def cifar(root: Path, form: str) -> Path:
    place = root / ("cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py")
    place.mkdir(parents=True)
    for number, name in enumerate(BATCHES):
        rows, labels = ROWS[number * 10 :][:10], TARGETS[number * 10 :][:10]
        if form == "binary":
            (place / f"{name}.bin").write_bytes(np.column_stack([np.array(labels, np.uint8), rows]).tobytes())
        elif form == "python 2":
            (place / name).write_bytes(python2_pickle(rows, labels))
        else:
            (place / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}, protocol=2))
    if form == "binary":
        (place / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    else:
        (place / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    return place


@pytest.mark.parametrize("form", ["python 2", "python 3", "binary"])
def test_cifar_files_give_their_images(tmp_path: Path, form: str) -> None:
    """Python and binary files give the same images, labels and names, from their folder or the one above."""
    place = cifar(tmp_path, form)
    for where in (place, tmp_path):
        data = open_data(where)
        assert data.listing.kind == "cifar"
        assert data.classes == tuple(NAMES)
        assert (len(data.listing.train), len(data.listing.valid)) == (50, 10)
        assert [item.label for item in data.listing.train] == TARGETS[:50]
        np.testing.assert_array_equal(pixels(data, index=13), ROWS[13].reshape(3, 32, 32).transpose(1, 2, 0))
        np.testing.assert_array_equal(
            pixels(data, "valid", 7), ROWS[57].reshape(3, 32, 32).transpose(1, 2, 0)
        )


def test_python_2_pickles_here_are_what_python_reads() -> None:
    """The hand-made Python 2 pickle of these tests is a valid one: Python's own reader agrees."""
    batch = pickle.loads(
        python2_pickle(ROWS[:3], [1, 2, 3]).replace(b"numpy.core.", b"numpy._core."), encoding="bytes"
    )
    np.testing.assert_array_equal(batch[b"data"], ROWS[:3])
    assert batch[b"labels"] == [1, 2, 3]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int, name: str) -> None:
    """A batch that would run a command is refused, by name, before anything runs."""
    place, witness = cifar(tmp_path, "python 3"), tmp_path / "ran"
    (place / name).write_bytes(pickle.dumps({"data": Runs(witness)}, protocol=protocol))
    text = refusal(place)
    assert "nothing in it was run" in text
    assert name in text
    assert not witness.exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"\x80\2c_codecs\nencode\nX\1\0\0\0aX\5\0\0\0rot13\x86R.",
        b"\x80\2cnumpy\ndtype\nX\2\0\0\0O8K\0K\1\x87R.",
        b"\x80\2c_codecs\nencode\n}X\1\0\0\0aK\1sb.",
        b"\x80\2cnumpy\ndtype\n}X\1\0\0\0aK\1sb.",
        b"Psome id\n.",
        b"(lp0\nI1\na.",
        b"not a pickle",
        b"",
    ],
)
def test_no_pickle_gets_past_the_reader(tmp_path: Path, stream: bytes) -> None:
    """Names outside the list, object arrays, codecs, persistent ids, damage: each is a DataError."""
    place = cifar(tmp_path, "python 3")
    (place / "data_batch_1").write_bytes(stream)
    assert "data_batch_1" in refusal(place)


def test_incomplete_or_odd_cifar_is_refused(tmp_path: Path) -> None:
    """Missing batches, short files, labels out of range and wrong shapes are errors that name the file."""
    place = cifar(tmp_path, "python 3")
    (place / "data_batch_2").write_bytes(pickle.dumps({"data": ROWS[:2, :9], "labels": [1, 2]}, protocol=2))
    assert "expected uint8 (n, 3072)" in refusal(place)
    (place / "data_batch_2").write_bytes(pickle.dumps({"data": ROWS[:2], "labels": [1, 10]}, protocol=2))
    assert "from 0 to 9" in refusal(place)
    (place / "data_batch_2").unlink()
    assert "without data_batch_2" in refusal(place)
    binary = cifar(tmp_path / "other", "binary")
    (binary / "data_batch_4.bin").write_bytes(bytes(3072))
    assert "multiple of 3073" in refusal(binary)


def test_cifar_without_its_names_file_has_the_usual_names(tmp_path: Path) -> None:
    """Without the meta file the classes are CIFAR-10's own, with a note."""
    place = cifar(tmp_path, "binary")
    (place / "batches.meta.txt").unlink()
    data = open_data(place)
    assert data.classes[:2] == ("airplane", "automobile")
    assert "batches.meta.txt is missing" in data.listing.notes()[0]


@pytest.mark.skipif(not CIFAR.is_file(), reason="the CIFAR-10 subset is not in this checkout")
def test_the_real_cifar_subset_is_read() -> None:
    """A real .npz of 9,353 images is read with its names and halves."""
    data = open_data(CIFAR)
    assert data.classes[3] == "cat"
    assert (len(data.listing.train), len(data.listing.valid)) == (8336, 1017)
    with np.load(CIFAR) as file:
        np.testing.assert_array_equal(pixels(data, index=5), file["x_train"][5].transpose(1, 2, 0))


# --- digits ---


def test_digits_are_few_to_train_and_many_to_validate() -> None:
    """The built-in digits are 5 to 9: the first five of each class train, whatever the seed; all others validate."""
    data = open_data("digits")
    assert data.classes == ("5", "6", "7", "8", "9")
    assert {train for train, _ in data.listing.counts.values()} == {5}
    assert len(data.listing.train) + len(data.listing.valid) == 896
    assert (data.listing.size, data.listing.channels, data.listing.kind) == ((8, 8), 1, "digits")
    assert open_data("digits").listing == data.listing
    assert open_data("digits", seed=1).listing.train == data.listing.train


def test_digits_keep_their_levels() -> None:
    """The 17 levels of the source are spread over 0 .. 255 and labels match the source."""
    from sklearn.datasets import load_digits

    source, data = load_digits(), open_data("digits")
    for item in data.listing.train:
        row = int(item.path.split("/")[1])
        assert int(data.classes[item.label]) == source.target[row]
        levels = np.asarray(data.read(item.path, 1))
        np.testing.assert_array_equal(np.rint(levels * (16 / 255)), source.images[row])


def test_pretraining_sees_no_digit_of_the_task() -> None:
    """The digits for pretraining are 0 to 4, and no image is in both sets."""
    before, task = digits_pretraining(), open_data("digits")
    assert before.classes == ("0", "1", "2", "3", "4")
    assert len(before.listing.train) + len(before.listing.valid) == 901
    rows = [{item.path for item in data.listing.train + data.listing.valid} for data in (before, task)]
    assert not rows[0] & rows[1]


def test_a_folder_called_digits_is_not_taken_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a folder has the built-in set's name, a note says which is meant and how to mean the other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert "write ./digits" in open_data("digits").listing.notes()[0]
    assert "class folders" in refusal(Path("./digits").absolute())
