"""Graphs and known answers once per node."""

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distkgd.data.filters import KnownAnswers
from distkgd.data.triples import SPLITS, Graph, Vocabulary
from distkgd.distributed.node_sharing import share_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.errors import DataError


def shared_graph(ranks: Ranks, load: Callable[[], Graph]) -> Graph:
    """The graph that `load` reads on the lowest rank of each node. All ranks call it.

    An error of `load` is raised on every rank; so is a DataError where nodes have read different data.
    """
    if ranks.world == 1:
        return load()
    graph = _unpack(share_tensors(ranks, lambda: _pack(load())))
    digests = ranks.gather_objects(graph.identity)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise DataError(
                f"{graph.name}: the node of rank {rank} has other data (sha256 {digest}) than the node of rank 0 "
                f"({digests[0]}); give every node the same files"
            )
    return graph


def shared_answers(ranks: Ranks, triples: Sequence[Tensor], num_entities: int) -> KnownAnswers:
    """The known answers of all `triples` ([n, 3] each) on the ranks' device. All ranks call it.

    On CPUs they are sorted once per node and mapped; a GPU sorts its own copy in less time than it takes to fetch one.
    """
    device = ranks.device
    if device.type != "cpu":
        return KnownAnswers(torch.cat([part.to(device) for part in triples]), num_entities)
    found = share_tensors(ranks, lambda: KnownAnswers(torch.cat(list(triples)), num_entities).tensors)
    return KnownAnswers.from_tensors(found, num_entities)


def _pack(graph: Graph) -> dict[str, Tensor]:
    sizes = {"entities": graph.num_entities, "relations": graph.num_relations}
    about = json.dumps([graph.name, graph.sha256, graph.warnings, sizes]).encode()
    return {
        **{split: getattr(graph, split) for split in SPLITS},
        **{kind: getattr(graph, kind).pack() for kind in sizes},
        "about": torch.frombuffer(bytearray(about), dtype=torch.uint8),
    }


def _unpack(tensors: Mapping[str, Tensor]) -> Graph:
    name, sha256, warnings, sizes = json.loads(bytes(tensors["about"].tolist()))
    train, valid, test = (tensors[split] for split in SPLITS)
    entities, relations = (Vocabulary.unpack(tensors[kind], size) for kind, size in sizes.items())
    return Graph(name, train, valid, test, entities, relations, sha256, tuple(warnings))
