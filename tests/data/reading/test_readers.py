"""Reading folders: formats, labels, warnings, vocabularies, and a round trip."""

import gzip
import hashlib
import os
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distkgd.data import Graph, Vocabulary, load_graph, triples
from distkgd.data.reading import formats, text_files
from distkgd.data.reading.folders import read_folder
from distkgd.errors import DataError
from distkgd.models.importers.foreign import names_of_table
from distkgd.models.model_folder import read_names, write_names

TRAIN = "b\tlikes\ta\na\tlikes\tc\nc\tknows\ta\n"
VALID = "a\tknows\tb\n"
TEST = "c\tlikes\tb\n"


def write(folder: Path, train=TRAIN, valid=VALID, test=TEST, ending=".txt") -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in {"train": train, "valid": valid, "test": test}.items():
        if text is not None:
            data = text if isinstance(text, bytes) else text.encode()
            (folder / (split + ending)).write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    return folder


def named(graph: Graph, split: str) -> list[tuple[str, str, str]]:
    return [
        (graph.entities.name(h), graph.relations.name(r), graph.entities.name(t))
        for h, r, t in getattr(graph, split).tolist()
    ]


def test_ids_follow_the_sorted_names_and_triples_the_order_of_the_file(tmp_path):
    graph = read_folder(write(tmp_path / "toy"))
    assert graph.name == "toy"
    assert graph.entities.names.to_list() == ["a", "b", "c"]
    assert graph.relations.names.to_list() == ["knows", "likes"]
    assert graph.train.tolist() == [[1, 1, 0], [0, 1, 2], [2, 0, 0]]
    assert graph.train.dtype == torch.int64
    assert graph.train.is_contiguous()
    assert graph.warnings == ()
    assert graph.summary() == {
        "name": "toy",
        "sha256": hashlib.sha256((TRAIN + VALID + TEST).encode()).hexdigest(),
        "num_entities": 3,
        "num_relations": 2,
        "num_train": 3,
        "num_valid": 1,
        "num_test": 1,
    }


@pytest.mark.parametrize("ending", formats.TEXT_ENDINGS)
def test_every_ending_reads_the_same_triples(tmp_path, ending):
    plain, other = (
        read_folder(write(tmp_path / "plain")),
        read_folder(write(tmp_path / "other", ending=ending)),
    )
    assert other.sha256 == plain.sha256
    for split in ("train", "valid", "test"):
        assert torch.equal(getattr(other, split), getattr(plain, split))


@pytest.mark.parametrize(
    ("train", "what"),
    [
        (TRAIN.replace("\n", "\r\n"), "CRLF"),
        (TRAIN.replace("\n", "\r\n").removesuffix("\n"), "CRLF with a cut last line"),
        (TRAIN.replace("\n", "\r\r\n"), "CRLF turned into CRCRLF"),
        (TRAIN.removesuffix("\n"), "no last line end"),
        (TRAIN + "\n\n", "blank lines at the end"),
        ("\ufeff" + TRAIN, "byte-order mark"),
        ("\ufeff" + TRAIN.replace("\n", "\r\n"), "byte-order mark and CRLF"),
    ],
)
def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path, train, what):
    graph = read_folder(write(tmp_path / "other", train=train))
    assert named(graph, "train") == [("b", "likes", "a"), ("a", "likes", "c"), ("c", "knows", "a")], what


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n", "\r", ""])
def test_an_empty_last_field_is_found_before_every_line_end(tmp_path, end):
    with pytest.raises(DataError, match=r"train\.txt, line 4: the tail is empty in 'a\\tlikes\\t'"):
        read_folder(write(tmp_path / "toy", train=TRAIN + "a\tlikes\t" + end))


def test_the_checksum_does_not_see_crlf(tmp_path):
    crlf = write(tmp_path / "crlf", *(text.replace("\n", "\r\n") for text in (TRAIN, VALID, TEST)))
    assert read_folder(crlf).sha256 == read_folder(write(tmp_path / "lf")).sha256


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("mark", [",", ";"])
def test_commas_and_semicolons_separate_where_the_first_line_has_no_tabs(tmp_path, ending, mark):
    files = {"train": "a,r,b\nb,r,a\n".replace(",", mark), "valid": None, "test": None}
    assert named(read_folder(write(tmp_path / "c", **files, ending=ending)), "train") == [
        ("a", "r", "b"), ("b", "r", "a"),
    ]  # fmt: skip
    tabs = write(tmp_path / "tabs", train="a,1\tr,x,y\tb\n", valid=None, test=None, ending=ending)
    assert named(read_folder(tabs), "train") == [("a,1", "r,x,y", "b")]


def test_quoted_commas_quotes_and_later_lines_are_read_as_rfc_4180(tmp_path):
    text = '"Paris, France",in,Europe\nEurope,"has ""it""","Paris, France"\n'
    graph = read_folder(write(tmp_path / "q", train=text, valid=None, test=None, ending=".csv.gz"))
    assert named(graph, "train") == [
        ("Paris, France", "in", "Europe"),
        ("Europe", 'has "it"', "Paris, France"),
    ]


def test_quotes_that_do_not_hold_every_field_of_a_first_line_between_tabs_belong_to_names(tmp_path):
    graph = read_folder(write(tmp_path / "b", train='"a"\tr\t"b\na\tr\t"b\n', valid=None, test=None))
    assert named(graph, "train") == [('"a"', "r", '"b'), ("a", "r", '"b')]
    assert """1 names of entities stand in quotes and without, such as '"a"' and 'a'""" in graph.warnings[-1]


def test_a_missing_valid_or_test_is_an_empty_split_and_a_warning(tmp_path):
    graph = read_folder(write(tmp_path / "toy", valid=None, test=None))
    assert graph.valid.shape == graph.test.shape == (0, 3)
    assert graph.valid.dtype == torch.int64
    assert [w.split(":")[0] for w in graph.warnings] == ["valid", "test"]
    assert "the split is empty" in graph.warnings[0]


def test_repeats_are_dropped_in_order_and_counted(tmp_path):
    graph = read_folder(write(tmp_path / "toy", train=TRAIN + TRAIN + "a\tknows\tc\n"))
    assert named(graph, "train") == [
        ("b", "likes", "a"), ("a", "likes", "c"), ("c", "knows", "a"), ("a", "knows", "c"),
    ]  # fmt: skip
    assert graph.warnings == ("train: 3 of 7 triples were there twice; the repeats were dropped",)


def test_unseen_entities_and_leaked_triples_are_kept_and_counted(tmp_path):
    graph = read_folder(write(tmp_path / "toy", valid="z\tlikes\ta\nb\tlikes\ta\n", test="y\tlikes\ty\n"))
    assert named(graph, "valid") == [("z", "likes", "a"), ("b", "likes", "a")]
    assert graph.entities.names.to_list() == ["a", "b", "c", "y", "z"]
    assert graph.warnings == (
        "valid: 1 of 2 triples hold an entity that train lacks; they are kept",
        "valid: 1 of 2 triples are in train too; they are kept",
        "test: 1 of 1 triples hold an entity that train lacks; they are kept",
    )


def test_labels_come_from_the_second_column_and_names_stand_in_for_missing_ones(tmp_path):
    folder = write(tmp_path / "toy")
    (folder / "names.tsv").write_text("a\tAnna\tignored\tx\nc\t \nelsewhere\tNobody\na\tAnn\n")
    (folder / "relation_names.tsv.gz").write_bytes(gzip.compress(b"likes\tis fond of\r\n"))
    graph = read_folder(folder)
    assert [graph.entities.label(i) for i in range(3)] == ["Anna", "b", "c"]
    assert graph.relations.label(1) == "is fond of"
    assert graph.entities.id("Anna") == 0
    assert graph.warnings == ("names.tsv: 1 lines give a second label to a name; the first is used",)


def test_a_mistake_in_the_second_block_is_reported_with_its_own_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", 40)
    lines = [f"entity{i}\tr\tentity{i + 1}" for i in range(50)]
    assert len(read_folder(write(tmp_path / "good", train="\n".join(lines), valid=None, test=None)).train) == 50
    lines[36] = "entity36\tr"
    with pytest.raises(DataError, match=r"train\.txt, line 37: 2 columns in 'entity36\\tr', expected 3"):
        read_folder(write(tmp_path / "bad", train="\n".join(lines), valid=None, test=None))
    lines[36] = "entity36\tr\té"
    data = "\n".join(lines).encode().replace("é".encode(), b"\xe9")
    with pytest.raises(DataError, match="line 37: byte 12 of the line is 0xe9, which is not UTF-8"):
        read_folder(write(tmp_path / "latin1", train=data, valid=None, test=None))


def test_a_checksum_that_differs_names_the_file(tmp_path):
    folder = write(tmp_path / "toy")
    expected = {"train": hashlib.sha256(TRAIN.encode()).hexdigest(), "valid": "0" * 64}
    with pytest.raises(DataError, match=r"valid\.txt: the sha256 .* expected 0000.*not the published file"):
        read_folder(folder, checksums=expected)


def test_a_file_without_read_permission_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "toy")

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    # Root may read everything, so the refusal is played.
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataError, match=r"train\.txt: the file cannot be read \(Permission denied\)"):
        read_folder(folder)


@pytest.mark.parametrize("given", ["folder", "text", "dotted"])
def test_load_graph_takes_a_folder_as_path_or_text(tmp_path, monkeypatch, given):
    folder = write(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    graph = load_graph({"folder": folder, "text": "toy", "dotted": f".{os.sep}toy"}[given])
    assert graph.name == "toy"
    assert len(graph.train) == 3


def test_load_graph_lists_what_it_knows_when_a_name_is_unknown():
    with pytest.raises(DataError, match=r"'wn18' .*pystdlib, wn18rr, fb15k-237, yago3-10, codex-s.*nations"):
        load_graph("wn18")


FIELD = st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
FIELD = FIELD.filter(lambda text: bool(text.strip()) and text[0] != "\ufeff")
BARE = FIELD.map(str.strip).filter(lambda text: text and text[0] != "\ufeff" and not text.startswith('"'))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(BARE, BARE, BARE), min_size=1, max_size=15, unique=True),
    ending=st.sampled_from([".txt", ".tsv.gz", ".csv"]),
)
def test_triples_that_are_written_are_read_back_equal(tmp_path_factory, rows, ending):
    text = "\n".join("\t".join(row) for row in rows)
    folder = write(tmp_path_factory.mktemp("round"), train=text, valid=text, test=None, ending=ending)
    graph = read_folder(folder)
    assert named(graph, "train") == rows
    assert named(graph, "valid") == rows
    assert graph.entities.names.to_list() == sorted({row[i] for row in rows for i in (0, 2)})


def test_names_and_labels_find_their_row_whatever_the_order_of_names():
    for names in (["x", "y", "z"], ["z", "x", "y"]):
        vocabulary = Vocabulary(pl.Series(names), pl.Series(["first", None, "x"]))
        assert [vocabulary.id(name) for name in names] == [0, 1, 2]
        assert vocabulary.id("first") == 0
        assert [vocabulary.label(i) for i in range(3)] == ["first", names[1], "x"]
        assert len(vocabulary) == 3


def test_an_ambiguous_label_lists_five_of_the_names_that_share_it():
    vocabulary = Vocabulary(pl.Series([f"e{i}" for i in range(7)]), pl.Series(["same"] * 7))
    expected = "7 names share the label 'same': 'e0', 'e1', 'e2', 'e3', 'e4' and 2 more; use a name"
    with pytest.raises(DataError, match=expected):
        vocabulary.id("same")


def test_an_unknown_text_is_answered_with_the_nearest_spellings():
    vocabulary = Vocabulary(pl.Series(["Q60", "Q84", "Q90"]), pl.Series(["New York", "London", "Paris"]))
    with pytest.raises(DataError, match="'Londn' is neither a name nor a label among 3; nearest: 'London'"):
        vocabulary.id("Londn")
    with pytest.raises(DataError, match="nearest: 'New York'"):
        vocabulary.id("new yrok")
    with pytest.raises(DataError, match="nothing is spelt like it"):
        vocabulary.id("zzzzzzzzzzzzzzzz")


def test_spelling_help_looks_at_a_bounded_number_of_names(monkeypatch):
    compared = []
    monkeypatch.setattr(triples, "_SPELLING_SCANNED", 500)
    close_matches = triples.difflib.get_close_matches

    def counting(word, known, n):
        compared.append(len(known))
        return close_matches(word, known, n=n)

    monkeypatch.setattr(triples.difflib, "get_close_matches", counting)
    names = pl.Series([f"Q{i:06d}" for i in range(100_000)])
    with pytest.raises(DataError, match=r"nearest: .*'Q012345'"):
        Vocabulary(names).id("Q0123456")
    assert compared[0] <= triples._SPELLING_COMPARED
    with pytest.raises(DataError, match="'Q00' is neither"):  # all names begin like it: nothing narrows them down
        Vocabulary(names).id("Q00")
    assert compared[1] <= triples._SPELLING_COMPARED


@pytest.mark.parametrize("id", [-1, 3])
def test_an_id_outside_the_vocabulary_is_refused(id):
    with pytest.raises(DataError, match=f"id {id} is outside the vocabulary; it has the ids 0 … 2"):
        Vocabulary(pl.Series(["a", "b", "c"])).name(id)


def test_a_vocabulary_refuses_doubled_names_tabs_and_labels_that_do_not_fit():
    with pytest.raises(DataError, match="'a' is doubled or empty"):
        Vocabulary(pl.Series(["a", "b", "a"]))
    with pytest.raises(DataError, match=r"'a\\tb' holds a tab"):
        Vocabulary(pl.Series(["a\tb"]))
    with pytest.raises(DataError, match="2 labels for 1 names"):
        Vocabulary(pl.Series(["a"]), pl.Series(["x", "y"]))


@settings(max_examples=40, deadline=None)
@given(names=st.lists(FIELD, max_size=20, unique=True))
def test_a_vocabulary_that_is_written_is_read_back_equal(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("vocabulary") / "entities.tsv"
    Vocabulary(pl.Series("name", names, dtype=pl.String)).write_tsv(path)
    assert path.read_text() == "".join(f"{i}\t{name}\n" for i, name in enumerate(names))
    assert Vocabulary.read_tsv(path).names.to_list() == names


@pytest.mark.parametrize("folder", ["m[1]", "m*", "m?", "~", "m 1", "m%20"])
def test_names_and_labels_of_models_and_imports_are_at_paths_that_are_no_patterns(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    for name, mark in ((folder, ""), ("m1", "other"), ("mm", "other")):
        Path(name).mkdir()
        vocabulary = Vocabulary(pl.Series([f"{mark}a", f"{mark}b"]), pl.Series([f"{mark}A", None]))
        write_names(Path(name), "entities", "entity_labels", vocabulary)
    found = read_names(Path(folder), "entities", "entity_labels", 2)
    assert found.names.to_list() == ["a", "b"] and found.label(0) == "A"
    assert names_of_table(Path(folder) / "entities.tsv", 2).to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\ta\n2\tb\n", "line 2: the id is 2, expected 1"),
        ("0\ta\n\n1\tb\n", "line 2: the id is None, expected 1"),
        ("zero\ta\n", "not a vocabulary"),
        ("0\ta\tb\n", "not a vocabulary"),
        ("0\ta\n1\t\n", "line 2: the name is empty"),
    ],
)
def test_a_damaged_vocabulary_file_is_refused(tmp_path, text, message):
    path = tmp_path / "entities.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        Vocabulary.read_tsv(path)
    assert str(path) in str(error.value)


SIZES = {
    "wn18rr": (86_835, 3_034, 3_134, 40_943, 11),
    "fb15k-237": (272_115, 17_535, 20_466, 14_541, 237),
    "codex-s": (32_888, 1_827, 1_828, 2_034, 42),
    "umls": (5_216, 652, 661, 135, 46),
    "kinship": (8_544, 1_068, 1_074, 104, 25),
    "nations": (1_592, 199, 201, 14, 55),
}
UNSEEN = {"wn18rr": (210, 210), "fb15k-237": (9, 28)}


@pytest.mark.parametrize("name", SIZES)
def test_the_public_data_sets_have_their_published_sizes(name):
    data = os.environ.get("DISTKGD_DATA")
    if data is None or not (Path(data) / name).is_dir():
        pytest.skip(f"DISTKGD_DATA holds no {name}")
    graph = load_graph(name)
    assert graph.name == name
    found = graph.summary()
    assert tuple(found[f"num_{key}"] for key in ("train", "valid", "test", "entities", "relations")) == SIZES[name]
    unseen = [int(w.split()[1].replace(",", "")) for w in graph.warnings if "an entity that train lacks" in w]
    assert tuple(unseen) == UNSEEN.get(name, ())
    if name in ("wn18rr", "fb15k-237"):
        assert all(graph.entities.label(row) != graph.entities.name(row) for row in range(0, 14_000, 500))
