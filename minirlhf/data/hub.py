"""Data sets as the `datasets` library knows them: on the hub, in its caches, in folders -> a stream of rows.

On the hub a data set is read as a stream, at the revision that its main branch has now; code that comes with
a data set is never run. Where the hub cannot be reached, what an earlier download left is read: the library's
own cache, or the files that `hf download` keeps.
"""

import datetime
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minirlhf.data.jsonl import Line
from minirlhf.runs import InputError

_CACHED_NAMES = ("available configs", "multiple")
"""Words of the library's error where the data set is in its cache, and only the config is in question."""


class Wanted(NamedTuple):
    """What was asked for: a data set (a name on the hub, or a folder), and which part of it."""

    name: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        """As it was written."""
        return ":".join(part for part in self if part is not None)


def parse_wanted(source: str) -> Wanted:
    """NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.

    Raises:
        InputError: there are more parts, or an empty one.

    >>> parse_wanted("org/name:en:train")
    Wanted(name='org/name', config='en', split='train')
    """
    name, *rest = source.split(":")
    if len(rest) > 2 or not all((name, *rest)):
        raise InputError(f"{source}: expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    return Wanted(name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None)


def read_folder(wanted: Wanted) -> Iterator[Line]:
    """Rows of a folder that `datasets` saved (`save_to_disk`), or of data files.

    Raises:
        InputError: it is neither, or has several splits and none is named, or a row is no JSON object.
    """
    yield from _lines(_open_folder(wanted, Path(wanted.name).expanduser()), f"{wanted}")


def read_hub(wanted: Wanted) -> Iterator[Line]:
    """Rows of a data set of the hub; where the hub cannot be reached, of the cache.

    Raises:
        InputError: there is no such data set, it can neither be reached nor is in the cache, it has several
            configs or splits and none is named, the download broke off, or a row is no JSON object.
    """
    rows, origin = _open_hub(wanted)
    download = f"hf download {wanted.name} --repo-type dataset --local-dir FOLDER"
    yield from _lines(
        rows, f"{wanted} ({origin})", f"; run it again, or run `{download}` first and name FOLDER instead"
    )


def revision(wanted: Wanted) -> str:
    """Which version of a data set of the hub `read_hub` reads: the commit, or the name the cache gives it.

    Raises:
        InputError: as for `read_hub`.
    """
    return _open_hub(wanted)[1]


def to_json(value: Any, *, place: str, column: str) -> Any:
    """A value of an Arrow table as JSON has it: dates as ISO 8601 text, nested values likewise.

    Raises:
        InputError: JSON has no such value (bytes, NaN, a duration); names place and column.

    >>> to_json({"at": datetime.date(2024, 2, 1), "no": None}, place="a.parquet, row 1", column="b")
    {'at': '2024-02-01', 'no': None}
    """
    if (
        value is None
        or isinstance(value, bool | int | str)
        or isinstance(value, float)
        and math.isfinite(value)
    ):
        return value
    if isinstance(value, list | tuple):
        return [to_json(entry, place=place, column=column) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_json(entry, place=place, column=column) for key, entry in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    found = f"{value}" if isinstance(value, float) else f"a value of type {type(value).__name__}"
    raise InputError(
        f'{place}: expected "{column}" to hold what JSON can (text, numbers, lists), found {found}'
    )


def library(name: str) -> Any:
    """An optional library of the `data` extra.

    Raises:
        InputError: it is not installed; says the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(
            f"reading this needs the library {package}, which is not installed: pip install 'minirlhf[data]'"
        ) from None


def _open_folder(wanted: Wanted, folder: Path) -> Iterable[Mapping[str, Any]]:
    datasets = library("datasets")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder.resolve()), wanted.config, streaming=True)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{wanted}: expected a folder with a data set, found {_short(error)}") from None
    return _choose_split(found, wanted)


def _open_hub(wanted: Wanted) -> tuple[Iterable[Mapping[str, Any]], str]:
    """The rows, and which version of the data set they are of."""
    datasets, hub = library("datasets"), library("huggingface_hub")
    try:
        commit = hub.dataset_info(wanted.name, timeout=10.0).sha
    except hub.errors.RepositoryNotFoundError:
        raise InputError(
            f"{wanted}: no such file, and none of this name on the hub; a private one needs `hf auth login`"
        ) from None
    except Exception as error:  # no network, offline by environment, a proxy that refuses: of many libraries
        return _open_cached(wanted, f"{_short(error)}")
    try:
        found = datasets.load_dataset(wanted.name, wanted.config, revision=commit, streaming=True)
    except Exception as error:
        raise InputError(f"{wanted}: the hub's data set cannot be read: {_short(error)}") from None
    return _choose_split(found, wanted), f"revision {commit}"


def _open_cached(wanted: Wanted, why: str) -> tuple[Iterable[Mapping[str, Any]], str]:
    hub = library("huggingface_hub")
    cache = library("datasets.packaged_modules.cache.cache").Cache
    try:  # Arrow files that load_dataset made of the whole data set
        names = {"repo_id": wanted.name, "dataset_name": wanted.name.rpartition("/")[2]}
        builder = cache(**names, config_name=wanted.config, version="auto", hash="auto")
    except ValueError as error:
        if any(word in str(error).lower() for word in _CACHED_NAMES):
            raise InputError(f"{wanted}: no network, and in the cache: {_short(error)}") from None
    else:
        return _choose_split(builder.as_streaming_dataset(), wanted), f"cached {builder.hash}"
    try:  # files as they are on the hub; whether all of them only the hub could say
        folder = hub.snapshot_download(wanted.name, repo_type="dataset", local_files_only=True)
        return _open_folder(wanted, Path(folder)), f"downloaded revision {Path(folder).name}"
    except FileNotFoundError:
        _refuse_unreachable(wanted, why)


def _refuse_unreachable(wanted: Wanted, why: str) -> NoReturn:
    raise InputError(
        f"{wanted}: no such file here; looked for a data set of the hub of that name, which is not in the "
        f"cache, and the hub cannot be reached ({why}). Where there is network, run `hf download "
        f"{wanted.name} --repo-type dataset --local-dir FOLDER`, copy FOLDER here and name it instead"
    )


def _choose_split(found: Any, wanted: Wanted) -> Iterable[Mapping[str, Any]]:
    if not isinstance(found, Mapping):
        if wanted.split is None:
            return found
        raise InputError(f"{wanted}: expected splits, of which {wanted.split!r} is one, found a single table")
    names = ", ".join(found)
    if wanted.split is None and len(found) > 1:
        example = f"{wanted.name}:{next(iter(found))}"
        raise InputError(f"{wanted}: has several splits ({names}); name one, as in {example}")
    split = wanted.split if wanted.split is not None else next(iter(found), None)
    if split not in found:
        raise InputError(f"{wanted}: expected one of its splits ({names}), got {split!r}")
    return found[split]


def _lines(rows: Iterable[Mapping[str, Any]], source: str, advice: str = "") -> Iterator[Line]:
    iterator, number = iter(rows), 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            break
        except Exception as error:  # a stream fails in as many ways as there are libraries below it
            told = f"reading broke off after row {number} ({_short(error)})"
            raise InputError(f"{source}: {told}{advice}") from None
        number += 1
        yield line_of(row, Path(source), number)
    if number == 0:
        raise InputError(f"{source}: expected rows, found an empty data set")


def line_of(row: Mapping[str, Any], path: Path, number: int) -> Line:
    """A row of a table as a `Line`; raises as `to_json`."""
    place = f"{path}, row {number}"
    values = {column: to_json(value, place=place, column=column) for column, value in row.items()}
    return Line(path, number, values, "row")


def _short(error: BaseException) -> str:
    """The error in one line."""
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told[:300]}{' ...' if len(told) > 300 else ''}"
