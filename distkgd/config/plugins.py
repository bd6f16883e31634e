"""Classes of other packages: `package.module:Class` in a config, or an entry point of an installed package.

A config is the user's own word, so the code that it names is imported. A model folder may come from anywhere: what it
names is taken where the user has asked for it otherwise, by importing the module, by installing a package that has the
class as an entry point, or in DISTKGD_PLUGINS (modules, with commas between).
"""

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from distkgd.errors import ConfigError

T = TypeVar("T")


def named_class(name: str, table: Mapping[str, type[T]], group: str, base: type[Any]) -> type[T]:
    """The class that a config means by `name`: of `table`, `package.module:Class`, or an entry point of `group`.

    Raises ConfigError where there is none, or where it is no `base`.
    """
    what = base.__name__.lower()
    if name in table:
        return table[name]
    if ":" in name:
        return _checked(_imported(name), name, table, base)
    points = {point.name: point for point in entry_points(group=group)}
    if name in points:
        return _checked(_imported(points[name].value), name, table, base)
    raise ConfigError(
        f"there is no {what} {name!r}; there are {', '.join([*table, *sorted(points)])}, and one of your own is "
        "package.module:Class"
    )


def class_of_folder(spec: str, table: Mapping[str, type[T]], group: str, base: type[Any]) -> type[T]:
    """The class that a model folder means by `package.module:Class`; ConfigError where nobody has asked for it."""
    module = spec.partition(":")[0]
    asked = {one.strip() for one in os.environ.get("DISTKGD_PLUGINS", "").split(",")}
    installed = {point.value for point in entry_points(group=group)}
    if module not in sys.modules and module not in asked and spec not in installed:
        raise ConfigError(
            f"its {base.__name__.lower()} is {spec}, code that is not distkgd's and that nobody has asked for. If you "
            f"trust it: DISTKGD_PLUGINS={module}, or in Python import {module} first."
        )
    return _checked(_imported(spec), spec, table, base)


def spec_of(kind: type[object]) -> str:
    """`package.module:Class` of a class that is not ours, else its own name."""
    own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return str(getattr(kind, "name", kind.__name__)) if own else f"{kind.__module__}:{kind.__qualname__}"


def _imported(spec: str) -> object:
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(f"{spec[:80]!r} is not of the form package.module:Class.")
    try:
        import_module(module)
        return EntryPoint("", spec, "").load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{spec}: {error}; is it installed, or its folder in PYTHONPATH?") from None


def _checked(found: object, spec: str, table: Mapping[str, type[T]], base: type[Any]) -> type[T]:
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{spec} is no {base.__name__} of {base.__module__}; derive your class from that.")
    name = getattr(found, "name", None)
    if not isinstance(name, str) or name in table:
        raise ConfigError(f"{spec}.name is {name!r}; give it one of its own, which none of distkgd's has.")
    return found
