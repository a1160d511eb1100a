"""What the README says is so: paths, commands, flags, tests, line counts, tables and numbers of recipes."""

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minirlhf
from minirlhf import cli, recipes
from minirlhf.commands import COMMANDS
from minirlhf.recipes import RunConfig
from minirlhf.runs import dump_config, load_config
from minirlhf.training.ppo_metrics import METRICS
from tests.test_house import ORDER, PAGES, imported_modules, module_name, room_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OBJECTIVES = (
    "ranking",
    "preference",
    "reference_free",
    "unpaired",
    "policy",
    "policy_variants",
    "importance",
    "value",
    "advantages",
    "group_advantages",
    "divergence",
    "kl_usage",
    "supervised",
    "sampling",
    "best_of_n",
    "masked",
)


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row; an escaped | stays in its cell."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def inline(text: str) -> list[str]:
    """What stands between backticks, outside the fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def names_of_tests(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_tables_of_the_demo_have_their_places_in_order() -> None:
    markers = [
        f"<!-- {slash}{name} -->"
        for name in ("demo table", "three seeds", "surface bias")
        for slash in ("", "/")
    ]
    assert [README.count(marker) for marker in markers] == [1] * 6
    places = [README.index(marker) for marker in markers]
    assert places == sorted(places)
    for name in ("demo table", "three seeds", "surface bias"):
        between = README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()
        assert between.startswith("```text\n") and between.endswith("\n```")


def test_it_opens_with_one_sentence_and_the_two_commands() -> None:
    title, sentence, commands, *_ = README.split("\n\n")
    assert title == "# minirlhf"
    assert sentence.count(". ") == 0 and sentence.endswith(".")
    assert re.findall(r"^make (\w+)", commands, re.MULTILINE) == ["demo", "test"]


def test_every_path_exists() -> None:
    suffixes = (".py", ".md", ".toml", ".txt", "/")
    named = {
        text
        for text in inline(README)
        if text.startswith(("minirlhf/", "tests/", "examples/", ".ci/")) and text.endswith(suffixes)
    }
    assert len(named) > 40
    assert not [path for path in named if not (ROOT / path).exists()]
    assert "../" not in README
    assert all((ROOT / name).exists() for name in ("LICENSE", "CHANGELOG.md", "Makefile"))


def test_every_test_exists() -> None:
    named = re.findall(r"`([\w/]*test_\w+\.py)::(\w+)`", README)
    assert len(named) > 40
    missing = []
    for file, name in named:
        path = ROOT / (file if "/" in file else f"tests/objectives/{file}")
        if not path.exists() or name not in names_of_tests(path):
            missing.append(f"{file}::{name}")
    assert not missing


def test_every_public_objective_stands_in_the_table_with_a_test_and_under_its_module() -> None:
    written: dict[str, set[str]] = {}
    page = ""
    for function, equation, _, test in rows(section("Function, equation, paper, test"))[1:]:
        if function.startswith("**"):
            page = function.strip("*`").removesuffix(".py")
            continue
        assert equation and "::" in test, function
        written.setdefault(page, set()).add(function.strip("`"))
    public = {}
    for name in OBJECTIVES:
        module = importlib.import_module(f"minirlhf.objectives.{name}")
        functions = inspect.getmembers(module, inspect.isfunction)
        public[name] = {f for f, g in functions if g.__module__ == module.__name__ and not f.startswith("_")}
    assert written == public
    pages = {path.stem for path in (ROOT / "minirlhf/objectives").glob("*.py")}
    assert pages == {*OBJECTIVES, "inputs", "__init__"}


def command_lines() -> Iterator[list[str]]:
    """Every `minirlhf …` and `make demo ARGS=…` of the README, as arguments of the command."""
    lines = [line for block in fenced("sh") for line in block.splitlines()]
    lines += [text for text in inline(README) if "…" not in text]
    for line in lines:
        words = shlex.split(line, comments=True) if line.startswith(("minirlhf ", "make demo")) else []
        if words[:2] == ["make", "demo"]:
            given = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
            yield ["run", *(shlex.split(given[0]) if given else [])]
        elif words:
            yield words[1:]


@pytest.mark.parametrize("arguments", list(command_lines()), ids=" ".join)
def test_every_command_is_understood(arguments: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(dump_config(recipes.demo()))
    arguments = [str(config) if word == "runs/demo/config.toml" else word for word in arguments]
    if len(arguments) == 1 and arguments[0] != "run":  # named in a sentence
        assert arguments[0] in COMMANDS
    else:
        assert cli.parse(arguments) is not None


def test_every_command_is_named_and_every_flag_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [name for name in COMMANDS if f"minirlhf {name} " not in README]
    monkeypatch.setenv("COLUMNS", "200")
    for name in COMMANDS:
        cli.parse([name, "--help"])
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--help"}
    named = {text for text in inline(README) if text.startswith("--")}
    assert named and not {text.split()[0] for text in named} - known


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^|`)make (?:[A-Z]+=\S* )*([a-z0-9]+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_the_fenced_config_is_read(tmp_path: Path) -> None:
    (block,) = fenced("toml")
    (tmp_path / "config.toml").write_text(block)
    assert load_config(tmp_path / "config.toml", RunConfig) != RunConfig()


def test_the_recipes_are_those_of_the_code() -> None:
    def value(config: RunConfig, key: str) -> Any:
        stage, name = key.split(".")
        return getattr(getattr(config, stage), name)

    wrong = []
    for setting, *cells, _ in rows(section("Recipes by model size"))[1:]:
        key = setting.strip("`")
        for cell, config in zip(cells, (recipes.demo(), recipes.real(), RunConfig()), strict=True):
            if cell and float(cell) != value(config, key):
                wrong.append(f"{key}: the README says {cell}, the code {value(config, key)}")
    assert not wrong


def test_the_order_of_the_rooms_and_what_each_imports_are_those_of_the_code() -> None:
    text = section("The rooms")
    (picture,) = re.findall(r"^runs → .*$", text, re.MULTILINE)
    assert [*picture.split(" → "), "__main__"] == ORDER
    imports: dict[str, set[str]] = {room: set() for room in ORDER[:-1]}
    for page in PAGES:
        room = room_of(module_name(page))
        if room in imports:
            others = {room_of(module) for module in imported_modules(page)}
            imports[room] |= {other for other in others if other in ORDER and other != room}
    written = {
        room.strip("`").removeprefix("minirlhf/").removesuffix("/").removesuffix(".py"): {
            name for name in cell.split(", ") if name
        }
        for room, _, cell in rows(text)[1:]
    }
    assert written == imports


def test_line_counts_of_the_reading_order_are_within_a_tenth() -> None:
    total, off = 0, []
    pages = rows(section("Reading order"))[1:]
    for page, said, _ in pages[:-1]:
        lines = len((ROOT / page.strip("`")).read_text(encoding="utf-8").splitlines())
        total += lines
        if abs(int(said) - lines) > 0.1 * lines:
            off.append(f"{page}: the README says {said}, it has {lines}")
    assert not off
    assert pages[-1][0] == "together" and abs(int(pages[-1][1].replace(",", "")) - total) <= 0.1 * total


def test_every_metric_of_ppo_is_explained_and_none_that_does_not_exist() -> None:
    named = {name for row in rows(section("Metrics"))[1:] for name in re.findall(r"`([\w/]+)`", row[0])}
    assert named == {*METRICS, "validation/objective"}


def test_the_public_api_is_the_list_in_the_package_and_can_be_imported() -> None:
    (block,) = re.findall(r"```text\n(.*?)```", section("Public API"), re.DOTALL)
    assert tuple(block.split()) == minirlhf.PUBLIC_MODULES
    for name in minirlhf.PUBLIC_MODULES:
        importlib.import_module(name)


def test_the_names_that_it_tells_to_extend_exist() -> None:
    text = section("How to add")
    for file, name in (
        ("minirlhf/training/pair_objectives.py", "PairObjective"),
        ("minirlhf/training/rewards.py", "text_scorer"),
        ("minirlhf/data/formats/rows.py", "Format"),
        ("minirlhf/models/families.py", "FAMILIES"),
        ("minirlhf/models/interface.py", "LanguageModel"),
        ("minirlhf/data/records.py", "RewardFn"),
    ):
        assert f"`{name}`" in text
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name)


def marked(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def test_the_table_of_laws_is_the_one_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--table"]) == 0
    assert marked("law table") == capsys.readouterr().out


def test_the_forgotten_reference_is_found_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next(block for block in fenced("python") if "def dpo_loss(" in block)
    (tmp_path / "my_losses.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main(["verify", "my_losses.py:dpo_loss", "--kind", "dpo"]) == 1
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = [line.rstrip() for line in marked("verify output").strip().splitlines()[1:-1]]
    number = re.compile(r"-?\d+\.\d+")  # how small the counter-example gets depends on the time there is
    assert [number.sub("#", line) for line in shown if "sys.path" not in line] == [
        number.sub("#", line) for line in printed[-len(shown) :] if "sys.path" not in line
    ]
    right = source.replace("policy_rejected_logps\n", "policy_rejected_logps - reference_chosen_logps + "
                           "reference_rejected_logps\n")  # fmt: skip
    (tmp_path / "my_losses.py").write_text(right)
    assert cli.main(["verify", "my_losses.py:dpo_loss", "--kind", "dpo"]) == 0
    assert "CERTIFIED" in capsys.readouterr().out
