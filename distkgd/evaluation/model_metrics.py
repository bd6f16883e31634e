"""What `distkgd evaluate` finds out about one model: metrics of a split, whole and in parts, and their table."""

from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from distkgd.common.paths import AnyPath
from distkgd.common.text import NONE, count_text, fixed
from distkgd.data import load_graph
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError
from distkgd.evaluation.breakdowns import RARE_BELOW, in_parts
from distkgd.evaluation.ranking import HITS, Filter, Ties, metrics, protocol, ranks_and_ties_of
from distkgd.models.model_folder import data_since, distinct_rows, load_model, same_vocabulary
from distkgd.models.remote import local_model

RELATIONS_SHOWN = 20


def evaluate_model(
    folder: AnyPath,
    ranks: Ranks,
    *,
    split: str,
    source: str | None,
    ties: Ties = "realistic",
    filter_: Filter = "filtered",
    rare_below: int = RARE_BELOW,
    query_bits: int = 32,
) -> dict[str, Any]:
    """Everything about the model in `folder` on one split, ready for JSON; all ranks call it and get the same.

    folder: or hf://OWNER/NAME. source: name or folder of the data; None is what config.json says the model was trained
    on. rare_below: relations with fewer training triples are the long tail. query_bits: 8 rounds queries to it.

    Raises ModelError when the model's rows mean other entities or relations than the data's, DataError when there is
    nothing to rank.
    """
    loaded = load_model(local_model(folder), ranks)
    model = loaded.model.in_query_bits(query_bits)
    source = loaded.config.get("source") if source is None else source
    if source is None:
        raise ConfigError(f"{folder} does not say what it was trained on; give --data NAME_OR_FOLDER.")
    graph = load_graph(source)
    same_vocabulary(loaded, graph, str(folder))
    triples = getattr(graph, split)
    if not len(triples):
        raise DataError(f"{graph.name} has no {split} triples to rank; choose another split.")
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]).to(ranks.device), graph.num_entities)
    since = data_since(loaded, graph)
    rank, tied = ranks_and_ties_of(model, triples.to(ranks.device), known, ranks, ties=ties, filter_=filter_)
    few_bits = loaded.config.get("packed", {}).get("entity", {}).get("bits", 32) < 32
    return {
        "model": str(folder),
        "data": graph.summary(),
        **({"warnings": [f"{since}; these are figures of the data as it is now"]} if since else {}),
        **({"remarks": [f"Data: {one}." for one in graph.warnings]} if graph.warnings else {}),
        "split": split,
        "protocol": protocol(ties, filter_) | ({} if query_bits == 32 else {"query_bits": query_bits}),
        "world": ranks.world,
        **({"distinct_rows": distinct_rows(loaded.model)} if few_bits else {}),
        "overall": metrics(rank, tied if few_bits else None) | {"num_triples": float(len(triples))},
        **in_parts(rank, triples, graph, rare_below),
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
        "relation_frequency": [
            (f"relations of {name} triples", row)
            for name, row in report["relation_frequency"].items()
            if row["num_triples"]
        ],
        "answer_degree": [(f"answers of degree {name}", row) for name, row in report["answer_degree"].items()],
        "relation": by_count[:RELATIONS_SHOWN],
    }
    for section, rows in sections.items():
        drawn.add_section()
        for name, row in rows:
            _add(drawn, name, row if section == "answer_degree" else report["overall"] | row)
    rules = ", ".join(f"{key}: {value}" for key, value in report["protocol"].items())
    lines = [f"Protocol: {rules}; world: {report['world']}.", *report.get("remarks", [])]
    if "distinct_rows" in report:
        entities = count_text(report["data"]["num_entities"])
        rows_text = f"{count_text(report['distinct_rows'])} distinct rows of {entities} entities"
        lines.append(f"Few bits: {rows_text}; {100 * report['overall']['tied']:.1f}% of the answers are tied.")
    if len(by_count) > RELATIONS_SHOWN:
        lines.append(f"{len(by_count) - RELATIONS_SHOWN} relations with fewer triples are not shown; --json has all.")
    drawn.caption = Text("\n" + "\n".join(lines), style="not italic")
    return drawn


def _add(drawn: Table, name: str, row: dict[str, Any]) -> None:
    mean = NONE if row["mean_rank"] is None else f"{row['mean_rank']:,.1f}"
    numbers = [fixed(row["mrr"], 4), *(fixed(row[f"hits_at_{k}"], 4) for k in HITS), mean]
    # A triple is two queries, each with an answer of its own: one query is half a triple.
    triples = f"{row['num_triples']:,.0f}" if "num_triples" in row else f"{row['num_queries'] / 2:,.1f}"
    drawn.add_row(*map(Text, [name, triples, *numbers]))
