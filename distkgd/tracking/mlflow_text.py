"""Names, params and errors as MLflow takes them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from distkgd.common.text import redact
from distkgd.tracking.tracker import Params

MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 250, 6000, 8000, 36  # mlflow.utils.validation


def flatten(tree: Params) -> dict[str, str]:
    """Nested params as a.b.c keys and texts, spelled as in YAML, cut at what MLflow keeps."""
    flat: dict[str, str] = {}

    def visit(key: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                visit(f"{key}.{name}" if key else str(name), item)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                visit(f"{key}.{index}", item)
        elif key:
            flat[safe_name(key)] = cut(redact(_spell(value)), MAX_PARAM)

    visit("", tree)
    return flat


def _spell(value: Any) -> str:
    if value is None or isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def safe_name(name: str) -> str:
    """A name MLflow takes: hits@10 becomes hits_at_10, other strange characters become `_`."""
    name = re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY] or "_"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def one_line(error: Exception) -> str:
    """An error in one line: those of a database go on with the statement and its parameters."""
    first = str(error).partition("\n")[0]
    return cut(redact(f"{type(error).__name__}: {first}"), 500)
