"""A sequence that need not fit into memory: the first items are kept, the others lie on disk until asked for.

The file has no name, so nothing is left of it however the process ends. It lies where Python puts temporary
files: set TMPDIR to a folder with room where that is a small disk, or memory.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar, overload

import numpy as np

from minirlhf.data.records import Example, PairExample
from minirlhf.runs import InputError

T = TypeVar("T")
_WRITTEN_AT_ONCE = 1 << 20


class Codec(NamedTuple, Generic[T]):
    """How an item is written to disk and read back: `unpack(pack(item)) == item`."""

    pack: Callable[[T], bytes]
    unpack: Callable[[bytes], T]


class LazySequence(Sequence[T]):
    """A sequence whose items are made when they are asked for.

    >>> squares = LazySequence(4, lambda i: i * i)
    >>> list(squares), squares[-1], list(squares[1:3])
    ([0, 1, 4, 9], 9, [1, 4])
    """

    def __init__(self, length: int, item: Callable[[int], T]) -> None:
        self._range, self._item = range(length), item

    def __len__(self) -> int:
        """How many items there are."""
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "LazySequence[T]": ...
    def __getitem__(self, index: int | slice) -> "T | LazySequence[T]":
        """The item at an index; of a slice, a lazy sequence again."""
        if isinstance(index, slice):
            chosen = self._range[index]
            return LazySequence(len(chosen), lambda i: self._item(chosen[i]))
        return self._item(self._range[index])


class Spool(Generic[T]):
    """Takes items one by one; gives them back in any order.

    Args:
        codec: how an item is written.
        keep: how many stay in memory as they are; the others go to disk.
    """

    def __init__(self, codec: Codec[T], *, keep: int) -> None:
        self._codec, self._keep = codec, keep
        self._kept: list[T] = []
        self._ends = array("q", [0])  # of each item on disk, in bytes
        self._waiting = bytearray()  # what the file still lacks
        self._file = None

    def __len__(self) -> int:
        """How many items there are."""
        return len(self._kept) + self.on_disk

    @property
    def on_disk(self) -> int:
        """How many of them lie on disk."""
        return len(self._ends) - 1

    @property
    def bytes_on_disk(self) -> int:
        """The room that they take there."""
        return self._ends[-1]

    def append(self, item: T) -> None:
        """Takes an item.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        if len(self._kept) < self._keep:
            self._kept.append(item)
            return
        packed = self._codec.pack(item)
        self._waiting += packed
        self._ends.append(self._ends[-1] + len(packed))
        if len(self._waiting) >= _WRITTEN_AT_ONCE:
            self._write()

    def item(self, index: int) -> T:
        """The item that was taken as number `index`, counted from 0."""
        if index < len(self._kept):
            return self._kept[index]
        self._write()
        assert self._file is not None
        start, end = self._ends[index - len(self._kept)], self._ends[index - len(self._kept) + 1]
        return self._codec.unpack(os.pread(self._file.fileno(), end - start, start))

    def select(self, index: np.ndarray) -> Sequence[T]:
        """The items at the indices [K], in that order; a list where all are in memory."""
        if not self.on_disk:
            return [self._kept[i] for i in index.tolist()]
        return LazySequence(len(index), lambda i: self.item(int(index[i])))

    def _write(self) -> None:
        folder = tempfile.gettempdir()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, prefix="minirlhf-")
                weakref.finalize(self, self._file.close)
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            raise InputError(
                f"{folder}: cannot hold the data set's tokens beyond {len(self._kept)} rows "
                f"({error.strerror or error}); set TMPDIR to a folder with more room"
            ) from None


def _pack_example(example: Example) -> bytes:
    head = np.array([len(example.ids), example.prompt_length], np.int32)
    return head.tobytes() + np.array(example.ids, np.int32).tobytes() + np.array(example.mask, bool).tobytes()


def _unpack_example(packed: bytes, start: int = 0) -> tuple[Example, int]:
    """The example that begins at a byte, and the byte at which it ends."""
    length, prompt_length = np.frombuffer(packed, np.int32, 2, start).tolist()
    ids = np.frombuffer(packed, np.int32, length, start + 8).tolist()
    mask = np.frombuffer(packed, bool, length, start + 8 + 4 * length).tolist()
    return Example(ids, mask, prompt_length), start + 8 + 5 * length


def _unpack_pair(packed: bytes) -> PairExample:
    chosen, end = _unpack_example(packed)
    return PairExample(chosen, _unpack_example(packed, end)[0])


EXAMPLES = Codec(_pack_example, lambda packed: _unpack_example(packed)[0])
PAIRS = Codec(lambda pair: _pack_example(pair.chosen) + _pack_example(pair.rejected), _unpack_pair)
