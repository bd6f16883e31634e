"""The fences of the layout: who imports what, what stays small, what every config file must be."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distkgd.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "distkgd").rglob("*.py"))
CODE = [*PACKAGE, *sorted((ROOT / "launch").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
FENCES = {
    "torch.distributed": ("distkgd/distributed/",),
    "deepspeed": ("distkgd/distributed/",),
    "mlflow": ("distkgd/tracking.py", "distkgd/serving/"),
    "ray": ("distkgd/cluster/",),
}


def imported(source: str) -> Iterator[str]:
    """Dotted names that a source imports: by statement, by a call that imports, or as torch.x.y of a plain import."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(func=called, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(called).rpartition(".")[2] in ("import_module", "__import__"):
                    yield name
            case ast.Attribute():
                dotted = ast.unparse(node)
                if dotted.startswith("torch."):
                    yield dotted


def crossed(source: str, where: str) -> list[str]:
    """The fences that a source at `where` crosses."""
    names = set(imported(source))
    return [
        fence
        for fence, inside in FENCES.items()
        if not where.startswith(inside) and any(n == fence or n.startswith(f"{fence}.") for n in names)
    ]


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_module_behind_a_fence_imports_what_is_fenced(path: Path) -> None:
    assert crossed(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    ("source", "fence"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("from torch.distributed.tensor import DTensor", "torch.distributed"),
        ("def f():\n    import mlflow", "mlflow"),
        ("from importlib import import_module\nimport_module('mlflow.tracking')", "mlflow"),
        ("import ray.train", "ray"),
        ("from deepspeed import zero", "deepspeed"),
    ],
)
def test_a_fence_notices_every_way_to_cross_it(source: str, fence: str) -> None:
    assert crossed(source, "distkgd/losses.py") == [fence]
    for inside in FENCES[fence]:
        assert crossed(source, inside + ("x.py" if inside.endswith("/") else "")) == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_package_never_prints_past_the_display(path: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


def polars_paths(source: str) -> list[str]:
    """The first arguments of polars' readers and writers that are paths by their name."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args)
    first = {(ast.unparse(call.func), ast.unparse(call.args[0])) for call in calls}
    reader = re.compile(r"pl\.(read|scan)_\w+|.*\.write_csv")
    polars = [argument for called, argument in first if reader.fullmatch(called)]
    taken = ("file", "text", "whole")
    return [
        one for one in polars if one not in taken and not one.endswith((".read_bytes()", ".tobytes()", "BytesIO(data)"))
    ]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_polars_is_given_bytes_and_open_files_for_it_takes_paths_for_patterns(path: Path) -> None:
    assert polars_paths(path.read_text(encoding="utf-8")) == []


def test_a_path_that_is_given_to_polars_is_noticed() -> None:
    assert polars_paths("pl.read_csv(path, separator=',')\nframe.write_csv(folder / 'x')") != []
    assert polars_paths("pl.scan_parquet(path.read_text())") == ["path.read_text()"]


def test_importing_the_whole_package_imports_no_extra() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE]
    core = [name for name in names if not name.startswith("distkgd.cluster") and name != "distkgd.serving.served"]
    code = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(name) for name in {core!r}]\n"
        "json.dump(sorted(set(sys.modules) & {'mlflow', 'ray', 'deepspeed'}), sys.stdout)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.name)
def test_a_launcher_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 65


# Sweeps have a test of their own: tests/cluster/test_sweep_config.py.
NO_PLANS = ("ablations", "search", "ray")
PLANS = [
    p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.relative_to(ROOT / "configs").parts[0] not in NO_PLANS
]


@pytest.mark.parametrize("path", PLANS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).student.epochs > 0
