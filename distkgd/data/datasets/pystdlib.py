"""The data set that is always there: a graph of the Python standard library, read from its own sources.

Entities are modules, classes, functions, exceptions, and names of methods and attributes, which many classes
share. A held-out triple asks what a programmer could answer from the rest of the graph: what else does
a module import, which class does a class inherit from, which method or attribute does it have besides those
that are known, what does a function call, raise or catch.

The sources differ between Python versions and so does the graph; `sha256` tells which one was built. Machines
with the same sources build the same: nothing depends on the order of files or on hash seeds.
"""

from __future__ import annotations

import ast
import builtins
import gc
import hashlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType

import polars as pl

from distkgd.data.triples import COLUMNS, SPLITS, Graph, Vocabulary, assemble, encode, sorted_unique
from distkgd.errors import DataError

# With fewer triples most entities are leaves, of which nothing can be predicted; three leaves some 40,000.
MIN_DEGREE = 3
HELD_OUT = 0.05  # of the triples, for valid and again for test
REPLACED = frozenset({"__import__", "input", "open", "print"})  # builtins that libraries put functions of their own for

Triple = tuple[str, str, str]
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "_bundled"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Import = ast.Import | ast.ImportFrom
_TELLING = ast.Call | ast.Raise | ast.ExceptHandler | ast.Attribute | ast.ClassDef | _Function | _Import
_LEAF_FIELDS = {"ctx", "op", "ops", "id", "attr", "arg", "name", "names", "kind", "type_comment"}


@dataclass
class _Module:
    """What one source file says; names on the right are as written there, not yet looked up.

    scope: the dotted path each name stands for. stars: origins of `import *`. classes: is a top-level name a
    class (else a function)? said: (top-level name, relation, dotted name or `method:…` or `attribute:…`).
    """

    name: str
    is_package: bool
    imports: list[str] = field(default_factory=list)
    stars: list[str] = field(default_factory=list)
    scope: dict[str, str] = field(default_factory=dict)
    classes: dict[str, bool] = field(default_factory=dict)
    said: set[Triple] = field(default_factory=set)


class _Library:
    """All modules and what is defined in them, so that a name in one file finds its definition in another."""

    def __init__(self, modules: list[_Module]) -> None:
        self.modules = {module.name: module for module in modules}
        self.classes = {f"{m.name}.{name}": is_class for m in modules for name, is_class in m.classes.items()}
        self.exceptions: set[str] = set()
        size = -1
        while len(self.exceptions) > size:  # an exception's children are exceptions, and so on down
            size = len(self.exceptions)
            for module in modules:
                for name, relation, base in module.said:
                    if relation == "inherits" and (self.lookup(module, base) or "").startswith("exception:"):
                        self.exceptions.add(f"{module.name}.{name}")

    def resolve(self, dotted: str, aliases: int = 8) -> str | None:
        """The entity a dotted path stands for, through re-exports; None for what is not in the library."""
        if dotted in self.classes:
            kind = "exception" if dotted in self.exceptions else "class"
            return f"{kind if self.classes[dotted] else 'function'}:{dotted}"
        if dotted in self.modules:
            return f"module:{dotted}"
        owner, _, tail = dotted.rpartition(".")
        while owner and owner not in self.modules:
            owner, _, last = owner.rpartition(".")
            tail = f"{last}.{tail}"
        if not owner:
            return f"module:{dotted}" if dotted in sys.stdlib_module_names else None
        name, _, rest = tail.partition(".")
        module = self.modules[owner]
        origins = [module.scope[name]] if name in module.scope else [f"{star}.{name}" for star in module.stars]
        paths = [f"{origin}.{rest}".rstrip(".") for origin in origins if origin != f"{owner}.{name}"]
        found = (self.resolve(path, aliases - 1) for path in paths if aliases)
        return next(filter(None, found), None)

    def lookup(self, module: _Module, dotted: str) -> str | None:
        """The entity that a name such as `json.loads` or `ValueError` stands for inside `module`."""
        first, _, rest = dotted.partition(".")
        if first in module.scope:
            return self.resolve(f"{module.scope[first]}.{rest}".rstrip("."))
        starred = filter(None, (self.resolve(f"{star}.{dotted}") for star in module.stars))
        return next(starred, None if rest else _builtin(first))


def build() -> Graph:
    """The graph of the running Python's library. Raises DataError when its sources are not installed."""
    root = Path(sysconfig.get_path("stdlib"))
    # Syntax trees have no cycles; the collector would walk through each several times and find nothing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        modules, skipped = _parse(root)
    finally:
        if collecting:
            gc.enable()
    if not modules:
        raise DataError(f"no sources in {root}: this Python has none; name a folder or a public data set")
    triples = drop_rare(_facts(_Library(modules)), MIN_DEGREE)
    splits = dict(zip(SPLITS, split(triples), strict=True))
    frames = {name: pl.DataFrame(splits[name], schema=COLUMNS, orient="row") for name in SPLITS}
    entities = sorted_unique([frames["train"]["head"], frames["train"]["tail"]])
    relations = sorted_unique([frames["train"]["relation"]])
    text = "".join("\t".join(triple) + "\n" for name in SPLITS for triple in splits[name])
    return assemble(
        "pystdlib",
        {name: encode(frame, entities, relations) for name, frame in frames.items()},
        Vocabulary(entities, entities.str.replace(":", " ", literal=True)),
        Vocabulary(relations, relations.str.replace_all("_", " ", literal=True)),
        hashlib.sha256(text.encode()).hexdigest(),
        (f"{skipped} source files could not be parsed and were left out",) if skipped else (),
    )


def drop_rare(triples: set[Triple], min_degree: int) -> set[Triple]:
    """Drop entities in fewer than `min_degree` triples, again and again until none is left (a k-core)."""
    size = -1
    while len(triples) != size:
        size = len(triples)
        degree = Counter(entity for head, _, tail in triples for entity in {head, tail})
        triples = {triple for triple in triples if min(degree[triple[0]], degree[triple[2]]) >= min_degree}
    return triples


def split(triples: set[Triple]) -> tuple[list[Triple], list[Triple], list[Triple]]:
    """train, valid and test by the triples' own hashes; train keeps a triple of every entity and relation."""
    ordered = sorted(triples, key=lambda triple: hashlib.sha256("\t".join(triple).encode()).digest())
    left = Counter(word for head, relation, tail in triples for word in {head, relation, tail})
    wanted = round(HELD_OUT * len(triples))
    train: list[Triple] = []
    held_out: list[Triple] = []
    for triple in ordered:
        if len(held_out) < 2 * wanted and all(left[word] > 1 for word in triple):
            held_out.append(triple)
            left.subtract(set(triple))
        else:
            train.append(triple)
    return sorted(train), sorted(held_out[0::2]), sorted(held_out[1::2])


def _parse(root: Path) -> tuple[list[_Module], int]:
    modules, skipped = [], 0
    for folder, folders, files in os.walk(root):
        # Cut here, not later: site-packages may hold far more than the library.
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and "-" not in name)
        for file in sorted(files):
            if not file.endswith(".py") or file.startswith("_sysconfigdata"):  # that one is not the library's
                continue
            path = Path(folder, file)
            parts = path.relative_to(root).with_suffix("").parts
            is_package = file == "__init__.py" and len(parts) > 1
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError, RecursionError):
                skipped += 1
                continue
            modules.append(_Module(".".join(parts[:-1] if is_package else parts), is_package))
            _read(modules[-1], tree)
    return modules, skipped


def _read(module: _Module, tree: ast.Module) -> None:
    """Note what a file says, so that its syntax tree can go: live trees slow the parser down."""
    for node in _top_level(tree.body):
        if isinstance(node, _Import):
            _read_import(module, node)
        if not isinstance(node, ast.ClassDef | _Function):
            continue
        module.scope[node.name] = f"{module.name}.{node.name}"
        module.classes[node.name] = isinstance(node, ast.ClassDef)
        if isinstance(node, ast.ClassDef):
            methods = (child.name for child in _top_level(node.body) if isinstance(child, _Function))
            module.said.update((node.name, "has_method", f"method:{method}") for method in methods)
            module.said.update((node.name, "inherits", base) for base in map(_dotted, node.bases) if base)
        for child in _walk(node):
            if isinstance(child, _Import):
                _read_import(module, child)
            else:
                module.said.update((node.name, relation, used) for relation, used in _uses(child) if used)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, also those under `if` and `try`, where platforms are told apart."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handled = [child for handler in getattr(node, "handlers", []) for child in handler.body]
            yield from _top_level([*node.body, *node.orelse, *handled])


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that say something: ast.walk without the leaves, which would take most of the time."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, _TELLING):
            yield node
        for name in node._fields:
            value = None if name in _LEAF_FIELDS else getattr(node, name, None)
            if isinstance(value, list):
                stack.extend(child for child in value if isinstance(child, ast.AST))
            elif isinstance(value, ast.AST):
                stack.append(value)


def _read_import(module: _Module, node: _Import) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            module.imports.append(alias.name)
            bound = alias.name if alias.asname else alias.name.partition(".")[0]
            module.scope.setdefault(alias.asname or bound, bound)
        return
    package = module.name.rsplit(".", node.level - module.is_package)[0] if node.level else ""
    origin = ".".join(filter(None, [package, node.module]))
    module.imports.append(origin)
    for alias in node.names:
        if alias.name == "*":
            module.stars.append(origin)
        else:
            module.imports.append(f"{origin}.{alias.name}")
            module.scope.setdefault(alias.asname or alias.name, f"{origin}.{alias.name}")


def _uses(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """What one syntax node says about the class or function around it: relation and dotted name."""
    match node:
        case ast.Call(func=used) | ast.Raise(exc=ast.Call(func=used) | (ast.Name() | ast.Attribute() as used)):
            yield "calls" if isinstance(node, ast.Call) else "raises", _dotted(used)
        case ast.ExceptHandler(type=ast.Tuple(elts=kinds)):
            yield from (("catches", _dotted(kind)) for kind in kinds)
        case ast.ExceptHandler(type=ast.Name() | ast.Attribute() as kind):
            yield "catches", _dotted(kind)
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            for decorator in node.decorator_list:
                yield (
                    "decorated_by",
                    _dotted(decorator.func if isinstance(decorator, ast.Call) else decorator),
                )
        case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
            yield "has_attribute", f"attribute:{node.attr}"


def _facts(library: _Library) -> set[Triple]:
    triples: set[Triple] = set()
    for module in library.modules.values():
        me = f"module:{module.name}"
        if package := module.name.rpartition(".")[0]:
            triples.add((me, "part_of", f"module:{package}"))
        imported = filter(None, map(library.resolve, module.imports))
        triples.update((me, "imports", entity) for entity in imported)
        ours = {name: library.resolve(f"{module.name}.{name}") or "" for name in module.classes}
        for name, is_class in module.classes.items():
            triples.add((me, "defines_class" if is_class else "defines_function", ours[name]))
        for name, relation, used in module.said:
            entity = used if ":" in used else library.lookup(module, used)
            if entity and (relation != "calls" or entity.startswith("function:")):
                triples.add((ours[name], relation, entity))
            elif entity and entity.startswith("class:"):  # creating an exception is raising it: said already
                triples.add((ours[name], "creates", entity))
    return {(head, relation, tail) for head, relation, tail in triples if head != tail}


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    owner = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{owner}.{node.attr}" if isinstance(node, ast.Attribute) and owner else None


def _builtin(name: str) -> str | None:
    """Only what the language brings: `site`, shells and test tools add names of their own to builtins."""
    value = getattr(builtins, name, None)
    if isinstance(value, type) and value.__module__ == "builtins":
        return f"exception:{name}" if issubclass(value, BaseException) else f"class:{name}"
    known = isinstance(value, BuiltinFunctionType) or name in REPLACED
    return f"function:{name}" if known else None
