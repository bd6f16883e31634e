"""A plan on Ray: one coordinator actor walks its stages, each of them a gang of actors
(`distkgd.pipeline.ray.worker_group`).

The run folder holds all that is known: whoever dies, the next one reads there what is finished and where to go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Event

from distkgd.common.console import Display
from distkgd.data import load_graph
from distkgd.distributed.ownership import owned
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError, Stopped
from distkgd.pipeline.autoconfig.rules import fitted
from distkgd.pipeline.config import parse_config, resolved
from distkgd.pipeline.plan import checked_plan, leave_reports, make_report, opened, tags_of
from distkgd.pipeline.ray.session import import_ray
from distkgd.pipeline.ray.stage_scheduler import Request, StageScheduler
from distkgd.pipeline.ray.worker_group import Slot, dissolve
from distkgd.pipeline.run_folder import LOG
from distkgd.reporting.run_report import RunReport


@dataclass(frozen=True)
class Answer:
    """How the plan ended: with a report, by a signal, or (text) why it did not come to its end."""

    report: RunReport | None = None
    text: str = ""
    signal_number: int = 0


class Coordinator:
    """Walks the stages of a plan. `news` and `stop` are called while `run` runs, in other threads."""

    def __init__(self, request: Request) -> None:
        request.surroundings.enter()
        self._request = request
        self._stop = Event()
        self._signal_number = 0
        self._news: list[str] = []
        self._log = Display(False)  # what is said is shown by the driver

    def __repr__(self) -> str:
        return "coordinator"

    def news(self) -> list[str]:
        """Lines for the user since the last call."""
        lines, self._news = self._news, []
        return lines

    def stop(self, signal_number: int) -> None:
        """Let all stages write a checkpoint and end."""
        self._signal_number = signal_number
        self._stop.set()

    def run(self) -> Answer:
        """Every stage that is not finished, and the report. Errors meant for the user are told, not raised."""
        try:
            return Answer(self._run())
        except Stopped as stopped:
            return Answer(signal_number=stopped.signal_number)
        except DistkgdError as error:
            return Answer(text=str(error))

    def _run(self) -> RunReport:
        request, options = self._request, self._request.options
        dissolve(import_ray(), request.launcher)
        config, folder = parse_config(request.config, "the plan"), request.folder
        graph = load_graph(config.data)
        config, changes = fitted(config, len(graph.train), request.free)
        request = replace(request, config=resolved(config))
        for warning in (*graph.warnings, *changes):
            self._say(f"warning: {warning}")
        plan = checked_plan(config, graph, folder, world=1)
        device = pick(config.device, import_ray().cluster_resources(), request.grows)
        if config.device == "auto" and device == "cpu" and request.grows:
            self._say("device auto: the cluster has no GPU now, so CPUs train; device=cuda would wait for one")
        slot = Slot(options.cpus, 1.0 if device == "cuda" else 0.0)
        tags, say = tags_of(config, options.workers or "shared", device) | {"launcher": "ray"}, self._say
        # A coordinator that was started again on another node has not this launch's folder, but its storage.
        again = config.storage and import_ray().get_runtime_context().was_current_actor_reconstructed
        resume = request.resume or bool(again)
        with (
            owned(folder, Ranks(), say, request.launcher) as agents,
            opened(plan, Ranks(), resume, agents, tags, say, request.uri) as tracking,
            self._log.kept(folder / LOG, 0),
        ):
            walk = StageScheduler(request, plan, device, slot, self._stop, say)
            results, timeline = walk.run(lambda: self._signal_number), walk.timeline
            report = make_report(plan, results, timeline.worlds(), device, timeline=timeline.events)
            report = report.model_copy(update={"remarks": (*report.remarks, timeline.sentence())})
            leave_reports(plan, report, tracking, say)
        return report

    def _say(self, text: str) -> None:
        self._log.line(text)
        self._news.append(text)


def pick(name: str, resources: Mapping[str, float], grows: bool = False) -> str:
    """`auto`, `cpu` or `cuda` as the device of all workers; ConfigError where there is no GPU, nor can be."""
    has = resources.get("GPU", 0.0) >= 1
    if name == "cuda" and not has and not grows:
        raise ConfigError("device=cuda was asked for, but this machine has no GPU; use device=cpu or device=auto.")
    return "cuda" if name == "cuda" or (has and name == "auto") else "cpu"
