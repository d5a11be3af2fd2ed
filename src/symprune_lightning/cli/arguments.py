"""Arguments of LightningCLI: short options, and one sentence for each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import yaml

from symprune_lightning.cli.help import METHOD, OPTIONS, UsageError, suggestion
from symprune_lightning.cli.list import methods
from symprune_lightning.cli.recipes import resolve_recipes

SOURCES = ("--data.dataset", "--data.evaluation")
SOURCE_SETTINGS = (
    "path",
    "name",
    "split",
    "column",
    "joiner",
    "streaming",
    "data_files",
    "revision",
)
"""Attributes of a ``TextSource``."""


def expand(
    arguments: Sequence[str], method: Collection[str], protocols: Mapping[str, str]
) -> list[str]:
    """Return arguments with short options written out.

    Args:
        arguments: The arguments.
        method: Names of the settings of the method.
        protocols: Classes of the protocols of publications by name.

    - ``--sparsity 0.6`` becomes ``--pruning.sparsity 0.6``, as all settings of the method.
    - ``--ignore a --ignore b`` becomes a list, as ``--ignore a --ignore+ b``.
    - ``--data.dataset my.jsonl --data.dataset.column body`` becomes a ``TextSource`` with this path
      and column.

    Examples:
        >>> expand(["--score", "wanda", "--score.alpha=1"], ["score"], {})
        ['--pruning.score', 'wanda', '--pruning.score.alpha=1']
    """
    expanded = list(_split(arguments, method))
    for source in SOURCES:
        if source not in expanded[:-1]:
            continue
        position = expanded.index(source) + 1
        value, settings = expanded[position], [x for x in expanded if x.startswith(f"{source}.")]
        if value.startswith("{"):
            _check_mapping(source, value)
        if value in protocols:
            expanded = _with_settings(expanded, source, protocols[value])
        elif settings and not any(x.startswith(f"{source}.path") for x in settings):
            if re.fullmatch(r"\w+(\.\w+)+|self", value) is None:  # no class
                _check_settings(source, settings)
            path = ["symprune_lightning.TextSource", f"{source}.path", value]
            expanded[position : position + 1] = path
    return expanded


def _check_mapping(option: str, value: str) -> None:
    """Raise ``ValueError`` for a mapping that is cut off: it would be taken for a hub name."""
    try:
        yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} is {value!r}, neither valid JSON nor YAML: {reason}") from error


def _check_settings(source: str, settings: Iterable[str]) -> None:
    """Raise ``UsageError`` for a setting that a ``TextSource`` does not have."""
    known = [f"{source}.{name}" for name in SOURCE_SETTINGS]
    for setting in settings:
        name = setting.partition("=")[0].rstrip("+").replace(".init_args.", ".")
        if name not in known:
            raise UsageError(_unknown(name, known))


def _with_settings(arguments: Sequence[str], source: str, name: str) -> list[str]:
    """Return arguments with a class and its settings as one value.

    jsonargparse would try the settings on the first class of the union.
    """
    settings: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith(f"{source}."):
            key, equals, value = argument.removeprefix(f"{source}.").partition("=")
            settings[key] = value if equals else next(remaining, "")
        else:
            rest.append(argument)
    rest[rest.index(source) + 1] = json.dumps({"class_path": name, "init_args": settings})
    return rest


def _split(arguments: Sequence[str], method: Collection[str]) -> Iterator[str]:
    """Yield arguments with method settings written out, and ``--data.dataset=x`` as two."""
    repeated: set[str] = set()
    for argument in arguments:
        match = re.match(r"--(\w+)(?=[.+=]|$)", argument)
        name, equals, value = argument.partition("=")
        if name.rstrip("+") in ("--ignore", "--only"):
            name = name.rstrip("+")
            plus = "+" * (name in repeated or argument.startswith(f"{name}+"))
            repeated.add(name)
            yield f"--pruning.{name.removeprefix('--')}{plus}{equals}{value}"
        elif match is not None and match[1] in method:
            yield f"--pruning.{argument.removeprefix('--')}"
        elif equals and name in SOURCES:
            yield from (name, value)
        else:
            yield argument


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse recipes and first components of options that are unknown, before torch is imported.

    Raises:
        UsageError: There is no such option.
        ValueError: There is no such file or recipe.

    Examples:
        >>> check_arguments(["--sparsity", "0.5", "--data.sequences=16"])
        >>> try:
        ...     check_arguments(["--sparsty", "0.5"])
        ... except UsageError as error:
        ...     print(error)
        there is no option --sparsty: did you mean --sparsity?
    """
    known = [f"--{name}" for name in (*METHOD, *OPTIONS)]
    for argument, following in pairwise([*arguments, "--"]):
        is_setting = argument.startswith("--") and argument.removeprefix("--") in METHOD
        if is_setting and following.startswith("--"):
            raise UsageError(f"{argument} needs a value")
        match = re.match(r"(--\w+)[^\s=]*(?:=|$)", argument)  # an option; a text may begin like one
        if match is not None and match[1] not in known:
            raise UsageError(_unknown(match[1], known))
    resolve_recipes(arguments)


def usage_message(message: str, options: Iterable[str], method: Collection[str]) -> str:
    """Return one sentence for an error of jsonargparse.

    Args:
        message: Its message, which lists all types of a union with their values.
        options: Option strings of the parser, such as ``"--data.dataset"``.
        method: Names of the settings of the method.
    """
    known = [*options, *(f"--{name}" for name in method), *(f"--pruning.{name}" for name in method)]
    linked = re.match(r"argument (\S+) --> (\S+):", message)
    if linked is not None:
        return f"--{linked[2]} is that of --{linked[1]}, and cannot be set"
    if message.startswith("Unexpected config:"):
        return "the recipe is no mapping: write it as `pruning: {sparsity: 0.6}`, for example"
    unknown = re.match(
        r"unrecognized arguments: (\S+)|Subcommand '\w+' does not accept option '([\w.]+)'", message
    )
    if unknown is not None:
        return _unknown((unknown[1] or f"--{unknown[2]}").partition("=")[0], known)
    if "arguments are required" in message and "pretrained" in message:
        return (
            "model and data are missing: name a recipe, such as --config ria (`symprune list`), "
            "or pass --model.pretrained and --data.dataset"
        )
    return _invalid_value(message, known, method)


def _invalid_value(message: str, known: Sequence[str], method: Collection[str]) -> str:
    """Return one sentence for an error that lists all types of an option."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    option = f"--{key.removeprefix('pruning.')}"  # short for a setting of the method
    innermost = message.rpartition("Parser key")[2]
    refused = re.search(r"Option '([\w.]+)' is not accepted", innermost)
    problem = re.search(r"Problem with given class_path '[\w.]+':\s*([^\n]+)", innermost)
    before_value = innermost.partition("Given value")[0]
    expected = re.findall(r"Expected an? <class '([\w.]+)'>", before_value)
    literals = " ".join(re.findall(r"typing\.Literal\[(.*?)\]", before_value))
    choices = re.findall(r"'([^']+)'", literals)
    value = re.search(r"(?:Given value|Got value): (.*)", innermost)
    named = None if value is None else re.search(r"'class_path': '([\w.]+)'", value[1])
    if refused is not None and key in ("", "pruning"):
        hint = suggestion(refused[1], sorted(method)) or ": see `symprune list` and --help pruning"
        message = f"the method has no setting {refused[1]!r}{hint}"
    elif refused is not None:
        message = _unknown(f"{option}.{refused[1]}", known)
    elif problem is not None:
        message = f"{option}: {problem[1]}"
    elif named is not None and expected:
        classes = [x.name for kind in methods().values() for x in kind]
        hint = suggestion(named[1], classes) or ": see `symprune list`"
        message = f"{option}: there is no class {named[1]}{hint}"
    elif choices and value is not None and key:
        names = ", ".join(dict.fromkeys(choices))
        message = f"{option} is {value[1]!r}; choose one of {names}"
    elif expected and value is not None and key:
        types = " or ".join(dict.fromkeys(expected))
        message = f"{option} is {value[1]!r}, which is no {types}"
    return message


def _unknown(option: str, known: Sequence[str]) -> str:
    return f"there is no option {option}{suggestion(option, list(known)) or '; see --help all'}"
