"""The command line: parses, calls one stage, prints.

A mistake of the user's is one line on stderr and exit code 2, and leaves nothing behind; training that failed
or a subject that is defective is exit code 1, an interruption 130.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from minirlhf import __version__
from minirlhf.commands import COMMANDS, Command
from minirlhf.recipes import RunConfig, demo, real
from minirlhf.runs import InputError, keep_freed_memory, load_config
from minirlhf.training.guards import GuardError
from minirlhf.training.update import NonFiniteError
from minirlhf.verify import SubjectError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 training failed or a defect found, 2 a mistake,
    130 interrupted."""
    keep_freed_memory()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = parse(arguments)
        return (command.run() or 0) if command is not None else 0
    except InputError as error:
        return _complain(" ".join(str(error).split("\n")), 2)
    except SubjectError as error:
        return _complain(error, 2)
    except (NonFiniteError, GuardError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt as error:
        return _complain(error if error.args else "interrupted", 130)


def parse(arguments: list[str]) -> Command | None:
    """The command that the arguments ask for; None where they asked for help, which is then printed.

    Raises:
        InputError: anything about them is wrong.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        _print_overview()
        return None
    if name == "--version":
        print(f"minirlhf {__version__}")
        return None
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{_nearest(name, COMMANDS)}; try minirlhf --help")
    return _parse_flags(name, COMMANDS[name], rest)


def _parse_flags(name: str, command: type[Command], arguments: list[str]) -> Command | None:
    default = _defaults(command, _recipe(name, arguments))
    complaint = io.StringIO()  # the parser draws boxes; we want a line
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                command,
                prog=f"minirlhf {name}",
                default=default,
                args=arguments,
                return_unknown_args=True,
            )
    except SystemExit as done:
        if not done.code:
            return None
        raise InputError(f"{_one_line(complaint.getvalue())}; see minirlhf {name} --help") from None
    if unknown:
        hint = _nearest(unknown[0], _flags(default))
        raise InputError(f"unknown flag {unknown[0]}{hint}; see minirlhf {name} --help")
    return parsed


def _recipe(name: str, arguments: list[str]) -> RunConfig:
    """The defaults of the flags: the file after --config; else the demo's, real data's, or a stage's own."""
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config" and (equals or position + 1 < len(arguments)):
            return load_config(Path(value if equals else arguments[position + 1]), RunConfig)
    if name in ("run", "world", "model"):
        on_real_data = any(argument.partition("=")[0] == "--preferences" for argument in arguments)
        return real() if on_real_data and name == "run" else demo()
    return RunConfig()


def _defaults(command: type[Any], recipe: RunConfig) -> Any:
    """A command whose fields hold the recipe's values of the same name; what has no default is required."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(command):
        found = getattr(recipe, entry.name, None)
        section = dataclasses.is_dataclass(found) and entry.default is None  # a flag with a section's name
        if entry.name == "recipe":
            values[entry.name] = recipe
        elif found is not None and not section:
            values[entry.name] = found
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            values[entry.name] = tyro.MISSING
    return command(**values)


def _flags(config: Any, prefix: str = "--") -> list[str]:
    """Every flag of a command, to find the one that a wrong one was meant to be."""
    flags = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if not dataclasses.is_dataclass(value):
            flags.append(prefix + entry.name.replace("_", "-"))
        else:
            flags += _flags(value, "--") + _flags(value, f"--{entry.name.replace('_', '-')}.")
    return flags


def _nearest(word: str, known: Iterable[str]) -> str:
    wrong = word.partition("=")[0]  # known of a stage it may be, and no flag of this command
    close = difflib.get_close_matches(wrong, [each for each in known if each != wrong], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(box: str) -> str:
    """The words of an error box, without the help that it repeats."""
    rows = [re.sub(r"[\u2500-\u257f]+|-{3,}", " ", row).strip() for row in box.splitlines()]
    text = " ".join(row for row in rows if row)
    return re.sub(r"\s+", " ", re.split(r"Argument helptext:|For full helptext", text)[0]).strip()


def _print_overview() -> None:
    console = Console(highlight=False)
    console.print("[bold]minirlhf[/bold]: RLHF, small enough to read, verified by execution\n")
    console.print("usage: minirlhf COMMAND [flags]      minirlhf COMMAND --help\n", markup=False)
    for name, command in COMMANDS.items():
        console.print(f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}", markup=False)


def _complain(error: object, code: int) -> int:
    print(f"minirlhf: {error}", file=sys.stderr)
    return code
