"""How quickly registered models answer over HTTP: latency with one client, throughput with several.

Server and clients share the machine. Each client keeps its connection and sends its next question when it has the last
answer; questions are drawn at random from the model's own names.
"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from distkgd.common.provenance import machine
from distkgd.distributed.ranks import Ranks
from distkgd.models.model_folder import load_model
from distkgd.tracking.serving.entries import Entry
from distkgd.tracking.serving.server import ServerError, ask, connect, serving

CLIENTS, SECONDS, WARM_UP, MOST = 4, 5.0, 20, 2000
K = 10


def measure(entries: Sequence[Entry], uris: Sequence[str], store: str, seconds: float = SECONDS) -> dict[str, Any]:
    """{"machine": …, "rows": one per model: p50_ms, p99_ms and per_second, beside what the model is}.

    uris: of the entries' models, such as models:/NAME/1. seconds: for each of the two measurements of a model.
    """
    rows = []
    for entry, uri in zip(entries, uris, strict=True):
        questions = _questions(entry.folder)
        with serving(uri, store) as port:
            _asked(port, questions[:WARM_UP], seconds=60.0)
            found = sorted(_asked(port, questions, seconds))
            start = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as clients:
                parts = [questions[i::CLIENTS] * CLIENTS for i in range(CLIENTS)]
                num = sum(len(part) for part in clients.map(lambda part: _asked(port, part, seconds), parts))
            per_second = num / (time.perf_counter() - start)
        row = {"stage": entry.stage, "alias": entry.alias, "dim": entry.dim, "bytes": entry.num_bytes, "k": K}
        row |= {"p50_ms": 1e3 * statistics.median(found), "p99_ms": 1e3 * found[int(0.99 * len(found))]}
        rows.append(row | {"requests": len(found), "clients": CLIENTS, "per_second": per_second})
    return {"machine": machine(), "rows": rows}


def _questions(folder: Path) -> list[dict[str, Any]]:
    loaded, random = load_model(folder, Ranks()), Random(0)
    heads, relations = len(loaded.entities), len(loaded.relations)
    drawn = [(random.randrange(heads), random.randrange(relations)) for _ in range(MOST)]
    return [{"head": loaded.entities.name(h), "relation": loaded.relations.name(r), "k": K} for h, r in drawn]


def _asked(port: int, questions: Sequence[dict[str, Any]], seconds: float) -> list[float]:
    """Seconds of each answer, until the questions or the time are used up."""
    connection, taken = connect(port), []
    try:
        end = time.perf_counter() + seconds
        for question in questions:
            start = time.perf_counter()
            status, answer = ask(connection, [question])
            stop = time.perf_counter()
            if status != 200:
                raise ServerError(f"{question} was answered with status {status}: {answer}")
            taken.append(stop - start)
            if stop > end:
                break
    finally:
        connection.close()
    return taken
