"""The libraries that some formats need and training does not."""

from importlib import import_module
from typing import Any

from distkgd.errors import UnsupportedError


def need(module: str, what: str, extra: str = "export") -> Any:
    """The module of an extra, or an UnsupportedError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f"{what} needs {package}, which cannot be imported ({error}): pip install 'distkgd[{extra}]'."
        raise UnsupportedError(message) from None
