"""Models of other libraries: their own formulas, written out here, against the scores of what was imported."""

import gzip
import importlib
import json
import math
import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

import distkgd
from distkgd.data import Graph
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError, ModelError, UnsupportedError
from distkgd.models.export import export_model
from distkgd.models.importers import IMPORTERS, Given, import_model, writing
from distkgd.models.importers.foreign import Foreign, open_array
from distkgd.models.model_folder import load_model, save_model
from distkgd.pipeline.foreign_reports import seen_held_out
from distkgd.scorers import SCORERS, build_scorer
from tests.jobs import toy_model
from tests.launches import ROOT
from tests.ranks import run_on_ranks
from tests.toys import toy_graph

ENTITIES, RELATIONS, HIDDEN, GAMMA = 30, 4, 6, 7.5
Array = Any


@pytest.fixture(scope="module")
def graph() -> Graph:
    return toy_graph(ENTITIES, RELATIONS, 300)


def random_rows(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_names(folder: Path, entities: str, relations: str, order: list[int] | None = None) -> None:
    """Names e000 …, r000 … as `id<TAB>name`, row i being entity order[i]."""
    folder.mkdir(parents=True, exist_ok=True)
    order = order or list(range(ENTITIES))
    (folder / entities).write_text("".join(f"{i}\te{order[i]:03d}\n" for i in range(ENTITIES)))
    (folder / relations).write_text("".join(f"{i}\tr{i:03d}\n" for i in range(RELATIONS)))


def all_triples() -> list[tuple[int, int, int]]:
    return [(h, r, (7 * h + 3 * r + 1) % ENTITIES) for h in range(ENTITIES) for r in range(RELATIONS)]


def same_scores(folder: Path, theirs: Callable[[int, int, int], float], ask: Any = "tail") -> None:
    """The scores of the model in `folder` are those of the other library's formula, to 1e-5."""
    triples = all_triples()
    ours = distkgd.load(folder).score(triples, ask=ask, ids=True)
    wanted = torch.tensor([theirs(*triple) for triple in triples], dtype=torch.float64)
    assert wanted.std() > 0.05
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


def halves(row: Array) -> tuple[Array, Array]:
    return tuple(np.split(row.astype(np.float64), 2))  # type: ignore[return-value]


def formula(name: str, h: Array, r: Array, t: Array, gamma: float, norm: int, turn: float) -> float:
    """Complex numbers in halves; `turn` makes a phase of what stands in a relation."""
    h, r, t = (x.astype(np.float64) for x in (h, r, t))
    if name == "transe":
        return gamma - float((np.abs(h + r - t) ** norm).sum() ** (1 / norm))
    if name == "distmult":
        return float((h * r * t).sum())
    if name == "rescal":
        return float(h @ r.reshape(len(h), len(h)) @ t)
    (a, b), (c, d) = halves(h), halves(t)
    if name == "rotate":
        apart = (a + 1j * b) * np.exp(1j * turn * r) - (c + 1j * d)
        return gamma - float((np.abs(apart) ** norm).sum() ** (1 / norm))
    if name == "cp":
        return float((a * r * d).sum())
    forth, back = halves(r)
    simple, product = a * forth * d + c * back * b, (a + 1j * b) * (forth + 1j * back) * (c - 1j * d)
    return float(simple.sum()) / 2 if name == "simple" else float(product.sum().real)


WIDTHS = {"transe": (1, 1), "distmult": (1, 1), "complex": (2, 2), "rotate": (2, 1), "simple": (2, 2), "cp": (2, 1)}


def tables(name: str, rows: int = RELATIONS) -> tuple[Array, Array]:
    if name == "rescal":
        return random_rows(ENTITIES, HIDDEN), random_rows(rows, HIDDEN**2, seed=1)
    entity, relation = WIDTHS[name]
    return random_rows(ENTITIES, entity * HIDDEN), random_rows(rows, relation * HIDDEN, seed=1)


def bring(source: str, out: Path, given: Given | None = None, graph: Graph | None = None) -> list[str]:
    return import_model(source, out, given or Given(), Ranks(), graph, "toy")[1]


# -- RotatE's authors -------------------------------------------------------------------------------------------------


def rotate_folder(folder: Path, model: str, name: str) -> tuple[Array, Array]:
    entity, relation = tables(name)
    folder.mkdir()
    np.save(folder / "entity_embedding.npy", entity)
    np.save(folder / "relation_embedding.npy", relation)
    write_names(folder / "data", "entities.dict", "relations.dict")
    config = {
        "model": model,
        "gamma": GAMMA,
        "hidden_dim": HIDDEN,
        "data_path": str(folder / "data"),
        "countries": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return entity, relation


@pytest.mark.parametrize("model", ["TransE", "DistMult", "ComplEx", "RotatE"])
def test_models_of_rotates_authors_score_alike(model: str, tmp_path: Path) -> None:
    name = model.lower()
    entity, relation = rotate_folder(tmp_path / "theirs", model, name)
    bring(f"rotate:{tmp_path / 'theirs'}", tmp_path / "out")
    turn = math.pi / ((GAMMA + 2) / HIDDEN)
    same_scores(tmp_path / "out", lambda h, r, t: formula(name, entity[h], relation[r], entity[t], GAMMA, 1, turn))


def test_a_model_that_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    rotate_folder(tmp_path / "theirs", "pRotatE", "distmult")
    with pytest.raises(UnsupportedError, match="pRotatE has no counterpart"):
        bring(f"rotate:{tmp_path / 'theirs'}", tmp_path / "out")


# -- DGL-KE -----------------------------------------------------------------------------------------------------------

DGLKE = {"TransE_l1": "transe", "TransE_l2": "transe", "TransE": "transe", "DistMult": "distmult", "ComplEx": "complex"}
DGLKE |= {"RESCAL": "rescal", "RotatE": "rotate", "SimplE": "simple"}


@pytest.mark.parametrize("model", DGLKE)
def test_models_of_dglke_score_alike(model: str, tmp_path: Path) -> None:
    name = DGLKE[model]
    entity, relation = tables(name)
    write_names(tmp_path / "theirs", "entities.tsv", "relations.tsv")
    np.save(tmp_path / f"theirs/wn18_{model}_entity.npy", entity)
    np.save(tmp_path / f"theirs/wn18_{model}_relation.npy", relation)
    config = {"model_name": model, "gamma": GAMMA, "hidden_dim": HIDDEN, "dataset": "wn18"}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    bring(f"dglke:{tmp_path / 'theirs'}", tmp_path / "out")
    norm = 2 if model in ("TransE", "TransE_l2") else 1
    turn = math.pi / ((GAMMA + 2) / HIDDEN)
    same_scores(tmp_path / "out", lambda h, r, t: formula(name, entity[h], relation[r], entity[t], GAMMA, norm, turn))


@pytest.mark.parametrize(
    ("said", "lacks"),
    [
        ({"model_name": "TransE_l1", "model": "nonsense", "hidden_dim": None, "emb_size": HIDDEN}, None),
        ({"model": "TransE_l1", "hidden_dim": HIDDEN, "emb_size": 9}, None),
        ({"hidden_dim": HIDDEN}, "'model'"),
        ({"model_name": "TransE_l1"}, "'emb_size'"),
        ({"model_name": "TransE_l1", "hidden_dim": None}, "'emb_size'"),
    ],
)
def test_both_spellings_of_dglke_are_read_and_what_is_missing_is_named(
    said: dict[str, Any], lacks: str | None, tmp_path: Path
) -> None:
    entity, relation = tables("transe")
    write_names(tmp_path / "theirs", "entities.tsv", "relations.tsv")
    np.save(tmp_path / "theirs/x_entity.npy", entity)
    np.save(tmp_path / "theirs/x_relation.npy", relation)
    (tmp_path / "theirs/config.json").write_text(json.dumps(said | {"gamma": GAMMA}))
    if lacks is not None:
        with pytest.raises(ModelError, match=f"lacks {lacks}; it must say model_name, hidden_dim and gamma"):
            bring(f"dglke:{tmp_path / 'theirs'}", tmp_path / "out")
        return
    bring(f"dglke:{tmp_path / 'theirs'}", tmp_path / "out")
    same_scores(tmp_path / "out", lambda h, r, t: formula("transe", entity[h], relation[r], entity[t], GAMMA, 1, 1.0))


# -- LibKGE -----------------------------------------------------------------------------------------------------------


def libkge_file(
    path: Path, name: str, *, reciprocal: bool, norm: float, package: bool, more: int = 0
) -> tuple[Array, Array]:
    """A checkpoint as LibKGE's jobs and `kge package` write one, its configuration an object of LibKGE's class.

    more: rows of relations that do not belong there.
    """
    entity, relation = tables(name, (2 * RELATIONS if reciprocal else RELATIONS) + more)
    options: dict[str, Any] = {name: {"class_name": name, "l_norm": norm}, "model": name, "train": {"type": "KvsAll"}}
    if reciprocal:
        options |= {"model": "reciprocal_relations_model", "reciprocal_relations_model": {"base_model": {"type": name}}}
    state = {
        f"{model}_{table}_embedder._embeddings.weight": torch.from_numpy(rows)
        for model in ("", "_base_model.")[: 1 + reciprocal]
        for table, rows in (("entity", entity), ("relation", relation))
    }
    module = types.ModuleType("kge.config")
    module.Config = type("Config", (), {"__module__": "kge.config"})  # type: ignore[attr-defined]
    config = module.Config()  # type: ignore[attr-defined]
    config.options, config.folder, config.log_folder = options, "local/experiments/x", None
    checkpoint: dict[str, Any] = {
        "type": "train",
        "model": (state, {}),
        "config": config,
        "epoch": 3,
        "valid_trace": [],
    }
    if package:
        names = {
            "entity_ids": [f"e{i:03d}" for i in range(ENTITIES)],
            "relation_ids": [f"r{i:03d}" for i in range(RELATIONS)],
        }
        checkpoint["dataset"] = {"dataset.num_entities": ENTITIES, "dataset.meta": names}
    else:
        write_names(path.parent, "entity_ids.del", "relation_ids.del")
    sys.modules |= {"kge": types.ModuleType("kge"), "kge.config": module}
    try:
        torch.save(checkpoint, path)
    finally:
        del sys.modules["kge.config"], sys.modules["kge"]
    return entity, relation


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((name, 1.0) for name in ("complex", "distmult", "rescal", "transe", "rotate", "cp", "simple")),
        ("transe", 2.0),
        ("rotate", 2.0),
    ],
)
def test_checkpoints_of_libkge_score_alike_and_run_nothing(
    name: str, norm: float, reciprocal: bool, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint_best.pt"
    entity, relation = libkge_file(path, name, reciprocal=reciprocal, norm=norm, package=reciprocal)
    bring(f"libkge:{path}", tmp_path / "out")

    def theirs(h: int, r: int, t: int) -> float:
        return formula(name, entity[h], relation[r], entity[t], 0.0, int(norm), 1.0)

    same_scores(tmp_path / "out", theirs)
    if reciprocal:  # LibKGE's inverse of p is p + number of relations
        same_scores(tmp_path / "out", lambda h, r, t: theirs(t, r + RELATIONS, h), ask="head")


def test_an_odd_number_of_relations_with_inverse_ones_is_refused(tmp_path: Path) -> None:
    told = rf"{2 * RELATIONS + 1} rows do not fit {RELATIONS} relations with two rows each, the inverse ones last"
    libkge_file(tmp_path / "theirs.pt", "distmult", reciprocal=True, norm=1.0, package=True, more=1)
    with pytest.raises(ModelError, match=rf"theirs\.pt: {told}"):
        bring(f"libkge:{tmp_path / 'theirs.pt'}", tmp_path / "out")
    plain_folder(tmp_path / "theirs", list(range(ENTITIES)))
    np.save(tmp_path / "theirs/relation.npy", random_rows(2 * RELATIONS + 1, HIDDEN))
    (tmp_path / "theirs/config.json").write_text(json.dumps({"reciprocal": True}))
    with pytest.raises(ModelError, match=rf"relation\.npy: {told}"):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"))
    assert not (tmp_path / "out").exists()


class Bomb:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("kind", "scorer"), [("libkge", None), ("pykeen", "complex")])
def test_a_file_that_would_run_something_is_refused_and_not_run(kind: str, scorer: str | None, tmp_path: Path) -> None:
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "state_dict.pt")
    with pytest.raises(ModelError, match=r"state_dict.pt holds more than tensors"):
        bring(f"{kind}:{tmp_path / 'state_dict.pt'}", tmp_path / "out", Given(scorer=scorer))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


# -- plain tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("name", ["complex", "rotate", "simple", "cp", "transe"])
def test_plain_tables_are_read_in_both_layouts(name: str, suffix: str, layout: Any, tmp_path: Path) -> None:
    entity, relation = tables(name)
    write_names(tmp_path / "theirs", "entities.tsv", "relations.tsv")

    def laid(rows: Array, width: int) -> Array:
        if layout == "halves" or width == 1:
            return rows
        return np.stack(np.split(rows, 2, axis=1), axis=2).reshape(rows.shape)

    found = {"entity": laid(entity, WIDTHS[name][0]), "relation": laid(relation, WIDTHS[name][1])}
    for kind, rows in found.items():
        path = tmp_path / "theirs" / f"{kind}.{suffix}"
        np.save(path, rows) if suffix == "npy" else save_file({"whatever": rows}, path)
    norms = {"margin": 3.0, "norm": 2} if name in ("transe", "rotate") else {}
    bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer=name, layout=layout, **norms))  # type: ignore[arg-type]
    gamma, norm = (3.0, 2) if norms else (0.0, 1)
    same_scores(tmp_path / "out", lambda h, r, t: formula(name, entity[h], relation[r], entity[t], gamma, norm, 1.0))


@pytest.mark.parametrize("name", ["complex", "rotate", "simple", "cp", "pairre"])
def test_pairs_of_numbers_are_not_guessed_at(name: str, tmp_path: Path) -> None:
    write_names(tmp_path / "theirs", "entities.tsv", "relations.tsv")
    entity, relation = (random_rows(rows, width, seed=rows) for rows, width in ((ENTITIES, 12), (RELATIONS, 12)))
    np.save(tmp_path / "theirs/entity.npy", entity)
    np.save(tmp_path / "theirs/relation.npy", relation)
    with pytest.raises(ConfigError, match=r"do not say how they lie.*--layout interleaved.*--layout halves"):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer=name))
    assert not (tmp_path / "out").exists()


def test_what_nothing_can_check_is_said(tmp_path: Path) -> None:
    plain_folder(tmp_path / "theirs", list(range(ENTITIES)))
    (note,) = bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"))
    assert "as you said them; there is nothing to check them by" in note


@pytest.mark.parametrize("flag", ["scorer", "margin", "norm", "layout"])
def test_what_a_librarys_files_say_themselves_is_not_asked_of_the_user(flag: str, tmp_path: Path) -> None:
    rotate_folder(tmp_path / "theirs", "ComplEx", "complex")
    given = Given(**{flag: {"scorer": "complex", "margin": 1.0, "norm": 1, "layout": "halves"}[flag]})
    with pytest.raises(ConfigError, match=f"--{flag} says nothing of a rotate model"):
        bring(f"rotate:{tmp_path / 'theirs'}", tmp_path / "out", given)


@pytest.mark.parametrize("name", list(SCORERS))
def test_an_export_of_numpy_files_is_imported_as_the_model_that_it_was(name: str, graph: Graph, tmp_path: Path) -> None:
    save_model(tmp_path / "model", toy_model(graph, name, 8), graph, {"stage": "x"})
    export_model(tmp_path / "model", tmp_path / "numpy", "numpy", Ranks())
    bring(f"plain:{tmp_path / 'numpy'}", tmp_path / "out")
    first, second = (load_model(tmp_path / one, Ranks()).model for one in ("model", "out"))
    assert torch.equal(first.entity.weight, second.entity.weight) and torch.equal(first.relation, second.relation)
    assert first.scorer.constants() == second.scorer.constants() and second.reciprocal


# -- whose rows are whose ---------------------------------------------------------------------------------------------


def plain_folder(folder: Path, order: list[int], keep: int = ENTITIES) -> Array:
    """A DistMult whose row i is entity order[i] of the graph; only the first `keep` rows are there."""
    entity, relation = tables("distmult")
    write_names(folder, "entities.tsv", "relations.tsv", order)
    lines = (folder / "entities.tsv").read_text().splitlines(keepends=True)[:keep]
    (folder / "entities.tsv").write_text("".join(lines))
    np.save(folder / "entity.npy", entity[:keep])
    np.save(folder / "relation.npy", relation)
    return entity


def test_rows_are_put_in_the_order_of_the_data_set(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROWS_AT_ONCE", 7)
    order = torch.randperm(ENTITIES, generator=torch.Generator().manual_seed(4)).tolist()
    entity = plain_folder(tmp_path / "theirs", order)
    notes = bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"), graph)
    found = distkgd.load(tmp_path / "out")
    assert found.entities.names.equals(graph.entities.names) and found.config["source"] == "toy"
    for row, number in enumerate(order):
        assert found.entity_rows[number].tolist() == entity[row].tolist()
    assert len(notes) == 1


def test_an_entity_without_training_triples_gets_the_mean_row_and_others_are_an_error(
    graph: Graph, tmp_path: Path
) -> None:
    last = ENTITIES - 1
    entity = plain_folder(tmp_path / "theirs", list(range(ENTITIES)), keep=last)
    with pytest.raises(ModelError, match=r"lacks 1 entities that toy has training triples of \('e029'"):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"), graph)
    train = graph.train[(graph.train[:, [0, 2]] != last).all(1)]
    fewer = Graph("toy", train, graph.valid, graph.test, graph.entities, graph.relations, graph.sha256, ())
    notes = bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"), fewer)
    rows = distkgd.load(tmp_path / "out").entity_rows
    torch.testing.assert_close(rows[last], torch.from_numpy(entity[:last]).double().mean(0).float())
    assert "1 entities without training triples are unknown to the model" in notes[1]


def pykeen_folder(folder: Path) -> Path:
    """A DistMult's state dict as PyKEEN writes it, without names."""
    folder.mkdir()
    entity, relation = tables("distmult")
    found = {"entity": entity, "relation": relation}
    state = {f"{kind}_representations.0._embeddings.weight": torch.from_numpy(rows) for kind, rows in found.items()}
    torch.save(state, folder / "state_dict.pt")
    return folder


@pytest.mark.parametrize("files", [("entities.tsv", "relations.tsv"), ("entities.dict", "relations.dict")])
@pytest.mark.parametrize("library", ["rotate", "pykeen", "dglke", "libkge", "plain"])
def test_names_beside_the_tables_are_found(library: str, files: tuple[str, str], tmp_path: Path) -> None:
    folder, given = tmp_path / "theirs", Given(scorer="distmult" if library in ("plain", "pykeen") else None)
    path = folder
    if library == "rotate":
        rotate_folder(folder, "DistMult", "distmult")
        shutil.rmtree(folder / "data")  # the authors' data_path is rarely where the model has gone
    elif library == "pykeen":
        pykeen_folder(folder)
    elif library == "dglke":
        folder.mkdir()
        for kind, rows in zip(("entity", "relation"), tables("distmult"), strict=True):
            np.save(folder / f"x_{kind}.npy", rows)
        config = {"model_name": "DistMult", "gamma": GAMMA, "hidden_dim": HIDDEN}
        (folder / "config.json").write_text(json.dumps(config))
    elif library == "libkge":
        folder.mkdir()
        path = folder / "checkpoint.pt"
        libkge_file(path, "distmult", reciprocal=False, norm=1.0, package=False)
        for name in ("entity_ids.del", "relation_ids.del"):
            (folder / name).unlink()
    else:
        plain_folder(folder, list(range(ENTITIES)))
        for name in ("entities.tsv", "relations.tsv"):
            (folder / name).unlink()
    with pytest.raises(ModelError, match=r"no names of (entities|relations) in .*distkgd import --names FOLDER"):
        bring(f"{library}:{path}", tmp_path / "out", given)
    write_names(folder, *files)
    bring(f"{library}:{path}", tmp_path / "out", given)
    entity, relation = tables("distmult")
    same_scores(tmp_path / "out", lambda h, r, t: formula("distmult", entity[h], relation[r], entity[t], GAMMA, 1, 1.0))


def keep_triples(folder: Path, graph: Graph, triples: Tensor) -> None:
    """training_triples/ as PyKEEN writes it, with its ids in an order of its own."""
    folder.mkdir()
    order = [(7 * i) % ENTITIES for i in range(ENTITIES)]
    names = {"entity": [f"e{i:03d}" for i in order], "relation": [f"r{i:03d}" for i in range(RELATIONS)]}
    for kind, found in names.items():
        lines = "".join(f"{i}\t{name}\n" for i, name in enumerate(found))
        with gzip.open(folder / f"{kind}_to_id.tsv.gz", "wt") as file:
            file.write("id\tlabel\n" + lines)
    with gzip.open(folder / "numeric_triples.tsv.gz", "wt") as file:
        file.write("head\trelation\ttail\n")
        file.writelines(f"{order.index(h)}\t{r}\t{order.index(t)}\n" for h, r, t in triples.tolist())


@pytest.mark.parametrize(("valid", "test"), [(0, 0), (3, 5), (0, 1)])
def test_a_model_that_was_trained_on_held_out_triples_is_told_of(
    valid: int, test: int, graph: Graph, tmp_path: Path
) -> None:
    folder = pykeen_folder(tmp_path / "theirs")
    keep_triples(folder / "training_triples", graph, torch.cat([graph.train, graph.valid[:valid], graph.test[:test]]))
    notes = bring(f"pykeen:{folder}", tmp_path / "out", Given(scorer="distmult"), graph)
    told = [note for note in notes if "among its training triples" in note]
    assert told == [
        f"{num} {split} triples of toy are among its training triples"
        for split, num in (("valid", valid), ("test", test))
        if num
    ]
    said = seen_held_out(tmp_path / "out", graph)
    parts = " and ".join(f"{num} {split}" for split, num in (("valid", valid), ("test", test)) if num)
    assert said == ([f"it was trained on {parts} triples: its figures there are no measure"] if parts else [])


def test_the_train_file_in_the_data_path_of_rotates_authors_is_compared_too(graph: Graph, tmp_path: Path) -> None:
    rotate_folder(tmp_path / "theirs", "ComplEx", "complex")
    rows = (f"e{h:03d}\tr{r:03d}\te{t:03d}\n" for h, r, t in torch.cat([graph.train, graph.valid]).tolist())
    (tmp_path / "theirs/data/train.txt").write_text("".join(rows))
    notes = bring(f"rotate:{tmp_path / 'theirs'}", tmp_path / "out", graph=graph)
    assert notes[1:] == [f"{len(graph.valid)} valid triples of toy are among its training triples"]


def test_relations_that_the_model_lacks_are_an_error(graph: Graph, tmp_path: Path) -> None:
    plain_folder(tmp_path / "theirs", list(range(ENTITIES)))
    names = tmp_path / "theirs" / "relations.tsv"
    names.write_text(names.read_text().replace("r002", "other"))
    with pytest.raises(ModelError, match="lacks 1 relations of toy: r002"):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"), graph)


# -- what is refused --------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "truncated rows": ("entity.npy", lambda p: os.truncate(p, p.stat().st_size - 1)),
    "missing rows": ("relation.npy", Path.unlink),
    "no array": ("entity.npy", lambda p: p.write_text("numbers")),
    "whole numbers": ("entity.npy", lambda p: np.save(p, np.ones((ENTITIES, HIDDEN), dtype=np.int64))),
    "objects": ("entity.npy", lambda p: np.save(p, np.array([[{}]], dtype=object), allow_pickle=True)),
    "another width": ("relation", lambda p: np.save(p.with_name("relation.npy"), random_rows(RELATIONS, HIDDEN + 1))),
    "fewer names": ("entities.tsv", lambda p: p.write_text(p.read_text().replace("29\te029\n", ""))),
    "doubled ids": ("entities.tsv", lambda p: p.write_text(p.read_text().replace("29\t", "28\t"))),
    "names first": ("entities.tsv", lambda p: p.write_text("".join(f"e{i}\t{i}\n" for i in range(ENTITIES)))),
    "no names": ("relations.tsv", Path.unlink),
    "no constants": ("scorer", lambda p: p.with_name("config.json").write_text("{}")),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_source_is_refused_by_name_and_nothing_is_left(damage: str, tmp_path: Path) -> None:
    plain_folder(tmp_path / "theirs", list(range(ENTITIES)))
    file, spoil = BROKEN[damage]
    spoil(tmp_path / "theirs" / file)
    given = Given(scorer=None if damage == "no constants" else "distmult")
    with pytest.raises(DistkgdError, match=file):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", given)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("table", ["entity", "relation"])
def test_the_table_that_does_not_fit_its_scorer_is_named(table: str, tmp_path: Path) -> None:
    plain_folder(tmp_path / "theirs", list(range(ENTITIES)))
    np.save(tmp_path / f"theirs/{table}.npy", random_rows(ENTITIES if table == "entity" else RELATIONS, HIDDEN + 1))
    constants = build_scorer("distmult", HIDDEN).constants()
    (tmp_path / "theirs/config.json").write_text(json.dumps({"scorer": constants}))
    with pytest.raises(ModelError, match=rf"{table}\.npy: .*do not fit DistMult"):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says how a file is mapped")
@pytest.mark.filterwarnings("error")
def test_an_array_is_mapped_so_that_it_claims_no_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", random_rows(ENTITIES, HIDDEN))
    found = open_array(tmp_path / "rows.npy")
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "rows.npy") in line]
    assert line.split()[1].startswith("r--") and found[7].tolist() == random_rows(ENTITIES, HIDDEN)[7].tolist()


def test_what_names_no_model_and_what_exists_is_refused(tmp_path: Path) -> None:
    plain_folder(tmp_path / "theirs", list(range(ENTITIES)))
    for source in ("openke:x", "plain:", "x"):
        with pytest.raises(ConfigError, match=f"LIBRARY:PATH with a library of {', '.join(IMPORTERS)}"):
            bring(source, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        bring(f"plain:{tmp_path / 'theirs'}", tmp_path / "out", Given(scorer="distmult"))


def test_a_model_that_scores_otherwise_than_its_library_is_not_imported() -> None:
    rows, words = torch.ones(2, 2), pl.Series(["a", "b"])

    def model(off: float) -> Foreign:
        files = Path("e.npy"), Path("r.npy")
        theirs: Callable[[Tensor], Tensor] = lambda t: torch.full((len(t),), 2 + off)  # noqa: E731
        return Foreign("X", build_scorer("distmult", 2), files, (words, words), rows, rows, original=theirs)

    assert "score as in X" in model(1e-6).check()
    for off in (1e-3, float("nan")):
        with pytest.raises(ModelError, match="X scores its triples otherwise"):
            model(off).check()


# -- launcher and plan ------------------------------------------------------------------------------------------------


def test_the_launcher_writes_a_model_that_the_others_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("launch.import").main
    entity, relation = rotate_folder(tmp_path / "theirs", "ComplEx", "complex")
    with pytest.raises(SystemExit) as ended:
        main(f"rotate:{tmp_path / 'theirs'}", tmp_path / "out", None, None, None, None, None, None, False)
    assert ended.value.code == 0 and "ComplEx(dim=12), 30 entities" in " ".join(capsys.readouterr().err.split())
    same_scores(tmp_path / "out", lambda h, r, t: formula("complex", entity[h], relation[r], entity[t], 0, 1, 1))
    with pytest.raises(SystemExit) as ended:
        main("pykeen:nowhere", tmp_path / "other", None, None, None, None, None, None, False)
    assert ended.value.code == 2
    assert (ROOT / "launch/import.py").is_file()


def data_folder(folder: Path, graph: Graph) -> Path:
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = (f"e{h:03d}\tr{r:03d}\te{t:03d}\n" for h, r, t in getattr(graph, split).tolist())
        (folder / f"{split}.tsv").write_text("".join(rows))
    return folder


def run_taught(ranks: Ranks, source: str, data: str, out: str, resume: bool = False) -> dict[str, Any]:
    from distkgd.common.console import Display
    from distkgd.data import load_graph
    from distkgd.pipeline.config import parse_config
    from distkgd.pipeline.plan import run_plan

    student = {"scorer": "complex", "dim": 4, "method": "bkd", "epochs": 1, "batch_size": 32}
    config = {"data": data, "teacher": source, "student": student, "mlflow": {"enabled": False}}
    parsed, graph = parse_config(config, "test"), load_graph(data)
    return run_plan(parsed, graph, ranks, Path(out), resume=resume, display=Display(False)).to_json()


@pytest.mark.parametrize("world", [1, 2])
def test_a_plan_takes_a_teacher_of_another_library(world: int, graph: Graph, tmp_path: Path) -> None:
    entity, _ = rotate_folder(tmp_path / "theirs", "ComplEx", "complex")
    data = data_folder(tmp_path / "data", graph)
    arguments = {"source": f"rotate:{tmp_path / 'theirs'}", "data": str(data), "out": str(tmp_path / "run")}
    report = run_on_ranks(world, run_taught, **arguments)[0]
    assert [row["name"] for row in report["stages"]] == ["teacher", "student"]
    (folder,) = (tmp_path / "run" / "imported").iterdir()
    teacher = distkgd.load(folder)
    assert teacher.scorer.dim == 2 * HIDDEN and teacher.config["imported_from"] == "RotatE's authors"
    assert teacher.entity_rows[3, 1] == entity[3, HIDDEN]
    again = run_on_ranks(world, run_taught, **arguments, resume=True)[0]
    assert again["stages"] == report["stages"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_plan_no_longer_needs_the_source_of_its_teacher(world: int, graph: Graph, tmp_path: Path) -> None:
    rotate_folder(tmp_path / "theirs", "ComplEx", "complex")
    data = data_folder(tmp_path / "data", graph)
    arguments = {"source": f"rotate:{tmp_path / 'theirs'}", "data": str(data), "out": str(tmp_path / "run")}
    report = run_on_ranks(world, run_taught, **arguments)[0]
    shutil.rmtree(tmp_path / "theirs")
    assert run_on_ranks(world, run_taught, **arguments, resume=True)[0]["stages"] == report["stages"]
    student = tmp_path / "run/stages/student"
    before = next((student / "model").glob("entity*")).read_bytes()
    shutil.rmtree(student)  # as if it had been stopped before its first step
    again = run_on_ranks(world, run_taught, **arguments, resume=True)[0]
    assert [row["valid"] for row in again["stages"]] == [row["valid"] for row in report["stages"]]
    assert next((student / "model").glob("entity*")).read_bytes() == before
    (folder,) = (tmp_path / "run" / "imported").iterdir()
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="theirs"):
        run_taught(Ranks(), **arguments, resume=True)


def test_a_plan_refuses_a_teacher_that_is_no_model_before_it_starts(graph: Graph, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", graph)
    with pytest.raises(ModelError, match="nowhere"):
        run_taught(Ranks(), f"rotate:{tmp_path / 'nowhere'}", str(data), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# -- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("table", "row", "name"), [("entity", 5, "entity 'e005'"), ("relation", 2, "relation 'r002'")])
def test_tables_that_hold_no_numbers_are_refused_with_file_row_and_name(
    table: str, row: int, name: str, value: float, tmp_path: Path
) -> None:
    write_names(tmp_path, "entities.tsv", "relations.tsv")
    for file, rows in (("entity", ENTITIES), ("relation", RELATIONS)):
        made = random_rows(rows, HIDDEN)
        if file == table:
            made[row, 1], made[-1, 0] = value, np.nan
        np.save(tmp_path / f"{file}.npy", made)
    said = f"{tmp_path / table}.npy: tensor '{table}', row {row} ({name}), holds {value}"
    with pytest.raises(ModelError, match=re.escape(said)):
        import_model(f"plain:{tmp_path}", tmp_path / "out", Given(scorer="complex", layout="halves"), Ranks())
    assert not (tmp_path / "out").exists()


def test_a_library_at_hand_does_not_hide_that_its_model_is_nan() -> None:
    names = [pl.Series("name", [f"{k}{i}" for i in range(n)]) for k, n in (("e", 9), ("r", 2))]
    rows = torch.ones(9, 4)
    rows[4] = torch.nan
    files = Path("theirs/entity"), Path("theirs/relation")
    theirs: Callable[[Tensor], Tensor] = lambda t: torch.full((len(t),), torch.nan)  # noqa: E731
    model = Foreign("Other", build_scorer("distmult", 4), files, (names[0], names[1]), rows, rows[:2], original=theirs)
    with pytest.raises(ModelError, match=r"theirs/entity: tensor 'entity', row 4 \(entity 'e4'\), holds nan"):
        model.check()
