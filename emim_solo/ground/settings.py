"""Settings as dataclasses, read from a mapping. A wrong key or value gives an error of one line.

OmegaConf's structured configs accept "7" as a number and 3 as a bool. Here a value must have the type of its field.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emim_solo.ground.errors import UsageError

Kind = TypeVar("Kind")
types_of: Callable[[Any], dict[str, Any]] = cache(typing.get_type_hints)  # slow: annotations are texts
_LONGEST = 80  # characters of a value in an error
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    dict: "settings by name",
    type(None): "null",
}
_LIMITS = {"least": ("at least", operator.ge), "above": ("above", operator.gt), "most": ("at most", operator.le)}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] = (),
    empty: bool = True,
) -> Any:
    """A dataclass field with bounds for its value, or for each value of a list. ``empty``: whether the list may be empty."""
    bounds = {"least": least, "above": above, "most": most, "choices": tuple(choices), "empty": empty}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=bounds)
    return dataclasses.field(default=default, metadata=bounds)


def read(kind: type[Kind], given: Any, key: str = "") -> Kind:
    """Settings of the dataclass ``kind`` from a mapping or config, with defaults. ``key`` is their place in the config, for errors."""
    if isinstance(given, DictConfig | ListConfig):
        try:
            given = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            place = ".".join(part for part in (key, error.full_key) if part)
            raise UsageError(place, f"{place}: {str(error).splitlines()[0]}; expected a value") from error
    values = _values(kind, given, key, read)
    hints = types_of(kind)
    if unknown := [name for name in given if name not in hints]:
        place, nearest = _place(key, unknown[0]), difflib.get_close_matches(str(unknown[0]), hints, n=1, cutoff=0.0)[0]
        raise UsageError(place, f"unknown {place}: did you mean '{nearest}'? Known: {', '.join(hints)}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            place = _place(key, field.name)
            raise UsageError(place, f"{place} is missing: expected {_expected(hints[field.name], field.metadata)}")
    return kind(**values)


def check(kind: type, given: Any, key: str = "") -> None:
    """As :func:`read`, but a config may have other keys and lack some. Each dataclass in a list must be complete."""
    _values(kind, given, key, check)


def _values(kind: type, given: Any, key: str, nested: Callable[..., Any]) -> dict[str, Any]:
    hints = types_of(kind)
    if not isinstance(given, Mapping):
        named = f"{key or 'settings'}={_short(given)}"
        raise UsageError(key, f"{named}: expected settings by name, some of {', '.join(hints)}")
    return {
        field.name: checked(given[field.name], hints[field.name], _place(key, field.name), field.metadata, nested)
        for field in dataclasses.fields(kind)
        if field.name in given
    }


def _place(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def from_dotlist(changes: Sequence[str], base: Any = None) -> Any:
    """``key=value`` each, the value in YAML, merged into a mapping or config; UsageError if one cannot be read."""
    merged: Any = OmegaConf.create({} if base is None else base)
    for change in changes:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([change]))
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, OmegaConfBaseException) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            key = change.partition("=")[0]
            raise UsageError(key, f"{change}: {reason}; expected key=value, the value in YAML") from error
    return merged


def checked(
    value: Any, hint: Any, key: str, bounds: Mapping[str, Any], nested: Callable[..., Any] | None = None
) -> Any:
    """The value if it has the type and the bounds of :func:`setting`, else UsageError. ``nested`` handles inner dataclasses."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(key, f"{key}={value}: expected a number of at most 64 bits")
    if isinstance(value, list | tuple) and not value and not bounds.get("empty", True):
        raise UsageError(
            key, f"{key}=[]: expected one value or more, each {_expected(typing.get_args(hint)[0], bounds)}"
        )
    for option in _options(hint):
        origin, kinds = typing.get_origin(option), typing.get_args(option)
        if dataclasses.is_dataclass(option) and value is not None:
            return (nested or read)(typing.cast(type, option), value, key)
        if isinstance(value, list | tuple) and (origin is list or (origin is tuple and len(kinds) == len(value))):
            return [checked(each, kinds[0], f"{key}.{place}", bounds) for place, each in enumerate(value)]
        if _is(value, origin or option) and _within(value, bounds):
            return float(value) if option is float else value
    raise UsageError(key, f"{key}={_short(value)}: expected {_expected(hint, bounds)}")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(value, bool) or value is None:
        return kind is type(value)
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, Mapping if kind is dict else kind)


def _within(value: Any, bounds: Mapping[str, Any]) -> bool:
    if isinstance(value, bool):
        return True
    choices = bounds.get("choices", ())
    if any(isinstance(value, type(choice)) for choice in choices):
        return value in choices
    limits = [(holds, bounds.get(name)) for name, (_, holds) in _LIMITS.items()]
    return not isinstance(value, int | float) or all(limit is None or holds(value, limit) for holds, limit in limits)


def _expected(hint: Any, bounds: Mapping[str, Any]) -> str:
    limits = [f"{words} {bounds[name]}" for name, (words, _) in _LIMITS.items() if bounds.get(name) is not None]
    return _words(hint, bounds) + (f", {' and '.join(limits)}" if limits else "")


def _words(hint: Any, bounds: Mapping[str, Any]) -> str:
    if len(options := _options(hint)) > 1:
        return " or ".join(_words(option, bounds) for option in options)
    kind, kinds = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (list, tuple) and kinds:
        return f"a list{f' of {len(kinds)}' if kind is tuple else ''}, each {_words(kinds[0], bounds)}"
    if kind is str and bounds.get("choices"):
        return f"one of {', '.join(map(str, bounds['choices']))}"
    if dataclasses.is_dataclass(kind):
        return _NAMES[dict]
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
