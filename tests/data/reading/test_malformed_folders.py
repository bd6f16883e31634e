"""Some three hundred damaged data folders: each is refused by file, line and cure, and left as it was.

Each kind of damage is done to folders that differ in size, file endings, line ends and byte-order marks, all drawn
from a seeded generator; the same generator without damage must give a folder that can be read.
"""

import gzip
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distkgd.data import load_graph
from distkgd.data.reading.formats import TEXT_ENDINGS as ENDINGS
from distkgd.errors import DataError

SPLITS = ("train", "valid", "test")
SEEDS = range(10)


@dataclass
class Folder:
    """A data folder before it is written. lines: text without line ends; a kind of damage edits what it likes."""

    random: random.Random
    lines: dict[str, list[bytes]] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)  # file name -> bytes that replace the lines
    special: dict[str, Callable[[Path], object]] = field(default_factory=dict)  # file name -> what makes it
    line_end: bytes = b"\n"
    mark: bytes = b""

    def file(self, split: str) -> str:
        return split + self.endings[split]

    def pick(self, *splits: str) -> tuple[str, int]:
        """A split and one of its rows."""
        split = self.random.choice(splits or SPLITS)
        return split, self.random.randrange(len(self.lines[split]))

    def text(self, split: str) -> bytes:
        return self.mark + self.line_end.join(self.lines[split]) + self.line_end

    def write(self, path: Path) -> None:
        path.mkdir()
        for split in self.lines:
            data = self.text(split)
            name = self.file(split)
            if name not in self.special:
                data = gzip.compress(data) if name.endswith(".gz") else data
                (path / name).write_bytes(self.raw.get(name, data))
        for name in self.raw.keys() - {self.file(split) for split in self.lines}:
            (path / name).write_bytes(self.raw[name])
        for name, make in self.special.items():
            make(path / name)


def draw_folder(seed: str) -> Folder:
    random_ = random.Random(seed)
    folder = Folder(random_)
    entities = [f"entité{i}".encode() for i in range(random_.randint(4, 40))]
    relations = [b"likes", b"part of", b"knows"]
    for split, size in zip(SPLITS, (30, 8, 8), strict=True):
        drawn = [(random_.choice(entities), random_.choice(relations), random_.choice(entities)) for _ in range(size)]
        if split == "train":
            drawn += [(entities[0], relation, entities[1]) for relation in relations]
        folder.lines[split] = [b"\t".join(triple) for triple in drawn]
        folder.endings[split] = random_.choice(ENDINGS)
    folder.line_end = random_.choice([b"\n", b"\r\n"])
    folder.mark = random_.choice([b"", b"", b"\xef\xbb\xbf"])
    return folder


def snapshot(path: Path) -> dict[str, object]:
    """Everything below a folder (or the bytes of a file) that a reader could have changed."""
    if path.is_file():
        return {"": path.read_bytes()}
    found: dict[str, object] = {}
    for entry in path.rglob("*") if path.exists() else ():
        status = entry.lstat()
        content = entry.read_bytes() if entry.is_file() else os.readlink(entry) if entry.is_symlink() else None
        found[str(entry.relative_to(path))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


# Every kind below damages a folder and returns what the message must hold.


def too_few_columns(folder: Folder) -> list[str]:
    split, row = folder.pick()
    count = folder.random.choice([1, 2])
    folder.lines[split][row] = b"\t".join(folder.lines[split][row].split(b"\t")[:count])
    columns = "1 column in" if count == 1 else "2 columns in"
    # A .csv is told from its first line, which here has neither tabs nor commas: tabs are expected all the same.
    return [f"{folder.file(split)}, line {row + 1}: {columns}", "expected 3: head, relation and tail with TABs"]


def too_many_columns(folder: Folder) -> list[str]:
    split, row = folder.pick()
    extra = folder.random.randint(1, 3)
    folder.lines[split][row] += b"\tmore" * extra
    return [f"{folder.file(split)}, line {row + 1}: {3 + extra} columns in", "expected 3"]


def blanks_instead_of_tabs(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.lines[split] = [line.replace(b"\t", b"  ") for line in folder.lines[split]]
    return [f"{folder.file(split)}, line 1: 1 column in", "with TABs between them"]


def too_long_a_line_is_shortened(folder: Folder) -> list[str]:
    split, row = folder.pick()
    folder.lines[split][row] = b"x" * 100_000
    return [f"{folder.file(split)}, line {row + 1}: 1 column in 'xxxxx", "…"]


def empty_field(folder: Folder) -> list[str]:
    split, row = folder.pick()
    column = folder.random.randrange(3)
    fields = folder.lines[split][row].split(b"\t")
    fields[column] = b""
    folder.lines[split][row] = b"\t".join(fields)
    name = ("head", "relation", "tail")[column]
    return [f"{folder.file(split)}, line {row + 1}: the {name} is empty in", "fill it or remove the line"]


def field_of_blanks(folder: Folder) -> list[str]:
    split, row = folder.pick()
    column = folder.random.randrange(3)
    fields = folder.lines[split][row].split(b"\t")
    fields[column] = folder.random.choice([b" ", "\u00a0".encode(), "\u2003 ".encode()])
    folder.lines[split][row] = b"\t".join(fields)
    name = ("head", "relation", "tail")[column]
    return [f"{folder.file(split)}, line {row + 1}: the {name} is empty in", "fill it or remove the line"]


def not_utf8(folder: Folder) -> list[str]:
    split, row = folder.pick()
    bad = folder.random.choice([b"\xff", b"\xe9", b"\xc3", b"\xed\xa0\x80", b"\x80"])
    line = folder.lines[split][row]
    folder.lines[split][row] = bad + b"!" + line
    byte = f"byte 1 of the line is 0x{bad[0]:02x}, which is not UTF-8; save it as UTF-8"
    return [f"{folder.file(split)}, line {row + 1}: {byte}"]


def latin1(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.mark = b""
    folder.lines[split] = [line.decode().encode("latin-1") for line in folder.lines[split]]
    return [f"{folder.file(split)}, line 1: byte 6 of the line is 0xe9, which is not UTF-8"]


def utf16(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    text = "\n".join(line.decode() for line in folder.lines[split]).encode("utf-16")
    name = folder.file(split)
    folder.raw[name] = gzip.compress(text) if name.endswith(".gz") else text
    return [f"{name}, line 1: byte 1 of the line is 0xff, which is not UTF-8; save it as UTF-8"]


def nul_byte(folder: Folder) -> list[str]:
    split, row = folder.pick()
    line = folder.lines[split][row]
    at = folder.random.randrange(len(line) + 1)
    while at < len(line) and line[at] & 0xC0 == 0x80:  # not inside a letter: that would be another damage
        at += 1
    folder.lines[split][row] = line[:at] + b"\0" + line[at:]
    return [f"{folder.file(split)}, line {row + 1}: byte {at + 1} of the line is NUL"]


def carriage_return(folder: Folder) -> list[str]:
    split, row = folder.pick()
    fields = folder.lines[split][row].split(b"\t")
    fields[0] += b"\r"
    folder.lines[split][row] = b"\t".join(fields)
    byte = f"byte {len(fields[0])} of the line is a carriage return without a line feed"
    return [f"{folder.file(split)}, line {row + 1}: {byte}", "LF or CRLF line ends"]


def empty_file(folder: Folder) -> list[str]:
    name = folder.file(folder.pick()[0])
    empty = folder.random.choice([b"", b"\n", b"\r\n\r\n", b"\xef\xbb\xbf"])
    folder.raw[name] = gzip.compress(empty) if name.endswith(".gz") and folder.random.random() < 0.8 else empty
    if name.endswith(".gz") and not folder.raw[name].startswith(b"\x1f") and empty:
        return [f"{name}: the gzip data is cut off or damaged"]
    return [f"{name}: the file is empty; fill it, or remove it"]


def cut_off_gzip(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.endings[split] = ".txt.gz"
    data = gzip.compress(folder.text(split))
    folder.raw[folder.file(split)] = data[: folder.random.randint(1, len(data) - 1)]
    return [f"{folder.file(split)}: the gzip data is cut off or damaged", "copy it again"]


def changed_byte_in_gzip(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.endings[split] = ".tsv.gz"
    data = bytearray(gzip.compress(folder.text(split)))
    data[folder.random.choice([0, 1, len(data) - 8, len(data) - 1])] ^= 0xFF  # the magic, the CRC, the length
    folder.raw[folder.file(split)] = bytes(data)
    return [f"{folder.file(split)}: the gzip data is cut off or damaged"]


def text_called_gz(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.endings[split] = ".txt.gz"
    folder.raw[folder.file(split)] = folder.text(split)
    return [f"{folder.file(split)}: the gzip data is cut off or damaged (Not a gzipped file"]


def gzip_called_text(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.endings[split] = ".txt"
    folder.raw[folder.file(split)] = gzip.compress(folder.text(split))
    return [f"{folder.file(split)}, line 1: byte 2 of the line is 0x8b", "it looks like gzip", "end in .gz"]


def no_train(folder: Folder) -> list[str]:
    del folder.lines["train"]
    there = sorted(folder.file(split) for split in ("valid", "test"))
    return ["is no data set: looked for train, valid and test ending in .txt", f"there are: {', '.join(there)}"]


def misspelt_train(folder: Folder) -> list[str]:
    name = folder.random.choice(["Trains.txt", "train.text", "training.tsv", "train.txt.bz2", "train"])
    folder.raw[name] = folder.text("train")
    del folder.lines["train"]
    return ["is no data set", "train is missing; there are:", name]


def nothing_there(folder: Folder) -> list[str]:
    folder.lines.clear()
    return ["is no data set", "train is missing; there is nothing in it"]


def two_files_for_a_split(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    other = split + folder.random.choice([e for e in ENDINGS if e != folder.endings[split]])
    folder.raw[other] = folder.text(split)
    return [" holds ", folder.file(split), other, "only one can be meant; remove the other"]


def folder_in_place_of_a_file(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.special[folder.file(split)] = Path.mkdir
    return [f"{folder.file(split)} is a folder; put a file there"]


def pipe_in_place_of_a_file(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.special[folder.file(split)] = os.mkfifo
    return [f"{folder.file(split)} is a device or pipe; put a file there"]


def link_to_nowhere(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.special[folder.file(split)] = lambda path: path.symlink_to("nowhere")
    return [f"{folder.file(split)}: the file cannot be read (No such file or directory); check the file"]


def relation_that_train_lacks(folder: Folder) -> list[str]:
    split, row = folder.pick("valid", "test")
    folder.lines[split][row] = b"entity\tnever seen\tentity"
    return [f"{folder.file(split)}, line {row + 1}: train has no triple with the relation 'never seen'", "1 lines"]


def commas_with_a_wrong_line(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.endings[split] = folder.random.choice([".csv", ".csv.gz"])
    folder.lines[split] = [line.replace(b"\t", b",") for line in folder.lines[split]]
    row = folder.random.randrange(1, len(folder.lines[split]))
    wrong, what = folder.random.choice(
        [
            (b"a,b", "2 columns in 'a,b'"),
            (b"a,b,c,d", "4 columns in"),
            (b"a,,c", "the relation is empty"),
        ]
    )
    folder.lines[split][row] = wrong
    if folder.random.random() < 0.5:  # quotes take another way through the reader
        folder.lines[split][0] = b",".join(b'"' + part + b'"' for part in folder.lines[split][0].split(b","))
    return [f"{folder.file(split)}, line {row + 1}: {what}"]


def wrong_quotes(folder: Folder) -> list[str]:
    split, _ = folder.pick()
    folder.endings[split] = ".csv"
    folder.lines[split] = [line.replace(b"\t", b",") for line in folder.lines[split]]
    row = folder.random.randrange(1, len(folder.lines[split]))
    wrong, what = folder.random.choice(
        [
            (b'a,r,"b', "unexpected end of data; close the quotes"),
            (b'a,r,"b"c', "',' expected after '\"'; close the quotes"),
            (b'a,r,"b\tc"', "a tab or a line break in a field; remove it"),
            (b'a,"r\nr",b', 'unexpected end of data; close the quotes, write " as "", and no line break in a name'),
        ]
    )
    folder.lines[split][row] = wrong
    return [f"{folder.file(split)}, line {row + 1}: {what}"]


def tab_among_commas(folder: Folder) -> list[str]:
    folder.endings["train"] = ".csv"
    folder.lines["train"] = [line.replace(b"\t", b",") for line in folder.lines["train"]]
    row = folder.random.randrange(1, len(folder.lines["train"]))
    folder.lines["train"][row] = b"a\tb,likes,c"
    return [f"train.csv, line {row + 1}: a tab or a line break in a field; remove it"]


def wrong_names(folder: Folder) -> list[str]:
    stem = folder.random.choice(["names", "relation_names"])
    lines = [f"name{i}\tlabel {i}\tmore" for i in range(20)]
    row = folder.random.randrange(20)
    lines[row] = folder.random.choice(["no label", "", " \tlabel", "\tlabel"])
    text = "\n".join(lines).encode() + b"\nlast\tline\n"
    folder.raw[f"{stem}.tsv"] = text
    return [f"{stem}.tsv, line {row + 1}: expected a name, a TAB and its label, found", "correct it"]


def unreadable_names(folder: Folder) -> list[str]:
    name, data, what = folder.random.choice(
        [
            ("names.tsv", b"a\tAnna\nb\t\xff\n", ", line 2: byte 3 of the line is 0xff, which is not UTF-8"),
            ("names.tsv.gz", b"a\tAnna\n", ": the gzip data is cut off or damaged"),
            ("relation_names.tsv", b"", ": the file is empty"),
            ("relation_names.tsv", b"a\tAn\0na\n", ", line 1: byte 5 of the line is NUL"),
        ]
    )
    folder.raw[name] = data
    return [name + what]


def two_name_files(folder: Folder) -> list[str]:
    folder.raw["names.tsv"] = b"a\tAnna\n"
    folder.raw["names.tsv.gz"] = gzip.compress(b"a\tAnna\n")
    return [" holds names.tsv and names.tsv.gz, and only one can be meant; remove the other"]


KINDS = [
    too_few_columns, too_many_columns, blanks_instead_of_tabs, too_long_a_line_is_shortened, empty_field,
    field_of_blanks, not_utf8, latin1, utf16, nul_byte, empty_file, cut_off_gzip,
    changed_byte_in_gzip, text_called_gz, gzip_called_text, carriage_return, no_train, misspelt_train,
    nothing_there, two_files_for_a_split, folder_in_place_of_a_file, pipe_in_place_of_a_file, link_to_nowhere,
    relation_that_train_lacks, commas_with_a_wrong_line, wrong_quotes, tab_among_commas, wrong_names,
    unreadable_names, two_name_files,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_folder_is_refused_by_file_line_and_cure_and_left_as_it_was(tmp_path, kind, seed):
    folder = draw_folder(f"{kind.__name__} {seed}")
    expected = kind(folder)
    path = tmp_path / "data"
    folder.write(path)
    before = snapshot(tmp_path)
    with pytest.raises(DataError) as error:
        load_graph(path)
    message = str(error.value)
    for part in [str(path), *expected]:
        assert part in message
    assert len(message) < 600 + 2 * len(str(path))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("seed", range(30))
def test_the_same_folders_without_damage_are_read_and_left_as_they_were(tmp_path, seed):
    folder = draw_folder(f"whole {seed}")
    folder.write(tmp_path / "data")
    before = snapshot(tmp_path)
    graph = load_graph(tmp_path / "data")
    assert len(graph.train) == len(set(folder.lines["train"]))
    assert snapshot(tmp_path) == before


def test_there_are_at_least_two_hundred_damaged_folders():
    assert len(KINDS) * len(SEEDS) >= 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder; give the one with train, valid and test"),
        (lambda path: path.write_text("a\tr\tb\n"), "is a file; give the folder that holds train, valid and test"),
        (lambda path: path.symlink_to("nowhere"), "no such folder"),
        (os.mkfifo, "the folder cannot be read"),
    ],
    ids=["absent", "file", "link to nowhere", "pipe"],
)
def test_what_is_no_folder_is_refused(tmp_path, make, message):
    path = tmp_path / "data"
    make(path)
    before = snapshot(tmp_path)
    with pytest.raises(DataError) as error:
        load_graph(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert snapshot(tmp_path) == before
