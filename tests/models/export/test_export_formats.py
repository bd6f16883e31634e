"""What is in an export beyond rows and names: searches and graphs that answer as the model, bytes, crops, cards."""

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from torch import Tensor

import distkgd
from distkgd.data import Graph, Vocabulary
from distkgd.distributed.checkpoint.tables import write_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError, UnsupportedError
from distkgd.evaluation.packing_cost import cost_of_packing
from distkgd.kernels.quantiser import Quantiser, Rounding
from distkgd.models.export import FORMATS, export_model, onnx_format, packed_format
from distkgd.models.export.faiss_format import WHY_NOT, open_searcher
from distkgd.models.formats.int8 import read_int8
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import bytes_on_disk, load_model, save_model
from distkgd.scorers import SCORERS, build_scorer
from launch.export import main
from tests.records import STAGE
from tests.toys import toy_graph

ENTITIES, RELATIONS, DIM = 60, 5, 8
CASES = [*((name, None) for name in SCORERS), ("transe", 2), ("rotate", 2)]
EVERY_CASE = pytest.mark.parametrize(("name", "norm"), CASES, ids=[f"{n}-{p or 1}" for n, p in CASES])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return toy_graph(ENTITIES, RELATIONS, 500)


def stage_of(
    folder: Path, graph: Graph, name: str, norm: int | None = None, dtype: torch.dtype = torch.float32
) -> Model:
    """A stage folder with a model of random rows, and a model of the same numbers."""
    scorer = build_scorer(name, DIM, norm=norm)
    sizes = graph.num_entities, graph.num_relations
    model = new_model(scorer, *sizes, Ranks(), reciprocal=True, seed=1, init_scale=0.6, dtype=dtype)
    model.relation.mul_(0.6 / model.relation.std())
    save_model(folder / "model", model, graph, {"data": graph.summary(), "source": "nowhere", "method": "bkd"})
    return model


def tail_scores(model: Model, heads: Tensor, relations: Tensor) -> Tensor:
    """[Q, entities] of the formula, triple by triple."""
    h, r = model.entity.weight[heads].unsqueeze(1), model.relation[relations].unsqueeze(1)
    return model.scorer.score(h, r, model.entity.weight.unsqueeze(0))


def some_questions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(n, (25,), generator=generator) for n in (ENTITIES, RELATIONS))  # type: ignore[return-value]


# -- faiss ------------------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_a_search_is_exact_scoring_or_is_refused_with_the_reason(
    name: str, norm: int | None, graph: Graph, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    model = stage_of(tmp_path, graph, name, norm)
    form = model.scorer.candidate_form
    if form not in ("dot", "l2"):
        with pytest.raises(ModelError, match=f"{name} cannot be searched by FAISS: {WHY_NOT[form][:20]}"):
            export_model(tmp_path, tmp_path / "out", "faiss", Ranks())
        assert not (tmp_path / "out").exists()
        return
    export_model(tmp_path, tmp_path / "out", "faiss", Ranks())
    found = open_searcher(tmp_path / "out")
    heads, relations = some_questions()
    for ask, rows in (("tail", relations), ("head", relations + RELATIONS)):
        best = tail_scores(model, heads, rows).topk(10)
        scores, ids = found.search(heads, relations, 10, ask=ask)
        assert torch.equal(ids, best.indices)
        torch.testing.assert_close(scores, best.values, rtol=1e-4, atol=1e-4)


EXACT = [("complex", bits, None) for bits in (1, 2, 3, 4, 16)] + [("transe", 1, None), ("transe", 16, None)]
AGAIN = [("complex", 8, None), ("complex", 2, 4), ("transe", 4, None)]  # rounded again


@pytest.mark.parametrize(("name", "bits", "group"), [*EXACT, *AGAIN])
def test_rows_of_few_bits_are_searched_in_few_bits(
    name: str, bits: int, group: int | None, graph: Graph, tmp_path: Path
) -> None:
    faiss = pytest.importorskip("faiss")
    whole = stage_of(tmp_path / "whole", graph, name, 2 if name == "transe" else None)
    whole.entity.weight[7] = 0.0  # a row without a step
    save_model(tmp_path / "model", whole.quantised(Rounding(bits, 4, group)), graph, {"data": graph.summary()})
    export_model(tmp_path, tmp_path / "out", "faiss", Ranks())
    config, found = json.loads((tmp_path / "out/config.json").read_text()), open_searcher(tmp_path / "out")
    exact = (name, bits, group) in EXACT
    model, close = load_model(tmp_path, Ranks()).model.widened(), 1e-4 if exact else 0.02
    torch.testing.assert_close(found.rows(torch.arange(ENTITIES)), model.entity.rows(slice(None)), rtol=0, atol=close)
    heads, relations = some_questions()
    for ask, rows in (("tail", relations), ("head", relations + RELATIONS)):
        expected = tail_scores(model, heads, rows)
        scores, ids = found.search(heads, relations, ENTITIES, ask=ask)
        torch.testing.assert_close(scores, expected.gather(1, ids), rtol=close, atol=3 * close)
        assert (scores[:, 1:] <= scores[:, :-1]).all()
    code = found.index.code_size
    assert type(found.index) is (faiss.IndexRaBitQ if bits <= 4 and exact else faiss.IndexScalarQuantizer)
    assert code == (2 * DIM if bits == 16 else bits * DIM // 8 + 8 if exact else DIM) < 4 * DIM
    again = f"entity: {bits} bits rounded again to 8, with a range per column"
    assert config["widened"] == [
        "relation: 4 bits widened to float32, 6 to 32 bytes a row",
        *([] if exact else [again]),
    ]


@pytest.mark.parametrize(("small", "group", "dim"), [(1e-5, None, None), (1.0, 4, 2)])
def test_rows_too_small_for_planes_and_crops_of_groups_are_rounded_again(
    small: float, group: int | None, dim: int | None, graph: Graph, tmp_path: Path
) -> None:
    faiss = pytest.importorskip("faiss")
    whole = stage_of(tmp_path / "whole", graph, "complex")
    whole.entity.weight[3] *= small
    save_model(tmp_path / "model", whole.quantised(Rounding(2, 4, group)), graph, {"data": graph.summary()})
    export_model(tmp_path, tmp_path / "out", "faiss", Ranks(), dim)
    assert type(open_searcher(tmp_path / "out").index) is faiss.IndexScalarQuantizer


@pytest.mark.parametrize("format_", ["safetensors", "numpy", "sparse", "parquet", "onnx", "pykeen", "projector"])
def test_an_export_says_what_it_widens(
    format_: str, graph: Graph, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if (needed := {"parquet": "pyarrow", "onnx": "onnxscript", "pykeen": "pykeen"}.get(format_)) is not None:
        pytest.importorskip(needed)
    whole = stage_of(tmp_path / "whole", graph, "complex")
    save_model(tmp_path / "model", whole.quantised(Rounding(1, 16)), graph, {"data": graph.summary()})
    with pytest.raises(SystemExit, match="0"):
        main(tmp_path, tmp_path / "out", format_, None, None, None, None)
    said = "entity: 1 bit widened to float32, 3 to 32 bytes a row"
    assert said in capfd.readouterr().err
    others = ["relation: 16 bits widened to float32, 16 to 32 bytes a row"]
    assert json.loads((tmp_path / "out/config.json").read_text())["widened"] == [said, *others]
    assert all(f"- {text}\n" in (tmp_path / "out/README.md").read_text() for text in (said, *others))
    export_model(tmp_path / "whole", tmp_path / "plain", format_, Ranks())
    assert "widened" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_the_header_that_is_written_is_that_of_the_library(graph: Graph, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    model = stage_of(tmp_path, graph, "transe", 2)
    export_model(tmp_path, tmp_path / "out", "faiss", Ranks())
    index = faiss.IndexFlatL2(DIM)
    index.add(model.entity.weight.numpy())
    faiss.write_index(index, str(tmp_path / "index"))
    assert (tmp_path / "index").read_bytes() == (tmp_path / "out/entity.faiss").read_bytes()


@pytest.mark.parametrize("file", ["entity.faiss", "relation.safetensors"])
def test_a_damaged_index_is_refused_by_name(file: str, graph: Graph, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    stage_of(tmp_path, graph, "complex")
    export_model(tmp_path, tmp_path / "out", "faiss", Ranks())
    path = tmp_path / "out" / file
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelError, match=file):
        open_searcher(tmp_path / "out")
    path.unlink()
    with pytest.raises(ModelError, match=file):
        open_searcher(tmp_path / "out")


# -- onnx -------------------------------------------------------------------------------------------------------------


# Sums of products, of absolute values, distances with biases, and none at all; the others take three seconds each.
ONE_OF_A_KIND = ("transe", "complex", "rescal", "pairre", "rote", "roth")


@pytest.mark.parametrize(
    ("name", "norm"),
    [pytest.param(*case, marks=[] if case[0] in ONE_OF_A_KIND else pytest.mark.slow) for case in CASES],
)
def test_a_graph_answers_as_torch_does(name: str, norm: int | None, graph: Graph, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = stage_of(tmp_path, graph, name, norm)
    if model.scorer.candidate_form == "hyperbolic":
        with pytest.raises(ModelError, match=f"{name} has no ONNX graph: it computes in float64"):
            export_model(tmp_path, tmp_path / "out", "onnx", Ranks())
        return
    export_model(tmp_path, tmp_path / "out", "onnx", Ranks())
    session = runtime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["head", "relation", "k"]
    heads, relations = some_questions()
    wanted = tail_scores(model, heads, relations)
    for k, num in ((1, 25), (7, 25), (ENTITIES, 1)):
        asked = {"head": heads[:num].numpy(), "relation": relations[:num].numpy(), "k": np.array([k])}
        scores, ids = (torch.from_numpy(x) for x in session.run(["score", "tail"], asked))
        torch.testing.assert_close(scores, wanted[:num].topk(k).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wanted[:num].gather(1, ids), scores, rtol=1e-5, atol=1e-5)


# -- parquet ----------------------------------------------------------------------------------------------------------


def test_a_parquet_table_has_ids_names_labels_and_directions(graph: Graph, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    model = stage_of(tmp_path, graph, "complex")
    (tmp_path / "model" / "entity_labels.tsv").write_text("".join(f"{i}\tE {i}\n" for i in range(ENTITIES)))
    export_model(tmp_path, tmp_path / "out", "parquet", Ranks())
    entity, relation = (pl.read_parquet(tmp_path / f"out/{kind}.parquet") for kind in ("entity", "relation"))
    assert entity.columns == ["id", "name", "label", "embedding"] and len(entity) == ENTITIES
    assert entity.row(7)[:3] == (7, "e007", "E 7")
    assert entity["embedding"][7].to_list() == model.entity.weight[7].tolist()
    assert relation.columns == ["id", "name", "inverse", "embedding"] and len(relation) == 2 * RELATIONS
    assert relation["name"].to_list() == [f"r{i:03d}" for i in range(RELATIONS)] * 2
    assert relation["inverse"].to_list() == [False] * RELATIONS + [True] * RELATIONS
    assert np.array(relation["embedding"].to_list(), dtype=np.float32).tolist() == model.relation.tolist()


# -- text -------------------------------------------------------------------------------------------------------------


def test_the_projector_gets_a_vector_and_a_name_per_row(graph: Graph, tmp_path: Path) -> None:
    model = stage_of(tmp_path, graph, "complex")
    export_model(tmp_path, tmp_path / "plain", "projector", Ranks())
    assert (tmp_path / "plain/metadata.tsv").read_text().splitlines() == [f"e{i:03d}" for i in range(ENTITIES)]
    labels = "".join(f'{i}\t"a\tlabel\n{i}"\n' if i else "0\t\n" for i in range(ENTITIES))
    (tmp_path / "model" / "entity_labels.tsv").write_text(labels)
    export_model(tmp_path, tmp_path / "out", "projector", Ranks())
    title, *rows = (tmp_path / "out/metadata.tsv").read_text().splitlines()
    assert title == "name\tlabel" and rows == ["e000\te000", *(f"e{i:03d}\ta label {i}" for i in range(1, ENTITIES))]
    title, *rows = (tmp_path / "out/relation_metadata.tsv").read_text().splitlines()
    names = [f"r{i:03d}" for i in range(RELATIONS)]
    assert title == "name\tinverse" and rows == [f"{name}\t{said}" for said in ("no", "yes") for name in names]
    vectors = [line.split("\t") for line in (tmp_path / "out/relation_vectors.tsv").read_text().splitlines()]
    assert torch.equal(torch.tensor([[float(x) for x in row] for row in vectors]), model.relation)


def test_words_of_word2vec_hold_no_blanks_and_are_read_back(graph: Graph, tmp_path: Path) -> None:
    names = ["new york", "100%", "%20", "\u00e5\u00a0ngstr\u00f6m", *(f"e{i:03d}" for i in range(4, ENTITIES))]
    odd = dataclasses.replace(graph, entities=Vocabulary(pl.Series(names)))
    model = stage_of(tmp_path, odd, "transe")
    export_model(tmp_path, tmp_path / "out", "word2vec", Ranks())
    first, *lines = (tmp_path / "out/entity.txt").read_text().split("\n")[:-1]
    assert first == f"{ENTITIES} {DIM}" and lines[0].startswith("new%20york ")
    words, numbers = zip(*((line.split()[0], line.split()[1:]) for line in lines), strict=True)
    assert [unquote(word) for word in words] == names and len(set(words)) == ENTITIES
    assert torch.equal(torch.tensor([[float(x) for x in row] for row in numbers]), model.entity.weight)
    assert (tmp_path / "out/inverse.txt").read_text().startswith(f"{RELATIONS} {DIM}\nr000 ")


# -- few bits ---------------------------------------------------------------------------------------------------------


def test_eight_bit_rows_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    tensors = {
        "scale": torch.tensor([0.5, 0.0, 2.0]),
        "bias": torch.tensor([[7.0], [8.0], [9.0]]),
        "rows": torch.tensor([[127, -1], [0, 0], [3, -127]], dtype=torch.int8),
    }
    write_tensors(tmp_path / "table", tensors)
    read = read_int8(tmp_path / "table", 3, 1, 2, 0, 3)
    assert read.tolist() == [[7.0, 63.5, -0.5], [8.0, 0.0, 0.0], [9.0, 6.0, -254.0]]
    assert torch.equal(read_int8(tmp_path / "table", 3, 1, 2, 1, 3), read[1:])
    for num, biases, dim in ((4, 1, 2), (3, 1, 4), (3, 2, 2)):
        with pytest.raises(ModelError, match="table"):
            read_int8(tmp_path / "table", num, biases, dim, 0, 1)
    os.truncate(tmp_path / "table", (tmp_path / "table").stat().st_size - 1)
    with pytest.raises(ModelError, match="table: missing, truncated"):
        read_int8(tmp_path / "table", 3, 1, 2, 0, 1)


def test_a_table_is_pruned_by_all_of_its_rows() -> None:
    whole, zeros = torch.ones(2000, 4), torch.zeros(900, 4)
    for blocks, is_it in (([whole, zeros], True), ([whole, zeros[:600]], False)):
        table = SimpleNamespace(blocks=lambda blocks=blocks: iter(blocks), shape=(sum(map(len, blocks)), 4))
        assert packed_format._is_pruned(table, 0) == is_it


@pytest.mark.parametrize("share", [0.6, 0.05])
def test_rounding_keeps_the_zeros_of_a_pruned_model(share: float, graph: Graph, tmp_path: Path) -> None:
    whole = stage_of(tmp_path / "whole", graph, "complex")
    gone = torch.rand(ENTITIES, DIM, generator=torch.Generator().manual_seed(2)) < share
    whole.entity.weight[gone] = 0.0
    save_model(tmp_path / "model", whole, graph, {"data": graph.summary()})
    export_model(tmp_path, tmp_path / "out", "packed", Ranks(), rounding=Rounding(2, 4))
    loaded = load_model(tmp_path / "out", Ranks())
    rows = loaded.model.entity.weight
    assert torch.equal(rows == 0, gone & (share > 0.25))
    expected = Quantiser(2, zeros=share > 0.25)(whole.entity.weight)
    assert torch.equal(rows, expected) and loaded.config["packed"]["relation"] == {
        "bits": 4,
        "group": None,
        "biases": 0,
    }
    assert ("entity.bitmap" in loaded.config["files"]) == (share > 0.25)


def test_few_bits_state_their_bytes_and_what_they_cost(
    graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stage_of(tmp_path, graph, "rote")
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        rows = (f"e{h:03d}\tr{r:03d}\te{t:03d}\n" for h, r, t in getattr(graph, split).tolist())
        (tmp_path / "data" / f"{split}.tsv").write_text("".join(rows))
    with pytest.raises(SystemExit):
        main(tmp_path, tmp_path / "unknown", "packed", None)
    assert "loss of MRR not measured (No triple is marked" in " ".join(capsys.readouterr().err.split())
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"nowhere"', json.dumps(str(tmp_path / "data"))))
    with pytest.raises(SystemExit) as ended:
        main(tmp_path, tmp_path / "out", None, None, bits=8)
    assert ended.value.code == 0
    size = bytes_on_disk(tmp_path / "out")
    before = model.entity.weight.nbytes + model.relation.nbytes
    said = " ".join(capsys.readouterr().err.split())
    assert f"tables of {size:,} bytes ({size / ENTITIES:,.1f} per entity) instead of {before:,}; MRR of" in said
    assert f"MRR of {len(graph.valid)} valid triples" in said
    small = load_model(tmp_path / "out", Ranks()).model
    heads, relations = some_questions()
    torch.testing.assert_close(
        tail_scores(small, heads, relations), tail_scores(model, heads, relations), atol=0.1, rtol=0.05
    )
    line = cost_of_packing(tmp_path, tmp_path / "out", Ranks())
    mrr = float(line.split("triples ")[1].split()[0])
    assert mrr == pytest.approx(float(line.split("before, ")[1].split()[0]), abs=0.05)
    entity_bytes = sum(path.stat().st_size for path in (tmp_path / "out").glob("entity.*.safetensors"))
    assert entity_bytes < ENTITIES * (DIM + 4) + 400


# -- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCORERS))
def test_a_crop_is_exported_as_the_crop_of_the_model(name: str, graph: Graph, tmp_path: Path) -> None:
    model = stage_of(tmp_path, graph, name)
    files = export_model(tmp_path, tmp_path / "out", "safetensors", Ranks(), dim=4)
    assert {file.name for file in files} >= {"README.md", "config.json"}
    found, wanted = distkgd.load(tmp_path / "out"), model.crop(4)
    assert torch.equal(found.entity_rows, wanted.entity.weight) and torch.equal(found.relation_rows, wanted.relation)
    assert found.scorer.constants() == wanted.scorer.constants() and found.config["crop_of"] == {"dim": DIM}
    again = export_model(tmp_path / "out", tmp_path / "packed", "packed", Ranks(), dim=4)
    assert load_model(tmp_path / "packed", Ranks()).model.scorer.dim == 4 and len(again) > 3


@pytest.mark.parametrize(
    "format_", ["numpy", "sparse", "packed", "parquet", "faiss", "onnx", "pykeen", "projector", "word2vec"]
)
def test_every_format_takes_a_crop(format_: str, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"parquet": "pyarrow", "faiss": "faiss", "onnx": "onnxscript", "pykeen": "pykeen"}
    if format_ in needed:
        pytest.importorskip(needed[format_])
    assert {*needed, "numpy", "sparse", "packed", "safetensors", "projector", "word2vec"} == FORMATS.keys()
    model = stage_of(tmp_path, graph, "complex").crop(4)
    check, checked = onnx_format._check, []
    monkeypatch.setattr(onnx_format, "_check", lambda *written: checked.append(written))
    export_model(tmp_path, tmp_path / "out", format_, Ranks(), dim=4)
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["scorer"] == {"name": "complex", "dim": 4}
    if format_ == "numpy":
        rows = torch.from_numpy(np.load(out / "entity.npy"))
    elif format_ in ("sparse", "packed"):
        rows = load_model(out, Ranks()).model.entity.weight
    elif format_ == "parquet":
        rows = torch.tensor(pl.read_parquet(out / "entity.parquet")["embedding"].to_list())
    elif format_ == "faiss":
        rows = torch.from_numpy(open_searcher(out).index.reconstruct_n(0, ENTITIES))
    elif format_ == "projector":
        rows = torch.from_numpy(np.loadtxt(out / "vectors.tsv", dtype=np.float32))
    elif format_ == "word2vec":
        rows = torch.from_numpy(np.loadtxt(out / "entity.txt", np.float32, skiprows=1, usecols=range(1, 5)))
    elif format_ == "pykeen":
        rows = torch.load(out / "state_dict.pt")["entity_representations.0._embeddings.weight"]
    else:
        onnx = pytest.importorskip("onnx")
        ((_, tails),) = checked  # a graph that answers otherwise would not be exported
        check(out / "model.onnx", tails)
        tails.relations.data += 0.1
        with pytest.raises(ModelError, match="differ from torch's by"):
            check(out / "model.onnx", tails)
        tensors = {one.name: one for one in onnx.load(out / "model.onnx").graph.initializer}
        rows = torch.from_numpy(onnx.numpy_helper.to_array(tensors["entities"]).copy())
    torch.testing.assert_close(rows, model.entity.weight, atol=0.02 if format_ == "packed" else 1e-7, rtol=0)


@pytest.mark.parametrize("dim", [9, 10, 3, 0])
def test_a_crop_that_cannot_be_is_refused(dim: int, graph: Graph, tmp_path: Path) -> None:
    stage_of(tmp_path, graph, "complex")
    with pytest.raises((ConfigError, UnsupportedError), match=f"dim={dim}"):
        export_model(tmp_path, tmp_path / "out", "safetensors", Ranks(), dim=dim)
    assert not (tmp_path / "out").exists()


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is_and_nothing_of_a_teacher(graph: Graph, tmp_path: Path) -> None:
    stage_of(tmp_path, graph, "rote")
    figures = {"mrr": 0.4321, "hits_at_1": 0.1, "hits_at_3": 0.2, "hits_at_10": 0.3, "mean_rank": 7.0}
    row = STAGE | {"teachers": ["the/teacher"]}
    (tmp_path / "result.json").write_text(json.dumps(row | {"valid": figures, "test": figures}))
    export_model(tmp_path, tmp_path / "out", "safetensors", Ranks())
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: distkgd\n")
    head = yaml.safe_load(card.split("---\n")[1])
    (valid, test) = head["model-index"][0]["results"]
    assert valid["dataset"] == {"type": graph.name, "name": graph.name, "split": "valid"} and valid != test
    assert valid["metrics"][0] == {"type": "mrr", "name": "MRR", "value": 0.4321}
    tables = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert head["bytes"] == sum(tables) and len(tables) == 2
    for said in (
        "RotE(dim=8)",
        "60 entities of 8 numbers and 1 bias",
        "method `bkd`",
        "| valid | 0.4321 |",
        graph.sha256,
    ):
        assert said in card
    for path in (tmp_path / "out").iterdir():
        assert b"teacher" not in path.read_bytes()
    export_model(tmp_path, tmp_path / "crop", "safetensors", Ranks(), dim=4)
    crop = (tmp_path / "crop/README.md").read_text()
    assert "0.4321" not in crop and "first 4 of 8 numbers" in crop
    export_model(tmp_path, tmp_path / "packed", "packed", Ranks())
    packed = (tmp_path / "packed/README.md").read_text()
    assert "0.4321" not in packed and "- entity: 8 bits a number" in packed
    (tmp_path / "result.json").write_text(json.dumps(row | {"valid": figures | {"mrr": None}, "test": figures}))
    export_model(tmp_path, tmp_path / "none", "safetensors", Ranks())
    head = yaml.safe_load((tmp_path / "none/README.md").read_text().split("---\n")[1])
    measured = [[one["type"] for one in found["metrics"]] for found in head["model-index"][0]["results"]]
    assert measured == [[*figures][1:4], [*figures][:4]]


@pytest.mark.parametrize("name", SCORERS)
def test_every_card_has_the_formula_and_the_order_of_the_numbers(name: str, graph: Graph, tmp_path: Path) -> None:
    stage_of(tmp_path, graph, name)
    export_model(tmp_path, tmp_path / "out", "numpy", Ranks())
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert card.count("Formula: f = ") == card.count("Real numbers: dim") == 1 and "Candidate form" not in card
    formula = re.search(r"Formula: (.*?) Real numbers", card)
    docs = " ".join(" ".join(kind.__doc__ or "" for kind in SCORERS[name].__mro__).split())
    assert formula is not None and formula[1] in docs
    assert f"entities are [{ENTITIES}, " in card and f"Relation r + {RELATIONS} is the inverse of r" in card
    if "Formula" not in str(SCORERS[name].__doc__):  # a member of a family
        assert f"{SCORERS[name].__name__}: " in card


@pytest.mark.parametrize("format_", FORMATS)
def test_every_card_says_how_its_files_are_read(format_: str, graph: Graph, tmp_path: Path) -> None:
    if needed := {"parquet": "pyarrow", "faiss": "faiss", "onnx": "onnxscript", "pykeen": "pykeen"}.get(format_):
        pytest.importorskip(needed)
    stage_of(tmp_path, graph, "complex")
    export_model(tmp_path, tmp_path / "out", format_, Ranks())
    card = (tmp_path / "out/README.md").read_text()
    said = card.split("## Files\n\n")[1]
    assert len(said) > 60 and "float32" in card
    loads = "config.json" in said or "distkgd.load" in said
    try:
        distkgd.load(tmp_path / "out")
    except ModelError:
        assert not loads
    else:
        assert loads


def test_an_export_of_an_export_that_is_no_plain_model_is_refused(graph: Graph, tmp_path: Path) -> None:
    stage_of(tmp_path, graph, "complex")
    export_model(tmp_path, tmp_path / "sparse", "sparse", Ranks())
    with pytest.raises(ModelError, match="is an export already"):
        export_model(tmp_path / "sparse", tmp_path / "out", "numpy", Ranks())


def test_a_format_whose_library_is_missing_says_how_to_get_it(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_of(tmp_path, graph, "complex")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ModelError, match=r"--format faiss needs faiss.*pip install 'distkgd\[export\]'"):
        export_model(tmp_path, tmp_path / "out", "faiss", Ranks())
