"""Recipes: ordered lists of compression steps in TOML.

    [[step]]
    method = "tspar"          # a key of edgewhisper.compress.METHODS
    c1 = 0.5                  # a field of that method's Options, checked by type and range

    [step.training]           # a field that is itself a table
    steps = 200

    max_wer_loss = 5.0        # before the first [[step]]: maximum loss of dev WER, in points

    [[search]]                # a field that `compress --target-...` may change
    field = "step.1.c1"       # step number and field; "step.1.training.steps" within a table
    low = 0.1                 # low and high; log = true draws over orders of magnitude;
    high = 2.0                # or choices = [...] instead

Recipes from untrusted sources are safe to load: reading one runs no code and opens no other file.
The modules of the methods, and torch, are imported when a recipe that uses them is loaded.
"""

import difflib
import importlib
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from edgewhisper.compress import METHODS
from edgewhisper.compress.step_order import refuse_order
from edgewhisper.search import Dimension, Value
from export.problem import Problem

RECIPES = Path(__file__).resolve().parent / "recipes"
MAX_BYTES = 100_000
"""Maximum size of a recipe."""
NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "a text in quotes"}


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a field: `rho: Annotated[float, Range(0, 1)] = 0.1`."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Step:
    """One compression step."""

    method: str
    options: Any
    """An instance of the method module's frozen `Options`."""


@dataclass(frozen=True)
class Knob:
    """A field that a search may change, with its range."""

    field: str
    """Name in the recipe: "step.1.training.steps"."""
    dimension: Dimension

    @property
    def step(self) -> int:
        """Index of the step, from 0."""
        return int(self.field.split(".")[1]) - 1

    @property
    def path(self) -> list[str]:
        """Path of the field in the step's options."""
        return self.field.split(".")[2:]


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read and checked."""

    name: str
    text: str
    """The verbatim file, which is copied into the checkpoint's compression.json."""
    steps: tuple[Step, ...]
    knobs: tuple[Knob, ...] = ()
    max_wer_loss: float = 5.0
    """Maximum loss of dev WER of a step and of the recipe, in points; see edgewhisper/guard.py."""


MaxWerLoss = Annotated[float, Range(0, 100)]


def available() -> list[str]:
    """Return the names of the shipped recipes, which are the files in edgewhisper/recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def summary(name: str) -> str:
    """Return the first comment line of a shipped recipe."""
    return (RECIPES / f"{name}.toml").read_text("utf-8").splitlines()[0].lstrip("# ")


def searchable(name: str) -> list[str]:
    """Return the fields of a shipped recipe that a search may change."""
    tables = tomllib.loads((RECIPES / f"{name}.toml").read_text("utf-8")).get("search", [])
    return [table["field"] for table in tables]


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a shipped recipe by its name, or a recipe from a .toml file.

    Raises Problem if the file is missing or not TOML, for an unknown method or field, and for a
    value of the wrong type or out of range.
    """
    path = find(name_or_path)
    return parse(path.stem, read_text(path))


def find(name_or_path: str | Path) -> Path:
    """Return the path of a recipe. Raises Problem if there is no such recipe."""
    text = str(name_or_path)
    if text in available():
        return RECIPES / f"{text}.toml"
    path = Path(text)
    if path.is_file():
        return path
    raise Problem(
        f"recipe {text}: it is a directory, not a .toml file"
        if path.is_dir()
        else f"recipe {text}: there is no such file and no included recipe of that name"
        + did_you_mean(text, available()),
        hint=f"use one of {', '.join(available())}, or the path of a .toml file",
    )


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Problem(
                f"recipe {path}: the file has {path.stat().st_size} bytes, more than {MAX_BYTES}",
                hint="give the .toml file of a recipe",
            )
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(
            f"recipe {path}: cannot be read as UTF-8 text ({error})",
            hint="give the .toml file of a recipe",
        ) from error


def parse(name: str, text: str) -> Recipe:
    """Parse the text of a recipe. `name` is its name in error messages."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Problem(
            f"recipe {name}: not valid TOML: {error}", hint="correct that line and run again"
        ) from error
    refuse_unknown(table, ["max_wer_loss", "step", "search"], f"recipe {name}")
    limit = table.get("max_wer_loss", Recipe.max_wer_loss)
    limit = read_value(MaxWerLoss, limit, f"recipe {name}, max_wer_loss")
    steps = table.get("step")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise Problem(
            f"recipe {name}: it has no [[step]]",
            hint=f"add a table [[step]] with method = one of {', '.join(map(quoted, METHODS))}",
        )
    read = tuple(read_step(name, i, step) for i, step in enumerate(steps, 1))
    refuse_order(name, read)
    return Recipe(name, text, read, read_knobs(name, table.get("search", []), read), limit)


def read_step(recipe: str, number: int, table: dict[str, Any]) -> Step:
    where = f"recipe {recipe}, step {number}"
    values = dict(table)
    method = values.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        reason = "it has no method" if method is None else f"there is no method {method!r}"
        raise Problem(
            f"{where}: {reason}{did_you_mean(str(method), METHODS)}",
            hint=f"set method to one of {', '.join(map(quoted, METHODS))}",
        )
    options = importlib.import_module(METHODS[method]).Options
    return Step(method, read_options(options, values, f"{where} ({method})"))


def read_options(options: type, values: dict[str, Any], where: str) -> Any:
    """Return an instance of the dataclass `options`. Values are not converted or ignored."""
    hints = get_type_hints(options, include_extras=True)
    refuse_unknown(values, list(hints), where)
    return options(**{k: read_value(hints[k], v, f"{where}, {k}") for k, v in values.items()})


def read_value(hint: Any, value: Any, where: str) -> Any:
    """Check a value against its type and return it.

    `hint` is a dataclass (then `value` is a table), a Literal, a scalar type that may be Annotated
    with a Range, or a tuple of such scalars. Raises Problem if the value does not match.
    """
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    kind = get_args(hint)[0] if ranges else hint
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            table = where.rsplit(", ")[-1]
            raise wrong(where, value, f"is not a table; write [step.{table}]")
        return read_options(kind, value, where)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise wrong(where, value, f"is not one of {', '.join(map(repr, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise wrong(where, value, "is not a list")
        return tuple(read_value(get_args(kind)[0], item, where) for item in value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise wrong(where, value, f"is not {NOUNS[kind]}")
    for limits in ranges:
        if not limits.low <= value <= limits.high:
            raise wrong(where, value, f"is not between {limits.low:g} and {limits.high:g}")
    return kind(value)


# ------------------------------------------------------------------------- what may be searched


def read_knobs(recipe: str, tables: Any, steps: tuple[Step, ...]) -> tuple[Knob, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise Problem(
            f"recipe {recipe}: search is not a list of tables",
            hint='write [[search]] with field = "step.1.FIELD", low and high',
        )
    knobs: list[Knob] = []
    for number, table in enumerate(tables, 1):
        knob = read_knob(f"recipe {recipe}, search {number}", table, steps)
        if knob.field in [other.field for other in knobs]:
            raise Problem(
                f"recipe {recipe}, search {number}: {knob.field} has an earlier [[search]]",
                hint="use every field once",
            )
        knobs.append(knob)
    return tuple(knobs)


def read_knob(where: str, table: dict[str, Any], steps: tuple[Step, ...]) -> Knob:
    refuse_unknown(table, ["field", "low", "high", "log", "choices"], where)
    field = table.get("field")
    hint = field_hint(where, field, steps)
    values = {key: value for key, value in table.items() if key != "field"}
    read = read_choices if "choices" in values else read_bounds
    return Knob(str(field), read(f"{where}, {field}", values, hint))


def field_hint(where: str, field: Any, steps: tuple[Step, ...]) -> Any:
    """Return the type of a field such as "step.1.training.steps"."""
    parts = field.split(".") if isinstance(field, str) else []
    if len(parts) < 3 or parts[0] != "step" or not parts[1].isdecimal():
        raise Problem(
            f"{where}: field is {field!r}, which is not a field of a step",
            hint='write it like "step.1.min_removed": the number of the step, then the field',
        )
    if not 1 <= int(parts[1]) <= len(steps):
        raise Problem(
            f"{where}: there is no step {parts[1]}, the recipe has {len(steps)}",
            hint="steps are numbered from 1",
        )
    kind: Any = type(steps[int(parts[1]) - 1].options)
    for name in parts[2:]:
        if not (isinstance(kind, type) and is_dataclass(kind)):
            raise Problem(f"{where}: {field} is nested too deeply", hint=f"remove {name!r}")
        hints = get_type_hints(kind, include_extras=True)
        refuse_unknown({name: None}, list(hints), f"{where}, {field}")
        kind = hints[name]
    if isinstance(kind, type) and is_dataclass(kind):
        raise Problem(
            f"{where}: {field} is a table, not a value",
            hint=f"name one of its fields: {', '.join(get_type_hints(kind))}",
        )
    return kind


def read_choices(where: str, values: dict[str, Any], hint: Any) -> Dimension:
    others = [key for key in values if key != "choices"]
    choices = values["choices"]
    if others or not isinstance(choices, list) or not choices:
        reason = f"choices and {', '.join(others)} given" if others else f"choices are {choices!r}"
        raise Problem(f"{where}: {reason}", hint="give choices = [...], or low and high")
    return Dimension(choices=tuple(read_value(hint, choice, where) for choice in choices))


def read_bounds(where: str, values: dict[str, Any], hint: Any) -> Dimension:
    scalar = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if scalar not in (int, float):
        raise Problem(f"{where}: the field is not a number", hint="give choices = [...]")
    missing = [bound for bound in ("low", "high") if bound not in values]
    if missing:
        raise Problem(
            f"{where}: {' and '.join(missing)} missing", hint="give low and high, or choices"
        )
    low, high = (read_value(hint, values[bound], f"{where}, {bound}") for bound in ("low", "high"))
    log = read_value(bool, values.get("log", False), f"{where}, log")
    if not -math.inf < low < high < math.inf or (log and low <= 0):
        above = "above 0 and " if log else ""
        raise Problem(
            f"{where}: low is {low:g} and high is {high:g}",
            hint=f"low must be {above}less than high, both finite",
        )
    return Dimension(low, high, log, whole=scalar is int)


def value_at(recipe: Recipe, knob: Knob) -> Value:
    """Return the recipe's own value of a field that may be searched."""
    value: Any = recipe.steps[knob.step].options
    for name in knob.path:
        value = getattr(value, name)
    return value


def with_values(recipe: Recipe, point: dict[str, Any]) -> Recipe:
    """Return the recipe with the values of `point` for some of its fields."""
    steps = list(recipe.steps)
    for field, value in point.items():
        knob = Knob(field, Dimension())
        step = steps[knob.step]
        steps[knob.step] = replace(step, options=put(step.options, knob.path, value))
    return replace(recipe, steps=tuple(steps))


def put(options: Any, path: list[str], value: Value) -> Any:
    """Return a copy of the options with one field replaced."""
    first, *rest = path
    return replace(options, **{first: put(getattr(options, first), rest, value) if rest else value})


# -------------------------------------------------------------------------------------- errors


def wrong(where: str, value: Any, reason: str) -> Problem:
    return Problem(f"{where}: {value!r} {reason}", hint="correct it in the recipe")


def refuse_unknown(values: dict[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise Problem(
                f"{where}: there is no field {key!r}{did_you_mean(key, known)}",
                hint=f"its fields are {', '.join(known)}" if known else "it has no fields",
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def quoted(word: str) -> str:
    return f'"{word}"'
