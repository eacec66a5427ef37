"""Rows that outlive a run: a store in a directory that a person has named, whose rows are taken over only where the
sample's transformed input is the same to the bit, and everything that made them.

The name of the file is the hash of all that decides a row besides the sample: weights and buffers of the prefix, its graph,
types, layouts and versions. So a stale row cannot be found. It must not know how inputs are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import blake2b
from pathlib import Path

import torch

from lehr.errors import RequestError
from lehr.run.cache.store import Column, Store
from lehr.run.lock import locked

_DIGEST = 16  # bytes; two for each row: of the sample's input, and of the row itself
_DIGESTS = Column((2, _DIGEST), torch.uint8, (0, 1), torch.uint8)


def key_of(settings: Mapping[str, object], tensors: Sequence[torch.Tensor]) -> str:
    """The name of the rows that these settings, and a prefix with these weights and buffers, make.

    >>> one = key_of({"after": "layer3"}, [torch.zeros(2)])
    >>> one == key_of({"after": "layer3"}, [torch.zeros(2)]), one == key_of({"after": "layer3"}, [torch.ones(2)])
    (True, False)
    """
    hashed = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=_DIGEST)
    for tensor in tensors:
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(_bytes_of(tensor))
    return hashed.hexdigest()


def digests_of(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A digest for each sample of a batch, of all its inputs: uint8, shape [N, 16]."""
    rows = []
    for number in range(len(inputs[0])):
        hashed = blake2b(digest_size=_DIGEST)
        for tensor in inputs:
            hashed.update(f"{tensor.dtype} {tuple(tensor.shape[1:])}".encode())
            hashed.update(_bytes_of(tensor[number]))
        rows.append(list(hashed.digest()))
    return torch.tensor(rows, dtype=torch.uint8)


class Kept:
    """A `store` of `slots` rows in `folder`, under `key`; it is this process's alone until it is closed.

    Raises:
        RequestError: where another run has it, or the folder cannot be written.
        OSError: where there is no room.
    """

    def __init__(self, folder: str | Path, key: str, columns: Sequence[Column], slots: int) -> None:
        self._held = ExitStack()
        where = Path(folder) / f"{key}-{slots}"
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"cache_dir: {folder} cannot be written ({error.strerror or error})"
            ) from error
        self._held.enter_context(locked(where / "lock"))
        try:
            self.store = Store(columns, slots, place="file", folder=where, name="rows")
            self._digests = Store([_DIGESTS], slots, place="file", folder=where, name="digests")
        except BaseException:
            self._held.close()
            raise
        self._digests.trust(torch.arange(slots))

    def take(self, slots: torch.Tensor, inputs: torch.Tensor) -> bool:
        """Whether all these slots hold rows of exactly these inputs (`digests_of`), whole; they are filled then."""
        if not bool((slots < self.store.slots).all()):
            return False
        known = self._digests.get(slots)[0]
        if not torch.equal(known[:, 0], inputs) or not torch.equal(known[:, 1], self._of_rows(slots)):
            return False
        self.store.trust(slots)
        return True

    def keep(self, slots: torch.Tensor, inputs: torch.Tensor) -> None:
        """Write down of which inputs the rows in these slots are."""
        kept = slots < self.store.slots
        both = torch.stack([inputs[kept], self._of_rows(slots[kept])], dim=1)
        self._digests.put(slots[kept], [both])

    def close(self) -> None:
        """Let another process have it."""
        with suppress(OSError):
            self._held.close()

    def _of_rows(self, slots: torch.Tensor) -> torch.Tensor:
        found = [list(blake2b(self.store.row(slot), digest_size=_DIGEST).digest()) for slot in slots.tolist()]
        return torch.tensor(found, dtype=torch.uint8).reshape(-1, _DIGEST)


def _bytes_of(tensor: torch.Tensor) -> memoryview | bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
