"""What two models of a run answer to a sample of its last split's queries, asked once and kept in `examples.json`.

The sample, its ranks and scores, and the twenty questions that are shown in words: ten on which the student agrees
with the teacher, ten on which it falls furthest behind.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distkgd.common.files import write_atomic
from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import KnownAnswers, Queries, both_sides
from distkgd.errors import DataError, ModelError
from distkgd.evaluation.ranking import metrics
from distkgd.models.export.source import Source, open_source
from distkgd.models.model_folder import find_model, read_json, sha256_of
from distkgd.reporting.html.ask import Asked, ask
from distkgd.reporting.html.pairs import Pair, Speaker
from distkgd.reporting.run_report import RunReport

FILE = "examples.json"
FORMAT = "distkgd-examples/1"
SEED = 0
NUMBERS = 4e9  # products of a query's number and a candidate's, of both models, beyond which fewer queries are asked
LEAST = 40
SHOWN = 10  # examples of each kind
ANSWERS = 3  # of each model to an example
PER_RELATION = 2  # examples of a kind, while there are others
TRIPLES_AT_ONCE = 1 << 20


def examples(folder: Path, report: RunReport, load: Callable[[], Graph], pair: Pair, queries: int) -> dict[str, Any]:
    """The content of `examples.json` of a run folder: as it is there, or asked now.

    load: the run's graph, wanted only if the file is not there or is of other models. queries: how many are asked, of
        large tables fewer.

    Raises ModelError or DataError where the models cannot be asked.
    """
    split = report.shown_split
    speakers = {"teacher": pair.teacher, "student": pair.student}
    about: dict[str, Any] = {
        "format": FORMAT,
        "data": report.data.sha256,
        "protocol": report.protocol,
        "split": split,
        "models": {role: _identity(speaker) for role, speaker in speakers.items()},
        "seed": SEED,
        "asked_for": queries,
    }
    kept = _kept(folder / FILE)
    if kept is not None and all(kept.get(key) == value for key, value in about.items()):
        return kept
    graph = load()
    if graph.sha256 != about["data"]:
        raise DataError(
            f"{graph.name} is not what it was when the run was made: its sha256 differs "
            f"({graph.sha256[:12]}, then {about['data'][:12]})"
        )
    started = time.perf_counter()
    found = about | _asked(getattr(graph, split), graph, speakers, about["protocol"], queries)
    found["seconds"] = time.perf_counter() - started
    write_atomic(folder / FILE, json.dumps(found, ensure_ascii=False) + "\n")
    return found


def _identity(speaker: Speaker) -> dict[str, Any]:
    config = find_model(speaker.folder) / "config.json"
    return {"name": speaker.name, "dim": speaker.dim, "config_sha256": sha256_of(config)}


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except ModelError:  # it is not there, or damaged: it can be made again
        return None


def _asked(
    triples: Tensor, graph: Graph, speakers: Mapping[str, Speaker], protocol: Mapping[str, Any], queries: int
) -> dict[str, Any]:
    sources = {role: _source(speaker) for role, speaker in speakers.items()}
    for role, source in sources.items():
        if source.entity.shape[0] != graph.num_entities:
            raise ModelError(f"{speakers[role].name} has {source.entity.shape[0]} entities, not {graph.num_entities}")
    cost = graph.num_entities * sum(source.scorer.dim for source in sources.values())
    number = min(queries, max(LEAST, int(NUMBERS / cost)))
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(triples), generator=generator)
    sample = both_sides(triples[order[: -(-number // 2)]])
    other = torch.randint(graph.num_entities, (len(sample.anchor),), generator=generator)
    known = _known(graph, sample) if protocol["filter"] == "filtered" else None
    said = {
        role: ask(source, sample, other, known, ties=protocol["ties"], k=min(ANSWERS, graph.num_entities))
        for role, source in sources.items()
    }
    teacher, student = said["teacher"], said["student"]
    points = [
        [*map(_short, pair), kind]
        for kind, pairs in (
            (1, zip(teacher.own.tolist(), student.own.tolist(), strict=True)),
            (0, zip(teacher.other.tolist(), student.other.tolist(), strict=True)),
        )
        for pair in pairs
    ]
    return {
        "queries": len(sample.anchor),
        "num_split": 2 * len(triples),
        "same_first": _share(teacher.ids[:, :1] == student.ids[:, :1]),
        "correlation": _correlation(teacher.own, student.own),
        "mrr": {role: metrics(one.rank)["mrr"] for role, one in said.items()},
        "ranks": [list(pair) for pair in zip(teacher.rank.tolist(), student.rank.tolist(), strict=True)],
        "points": points,
        "examples": _examples(sample, teacher, student, graph),
    }


def _source(speaker: Speaker) -> Source:
    source = open_source(speaker.folder)
    return source if speaker.dim is None else source.crop(speaker.dim)


def _known(graph: Graph, queries: Queries) -> KnownAnswers:
    """The answers of these queries in all splits, found without an index of everything."""
    num = graph.num_relations
    keys = queries.anchor * num + queries.relation
    tails, heads = keys[queries.side == 0].unique(), keys[queries.side == 1].unique()
    found = []
    for split in (graph.train, graph.valid, graph.test):
        for part in split.split(TRIPLES_AT_ONCE):
            head, relation, tail = part.unbind(1)
            here = torch.isin(head * num + relation, tails) | torch.isin(tail * num + relation, heads)
            found.append(part[here])
    return KnownAnswers(torch.cat(found), graph.num_entities)


def _examples(queries: Queries, teacher: Asked, student: Asked, graph: Graph) -> list[dict[str, Any]]:
    ours, theirs = student.rank.tolist(), teacher.rank.tolist()
    same = (teacher.ids[:, 0] == student.ids[:, 0]).tolist() if teacher.ids.shape[1] else [False] * len(ours)
    relations = queries.relation.tolist()
    right = [i for i, one in enumerate(same) if one and ours[i] == 1 and theirs[i] == 1]
    wrong = [i for i, one in enumerate(same) if one and i not in set(right)]
    agree = (_spread(right, relations) + _spread(wrong, relations))[:SHOWN]
    behind = [i for i in range(len(ours)) if theirs[i] <= 10 and ours[i] > theirs[i]]
    behind.sort(key=lambda i: (1 / ours[i] - 1 / theirs[i], -ours[i], i))
    fails = _spread(behind, relations)[:SHOWN]
    chosen = [("agrees", i) for i in agree] + [("fails", i) for i in fails]

    def told(i: int) -> dict[str, Any]:
        answer = int(queries.answer[i])
        return {
            "asks": "tail" if int(queries.side[i]) == 0 else "head",
            "given": _word(graph.entities, int(queries.anchor[i])),
            "relation": _word(graph.relations, int(queries.relation[i])),
            "answer": _word(graph.entities, answer),
            "teacher": _answers(teacher, i, answer, graph.entities),
            "student": _answers(student, i, answer, graph.entities),
        }

    return [{"kind": kind} | told(i) for kind, i in chosen]


def _spread(order: Sequence[int], relations: Sequence[int]) -> list[int]:
    """The same in order; last those beyond a few of one relation, and the second question of a triple."""
    relation: Counter[int] = Counter()
    triples: set[int] = set()
    first: list[int] = []
    later: list[int] = []
    for i in order:
        if i // 2 not in triples and relation[relations[i]] < PER_RELATION:
            relation[relations[i]] += 1
            triples.add(i // 2)
            first.append(i)
        else:
            later.append(i)
    return first + later


def _answers(asked: Asked, i: int, answer: int, entities: Vocabulary) -> dict[str, Any]:
    found = zip(asked.ids[i].tolist(), asked.scores[i].tolist(), strict=True)
    top = [_word(entities, id_) | {"score": _short(z), "right": id_ == answer} for id_, z in found if z > -torch.inf]
    return {"rank": float(asked.rank[i]), "top": top}


def _word(vocabulary: Vocabulary, row: int) -> dict[str, str]:
    return {"name": vocabulary.name(row), "label": vocabulary.label(row)}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _share(found: Tensor) -> float | None:
    return float(found.double().mean()) if found.numel() else None


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's, None where a side does not vary."""
    found = torch.corrcoef(torch.stack([x, y]).double())[0, 1] if len(x) > 1 else torch.tensor(torch.nan)
    return float(found) if found.isfinite() else None
