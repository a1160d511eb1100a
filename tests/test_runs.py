"""What stands in a run directory is whole, reads back equal, and is complained about exactly."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.runs import (
    InputError,
    MetricsWriter,
    RunLayout,
    atomic_directory,
    dump_config,
    load_config,
    manifest,
    read_metrics,
    sha256_of,
    write_json_atomic,
    write_text_atomic,
)

# --- a config of every kind that ours have ------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    beta: float = 0.05
    epochs: int = 4

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")


@dataclass(frozen=True)
class Deep:
    inner: Inner = field(default_factory=Inner)
    label: str = "a"


@dataclass(frozen=True)
class Settings:
    learning_rate: float
    steps: int = 10
    name: str = "demo"
    shuffle: bool = True
    model: Path = Path("base")
    kind: Literal["k1", "k3"] = "k1"
    betas: tuple[float, float] = (0.9, 0.999)
    stops: tuple[int, ...] = ()
    target: float | None = 6.0
    limit: float | int = 1
    inner: Inner = field(default_factory=Inner)
    deep: Deep = field(default_factory=Deep)
    probe: Inner | None = None


def config_at(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(config_at(tmp_path, text), Settings)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "run.toml") in message
    return message


finite = st.floats(allow_nan=False, allow_infinity=True)
texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda s: s != "none")
inners = st.builds(Inner, beta=st.floats(0, 1e300), epochs=st.integers(-(2**63), 2**63 - 1))
all_settings = st.builds(
    Settings,
    learning_rate=finite,
    steps=st.integers(-(2**63), 2**63 - 1),
    name=texts,
    shuffle=st.booleans(),
    model=st.sampled_from([Path("a/b"), Path('with "quotes" and \\'), Path("/ü/x")]),
    kind=st.sampled_from(["k1", "k3"]),
    betas=st.tuples(finite, finite),
    stops=st.lists(st.integers(0, 50_256)).map(tuple),
    target=st.none() | finite,
    limit=st.integers(0, 9) | finite,
    inner=inners,
    deep=st.builds(Deep, inner=inners, label=texts),
    probe=st.none() | inners,
)


@settings(max_examples=150)
@given(config=all_settings)
def test_a_config_reads_back_equal_and_of_the_same_types(config: Settings, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    back = load_config(path, Settings)
    assert back == config
    assert repr(back) == repr(config)  # 1 and 1.0 are equal, and so are 0.0 and -0.0; their texts are not


def test_a_field_left_out_keeps_its_default_and_none_is_written_out(tmp_path: Path) -> None:
    assert load_config(config_at(tmp_path, "learning_rate = 1"), Settings) == Settings(1.0)
    off = replace(Settings(1.0), target=None)
    assert 'target = "none"' in dump_config(off)
    assert load_config(config_at(tmp_path, dump_config(off)), Settings).target is None


def test_an_unknown_key_names_file_key_and_the_nearest_known_key(tmp_path: Path) -> None:
    message = refusal(tmp_path, "learning_rate = 1.0\nstesp = 3\n")
    assert "unknown key stesp" in message and "nearest known key is steps" in message
    message = refusal(tmp_path, "learning_rate = 1.0\n[deep.inner]\nbetta = 0.1\n")
    assert "unknown key deep.inner.betta" in message and "nearest known key is deep.inner.beta" in message
    assert "unknown key innner; the nearest known key is inner" in refusal(tmp_path, "[innner]\nbeta = 1.0")


@pytest.mark.parametrize(
    ("line", "key", "expected", "found"),
    [
        ('steps = "ten"', "steps", "an integer", "'ten'"),
        ("steps = 1.5", "steps", "an integer", "1.5"),
        ("steps = true", "steps", "an integer", "True"),
        ("shuffle = 1", "shuffle", "true or false", "1"),
        ("target = true", "target", 'a number or "none"', "True"),
        ('target = "off"', "target", 'a number or "none"', "'off'"),
        ('kind = "k2"', "kind", "one of 'k1', 'k3'", "'k2'"),
        ("betas = [0.9]", "betas", "a list of a number, a number", "[0.9]"),
        ("betas = 0.9", "betas", "a list of a number, a number", "0.9"),
        ('stops = [1, "2"]', "stops[1]", "an integer", "'2'"),
        ("model = 3", "model", "a path", "3"),
        ("inner = 3", "inner", "a table", "3"),
        ("name = { a = 1 }", "name", "a text", "a table"),
        ('inner.beta = "x"', "inner.beta", "a number", "'x'"),
        ("probe.epochs = 0.5", "probe.epochs", "an integer", "0.5"),
    ],
)
def test_a_wrong_type_names_file_key_expected_and_found(
    tmp_path: Path, line: str, key: str, expected: str, found: str
) -> None:
    message = refusal(tmp_path, f"learning_rate = 1.0\n{line}\n")
    assert message.endswith(f": {key}: expected {expected}, found {found}")


def test_what_the_config_itself_refuses_names_file_and_table(tmp_path: Path) -> None:
    message = refusal(tmp_path, "learning_rate = 1.0\n[deep.inner]\nbeta = -1.0\n")
    assert message.endswith(" in [deep.inner]: beta must not be negative, got -1.0")


def test_a_missing_key_a_missing_file_and_broken_toml_are_input_errors(tmp_path: Path) -> None:
    assert "missing key learning_rate, expected a number" in refusal(tmp_path, "steps = 3")
    assert "not a TOML file" in refusal(tmp_path, "steps = = 3")
    with pytest.raises(InputError, match="absent.toml: cannot be read: No such file"):
        load_config(tmp_path / "absent.toml", Settings)


def test_a_value_without_a_toml_form_is_refused_when_written() -> None:
    with pytest.raises(ValueError, match='"none" stands for None'):
        dump_config(Settings(1.0, name="none"))
    with pytest.raises(ValueError, match="scalars, tuples and dataclasses, got list"):
        dump_config(replace(Settings(1.0), stops=[1]))  # pyright: ignore[reportArgumentType]


# --- files --------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_the_old_directory_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "sft"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(failure), atomic_directory(target) as folder:
        (folder / "half").write_text("half")
        raise failure
    assert names_in(tmp_path) == ["sft"] and names_in(target) == ["old"]


def test_a_failed_block_leaves_no_parents_that_were_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a" / "b" / "sft"):
        raise RuntimeError
    assert names_in(tmp_path) == []


def test_a_good_block_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "new" / "sft"
    for name in ("first", "second"):
        with atomic_directory(target) as folder:
            assert not list(folder.iterdir()) and folder.parent == target.parent
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
    assert names_in(target.parent) == ["sft"] and names_in(target / "sub") == ["second"]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "sft"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def fails_on_the_new_one(source: Path, destination: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError("disk full")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails_on_the_new_one)
    with pytest.raises(OSError, match="disk full"), atomic_directory(target) as folder:
        (folder / "new").write_text("new")
    assert names_in(tmp_path) == ["sft"] and names_in(target) == ["old"]


def test_a_killed_process_leaves_the_old_directory_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "sft"
    target.mkdir()
    (target / "old").write_text("old")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom minirlhf.runs import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert names_in(target) == ["old"]


def test_a_directory_that_must_not_be_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="expected a directory to write, found a file"):
        with atomic_directory(tmp_path / "file"):
            pass
    with pytest.raises(InputError, match="file/sft: cannot be written"):
        with atomic_directory(tmp_path / "file" / "sft"):
            pass
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for path in (Path("."), Path(".."), tmp_path):
        with pytest.raises(InputError, match="would replace the working directory"):
            with atomic_directory(path):
                pass
    assert (tmp_path / "file").read_text() == "x" and names_in(tmp_path) == ["file", "work"]


def test_a_failed_write_leaves_the_old_text_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"ü": [1, 0.1]})
    assert json.loads(path.read_text()) == {"ü": [1, 0.1]}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="a.json: cannot be written: No space left on device"):
            write_text_atomic(path, "new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"x": math.nan})
    assert names_in(tmp_path) == ["a.json"] and json.loads(path.read_text()) == {"ü": [1, 0.1]}


def test_the_layout_is_the_documented_one() -> None:
    layout = RunLayout(Path("r"))
    places = [
        layout.config,
        layout.manifest,
        layout.metrics,
        layout.data,
        layout.evaluation,
        layout.model("ppo"),
    ]
    assert [p.as_posix() for p in places] == [
        "r/config.toml",
        "r/manifest.json",
        "r/metrics.jsonl",
        "r/data",
        "r/evaluation",
        "r/ppo",
    ]


# --- metrics ------------------------------------------------------------------------------------------------

rows = st.dictionaries(
    texts.filter(lambda s: s not in ("step", "stage")), st.floats() | st.integers(-1000, 1000), max_size=4
)


@settings(max_examples=60)
@given(written=st.lists(st.tuples(st.integers(0, 10**9), texts, rows), max_size=5))
def test_metrics_read_back_as_written(written: list[Any], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    said: list[str] = []
    with MetricsWriter(path, report=said.append) as writer:
        for step, stage, values in written:
            writer.write(step, stage, values)
    back = read_metrics(path, report=said.append)
    wanted = [
        {"step": step, "stage": stage, **{k: float(v) for k, v in values.items()}}
        for step, stage, values in written
    ]
    assert repr(back) == repr(wanted) and not said  # repr: NaN equals NaN
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_is_on_disk_before_the_next_is_written_and_tensors_are_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write(1, "ppo", {"objective/kl": torch.tensor(0.5)})  # pyright: ignore[reportArgumentType]
        assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "stage": "ppo", "objective/kl": 0.5}]
        with pytest.raises(ValueError, match="must not be called step"):
            writer.write(1, "ppo", {"step": 0.5})


def test_a_half_written_last_line_is_reported_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "stage": "sft", "loss": 2.0}\n'
    path.write_text(whole + '{"step": 2, "st')
    assert read_metrics(path) == [{"step": 1, "stage": "sft", "loss": 2.0}]
    said = capsys.readouterr().err
    assert said == f'{path}:2: left out a half-written line: {{"step": 2, "st\n'
    with MetricsWriter(path) as writer:
        writer.write(3, "sft", {"loss": 1.0})
    assert f"{path}:2: removed a half-written line" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert path.read_text().startswith(whole) and not capsys.readouterr().err


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for broken in ('{"step": 2, "st', "[1]"):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
        with pytest.raises(InputError, match="metrics.jsonl:2: expected a JSON object, found"):
            read_metrics(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "absent.jsonl")


# --- manifest -----------------------------------------------------------------------------------------------


def test_the_manifest_says_what_a_run_was_made_from(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(b"abc")
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    made = manifest(Settings(0.1), 7, {"pairs": data}, {"sft": folder}, device="cpu")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["seed"] == 7 and made["device"] == "cpu" and made["threads"] == torch.get_num_threads()
    assert made["config"]["inner"] == {"beta": 0.05, "epochs": 4} and made["config"]["model"] == "base"
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert made["data"]["pairs"] == {"path": str(data), "sha256": known}
    assert made["weights"]["sft"]["sha256"] == sha256_of(folder)
    versions = made["versions"]
    assert versions["torch"] == str(torch.__version__) and versions["python"] == sys.version.split()[0]
    assert set(versions) > {"minirlhf", "numpy", "safetensors", "tokenizers"}
    written = time.strptime(made["written"], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(time.mktime(written) - time.mktime(time.gmtime())) < 60
    assert {"platform", "machine", "device_name"} < set(made)


def test_a_directory_hash_sees_contents_and_names(tmp_path: Path) -> None:
    file = tmp_path / "d" / "x"
    file.parent.mkdir()
    seen = set()
    for name, content in [("x", b"1"), ("x", b"2"), ("y", b"2")]:
        for old in file.parent.iterdir():
            old.unlink()
        (file.parent / name).write_bytes(content)
        seen.add(sha256_of(file.parent))
        assert sha256_of(file.parent) in seen
    assert len(seen) == 3
    with pytest.raises(InputError, match="absent: cannot be read"):
        sha256_of(tmp_path / "absent")
