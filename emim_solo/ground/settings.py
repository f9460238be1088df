"""Settings as dataclasses: read from a mapping, with one line where a key or a value is wrong.

OmegaConf's structured configs take "7" for a number and 3 for a bool; here a value has to be of its field's type.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emim_solo.ground.errors import UsageError

Kind = TypeVar("Kind")
_LONGEST = 80  # characters of a value in an error
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    dict: "settings by name",
    type(None): "null",
}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] = (),
) -> Any:
    """A field of settings, with the bounds of its value, or of each value in a list."""
    bounds = {"least": least, "above": above, "most": most, "choices": tuple(choices)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=bounds)
    return dataclasses.field(default=default, metadata=bounds)


def read(kind: type[Kind], given: Any, key: str = "") -> Kind:
    """The settings of a dataclass, what is not given being its defaults.

    Args:
        kind: a dataclass, whose fields may be dataclasses.
        given: a mapping, or a config.
        key: of these settings in the whole config, for errors.

    Raises:
        UsageError: an unknown or missing key, or a value of another type or out of its bounds.
    """
    if isinstance(given, DictConfig | ListConfig):
        try:
            given = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            place = ".".join(part for part in (key, error.full_key) if part)
            raise UsageError(place, f"{place}: {str(error).splitlines()[0]}; expected a value") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        named = f"{key or 'settings'}={_short(given)}"
        raise UsageError(key, f"{named}: expected settings by name, some of {', '.join(fields)}")
    hints, values = typing.get_type_hints(kind), {}
    for name, value in given.items():
        place = f"{key}.{name}" if key else str(name)
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.0)[0]
            raise UsageError(place, f"unknown {place}: did you mean '{nearest}'? Known: {', '.join(fields)}")
        values[name] = checked(value, hints[name], place, fields[name].metadata)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            place = f"{key}.{name}" if key else name
            raise UsageError(place, f"{place} is missing: expected {_expected(hints[name], field.metadata)}")
    return kind(**values)


def check(kind: type, given: Any, key: str = "") -> None:
    """Check the keys that a dataclass knows of a config that may have others; what is not there is not asked for.

    A dataclass in a list has to be whole, as :func:`read` takes it.

    Raises:
        UsageError: as :func:`read`, but for unknown and missing keys.
    """
    if not isinstance(given, Mapping):
        raise UsageError(key, f"{key}={_short(given)}: expected settings by name")
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in given:
            place = f"{key}.{field.name}" if key else field.name
            checked(given[field.name], hints[field.name], place, field.metadata, check)


def from_dotlist(changes: Sequence[str], base: Any = None) -> Any:
    """``key=value`` each, values in YAML, over a mapping or config.

    Raises:
        UsageError: a key or value that cannot be read.
    """
    merged: Any = OmegaConf.create({} if base is None else base)
    for change in changes:
        key = change.partition("=")[0]
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([change]))
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(key, f"{change}: {reason}; expected key=value, the value in YAML") from error
    return merged


def checked(
    value: Any, hint: Any, key: str, bounds: Mapping[str, Any], nested: Callable[..., Any] | None = None
) -> Any:
    """A value, if it is of a type and within bounds; a whole number where a number is expected becomes one.

    Args:
        value: as given.
        hint: the type of a field.
        key: of the value in the whole config, for errors.
        bounds: of :func:`setting`.
        nested: what takes a dataclass inside, :func:`read` or :func:`check`.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(key, f"{key}={value}: expected a number of at most 64 bits")
    options = _options(hint)
    for option in options:
        if dataclasses.is_dataclass(option) and value is not None:
            return (nested or read)(typing.cast(type, option), value, key)
        if isinstance(value, list | tuple) and _may_be(option, len(value)):
            return [
                checked(each, typing.get_args(option)[0], f"{key}.{place}", bounds) for place, each in enumerate(value)
            ]
        if _is(value, option) and _within(value, bounds):
            return float(value) if option is float else value
    raise UsageError(key, f"{key}={_short(value)}: expected {_expected(hint, bounds)}")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _may_be(option: Any, length: int) -> bool:
    """Whether a type is one of lists of so many values: a ``tuple[float, float]`` has two."""
    origin = typing.get_origin(option)
    return origin is list or (origin is tuple and len(typing.get_args(option)) == length)


def _is(value: Any, option: Any) -> bool:
    if option is Any:
        return True
    if isinstance(value, bool) or value is None:
        return option is type(value)
    if option is float:
        return isinstance(value, int | float) and math.isfinite(value)
    origin = typing.get_origin(option) or option
    return isinstance(value, Mapping if origin is dict else origin)


def _within(value: Any, bounds: Mapping[str, Any]) -> bool:
    choices = bounds.get("choices") or ()
    if not isinstance(value, bool) and any(isinstance(value, type(choice)) for choice in choices):
        return value in choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    least, above, most = (bounds.get(name) for name in ("least", "above", "most"))
    return (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)


def _expected(hint: Any, bounds: Mapping[str, Any]) -> str:
    options = _options(hint)
    words = []
    for option in options:
        if typing.get_origin(option) in (list, tuple):
            kinds = typing.get_args(option)
            length = f" of {len(kinds)}" if typing.get_origin(option) is tuple else ""
            words.append(f"a list{length}, each {_expected(kinds[0], bounds)}")
        elif dataclasses.is_dataclass(option) or typing.get_origin(option) is dict:
            words.append("settings by name")
        else:
            kind = typing.get_origin(option) or option
            words.append(_NAMES.get(kind, getattr(kind, "__name__", str(kind))))
    if bounds.get("choices"):
        words = [f"one of {', '.join(map(str, bounds['choices']))}" if word == _NAMES[str] else word for word in words]
    limits = {"least": "at least", "above": "above", "most": "at most"}
    said = [f"{limit} {bounds[name]}" for name, limit in limits.items() if bounds.get(name) is not None]
    return " or ".join(words) + (f", {' and '.join(said)}" if said else "")
