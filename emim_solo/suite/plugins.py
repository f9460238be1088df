"""Methods of other packages: each is an entry point ``name = "module:Class"`` in the group ``emim_solo.methods``."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

from emim_solo.ground.errors import UsageError
from emim_solo.ground.stopping import Stopped

GROUP = "emim_solo.methods"


def add_methods(methods: dict[str, Any], emim: type) -> None:
    """Add EMIM and the methods of other packages to solo-learn's METHODS, in place."""
    methods["emim"] = emim
    for name, method in methods_of_other_packages(methods["base"]).items():
        if isinstance(method, type) and methods.setdefault(name, method) is not method:
            text = f"method '{name}' of {method.__module__} is left out: there is one of that name already"
            warnings.warn(f"{text}; give it another", stacklevel=1)


@cache
def methods_of_other_packages(base: type) -> dict[str, type | UsageError]:
    """Each method's class, or the error that makes it unavailable. That only gives a warning: other methods still work."""
    by_name: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry_point in metadata.entry_points(group=GROUP):
        by_name[entry_point.name].append(entry_point)
    methods: dict[str, type | UsageError] = {}
    for name, entry_points in by_name.items():
        try:
            methods[name] = _load(entry_points, base)
        except UsageError as error:
            methods[name] = UsageError(error.key, f"method '{name}' is not available: {error}")
            warnings.warn(str(methods[name]), stacklevel=1)
    return methods


def _load(entry_points: list[EntryPoint], base: type) -> type:
    if len({entry_point.value for entry_point in entry_points}) > 1:
        places = " and ".join(sorted(_place(entry_point) for entry_point in entry_points))
        raise UsageError("plugin.twice", f"{places} have the same name: uninstall all but one of the packages")
    place = _place(entry_points[0])
    try:
        method = entry_points[0].load()
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # a module may raise anything and may call sys.exit
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError("plugin.import", f"{place} cannot be imported ({reason})") from error
    if not (isinstance(method, type) and issubclass(method, base)):
        expected = f"expected a subclass of {base.__module__}.{base.__name__}"
        raise UsageError("plugin.class", f"{place} is {method!r}: {expected}")
    return method


def _place(entry_point: EntryPoint) -> str:
    package = entry_point.dist.name if entry_point.dist is not None else "unknown"
    return f"{entry_point.value} of package {package}"
