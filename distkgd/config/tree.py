"""Plain trees of options: merging them, reading them from YAML, putting `a.b=c` overrides over them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from distkgd.common.paths import AnyPath
from distkgd.config.shipped import shipped
from distkgd.errors import ConfigError

DEEPEST = 8  # steps in a dotted key


class _Loader(yaml.SafeLoader):
    """YAML without what would be another config in silence: a key that stands twice, numbers of base 8 and 60."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before keys are merged in, which others may replace
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ConstructorError(None, None, f"{short(key.value)} stands there twice; remove one", key.start_mark)
            seen.add(name)
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """064 would be 52, and 1:30 would be 90."""
        whole = node.tag == "tag:yaml.org,2002:int"
        value: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        text = node.value.replace("_", "")
        if ":" in text or (whole and text.lstrip("+-").isdecimal() and int(text) != value):
            cure = "write that, or quote it" if ":" in text else "write that, or no 0 first"
            raise ConstructorError(None, None, f"{text} is {value} to YAML; {cure}", node.start_mark)
        return value


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over` put over it."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def read_yaml(path: AnyPath) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError when there is none."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        names = ", ".join(shipped())
        raise ConfigError(f"There is no config file {path}. Shipped ones (distkgd configs): {names}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {text}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must hold a mapping of option names to values, not {type(tree).__name__}.")
    return tree


def apply(tree: dict[str, Any], override: str) -> None:
    """Put one `a.b=c` into `tree`; a step that is a number finds the number that YAML has read."""
    key, sign, text = override.partition("=")
    path = key.strip().split(".")
    if not sign or not all(path) or len(path) > DEEPEST:
        raise ConfigError(f"Override {short(override)} is not of the form key=value or a.b=value.")
    try:
        value = yaml.load(text, _Loader)
    except ConstructorError as error:
        raise ConfigError(f"Override {short(override)}: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"Override {short(override)}: {short(text)} is not a YAML value.") from None
    node = tree
    for step in path[:-1]:
        key = _key(node, step)
        below = node.get(key)
        node[key] = below if isinstance(below, dict) else {}
        node = node[key]
    node[_key(node, path[-1])] = value


def _key(node: Mapping[Any, Any], step: str) -> Any:
    return next((key for key in node if type(key) is int and str(key) == step), step)


def short(value: object) -> str:
    """What was given, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
