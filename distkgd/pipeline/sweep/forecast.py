"""What a table will take, before it starts: a few measured steps of each of its stages."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from distkgd.common.console import Display
from distkgd.data import Graph, load_graph
from distkgd.distributed.ranks import join_ranks
from distkgd.pipeline.autoconfig.forecast import duration, forecast
from distkgd.pipeline.plan import checked_plan, open_run
from distkgd.pipeline.sweep.trials import Trial
from distkgd.tracking.tracker import NoTracking


def forecast_trials(trials: Sequence[Trial], display: Display) -> float:
    """Say what each row takes at the first seed, and return the seconds of all seeds, one trial after another.

    Stages are measured by `distkgd.pipeline.autoconfig.forecast` where this runs; a teacher is counted once, with the
    first row that it teaches. Nothing is written.
    """
    graphs: Callable[[str], Graph] = cache(load_graph)
    ranks = join_ranks("auto")
    seeds = len({trial.seed for trial in trials})
    taught: set[str] = set()
    total = 0.0
    for trial in (one for one in trials if one.seed == trials[0].seed):
        teachers = {name: one.digest for name, one in trial.teachers().items()}
        plan = checked_plan(trial.config, graphs(trial.config.data), Path(), ranks.world, trial.plan(trial.config))
        new = [stage for stage in plan.stages if teachers.get(stage.name) not in taught]
        seconds = sum(one.seconds for one in forecast(open_run(plan, ranks, NoTracking(), Display(False)), new))
        taught.update(teachers.values())
        total += seconds
        display.line(
            f"{trial.name.rpartition(', seed')[0]}: {', '.join(s.name for s in new)}; about {duration(seconds)}"
        )
    display.line(
        f"in all about {duration(total * seeds)} ({seeds} seeds, {len(trials)} trials, one after another, here)"
    )
    return total * seeds
