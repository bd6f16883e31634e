"""Files and folders that are no data set, drawn by number: what each is, and what its refusal has to say."""

import gzip
import io
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from tests.odd_files import RDF, SPLITS

PLAIN = b"".join(b"a%d\tr%d\tb%d\n" % (i % 7, i % 2, i % 9) for i in range(63))
STATEMENTS = b"".join(b"<http://x.org/a%d> <http://x.org/r> <http://x.org/b%d> .\n" % (i % 7, i % 9) for i in range(63))
STRANGE = (
    "", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tar.gz", ".tgz", ".rar", ".json", ".jsonl", ".xlsx",
    ".xls", ".ods",
    ".rdf", ".owl", ".xml", ".trig", ".hdt", ".db", ".sqlite", ".pkl", ".pt", ".npy", ".npz", ".feather", ".arrow",
    ".orc",
    ".html", ".pdf", ".md", ".tsv~", ".tsv.bak", ".parquet.gz", ".gz", ".text", ".tab", ".yaml", ".safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """What is given to `--data`: the file `name` of a folder, or the folder where there is none.

    words: of the message,
    besides the name of the file that is to blame (`blamed`). arguments: of the launcher besides.
    """

    files: dict[str, bytes]
    blamed: str
    words: tuple[str, ...] = ()
    name: str = ""
    arguments: tuple[str, ...] = ()
    folders: tuple[str, ...] = field(default=())

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        for name in self.folders:
            (path / name).mkdir()
        for name, data in self.files.items():
            (path / name).write_bytes(data)
        return path / self.name if self.name else path


def alone_and_among(name: str, data: bytes, *words: str, draw: random.Random) -> Iterator[Refusal]:
    """A file that is refused, by itself, and as a split of a folder whose other files are as they should be."""
    ending = name[name.index(".") :]
    yield Refusal({name: data}, name, words, name=name)
    split = draw.choice(SPLITS)
    others = {f"{other}.tsv": PLAIN for other in SPLITS if other != split}
    yield Refusal({split + ending: data} | others, split + ending, words)


def strange_endings() -> Iterator[Refusal]:
    """Triples under a name that says another kind of file."""
    for ending in STRANGE:
        yield Refusal({f"mine{ending}": PLAIN}, f"mine{ending}", (".tsv", ".parquet"), name=f"mine{ending}")
        for split in ("train", "valid"):
            files = {f"{other}.tsv": PLAIN for other in SPLITS if other != split}
            yield Refusal({split + ending: PLAIN} | files, split + ending, (".tsv", ".parquet"))


def parquet(frame: pl.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.write_parquet(file)
    return file.getvalue()


def wrong_parquet() -> Iterator[Refusal]:
    """Tables that are not of triples, and bytes that are no table."""
    draw = random.Random("parquet")
    columns = {"head": ["a", "b", "c"], "relation": ["r", "r", "r"], "tail": ["b", "c", "a"]}
    good = pl.DataFrame(columns)
    data = parquet(good)
    for column, names in columns.items():
        row = draw.randrange(3)
        for word in (None, "", "  ", "\u3000"):
            words = [word if i == row else name for i, name in enumerate(names)]
            wrong = parquet(good.with_columns(pl.Series(column, words, dtype=pl.String)))
            yield from alone_and_among("g.parquet", wrong, f"row {row + 1}", f"the {column} is empty", draw=draw)
        for word in ("a\tb", "a\nb", "a\rb", "a\0b"):
            wrong = parquet(good.with_columns(pl.lit(word).alias(column)))
            yield from alone_and_among("g.parquet", wrong, "row 1", draw=draw)
        for values in ([["a"]], [{"x": 1}], [None]):
            wrong = parquet(good.with_columns(pl.Series(column, values * 3)))
            yield from alone_and_among("g.parquet", wrong, draw=draw)
        yield from alone_and_among("g.parquet", parquet(good.drop(column)), "columns", draw=draw)
    yield from alone_and_among("g.parquet", parquet(good.head(0)), "no triple", draw=draw)
    four = good.rename({"head": "a", "relation": "b", "tail": "c"}).with_columns(d=1)
    yield from alone_and_among("g.parquet", parquet(four), "a, b, c, d", draw=draw)
    yield from alone_and_among("g.parquet", parquet(pl.DataFrame({"x": [1]})), "x", draw=draw)
    for cut in (4, 5, len(data) // 3, len(data) // 2, len(data) - 9, len(data) - 1):
        yield from alone_and_among("g.parquet", data[:cut], "not a Parquet file", draw=draw)
    for junk in (b"", PLAIN, b"PAR1", b"PAR1" * 9, gzip.compress(data), draw.randbytes(500)):
        yield from alone_and_among("g.parquet", junk, draw=draw)


def wrong_rdf() -> Iterator[Refusal]:
    """Statements that are not of the format that their name says, or of which none is a triple of the graph."""
    draw = random.Random("rdf")
    lines = STATEMENTS.splitlines(keepends=True)
    wrong = (
        b"<http://x.org/a> <http://x.org/r> .\n", b"<http://x.org/a> <http://x.org/r> <http://x.org/b>\n",
        b"a\tr\tb\n",
        b"<a b> <http://x.org/r> <http://x.org/b> .\n", b'"text" <http://x.org/r> <http://x.org/b> .\n',
        b"<http://x.org/a",
        b'<http://x.org/a> "r" <http://x.org/b> .\n', b"<http://x.org/a> <http://x.org/r> x:b .\n", b"\xff\xfe\n",
        b"\0\n",
        b'<http://x.org/a> <http://x.org/r> "open .\n', b"<html><body>404 Not Found</body></html>\n", b"{}\n",
        b"[\n", b"% x\n",
    )  # fmt: skip
    endings = itertools.cycle(RDF)
    for line in wrong:
        at = draw.randrange(len(lines))
        text = b"".join([*lines[:at], line, *lines[at:]])
        yield from alone_and_among(f"g{next(endings)}", text, draw=draw)
    literals = b'<http://x.org/a> <http://x.org/r> "text" .\n' * 3
    for empty in (b"", b"\n\n", b"# a comment\n", literals):
        yield from alone_and_among(f"g{next(endings)}", empty, draw=draw)
    packed = gzip.compress(STATEMENTS)
    for cut in (1, 9, 10, len(packed) // 2, len(packed) - 8, len(packed) - 1):
        yield from alone_and_among(f"g{next(endings)}.gz", packed[:cut], "cut off or damaged", draw=draw)


def wrong_openke() -> Iterator[Refusal]:
    """OpenKE's folders with one of their files changed."""
    entities = b"4\na\t0\nb\t1\nc\t2\nd\t3\n"
    good = {
        "train2id.txt": b"4\n0 1 0\n1 2 1\n2 3 0\n3 0 1\n",
        "valid2id.txt": b"1\n0 2 0\n",
        "test2id.txt": b"1\n1 3 0\n",
    }
    good |= {"entity2id.txt": entities, "relation2id.txt": b"2\nr\t0\ns\t1\n"}
    changes: dict[str, tuple[bytes, ...]] = {
        "train2id.txt": (
            b"5\n0 1 0\n1 2 1\n2 3 0\n3 0 1\n", b"3\n0 1 0\n1 2 1\n2 3 0\n3 0 1\n",
            b"4\n0 1 0\n1 2 1\n2 3 0\n3 0 7\n",
            b"4\n0 1 0\n1 2 1\n2 3 0\n3 9 1\n", b"4\n0 1 0\n1 2\n2 3 0\n3 0 1\n",
            b"4\n0 1 0\n1 2 1 1\n2 3 0\n3 0 1\n",
            b"4\n0 1 0\n1 2 x\n2 3 0\n3 0 1\n", b"4\n0 1 0\n1 2 -1\n2 3 0\n3 0 1\n",
            b"4\n0 1 0\n1 2 1.5\n2 3 0\n3 0 1\n",
            b"4\n0 1 0\n1 2 99999999999999999999\n2 3 0\n3 0 1\n", b"99999999999999999999\n0 1 0\n", b"4\n", b"",
            b"0\n",
            b"4\n0 1 0\n1 2 \xff\n2 3 0\n3 0 1\n", b"4\n0 1 0\n1 \x002 1\n2 3 0\n3 0 1\n", b"four\n0 1 0\n",
            b"0 1 0\n1 2 1\n",
        ),
        "entity2id.txt": (
            b"4\na\t0\nb\t1\nc\t2\n", b"4\na\t0\na\t1\nc\t2\nd\t3\n", b"4\na\t0\nb\t1\nc\t1\nd\t3\n", b"", b"4\n",
            b"a\nb\n",
            b"4\na\tx\nb\t1\nc\t2\nd\t3\n", b"4\n0\ta\n1\tb\n2\tc\n3\td\n", b"4\na\t0\nb\t1\nc\t2\n\xff\t3\n",
            b"4\na\t0\nb\t1\n\t2\nd\t3\n", b"4\na\t0\nb\t1\nc\t-2\nd\t3\n", b"4\na\t0\nb\t1\nx\ty\t2\nd\t3\n",
        ),
        "relation2id.txt": (b"1\nr\t0\n", b"2\nr\t0\nr\t1\n", b"2\nr\t0\ns\t0\n", b"r\n", b"2\nr\t0\ns\0\t1\n"),
        "valid2id.txt": (b"2\n0 2 0\n", b"1\n0 2 9\n", b"1\n0 2\n", b"1\n0 9 0\n"),
    }  # fmt: skip
    for name, contents in changes.items():
        for content in contents:
            yield Refusal(good | {name: content}, "2id.txt")


def wrong_text() -> Iterator[Refusal]:
    """Text without triples, in other encodings, cut off, or bytes that are no text."""
    draw = random.Random("text")
    packed = gzip.compress(PLAIN, mtime=0)
    endings = itertools.cycle((".txt", ".tsv", ".csv"))
    for empty in (b"", b"\n", b" \n\t\n", b"\xef\xbb\xbf", b"# nothing\n", b"head\trelation\ttail\n", b"\r\n\r\n"):
        yield from alone_and_among(f"g{next(endings)}", empty, draw=draw)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "shift-jis", "cp500"):
        text = "あ\tr\ti\n" if encoding == "shift-jis" else "é\tr\tb\n"
        yield from alone_and_among(f"g{next(endings)}", (text * 20).encode(encoding), "line 1", draw=draw)
    for size in (1, 7, 64, 1000, 9999):
        yield from alone_and_among(f"g{next(endings)}", b"\xff" + draw.randbytes(size), "line 1", draw=draw)
    for number in range(9):
        yield from alone_and_among(f"g{next(endings)}.gz", packed[: 1 + number * len(packed) // 9], "gzip", draw=draw)
    yield from alone_and_among(f"g{next(endings)}.gz", packed + b"behind", "gzip", draw=draw)
    yield from alone_and_among(f"g{next(endings)}.gz", PLAIN, "gzip", draw=draw)
    yield from alone_and_among(f"g{next(endings)}", packed, "gzip", draw=draw)
    for text in (
        b"a b c\n",
        b"a|r|b\n",
        b"a\tr\n",
        b"a\tr\tb\tc\n",
        b"a\n",
        b"{}\n",
        b"a r\tb\n",
        b"a,r\n",
        b'"a r b"\n',
    ):
        yield from alone_and_among(f"g{next(endings)}", text * 9, "line 1", "column", draw=draw)
    lines = PLAIN.splitlines(keepends=True)
    for line in (
        b"a\tr\n", b"a\tr\tb\tc\n", b"\tr\tb\n", b"a\t\tb\n", b"a\tr\t\n", b"a\0\tr\tb\n", b"a\rb\tr\tb\n",
        b"a\xff\tr\tb\n",
        b"a,r,b\n", b"<<<<<<< ours\n", b"\xc3\tr\tb\n", b"\xed\xa0\x80\tr\tb\n", b" \tr\tb\n", b"a\t\xc2\xa0\tb\n",
        b"x" * 9999 + b"\n",
    ):  # fmt: skip
        at = draw.randrange(2, 63)
        text = b"".join([*lines[:at], line, *lines[at:]])
        yield from alone_and_among(f"g{next(endings)}", text, f"line {at + 1}", draw=draw)


def wrong_folders() -> Iterator[Refusal]:
    """Folders in which it is not clear what is which, or in which something is missing."""
    three = {f"{split}.tsv": PLAIN for split in SPLITS}
    yield Refusal({}, "", ("train is missing", "nothing in it"))
    for split in ("valid", "test"):
        yield Refusal({f"{split}.tsv": PLAIN}, f"{split}.tsv", ("train is missing",))
    for other in ("train.csv", "train.tsv.gz", "train.txt"):
        data = gzip.compress(PLAIN) if other.endswith(".gz") else PLAIN
        yield Refusal(three | {other: data}, other, ("only one can be meant",))
    for pair in (("val.tsv", "dev.tsv"), ("val.tsv", "val.csv"), ("validation.txt", "dev.csv"), ("Val.tsv", "val.txt")):
        yield Refusal({"train.tsv": PLAIN} | dict.fromkeys(pair, PLAIN), pair[0], ("only one can be meant",))
    for name in ("train.tsv", "valid.tsv", "test.tsv", "dev.csv", "train.parquet", "valid.nt", "train2id.txt"):
        split = {"dev": "valid", "train2id": "train"}.get(name.split(".")[0], name.split(".")[0])
        files = {f"{one}.tsv": PLAIN for one in SPLITS if one != split}
        yield Refusal(files, name, ("folder",), folders=(name,))
    for split in ("valid", "test"):
        yield Refusal(three | {f"{split}.tsv": b"a1\tnew\tb2\n"}, f"{split}.tsv", ("train has no triple", "'new'"))
    for names in (b"a1\n", b"a1\t\xff\n", b"", b"\tlabel\n", b"a1\tone\na2\n"):
        yield Refusal(three | {"names.tsv": names}, "names.tsv")


def wrong_wishes() -> Iterator[Refusal]:
    """A good file and orders of columns that no file has; files of which nothing can be held out."""
    for columns in (
        "",
        "head",
        "head,relation",
        "head,head,tail",
        "a,b,c",
        "head,relation,tail,head",
        "head;relation;tail",
    ):
        yield Refusal({"g.tsv": PLAIN}, columns, ("columns",), "g.tsv", ("--columns", columns))
    for columns in ("head,relation,tail,weight", "x,head,relation,y,tail"):
        yield Refusal({"g.tsv": PLAIN}, "g.tsv", ("line 1", "column"), "g.tsv", ("--columns", columns))
    for text in (
        b"a\tr\tb\n",
        b"a\tr\tb\n" * 40,
        b"a\tr\tb\nb\tr\ta\n",
        b"".join(b"a%d\tr%d\tb%d\n" % (i, i, i) for i in range(9)),
    ):
        yield Refusal({"g.tsv": text}, "g.tsv", ("can be held out",), "g.tsv")


REFUSALS = {
    "endings": strange_endings, "parquet": wrong_parquet, "rdf": wrong_rdf, "openke": wrong_openke,
        "text": wrong_text,
    "folders": wrong_folders, "wishes": wrong_wishes,
}  # fmt: skip
