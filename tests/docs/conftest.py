"""The folder in which the documentation's commands have been run."""

import importlib.util
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.commands import Run, how
from tests.docs.sites import Outcome, Site, build, of_kind, pykeen_results, run, small_rules


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, schema: Path) -> Site:
    """What the commands of all pages have left and said, one after the other; those of a missing extra are left out."""
    folder = build(tmp_path_factory.mktemp("site"))
    shutil.copy(schema, folder / "mlflow.db")
    have = {name: importlib.util.find_spec(name) is not None for name in ("pykeen", "ray", "mlflow", "pyarrow")}
    if have["pykeen"]:
        pykeen_results(folder)
    outcomes: dict[str, Outcome] = {}
    with small_rules(), ExitStack() as stack:
        if have["ray"]:
            from distkgd.pipeline.ray.session import ray_session
            from distkgd.pipeline.sweep.sweep import ENVIRONMENT

            mend = stack.enter_context(pytest.MonkeyPatch.context())
            for name, value in ENVIRONMENT.items():
                mend.setenv(name, value)
            stack.enter_context(ray_session("local", num_cpus=2, quiet=True))
        for command in of_kind(Run):
            entry = how(command.text)
            assert isinstance(entry, Run)
            if entry.needs is None or have[entry.needs]:
                began = time.monotonic()
                ended = run(command.text, folder)
                missing = "" if (folder / entry.leaves).exists() else f"\nIt has left no {entry.leaves}."
                code = -1 if missing else ended.code
                outcomes[command.text] = Outcome(code, ended.said + missing, time.monotonic() - began)
    return Site(folder, outcomes)
