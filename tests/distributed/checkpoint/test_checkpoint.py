"""What is on disk: it comes back at any world size, damage is named, pruning spares the right ones."""

import itertools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from distkgd.distributed.checkpoint import writer
from distkgd.distributed.checkpoint.reader import (
    checksum_of,
    latest,
    list_steps,
    load_rows,
    load_tensors,
    read_meta,
    verify,
)
from distkgd.distributed.checkpoint.tables import Rows, atomic_folder, read_table, write_table
from distkgd.distributed.checkpoint.writer import State, Writer
from distkgd.errors import CheckpointError
from tests.distributed.checkpoint.checkpoints import (
    DTYPES,
    Alone,
    Killed,
    failing_at,
    flip_last_bit,
    no_damage,
    on_ranks,
    random_bits,
    same_bits,
    save,
    save_split,
    small,
    synced_before_rename,
    truncate,
    value_of,
)

# --- Round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([0, 11], [0, 3, 7, 11]),
        ([0, 4, 11], [0, 11]),
        ([0, 1, 9, 11], [0, 5, 11]),
        ([0, 0, 11, 11], [0, 6, 11]),
        ([0, 7, 7, 11], [0, 0, 2, 11]),
    ],
)
def test_rows_come_back_bit_equal_at_another_world_size(
    tmp_path: Path, written: list[int], read: list[int], dtype: torch.dtype
) -> None:
    tables = {
        "entity": random_bits(11, 4, dtype=dtype),
        "entity.bias": random_bits(11, dtype=dtype, seed=1),
        "entity.moment": random_bits(11, 2, 3, dtype=dtype, seed=2),
    }
    path = save_split(tmp_path, 7, tables, dict.fromkeys(tables, written))
    verify(path)
    for name, table in tables.items():
        for lo, hi in itertools.pairwise(read):
            assert same_bits(load_rows(path, name, lo, hi), table[lo:hi])
    assert len(list(path.glob("rows-*"))) == sum(a < b for a, b in itertools.pairwise(written))


def test_tables_of_different_totals_and_splits_share_a_checkpoint(tmp_path: Path) -> None:
    tables = {name: random_bits(total, 3, dtype=torch.float32) for name, total in (("a", 9), ("b", 4), ("c", 4))}
    # ranks 0 and 1 both hold rows [0, 4), of different tables; "c" has no rows on rank 0
    path = save_split(tmp_path, 1, tables, {"a": [0, 4, 9], "b": [0, 4, 4], "c": [0, 0, 4]})
    verify(path)
    for name, table in tables.items():
        assert same_bits(load_rows(path, name, 0, len(table)), table)
    assert read_meta(path)["tables"]["c"]["files"][0]["file"] == "rows-00001.safetensors"


def test_an_empty_table_is_kept(tmp_path: Path) -> None:
    path = save_split(tmp_path, 1, {"none": torch.empty(0, 3)}, {"none": [0, 0, 0]})
    verify(path)
    assert load_rows(path, "none", 0, 0).shape == (0, 3)


def test_strided_shared_and_scalar_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "crop": whole[:, :2],
        "again": whole[:, 1:],
        "empty": torch.empty(0),
        "generator": torch.Generator().get_state(),
        "leaf": torch.ones(3, requires_grad=True),
    }
    path = save(tmp_path, 1, State({"crop": Rows(whole[:, :2], 0, 6)}, tensors), Alone())
    read = load_tensors(path)
    assert set(read) == set(tensors)
    assert all(same_bits(read[name], tensors[name].detach().contiguous()) for name in tensors)
    assert torch.equal(load_rows(path, "crop", 0, 6), whole[:, :2])


def test_a_table_larger_than_one_piece_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkgd.distributed.checkpoint.tables.PIECE_BYTES", 64)
    table = random_bits(101, 5, dtype=torch.float32)
    path = save(tmp_path, 1, State({"entity": Rows(table, 0, 101)}), Alone())
    assert same_bits(load_rows(path, "entity", 13, 97), table[13:97])


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = save_split(tmp_path, 1, {"entity": torch.arange(6.0).reshape(3, 2)}, {"entity": [0, 1, 3]})
    read = load_file(path / "rows-00001.safetensors")
    assert torch.equal(read["entity"], torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_tensors_are_aligned_and_independent_of_their_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(4, dtype=torch.int64)}
    file = save(tmp_path, 1, State(tensors=tensors), Alone()) / "replicated.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + length])["b"]["data_offsets"][0]
    assert (8 + length + start) % 8 == 0
    read = load_tensors(file.parent)
    file.write_bytes(b"\0" * len(content))
    assert torch.equal(read["b"], tensors["b"])


def test_meta_comes_back_as_json_has_it(tmp_path: Path) -> None:
    meta = {"pair": (1, 2), "best": float("inf"), "by_epoch": {2: 0.1, 10: 1 / 3}}
    path = save(tmp_path, 1, State(meta=meta), Alone())
    verify(path)
    assert read_meta(path)["meta"] == {
        "pair": [1, 2],
        "best": float("inf"),
        "by_epoch": {"2": 0.1, "10": 1 / 3},
    }


def test_the_manifest_says_what_the_checkpoint_holds(tmp_path: Path) -> None:
    path = save_split(tmp_path, 12, {"entity": torch.zeros(5, 2, dtype=torch.bfloat16)}, {"entity": [0, 2, 5]})
    manifest = read_meta(path)
    assert (manifest["step"], manifest["world"], manifest["meta"]) == (12, 2, {"epoch": 12})
    table = manifest["tables"]["entity"]
    assert (table["total"], table["row_shape"], table["dtype"]) == (5, [2], "bfloat16")
    assert [(part["lo"], part["hi"]) for part in table["files"]] == [(0, 2), (2, 5)]
    for name, record in manifest["files"].items():
        assert record["size"] == (path / name).stat().st_size


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    total = draw(st.integers(0, 30))
    cut = st.lists(st.integers(0, total), max_size=3).map(lambda inner: [0, *sorted(inner), total])
    return total, draw(cut), draw(cut)


@settings(max_examples=40, deadline=None, database=None)
@given(
    split=splits(),
    row_shape=st.sampled_from([(), (3,), (2, 2), (0,)]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_split_can_be_read_as_any_other(
    split: tuple[int, list[int], list[int]], row_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    total, written, read = split
    table = random_bits(total, *row_shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as name:
        path = save_split(Path(name), 0, {"t": table}, {"t": written})
        verify(path)
        for lo, hi in itertools.pairwise(read):
            assert same_bits(load_rows(path, "t", lo, hi), table[lo:hi])
        model = Path(name) / "model"
        files = on_ranks(
            len(written) - 1,
            lambda peers: write_table(
                model,
                "t",
                Rows(table[written[peers.rank] : written[peers.rank + 1]], written[peers.rank], total),
                peers,
            ),
        )
        assert files == [files[0]] * (len(written) - 1)
        for lo, hi in itertools.pairwise(read):
            assert same_bits(read_table(model, files[0], "t", lo, hi), table[lo:hi])


# --- Asking for what is not there


def test_an_unknown_table_is_refused_with_the_known_names(tmp_path: Path) -> None:
    path = save(tmp_path, 1, small(1.0), Alone())
    with pytest.raises(CheckpointError, match=r"no table 'relation'; it has entity"):
        load_rows(path, "relation", 0, 1)


@pytest.mark.parametrize(("lo", "hi"), [(0, 6), (-1, 2), (3, 2)])
def test_rows_outside_the_table_are_refused(tmp_path: Path, lo: int, hi: int) -> None:
    path = save(tmp_path, 1, small(1.0), Alone())
    with pytest.raises(CheckpointError, match="has 5 rows"):
        load_rows(path, "entity", lo, hi)


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path, Alone(), no_damage) is None
    assert latest(tmp_path / "absent", Alone(), no_damage) is None
    assert list_steps(tmp_path / "absent") == []


# --- Damage


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as a faulty writer would: with a matching checksum."""
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["checksum"] = checksum_of(manifest)
    path.write_text(json.dumps(manifest))


def first_part(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["tables"]["entity"]["files"][0]


ROWS = "rows-00000.safetensors"
DAMAGES = {
    "truncated rows": (ROWS, truncate, "expected"),
    "flipped bit in rows": (ROWS, flip_last_bit, "sha256"),
    "missing rows": (ROWS, Path.unlink, "missing"),
    "truncated tensors": ("replicated.safetensors", truncate, "expected"),
    "flipped bit in tensors": ("replicated.safetensors", flip_last_bit, "sha256"),
    "missing tensors": ("replicated.safetensors", Path.unlink, "missing"),
    "missing manifest": ("manifest.json", Path.unlink, "missing"),
    "garbage manifest": ("manifest.json", lambda p: p.write_bytes(b"\xff\x00{"), "not JSON"),
    "truncated manifest": ("manifest.json", truncate, "not JSON"),
    "manifest of another kind": ("manifest.json", lambda p: p.write_text("[1]"), "version"),
    "manifest with another value": (
        "manifest.json",
        lambda p: p.write_text(p.read_text().replace('"step": 2', '"step": 3')),
        "checksum",
    ),
    "manifest of the future": (
        "manifest.json",
        lambda p: reseal(p, lambda m: m.update(version=99)),
        "version 99",
    ),
    "rows that end early": (
        "manifest.json",
        lambda p: reseal(p, lambda m: first_part(m).update(hi=4)),
        "nowhere",
    ),
    "rows that start late": (
        "manifest.json",
        lambda p: reseal(p, lambda m: first_part(m).update(lo=1)),
        "nowhere",
    ),
    "rows twice": (
        "manifest.json",
        lambda p: reseal(p, lambda m: m["tables"]["entity"]["files"].append(first_part(m))),
        "twice",
    ),
    "a table without total": (
        "manifest.json",
        lambda p: reseal(p, lambda m: m["tables"]["entity"].pop("total")),
        "total",
    ),
    "a file without record": ("manifest.json", lambda p: reseal(p, lambda m: m["files"].pop(ROWS)), ROWS),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_checkpoint_is_used(tmp_path: Path, damage: str) -> None:
    file, spoil, word = DAMAGES[damage]
    good, bad = save(tmp_path, 1, small(1.0), Alone()), save(tmp_path, 2, small(2.0), Alone())
    verify(bad)
    spoil(bad / file)
    with pytest.raises(CheckpointError, match=word) as caught:
        verify(bad)
    assert str(bad / file) in str(caught.value)
    messages: list[str] = []
    assert latest(tmp_path, Alone(), messages.append) == good
    assert len(messages) == 1
    assert str(bad / file) in messages[0]
    assert f"the previous one, {good.name}, is used" in messages[0]


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_agree_on_the_newest_whole_checkpoint(tmp_path: Path, world: int) -> None:
    table = {"entity": torch.arange(12.0).reshape(6, 2)}
    paths = [save_split(tmp_path, step, table, {"entity": [0, 2, 4, 6]}) for step in (1, 2)]
    for file in sorted(paths[1].glob("*.safetensors")):
        content = file.read_bytes()
        flip_last_bit(file)
        messages: list[list[str]] = [[] for _ in range(world)]
        found = on_ranks(world, lambda peers, messages=messages: latest(tmp_path, peers, messages[peers.rank].append))
        assert found == [paths[0]] * world
        assert len(messages[0]) == 1
        assert file.name in messages[0][0]
        assert not any(messages[1:])
        file.write_bytes(content)
    assert on_ranks(world, lambda peers: latest(tmp_path, peers, no_damage)) == [paths[1]] * world


def test_when_nothing_is_whole_there_is_no_latest(tmp_path: Path) -> None:
    truncate(save(tmp_path, 1, small(1.0), Alone()) / ROWS)
    messages: list[str] = []
    assert latest(tmp_path, Alone(), messages.append) is None
    assert "there is no previous one" in messages[0]


@pytest.mark.parametrize("spoil", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_reading_a_damaged_file_names_it(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    path = save(tmp_path, 1, small(1.0), Alone())
    for file in (ROWS, "replicated.safetensors"):
        spoil(path / file)
    with pytest.raises(CheckpointError, match=ROWS):
        load_rows(path, "entity", 0, 5)
    with pytest.raises(CheckpointError, match=r"replicated\.safetensors"):
        load_tensors(path)


@pytest.mark.parametrize(
    "other",
    [torch.zeros(5, 1), torch.zeros(4, 2), torch.zeros(5, 2).double()],
    ids=["shape", "rows", "dtype"],
)
def test_a_file_with_another_table_is_named(tmp_path: Path, other: Tensor) -> None:
    path = save(tmp_path, 1, small(1.0), Alone())
    save_file({"entity": other}, path / ROWS)
    with pytest.raises(CheckpointError, match=f"{ROWS}: tensor 'entity' is"):
        load_rows(path, "entity", 0, 5)


# --- Pruning


def test_the_newest_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, small(step), Alone(), keep=2, protect={2})
    assert list_steps(tmp_path) == [2, 5, 6]
    save(tmp_path, 7, small(7.0), Alone(), keep=1)
    assert list_steps(tmp_path) == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000000007"]


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, small(step), Alone())
    truncate(tmp_path / "step_0000000002" / ROWS)
    save(tmp_path, 3, small(3.0), Alone())
    assert list_steps(tmp_path) == [1, 3]


def test_a_checkpoint_older_than_others_is_not_pruned_by_its_own_save(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, small(step), Alone(), keep=3)
    save(tmp_path, 15, small(15.0), Alone(), keep=1)
    assert list_steps(tmp_path) == [15, 20, 30]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, small(1.0), Alone())
    path = save(tmp_path, 1, small(2.0, rows=7), Alone())
    assert value_of(path) == 2.0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_impossible_steps_and_keeps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step=-1"):
        save(tmp_path, -1, small(1.0), Alone())
    with pytest.raises(ValueError, match="keep=0"):
        Writer(tmp_path, Alone(), keep=0)


# --- Writers that are killed


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
@pytest.mark.parametrize(
    ("before", "step", "keep"),
    [([1, 2], 3, 2), ([1], 2, 1), ([1], 1, 1)],
    ids=["prunes", "keeps one", "same step again"],
)
def test_a_writer_that_fails_anywhere_leaves_a_checkpoint_and_no_lasting_mess(
    tmp_path: Path, before: list[int], step: int, keep: int, error: BaseException
) -> None:
    outcomes = set()
    for call in range(1, 1000):
        folder = tmp_path / str(call)
        for old in before:
            save(folder, old, small(old), Alone(), keep=keep)
        try:
            with failing_at(call, error) as count:
                save(folder, step, small(50.0), Alone(), keep=keep)
        except (Killed, CheckpointError) as e:
            assert isinstance(error, Killed) or "No space left" in str(e)
        found = latest(folder, Alone(), no_damage)
        assert found is not None
        outcomes.add(value_of(found))
        assert value_of(found) in (before[-1], 50.0)
        for path in folder.glob("step_*"):
            verify(path)  # what is still there is whole, what is being removed is out of sight
        save(folder, 9, small(9.0), Alone(), keep=keep)
        assert value_of(folder / "step_0000000009") == 9.0
        assert not [path.name for path in folder.iterdir() if not path.name.startswith("step_")]
        assert len(list_steps(folder)) <= keep
        if count[0] < call:
            break
    assert call > 15  # the failures were where we think they are
    assert outcomes == {before[-1], 50.0}


def test_everything_is_on_disk_before_the_rename(tmp_path: Path) -> None:
    def write() -> None:
        save(tmp_path, 1, small(1.0), Alone())

    assert synced_before_rename(write, ".step_0000000001-*.tmp")

    def write_folder() -> None:
        with atomic_folder(tmp_path / "model", Alone()) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "model.json").write_text("{}")

    assert synced_before_rename(write_folder, ".model.tmp")


def test_what_a_killed_writer_left_is_ignored_then_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, small(1.0), Alone())
    for name in (".step_0000000002-0a.tmp", ".step_0000000007-0b.tmp", ".trash-1-step_0000000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert latest(tmp_path, Alone(), no_damage) == path
    assert list_steps(tmp_path) == [1]
    save(tmp_path, 2, small(2.0), Alone())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_0000000001", "step_0000000002"]


# --- One rank in trouble


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_full_disk_on_one_rank_is_an_error_on_all(
    tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"entity": torch.arange(12.0).reshape(6, 2)}
    save_split(tmp_path, 1, table, {"entity": [0, 2, 4, 6]})
    real = writer.write_tensors

    def write(path: Path, tensors: Any) -> Any:
        if path.name.startswith(f"rows-{victim:05d}"):
            raise OSError(28, "No space left on device", str(path))
        return real(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", write)

    def run(peers: Any) -> Path:
        rows = Rows(table["entity"][2 * peers.rank : 2 * peers.rank + 2], 2 * peers.rank, 6)
        return save(tmp_path, 2, State({"entity": rows}), peers)

    results = on_ranks(3, run)
    assert [type(result) for result in results] == [CheckpointError] * 3
    assert len({str(result) for result in results}) == 1
    assert f"rank {victim}: OSError" in str(results[0])
    assert "No space left" in str(results[0])
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000000001"]


BAD_STATES: dict[str, tuple[Callable[[int], State], str]] = {
    "a gap": (lambda r: State({"t": Rows(torch.zeros(2, 1), 3 * r, 5)}), "nowhere"),
    "an overlap": (lambda r: State({"t": Rows(torch.zeros(3, 1), 2 * r, 5)}), "twice"),
    "a missing end": (lambda r: State({"t": Rows(torch.zeros(2, 1), 2 * r, 5)}), "nowhere"),
    "rows past the end": (lambda r: State({"t": Rows(torch.zeros(3, 1), 3 * r, 5)}), "outside"),
    "two totals": (lambda r: State({"t": Rows(torch.zeros(2, 1), 2 * r, 4 + r)}), "disagree"),
    "two row shapes": (lambda r: State({"t": Rows(torch.zeros(2, 1 + r), 2 * r, 4)}), "disagree"),
    "two dtypes": (
        lambda r: State({"t": Rows(torch.zeros(2, dtype=DTYPES[r]), 2 * r, 4)}),
        "disagree",
    ),
    "a table on one rank only": (
        lambda r: State({"t": Rows(torch.zeros(2), 0, 2)} if r else {}),
        r"ranks \[0\]",
    ),
    "a scalar table": (lambda r: State({"t": Rows(torch.tensor(1.0), 0, 1)}), "dimension"),
    "a complex table": (
        lambda r: State({"t": Rows(torch.zeros(2, dtype=torch.cfloat), 2 * r, 4)}),
        "complex64",
    ),
    "a complex tensor": (lambda r: State({}, {"t": torch.zeros(2, dtype=torch.cfloat)}), "complex64"),
    "meta that is not JSON": (lambda r: State(meta={"a": {1, 2}}), "JSON"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_makes_no_checkpoint_is_refused_on_all_ranks(tmp_path: Path, case: str) -> None:
    state, word = BAD_STATES[case]
    results = on_ranks(2, lambda peers: save(tmp_path, 1, state(peers.rank), peers))
    assert [type(result) for result in results] == [CheckpointError] * 2
    assert all(re.search(word, str(result)) for result in results), results
    assert list(tmp_path.iterdir()) == []
