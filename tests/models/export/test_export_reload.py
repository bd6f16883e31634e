"""Every export format read back as its users read it: the same scores, and no damaged file passes."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import distkgd
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.models.export import FORMATS, check_files, export_model
from distkgd.models.export.faiss_format import open_searcher
from distkgd.models.importers import Given, import_model
from distkgd.models.model_folder import read_json, save_model
from distkgd.scorers import from_constants
from tests.jobs import toy_model
from tests.toys import toy_graph

ENTITIES, RELATIONS = 41, 5
NEEDS = {"parquet": "pyarrow", "faiss": "faiss", "onnx": "onnxscript", "pykeen": "pykeen"}
CLOSE = {"packed": 0.2, "onnx": 1e-4, "faiss": 1e-4, "pykeen": 1e-4}  # the others hold the very numbers


def by_formula(folder: Path, entity: Tensor, relation: Tensor, triples: Tensor) -> Tensor:
    """[n] scores of tables and of the constants in config.json."""
    h, r, t = triples.unbind(1)
    scores: Tensor = from_constants(read_json(folder / "config.json")["scorer"]).score(
        entity[h], relation[r], entity[t]
    )
    return scores


def from_model_folder(folder: Path, triples: Tensor) -> Tensor:
    return distkgd.load(folder).score(triples, ids=True)


def from_numpy(folder: Path, triples: Tensor) -> Tensor:
    import_model(f"plain:{folder}", folder.with_name("again"), Given(), Ranks())
    return distkgd.load(folder.with_name("again")).score(triples, ids=True)


def from_parquet(folder: Path, triples: Tensor) -> Tensor:
    tables = (pl.read_parquet(folder / f"{name}.parquet")["embedding"].to_list() for name in ("entity", "relation"))
    return by_formula(folder, *(torch.tensor(rows, dtype=torch.float64) for rows in tables), triples)


def from_faiss(folder: Path, triples: Tensor) -> Tensor:
    h, r, t = triples.unbind(1)
    scores, ids = open_searcher(folder).search(h, r, ENTITIES)
    return scores.gather(1, ids.argsort(1)).gather(1, t.unsqueeze(1)).squeeze(1)


def from_onnx(folder: Path, triples: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    h, r, t = triples.unbind(1)
    asked = {"head": h.numpy(), "relation": r.numpy(), "k": np.array([ENTITIES])}
    scores, ids = (torch.from_numpy(x) for x in session.run(["score", "tail"], asked))
    return scores.gather(1, ids.argsort(1)).gather(1, t.unsqueeze(1)).squeeze(1)


def from_pykeen(folder: Path, triples: Tensor) -> Tensor:
    model = torch.load(folder / "trained_model.pkl", weights_only=False)
    with torch.no_grad():
        scores: Tensor = model.predict_hrt(triples).squeeze(1)
    return scores


def from_projector(folder: Path, triples: Tensor) -> Tensor:
    return by_formula(
        folder, *(torch.from_numpy(np.loadtxt(folder / f"{of}vectors.tsv")) for of in ("", "relation_")), triples
    )


def from_word2vec(folder: Path, triples: Tensor) -> Tensor:
    texts = [(folder / f"{name}.txt").read_text().splitlines()[1:] for name in ("entity", "relation", "inverse")]
    rows = [[[float(number) for number in line.split()[1:]] for line in lines] for lines in texts]
    entity, *relation = (torch.tensor(table, dtype=torch.float64) for table in rows)
    return by_formula(folder, entity, torch.cat(relation), triples)


READERS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "safetensors": from_model_folder,
    "numpy": from_numpy,
    "sparse": from_model_folder,
    "packed": from_model_folder,
    "parquet": from_parquet,
    "faiss": from_faiss,
    "onnx": from_onnx,
    "pykeen": from_pykeen,
    "projector": from_projector,
    "word2vec": from_word2vec,
}
every_format = pytest.mark.parametrize(
    "format_",
    [
        pytest.param(name, marks=pytest.mark.skipif(name in NEEDS and find_spec(NEEDS[name]) is None, reason="extra"))
        for name in FORMATS
    ],
)


def test_every_format_is_in_this_test() -> None:
    assert READERS.keys() == FORMATS.keys()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reload") / "model"
    graph = toy_graph(ENTITIES, RELATIONS)
    save_model(folder, toy_model(graph), graph, {})
    return folder


@pytest.fixture(scope="module")
def exports(model: Path) -> Callable[[str], Path]:
    """format -> its export, made once."""

    def made(format_: str) -> Path:
        out = model.with_name(format_)
        if not out.exists():
            export_model(model, out, format_, Ranks())
        return out

    return made


@every_format
def test_what_is_read_back_scores_as_the_model_does(
    format_: str, model: Path, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exports(format_), out)
    generator = torch.Generator().manual_seed(2)
    triples = (torch.rand(60, 3, generator=generator) * torch.tensor([ENTITIES, RELATIONS, ENTITIES])).long()
    wanted = distkgd.load(model).score(triples, ids=True)
    assert wanted.std() > 0.5
    close = CLOSE.get(format_, 1e-12)
    torch.testing.assert_close(READERS[format_](out, triples).to(wanted.dtype), wanted, rtol=close, atol=close)
    check_files(out)


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def of_another_model(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "truncated": shortened,
    "changed": of_another_model,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@every_format
def test_every_damaged_file_of_an_export_is_named(
    format_: str, damage: str, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    files = read_json(exports(format_) / "config.json")["sha256"]
    assert files
    for number, file in enumerate(files):
        out = tmp_path / str(number)
        shutil.copytree(exports(format_), out)
        DAMAGES[damage](out / file)
        with pytest.raises(ModelError, match=Path(file).name):
            check_files(out)


# What this library itself reads back.
OWN: dict[str, Callable[[Path, Path], Any]] = {
    "safetensors": lambda out, again: distkgd.load(out),
    "sparse": lambda out, again: distkgd.load(out),
    "packed": lambda out, again: distkgd.load(out),
    "faiss": lambda out, again: open_searcher(out),
    "numpy": lambda out, again: import_model(f"plain:{out}", again, Given(), Ranks()),
    "pykeen": lambda out, again: import_model(f"pykeen:{out}", again, Given(), Ranks()),
}


# The content of a model folder is not checked again whenever it is read.
UNSEEN = [(format_, "changed") for format_ in ("safetensors", "sparse", "packed")]


@pytest.mark.parametrize(("format_", "damage"), [(f, d) for f in OWN for d in DAMAGES if (f, d) not in UNSEEN])
def test_what_we_read_back_ourselves_names_the_damaged_file(
    format_: str, damage: str, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    if format_ in NEEDS:
        pytest.importorskip(NEEDS[format_])
    for number, file in enumerate(read_json(exports(format_) / "config.json")["sha256"]):
        out = tmp_path / str(number)
        shutil.copytree(exports(format_), out)
        DAMAGES[damage](out / file)
        with pytest.raises(ModelError, match=Path(file).name):
            OWN[format_](out, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_a_folder_that_lists_no_files_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    for content in ("{}", '{"sha256": {}}', '{"sha256": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match="holds no sha256"):
            check_files(tmp_path)
    with pytest.raises(ModelError, match=r"nothing/config\.json"):
        check_files(tmp_path / "nothing")
