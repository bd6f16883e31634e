"""Files and folders of triples as odd as people have them, drawn by number, and how each is read by a dozen lines.

`write` makes the bytes of a file in a `Manner`; `read_plainly` is told the manner and says what the file holds. The
reader under test is told nothing.
"""

import csv
import dataclasses
import gzip
import io
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

Triple = tuple[str, ...]
SPLITS = ("train", "valid", "test")
CALLED = {"train": ("train",), "valid": ("valid", "valid", "val", "dev", "validation"), "test": ("test",)}
RDF = (".nt", ".nq", ".ttl")
# Names that readers have stumbled over: none of them begins or ends with white space.
WORDS = (
    "Paris", "São Paulo", "Sa\u0303o Paulo", "北京", "🙂", "العربية", "two  blanks", "1", "01", "1.0", "-7", "١٢",
    "null",
    "NaN", "None", "NA", "true", "'q'", "it's", "[1]", "a*b?", "a|b", "\\N", "\\t", "C:\\x", "#5", "%20", "=1+1",
        "@x",
    "x" * 500, "no\u00a0break", "zero\u200bwidth", "line\u2028end", "page\x0cend", "\x01", "\x7f", "--help", "~",
    "$HOME",
    "0x1F", "1e5", "/m/027rn", "http://x.org/a#b", "Ω", "\u2126", "ß", "ss", "-", ".", "..", "<b>", "{}", "r1",
)  # fmt: skip
MARKED = ("a, b", "a;b", 'say "hi"', "Paris, France", '"', "&amp;")  # in text, these need quotes
RELATIONS = ("likes", "part of", "r1", "7", "/people/person/born_in", "ist_Teil_von", "是")
HEADERS: tuple[tuple[str, ...], ...] = (
    ("head", "relation", "tail"), ("Subject", "PREDICATE", "object"), ("h", "r", "t"), ("#head", "relation", "tail"),
    ("source", "target", "type"), ("object", "predicate", "subject"), ("tail", "head", "relation"),
    (":START_ID", ":TYPE", ":END_ID"), ("weight", "subject", "predicate", "object"), ("s", "p", "when", "o"),
    ("relation", "head", "tail", "note"), ("?s", "?p", "?o"),
)  # fmt: skip
OF_COLUMN = {
    "head": ("head", "subject", "h", "source", "start", "s"),
    "relation": ("relation", "predicate", "r", "type", "p"),
    "tail": ("tail", "object", "t", "target", "end", "o"),
}
PLACES_OF_FOLDERS = (
    "data", "g[1]", "a*b", "what?", "{x,y}", " before", "behind ", "ünï çøde", "%20", "a#b", "dot.", "x" * 200, "🙂",
    "it's", 'q"q', "$HOME", "a:b", "s3:x", "-x", "train.tsv", "a\\b", "tab\there", "line\nbreak", "~", "(1)",
        "a|b;c&d",
)  # fmt: skip


@dataclass(frozen=True)
class Manner:
    """How a file is written.

    quotes: "none", "needed" (around fields that hold marks), "all". pad: white space around fields. header: the words
    of the first line, none if there is none. places: of head, relation and tail among `width` columns. clutter: blank
    lines and comments between the triples. marks: byte-order marks. behind: empty columns at the ends of some lines.
    stripped: outer white space is no part of a name.
    """

    ending: str = ".tsv"
    separator: str = "\t"
    quotes: str = "none"
    pad: str = ""
    header: tuple[str, ...] = ()
    places: tuple[int, int, int] = (0, 1, 2)
    width: int = 3
    clutter: bool = False
    line_end: str = "\n"
    last_line_end: bool = True
    marks: int = 0
    behind: int = 0
    stripped: bool = True


@dataclass(frozen=True)
class Case:
    """Files by name, and the triples of each split, in the order of their files, as `read_plainly` reads them.

    columns: what a person says of the order of the columns.
    """

    folder: str
    files: dict[str, bytes]
    expected: dict[str, list[Triple]]
    columns: tuple[str, ...] | None = None

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        for name, data in self.files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)
        return path


def read_plainly(data: bytes, manner: Manner) -> list[Triple]:
    """The triples of a file, by somebody who was told how it is written."""
    if manner.ending.lower().endswith(".gz"):
        data = gzip.decompress(data)
    if manner.ending.lower().endswith(".parquet"):
        return [tuple(str(row[place]) for place in manner.places) for row in pl.read_parquet(io.BytesIO(data)).rows()]
    text = data.decode("utf-8").lstrip("\ufeff").replace("\r", "")
    if manner.ending.lower().startswith(RDF):
        return read_rdf_plainly(text)
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("# ")]
    quoting = csv.QUOTE_NONE if manner.separator == "\t" and manner.quotes == "none" else csv.QUOTE_MINIMAL
    found = csv.reader(lines, delimiter=manner.separator, quoting=quoting, skipinitialspace=True)
    rows = list(found)[bool(manner.header) :]
    return [tuple(row[at].strip() if manner.stripped else row[at] for at in manner.places) for row in rows]


def read_rdf_plainly(text: str) -> list[Triple]:
    """Triples of N-Triples, N-Quads and of simple Turtle, without those that end in a literal."""
    text = re.sub(r"\\u([0-9A-F]{4})", lambda code: chr(int(code[1], 16)), re.sub(r"(?m)^#.*$", "", text))
    prefixes, said, rows = {"a": "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"}, [], []
    for token in re.findall(r'"[^"]*"\S*|<[^>]*>|[;,.](?=\s|$)|[^\s;,<>]+(?=\s)', text):
        if token not in (";", ",", "."):
            said.append(token)
            continue
        if said[0] == "@prefix":
            prefixes[said[1]] = said[2].strip("<>")
        elif not said[2].startswith('"'):
            rows.append(tuple(_term(word, prefixes) for word in said[:3]))
        del said[{";": 1, ",": 2, ".": 0}[token] :]
    return rows


def _term(word: str, prefixes: dict[str, str]) -> str:
    if word.startswith(("<", "_:")) or word == "a":
        return prefixes.get(word, word.strip("<>"))
    prefix, _, rest = word.partition(":")
    return prefixes[prefix + ":"] + rest


def write(rows: Sequence[Triple], manner: Manner, draw: random.Random) -> bytes:
    """The bytes of a file that holds `rows`."""
    if manner.ending.lower().endswith(".parquet"):
        return _parquet(rows, manner, draw)
    if manner.ending.lower().startswith(RDF):
        text = _rdf(rows, manner, draw)
    else:
        lines = [_line(manner.header, manner, "")] if manner.header else []
        for row in rows:
            cells = [draw.choice(("0.5", "12", "x")) for _ in range(manner.width)]
            for place, word in zip(manner.places, row, strict=True):
                cells[place] = word
            lines.append(_line(cells, manner, manner.pad) + manner.separator * draw.choice((0, manner.behind)))
            if manner.clutter and draw.random() < 0.2:
                lines.append(draw.choice(("", "  ", "# a comment", "\u00a0")))
        if manner.clutter:
            lines = draw.choice(([], ["# a comment"], ["", "# one", "# and another"])) + lines
        text = manner.line_end.join(lines) + manner.line_end * manner.last_line_end
    data = ("\ufeff" * manner.marks + text).encode()
    if not manner.ending.lower().endswith(".gz"):
        return data
    half = len(data) // 2  # as `cat a.gz b.gz` makes them
    parts = (data[:half], data[half:]) if draw.random() < 0.3 else (data,)
    return b"".join(gzip.compress(part, 1, mtime=0) for part in parts)


def _line(cells: Sequence[str], manner: Manner, pad: str) -> str:
    marks = (manner.separator, '"', ",", ";")
    quoted = [
        manner.quotes == "all" or (manner.quotes == "needed" and any(mark in cell for mark in marks)) for cell in cells
    ]
    words = ['"' + cell.replace('"', '""') + '"' if q else cell for cell, q in zip(cells, quoted, strict=True)]
    return manner.separator.join(pad + word + pad for word in words)


def _parquet(rows: Sequence[Triple], manner: Manner, draw: random.Random) -> bytes:
    columns = {name: [draw.random()] * len(rows) for name in manner.header}
    for place, column in zip(manner.places, zip(*rows, strict=True), strict=True):
        columns[manner.header[place]] = list(column)  # type: ignore[arg-type]
    frame = pl.DataFrame(columns)
    if draw.random() < 0.3:
        frame = frame.with_columns(pl.col(pl.String).cast(pl.Categorical))
    file = io.BytesIO()
    frame.write_parquet(file, compression=draw.choice(("zstd", "snappy", "gzip", "lz4", "uncompressed")))
    return file.getvalue()


def _rdf(rows: Sequence[Triple], manner: Manner, draw: random.Random) -> str:
    def full(word: str) -> str:
        return word if word.startswith("_:") else f"<{word}>"

    if ".ttl" in manner.ending.lower() and draw.random() < 0.7:
        return _turtle(rows, full, draw)
    lines = []
    for row in rows:
        head, relation, tail = map(full, row)
        graph = draw.choice(("", " <http://x.org/graph>")) if ".nq" in manner.ending.lower() else ""
        lines.append(f"{head} {relation} {tail}{graph} .")
        if manner.clutter and draw.random() < 0.3:
            more = f'{head} {relation} "text"{draw.choice(("", "@en-GB", "^^<http://x.org/t>"))} .'
            lines.append(draw.choice(("", "# a comment", more)))
    text = manner.line_end.join(lines) + manner.line_end
    if draw.random() < 0.3:
        text = re.sub("[^\x00-\x7f]", lambda letter: f"\\u{ord(letter[0]):04X}", text)
    return text


def _turtle(rows: Sequence[Triple], full: object, draw: random.Random) -> str:
    """Turtle with a prefix, and , and ; where a line begins as the one before."""
    assert callable(full)
    before: Triple = ("", "", "")
    text = "@prefix x: <http://x.org/> .\n# a comment\n"
    for row in rows:
        words = [re.sub(r"^<http://x\.org/(\w+)>$", r"x:\1", full(word)) for word in row]
        if row[:2] == before[:2]:
            text += f" , {words[2]}"
        elif row[0] == before[0]:
            text += f" ;\n    {words[1]} {words[2]}"
        else:
            text += (" .\n" if before[0] else "") + " ".join(words)
        before = row
    return text + ' ;\n    x:label "a literal" .\n' if draw.random() < 0.5 else text + " .\n"


def places_of(header: Sequence[str]) -> tuple[int, int, int]:
    """Of head, relation and tail in a header of `HEADERS`."""
    plain = [word.strip("#?:").lower().removesuffix("_id") for word in header]
    head, relation, tail = (next(i for i, word in enumerate(plain) if word in words) for words in OF_COLUMN.values())
    return head, relation, tail


def draw_manner(draw: random.Random, endings: Sequence[str], marked: bool) -> Manner:
    """How a file of words is written; `marked`: some of the words need quotes between commas."""
    ending = draw.choice(endings)
    if ending.endswith(".parquet"):
        header = draw.choice((*HEADERS, ("x", "y", "z")))
        return Manner(ending, header=header, places=(0, 1, 2) if header[0] == "x" else places_of(header))
    line_end, marks = draw.choice(("\n", "\n", "\r\n", "\r\r\n")), draw.choice((0, 0, 1, 2))
    if ending.startswith(RDF):
        return Manner(ending, line_end=draw.choice(("\n", "\r\n")), clutter=draw.random() < 0.5)
    separator = draw.choice(",;" if ending.startswith(".csv") and draw.random() < 0.8 else "\t\t\t,;")
    quotes = draw.choice(
        ("none", "all") if separator == "\t" else ("needed", "all") if marked else ("none", "needed", "all")
    )
    pads = ("", "", " ", "  ", "\u00a0", "\u3000") if quotes == "none" else ("", "", " ")
    header = draw.choice(HEADERS) if draw.random() < 0.5 else ()
    manner = Manner(
        ending,
        separator,
        quotes,
        pad=draw.choice(pads),
        header=header,
        places=places_of(header) if header else (0, 1, 2),
        width=len(header) or 3,
        clutter=draw.random() < 0.4,
        line_end=line_end,
        last_line_end=draw.random() < 0.8,
        marks=marks,
        behind=draw.choice((0, 0, 0, 1, 2)),
    )
    return manner if draw.random() < 0.9 else dataclasses.replace(manner, ending=ending.upper())


def draw_rows(draw: random.Random, entities: Sequence[str], relations: Sequence[str], number: int) -> list[Triple]:
    """Triples in which every relation is; some of them are there twice."""
    rows = [(draw.choice(entities), relation, draw.choice(entities)) for relation in relations]
    rows += [(draw.choice(entities), draw.choice(relations), draw.choice(entities)) for _ in range(number)]
    rows += draw.sample(rows, draw.choice((0, 0, 3)))
    return rows


def iris(words: Sequence[str]) -> list[str]:
    """Names that RDF can hold."""
    plain = [re.sub(r"[^\w]|\x01", "_", word)[:40] for word in words]
    return [f"http://x.org/{word}" if i % 3 else f"http://y.org/a/b#{word}" for i, word in enumerate(plain)]


def odd_folders(kind: str, endings: Sequence[str], number: int, rdf: bool = False) -> Iterator[Case]:
    """Folders whose files differ in their manners, with a place that could be taken for a pattern."""
    for seed in range(number):
        draw = random.Random(f"{kind} {seed}")
        marked = not rdf and draw.random() < 0.5
        words = draw.sample([*WORDS, *(MARKED if marked else ())], 24)
        relations: Sequence[str] = draw.sample(RELATIONS, 3)
        if rdf:
            words, relations = [*iris(words), "_:b0", "_:node1"], iris(relations)
        files, expected = {}, {}
        for split, size in zip(SPLITS, (40, 8, 8), strict=True):
            if split != "train" and draw.random() < 0.1:
                expected[split] = []
                continue
            manner = draw_manner(draw, endings, marked)
            stem = draw.choice(CALLED[split])
            name = (stem.title() if draw.random() < 0.1 else stem) + manner.ending
            rows = draw_rows(draw, words, relations if split == "train" else relations[:1], size)
            files[name] = write(rows, manner, draw)
            expected[split] = read_plainly(files[name], manner)
            assert [tuple(row) for row in rows] == expected[split], (
                f"{kind} {seed}: the plain reader reads {name} wrongly"
            )
        beside = {"README.md": b"of these triples", "raw/train.tsv": b"not\tthis\tone\n", ".DS_Store": b"\0\1"}
        for name in draw.sample(list(beside), draw.randrange(3)):
            files[name] = beside[name]
        yield Case(draw.choice(PLACES_OF_FOLDERS), files, expected)


def odd_single_files(kind: str, endings: Sequence[str], number: int, rdf: bool = False) -> Iterator[Case]:
    """One file, of which a third has its columns in an order that a person says."""
    for seed in range(number):
        draw = random.Random(f"{kind} {seed}")
        marked = not rdf and draw.random() < 0.5
        words, relations = draw.sample([*WORDS, *(MARKED if marked else ())], 16), draw.sample(RELATIONS, 3)
        if rdf:
            words, relations = iris(words), iris(relations)
        manner, columns = draw_manner(draw, endings, marked), None
        if not manner.header and not manner.ending.startswith(RDF) and draw.random() < 0.6:
            columns = tuple(draw.sample(("head", "relation", "tail", "-")[: draw.choice((3, 4))], k=3))
            columns = columns if "-" not in columns else (*columns, *({"head", "relation", "tail"} - {*columns}))
            at = (columns.index("head"), columns.index("relation"), columns.index("tail"))
            manner = dataclasses.replace(manner, places=at, width=len(columns))
        name = draw.choice(("g[1]", "a*b", "my triples", "ünï", "100%", "x" * 100, "-", "a.b.c")) + manner.ending
        rows = draw_rows(draw, words, relations, 120)
        files = {name: write(rows, manner, draw)}
        yield Case(draw.choice(PLACES_OF_FOLDERS), files, {"train": read_plainly(files[name], manner)}, columns)


def odd_openke(number: int) -> Iterator[Case]:
    """Folders as OpenKE has them: ids from 0 in the order head, tail, relation, and files of their names."""
    for seed in range(number):
        draw = random.Random(f"openke {seed}")
        gap, end = draw.choice(("\t", " ", "  ")), draw.choice(("\n", "\r\n"))
        entities, relations = draw.sample(WORDS, 20), draw.sample(RELATIONS, 3)
        tables = {"entity": list(enumerate(entities)), "relation": list(enumerate(relations))}
        named = draw.random() < 0.8
        files, expected = {}, {}
        for split, size in zip(SPLITS, (40, 8, 8), strict=True):
            rows = draw_rows(draw, range(20), range(3), size)  # type: ignore[arg-type]
            lines = [str(len(rows)), *(gap.join(map(str, (head, tail, relation))) for head, relation, tail in rows)]
            files[f"{split}2id.txt"] = (end.join(lines) + end * draw.choice((0, 1, 2))).encode()
            expected[split] = read_openke_plainly(files[f"{split}2id.txt"].decode(), tables if named else None)
        for kind, table in tables.items() if named else ():
            draw.shuffle(table)
            lines = [str(len(table))] * draw.choice((0, 1)) + [f"{name}\t{row}" for row, name in table]
            files[f"{kind}2id.txt"] = (end.join(lines) + end).encode()
        yield Case(draw.choice(PLACES_OF_FOLDERS), files, expected)


def read_openke_plainly(text: str, tables: dict[str, list[tuple[int, str]]] | None) -> list[Triple]:
    """The triples of a file of OpenKE's, whose ids are names where there are no tables."""
    rows = [line.split() for line in text.split("\n")[1:] if line.strip()]
    if tables is None:
        return [(head, relation, tail) for head, tail, relation in rows]
    entities, relations = dict(tables["entity"]), dict(tables["relation"])
    return [(entities[int(head)], relations[int(relation)], entities[int(tail)]) for head, tail, relation in rows]
