"""A wheel in an environment of its own, used from another folder: train, ask, export, serve."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.launches import LAUNCH_SECONDS, ROOT

SOURCES = ("distkgd", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
ASK = """
import json, mlflow, sys
import distkgd
model = mlflow.pyfunc.load_model("models:/own@champion")
answers = model.predict([{"head": "a1", "relation": "r1", "k": 3}])
print(json.dumps([distkgd.__file__, answers]))
"""


def run(command: list[str | Path], cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a program that ends well."""
    told = {"cwd": cwd, "env": env, "capture_output": True, "text": True, "timeout": LAUNCH_SECONDS}
    done = subprocess.run([*map(str, command)], check=False, **told)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    text: str = done.stdout
    return text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    run([*build, place / "made", place], place)
    (made,) = (place / "made").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs of an environment lie that has the wheel, and what it needs from this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    (packages,) = (place / "lib").glob("python*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        place / "bin/python",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
    ]
    run([*install, wheel], place)
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # .pth files there are not read
    return place / "bin"


def test_the_wheel_holds_configs_sources_of_kernels_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern, top in (("configs/**/*.yaml", "distkgd"), ("distkgd/**/*.cpp", ""), ("distkgd/**/*.j2", "")):
        wanted = {str(Path(top) / path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert wanted and wanted <= names
    assert "distkgd/py.typed" in names and "distkgd/kernels/cpp/floats.h" in names
    assert {name.partition("/")[0] for name in names} == {"distkgd", "distkgd-0.1.0.dist-info"}


@pytest.mark.timeout(900)
def test_it_is_used_from_another_folder(programs: Path, schema: Path, tmp_path: Path) -> None:
    shutil.copy(schema, tmp_path / "mlflow.db")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    env |= {"NO_COLOR": "1", "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    distkgd = programs / "distkgd"
    triples = "".join(f"a{i % 13}\tr{i % 3}\tb{i % 17}\n" for i in range(300))
    (tmp_path / "own.tsv").write_text(triples, encoding="utf-8")
    assert "umls/bkd_complex" in run([distkgd, "configs"], tmp_path, env)
    few = [
        "mlflow.enabled=false",
        "teacher.epochs=1",
        "teacher.dim=8",
        "student.epochs=1",
        "baseline.epochs=1",
        "report.queries=3",
    ]
    run([distkgd, "distill", "--data", "own.tsv", "--to", "4", "--out", "run", "device=cpu", *few], tmp_path, env)
    assert (tmp_path / "run/report.html").is_file()
    student = "run/stages/student"
    out = run([distkgd, "predict", student, "--head", "a1", "--relation", "r1", "--top", "3"], tmp_path, env)
    assert "(a1, r1, ?)" in out
    run([distkgd, "export", student, "arrays", "--format", "numpy"], tmp_path, env)
    assert np.load(tmp_path / "arrays/entity.npy").shape == (30, 4)
    run([programs / "python", "-m", "distkgd", "register", "run", "--name", "own"], tmp_path, env)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    file, (answer,) = json.loads(run([programs / "python", "-c", ASK], tmp_path, env | store).splitlines()[-1])
    assert Path(file).is_relative_to(programs.parent) and len(answer["names"]) == 3
