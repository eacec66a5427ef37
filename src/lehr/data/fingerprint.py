"""What any data set can be known by, so that a run that goes on can tell whether it has the same one.

Of lehr's own images and of tensors the content is known; of any other map-style data set a few samples are
taken and looked at. This file must not know what a run is, nor where a fingerprint is kept.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from lehr.data.datasets import ImageSamples, Pure, pure

PROBES = 8  # samples that are looked at where nothing else is known
WHOLE = 256 * 2**20  # bytes of tensors up to which all of them are read, and as many of larger ones
_CHUNK = 4096  # rows that are copied at a time
_MOST_ROWS = 2**16  # of tensors that are not read whole


@dataclass(frozen=True)
class Fingerprint:
    """What a data set was known by: `samples` in number, and digests (32 hexadecimal digits each).

    `kind` says of what: `"listing"`: one digest of all samples' paths, classes and content, and of the
    transform; `"tensors"`: one digest of the tensors, or of evenly spaced rows of very large ones; `"probes"`:
    a digest for each of the samples `probes`; `"none"`: samples that are not the same twice or that nothing is
    known of, so only their number says something.
    """

    samples: int
    kind: Literal["listing", "tensors", "probes", "none"]
    digests: tuple[str, ...] = ()
    probes: tuple[int, ...] = ()


def fingerprint(dataset: Dataset[Any], *, seed: int = 0) -> Fingerprint:
    """What `dataset` can be known by again.

    The global random states are left as they were. A generator that a data set keeps for itself is moved on
    where samples have to be taken: 16 of them, at most.

    Args:
        dataset: a map-style data set; halves of tensors and of lehr's images (`Subset`) are known by their own
            samples.
        seed: what `pure` seeds each sample with, so the run's own.

    Raises:
        DataError: for a data set that is not map-style.

    Example:
        >>> data = TensorDataset(torch.arange(6.0).reshape(3, 2))
        >>> again = TensorDataset(torch.arange(6.0).reshape(3, 2))
        >>> fingerprint(data) == fingerprint(again), fingerprint(data).kind
        (True, 'tensors')
    """
    samples = pure(dataset, seed)
    count = len(samples)
    if isinstance(samples, ImageSamples):
        if all(item.digest for item in samples.items):
            return Fingerprint(count, "listing", (_of_listing(samples),))
        return _of_probes(samples)
    try:
        inner, rows = _rows_of(samples.dataset)
        if type(inner) is TensorDataset:  # a type derived from it may do anything with its tensors
            return Fingerprint(count, "tensors", (_of_tensors(inner.tensors, rows),))
    except Exception:  # sparse, quantized or nested tensors, rows out of range
        return Fingerprint(count, "none")
    return _of_probes(samples)


def difference(was: Fingerprint, now: Fingerprint) -> str:
    """What is different, in a few words; `""` where nothing is known to be.

    >>> difference(Fingerprint(1200, "none"), Fingerprint(1000, "none"))
    '1,000 samples where there were 1,200'
    """
    if was.samples != now.samples:
        return f"{now.samples:,} sample{'s' * (now.samples != 1)} where there were {was.samples:,}"
    if was.kind == "none":
        return ""
    if now.kind == "none":
        return "samples that cannot be taken, or that are no longer the same twice"
    if (was.kind, was.probes, len(was.digests)) != (now.kind, now.probes, len(now.digests)):
        return "another kind of data set"
    if was.kind == "listing":
        return "" if was.digests == now.digests else "other images, classes, order or transform"
    if was.kind == "tensors":
        return "" if was.digests == now.digests else "tensors with other content, type or shape"
    other = [
        index for index, *pair in zip(was.probes, was.digests, now.digests, strict=True) if len({*pair}) > 1
    ]
    if not other:
        return ""
    more = (
        f", and {len(other) - 1} more of the {len(was.probes)} that were looked at" if len(other) > 1 else ""
    )
    return f"sample {other[0]} is not what it was{more}"


def _of_listing(samples: ImageSamples) -> str:
    pipeline = samples.pipeline
    digest = _new_hash()
    _feed(digest, [pipeline.transform.to_json(), sorted(pipeline.augment)])
    # Composed accents: the same folder on another system is the same data.
    for item in samples.items:
        _feed(digest, (unicodedata.normalize("NFC", item.path), item.label, item.digest))
    return digest.hexdigest()


def _rows_of(dataset: Dataset[Any]) -> tuple[Dataset[Any], Sequence[int]]:
    """What is below any `Subset`, and which of its samples are meant, in order."""
    if type(dataset) is not Subset:
        return dataset, range(len(dataset))  # type: ignore[arg-type]  # `pure` has asked for it
    inner, rows = _rows_of(dataset.dataset)
    return inner, [rows[index] for index in dataset.indices]


def _of_tensors(tensors: Sequence[Tensor], rows: Sequence[int]) -> str:
    """Of all rows up to `WHOLE` bytes, else of as many evenly spaced ones as make these, or `_MOST_ROWS`."""
    row_bytes = sum(tensor[:1].numel() * tensor.element_size() for tensor in tensors)
    count = len(rows)
    if row_bytes * count > WHOLE:
        rows = [rows[i] for i in spaced(count, max(1, min(_MOST_ROWS, WHOLE // row_bytes)))]
    digest = _new_hash()
    for tensor in tensors:
        _feed(digest, (str(tensor.dtype), list(tensor.shape[1:]), count))
        for start in range(0, len(rows), _CHUNK):
            chosen = rows[start : start + _CHUNK]
            index = torch.as_tensor(chosen, dtype=torch.int64, device=tensor.device)
            digest.update(_bytes_of(tensor.detach().index_select(0, index)))
    return digest.hexdigest()


def _of_probes(samples: ImageSamples | Pure) -> Fingerprint:
    count = len(samples)
    probes = spaced(count, PROBES)
    try:
        digests = tuple(digest_of(samples.sample(index, view=0)) for index in probes)
        again = tuple(digest_of(samples.sample(index, view=0)) for index in probes)
    except Exception:  # whatever a data set raises: the run itself will say it, with the sample
        return Fingerprint(count, "none")
    return Fingerprint(count, "probes", digests, probes) if digests == again else Fingerprint(count, "none")


def spaced(count: int, most: int) -> tuple[int, ...]:
    """Up to `most` of `count` indices, evenly spaced, the first and the last among them.

    >>> spaced(100, 4), spaced(3, 8)
    ((0, 33, 66, 99), (0, 1, 2))
    """
    if count <= most:
        return tuple(range(count))
    return tuple(i * (count - 1) // max(1, most - 1) for i in range(most))


def digest_of(sample: object) -> str:
    """What a sample can be known by: 32 hexadecimal digits.

    Raises:
        TypeError: for a sample that holds anything without bytes of its own.
    """
    digest = _new_hash()
    _feed(digest, sample)
    return digest.hexdigest()


def _new_hash() -> blake2b:
    return blake2b(digest_size=16)


def _feed(digest: blake2b, value: object) -> None:
    """Feeds a value with its kind and length, so that different values feed differently (a list and a tuple
    of the same are no different values).

    Raises:
        TypeError: for a value of any other kind.
    """
    kind, content, parts = _taken_apart(value)
    digest.update(f"{kind}:{len(content)}:{len(parts)};".encode())
    digest.update(content)
    for part in parts:
        _feed(digest, part)


def _taken_apart(value: object) -> tuple[str, bytes | memoryview, Sequence[object]]:
    """The kind of a value, its own bytes, and the values that it is made of."""
    if isinstance(value, Tensor):
        return "tensor", _bytes_of(value), (str(value.dtype), list(value.shape))
    # Before plain numbers: numpy.float64 is a float too, and spells itself differently from version to version.
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return "array", np.asarray(value).tobytes(), (str(value.dtype), list(value.shape))
    if value is None or isinstance(value, bool | int | float | complex):
        return type(value).__name__, repr(value).encode(), ()
    if isinstance(value, str):
        return "str", value.encode("utf-8", "surrogatepass"), ()
    if isinstance(value, bytes | bytearray):
        return "bytes", bytes(value), ()
    if isinstance(value, Image.Image):
        return "image", value.tobytes(), (value.mode, list(value.size), value.getpalette() or [])
    if isinstance(value, Mapping):
        return "dict", b"", [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return "list", b"", value
    raise TypeError(f"a {type(value).__name__} has no bytes to be known by")


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().cpu()
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().data
