"""Where rows come from: a file, a folder, or a data set of the Hugging Face hub by its name -> a stream.

    rows.jsonl, rows.jsonl.gz       one JSON object per line
    rows.json, rows.json.gz         one array of objects (Alpaca, ShareGPT), or lines
    rows.parquet                    read group by group
    FOLDER, FOLDER:SPLIT            what `datasets` saved, or data files
    ORG/NAME, ORG/NAME:SPLIT, ORG/NAME:CONFIG:SPLIT     on the hub; from the cache where there is no network

What looks like a path is never sent to the hub: it begins with `.`, `/` or `~`, has the suffix of a data
file or more than one separator, or its folder is here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minirlhf.data.hub import library, line_of, parse_wanted, read_folder, read_hub, revision
from minirlhf.data.jsonl import Line, holds_array, read_array, read_lines
from minirlhf.runs import InputError, sha256_of

_SUFFIXES = frozenset(".jsonl .json .gz .parquet .arrow .csv .tsv .txt .zip .zst .bz2 .xz .tar".split())
_ROWS_AT_ONCE = 1024


def read_rows(source: Path | str) -> Iterator[Line]:
    """The rows of a source in its own order, one at a time; each knows its place in the source.

    Args:
        source: see the top of the page.

    Raises:
        InputError: there is no such source, it cannot be read or reached, it has several splits or configs
            and none is named, it is empty, or a row is no object of JSON values.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from _read_file(path)
    elif is_local(source):
        yield from read_folder(parse_wanted(str(source)))
    else:
        yield from read_hub(parse_wanted(str(source)))


def fingerprint(source: Path | str) -> dict[str, str]:
    """What a manifest says of a source: its "path" and the "sha256" of its files, or its "revision".

    Raises:
        InputError: there is no such source.
    """
    path, name = Path(source).expanduser(), {"path": str(source)}
    if path.exists():
        return name | {"sha256": sha256_of(path)}
    wanted = parse_wanted(str(source))
    if is_local(source):
        return name | {"sha256": sha256_of(Path(wanted.name).expanduser())}
    return name | {"revision": revision(wanted)}


def is_local(source: Path | str) -> bool:
    """Whether a source is a file or a folder here; False where it is a name to look up on the hub.

    Raises:
        InputError: it looks like a path, and there is nothing there.
    """
    path, name = Path(source).expanduser(), str(source).partition(":")[0]
    if path.exists() or Path(name).expanduser().is_dir():
        return True
    if name.startswith((".", "/", "~")) or path.suffix.lower() in _SUFFIXES or name.count("/") > 1:
        raise InputError(f"{source}: no such file")
    if name.count("/") == 0:
        raise InputError(f"{source}: no such file, and no name of a data set on the hub, which is ORG/NAME")
    folder = Path(name).parent
    if folder.is_dir():
        raise InputError(
            f"{source}: no such file; as {folder} is a folder here, the hub was not asked for it"
        )
    return False


def _read_file(path: Path) -> Iterator[Line]:
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix != ".gz"]
    if suffixes[-1:] == [".parquet"]:
        yield from _read_parquet(path)
    elif suffixes[-1:] == [".json"] and holds_array(path):
        yield from read_array(path)
    else:
        yield from read_lines(path)


def _read_parquet(path: Path) -> Iterator[Line]:
    parquet: Any = library("pyarrow.parquet")
    damaged = library("pyarrow").ArrowException
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield line_of(row, path, number)
    except (OSError, damaged) as error:
        raise InputError(f"{path}: expected a whole parquet file, found a damaged one ({error})") from None
    if number == 0:
        raise InputError(f"{path}: expected rows, found an empty parquet file")
