"""Nothing that lehr reads can run code, hang it, fill the memory or reach a terminal raw."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fuzz
from lehr.__main__ import main
from lehr.data.arrays import load_npz
from lehr.data.images import read_image
from lehr.errors import DataError, LehrError, RecipeError, WeightsError
from lehr.planning import Plan
from lehr.recipe_file import load_recipe
from lehr.run.weights import read_weights
from lehr.untrusted import open_file, printable, read_bytes

READERS = fuzz.readers()
EVIL = "\x1b[2Jevil\n\u202e\x9b2J"


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_a_value_or_an_error_in_words(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in a file, a reader gives a value, or refuses it in printable words."""
    folder = tmp_path_factory.mktemp("read")

    @settings(
        max_examples=25, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(READERS[name].inputs)
    def tried(content: bytes) -> None:
        fuzz.attempt(READERS[name], content, folder)

    tried()


@pytest.mark.parametrize(
    "name", ["pth", "old pth", "safetensors", "image", "npz", "cifar", "card", "plan", "recipe"]
)
def test_what_the_fuzzing_damages_was_whole(name: str, tmp_path: Path) -> None:
    """The files that the fuzzing damages are accepted as they are, so that damage is all that is refused."""
    wholes = {
        "pth": [fuzz.pth()], "old pth": [fuzz.pth(old=True)], "safetensors": [fuzz.safetensors()],
        "image": fuzz.images(), "npz": [fuzz.npz(packed=True), fuzz.npz(packed=False)],
        "cifar": [fuzz.cifar(), fuzz.cifar_names()], "card": [json.dumps(fuzz.card()).encode()],
        "plan": [fuzz.plan()], "recipe": [fuzz.TWO_STAGES.to_toml().encode()],
    }  # fmt: skip
    assert all(fuzz.attempt(READERS[name], whole, tmp_path) for whole in wholes[name])


# What would fill the memory or never end; each is a few kilobytes.


def packed_npz() -> bytes:
    """An archive that says of 1 MB that it is 2 GB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(1_000_000))
        archive.writestr("y.npy", b"")
    at = out.getvalue().index(b"PK\1\2")
    content = bytearray(out.getvalue())
    content[at + 24 : at + 28] = struct.pack("<I", 2**31)
    return bytes(content)


def long_tiff() -> bytes:
    """A TIFF of 2,000 tags, each of which says that 4 MB in the file are its own."""
    size = 4_000_000
    tags = b"".join(struct.pack("<HHII", 40_000 + n, 7, size, 8) for n in range(2000))
    return b"II*\0" + struct.pack("<I", size + 8) + bytes(size) + struct.pack("<H", 2000) + tags + bytes(4)


def tiled_tiff() -> bytes:
    """A TIFF of 16 x 16 pixels in tiles of 2 GB."""
    tags = [
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
        (322, 4, 1, 40_000), (323, 4, 1, 50_000), (324, 4, 1, 8), (325, 4, 1, 8),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 16)
        + b"x\x9c"
        + bytes(6)
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def many_scans() -> bytes:
    """A progressive JPEG with ten thousand scans."""
    out = io.BytesIO()
    Image.new("L", (4000, 4000)).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * 10_000 + whole[-2:]


def nested_key() -> bytes:
    """A table whose key is tuples within tuples, 2**60 in all: Python takes for ever over its hash."""
    return b"\x80\2}K\1" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60)) + b"K\1s."


def large_memo() -> bytes:
    """A pickle that asks for place 2**30 of the memo, for which Python's reader makes room up to there."""
    return b"\x80\2K\1r" + struct.pack("<I", 2**30) + b"."


def old_pth() -> bytes:
    """A file of the older form whose one storage says that it has 2**40 numbers."""
    storage = b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\n"
    storage += (
        b"X\1\0\0\0kX\3\0\0\0cpu\x8a\6"
        + (2**40).to_bytes(6, "little")
        + b"NtQK\0K\1\x85K\1\x85\x89Nt"
        + b"Rs."
    )
    head = b"".join(
        pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    return head + storage + pickle.dumps(["k"], protocol=2) + struct.pack("<q", 2**40)


def deep_json() -> bytes:
    return b"[" * 1_000_000


BOMBS: list[tuple[str, str, Callable[[], bytes]]] = [
    ("image", "x.png", lambda: fuzz.png(20_000, 20_000)),
    ("image", "tags.tif", long_tiff),
    ("image", "tiles.tif", tiled_tiff),
    ("image", "scans.jpg", many_scans),
    ("npz", "x.npz", packed_npz),
    ("pth", "packed.pth", lambda: fuzz.zipped(b"\x80\2}.", {"0": bytes(1000)}, packing=zipfile.ZIP_DEFLATED)),
    ("pth", "bytearray.pth", lambda: fuzz.zipped(b"\x80\2cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", {})),
    ("pth", "key.pth", lambda: fuzz.zipped(nested_key(), {})),
    ("pth", "memo.pth", large_memo),
    ("pth", "old.pth", old_pth),
    ("safetensors", "x.safetensors", lambda: struct.pack("<Q", 2**40) + b"{}"),
    ("cifar", "key", nested_key),
    ("cifar", "memo", large_memo),
    ("card", "model.json", deep_json),
    ("plan", "plan.json", deep_json),
    ("recipe", "recipe.toml", lambda: b"a = " + b"[" * 100_000),
]
# The place of a file taken by what is none: it would wait for ever, or never end.
READ_BY_PATH = ["image", "npz", "pth", "safetensors", "card", "plan", "recipe"]

CHILD = """
import json, os, resource, socket, sys, time
from pathlib import Path
import fuzz
from lehr.errors import LehrError

readers, folder = fuzz.readers(), Path(sys.argv[1])
for name in ("pth", "image", "npz"):  # what is loaded at the first use is loaded
    fuzz.attempt(readers[name], b"", folder)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), now + (1 << 30)))
for name, path in json.load(sys.stdin):
    began = time.perf_counter()
    content = Path(path).read_bytes() if Path(path).is_file() and Path(path).stat().st_size < 1 << 30 else b""
    try:
        readers[name].read(Path(path), content)
        said = "read"
    except LehrError as error:
        said = "refused"
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([name, Path(path).name, said, took, peak]), flush=True)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="limits a process by its address space, and asks /proc for it"
)
def test_no_file_fills_the_memory_or_takes_for_ever(tmp_path: Path) -> None:
    """In a process that may take 1 GB more, every bomb, pipe, endless device and sparse file of a terabyte is
    refused within seconds."""
    tasks = []
    for number, (name, file, make) in enumerate(BOMBS):
        path = tmp_path / str(number) / file
        path.parent.mkdir()
        path.write_bytes(make())
        tasks.append((name, str(path)))
    for name in READ_BY_PATH:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sub").mkdir()
        sparse, fifo, zero = (folder / kind / READERS[name].file for kind in ("sparse", "fifo", "zero"))
        for path in (sparse, fifo, zero):
            path.parent.mkdir()
            tasks.append((name, str(path)))
        os.mkfifo(fifo)
        zero.symlink_to("/dev/zero")
        with sparse.open("wb") as file:
            file.truncate(1 << 40)
    work = tmp_path / "work"
    work.mkdir()
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(work)], input=json.dumps(tasks), text=True, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(tasks), done.stderr[-3000:]
    assert [line[:3] for line in said if line[2] != "refused"] == []
    assert [line[:4] for line in said if line[3] > 10] == []


class Runs:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("form", ["zip", "old", "npz", "in a wrapper", "tar"])
def test_no_weights_and_no_arrays_run_code(form: str, tmp_path: Path) -> None:
    """A pickle that calls a function is refused in every container, and the function is not called."""
    witness, path = tmp_path / "ran", tmp_path / ("w.npz" if form == "npz" else "w.pth")
    evil = Runs(witness)
    if form == "npz":
        np.savez(path, x=np.array([evil], dtype=object), y=np.array([0]))
    elif form == "tar":
        path.write_bytes(b"pickle".ljust(512, b"\0") + pickle.dumps(evil))
    else:
        whole = {"state_dict": {"a": torch.zeros(1)}, "config": evil} if form == "in a wrapper" else evil
        torch.save(whole, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(LehrError, match=r"w\.(npz|pth)"):
        load_npz(path) if form == "npz" else read_weights(path)
    assert not witness.exists()


def test_a_pickle_of_weights_is_refused_by_the_name_it_calls_for(tmp_path: Path) -> None:
    """What a file of weights must not hold is named, and what to save instead is said."""
    torch.save({"a": torch.zeros(1), "f": Runs(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"calls for posix.mkdir.*save the weights alone"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves_comes_back_to_the_bit(old: bool, tmp_path: Path) -> None:
    """Every type of number, views of one storage, empty, scalar and transposed tensors are read as torch reads
    them."""
    shared = torch.arange(12.0)
    state = {
        "view": shared.view(3, 4), "turned": shared.view(3, 4).t(), "part": shared[5:7], "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.randn(2)),
        **{str(kind): torch.arange(3).to(kind) for kind in (
            torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64
        )},
    }  # fmt: skip
    if not old:
        state["u16"] = torch.arange(3).to(torch.uint16)
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    found = read_weights(tmp_path / "w.pth")
    assert set(found) == set(state)
    assert all(found[name].dtype == tensor.dtype for name, tensor in state.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_an_optimizer_beside_the_weights_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """A whole checkpoint of a training loop gives its weights: optimizer, scheduler and random state are passed
    over."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4])
    whole = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(), "shape": torch.Size([2]), "device": torch.device("cpu"), "dtype": torch.float32,
    }  # fmt: skip
    torch.save(whole, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == {"weight", "bias"}


def test_numbers_that_are_not_in_the_file_are_not_read(tmp_path: Path) -> None:
    """A storage or a tensor that says it is larger than its bytes is damage, never a look at other memory."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    (tmp_path / "short.pth").write_bytes(fuzz.zipped(pickled, {"0": bytes(4)}))
    with pytest.raises(WeightsError, match="not 4000 bytes"):
        read_weights(tmp_path / "short.pth")
    (tmp_path / "far.pth").write_bytes(
        fuzz.zipped(pickled.replace(b"M\xe8\x03\x85", b"M\xe9\x03\x85"), {"0": bytes(4000)})
    )
    with pytest.raises(WeightsError, match=r"\(1001,\) in a storage of 1000"):
        read_weights(tmp_path / "far.pth")


@given(st.text())
def test_printable_text_has_nothing_for_a_terminal_to_act_on(text: str) -> None:
    """Any text made printable is printable, and one that was is unchanged."""
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    """Folders, pipes and devices, files beyond the bound and impossible names are refused before they are read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for path in (tmp_path, tmp_path / "pipe", "/dev/null", tmp_path / "none", "a\0b"):
        with pytest.raises(OSError, match=r"."):
            open_file(path)
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "large", most=10)
    assert len(read_bytes(tmp_path / "large", most=11)) == 11


# What a terminal shows


def safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("key", ["\\u001b[2J", "\\u202e", "a\\nb", "\\u009b2J"])
def test_a_recipe_is_refused_in_printable_words(key: str, tmp_path: Path) -> None:
    """A path, a key and a value with what a terminal acts on are shown escaped where a recipe is refused."""
    path = tmp_path / f"{EVIL}.toml"
    stage = f'[[stages]]\nlength = "1 epoch"\ntrain = "all"\nlr = {{ "{key}" = -1 }}\n'
    for line in (
        f'"{key}" = 1\n',
        f'ema = "{key}"\n',
        f'schedule = "{key}"\n',
        f'optimizer = {{ "{key}" = 1 }}\n',
    ):
        path.write_text(line + stage)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert safe(str(caught.value))
        assert len(str(caught.value).split("\n")) == 2  # one line for each of the two mistakes


def test_the_command_line_escapes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line of a command has nothing raw in it, wherever its words come from."""
    path = tmp_path / f"{EVIL}.toml"
    path.write_text(
        'monitor = "\\u001b[2J\\u202e"\n[[stages]]\nlength = "1 epoch"\ntrain = "all"\nlr = 1e-3\n'
    )
    for arguments in (["plan", "digits", "--recipe", str(path)], ["plan", EVIL], ["plan", f"--{EVIL}"]):
        with pytest.raises(SystemExit):
            main(arguments)
        shown = capsys.readouterr()
        assert safe(shown.out)
        assert safe(shown.err)
        assert shown.err.strip()


def test_class_folders_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders and files with what a terminal acts on in their names are shown escaped, also where they are bad."""
    for name in (EVIL, "\u202e", "plain"):
        folder = tmp_path / EVIL / name
        folder.mkdir(parents=True)
        (folder / f"{EVIL}.png").write_bytes(b"\x89PNG\r\n\x1a\nnone")
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / EVIL)])
    shown = capsys.readouterr()
    assert safe(shown.out)
    assert safe(shown.err)
    assert "evil" in shown.err


def test_a_plan_with_odd_names_prints_safely() -> None:
    """Names of models, parameters and patterns are escaped where a plan is printed."""
    plan = Plan.from_dict({**fuzz.plan_of(None).to_dict(), "model": EVIL, "notes": [EVIL], "augment": [EVIL]})
    assert safe(str(plan))


def test_errors_name_odd_paths_safely(tmp_path: Path) -> None:
    """The path in an error is escaped, whatever reads it."""
    path = tmp_path / EVIL
    path.write_bytes(b"\x80")
    tries: list[tuple[Callable[[Path], object], type[LehrError]]] = [
        (load_recipe, RecipeError), (Plan.load, RecipeError), (read_weights, WeightsError), (load_npz, DataError),
        (read_image, DataError),
    ]  # fmt: skip
    for read, kind in tries:
        for place in (path, tmp_path / f"none{EVIL}"):
            with pytest.raises(kind) as caught:
                read(place)
            assert str(caught.value).isprintable()
