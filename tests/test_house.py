"""The rules of the house: rooms import leftwards only, pages stay short, importing changes nothing."""

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minirlhf"
PAGES = sorted(PACKAGE.rglob("*.py"))

# The picture in the README: a room imports only from rooms to its left.
ORDER = [
    "runs",
    "objectives",
    "verify",
    "kernels",
    "models",
    "data",
    "rollout",
    "training",
    "evaluation",
    "recipes",
    "pipeline",
    "commands",
    "cli",
    "__main__",
]
# Beyond the order: what a room "knows nothing of".
STRANGERS = {
    "objectives": {"runs"},
    "verify": {"runs"},
    "data": {"models", "kernels"},
    "commands": {"objectives", "kernels", "rollout"},
    "cli": {"objectives", "kernels", "rollout"},
    "pipeline": {"objectives", "kernels"},
}
MAX_PAGE_LINES = 400
MAX_FUNCTION_LINES = 60


def module_name(page: Path) -> str:
    parts = page.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The first name below the package; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imported_modules(page: Path) -> set[str]:
    """Every module of ours that a page names in an import, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(page.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{page}:{node.lineno} imports relatively; name the room"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "minirlhf" else {node.module or ""}
    return {name for name in found if name.split(".")[0] == "minirlhf"}


def function_sizes(page: Path) -> list[tuple[str, int]]:
    """(place, lines without the docstring) of every function on a page."""
    sizes = []
    for node in ast.walk(ast.parse(page.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            lines -= doc.count("\n") + 1 if doc else 0
            sizes.append((f"{page.relative_to(ROOT)}:{node.lineno} {node.name}", lines))
    return sizes


@pytest.mark.parametrize("page", PAGES, ids=module_name)
def test_every_module_imports(page: Path) -> None:
    if page.name == "__main__.py":
        pytest.skip("running it is its purpose: tests/test_cli.py does")
    assert importlib.import_module(module_name(page)).__doc__ or page.name == "__init__.py"


@pytest.mark.parametrize("page", PAGES, ids=module_name)
def test_a_room_imports_only_from_rooms_to_its_left(page: Path) -> None:
    room = room_of(module_name(page))
    if room is None:
        assert not imported_modules(page), "the package itself imports nothing"
        return
    assert room in ORDER, f"{room} is not in the picture of the rooms"
    for module in sorted(imported_modules(page)):
        other = room_of(module)
        if other is None or other == room or other == "__version__":
            continue
        assert ORDER.index(other) < ORDER.index(room), f"{module_name(page)} imports {module}, to its right"
        assert other not in STRANGERS.get(room, set()), f"{room} knows nothing of {other}"


def test_the_import_rule_sees_imports_inside_functions(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(
        "def f():\n    from minirlhf.training import ppo\n    from minirlhf import cli\n    import os\n"
    )
    assert imported_modules(page) == {"minirlhf.training", "minirlhf.cli"}


@pytest.mark.parametrize("page", PAGES, ids=module_name)
def test_pages_and_functions_stay_readable(page: Path) -> None:
    assert page.read_text().count("\n") <= MAX_PAGE_LINES
    too_long = [(place, lines) for place, lines in function_sizes(page) if lines > MAX_FUNCTION_LINES]
    assert not too_long


def test_nothing_is_left_for_later() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    left = [
        f"{page.relative_to(ROOT)}: {word}"
        for page in [
            *PAGES,
            *sorted((ROOT / "tests").rglob("*.py")),
            *sorted((ROOT / "examples").rglob("*.py")),
        ]
        for word in words
        if word in page.read_text()
    ]
    assert not left


_GLOBAL_STATE = """
import json, random, sys, warnings
import numpy, torch
import hypothesis, rich.progress, safetensors.torch, tokenizers, tyro  # what theirs change is theirs
def state():
    return [
        str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.random.get_rng_state().sum().item(), random.getstate()[1][:8],
        numpy.random.get_state()[1][:8].tolist(),
        len(warnings.filters), torch.cuda.is_initialized(),
    ]
before = json.dumps(state())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps([before, json.dumps(state())]))
"""


def test_importing_every_module_changes_no_global_state_and_prints_nothing(tmp_path: Path) -> None:
    names = [module_name(page) for page in PAGES if page.name != "__main__.py"]
    done = subprocess.run(
        [sys.executable, "-c", _GLOBAL_STATE, *names],
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(done.stdout)
    assert before == after
    assert not list(tmp_path.iterdir()), "importing wrote a file"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = importlib.import_module("minirlhf").__version__
    assert project["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pins = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    missing = {name.split(">=")[0].lower() for name in wanted} - pins
    assert not missing


def test_the_wheel_holds_every_module_the_type_marker_and_the_licence(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"building a wheel needs setuptools >= 77, found {setuptools.__version__}")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        text = (ROOT / name).read_text() if (ROOT / name).exists() else ""
        (source / name).write_text(text)
    for file in [*PAGES, PACKAGE / "py.typed"]:
        copy = source / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=_environment(), capture_output=True, check=True
    )
    (wheel,) = (source / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(page.relative_to(ROOT)) for page in PAGES} | {"minirlhf/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "minirlhf = minirlhf.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
    assert not [name for name in names if name.startswith("tests/")]


def _environment() -> dict[str, str]:
    """A plain environment: nothing of the caller's but the path, the home folder and the thread count."""
    kept = ("PATH", "HOME", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ}
