"""Data sets by name: from the hub as a stream, from its caches without network, and from folders."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minirlhf.data.hub import parse_wanted
from minirlhf.data.source import fingerprint, read_rows
from minirlhf.runs import InputError

datasets: Any = pytest.importorskip("datasets")
huggingface_hub: Any = pytest.importorskip("huggingface_hub")

TRAIN = [{"chosen": f"c{i}", "messages": [{"role": "user", "content": f"m{i}"}]} for i in range(5)]
TEST = [{"chosen": "x", "messages": []}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rows(source: Path | str) -> list[dict[str, Any]]:
    return [line.values for line in read_rows(source)]


def complaint(source: Path | str) -> str:
    with pytest.raises(InputError) as raised:
        list(read_rows(source))
    return str(raised.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`files`: parquet as on the hub; `saved`, `one`: by save_to_disk; `arrow`: a cache of load_dataset."""
    root = tmp_path_factory.mktemp("folders")
    train, test = (datasets.Dataset.from_list(part, features=_features()) for part in (TRAIN, TEST))
    (root / "files/data").mkdir(parents=True)
    train.to_parquet(root / "files/data/train-00000-of-00001.parquet")
    test.to_parquet(root / "files/data/test-00000-of-00001.parquet")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(root / "saved")
    train.save_to_disk(root / "one")
    datasets.load_dataset(str(root / "files"), cache_dir=str(root / "made"))
    (made,) = (root / "made/files/default/0.0.0").glob("*/dataset_info.json")
    cached = root / "arrow/org___name/default/0.0.0" / made.parent.name
    shutil.copytree(made.parent, cached)
    for file in cached.glob("*.arrow"):
        file.rename(file.with_name(file.name.replace("files-", "name-")))
    return root


def _features() -> Any:
    text = datasets.Value("string")
    return datasets.Features({"chosen": text, "messages": [{"role": text, "content": text}]})


@pytest.fixture
def offline(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network; org/name is in the cache of load_dataset, org/downloaded in that of `hf download`."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "dataset_info", unreachable)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folders / "arrow"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/datasets--org--downloaded"
    shutil.copytree(folders / "files", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_datasets_saved_is_read_and_so_are_folders_of_data_files(folders):
    assert rows(folders / "one") == TRAIN
    for name in ("saved", "files"):
        assert rows(f"{folders / name}:train") == TRAIN
        assert rows(f"{folders / name}:test") == TEST
    assert [line.place for line in read_rows(f"{folders / 'one'}")][4] == f"{folders / 'one'}, row 5"


def test_of_several_splits_one_has_to_be_named(folders):
    told = complaint(folders / "saved")
    assert told.endswith(f"has several splits (train, test); name one, as in {folders / 'saved'}:train")
    assert complaint(f"{folders / 'files'}:dev").endswith(
        "expected one of its splits (train, test), got 'dev'"
    )
    assert complaint(f"{folders / 'one'}:train").endswith("'train' is one, found a single table")
    assert "BuilderConfig 'en' not found. Available: ['default']" in complaint(f"{folders / 'files'}:en:test")


def test_a_folder_without_data_is_an_error(tmp_path):
    assert complaint(tmp_path).startswith(
        f"{tmp_path}: expected a folder with a data set, found EmptyDataset"
    )


def test_a_name_has_at_most_a_config_and_a_split():
    assert parse_wanted("org/name") == ("org/name", None, None)
    assert parse_wanted("org/name:test") == ("org/name", None, "test")
    for bad in ("org/name:a:b:c", "org/name:", "org/name::test"):
        with pytest.raises(InputError, match="expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT"):
            parse_wanted(bad)


def test_without_network_the_cache_of_the_library_is_read(offline):
    assert rows("org/name:train") == TRAIN
    assert rows("org/name:default:test") == TEST
    cached = next(read_rows("org/name:test")).place
    assert cached.startswith("org/name:test (cached ") and cached.endswith("), row 1")
    assert fingerprint("org/name:test")["revision"].startswith("cached ")
    assert (
        complaint("org/name") == "org/name: has several splits (train, test); name one, as in org/name:train"
    )
    assert "no network, and in the cache: ValueError: Couldn't find cache for org/name for config 'en'" in (
        complaint("org/name:en:test")
    )


def test_without_network_what_hf_download_left_is_read(offline):
    assert rows("org/downloaded:train") == TRAIN
    assert fingerprint("org/downloaded:test") == {
        "path": "org/downloaded:test",
        "revision": f"downloaded revision {COMMIT}",
    }


def test_without_network_and_cache_the_error_says_how_to_proceed(offline):
    assert complaint("org/nowhere:test") == (
        "org/nowhere:test: no such file here; looked for a data set of the hub of that name, which is not "
        "in the cache, and the hub cannot be reached (ConnectionError: no route to host). Where there is "
        "network, run `hf download org/nowhere --repo-type dataset --local-dir FOLDER`, copy FOLDER here and "
        "name it instead"
    )


class Hub:
    """Stands for the hub: what load_dataset is asked, and the splits that it answers with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **splits: Any) -> None:
        self.asked: list[Any] = []
        self.splits = splits
        monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, **_: SimpleNamespace(sha=COMMIT))
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((args, kwargs))
        return self.splits


def test_the_hub_is_streamed_at_one_revision_and_no_code_of_it_is_run(offline, monkeypatch):
    answered = Hub(monkeypatch, train=TRAIN)
    assert rows("org/other") == TRAIN
    assert rows("org/other:en:train") == TRAIN
    streamed = {"revision": COMMIT, "streaming": True}
    assert answered.asked == [(("org/other", None), streamed), (("org/other", "en"), streamed)]
    assert fingerprint("org/other:train") == {"path": "org/other:train", "revision": f"revision {COMMIT}"}


def test_a_name_that_the_hub_does_not_know_is_no_case_for_the_cache(offline, monkeypatch):
    def unknown(name: str, **_: Any) -> None:
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=_Response())

    monkeypatch.setattr(huggingface_hub, "dataset_info", unknown)
    assert complaint("org/name:test").startswith(
        "org/name:test: no such file, and none of this name on the hub"
    )


class _Response:
    headers: dict[str, str] = {}
    request = None


def test_what_the_library_refuses_is_passed_on_in_one_line(offline, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']")

    Hub(monkeypatch)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    told = complaint("org/other")
    assert told.endswith(
        "cannot be read: ValueError: Config name is missing. Please pick one among: ['en', 'de']"
    )


def test_a_download_that_breaks_off_is_an_error_and_not_a_shorter_data_set(offline, monkeypatch):
    def broken() -> Iterator[dict[str, Any]]:
        yield from TRAIN[:2]
        raise TimeoutError("read timed out")

    Hub(monkeypatch, train=broken())
    told = complaint("org/other")
    assert (
        f"org/other (revision {COMMIT}): reading broke off after row 2 (TimeoutError: read timed out)" in told
    )
    assert "`hf download org/other --repo-type dataset --local-dir FOLDER`" in told


def test_an_empty_data_set_is_an_error(offline, monkeypatch):
    Hub(monkeypatch, train=[])
    assert complaint("org/other").endswith("expected rows, found an empty data set")


def test_json_files_of_a_folder_are_read_through_the_library(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TRAIN))
    assert rows(tmp_path) == TRAIN
