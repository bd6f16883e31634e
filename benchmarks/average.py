"""What finished models are worth together: weights of their averaged scores, found on the validation split.

python -m benchmarks.average RUN/stages/student OTHER/stages/student … [--data wn18rr] [--normalise none]

Coordinate search over weights in quarters: each round tries every weight's four others, in one pass over the split,
and ends where none is better. What it finds is `weights` and `normalise` of methods mulde and dualde.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from distkgd.data import Graph, load_graph
from distkgd.data.filters import KnownAnswers, both_sides
from distkgd.data.sampling import excluded_from_shared
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE
from distkgd.evaluation.ranking import fixed_entities, metrics, rank_of_counts, spread_of, thresholds
from distkgd.evaluation.soft_labels import averaged, scores_of
from distkgd.models.model import Model
from distkgd.models.model_folder import load_model, same_vocabulary

Weights = tuple[float, ...]
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIPLES_AT_ONCE = 64


@torch.no_grad()
def mrrs(
    models: Sequence[Model], graph: Graph, triples: Tensor, tried: Sequence[Weights], normalise: str
) -> dict[Weights, float]:
    """weights -> filtered MRR of the scores that these average, ranked as the package ranks."""
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    fixed = fixed_entities(graph.num_entities)
    ranks: dict[Weights, list[Tensor]] = {weights: [] for weights in tried}
    for start in range(0, len(triples), TRIPLES_AT_ONCE):
        queries = both_sides(triples[start : start + TRIPLES_AT_ONCE])
        left_out = excluded_from_shared(queries, None, 0, graph.num_entities, known)
        scores = [scores_of(model, queries).float() for model in models]
        for weights, found in ranks.items():
            z = averaged(scores, weights, normalise)
            own, spread = z.gather(1, queries.answer.unsqueeze(1)), spread_of(z[:, fixed]).unsqueeze(1)
            high, low = thresholds(own, spread)
            z[left_out] = MASKED_SCORE
            found.append(rank_of_counts((z > high).sum(1).double(), (z >= low).sum(1).double(), "realistic"))
    return {weights: metrics(torch.cat(found))["mrr"] or 0.0 for weights, found in ranks.items()}


def search(models: Sequence[Model], graph: Graph, normalise: str) -> dict[Weights, float]:
    """weights -> valid MRR of all that were tried, the best last."""
    n = len(models)
    waiting = [tuple(float(i == j) for j in range(n)) for i in range(n)] + [(1.0,) * n]
    seen: dict[Weights, float] = {}
    while waiting:
        before = max(seen.values(), default=0.0)
        seen |= mrrs(models, graph, graph.valid, waiting, normalise)
        best = max(seen, key=lambda weights: seen[weights])
        print(f"valid {seen[best]:.4f}: {list(best)}", flush=True)
        moves = [(*best[:i], w, *best[i + 1 :]) for i in range(n) for w in QUARTERS]
        waiting = [w for w in dict.fromkeys(moves) if sum(w) and w not in seen] if seen[best] > before else []
    return dict(sorted(seen.items(), key=lambda item: item[1]))


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished stages.")],
    data: Annotated[str | None, typer.Option(help="Default: what the first was trained on.")] = None,
    normalise: Annotated[str, typer.Option(help="zscore or none")] = "zscore",
) -> None:
    """Weights of the models' averaged scores, valid and test MRR, and the seconds of all together."""
    loaded = [load_model(folder, Ranks()) for folder in folders]
    graph = load_graph(data or str(loaded[0].config["source"]))
    for folder, one in zip(folders, loaded, strict=True):
        same_vocabulary(one, graph, folder)
    models = [one.model.widened() for one in loaded]
    seen = search(models, graph, normalise)
    weights = list(seen)[-1]
    test = mrrs(models, graph, graph.test, [weights], normalise)[weights]
    used = [folder for folder, weight in zip(folders, weights, strict=True) if weight]
    seconds = sum(json.loads((folder / "result.json").read_text(encoding="utf-8"))["seconds"] for folder in used)
    print(f"weights {list(weights)}, normalise {normalise}: valid {seen[weights]:.4f}, test {test:.4f}")
    print(f"{seconds:.0f} s of training and ranking of the {len(used)} models together")


if __name__ == "__main__":
    typer.run(main)
