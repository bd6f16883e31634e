"""The launcher's side of a plan on Ray: it starts the coordinator, shows what that says, and waits for its answer."""

import os
import time
import uuid
from importlib import import_module
from typing import Any

from distkgd.common.console import Display
from distkgd.common.paths import AnyPath, check_folder
from distkgd.common.stop_signal import listen_for_stop
from distkgd.distributed.ownership import refuse_owned
from distkgd.distributed.rendezvous import process_id
from distkgd.errors import DistkgdError, Stopped
from distkgd.pipeline.config import RunConfig, resolved
from distkgd.pipeline.ray.chain import Answer, Coordinator
from distkgd.pipeline.ray.session import ray_session
from distkgd.pipeline.ray.stage_scheduler import Options, Request
from distkgd.pipeline.ray.worker import Surroundings
from distkgd.pipeline.ray.worker_group import told
from distkgd.reporting.run_report import RunReport
from distkgd.tracking.mlflow_store import resolve_uri

POLL_SECONDS = 0.5
STOP_AGAIN_SECONDS = 5.0  # a coordinator that was started again has not heard it
SILENCE_SECONDS = 300.0  # of the coordinator, beyond what Ray needs to start it again elsewhere


class ChainError(DistkgdError):
    """A plan that could not be finished; the message names stage and cause."""


def run_chain(
    config: RunConfig,
    folder: AnyPath,
    *,
    resume: bool,
    address: str | None,
    options: Options,
    display: Display,
    free: frozenset[str] = frozenset(),
) -> RunReport:
    """The report of a plan whose stages are gangs of actors, on the cluster at `address` or on this machine.

    free: stages whose batches become smaller where the data does not fill them.
    Raises ChainError when the plan is refused or a stage could not be finished, Stopped after a signal.
    """
    folder = check_folder(folder)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not folder.is_absolute():
        display.warn(
            f"the run folder {folder} is in this job's copy of the working directory, which only this node sees and "
            "which goes with the job; give --out an absolute path on storage that all nodes share"
        )
    folder = folder.resolve()
    uri = resolve_uri(config.mlflow.uri, folder) if config.mlflow.enabled else None
    if config.storage and uri is not None and uri.startswith("sqlite"):
        display.warn(f"nodes that share no disk do not share {uri} either: give mlflow.uri the address of a server")
    refuse_owned(folder)
    launcher = f"{process_id()}/{uuid.uuid4().hex}"
    with ray_session(address, num_cpus=cpus_of_this_machine(options)) as session:
        grows = not session.local
        request = Request(resolved(config), folder, uri, resume, launcher, options, Surroundings(), grows, free)
        answer = answered(session.ray, request, display)
    if answer.signal_number:
        raise Stopped(answer.signal_number, "with a checkpoint of every stage that was running")
    if answer.report is None:
        raise ChainError(answer.text)
    return answer.report


def cpus_of_this_machine(options: Options) -> int:
    """For a session of our own; as many as one stage needs, if it was asked to have more than there are."""
    return max(len(os.sched_getaffinity(0)), options.cpus * max(options.workers, 1))


def answered(ray: Any, request: Request, display: Display) -> Answer:
    """What the coordinator answers; it is started again where it dies, and knows the run folder as its own."""
    strategies, retries = import_module("ray.util.scheduling_strategies"), request.options.retries
    here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(Coordinator).options(
        num_cpus=0, max_restarts=retries, max_task_retries=retries, max_concurrency=3, scheduling_strategy=here
    )
    coordinator = actor.remote(request)
    running, news = coordinator.run.remote(), coordinator.news.remote()
    heard, asked_at = time.monotonic(), -STOP_AGAIN_SECONDS
    with listen_for_stop() as stop:
        while not ray.wait([running], timeout=POLL_SECONDS)[0]:
            now = time.monotonic()
            if ray.wait([news], timeout=0)[0]:
                show(ray, news, display)
                news, heard = coordinator.news.remote(), now
            if now > heard + SILENCE_SECONDS:
                raise ChainError(f"the coordinator has given no sign of life for {SILENCE_SECONDS:g} s; use --resume.")
            if stop.signal_number and now > asked_at + STOP_AGAIN_SECONDS:
                coordinator.stop.remote(stop.signal_number)
                asked_at = now
    try:
        answer: Answer = ray.get(running)
    except ray.exceptions.RayActorError as error:
        raise ChainError(
            f"the coordinator died {retries + 1} times, at last: {told(error)} Use --resume: what is finished is kept."
        ) from error
    ray.wait([news], timeout=POLL_SECONDS)
    show(ray, news, display)
    show(ray, coordinator.news.remote(), display)
    return answer


def show(ray: Any, news: Any, display: Display) -> None:
    """The coordinator's lines, unless it died before it could tell them."""
    try:
        for line in ray.get(news, timeout=SILENCE_SECONDS):
            display.line(line)
    except ray.exceptions.RayActorError as error:
        display.line(f"the coordinator is started again: {told(error)}")
