"""What every reader is tried with: files that were whole once and are damaged here and there, files made to lie,
and plain noise. Used by test_fuzz.py, with few examples, and by scripts/fuzz.py, with many; no test lives here.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import save

from lehr.data.arrays import load_npz
from lehr.data.cifar import load_cifar
from lehr.data.images import read_image
from lehr.data.listing import Finding, Item, Listing
from lehr.data.transforms import Transform
from lehr.duration import Duration
from lehr.errors import CheckpointError, DataError, LehrError
from lehr.event_json import format_line, parse_line
from lehr.events import EpochEnded, Note, Record, StepsTaken
from lehr.journal import read_journal
from lehr.notation import read_schedule
from lehr.plan_json import content_hash, dumps
from lehr.planning import Plan
from lehr.recipe_file import load_recipe
from lehr.run import state as states
from lehr.run.reload import Card, read_card
from lehr.run.weights import read_weights
from lehr.untrusted import printable_lines
from plans import TWO_STAGES, plan_of
from strategies import durations, joins, recipes
from test_state import PLAIN as STATE

Inputs = st.SearchStrategy[bytes]
_TOKENS = (
    b"\0", b"\xff\xff\xff\xff", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80", b"{", b"[", b'"', b"\n", b"\x1b[2J",
    b"\xe2\x80\xae", b"PK\3\4", b"PK\1\2", b"nan", b"1e400", b"9" * 50, b"..", b"/", b"\xff\xda", b"IDAT",
    b"R", b"b", b"q\0", b"h\0", b"r\xff\xff\xff\x7f", b"(", b"t", b"\x86", b"\xed\xa0\x80",
)  # fmt: skip
_DEEP = 20_000
_CIFAR_NAMES = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n"
JSON_TEXTS = (
    "1e400", "9" * 5000, "NaN", "-Infinity", '"\\ud800"', '"\\u0000"', '"\\u001b[2J\\n"', "[" * _DEEP + "]" * _DEEP,
    '{"a":' * 500 + "1" + "}" * 500, "{}", "[]", "null", "true", "-1", "0", "0.5", '"x"', '""', "9223372036854775808",
    '{"a":1,"a":2}', '["a","a"]', "[null]", "1e-320", '"../../x"', "[[1,2],3]", "100000000000", '"inf"', "-0.0",
)  # fmt: skip
TOML_TEXTS = (
    "0x" + "f" * 5000, "9" * 5000, "1" + "0" * 400, "nan", "-inf", "1979-05-27", "07:32:00", "[" * 3000 + "]" * 3000,
    "{ a = " * 200 + "1" + " }" * 200, '"\\u0000"', '"\\u001b[2J"', "'x'", '""', "[]", "{}", "true", "-1", "0", "1e400",
    "[1, 'a', {}]", '["all", ""]', "'1e99 steps'", "'99999999999999999999 epochs'", '"head\\n"', "'5 %'", "1_000",
    "'restarts(\"1 step\", grow=1)'", "'cosine(' ", '"\\ud800"', "a.b.c = 1", "'polynomial(" + "9" * 400 + ")'",
)  # fmt: skip
_WORDS = (
    "cosine", "warmup", "restarts", "step_decay", "one_cycle", "hold", "(", ")", ">>", ",", "floor=", "at=", "shape=",
    '"5%"', '"1 step"', "1", "-1", "0.5", "1e400", "None", "[", "]", "**{}", "lambda: 0", "__import__('os')", "-" * 1500,
    "(" * 500, "9" * 1500, "'\\d'", "\0", "\n", "1j", "{1}", "b'x'", "...", "5 ", "epochs", "%", "_", "e99", "x" * 3000,
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader under its name, with what it is tried with and how it is called: with the path of a file, and
    the bytes in it. `worded` is False where messages are made safe to show only when they are shown.
    """

    name: str
    inputs: Inputs
    read: Callable[[Path, bytes], object]
    file: str = "file"
    worded: bool = True


def attempt(reader: Reader, content: bytes, folder: Path) -> bool:
    """Whether `reader` takes `content`. Anything but a value or an error in words is an AssertionError."""
    path = folder / reader.file
    path.write_bytes(content)
    try:
        reader.read(path, content)
    except LehrError as error:
        said = str(error)
        assert said, f"{reader.name}: refused without a word"
        assert len(said) < 20_000, f"{reader.name}: refused in {len(said)} characters"
        assert not reader.worded or said == printable_lines(said), f"{reader.name}: raw bytes in {said!r}"
        return False
    return True


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with one to four things done to it: bits turned, bytes gone, put in, repeated or overwritten."""
    content = bytearray(whole)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        many = draw(st.integers(1, 64))
        match draw(st.sampled_from(["bit", "token", "over", "cut", "gone", "again", "byte"])):
            case "bit" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if content:
                content[at] = draw(st.integers(0, 255))
            case "token":
                content[at:at] = draw(st.sampled_from(_TOKENS))
            case "over":
                token = draw(st.sampled_from(_TOKENS))
                content[at : at + len(token)] = token
            case "cut":
                del content[at:]
            case "gone":
                del content[at : at + many]
            case "again":
                content[at:at] = content[at : at + many] * draw(st.sampled_from([1, 2, 100]))
    return bytes(content)


def any_of(wholes: Iterable[bytes]) -> Inputs:
    """Each of some whole files, damaged; now and then noise instead."""
    noise = st.binary(max_size=200)
    return st.one_of(*[damaged(whole) for whole in wholes], noise)


@st.composite
def lying_json(draw: st.DrawFn, plain: Any) -> bytes:
    """JSON in which one to three values are others, of other types and beyond all bounds, or a key is new."""
    plain = json.loads(json.dumps(plain))
    put: dict[str, str] = {}
    for index in range(draw(st.sampled_from([1, 1, 2, 3]))):
        mark = f"@{index}@"
        place: Any = plain
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if isinstance(place, dict) and draw(st.integers(0, 9)) == 0:
                keys = [draw(st.sampled_from(["", "x", "\x1b[2J", "a\nb", "\u202e"]))]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place.get(key) if isinstance(place, dict) else place[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                place = inner
                continue
            place[key] = mark
            put[mark] = draw(st.sampled_from(JSON_TEXTS))
            break
    text = json.dumps(plain)
    for mark, written in put.items():
        text = text.replace(json.dumps(mark), written)
    return text.encode()


@st.composite
def rehashed(draw: st.DrawFn, plain: Any) -> bytes:
    """A lying plan that has the hash of what it says: whoever writes a file can do that, too."""
    content = draw(lying_json(plain))
    try:
        whole = json.loads(content)
        inside = {k: v for k, v in whole.items() if k not in ("format", "hash")}
        inside = {
            k: float("inf") if v == "inf" and k in ("clip_norm", "patience") else v for k, v in inside.items()
        }
        return json.dumps(
            {"format": 1, "hash": content_hash(inside), **whole} | {"hash": content_hash(inside)}
        ).encode()
    except (ValueError, RecursionError):
        return content


@st.composite
def lying_state(draw: st.DrawFn) -> bytes:
    """A lying checkpoint that has the hash of what it says."""
    content = draw(lying_json(STATE))
    try:
        whole = {key: value for key, value in json.loads(content).items() if key != "hash"}
        return json.dumps({**whole, "hash": states._hash(whole)}).encode()
    except (ValueError, RecursionError, AttributeError):
        return content


def _read_state(_: Path, content: bytes) -> object:
    try:
        return states.loads(content)
    except states.DamageError as why:
        raise CheckpointError(str(why)) from None


@st.composite
def lying_toml(draw: st.DrawFn) -> bytes:
    """A recipe in which one or two values are others, or a line is new."""
    lines = TWO_STAGES.to_toml().split("\n")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[at].partition(" = ")
        new = draw(
            st.sampled_from(["x", '"\\u001b[2J"', "stages", "[[stages]]", "a.b", "optimizer", "ema", "seed"])
        )
        key = key if equals and draw(st.integers(0, 4)) else new
        lines[at] = f"{key} = {draw(st.sampled_from(TOML_TEXTS))}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _words() -> Inputs:
    return st.lists(st.sampled_from(_WORDS) | st.text(max_size=4), max_size=12).map(
        lambda words: "".join(words).encode("utf-8", "surrogatepass")
    )


@st.composite
def lying_npz(draw: st.DrawFn) -> bytes:
    """A zip archive of arrays whose headers say what is not so, under any names, packed in any way."""
    sizes = st.sampled_from([0, 1, 2, 3, 4, 28, -1, 2**31, 2**60, 2**63, 10**30])
    types = [
        "|u1",
        "<f4",
        "<i8",
        "|O",
        "<U4",
        "|S0",
        "|S3",
        "<M8[s]",
        "<c16",
        "|b1",
        "|V8",
        ">u2",
        "<f2",
        "x",
        "<U999999999",
    ]
    names = [
        "x",
        "y",
        "x_train",
        "y_train",
        "x_test",
        "y_test",
        "classes",
        "../../x",
        "/x",
        "\x1b[2J",
        "",
        "a" * 300,
    ]
    out = io.BytesIO()
    packing = draw(
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    )
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name in [*draw(st.lists(st.sampled_from(names), max_size=3, unique=True)), "images", "labels"]:
            fortran = draw(st.booleans())
            shape = tuple(draw(st.lists(sizes, max_size=4)))
            descr = draw(st.sampled_from(types))
            if draw(st.booleans()) and name == "images":
                shape, descr = (2, 4, 4), draw(st.sampled_from(types[:3]))
            if draw(st.booleans()) and name in ("labels", "y"):
                shape, descr = (2,), draw(st.sampled_from(types))
            header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
            header = draw(st.one_of(st.just(header), st.just(header), damaged(header)))
            content = draw(
                st.sampled_from(
                    [b"", bytes(2), bytes(32), b"\xff" * 32, bytes(16), b"\xff" * 128, bytes(100_000)]
                )
            )
            head = b"\x93NUMPY\1\0" + struct.pack("<H", min(len(header), 65535)) + header
            archive.writestr(f"{name}.npy", head + content)
    return out.getvalue()


def zipped(pickled: bytes, numbers: dict[str, bytes], *, packing: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save's form around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/byteorder", "little")
        for key, content in numbers.items():
            archive.writestr(f"w/data/{key}", content)
    return out.getvalue()


@st.composite
def lying_pth(draw: st.DrawFn) -> bytes:
    """A whole archive around a damaged pickle, or around numbers of another size than it says."""
    with zipfile.ZipFile(io.BytesIO(pth())) as archive:
        inside = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    numbers = {name[5:]: content for name, content in inside.items() if name.startswith("data/")}
    if draw(st.integers(0, 4)) == 0:
        key = draw(st.sampled_from(sorted(numbers)))
        numbers[key] = draw(st.sampled_from([b"", b"\0", numbers[key] * 2, numbers[key][:-1]]))
        return zipped(inside["data.pkl"], numbers)
    packing = draw(st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED]))
    return zipped(draw(damaged(inside["data.pkl"])), numbers, packing=packing)


@st.composite
def lying_safetensors(draw: st.DrawFn) -> bytes:
    """A header that says what is not so, of the length that it says or of another."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    }
    said = draw(lying_json(header))
    length = draw(st.sampled_from([len(said)] * 6 + [0, len(said) - 1, 2**31, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + said + bytes(32)


@cache
def pth(old: bool = False) -> bytes:
    """What torch.save writes, in either form: views of one storage, a parameter, numbers and texts beside."""
    shared = torch.arange(6.0)
    state = {
        "a.weight": shared.view(2, 3), "a.tied": shared[2:4], "b": torch.tensor(7), "c": torch.zeros(2, dtype=torch.bfloat16),
        "d": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    out = io.BytesIO()
    whole = {"state_dict": torch.nn.Linear(2, 2).state_dict() | state, "epoch": 3, "lr": [0.1], "name": "x"}
    torch.save(whole, out, _use_new_zipfile_serialization=not old)
    return out.getvalue()


@cache
def images() -> tuple[bytes, ...]:
    """A small image in every format, with what makes formats hard: frames, palettes, tiles, EXIF, 16 bits."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb]}
    ways: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}), (rgb.convert("P"), "PNG", {}), (rgb, "PNG", frames), (rgb.convert("I;16"), "PNG", {}),
        (rgb, "GIF", frames), (rgb, "BMP", {}), (rgb.convert("L"), "PPM", {}), (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", frames), (rgb, "TIFF", {"compression": "jpeg"}), (rgb.convert("F"), "TIFF", {}),
        (rgb, "WEBP", {}), (rgb, "WEBP", frames), (rgb, "MPO", frames),
    ]  # fmt: skip
    ways += [(rgb, "JPEG2000", {})] if features.check("jpg_2000") else []
    ways += [(rgb, "AVIF", {})] if features.check("avif") else []
    out = []
    for image, form, options in ways:
        file = io.BytesIO()
        image.save(file, form, **options)
        out.append(file.getvalue())
    return tuple(out)


def png(width: int, height: int) -> bytes:
    """A whole PNG of one colour: a few thousand bytes for any number of pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    squeeze = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@st.composite
def lying_png(draw: st.DrawFn) -> bytes:
    """A PNG whose header says other sizes, depths and kinds, with the checksum that goes with it."""
    sides = st.sampled_from([0, 1, 9, 12, 10_000, 50_000, 2**31 - 1, 2**32 - 1])
    whole = bytearray(images()[3])
    whole[16:29] = struct.pack(
        ">IIBBBBB", draw(sides), draw(sides), draw(st.sampled_from([1, 2, 8, 16, 3])), draw(st.integers(0, 7)), 0, 0,
        draw(st.integers(0, 2)),
    )  # fmt: skip
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


@cache
def npz(*, packed: bool) -> bytes:
    """A whole .npz file."""
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    arrays = {
        "x_train": rng.integers(0, 255, (4, 5, 5), dtype=np.uint8), "y_train": np.array([0, 1, 0, 1]),
        "x_test": rng.random((2, 5, 5)).astype(np.float32) * 255, "y_test": np.array([1, 0]), "classes": np.array(["a", "é"]),
    }  # fmt: skip
    (np.savez_compressed if packed else np.savez)(out, **arrays)
    return out.getvalue()


@cache
def cifar() -> bytes:
    """A batch of two images."""
    rows = np.random.default_rng(0).integers(0, 255, (2, 3072), dtype=np.uint8)
    return pickle.dumps(
        {"batch_label": "x", "labels": [3, 4], "data": rows, "filenames": ["a", "b"]}, protocol=2
    )


@cache
def cifar_names() -> bytes:
    """CIFAR-10's file of the names of its classes."""
    return pickle.dumps({"label_names": [f"c{i}" for i in range(10)], "vis": 3072}, protocol=4)


def _read_cifar(path: Path, content: bytes) -> object:
    """`content` as one of the files of a whole data set: a batch, or the names of the classes."""
    which = "batches.meta" if b"label_names" in content else "data_batch_1"
    return load_cifar(
        _set(path.parent / which, {"batches.meta": cifar_names()}, cifar(), "", {which: content})
    )


def _read_cifar_binary(path: Path, content: bytes) -> object:
    which = "batches.meta.txt" if b"airplane" in content else "data_batch_1.bin"
    names = {"batches.meta.txt": _CIFAR_NAMES}
    return load_cifar(_set(path.parent / which, names, bytes(3073), ".bin", {which: content}))


def _set(folder: Path, names: dict[str, bytes], batch: bytes, suffix: str, tried: dict[str, bytes]) -> Path:
    """A whole data set, written once, but for what is tried."""
    if not folder.exists():
        folder.mkdir()
        batches = [*(f"data_batch_{number}{suffix}" for number in range(1, 6)), f"test_batch{suffix}"]
        for name, content in (names | dict.fromkeys(batches, batch)).items():
            (folder / name).write_bytes(content)
    for name, content in tried.items():
        (folder / name).write_bytes(content)
    return folder


def _read_recipe(path: Path, _: bytes) -> object:
    """What was read can be written, and read again."""
    recipe = load_recipe(path)
    (path.parent / "again.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(path.parent / "again.toml") == recipe
    return recipe


def _read_plan(path: Path, _: bytes) -> object:
    """What was read can be printed and asked."""
    plan = Plan.load(path)
    if plan.total_steps < 10**6:
        assert printable_lines(str(plan)) == str(plan)
        assert plan[plan.total_steps - 1].index == plan.total_steps - 1
    return plan


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return content.decode("utf-8", "replace")


def _read_listing(path: Path, _: bytes) -> object:
    """As a run's data.json is read: JSON first, which is a table."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    if not isinstance(values, dict):
        raise DataError("not a table")
    return Listing.from_json(values)


def _listing() -> Any:
    items = tuple(Item(f"a/{n}.png", n % 2, "0123456789abcdef") for n in range(3))
    note = Finding("a/0.png", "CMYK, converted", fatal=False)
    return Listing(
        "d", "/d", "folder", ("a", "b"), items[:2], items[2:], (note,), "as it was", 3, (4, 4)
    ).to_json()


def card() -> Any:
    """A model.json, as plain values."""
    return Card(
        "m", ("a", "b"), Transform((8, 8), 8, (0.5,), (0.2,), channels=1), {"source": "none"}
    ).to_json()


def safetensors() -> bytes:
    """A whole file of two tensors."""
    return save({"a": torch.zeros(2, 3), "b": torch.tensor(7)}, metadata={"format": "pt"})


def _journal() -> bytes:
    events = [
        Note("hello"), StepsTaken(0, 2, (2.5, float("nan"))),
        EpochEnded(0, 0, 2, 0.5, {"valid_accuracy": 0.9}, {"head": 1e-3}, 3.2, 500.0, True),
    ]  # fmt: skip
    return "".join(format_line(Record(1.5, event)) + "\n" for event in events).encode()


def _journal_values() -> Any:
    return [json.loads(line) for line in _journal().splitlines()]


def plan() -> bytes:
    """A whole plan.json."""
    return dumps(plan_of(None).to_dict()).encode()


def readers() -> dict[str, Reader]:
    """Every reader, by name. A reader of checkpoints joins by adding a line."""
    plain = json.loads(plan())
    recipe = TWO_STAGES.to_toml().encode()
    lines = st.sampled_from(_journal_values()).flatmap(lying_json)
    any_recipe = recipes().flatmap(lambda value: damaged(value.to_toml().encode()))
    any_schedule = joins().flatmap(lambda value: damaged(str(value).encode()))
    any_duration = durations().flatmap(lambda value: damaged(str(value).encode()))
    all_readers = [
        Reader("recipe", any_of([recipe]) | lying_toml() | any_recipe, _read_recipe, "recipe.toml"),
        Reader("schedule", _words() | any_schedule, lambda _, b: str(read_schedule(_text(b)))),
        Reader("duration", _words() | any_duration, lambda _, b: str(Duration.parse(_text(b)))),
        Reader("plan", any_of([plan()]) | lying_json(plain) | rehashed(plain), _read_plan, "plan.json"),
        Reader("journal", any_of([_journal()]) | lines, lambda p, _: read_journal(p), "journal.jsonl", worded=False),
        Reader("journal line", lines, lambda _, b: parse_line(_text(b)), worded=False),
        Reader("cifar", any_of([cifar(), cifar_names()]), _read_cifar, "read"),
        Reader("cifar binary", any_of([bytes(6146), _CIFAR_NAMES]), _read_cifar_binary, "read"),
        Reader("npz", any_of([npz(packed=True), npz(packed=False)]) | lying_npz(), lambda p, _: load_npz(p), "x.npz"),
        Reader("image", any_of(images()) | lying_png(), lambda p, _: read_image(p), "x.png"),
        Reader("safetensors", any_of([safetensors()]) | lying_safetensors(), lambda p, _: read_weights(p), "w.safetensors"),
        Reader("pth", any_of([pth()]) | lying_pth(), lambda p, _: read_weights(p), "w.pth"),
        Reader("old pth", any_of([pth(old=True)]), lambda p, _: read_weights(p), "w.pth"),
        Reader("card", any_of([json.dumps(card()).encode()]) | lying_json(card()), lambda p, _: read_card(p.parent), "model.json"),
        Reader("checkpoint", any_of([json.dumps(STATE).encode()]) | lying_state(), _read_state),
        Reader("listing", lying_json(_listing()), _read_listing, "data.json", worded=False),
    ]  # fmt: skip
    return {reader.name: reader for reader in all_readers}
