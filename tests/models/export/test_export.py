"""Exports: every format holds the same numbers and names, needs little memory, and is complete or not there."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distkgd.data import Vocabulary
from distkgd.distributed.checkpoint.tables import TAGS, seal, write_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.errors import DistkgdError, ModelError, UnsupportedError
from distkgd.models.export import FORMATS, IN_MEMORY, export_model, onnx_format
from distkgd.models.formats.sparse import read_sparse, smallest, tensors_of, write_sparse
from distkgd.models.model_folder import bytes_on_disk, check_numbers, load_model, save_model, sparse_bytes
from launch.export import main
from tests.covering import all_pairs
from tests.jobs import toy_model
from tests.launches import call
from tests.ranks import run_on_ranks, run_on_threads
from tests.toys import toy_graph

ENTITIES, RELATIONS = 41, 5


def sparse_table(folder: Path, name: str) -> Tensor:
    """A table of a sparse export, which is a model folder."""
    model = load_model(folder, Ranks()).model
    return model.entity.weight if name == "entity" else model.relation


def parquet_table(folder: Path, name: str) -> Tensor:
    """The column `embedding`."""
    column = pytest.importorskip("pyarrow.parquet").read_table(folder / f"{name}.parquet")["embedding"]
    return torch.from_numpy(column.combine_chunks().flatten().to_numpy().copy()).reshape(len(column), -1)


def faiss_table(folder: Path, name: str) -> Tensor:
    """The rows of the index, or the relations beside it."""
    if name == "relation":
        return load_file(folder / f"{name}.safetensors")[name]
    index = pytest.importorskip("faiss").read_index(str(folder / "entity.faiss"))
    return torch.from_numpy(index.reconstruct_n(0, index.ntotal))


def onnx_table(folder: Path, name: str) -> Tensor:
    """An initializer of the graph."""
    onnx = pytest.importorskip("onnx")
    found = {tensor.name: tensor for tensor in onnx.load(folder / "model.onnx").graph.initializer}
    table = found[{"entity": "entities", "relation": "relations"}[name]]
    return torch.from_numpy(onnx.numpy_helper.to_array(table).copy())


def pykeen_table(folder: Path, name: str) -> Tensor:
    """The rows of the toy ComplEx as PyKEEN's state dict has them, its relations interleaved with their inverses."""
    rows = torch.load(folder / "state_dict.pt")[f"{name}_representations.0._embeddings.weight"]
    return rows if name == "entity" else torch.cat([rows[0::2], rows[1::2]])


def projector_table(folder: Path, name: str) -> Tensor:
    """Numbers between TABs, a row per line."""
    path = folder / {"entity": "vectors.tsv", "relation": "relation_vectors.tsv"}[name]
    return torch.from_numpy(pl.read_csv(path, separator="\t", has_header=False).cast(pl.Float64).to_numpy().copy())


def word2vec_table(folder: Path, name: str) -> Tensor:
    """As anybody would read the format: a line "count dim", then words and numbers between blanks."""
    rows = []
    for file in [f"{name}.txt", *(["inverse.txt"] if name == "relation" else [])]:
        first, *lines = (folder / file).read_text().splitlines()
        found = [[float(number) for number in line.split(" ")[1:]] for line in lines]
        assert [len(found), *{len(row) for row in found}] == [int(number) for number in first.split(" ")]
        rows += found
    return torch.tensor(rows, dtype=torch.float64)


NEEDS = {"parquet": "pyarrow", "faiss": "faiss", "pykeen": "pykeen", "onnx": "onnxscript"}


def _missing(format_: str) -> bool:
    return format_ in NEEDS and find_spec(NEEDS[format_]) is None


def _needing(format_: str) -> Any:
    """The format, skipped where what it needs is not installed."""
    skipped = pytest.mark.skipif(_missing(format_), reason=f"{NEEDS.get(format_)} is not installed")
    return pytest.param(format_, marks=skipped)


READERS: dict[str, Callable[[Path, str], Tensor]] = {
    "safetensors": lambda folder, name: load_file(folder / f"{name}.safetensors")[name],
    "numpy": lambda folder, name: torch.from_numpy(np.load(folder / f"{name}.npy")),
    "sparse": sparse_table,
    "packed": sparse_table,
    "parquet": parquet_table,
    "faiss": faiss_table,
    "onnx": onnx_table,
    "pykeen": pykeen_table,
    "projector": projector_table,
    "word2vec": word2vec_table,
}
SINGLE = ("faiss", "onnx", "packed")  # rounded to float32 or less
needs_extras = pytest.mark.parametrize("format_", [_needing(format_) for format_ in FORMATS])


def test_every_format_is_in_this_test() -> None:
    assert READERS.keys() == FORMATS.keys()


def write_toy(ranks: Ranks, folder: str) -> None:
    graph = toy_graph(ENTITIES, RELATIONS)
    save_model(Path(folder), toy_model(graph, ranks=ranks), graph, {"stage": "student"})


def toy_folder(folder: Path, world: int = 1) -> Path:
    """A stage folder with a model in as many files per table as there are ranks."""
    run_on_ranks(world, write_toy, folder=str(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("export"), 2)


@pytest.fixture
def stage(made: Path, tmp_path: Path) -> Path:
    """A stage folder that a test may damage."""
    shutil.copytree(made, tmp_path / "stage")
    return tmp_path / "stage"


# --- What is in it


@needs_extras
def test_an_export_holds_the_numbers_and_names_of_the_model(format_: str, made: Path, tmp_path: Path) -> None:
    holds_what_is_exported(made, format_, tmp_path)


def test_an_export_of_a_model_in_one_file_holds_it_too(tmp_path: Path) -> None:
    holds_what_is_exported(toy_folder(tmp_path / "stage"), "numpy", tmp_path)


def holds_what_is_exported(folder: Path, format_: str, tmp_path: Path) -> None:
    """Export the model of a stage folder in a format and compare numbers, names and what is listed."""
    model = load_model(folder, Ranks())
    files = export_model(folder, tmp_path / "deep" / "out", format_, Ranks())
    out = tmp_path / "deep" / "out"
    for name, table in (("entity", model.model.entity.weight), ("relation", model.model.relation)):
        read = READERS[format_](out, name)
        if format_ in SINGLE:
            assert read.dtype == (torch.float64 if (format_, name) == ("faiss", "relation") else torch.float32)
            # Half a step of 8 bits, which bfloat16 has rounded.
            share = (1 / 255 + 1 / 256) if (format_, name) == ("packed", "entity") else 0.0
            coarse = share * table.abs().amax(1, keepdim=True) + 1e-6
            assert ((read - table).abs() <= 1.0001 * coarse).all()
        else:
            assert read.dtype == torch.float64
            assert torch.equal(read, table)
    for name in ("entities.tsv", "relations.tsv"):
        assert (out / name).read_bytes() == (folder / "model" / name).read_bytes()
    config, before = (json.loads((f / "config.json").read_text()) for f in (out, folder / "model"))
    assert {k: v for k, v in config.items() if before.get(k) != v}.keys() <= {"format", "files", "sha256", "packed"}
    assert [file for of_table in config["files"].values() for file in of_table] == [*config["sha256"]]
    for file, digest in config["sha256"].items():
        assert hashlib.sha256((out / file).read_bytes()).hexdigest() == digest
    named = {"README.md", "config.json", "entities.tsv", "relations.tsv", *config["sha256"]}
    assert {str(file.relative_to(out)) for file in files} == named
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == named
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_safetensors_export_is_a_model_again(stage: Path, tmp_path: Path) -> None:
    export_model(stage, tmp_path / "out", "safetensors", Ranks())
    first, second = (load_model(folder, Ranks()) for folder in (stage, tmp_path / "out"))
    assert torch.equal(first.model.entity.weight, second.model.entity.weight)
    assert torch.equal(first.model.relation, second.model.relation)
    export_model(tmp_path / "out", tmp_path / "again", "safetensors", Ranks())
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_numpy_export_says_that_it_is_no_model_folder(stage: Path, tmp_path: Path) -> None:
    export_model(stage, tmp_path / "out", "numpy", Ranks())
    with pytest.raises(ModelError, match="distkgd-numpy/1"):
        load_model(tmp_path / "out", Ranks())


@pytest.mark.parametrize("format_", ["safetensors", "numpy", "parquet"])
def test_names_with_the_sign_for_a_character_that_was_lost_go_along(format_: str, tmp_path: Path) -> None:
    names = pl.Series([f"caf\ufffd{i}" for i in range(ENTITIES)])
    graph = replace(toy_graph(ENTITIES, RELATIONS), entities=Vocabulary(names))
    save_model(tmp_path / "stage/model", toy_model(graph, ranks=Ranks()), graph, {"stage": "student"})
    export_model(tmp_path / "stage", tmp_path / "out", format_, Ranks())
    assert any("caf\ufffd7".encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_labels_go_along(stage: Path, tmp_path: Path) -> None:
    (stage / "model" / "entity_labels.tsv").write_text("0\tan ångström\n")
    export_model(stage, tmp_path / "out", "numpy", Ranks())
    assert (tmp_path / "out" / "entity_labels.tsv").read_text() == "0\tan ångström\n"


def resealed(model: Path, tables: dict[str, Tensor], **changes: Any) -> None:
    """Replace a model's tables by one file each, and entries of its config.json."""
    config = json.loads((model / "config.json").read_text()) | changes
    config["files"] = {name: [f"{name}.safetensors"] for name in tables}
    for name, table in tables.items():
        path = model / f"{name}.safetensors"
        config["sha256"][path.name] = seal(path, write_tensors(path, {name: table}))["sha256"]
    (model / "config.json").write_text(json.dumps(config))


def test_a_dtype_that_numpy_lacks_is_refused(stage: Path, tmp_path: Path) -> None:
    tables = {"entity": torch.ones(ENTITIES, 6), "relation": torch.ones(2 * RELATIONS, 6)}
    resealed(stage / "model", {name: table.bfloat16() for name, table in tables.items()})
    export_model(stage, tmp_path / "good", "safetensors", Ranks())
    with pytest.raises(DistkgdError, match=r"numpy has no BF16.*--format safetensors"):
        export_model(stage, tmp_path / "out", "numpy", Ranks())


# --- What is refused


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


SHARD = "entity-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "truncated shard": (SHARD, lambda p: os.truncate(p, p.stat().st_size - 1)),
    "missing shard": (SHARD, Path.unlink),
    "empty shard": (SHARD, lambda p: p.write_bytes(b"")),
    "flipped bit": (SHARD, lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1]))),
    "flipped bit in the last file": (
        "relation-00002-of-00002.safetensors",
        lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    ),
    "another tensor": (SHARD, lambda p: change(p, b'"entity"', b'"entitx"')),
    "fewer rows": ("config.json", lambda p: change(p, b'"num_entities": 41', b'"num_entities": 40')),
    "another width": ("config.json", lambda p: change(p, b'"dim": 6', b'"dim": 8')),
    "no digest": ("config.json", lambda p: change(p, b'"sha256"', b'"sha999"')),
    "no relations": ("config.json", lambda p: change(p, b'"num_relations"', b'"num_relatives"')),
    "another format": ("config.json", lambda p: change(p, b"distkgd-model/1", b"distkgd-model/9")),
    "config that is no JSON": ("config.json", lambda p: p.write_text("{")),
    "missing names": ("entities.tsv", Path.unlink),
    "a name too few": ("entities.tsv", lambda p: change(p, b"40\te040\n", b"")),
    "a name too many": ("relations.tsv", lambda p: p.write_bytes(p.read_bytes() + b"5\tr005\n")),
    "an empty name": ("entities.tsv", lambda p: change(p, b"\te007\n", b"\t\n")),
    "an id out of order": ("entities.tsv", lambda p: change(p, b"\n7\t", b"\n8\t")),
    "names cut short": ("relations.tsv", lambda p: os.truncate(p, p.stat().st_size - 1)),
}


def refusal(capsys: pytest.CaptureFixture[str], model: Path, out: Path, format_: str = "safetensors") -> str:
    """The one line with which the launcher refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(model, out, format_, None)
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    return line


@needs_extras
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line_and_nothing_is_left(
    damage: str, format_: str, stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, spoil = DAMAGES[damage]
    spoil(stage / "model" / file)
    named = {"fewer rows": "entity", "another width": "entity"}.get(damage, file)
    assert named in refusal(capsys, stage, tmp_path / "out", format_)
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no model" in refusal(capsys, tmp_path / "nothing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


MAKERS: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "file": lambda path: path.write_text("mine"),
    "link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_exists_is_not_written_over(
    kind: str, stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    MAKERS[kind](out)
    before = out.lstat()
    assert f"{out} exists" in refusal(capsys, stage, out)
    assert (out.lstat().st_ino, out.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_unknown_format_is_refused_with_the_known_ones(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, stage, tmp_path / "out", "onyx")
    for word in ("onyx", *FORMATS):
        assert word in line


def test_several_ranks_are_refused(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="without torchrun"):
        export_model(stage, tmp_path / "out", "numpy", Ranks(0, 2))


def test_a_full_disk_leaves_no_folder(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Any, folder: Path) -> dict[str, Any]:
        (folder / "entity.x").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "numpy", full)
    assert "No space left" in refusal(capsys, stage, tmp_path / "out", "numpy")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_graph_that_answers_otherwise_leaves_no_folder(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check = onnx_format._check

    def other(path: Path, model: Any) -> None:
        model.relations.data += 0.1
        check(path, model)

    monkeypatch.setattr(onnx_format, "_check", other)
    with pytest.raises(ModelError, match="differ from torch's by"):
        export_model(stage, tmp_path / "out", "onnx", Ranks())
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_the_launcher_says_what_it_has_written(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, told = call("export", (stage, "out", "--format", "numpy"))
    assert code == 0
    assert "written: out (README.md, config.json, entities.tsv, entity.npy, relation.npy, relations.tsv" in told
    assert np.load(tmp_path / "out/entity.npy").shape == (ENTITIES, 6)


# --- Memory

MEMORY = """
import importlib
import sys
from pathlib import Path
from distkgd.distributed.ranks import Ranks
from distkgd.models.export import export_model

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024

folder, *formats = sys.argv[1:]
for format_ in formats:
    if format_ in ("parquet", "faiss"):
        importlib.import_module({"parquet": "pyarrow.parquet"}.get(format_, format_))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is held now
    before = peak()
    export_model(Path(folder), Path(folder, format_), format_, Ranks())
    print(format_, peak() - before)
"""
LARGE = 400_000
STREAMED = [name for name in FORMATS if name not in (*IN_MEMORY, "word2vec")]  # whose numbers are projector's


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A 160 MB model of 400,000 entities in two files."""
    folder = tmp_path_factory.mktemp("large")
    write_toy(Ranks(), str(folder / "model"))
    model = folder / "model"
    rows = torch.rand(1, 100).expand(LARGE // 2, 100)
    config = json.loads((model / "config.json").read_text())
    config["files"]["entity"] = ["a.safetensors", "b.safetensors"]
    for file in config["files"]["entity"]:
        config["sha256"][file] = seal(model / file, write_tensors(model / file, {"entity": rows}))["sha256"]
    relation = model / "c.safetensors"
    config["files"]["relation"] = [relation.name]
    table = {"relation": torch.rand(2 * RELATIONS, 100)}
    config["sha256"][relation.name] = seal(relation, write_tensors(relation, table))["sha256"]
    config["scorer"]["dim"], config["num_entities"] = 100, LARGE
    (model / "config.json").write_text(json.dumps(config))
    with (model / "entities.tsv").open("w") as file:
        file.writelines(f"{i}\te{i}\n" for i in range(LARGE))
    yield folder
    shutil.rmtree(folder)  # pytest would keep it for a while


@pytest.fixture(scope="module")
def megabytes(large: Path) -> dict[str, float]:
    """How much more memory an export of the large model has needed, by format, in a process that has made them all."""
    formats = [name for name in STREAMED if not _missing(name)]
    done = subprocess.run([sys.executable, "-c", MEMORY, large, *formats], capture_output=True, text=True, check=True)
    return {name: float(number) for name, number in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("format_", [_needing(name) for name in STREAMED])
def test_an_export_needs_little_memory(format_: str, large: Path, megabytes: dict[str, float]) -> None:
    size = sum(path.stat().st_size for path in (large / format_).iterdir())
    assert size > (40e6 if format_ == "packed" else 160e6)
    assert READERS[format_](large / format_, "entity").shape == (LARGE, 100)
    # Less than the file of the table; Arrow keeps buffers that it has freed.
    assert megabytes[format_] < {"parquet": 144, "packed": 36}.get(format_, 64)


# --- Without zeros

SHARES = {"dense": 0.999, "bitmap": 0.2, "csr": 0.004, "coo": 0.00001}


def some(shape: tuple[int, int], share: float, dtype: torch.dtype) -> Tensor:
    """Normal numbers, all but a share of them 0, some of these -0."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(shape, generator=generator) < share
    kept[shape[0] // 2, 1] = True
    values = torch.randn(shape, generator=generator)
    return torch.where(kept, values, torch.where(values > 1, -0.0, 0.0)).to(dtype)


@pytest.mark.parametrize(
    ("layout", "piece_bytes", "dtype"),
    all_pairs(SHARES, [8, 80, 1 << 20], [torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_smallest_layout_is_written_counted_to_the_byte_and_read_back(
    layout: str, piece_bytes: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    shape = (999, 301) if layout in ("csr", "coo") else (61, 7)
    if piece_bytes == 8 and shape[0] > 61:
        piece_bytes = 8008
    table = some(shape, SHARES[layout], dtype)
    content = table.view(torch.uint8).numpy().tobytes()
    tag = TAGS[dtype]

    def pieces() -> Iterator[bytes]:
        yield from (content[at : at + piece_bytes] for at in range(0, len(content), piece_bytes))

    size = write_sparse(tmp_path / "table", pieces, tag, shape)
    nonzeros = int(torch.count_nonzero(table))
    assert smallest(tag, shape, nonzeros) == (layout, size) and (tmp_path / "table").stat().st_size == size
    others = [sum(n for *_, n in tensors_of(kind, tag, shape, nonzeros).values()) for kind in SHARES]  # type: ignore[arg-type]
    assert abs(size - min(others)) < 400  # but for the header
    read = read_sparse(tmp_path / "table", shape, 0, shape[0])
    assert read.dtype == dtype and torch.equal(read, table)
    assert torch.equal(read_sparse(tmp_path / "table", shape, 5, 40), table[5:40])
    stored = load_file(tmp_path / "table")
    assert stored.keys() == tensors_of(layout, tag, shape, nonzeros).keys()  # type: ignore[arg-type]
    if layout == "csr":
        starts = stored["starts"].long()
        assert torch.equal(starts.diff(), torch.count_nonzero(table, 1)) and starts[0] == 0


def test_a_sparse_export_is_a_model_that_ranks_like_the_whole_one_and_states_its_bytes(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {
        "entity": some((ENTITIES, 6), 0.1, torch.float32),
        "relation": some((2 * RELATIONS, 6), 0.3, torch.float32),
    }
    resealed(stage / "model", tables)
    with pytest.raises(SystemExit) as ended:
        main(stage, tmp_path / "out", "sparse", None)
    assert ended.value.code == 0
    found = load_model(tmp_path / "out", Ranks()).model
    assert torch.equal(found.entity.weight, tables["entity"]) and torch.equal(found.relation, tables["relation"])
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert bytes_on_disk(tmp_path / "out") == sparse_bytes(found) == size < bytes_on_disk(stage)
    said = capsys.readouterr()
    assert f"tables {size:,} bytes" in " ".join((said.err + said.out).split())
    halves = run_on_ranks(2, part_of, folder=str(tmp_path / "out"))
    assert torch.equal(torch.cat([entity for entity, _ in halves]), tables["entity"])
    assert {count for _, count in halves} == {size}


def part_of(ranks: Ranks, folder: str) -> tuple[Tensor, int]:
    model = load_model(Path(folder), ranks).model
    return model.entity.weight, sparse_bytes(model)


@pytest.mark.parametrize("share", [0.3, 0.001])
def test_a_damaged_sparse_file_is_refused_by_name(share: float, tmp_path: Path) -> None:
    table = some((400, 300), share, torch.float32)
    content = table.view(torch.uint8).numpy().tobytes()
    write_sparse(tmp_path / "table", lambda: [content], "F32", (400, 300))
    for shape in ((400, 200), (100, 300)):
        with pytest.raises(ModelError, match="table: missing, damaged, or no table of"):
            read_sparse(tmp_path / "table", shape, 0, 1)
    os.truncate(tmp_path / "table", (tmp_path / "table").stat().st_size - 1)
    with pytest.raises(ModelError, match="table: missing, damaged"):
        read_sparse(tmp_path / "table", (400, 300), 0, 1)


# -- numbers that are none --------------------------------------------------------------------------------------------


def poisoned(folder: Path, value: float, tensor: str, row: int, column: int) -> Path:
    """A model folder in two files of entities, one number of which is overwritten; returns that number's file."""
    run_on_ranks(2, save_toy, folder=str(folder))
    for path in sorted(folder.glob(f"{tensor}-*.safetensors")):
        rows = load_file(path)[tensor]
        if row < len(rows):
            rows[row, column] = value
            path.unlink()
            write_tensors(path, {tensor: rows})
            break
        row -= len(rows)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def save_toy(ranks: Ranks, folder: str) -> None:
    graph = toy_graph(ENTITIES, RELATIONS)
    save_model(Path(folder), toy_model(graph, "complex", 8, ranks=ranks), graph, {"source": "nowhere"})


def refused(ranks: Ranks, folder: str) -> str:
    with pytest.raises(ModelError) as info:
        load_model(Path(folder), ranks)
    return str(info.value)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("tensor", "row", "name"),
    [
        ("entity", 3, "entity 'e003'"),
        ("entity", 40, "entity 'e040'"),
        ("relation", 7, "inverse of relation 'r002'"),
    ],
)
def test_a_model_of_nan_is_loaded_on_no_rank_and_exported_in_no_format(
    world: int, tensor: str, row: int, name: str, tmp_path: Path
) -> None:
    path = poisoned(tmp_path / "model", math.nan, tensor, row, 5)
    said = f"{path}: tensor '{tensor}', row {row} ({name}), holds nan; such a model has no scores."
    for message in run_on_threads(world, refused, folder=str(tmp_path / "model")):
        assert message.startswith(said)
    for format_ in FORMATS if world == 1 else ():
        with pytest.raises(ModelError, match=re.escape(said)):
            export_model(tmp_path / "model", tmp_path / "out", format_, Ranks())
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", ["sparse", "packed"])
def test_exports_that_are_model_folders_are_refused_when_their_numbers_are_none(format_: str, tmp_path: Path) -> None:
    save_toy(Ranks(), str(tmp_path / "model"))
    export_model(tmp_path / "model", tmp_path / "out", format_, Ranks())
    key = "entity.step" if format_ == "packed" else "entity"
    path = tmp_path / f"out/{key}.safetensors"
    tensors = load_file(path)
    tensors[key if format_ == "packed" else "values"][4] = math.inf
    path.unlink()
    write_tensors(path, tensors)
    row = 4 if format_ == "packed" else "[0-9]+"
    for act in (lambda: load_model(tmp_path / "out", Ranks()), lambda: check_numbers(tmp_path / "out")):
        with pytest.raises(ModelError, match=rf"{key}.safetensors: tensor '{key}', row {row} \(entity 'e...'\), holds"):
            act()


@pytest.mark.parametrize("table", ["entity", "relation"])
def test_a_model_that_is_not_finite_is_not_written(table: str, tmp_path: Path) -> None:
    graph = toy_graph(ENTITIES, RELATIONS)
    model = toy_model(graph, "complex", 8)
    (model.entity.weight if table == "entity" else model.relation.data)[2, 1] = -math.inf
    with pytest.raises(ModelError, match=rf"is not written: the model's tensor '{table}', row 2 \(.*'\), holds -inf"):
        save_model(tmp_path / "model", model, graph, {})
    assert not (tmp_path / "model").exists()
