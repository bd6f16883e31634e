"""The folder of a run: made once, and taken up again only by the same run."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distkgd.common.files import write_atomic
from distkgd.common.paths import check_folder
from distkgd.config.tree import read_yaml
from distkgd.data import anchored
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ownership import refuse_owned
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rendezvous import launch_agent, same_launch
from distkgd.errors import ConfigError
from distkgd.pipeline.config import resolved
from distkgd.pipeline.stages import Plan, Stage

HOLDS_A_RUN = "{folder} already holds a run; add --resume to go on with it, or choose another --out."
FREE_ON_RESUME = frozenset({"name", "device", "threads", "keep", "engine", "mlflow", "report", "storage"})
LOG = "run.log"
VERSION = 2  # of what a run folder holds; runs of before have none


def prepare_folder(
    run: Plan,
    ranks: Ranks,
    resume: bool,
    agents: Sequence[str],
    write: Callable[[], None] = lambda: None,
) -> None:
    """Write plan.yaml into the run folder, or check that one that is there is the same run, or one of fewer epochs.

    A folder that this very launch has made needs no `resume`: the ranks were started anew. agents: as `owned` has them.
    write: what the first rank puts there besides, before plan.yaml.
    """
    path, launch = run.folder / "plan.yaml", run.folder / "launch.json"
    exists, known = ranks.gather_objects((path.exists(), same_launch(launch, agents)))[0]
    if exists and not resume and not known:
        raise ConfigError(HOLDS_A_RUN.format(folder=run.folder))
    plan = {
        "version": VERSION,
        "config": resolved(run.config),
        "data_sha256": run.graph.identity,
        "stages": [described(stage) for stage in run.stages],
    }
    longer = ranks.gather_objects(exists and refuse_other_plan(path, plan))[0]

    def put() -> None:
        write()  # the data that `source` names, perhaps
        if agents:
            write_atomic(launch, json.dumps({"agents": list(agents)}, indent=2) + "\n")
        if not exists or longer:
            text = yaml.safe_dump(plan | {"source": anchored(run.config.data)}, sort_keys=False, allow_unicode=True)
            write_atomic(path, text)

    on_first(ranks, put)


def refuse_existing(folder: Path, resume: bool) -> None:
    """ConfigError when `folder` is one that `owned` or `prepare_folder` would refuse, before anything has cost time.

    Ranks that torchrun may have started anew are left to these.
    """
    if launch_agent() is not None:
        return
    check_folder(folder)
    refuse_owned(folder)
    if (folder / "plan.yaml").exists() and not resume:
        raise ConfigError(HOLDS_A_RUN.format(folder=folder))


def described(stage: Stage) -> dict[str, Any]:
    """A stage in plan.yaml."""
    plain: dict[str, Any] = {"name": stage.name, "teachers": list(stage.teachers)}
    if stage.choice is None:
        return plain | stage.config.model_dump(mode="json")
    configs = {name: config.model_dump(mode="json") for name, config in stage.choice.configs.items()}
    return plain | {"one_of": configs, "nearest_to_the_middle_of": list(stage.choice.between)}


def refuse_other_plan(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether the student has come to have more epochs than the plan.yaml of a run folder says.

    ConfigError when that folder was made by another plan; how it is run and watched may change.
    """
    try:
        before = read_yaml(path)
        old, new = dict(before["config"]), dict(plan["config"])
        kept = [key for key in new if key not in FREE_ON_RESUME]
        differing = [key for key in kept if old.get(key) != new[key]]
        # The student alone: who was taught by the others was taught by what they were.
        longer = differing == ["student"] and _more_epochs(old.get("student"), new["student"])
        changed = [] if longer else differing
        if before["data_sha256"] != plan["data_sha256"]:
            changed.append("the data or its split")
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); choose another --out.") from None
    if before.get("version") != plan["version"]:
        raise ConfigError(
            f"{path.parent} was made by an earlier version of distkgd: its models can be used, ranked and reported, "
            "but it cannot be resumed; choose another --out."
        )
    if changed:
        raise ConfigError(
            f"{path.parent} was made by another plan (differs in: {', '.join(changed)}); "
            "give the same config and overrides to resume it, or choose another --out."
        )
    return longer


def _more_epochs(old: Any, new: Any) -> bool:
    """Whether a stage is as it was, but for more epochs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return False
    return {**old, "epochs": new["epochs"]} == new and bool(old["epochs"] < new["epochs"])
