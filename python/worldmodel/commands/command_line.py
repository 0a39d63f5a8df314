"""Parsing of a command's options; what cannot be parsed is one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from worldmodel.runs.configuration import ConfigurationError
from worldmodel.runs.migration import renamed_option
from worldmodel.runs.optional_dependencies import require

Options = TypeVar("Options")


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    command: str,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Parses options; the dataclass's docstrings are the help, its own if there is no ``description``.

    Raises:
        ConfigurationError: an option of an earlier release.
        SystemExit: with status 0 after --help, with 2 after one line about what is wrong.
    """
    tyro = require("tyro", "read the command line")
    example = _example(kind) if default is None else vars(default)
    _check_names(arguments, command, {name for path in example for name in _names(example[path], f"--{path}")})
    given: dict[str, Any] = {} if default is None else {"default": default}
    given |= {} if description is None else {"description": description}
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.AvoidSubcommands)
    said = io.StringIO()
    helps = {"-h", "--help"} & set(arguments)
    try:
        with contextlib.redirect_stderr(said), contextlib.nullcontext() if helps else _unwrapped():
            return tyro.cli(kind, args=list(arguments), prog=f"python -m worldmodel {command}", config=config, **given)
    except SystemExit as ended:
        if ended.code:
            _refuse(_one_line(said.getvalue(), arguments))
        raise


def _example(kind: Any) -> dict[str, Any]:
    """What has options of its own by field, None for the others."""
    fields = dataclasses.fields(kind)
    return {
        field.name: None if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
    }


def _refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def _names(value: Any, path: str) -> Iterator[str]:
    """The option of a field, and those of the fields in it."""
    yield path.replace("_", "-")
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _names(inner, f"{path}.{name}")


def _check_names(arguments: Sequence[str], command: str, known: set[str]) -> None:
    """The parser itself takes the value of a misspelt option for a positional argument."""
    for argument in arguments:
        given = argument.partition("=")[0]
        if (today := renamed_option(argument, command)) is not None:
            raise ConfigurationError(f"{given} is an option of an earlier release: use {today}")
        name = re.sub(r"(^--|\.)no-(?=[^.]*$)", r"\1", given.replace("_", "-"))
        if re.match("--[A-Za-z]", given) and name not in {*known, "--help"} and not name.startswith("--tyro-"):
            near = difflib.get_close_matches(name, sorted(known), 1)
            _refuse(f"there is no option {given}{f', did you mean {near[0]}?' if near else ';'} --help lists all")


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Makes the parser's boxes as wide as their text."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


_EXPECTED = {"INT": "a whole number", "FLOAT": "a number"}


def _one_line(box: str, arguments: Sequence[str] = ()) -> str:
    r"""The parser's box in one line.

    Example:
        >>> _one_line("╭─ Unrecognized options ───╮\n│ Unrecognized options: -x, 3 │\n│ ──── │")
        "'-x' belongs to no option; --help lists all"
        >>> _one_line("╭─ Value error ───╮\n│ Error parsing --seed: not an int: 'x' │\n│ ──── │\n│ --seed INT │")
        "--seed is 'x', expected a whole number"
    """
    text = " ".join(re.sub("[╭╮╰╯│]", " ", box).split())
    _, fact, *others = re.split(" ?[─-]{3,} ?", text) if re.search("[─-]{3,}", text) else ("", text)
    documented = re.search(r"(--[\w.-]+)(?: (\S+))?", re.sub(r"(run|see) python.*", "", " ".join(others)))
    if unknown := re.match(r"Unrecognized options: ([^\s,]+)", fact):
        return f"{unknown[1]!r} belongs to no option; --help lists all"
    if missing := re.match(r"Missing value for argument '(.*?)'", fact):
        return f"{missing[1]} has no value"
    if missing := re.match(r"Missing from .*?: (\S+) ", fact):
        return f"{missing[1]} is missing: {fact[missing.end() :]}"
    if choice := re.match(r"invalid choice (.*) for argument '(.*?)'\. Expected one of \((.*?),?\)", fact):
        return f"{choice[2]} is {choice[1]}, expected one of {choice[3]}"
    # Of the constructors: "Error parsing replay: ReplayConfig: window is 0, expected ..."
    if checked := re.match(r"Error parsing (?:[A-Z]\w+|([\w.]+)): \w+: (\w+)( .*)", fact):
        option = "--" + ".".join(filter(None, checked.groups()[:2])).replace("_", "-")
        if any(argument.partition("=")[0].replace("_", "-") == option for argument in arguments):
            return option + checked[3]
    fact = re.sub(r"^Error parsing ([A-Z]\w+: )*", "", fact)
    value = re.match(r"(--[\w.-]+): .*?('[^']*')", fact)
    if value and documented and documented[2] and documented[1] == value[1]:
        metavar = documented[2].removeprefix("{None}|")
        return f"{value[1]} is {value[2]}, expected {_EXPECTED.get(metavar, metavar)}"
    return fact
