"""What `launch/evaluate.py` finds out about one model: metrics of a split, whole and in parts, and their table."""

from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from distkgd.evaluate import HITS, Filter, Ties, breakdown, metrics, protocol, ranks_of
from distkgd.graph import load_graph
from distkgd.graph.filters import KnownAnswers
from distkgd.graph.relations import relation_categories
from distkgd.model_folder import load_model, same_vocabulary

RELATIONS_SHOWN = 20


def evaluate_model(
    folder: Path,
    ranks: Ranks,
    *,
    split: str,
    source: str | None,
    ties: Ties = "realistic",
    filter_: Filter = "filtered",
) -> dict[str, Any]:
    """Everything about the model in `folder` on one split, ready for JSON; all ranks call it and get the same.

    source: name or folder of the data; None is what config.json says the model was trained on.

    Raises ModelError when the model's rows mean other entities or relations than the data's, DataError when there is
    nothing to rank.
    """
    loaded = load_model(folder, ranks)
    source = source or loaded.config.get("source")
    if not source:
        raise ConfigError(f"{folder} does not say what it was trained on; give --data NAME_OR_FOLDER.")
    graph = load_graph(source)
    same_vocabulary(loaded, graph, str(folder))
    triples = getattr(graph, split)
    if not len(triples):
        raise DataError(f"{graph.name} has no {split} triples to rank; choose another --split.")
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]).to(ranks.device), graph.num_entities)
    rank = ranks_of(loaded.model, triples.to(ranks.device), known, ranks, ties=ties, filter_=filter_)
    categories = relation_categories(graph.train, graph.num_relations)
    names = dict(enumerate(graph.relations.names.to_list()))
    return {
        "model": str(folder),
        "data": graph.summary(),
        "split": split,
        "protocol": protocol(ties, filter_),
        "world": ranks.world,
        "overall": metrics(rank) | {"num_triples": float(len(triples))},
        **breakdown(rank, triples, categories, names),
    }


def table(report: dict[str, Any]) -> Table:
    """The report for a terminal; of the relations, those with the most triples."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, caption_justify="left")
    drawn.add_column(f"{report['data']['name']} {report['split']}", overflow="fold")
    for title in ("triples", "MRR", *(f"H@{k}" for k in HITS), "mean rank"):
        drawn.add_column(title, justify="right", no_wrap=True)
    _add(drawn, "overall", report["overall"])
    by_count = sorted(report["relation"].items(), key=lambda item: (-item[1]["num_triples"], item[0]))
    sections = {
        "direction": [(f"{name} asked", row) for name, row in report["direction"].items()],
        "category": list(report["category"].items()),
        "relation": by_count[:RELATIONS_SHOWN],
    }
    for rows in sections.values():
        drawn.add_section()
        for name, row in rows:
            _add(drawn, name, {"num_triples": report["overall"]["num_triples"], **row})
    rules = ", ".join(f"{key}: {value}" for key, value in report["protocol"].items())
    lines = [f"Protocol: {rules}; world: {report['world']}."]
    if len(by_count) > RELATIONS_SHOWN:
        lines.append(f"{len(by_count) - RELATIONS_SHOWN} relations with fewer triples are not shown; --json has all.")
    drawn.caption = Text("\n" + "\n".join(lines), style="not italic")
    return drawn


def _add(drawn: Table, name: str, row: dict[str, float]) -> None:
    numbers = [f"{row['mrr']:.4f}", *(f"{row[f'hits_at_{k}']:.4f}" for k in HITS), f"{row['mean_rank']:,.1f}"]
    drawn.add_row(*map(Text, [name, f"{row['num_triples']:,.0f}", *numbers]))
