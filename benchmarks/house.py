"""The layout in numbers, printed by `make house`; exits with 1 when a limit is broken.

Imports at run time count, also those inside functions; those under `if TYPE_CHECKING` do not.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "distkgd"
# A folder or a module at the top imports only what stands before it.
ORDER = (
    *("errors", "common", "config", "kernels", "distributed", "data", "scorers", "models", "methods", "training"),
    *("evaluation", "reporting", "tracking", "pipeline", "api", "commands", "__init__", "__main__"),
)
LIMITS = {"circles": 0, "arrows upwards": 0, "functions over 60 lines": 0, "files over 400 lines": 0}
LIMITS |= {"modules at the top": 4, "folders at the top": 14, "files per folder": 14}
KINDS = (".py", ".cpp", ".h", ".j2")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that run-time imports of a source name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """Module of the package -> modules of it that it imports."""
    sources = (root / PACKAGE).rglob("*.py")
    names = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in sources}
    graph = {}
    for name, path in names.items():
        asked = imports(ast.parse(path.read_text(encoding="utf-8")))
        # `from a.b import c`: the module a.b.c if there is one, else a.b.
        graph[name] = {one if one in names else one.rpartition(".")[0] for one in asked} & names.keys() - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Groups of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for name, asked in graph.items():
        ahead, reached[name] = list(asked), set()
        while ahead:
            if (module := ahead.pop()) not in reached[name]:
                reached[name].add(module)
                ahead += graph[module]
    groups = {tuple(sorted(b for b in graph if b in reached[a] and a in reached[b])) for a in graph}
    return [", ".join(group) for group in groups if group]


def upwards(graph: dict[str, set[str]]) -> list[str]:
    """Imports of what stands later in ORDER."""
    top = {module: [*module.split("."), "__init__"][1] for module in graph}
    floor = {module: ORDER.index(name) if name in ORDER else -1 for module, name in top.items()}
    return [f"{a} -> {b}" for a, asked in sorted(graph.items()) for b in sorted(asked) if floor[b] > floor[a]]


def too_long(root: Path = ROOT) -> tuple[list[str], list[str]]:
    """(functions over 60 lines, files over 400 lines) of the package, the launchers and the benchmarks."""
    functions, files = [], []
    for path in sorted(p for top in (PACKAGE, "launch", "benchmarks") for p in (root / top).rglob("*.*")):
        if path.suffix in KINDS:
            text, where = path.read_text(encoding="utf-8"), path.relative_to(root)
            files += [f"{where}: {size}"] if (size := len(text.splitlines())) > 400 else []
            for node in ast.walk(ast.parse(text if path.suffix == ".py" else "")):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    size = (node.end_lineno or 0) - node.lineno + 1
                    functions += [f"{where} {node.name}: {size}"] if size > 60 else []
    return functions, files


def measured(root: Path = ROOT) -> dict[str, list[str]]:
    """What LIMITS limits -> what there is of it."""
    top, graph = root / PACKAGE, arrows(root)
    folders: dict[Path, list[str]] = {}
    for path in sorted(p for p in top.rglob("*") if p.suffix in KINDS):
        folders.setdefault(path.parent, []).append(str(path.relative_to(root)))
    found = {"circles": circles(graph), "arrows upwards": upwards(graph), "modules at the top": folders[top]}
    found["folders at the top"] = sorted({folder.relative_to(top).parts[0] for folder in folders if folder != top})
    functions, files = too_long(root)
    found |= {"functions over 60 lines": functions, "files over 400 lines": files}
    return found | {"files per folder": max(folders.values(), key=len)}


if __name__ == "__main__":
    result = measured()
    for name, limit in LIMITS.items():
        sys.stdout.write(f"{name}: {len(result[name])} (at most {limit})\n")
        sys.stdout.writelines(f"  {one}\n" for one in result[name] if len(result[name]) > limit)
    sources = (path.read_text("utf-8") for path in (ROOT / PACKAGE).rglob("*") if path.suffix in KINDS)
    sys.stdout.write(f"lines of {PACKAGE}/: {sum(len(text.splitlines()) for text in sources)}\n")
    sys.exit(any(len(result[name]) > limit for name, limit in LIMITS.items()))
