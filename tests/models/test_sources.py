"""What a user may name for a model: each way leads to a directory, or to an error that says how to go on."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from minirlhf.models import sources
from minirlhf.models.sources import resolve_model
from minirlhf.runs import InputError
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.workspace import load_policy
from tests.models.gguf_files import a_file

COMMIT, OLDER = "1" * 40, "2" * 40
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine that is told to stay offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*arguments: object, **named: object) -> str:
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)


def put(
    hub: Path, name: str, *, commit: str = COMMIT, ref: str = "main", files: tuple[str, ...] = FILES
) -> Path:
    """A model in the cache, laid out as huggingface_hub does: refs, and a folder for each commit."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str]) -> list[Any]:
    """Puts a function in the place of the library's; what it was called with."""
    calls: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def failing(error: Exception) -> Callable[[], str]:
    def answer() -> str:
        raise error

    return answer


def http_error(kind: type[Exception]) -> Exception:
    """An error of the library's, as its server would cause it."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("told by the hub", response=response)  # pyright: ignore[reportCallIssue]


@pytest.mark.usefixtures("never_asked")
def test_a_directory_is_itself_also_when_the_hub_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(tmp_path / "org") == tmp_path / "org"
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model("~/org") == tmp_path / "org"


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize(
    "text",
    [
        "./name",
        "../org/name",
        "/org/name",
        "~/name",
        "a/b/c",
        "runs/stf",
        "x.gguf",
        "a/x.gguf",
        "a b",
        "../runz/sft",
    ],
)
def test_a_mistyped_path_is_not_sent_to_the_hub(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such model (directory|file)$"):
        resolve_model(text)


@pytest.mark.usefixtures("never_asked")
def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(InputError, match=r"model.bin: expected a model directory, a .gguf file or a name"):
        resolve_model(tmp_path / "model.bin")


def test_a_gguf_file_is_converted_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    file = a_file(tmp_path / "a.gguf")
    first = resolve_model(file)
    assert first.is_relative_to(tmp_path / "cache") and set(FILES) <= {path.name for path in first.iterdir()}
    assert f"converted {file} into {first}" in capsys.readouterr().err

    monkeypatch.setattr(sources, "convert_gguf", None)
    assert resolve_model(str(file)) == first and capsys.readouterr().err == ""
    (tmp_path / "moved").mkdir()
    assert resolve_model(file.rename(tmp_path / "moved" / "a.gguf")) == first  # by contents, not by place
    monkeypatch.undo()

    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    second = resolve_model(a_file(tmp_path / "a.gguf", {"llama.context_length": 32}))
    assert second != first and first.is_dir()


def test_a_gguf_file_that_cannot_be_read_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    a_file(tmp_path / "a.gguf", {"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(InputError, match="minirlhf import .*a.gguf --tokenizer FILE --out DIR"):
        resolve_model(tmp_path / "a.gguf")
    assert not (tmp_path / "cache").exists()


def test_offline_a_name_comes_from_the_cache(offline: Path) -> None:
    newest = put(offline, "org/name")
    older = put(offline, "org/name", commit=OLDER, ref="v1.0")
    plain = put(offline, "gpt2")
    assert resolve_model("org/name") == newest
    assert resolve_model(Path("org/name")) == newest
    assert resolve_model("org/name@v1.0") == older
    assert resolve_model(f"org/name@{OLDER}") == older
    assert resolve_model("gpt2") == plain


@pytest.mark.parametrize("name", ["org/name", "gpt2", "org/name@v2"])
def test_offline_and_not_in_the_cache_the_error_says_how_to_proceed(name: str, offline: Path) -> None:
    put(offline, "org/other")
    with pytest.raises(InputError) as raised:
        resolve_model(name)
    bare, _, revision = name.partition("@")
    wanted = f"hf download {bare}{' --revision ' + revision if revision else ''} --local-dir DIR"
    text = str(raised.value)
    assert text.startswith(f"{name}: no such model directory, and not in the cache ({offline})")
    assert "HF_HUB_OFFLINE is set" in text and wanted in text and "\n" not in text


def test_without_a_network_the_cache_is_used_and_else_the_error_says_so(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    folder = put(offline, "org/name")
    assert resolve_model("org/name") == folder
    with pytest.raises(
        InputError, match=r"org/more: no such model directory.*the hub cannot be reached; where"
    ):
        resolve_model("org/more")


def test_a_snapshot_with_only_pickles_says_what_to_do(offline: Path) -> None:
    put(offline, "org/old", files=("config.json", "pytorch_model.bin"))
    with pytest.raises(InputError, match=r"org/old: has no model.safetensors .*pickles can run code"):
        resolve_model("org/old")


def test_only_what_is_read_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "hub", "org/name")
    calls = answering(monkeypatch, lambda: str(folder))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name@main") == folder
    [(name, options)] = calls
    assert (name, options["revision"]) == ("org/name", "main")
    wanted, unwanted = (
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"],
        [
            "pytorch_model.bin",
            "consolidated.safetensors",
            "onnx/model.safetensors",
            "README.md",
            "tf_model.h5",
        ],
    )
    patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
    kept = list(huggingface_hub.utils.filter_repo_objects(wanted + unwanted, **patterns))
    assert kept == wanted


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError), r"gated: accept its terms at https://huggingface.co/org/name"),
        (http_error(errors.RepositoryNotFoundError), r"no model of this name on the hub .*hf auth login"),
        (
            http_error(errors.RevisionNotFoundError),
            r"has no revision v9; see https://huggingface.co/org/name/tree",
        ),
        (
            errors.IncompleteSnapshotError("x", ""),
            r"only a part of it is in the cache .*hf download org/name",
        ),
        (
            http_error(errors.HfHubHTTPError),
            r"did not give it \(HfHubHTTPError: told by the hub\).*hf download",
        ),
        (OSError("disk full"), r"did not give it \(OSError: disk full\)"),
    ],
)
def test_what_the_hub_answers_is_told_in_one_line(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, failing(error))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        resolve_model("org/name@v9")
    assert str(raised.value).startswith("org/name@v9: no such model directory, and")
    assert "\n" not in str(raised.value)


def test_without_the_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"sft: no such model directory; .*pip install 'minirlhf\[data\]'"):
        resolve_model("sft")


def test_stages_take_what_resolves_and_remember_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: Path
) -> None:
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    file, setting = a_file(tmp_path / "a.gguf"), Setting(0, "cpu", ReadingConfig())
    converted = load_policy(file, setting)
    assert converted.path == resolve_model(file)
    folder = put(offline, "org/name", files=())
    for path in converted.path.iterdir():
        (folder / path.name).symlink_to(path)  # as the hub's cache does
    assert load_policy(Path("org/name"), setting).path == folder
