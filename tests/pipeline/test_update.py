"""A finished model on a newer state of its graph, and newcomers placed by their neighbours."""

from pathlib import Path
from typing import Any

import pytest
import torch

import distkgd
from distkgd.config.tree import read_yaml
from distkgd.data import Graph, load_graph
from distkgd.data.growth import drawn_newcomers, holding, write_before
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError, ModelError
from distkgd.models.model_folder import load_model
from distkgd.models.newcomers import grown, place_newcomers
from tests.launches import SMALL, call, small_data

STAGE = {**SMALL["student"], "epochs": 12, "dropout": 0.0}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph, torch.Tensor, distkgd.Run]:
    """A folder with `newer` and `before`, the graph of the first, its newcomers, and a run on the second."""
    folder = tmp_path_factory.mktemp("growth")
    graph = load_graph(str(small_data(folder / "newer")))
    newcomers = drawn_newcomers(graph, 0.1)
    write_before(graph, newcomers, folder / "before")
    tree: dict[str, Any] = {**SMALL, "data": str(folder / "before"), "student": STAGE, "report": {"queries": 0}}
    return folder, graph, newcomers, distkgd.train(tree, out=folder / "run")


def test_a_graph_was_without_its_newcomers_before(site: tuple[Path, Graph, torch.Tensor, distkgd.Run]) -> None:
    folder, graph, newcomers, _ = site
    before = load_graph(str(folder / "before"))
    names = set(graph.entities.names.gather(newcomers.numpy()))
    assert len(newcomers) == 5 and not names & set(before.entities.names)
    assert len(before.train) == int((~holding(graph.train, newcomers)).sum()) < len(graph.train)
    assert torch.equal(newcomers, drawn_newcomers(graph, 0.1)) and not torch.equal(
        newcomers, drawn_newcomers(graph, 0.1, 1)
    )
    with pytest.raises(DataError, match="leaves some of both"):
        drawn_newcomers(graph, 1.0)


def test_a_newcomer_stands_at_the_mean_of_who_shares_its_triples() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0], [9.0, 9.0], [7.0, 7.0], [0.0, 0.0]])
    # 3 and 5 are new. 0 and 1 have (_, 0, 2) as 3 has; 2 has (_, 1, 4) alone as 3 has; 5 has nothing.
    triples = torch.tensor([[0, 0, 2], [1, 0, 2], [3, 0, 2], [2, 1, 4], [3, 1, 4]])
    found = place_newcomers(rows, triples, torch.tensor([3, 5]))
    weights = 1 / torch.tensor([3.0, 2.0]).log()
    wanted = (weights[0] * torch.tensor([2.0, 0.0]) + weights[1] * rows[2]) / weights.sum()
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(found[1], rows[[0, 1, 2, 4]].mean(0))
    # Nobody shares (_, 0, 4): those count that have relation 0 at this place.
    found = place_newcomers(rows, torch.tensor([[0, 0, 2], [1, 0, 2], [3, 0, 4]]), torch.tensor([3]))
    torch.testing.assert_close(found[0], torch.tensor([2.0, 0.0]))


def test_rows_are_matched_by_name(site: tuple[Path, Graph, torch.Tensor, distkgd.Run], tmp_path: Path) -> None:
    _, graph, newcomers, run = site
    loaded = load_model(run.folder / "stages/student", Ranks())
    model, found, relations = grown(loaded, graph)
    assert torch.equal(found, newcomers) and not len(relations)
    for old, name in enumerate(loaded.entities.names):
        assert torch.equal(model.entity.weight[graph.entities.id(name)], loaded.model.entity.weight[old])
    for old, name in enumerate(loaded.relations.names):
        new = graph.relations.id(name)
        for half in (0, 1):
            of, to = old + half * len(loaded.relations), new + half * len(graph.relations)
            assert torch.equal(model.relation[to], loaded.model.relation[of])
    other = small_data(tmp_path / "other")
    for path in other.iterdir():
        path.write_text(path.read_text().replace("e", "x"))
    with pytest.raises(ModelError, match="none of the model's"):
        grown(loaded, load_graph(str(other)))


def test_an_update_begins_at_the_old_rows_and_tells_old_from_new(
    site: tuple[Path, Graph, torch.Tensor, distkgd.Run], tmp_path: Path
) -> None:
    folder, graph, _, run = site
    made = distkgd.update(run.folder / "stages/student", folder / "newer", old_rows="free", out=tmp_path / "updated")
    assert list(made.stages) == ["student"] and len(made.student.entities) == graph.num_entities
    steps = run.stages["student"].steps
    assert steps is not None and made.stages["student"].steps is not None and made.stages["student"].steps < steps / 4
    told = [line for line in made.remarks if "placed" in line or "are new" in line]
    assert len(told) == 3 and told[0] == "5 of 50 entities are new."
    still = distkgd.update(
        run.folder / "stages/student",
        folder / "newer",
        ["student.optimizer.lr=1e-9"],
        old_rows="free",
        out=tmp_path / "still",
    )
    old, new = distkgd.load(run.folder / "stages/student"), still.student
    name = old.entities.name(3)
    torch.testing.assert_close(new.embedding(name), old.embedding(name), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="--resume"):
        distkgd.update(run.folder / "stages/student", folder / "newer", out=tmp_path / "updated")


def test_a_student_is_taught_again_by_its_updated_teacher(
    site: tuple[Path, Graph, torch.Tensor, distkgd.Run], tmp_path: Path
) -> None:
    folder, graph, newcomers, _ = site
    taught = {"method": "dualde", "distill": {"stage_two": {"start": 12, "epochs": 6}}}
    tree: dict[str, Any] = {**SMALL, "data": str(folder / "before"), "report": {"queries": 0}}
    run = distkgd.train(tree | {"teacher": {**STAGE, "dim": 12}, "student": STAGE | taught}, out=tmp_path / "run")
    asked = [run.folder, "--data", folder / "newer", "--epochs", "2", "--old-rows", "frozen"]
    code, out, _ = call("update", [*asked, "--out", tmp_path / "made"])
    made = distkgd.Run(tmp_path / "made")
    assert code == 0 and list(made.stages) == ["teacher", "student"] and "5 of 50 entities are new." in out
    stages = read_yaml(made.folder / "plan.yaml")["stages"]
    assert [one["epochs"] for one in stages] == [2, 2] and stages[1]["teachers"] == ["teacher"]
    assert stages[1]["distill"]["stage_two"] | {"start": 2, "epochs": 1} == stages[1]["distill"]["stage_two"]
    for name in ("teacher", "student"):
        old, new = (load_model(one.folder / "stages" / name, Ranks()) for one in (run, made))
        rows = graph.entities.rows_of(old.entities)
        assert torch.equal(new.model.entity.weight[rows], old.model.entity.weight)  # frozen
        first = load_model(made.folder / "first_rows" / name, Ranks()).model.entity.weight
        assert (new.model.entity.weight[newcomers] != first[newcomers]).any(1).all()
    code, _, said = call("update", [run.folder, "epochs", "--data", folder / "newer", "--out", tmp_path / "wrong"])
    assert code == 2 and "no override" in said


@pytest.mark.parametrize(("old_rows", "times"), [("anchored", 10), ("free", 1)])
def test_new_rows_are_held_back_where_old_ones_are(
    old_rows: str, times: float, site: tuple[Path, Graph, torch.Tensor, distkgd.Run], tmp_path: Path
) -> None:
    folder, _, _, run = site
    trained = read_yaml(run.folder / "plan.yaml")["stages"][0]["regulariser"]
    distkgd.update(run.folder, folder / "newer", epochs=1, old_rows=old_rows, out=tmp_path / "made")
    (stage,) = read_yaml(tmp_path / "made/plan.yaml")["stages"]
    assert stage["old_rows"] == old_rows and trained["weight"] > 0
    assert stage["regulariser"] == trained | {"weight": times * trained["weight"]}


def test_an_entity_is_added_by_its_triples_alone(site: tuple[Path, Graph, torch.Tensor, distkgd.Run]) -> None:
    _, graph, newcomers, run = site
    m = distkgd.load(run.folder / "stages/student")
    x = int(newcomers[0])
    of_x = graph.train[holding(graph.train, newcomers[:1]) & ~holding(graph.train, newcomers[1:])]
    name = graph.entities.name(x)
    triples = [(graph.entities.name(h), graph.relations.name(r), graph.entities.name(t)) for h, r, t in of_x.tolist()]
    triples = [one for one in triples if (one[0] == name) != (one[2] == name)]
    new = m.with_entity(name, triples)
    assert len(new.entities) == len(m.entities) + 1 and new.entities.name(len(m.entities)) == name
    assert torch.equal(new.entity_rows[:-1], m.entity_rows) and new.embedding(name).isfinite().all()
    known = {t for h, r, t in triples if h == name and r == triples[0][1]}
    answers = new.predict(head=name, relation=triples[0][1], k=5, exclude_known=True).names[0]
    assert len(answers) == 5 and not known & set(answers)
    with pytest.raises(DataError, match="knows 'e"):
        m.with_entity(m.entities.name(0), triples)
    with pytest.raises(DataError, match="holds 'x' once"):
        m.with_entity("x", triples)
    with pytest.raises(DataError, match="at least one"):
        m.with_entity("x", [])
