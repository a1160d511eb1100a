"""Small modules with tests of different worth, and what the gate says to each; run as a script of its own.

The gate runs pytest, and pytest does not run inside pytest. Prints {scenario: [exit code, what was printed]}.
"""

import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mutation import gate as engine
from mutation.allowed import Allowed
from mutation.mutants import Mutant, mutants_of
from mutation.run import gate

STRONG = "def test_all():\n    assert [smaller(a, 3) for a in (2, 3, 4)] == [True, False, False]\n"
WEAK = "def test_some():\n    assert smaller(2, 3) and not smaller(4, 3)\n"
SMALLER = "def smaller(a: int, b: int) -> bool:\n    return a < b\n"
LOOP = "def spent(n: int) -> int:\n    while n > 0:\n        n -= 1\n    return n\n"
LOOP_TEST = "def test_spent():\n    assert spent(1) == 0 and spent(2) == 0 and spent(-1) == -1\n"
UNSEEN = "def shy(a: int) -> int:\n    if a > 7:\n        return a + 1\n    return a\n"
UNSEEN_TEST = "def test_shy():\n    assert shy(7) == 7\n"
CRASH = "import os\ndef test_crash():\n    if not smaller(2, 3) or smaller(3, 3):\n        os._exit(7)\n"
SOILED = "SEEN = []\ndef test_soiled():\n    SEEN.append(smaller(3, 3))\n    assert not any(SEEN)\n"
DOCTEST = '"""\n>>> smaller(3, 3), smaller(2, 3), smaller(4, 3)\n(False, True, False)\n"""\n'


def tie(mutant: Mutant) -> bool:
    return mutant.operator == "comparison" and "<=" in mutant.after


TIE = Allowed("a tie", "Nobody promised anything on a tie.", tie)
STALE = Allowed("a ghost", "There is none.", lambda mutant: False)


def scenario(
    folder: Path,
    name: str,
    source: str,
    tests: str,
    classes: tuple[Allowed, ...] = (),
    *,
    whole: bool = True,
    change: Callable[[list[Mutant]], list[Mutant]] = list,
) -> tuple[int | str, str]:
    place = folder / name
    place.mkdir()
    module = f"{name}_page"
    (place / f"{module}.py").write_text(source)
    function = source.split("def ")[1].split("(")[0]
    (place / f"test_{name}.py").write_text(f"from {module} import {function}\n{tests}")
    sys.path.insert(0, str(place))
    importlib.import_module(module)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    try:
        code: int | str = gate(
            change(mutants_of(module)), [place], console, classes=classes, whole=whole, workers=2, examples=5
        )
    except RuntimeError as error:
        code = str(error)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def main(folder: Path) -> dict[str, tuple[int | str, str]]:
    engine.PATIENCE = 0.3
    run = lambda *args, **options: scenario(folder, *args, **options)  # noqa: E731
    return {
        "strong": run("strong", SMALLER, STRONG),
        "weak": run("weak", SMALLER, WEAK),
        "allowed": run("allowed", SMALLER, WEAK, (TIE,)),
        "stale": run("stale", SMALLER, STRONG, (STALE,)),
        "part": run("part", SMALLER, STRONG, (STALE,), whole=False),
        "red": run("red", SMALLER, STRONG + "def test_red():\n    assert smaller(3, 2), 'three'\n"),
        "broken": run("broken", SMALLER, "from nowhere import nothing\n"),
        "endless": run("endless", LOOP, LOOP_TEST),
        "unseen": run("unseen", UNSEEN, UNSEEN_TEST),
        "crash": run("crash", SMALLER, CRASH),
        "soiled": run("soiled", SMALLER, SOILED),
        "none": run("none", SMALLER, STRONG, change=lambda mutants: []),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
