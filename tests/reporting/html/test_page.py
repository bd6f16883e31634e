"""report.html of toy runs: its numbers are the run's, nothing refers elsewhere, no name becomes markup."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from distkgd.common.text import fixed
from distkgd.data import load_graph
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.evaluation.ranking import ranks_of
from distkgd.models.model_folder import load_model
from distkgd.reporting.html import examples as examples_module
from distkgd.reporting.html import remake, render
from distkgd.reporting.html.charts import Matrix
from distkgd.reporting.html.examples import PER_RELATION, SEED
from distkgd.reporting.html.frontier import frontier_section
from distkgd.reporting.records import RECORDS, records_beside
from distkgd.reporting.report import HEADER, rows
from distkgd.reporting.run_report import Figures
from tests.launches import call
from tests.records import report_of
from tests.reporting.html.pages import STAGE, TAUGHT, Node, cells, nasty_graph, ran, read

GRAPH = nasty_graph()
MED = {"student": {**STAGE, "dim": 12, "method": "med", "loss": {"name": "softplus"}}, "baseline": {"dim": 4}}


@pytest.fixture(scope="module")
def folder(taught: Path) -> Path:
    """A finished run of teacher, DualDE student and direct model."""
    return taught


@pytest.fixture(scope="module")
def croppable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of MED and a direct model of a smaller dim."""
    made = tmp_path_factory.mktemp("med") / "run"
    ran(made, MED)
    return made


def report_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return report_in(folder)


@pytest.fixture(scope="module")
def page(folder: Path) -> Node:
    return read((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Of the run, to be changed."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def loaded() -> Any:
    return GRAPH


def figure(page: Node, title: str) -> Node:
    (found,) = [one for one in page.find("figure") if one.find("h3")[0].text == title]
    return found


def titles(page: Node) -> list[str]:
    return [one.find("h3")[0].text for one in page.find("figure")]


def assert_results(section: Node, report: dict[str, Any]) -> None:
    """The table of results has the figures of the Markdown, those first that a telephone shows without scrolling."""
    (head,) = section.find("table")[0].find("thead")
    header = [cell.text for cell in head.find("th")]
    assert header[:3] == ["stage", "test MRR", "valid MRR"]
    found = [dict(zip(header, row, strict=True)) for row in cells(section.find("table")[0])]
    assert found == [dict(zip(HEADER, row, strict=True)) for row in rows(report_of(report))]


# -- what it says ---------------------------------------------------------------------------------------------------


def test_the_result_table_is_that_of_the_markdown(page: Node, report: dict[str, Any]) -> None:
    (section,) = page.find("section", id="result")
    assert_results(section, report)
    (use,) = section.find("pre")
    for words in ("predict stages/student --head", "export stages/student", "register .", "load('stages/student')"):
        assert f"distkgd {words}" in use.text or f"distkgd.{words}" in use.text
    texts = [p.text for p in section.find("p")]
    assert any(text.startswith("student − direct:") for text in texts)


def test_the_figures_at_the_top_are_those_of_the_student(page: Node, report: dict[str, Any]) -> None:
    (keys,) = page.find("dl", class_="keys")
    said = dict(zip((dt.text for dt in keys.find("dt")), (dd.text for dd in keys.find("dd")), strict=True))
    texts = dict(zip(HEADER, rows(report_of(report))[1], strict=True))
    assert said["test MRR of student"] == texts["test MRR"]
    assert said["of the teacher's test MRR kept"] == texts["retained"]
    assert said["smaller than the teacher, on disk"] == texts["smaller"]
    ours, theirs = (float(fixed(report["stages"][i]["test"]["mrr"])) for i in (1, 2))
    gain = ours - theirs
    assert said[
        "test MRR over direct, equally small and trained without a teacher; one seed"
    ] == f"{gain:+.3f}".replace("-", "−")


def test_the_first_chart_has_every_model_by_its_bytes_per_entity(page: Node, report: dict[str, Any]) -> None:
    found = figure(page, "What the bytes buy")
    assert page.find("figure")[0] is found
    entities = report["data"]["num_entities"]
    expected = [[s["name"], f"{s['bytes'] / entities:.1f}", fixed(s["test"]["mrr"])] for s in report["stages"]]
    assert cells(found.find("table")[0]) == expected
    words = [word.text for word in found.find("span", class_="label")]
    assert sorted(words) == sorted(f"{mrr} {name}" for name, _, mrr in expected)


def test_the_bars_are_the_metrics_by_relation_and_by_degree(page: Node, report: dict[str, Any]) -> None:
    by = [stage["test_by"] for stage in report["stages"]]
    found = {row[0]: row[2:] for row in cells(figure(page, "By relation").find("table")[0])}
    assert found == {name: [fixed(one["relation"][name]["mrr"]) for one in by] for name in by[1]["relation"]}
    found = {row[0]: row[2:] for row in cells(figure(page, "The long tail").find("table")[0])}
    for bucket in by[1]["answer_degree"]:
        assert found[f"seen {bucket}×"] == [fixed(one["answer_degree"][bucket]["mrr"]) for one in by]
    assert found["relations < 1000"] == [fixed(one["relation_frequency"]["<1000"]["mrr"]) for one in by]
    assert {"tail asked", "head asked"} <= {
        r[0] for r in cells(figure(page, "Directions and categories").find("table")[0])
    }


def rule(page: Node, selector: str) -> str:
    """What the page's style says of a selector; empty: nothing."""
    return page.find("style")[0].text.partition(f"{selector} {{")[2].partition("}")[0].strip()


def test_bars_are_as_long_as_the_metrics_they_tell(page: Node, report: dict[str, Any]) -> None:
    found = figure(page, "By relation")
    words, tracks = [word.text for word in found.find("span", class_="word")], found.find("div", class_="track")
    assert set(words) == report["stages"][1]["test_by"]["relation"].keys()
    for name, track in zip(words, tracks, strict=True):
        values = [stage["test_by"]["relation"][name]["mrr"] for stage in report["stages"]]
        assert [bar.attributes for bar in track.find("i")] == [
            {"class": f"{shape} {role}", "style": f"--x: {100 * mrr}%"}
            for (shape, role), mrr in zip(
                [("broad", "teacher"), ("slim", "student"), ("tick", "direct")], values, strict=True
            )
        ]
    assert "width: var(--x)" in rule(page, ".bars i") and "left: var(--x)" in rule(page, ".bars .tick")
    assert len({rule(page, f".bars .{shape}") for shape in ("broad", "slim", "tick")}) == 3


def test_roles_differ_by_shape_and_not_by_colour_alone(page: Node) -> None:
    marks = figure(page, "What the bytes buy").find("i", class_="mark")
    assert {mark.attributes["class"] for mark in marks} == {"mark teacher", "mark student", "mark direct"}
    shapes = [rule(page, f".mark.{role}") for role in ("teacher", "student", "direct", "assistant", "record")]
    assert shapes[0] == "" and len(set(shapes)) == 5  # a square, and others
    assert all("border-radius" in shape or "clip-path" in shape for shape in shapes[1:])


def test_discs_of_the_ranks_are_as_large_as_they_are_many(page: Node, folder: Path) -> None:
    ranks = json.loads((folder / "examples.json").read_text(encoding="utf-8"))["ranks"]
    counted = Matrix(ranks, ("", ""))
    (table,) = figure(page, "Ranks").find("table", class_="matrix")
    seen = {}
    for row, line in enumerate(table.find("tbody")[0].find("tr")):
        for column, cell in enumerate(line.find("td")):
            assert (cell.attributes.get("class") == "same") == (row == column)
            if cell.children:
                (disc,), (number,) = cell.find("i"), cell.find("span")
                behind = column > row
                assert disc.attributes["class"] == ("direct" if behind else "student")
                assert disc.attributes["style"] == f"width: {counted.size(row, column)}%"
                seen[row, column] = int(number.text)
    assert seen == counted.counts and sum(seen.values()) == len(ranks)
    assert "border-radius: 50%" in rule(page, ".matrix i") and "aspect-ratio: 1" in rule(page, ".matrix i")


def test_learning_curves_show_stages_their_best_and_the_second_phase(page: Node, report: dict[str, Any]) -> None:
    found = figure(page, "Learning curves")
    words = [word.text for word in found.find("span", class_="stage")]
    assert words == [f"{stage['name']}, best {fixed(stage['valid']['mrr'])}" for stage in report["stages"]]
    assert len(found.find("path")) == 3 and [word.text for word in found.find("span", class_="phase")] == ["phase two"]
    assert {"Soft-label weights of student", "Evaluators' slopes α of student"} <= set(titles(page))


def test_protocol_hashes_config_and_time_are_told(page: Node, folder: Path, report: dict[str, Any]) -> None:
    (section,) = page.find("section", id="measured")
    assert "ties: realistic" in section.text and report["data"]["sha256"] in section.text
    for stage in report["stages"]:
        config = json.loads((folder / "stages" / stage["name"] / "model/config.json").read_text(encoding="utf-8"))
        assert all(digest in section.text for digest in config["sha256"].values())
    assert section.find("pre")[0].text == " ".join((folder / "plan.yaml").read_text(encoding="utf-8").split())
    facts = dict(zip((x.text for x in section.find("dt")), (x.text for x in section.find("dd")), strict=True))
    assert facts["wall-clock, all stages"] == f"{sum(s['seconds'] for s in report['stages']):.1f} s"
    assert facts["commit of the code"] == report["machine"]["commit"]
    known = all(stage["joules"] is not None for stage in report["stages"])
    assert ("kJ" if known else "not known") in facts["energy, all stages"]


def test_every_role_keeps_its_bar_where_another_one_has_none(copy: Path, report: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(report))
    relation = next(iter(changed["stages"][1]["test_by"]["relation"]))
    del changed["stages"][0]["test_by"]["relation"][relation]  # the teacher's
    bars = figure(read(render(copy, report_of(changed), loaded)[0]), "By relation")
    names = [word.text for word in bars.find("span", class_="word")]
    drawn = [[bar.attributes["class"] for bar in track.find("i")] for track in bars.find("div", class_="track")]
    found = dict(zip(names, drawn, strict=True))
    assert found.pop(relation) == ["slim student", "tick direct"]
    assert all(row == ["broad teacher", "slim student", "tick direct"] for row in found.values()) and found


def test_charts_are_printed_with_their_backgrounds(page: Node) -> None:
    (style,) = page.find("style")
    assert re.search(r"\.chart \{[^}]* print-color-adjust: exact", style.text)


# -- examples -------------------------------------------------------------------------------------------------------


def test_examples_are_the_models_own_answers(folder: Path) -> None:
    found = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    order = torch.randperm(len(GRAPH.test), generator=torch.Generator().manual_seed(SEED))
    sample = GRAPH.test[order[: found["queries"] // 2]]
    known = KnownAnswers(torch.cat([GRAPH.train, GRAPH.valid, GRAPH.test]), GRAPH.num_entities)
    for column, name in enumerate(("teacher", "student")):
        model = load_model(folder / "stages" / name, Ranks()).model
        expected = ranks_of(model, sample, known, Ranks()).reshape(-1).tolist()
        assert [row[column] for row in found["ranks"]] == expected
        assert found["mrr"][name] == pytest.approx(sum(1 / r for r in expected) / len(expected))
    assert len(found["points"]) == 2 * found["queries"]
    kinds = [one["kind"] for one in found["examples"]]
    assert kinds == sorted(kinds) and 0 < kinds.count("agrees") <= 10 and 0 < kinds.count("fails") <= 10
    for one in found["examples"]:
        if one["kind"] == "agrees":
            assert one["teacher"]["top"][0]["name"] == one["student"]["top"][0]["name"]
        else:
            assert one["teacher"]["rank"] <= 10 and one["teacher"]["rank"] < one["student"]["rank"]


def test_every_example_is_on_the_page_with_names_ranks_and_the_true_answer_marked(page: Node, folder: Path) -> None:
    found = json.loads((folder / "examples.json").read_text(encoding="utf-8"))["examples"]
    articles = page.find("article")
    assert len(articles) == len(found)
    for article, one in zip(articles, found, strict=True):
        assert f"true answer: {one['answer']['label']}" in article.text and one["given"]["label"] in article.text
        for who in ("teacher", "student"):
            (side,) = article.find("div", class_=who)
            assert side.find("span", class_="rank")[0].text == f"rank {one[who]['rank']:g}"
            answers = [(li.attributes.get("class") == "right", li.text.removesuffix(" ✓")) for li in side.find("li")]
            assert answers == [(answer["right"], answer["label"]) for answer in one[who]["top"]]


def test_few_examples_are_of_the_same_relation_while_there_are_others() -> None:
    found = examples_module._spread([0, 2, 4, 6, 8], [7, 0, 7, 0, 7, 0, 8, 0, 7])
    assert found == [0, 2, 6, 4, 8] and PER_RELATION == 2
    assert examples_module._spread([0, 1, 2], [7, 7, 7]) == [0, 2, 1]  # 0 and 1 ask about one triple


def test_the_same_run_gives_the_same_page_without_asking_again(folder: Path, report: dict[str, Any]) -> None:
    before = (folder / "report.html").read_text(encoding="utf-8")
    with mock.patch.object(examples_module, "ask", side_effect=AssertionError):
        assert render(folder, report_of(report), loaded) == (before, [])
    with pytest.raises(AssertionError), mock.patch.object(examples_module, "ask", side_effect=AssertionError):
        render(folder, report_of(report), loaded, queries=50)


def test_fewer_queries_are_asked_of_large_tables(
    copy: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_module, "NUMBERS", 50 * GRAPH.num_entities * 18)
    render(copy, report_of(report), loaded, queries=60)
    assert json.loads((copy / "examples.json").read_text(encoding="utf-8"))["queries"] == 50


# -- what it must not be --------------------------------------------------------------------------------------------


def elements(node: Node) -> Iterator[Node]:
    for child in node.children:
        if isinstance(child, Node):
            yield child
            yield from elements(child)


def test_nothing_outside_the_file_is_referred_to(page: Node, folder: Path) -> None:
    every = list(elements(page))
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {node.tag for node in every}
    for node in every:
        for key, value in node.attributes.items():
            assert not key.startswith("on"), (node.tag, key)
            if key in ("href", "src", "srcset", "action", "data", "xlink:href"):
                assert value.startswith("#")
    (style,) = page.find("style")
    assert "url(" not in style.text and "@import" not in style.text
    policies = [n.attributes["content"] for n in page.find("meta", **{"http-equiv": "Content-Security-Policy"})]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = {node.attributes["id"] for node in every if "id" in node.attributes}
    assert {n.attributes["href"].removeprefix("#") for n in page.find("a")} <= ids


def test_names_are_words_and_never_markup(page: Node, folder: Path) -> None:
    raw = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in raw and "&lt;script&gt;alert(" in raw
    assert "<script>alert(" in page.text and 'r0 "&amp;" <b>' in page.text
    assert page.find("h1")[0].text == "a <run> & more"


def test_it_can_be_read_without_seeing_it(page: Node) -> None:
    assert page.find("html")[0].attributes["lang"] == "en"
    for one in page.find("figure"):
        assert one.find("figcaption")[0].text.endswith((".", "σ(α(f + β))."))
        (chart,) = one.find("div", class_="chart")
        assert chart.attributes.get("aria-label") or chart.find("table") or one.find("table")
        assert bool(chart.find("svg")) == (chart.attributes.get("role") == "img")
    for table in page.find("table"):
        assert all(th.attributes.get("scope") in ("col", "row") for th in table.find("th")) and table.find("th")
    assert [len(page.find(tag)) for tag in ("h1", "main", "title")][:2] == [1, 1]


# -- runs of all kinds ----------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "iterde": (
        {"teacher": TAUGHT["teacher"], "student": {**STAGE, "dim": 6, "method": "iterde"}},
        {"Weight of the soft loss of student", "Scores"},
        set(),
    ),
    "med": (MED, {"Learned exponents of student", "Validation of the crops of student", "Scores"}, set()),
    "metasd": (
        {"student": {**STAGE, "dim": 6, "method": "metasd"}},
        {"Mask of student"},
        {"nothing to hold beside it"},
    ),
    "scratch": ({"student": {**STAGE, "dim": 6, "validate_every": 0}}, {"Training loss"}, {"no learning curves"}),
    "valid only": ({"student": {**STAGE, "dim": 6}, "baseline": True, "test": False}, {"Scores"}, set()),
    "chain": (
        {"chain": {"dims": [12, 8, 6]}, "teacher": STAGE, "student": {**STAGE, "method": "bkd"}},
        {"Learning curves", "Scores"},
        set(),
    ),
    "not asked": (
        {"student": {**STAGE, "dim": 6}, "baseline": True, "report": {"queries": 0}},
        {"Learning curves"},
        {"report.queries: 0"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_page(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tree, expected, missing = KINDS[kind]
    made = request.getfixturevalue("croppable") if tree is MED else tmp_path
    report = report_in(made) if tree is MED else ran(made, tree)
    page = read((made / "report.html").read_text(encoding="utf-8"))
    assert expected <= set(titles(page))
    said = " ".join(p.text for p in page.find("p", class_="missing"))
    assert all(words in said for words in missing)
    assert_results(page.find("section", id="result")[0], report)
    assert ("Scores" in titles(page)) == (made / "examples.json").exists()


def test_crops_are_in_the_chart_of_sizes_with_their_own_bytes(croppable: Path) -> None:
    (stage, direct) = report_in(croppable)["stages"]
    page = read((croppable / "report.html").read_text(encoding="utf-8"))
    found = {row[0]: row[1:] for row in cells(figure(page, "What the bytes buy").find("table")[0])}
    assert stage["crop_bytes"][str(stage["dim"])] == stage["bytes"]
    for dim, metrics in stage["curve"]["test"].items():
        size = f"{stage['crop_bytes'][dim] / stage['num_entities']:.1f}"
        assert found[f"student, first {dim} numbers"] == [size, fixed(metrics["mrr"])]
    # A crop has as many numbers as a model that was made as small; their files' headers differ by some letters.
    assert abs(stage["crop_bytes"]["4"] - direct["bytes"]) < 32


def test_the_frontier_stands_alone_in_a_file_of_its_own(folder: Path, page: Node) -> None:
    alone = read((folder / "frontier.html").read_text(encoding="utf-8"))
    assert titles(alone) == ["What the bytes buy"] and len(alone.find("section")) == 1
    assert cells(alone.find("table")[0]) == cells(figure(page, "What the bytes buy").find("table")[0])
    assert alone.find("style")[0].text == page.find("style")[0].text
    marks = [[mark.attributes for mark in figure(one, "What the bytes buy").find("i")] for one in (alone, page)]
    assert marks[0] == marks[1] and len(marks[0]) > 3
    assert not alone.find("a") and not alone.find("dl") and not alone.find("footer")


def published_run(**changes: Any) -> Any:
    """The report of a run on WN18RR, but for `changes`."""
    sha256 = next(iter(RECORDS))
    data = {"name": "wn18rr", "sha256": sha256, "num_entities": 40943, "num_relations": 11}
    data |= {f"num_{split}": 9 for split in ("train", "valid", "test")}
    stage = {"name": "student", "dim": 32, "bytes": 40943 * 128, "test": {"mrr": 0.43}}
    return report_of({"data": data, "stages": [stage]} | changes)


def test_published_records_stand_beside_models_of_their_data_and_protocol_alone() -> None:
    section = frontier_section(published_run())
    rows_ = {row[0]: row[1:] for row in section.figures[0].rows}
    # 32 numbers and a bias; 22 relations with two translations, a rotation and a curvature.
    assert rows_["published: RotH 32 (Chami et al., ACL 2020)"] == [f"{132 + 4 * 22 * 97 / 40943:.1f}", "0.473"]
    assert rows_["published: RESCAL-DURA 256 (Zhang et al., NeurIPS 2020)"][1] == "0.498"
    assert len(rows_) == 1 + len(RECORDS[published_run().data.sha256])
    assert "RotH 32 (Chami et al., ACL 2020)" in section.figures[0].caption
    other = published_run().data.model_copy(update={"sha256": "0" * 64})
    for changes in (
        {"data": other.to_json()},
        {"protocol": {"ties": "optimistic", "filter": "filtered"}},
        {"protocol": {"ties": "realistic", "filter": "raw"}},
        {"stages": [{"name": "student", "valid": {"mrr": 0.43}}]},
    ):
        assert records_beside(published_run(**changes)) == ()
    assert len(records_beside(published_run())) == 5


@pytest.mark.parametrize("name", ["wn18rr", "fb15k-237"])
def test_records_are_of_the_public_data_sets(name: str) -> None:
    if not Path(os.environ.get("DISTKGD_DATA", "nowhere"), name).is_dir():
        pytest.skip(f"{name} is not in $DISTKGD_DATA")
    assert RECORDS[load_graph(name).sha256]


def test_what_a_budget_has_looked_at_is_on_the_frontier() -> None:
    sizes = [Figures(8, 900, 0.1, 0.3, 0.29, 0.9, bits, tables) for bits, tables in ((32, 300), (4, 90), (2, 45))]
    budget = {"wanted": {}, "met": True, "chosen": 8, "bits": 2, "stage": "student_8_2bit", "sizes": sizes}
    chosen = {"name": "student_8_2bit", "bits": 2, "bytes": 50, "teachers": ["student"], "test": {"mrr": 0.31}}
    stages = [{"name": "student", "bytes": 360, "test": {"mrr": 0.33}}, chosen]
    report = report_of({"stages": stages, "budget": budget})
    section = frontier_section(report)
    names = [row[0] for row in section.figures[0].rows]
    assert names == ["student", "student_8_2bit", "student, only rounded, 8 × 4 bit"]
    assert section.figures[0].rows[-1][1:] == ["10.0", "0.290"]
    told, entities = report.headline_metrics, report.data.num_entities
    assert told["budget/test/mrr_8_2bit"] == 0.29 and told["budget/bytes_per_entity_8_2bit"] == 45 / entities
    assert sum(name.startswith("budget/") for name in told) == 3 * 4
    assert told["test_mrr"] == 0.31 == told["student_8_2bit/test_mrr"] and told["student/test_mrr"] == 0.33
    assert told["retained"] == 0.31 / 0.33


def test_without_the_option_there_is_no_page(tmp_path: Path) -> None:
    ran(tmp_path, {"student": {**STAGE, "dim": 6}, "baseline": True, "report": {"html": False}})
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "examples.json").exists()


def test_a_run_of_before_has_a_page_with_what_there_is(copy: Path, report: dict[str, Any]) -> None:
    old = {key: value for key, value in report.items() if key != "machine"}
    old["stages"] = [{k: v for k, v in s.items() if k not in ("joules", "crop_bytes")} for s in report["stages"]]
    for path in copy.glob("stages/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [{k: v for k, v in row.items() if not k.startswith(("phase", "soft_weight"))} for row in lines]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 1', encoding="utf-8")
    page = read(render(copy, report_of(old), loaded)[0])
    assert "Soft-label weights of student" not in titles(page) and "Learning curves" in titles(page)
    assert "not known" in page.find("dl", class_="facts")[0].text


def test_what_is_gone_is_told_and_the_rest_stays(copy: Path, report: dict[str, Any]) -> None:
    (copy / "examples.json").unlink()
    shutil.rmtree(copy / "stages" / "teacher" / "model")
    text, missing = render(copy, report_of(report), loaded)
    page = read(text)
    assert len(missing) == 1 and "could not be asked" in missing[0] and "teacher" in missing[0]
    assert "Scores" not in titles(page) and "By relation" in titles(page)
    assert "no longer in the run folder" in page.find("section", id="measured")[0].text
    shutil.rmtree(copy / "stages")
    (copy / "plan.yaml").unlink()
    _, missing = render(copy, report_of(report), loaded)
    assert any("no learning curves" in sentence for sentence in missing)


def test_other_data_than_the_run_had_are_not_asked_about(copy: Path, report: dict[str, Any]) -> None:
    (copy / "examples.json").unlink()
    _, missing = render(copy, report_of({**report, "data": {**report["data"], "sha256": "f" * 64}}), loaded)
    assert "sha256 differs" in missing[0]


def test_a_password_in_the_plan_is_not_on_the_page(copy: Path, report: dict[str, Any]) -> None:
    with (copy / "plan.yaml").open("a", encoding="utf-8") as file:
        file.write("# postgresql://me:secret@host/db\n")
    text, _ = render(copy, report_of(report), loaded)
    assert "secret" not in text and "me:***@host" in text


# -- the launcher ---------------------------------------------------------------------------------------------------


def launched(*arguments: str) -> Any:
    code, out, err = call("report", arguments)
    return SimpleNamespace(exit_code=code, output=out + err)


def test_the_launcher_makes_the_page_of_an_old_run_again(copy: Path) -> None:
    before = (copy / "report.html").read_text(encoding="utf-8")
    chart = (copy / "frontier.html").read_text(encoding="utf-8")
    for name in ("report.html", "frontier.html"):
        (copy / name).unlink()
    assert launched(str(copy)).exit_code == 0
    assert (copy / "report.html").read_text(encoding="utf-8") == before
    assert (copy / "frontier.html").read_text(encoding="utf-8") == chart


def test_a_folder_that_is_no_finished_run_is_refused_by_name(copy: Path, tmp_path: Path) -> None:
    for broken in ("", "{", "[]", '{"stages": []}'):
        (copy / "report.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ConfigError, match=re.escape(str(copy)) + " is no folder of a finished run"):
            remake(copy)
    found = launched(str(tmp_path / "nowhere"))
    assert found.exit_code == 2 and "no folder of a finished run" in found.output
