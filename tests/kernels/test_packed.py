"""Packed rows score as the rows that they are unpacked to: every scorer, bits, group and kernel, and any world size."""

import itertools
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from distkgd.data import Vocabulary
from distkgd.data.filters import KnownAnswers, Queries, both_sides
from distkgd.distributed.checkpoint.tables import write_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable, plan_route
from distkgd.errors import ConfigError
from distkgd.evaluation import model_metrics
from distkgd.evaluation.prediction import Prediction, predict_each, top_k
from distkgd.evaluation.ranking import metrics, ranks_of, ranks_of_crops
from distkgd.evaluation.trained_model import load
from distkgd.kernels import packed as kernels
from distkgd.kernels.build import library
from distkgd.kernels.packed import WAYS, PackedRows, chosen, unpack
from distkgd.kernels.quantiser import Quantiser, Rounding
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import load_model, save_model, write_names
from distkgd.scorers import SCORERS, build_scorer
from tests.ranks import run_on_ranks
from tests.toys import toy_graph

FEW = (1, 2, 3, 4, 8)
LIB = library("packed")
HERE = WAYS[: 1 if LIB is None else LIB.packed_level() + 1]
KERNELS = HERE  # those of this processor; that the others are refused is tested below
SHAPES = [(5, None), (16, None), (16, 4), (64, 32), (100, None), (100, 4), (256, 64), (300, None), (384, 128)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_products_are_those_of_the_unpacked_rows(
    way: str, bits: int, columns: int, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTKGD_PACKED", way)
    quantiser = Quantiser(bits, group)
    rows = PackedRows(quantiser.pack(normal(301, columns)), quantiser)
    full = rows.take(slice(None)).double()
    queries = normal(20, columns, seed=1) * torch.logspace(-20, 20, 20).unsqueeze(1)
    queries[3] = 0.0
    queries[4, 1:] = 0.0
    for few in (queries, queries[:1], queries[7:10]):
        for lo, hi in ((0, 301), (17, 18), (299, 301)):
            off = (rows[lo:hi].products(few) - few.double() @ full[lo:hi].T).abs()
            # As good as float32: what a query of such numbers loses in a product and in a sum.
            assert (off <= 2e-6 * few.double().abs() @ full[lo:hi].abs().T + 1e-44).all()


@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_products_of_queries_of_eight_bits_are_those_of_the_rounded_queries(
    way: str, bits: int, columns: int, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTKGD_PACKED", way)
    quantiser = Quantiser(bits, group)
    rows = PackedRows(quantiser.pack(normal(301, columns)), quantiser, query_bits=8)
    full = rows.take(slice(None)).double()
    queries = normal(20, columns, seed=1) * torch.logspace(-20, 20, 20).unsqueeze(1)
    queries[3] = 0.0
    queries[4, 1:] = 0.0
    rounded = torch.zeros(20, columns, dtype=torch.float64)
    for i, query in enumerate(queries):
        unit = float(query.abs().max()) / 127
        for k, x in enumerate(query.tolist()):
            rounded[i, k] = unit * round(x / unit) if unit else 0.0
    for at in (slice(None), slice(0, 1), slice(7, 10)):
        for lo, hi in ((0, 301), (299, 301)):
            off = (rows[lo:hi].products(queries[at]) - rounded[at] @ full[lo:hi].T).abs()
            assert (off <= 2e-6 * rounded[at].abs() @ full[lo:hi].abs().T + 1e-44).all()
    assert columns < 16 or not torch.allclose(rows.products(queries).double(), queries.double() @ full.T)
    again = rows.products(rounded.float())  # which are rounded to themselves
    torch.testing.assert_close(again, rows.products(queries), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize(
    ("scorer", "bits", "reciprocal"), [("complex", 2, True), ("rescal", 8, False), ("cp", 3, False)]
)
def test_answers_and_ranks_are_those_of_rounded_queries(
    scorer: str, bits: int, reciprocal: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTKGD_PACKED", way)
    monkeypatch.setattr("distkgd.evaluation.ranking.SCORES_AT_ONCE", 600)
    graph = toy_graph()
    model = new_model(
        build_scorer(scorer, 16), graph.num_entities, graph.num_relations, Ranks(), reciprocal=reciprocal, seed=1
    )
    packed = packed_of(model, Rounding(bits))
    wide, small = packed.widened(), packed.in_query_bits(8)
    assert small.query_bits == 8 and packed.in_query_bits(32) is packed
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    queries = both_sides(graph.test)
    rows = wide.entity.rows(slice(None))
    made = wide.project(queries, rows[queries.anchor], wide.relation[wide.relation_ids(queries)])
    unit = made.abs().amax(1, keepdim=True) / 127
    scores = ((made / unit).round() * unit).double() @ rows.double().T
    found, _ = top_k(small, queries, 5)
    torch.testing.assert_close(found.double(), scores.topk(5).values, rtol=1e-5, atol=1e-7)
    query, entity = known.pairs(queries)
    own = scores.gather(1, queries.answer.unsqueeze(1))
    scores[query, entity] = -torch.inf
    expected = 1 + (scores > own + 1e-7).sum(1) + (scores - own).abs().le(1e-7).sum(1) / 2
    assert torch.equal(ranks_of(small, graph.test, known, Ranks()).reshape(-1).float(), expected.float())
    assert not torch.equal(top_k(packed, queries, 5)[0], found)


def test_what_is_asked_ranked_and_served_rounds_its_queries_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = toy_graph()
    save_packed(Ranks(), str(tmp_path / "model"))
    small = load_model(tmp_path, Ranks()).model.in_query_bits(8)
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    monkeypatch.setattr(model_metrics, "load_graph", lambda _: graph)
    told = model_metrics.evaluate_model(tmp_path, Ranks(), split="test", source="toy", query_bits=8)
    plain = model_metrics.evaluate_model(tmp_path, Ranks(), split="test", source="toy")
    mrr = metrics(ranks_of(small, graph.test, known, Ranks()))["mrr"]
    assert told["overall"]["mrr"] == mrr != plain["overall"]["mrr"]
    assert told["protocol"] == plain["protocol"] | {"query_bits": 8}
    how = {"relation": "r001", "top": 4, "exclude_known": False, "ids": False, "query_bits": 8}
    (printed,) = predict_each(load_model(tmp_path, Ranks()), graph, ["e003"], None, **how)
    asked = load(tmp_path, query_bits=8)
    scores, ids = top_k(small, Queries(*(torch.tensor([x]) for x in (3, 1, 0, 0))), 4)
    found = asked.predict(head=3, relation=1, k=4, ids=True)
    assert torch.equal(found.scores, scores) and torch.equal(found.ids, ids)
    assert isinstance(printed, Prediction) and [one.score for one in printed.answers] == scores[0].tolist()
    with pytest.raises(ConfigError, match="rounds no queries"):
        asked.crop(dim=8)
    triple = torch.tensor([[3, 1, int(ids[0, 2])]])
    assert float(asked.score(triple, ids=True)) == pytest.approx(float(scores[0, 2]), rel=1e-5)
    assert not torch.allclose(asked.score(triple, ids=True), load(tmp_path).score(triple, ids=True), rtol=1e-5)


def test_an_endpoint_rounds_queries_where_its_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    served = import_module("distkgd.tracking.serving.served")
    save_packed(Ranks(), str(tmp_path / "model"))
    for bits in (32, 8):
        monkeypatch.setenv("DISTKGD_QUERY_BITS", str(bits))
        endpoint = served.Endpoint()
        endpoint.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}))
        assert endpoint._model._model.query_bits == bits
    monkeypatch.setenv("DISTKGD_QUERY_BITS", "eight")
    with pytest.raises(ConfigError, match="DISTKGD_QUERY_BITS is 'eight'; allowed: 8, and 32"):
        served.Endpoint().load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}))


def test_rounded_queries_are_of_packed_rows_of_bilinear_scorers() -> None:
    graph = toy_graph()
    for scorer, packs, bits, said in (
        ("complex", False, 8, "this is ComplEx(dim=16), not packed"),
        ("transe", True, 8, "packed"),
        ("complex", True, 4, "4 query bits; allowed: 8, and 32"),
    ):
        model = new_model(build_scorer(scorer, 16), graph.num_entities, 3, Ranks(), reciprocal=True, seed=1)
        with pytest.raises(ConfigError, match=re.escape(said)):
            (packed_of(model, Rounding(2)) if packs else model).in_query_bits(bits)


@pytest.mark.parametrize("way", KERNELS)
def test_a_query_that_is_no_number_has_the_same_scores(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTKGD_PACKED", way)
    quantiser = Quantiser(2)
    rows = PackedRows(quantiser.pack(normal(30, 64)), quantiser)
    queries = normal(2, 64, seed=1)
    queries[1, 5] = torch.inf
    torch.testing.assert_close(rows.products(queries), queries @ rows.take(slice(None)).T, equal_nan=True)


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize(("columns", "group"), SHAPES)
@pytest.mark.parametrize("biases", [0, 1])
def test_the_kernel_unpacks_bit_by_bit_what_torch_does(
    bits: int, columns: int, group: int | None, biases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantiser = Quantiser(bits, group, biases)
    packed = quantiser.pack(normal(37, biases + columns))
    fast = unpack(packed, quantiser)
    monkeypatch.setattr(kernels, "library", lambda name: None)
    assert torch.equal(unpack(packed, quantiser), fast)


def pairs_of_all() -> list[tuple[str, int, int | None, str]]:
    """(scorer, bits, group, way): every scorer with every bits, and each of these pairs with group and way in turn."""
    turns = itertools.cycle(itertools.product((None, 4, 16), HERE))
    return [
        (scorer, bits, *turn)
        for (scorer, bits), turn in zip(itertools.product(SCORERS, FEW), turns, strict=False)  # the turns never end
    ]


def packed_of(model: Model, rounding: Rounding) -> Model:
    """The model with rows of few bits, packed as a loaded one's are."""
    quantiser = rounding.quantisers(model.scorer)["entity"]
    rows = PackedRows(quantiser.pack(model.entity.weight), quantiser)
    table = ShardedTable(rows, model.entity.total, model.entity.ranks)
    return Model(model.scorer, table, model.relation, model.num_relations, model.reciprocal)


@pytest.mark.parametrize(("scorer", "bits", "group", "way"), pairs_of_all())
def test_answers_and_ranks_are_those_of_the_widened_model(
    scorer: str, bits: int, group: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTKGD_PACKED", way)
    monkeypatch.setattr("distkgd.evaluation.ranking.SCORES_AT_ONCE", 600)  # several blocks
    graph, reciprocal = toy_graph(), SCORERS[scorer].tails_only
    made = build_scorer(scorer, 16)
    model = new_model(made, graph.num_entities, graph.num_relations, Ranks(), reciprocal=reciprocal, seed=1)
    packed = packed_of(model, Rounding(bits, group=group))
    wide = packed.widened()
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    assert torch.equal(*(ranks_of(one, graph.test, known, Ranks()) for one in (packed, wide)))
    crops = [ranks_of_crops(one, [8, 16], graph.test, known, Ranks()) for one in (packed, wide)]
    assert all(torch.equal(crops[0][dim], crops[1][dim]) for dim in (8, 16))
    queries = both_sides(graph.test[:3])
    for asked in (queries, Queries(*(column[:1] for column in queries))):
        (scores, ids), (wanted, _) = (top_k(one, asked, 5, scores_at_once=60) for one in (packed, wide))
        torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        everything = dict(zip(*(x.flatten().tolist() for x in top_k(wide, asked, 99)[::-1]), strict=True))
        assert len(asked.anchor) > 1 or [everything[i] for i in ids[0].tolist()] == pytest.approx(
            wanted[0].tolist(), rel=1e-5, abs=1e-6
        )


def answers(ranks: Ranks, folder: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    graph, model = toy_graph(), load_model(folder, ranks).model
    assert isinstance(model.entity.shard, PackedRows)
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    return *top_k(model, both_sides(graph.test), 7), ranks_of(model, graph.test, known, ranks)


def save_packed(ranks: Ranks, folder: str) -> None:
    graph = toy_graph()
    model = new_model(build_scorer("complex", 16), graph.num_entities, 5, ranks, reciprocal=False, seed=1)
    save_model(folder, model.quantised(Rounding(2, 4)), graph, {"source": "toy"})


@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (3, 1), (3, 2)])
def test_files_of_one_world_size_answer_at_another(wrote: int, reads: int, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    run_on_ranks(wrote, save_packed, folder=folder)
    (one,) = run_on_ranks(1, answers, folder=folder)
    for found in run_on_ranks(reads, answers, folder=folder):
        torch.testing.assert_close(found[0], one[0])
        assert torch.equal(found[1], one[1]) and torch.equal(found[2], one[2])


def test_a_packed_model_in_a_program_scores_as_its_widened_copy(tmp_path: Path) -> None:
    save_packed(Ranks(), str(tmp_path / "model"))
    packed = load(tmp_path / "model")
    packed.save(tmp_path / "wide")
    wide = load(tmp_path / "wide")
    assert torch.equal(packed.entity_rows, wide.entity_rows) and isinstance(wide.entity_rows, torch.Tensor)
    triples = toy_graph().test
    torch.testing.assert_close(packed.score(triples, ids=True), wide.score(triples, ids=True))
    near = [one.nearest([0, 5], 4, ids=True) for one in (packed, wide)]
    assert torch.equal(near[0].ids, near[1].ids)
    torch.testing.assert_close(packed.crop(8).entity_rows, wide.crop(8).entity_rows)


@pytest.mark.parametrize(("way", "off"), [("sse", False), ("avx2", True), ("AVX2", False)])
def test_a_way_that_is_not_to_be_had_is_refused(
    way: str, off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_packed(Ranks(), str(tmp_path / "model"))
    monkeypatch.setenv("DISTKGD_PACKED", way)
    if off:
        monkeypatch.setattr(kernels, "library", lambda name: None)
    with pytest.raises(ConfigError, match=rf"^DISTKGD_PACKED={way}: [^\n]*; allowed here: portable[^\n]*\.$"):
        load_model(tmp_path / "model", Ranks())
    monkeypatch.setenv("DISTKGD_PACKED", "portable")
    assert chosen() == "portable" and isinstance(load_model(tmp_path / "model", Ranks()).model, Model)


def test_packed_rows_take_no_gradient(tmp_path: Path) -> None:
    save_packed(Ranks(), str(tmp_path / "model"))
    table = load_model(tmp_path / "model", Ranks()).model.entity
    route = plan_route(torch.tensor([1, 2]), None, table.total, Ranks())
    with pytest.raises(AssertionError, match="for reading only"):
        table.open(route, grad=True)
    assert table.widened().open(route, grad=True).leaf.requires_grad


SERVES = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from distkgd.evaluation.trained_model import load
from distkgd.models import model_folder

folder, small = Path(sys.argv[1]), Path(sys.argv[2])
names = model_folder.read_names(folder, "entities", "entity_labels", 1_000_000)
load(small).predict(head="e000", relation=0, ids=True)  # whatever a first answer imports and compiles

def held(what):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what)) / 1024

read = model_folder.read_names
model_folder.read_names = lambda *a: names if a[1] == "entities" else read(*a)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is held now
before = held("VmRSS")
model = load(folder)
print(held("VmHWM") - before, held("VmRSS") - before)
assert len(model.predict(head=7, relation=1, ids=True).names[0]) == 10
print(held("VmHWM") - before)
"""


def test_a_million_rows_of_two_bits_are_loaded_and_asked_in_little_memory(tmp_path: Path) -> None:
    save_packed(Ranks(), str(tmp_path / "small"))
    folder, num = tmp_path / "model", 1_000_000
    folder.mkdir()
    codes = torch.randint(0, 256, (num, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tables = {
        "entity.codes": codes,
        "entity.step": torch.ones(num, 1, dtype=torch.bfloat16),
        "relation": normal(3, 256),
    }
    for name, table in tables.items():
        write_tensors(folder / f"{name}.safetensors", {name: table})
    about = {"format": "distkgd-packed/1", "scorer": build_scorer("distmult", 256).constants()}
    about |= {"num_entities": num, "num_relations": 3, "reciprocal": False, "dtype": "float32"}
    about |= {"packed": {"entity": Quantiser(2).to_json()}, "files": {name: [f"{name}.safetensors"] for name in tables}}
    (folder / "config.json").write_text(json.dumps(about))
    numbers = pl.arange(0, num, eager=True).cast(pl.String)
    write_names(folder, "entities", "entity_labels", Vocabulary("e" + numbers))
    write_names(folder, "relations", "relation_labels", Vocabulary(pl.Series(["a", "b", "c"])))
    asked = [sys.executable, "-c", SERVES, str(folder), str(tmp_path / "small")]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loading, loaded, answering = map(float, done.stdout.split())
    file = (folder / "entity.codes.safetensors").stat().st_size + 2 * num
    assert loaded <= 1.1 * file / 2**20 and loading < 100
    assert answering < 200  # the table, and a million scores and ids, copied and ordered
