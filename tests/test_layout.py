"""The layout: dependencies run one way, fences hold, everything stays small, and every config file loads."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.house import LIMITS, ORDER, arrows, circles, measured, upwards
from distkgd.pipeline.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "distkgd").rglob("*.py"))
CODE = [*PACKAGE, *sorted((ROOT / "launch").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
house = cache(measured)  # seconds: not where tests are only collected
FENCES = {
    "torch.distributed": ("distkgd/distributed/",),
    "deepspeed": ("distkgd/distributed/",),
    "mlflow": ("distkgd/tracking/",),
    "ray": ("distkgd/pipeline/ray/", "distkgd/pipeline/sweep/"),
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


@pytest.mark.parametrize("what", LIMITS)
def test_the_house_keeps_its_limits(what: str) -> None:
    found = house()[what]
    assert len(found) <= LIMITS[what], found


def test_every_folder_and_module_has_its_floor() -> None:
    tops = {path.relative_to(ROOT / "distkgd").parts[0].removesuffix(".py") for path in PACKAGE}
    assert tops == set(ORDER)


def package(root: Path, **sources: str) -> Path:
    """A package of that name under `root`; its modules are given as `folder__module=source`."""
    for name, source in sources.items():
        path = (root / "distkgd").joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "source",
    [
        "from distkgd.pipeline.plan import x",
        "import distkgd.pipeline.plan",
        "from distkgd.pipeline import plan",
        "def f():\n    from distkgd.pipeline.plan import x",
        "try:\n    from distkgd.pipeline.plan import x\nexcept ImportError:\n    pass",
    ],
)
def test_an_arrow_upwards_is_seen_however_it_is_written(source: str, tmp_path: Path) -> None:
    graph = arrows(package(tmp_path, pipeline__plan="", common__files=source))
    assert upwards(graph) == ["distkgd.common.files -> distkgd.pipeline.plan"]
    typing = f"if TYPE_CHECKING:\n    {source}" if source.startswith(("from", "import")) else "x = 1"
    assert upwards(arrows(package(tmp_path, common__files=typing))) == []


def test_a_circle_is_seen_and_one_of_types_alone_is_none(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        data__a="from distkgd.data.b import x",
        data__b="def f():\n    from distkgd.data import c",
        data__c="from distkgd.data.a import y",
    )
    assert circles(arrows(root)) == ["distkgd.data.a, distkgd.data.b, distkgd.data.c"]
    package(root, data__c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from distkgd.data.a import y")
    assert circles(arrows(root)) == []


def test_what_is_too_large_is_named(tmp_path: Path) -> None:
    long = "def f():\n" + "    x = 1\n" * 60
    root = package(tmp_path, a="", b="", c="", d="", e="", data__long="x = 1\n" * 401, data__function=long)
    package(root, **{f"models__m{i}": "" for i in range(15)}, **{f"folder{i}__m": "" for i in range(13)})
    (tmp_path / "distkgd/kernels").mkdir()
    (tmp_path / "distkgd/kernels/long.cpp").write_text("\n" * 401, encoding="utf-8")
    found = measured(root)
    assert [what for what, limit in LIMITS.items() if len(found[what]) > limit] == [
        "functions over 60 lines",
        "files over 400 lines",
        "modules at the top",
        "folders at the top",
        "files per folder",
    ]
    assert found["functions over 60 lines"] == ["distkgd/data/function.py f: 61"]
    assert found["files over 400 lines"] == ["distkgd/data/long.py: 401", "distkgd/kernels/long.cpp: 401"]


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
    assert crossed(source, "distkgd/methods/losses/scores.py") == [fence]
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
    extra = ("distkgd.pipeline.ray", "distkgd.pipeline.sweep", "distkgd.tracking.serving.served")
    core = [name for name in names if not name.startswith(extra)]
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


# Sweeps have a test of their own: tests/pipeline/sweep/test_sweep_config.py.
NO_PLANS = ("ablations", "tables", "search", "ray")
PLANS = [
    p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.relative_to(ROOT / "configs").parts[0] not in NO_PLANS
]


@pytest.mark.parametrize("path", PLANS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).student.epochs > 0
