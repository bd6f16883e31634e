"""Tables in files, and folders that are old or new but never half."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distkgd.common.files import restore
from distkgd.distributed.checkpoint.tables import Rows, atomic_folder, read_table, write_table
from distkgd.errors import ModelError
from tests.distributed.checkpoint.checkpoints import (
    DTYPES,
    Alone,
    Killed,
    failing_at,
    on_ranks,
    random_bits,
    same_bits,
    truncate,
)


def write_model(folder: Path, table: Tensor, cuts: list[int]) -> list[str]:
    def run(peers: Any) -> list[str]:
        lo, hi = cuts[peers.rank], cuts[peers.rank + 1]
        with atomic_folder(folder, peers) as temporary:
            assert not list(temporary.iterdir()) or peers.world > 1
            files = write_table(temporary, "entity", Rows(table[lo:hi], lo, len(table)), peers)
            if peers.rank == 0:
                (temporary / "model.json").write_text(json.dumps(files))
        return files

    results = on_ranks(len(cuts) - 1, run)
    assert results == [results[0]] * (len(cuts) - 1)
    assert isinstance(results[0], list), results
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[0, 7], [0, 3, 7], [0, 0, 5, 7]])
def test_a_table_is_its_files_in_order(tmp_path: Path, cuts: list[int], dtype: torch.dtype) -> None:
    table, world = random_bits(7, 3, dtype=dtype), len(cuts) - 1
    files = write_model(tmp_path / "model", table, cuts)
    assert files == [f"entity-{i:05d}-of-{world:05d}.safetensors" for i in range(1, world + 1)]
    assert same_bits(torch.cat([load_file(tmp_path / "model" / file)["entity"] for file in files]), table)
    for lo in range(8):
        for hi in range(lo, 8):
            assert same_bits(read_table(tmp_path / "model", files, "entity", lo, hi), table[lo:hi])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def rewrite(table: Tensor) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        write_table(path.parent, "entity", Rows(table, 0, len(table)), Alone())
        (path.parent / "entity-00001-of-00001.safetensors").rename(path)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [truncate, Path.unlink, rewrite(torch.zeros(4, 5)), rewrite(torch.zeros(4, 3).double())],
    ids=["truncated", "missing", "wrong shape", "wrong dtype"],
)
def test_a_damaged_model_file_is_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    files = write_model(tmp_path / "model", torch.zeros(7, 3), [0, 3, 7])
    spoil(tmp_path / "model" / files[1])
    for hi in (7, 2):  # even when the rows lie in the other file
        with pytest.raises(ModelError, match=files[1]):
            read_table(tmp_path / "model", files, "entity", 0, hi)


def test_the_files_are_in_the_order_of_rows_even_if_the_ranks_are_not(tmp_path: Path) -> None:
    table = torch.arange(5.0)

    def run(peers: Any) -> list[str]:
        lo, hi = [(3, 5), (0, 3)][peers.rank]
        return write_table(tmp_path, "t", Rows(table[lo:hi], lo, 5), peers)

    files = on_ranks(2, run)[0]
    assert files == sorted(files)
    assert torch.equal(read_table(tmp_path, files, "t", 0, 5), table)
    assert torch.equal(load_file(tmp_path / files[0])["t"], table[:3])


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write_table(tmp_path, "t", Rows(torch.ones(2), 0, 2), Alone())
    with pytest.raises(ModelError, match="exists"):
        write_table(tmp_path, "t", Rows(torch.zeros(2), 0, 2), Alone())


def test_model_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    files = write_model(tmp_path / "model", torch.zeros(7, 3), [0, 7])
    with pytest.raises(ModelError, match="7 rows"):
        read_table(tmp_path / "model", files, "entity", 0, 8)
    with pytest.raises(ModelError, match="relation"):
        read_table(tmp_path / "model", files, "relation", 0, 7)
    with pytest.raises(ModelError, match="0 files"):
        read_table(tmp_path / "model", [], "entity", 0, 7)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_on_one_rank_keeps_the_old_model_folder(tmp_path: Path, victim: int) -> None:
    files = write_model(tmp_path / "model", torch.ones(4, 2), [0, 4])

    def run(peers: Any) -> None:
        with atomic_folder(tmp_path / "model", peers) as temporary:
            (temporary / f"part-{peers.rank}").write_text("new")
            if peers.rank == victim:
                raise OSError(28, "No space left on device")

    results = on_ranks(2, run)
    assert [type(result) for result in results] == [ModelError] * 2
    assert all(f"rank {victim}: {tmp_path / 'model'} cannot be written" in str(result) for result in results)
    assert torch.equal(read_table(tmp_path / "model", files, "entity", 0, 4), torch.ones(4, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_ranks_that_hold_no_table_are_told_together(tmp_path: Path) -> None:
    results = on_ranks(2, lambda peers: write_table(tmp_path, "t", Rows(torch.zeros(2, 1), 0, 4), peers))
    assert [str(result) for result in results] == [str(results[0])] * 2
    assert isinstance(results[0], ModelError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_a_model_folder_is_old_or_new_wherever_its_writer_fails(tmp_path: Path, error: BaseException) -> None:
    outcomes = set()
    for call in range(1, 1000):
        folder = tmp_path / str(call) / "model"

        def write(value: float, folder: Path = folder) -> None:
            with atomic_folder(folder, Alone()) as temporary:
                (temporary / "sub").mkdir()
                files = write_table(temporary, "entity", Rows(torch.full((3, 2), value), 0, 3), Alone())
                (temporary / "sub" / "model.json").write_text(json.dumps(files))

        def read(folder: Path = folder) -> float:
            files = json.loads((folder / "sub" / "model.json").read_text())
            return read_table(folder, files, "entity", 0, 3).unique().item()

        write(1.0)
        try:
            with failing_at(call, error) as count:
                write(2.0)
        except (Killed, ModelError):
            pass
        restore(folder)
        outcomes.add(read())
        write(3.0)
        assert read() == 3.0
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if count[0] < call:
            break
    assert call > 10
    assert outcomes == {1.0, 2.0}
