"""PyKEEN, where it is installed: its models come in and ours go out with the same scores."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distkgd
from distkgd.data import Graph
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import DistkgdError, ModelError, UnsupportedError
from distkgd.evaluation.ranking import metrics, ranks_of
from distkgd.models.export import export_model
from distkgd.models.importers import Given, import_model
from distkgd.models.importers.pykeen import SCORER_OF
from distkgd.models.model_folder import load_model, save_model
from distkgd.scorers import SCORERS
from tests.jobs import toy_model
from tests.launches import small_data
from tests.toys import toy_graph

pykeen = pytest.importorskip("pykeen", reason="pykeen is not installed: pip install 'distkgd[bench]'")

ENTITIES, RELATIONS = 40, 5
TRUST = Given(trust_pickle=True)
MODELS: dict[str, dict[str, Any]] = {
    "TransE": {"embedding_dim": 6},
    "TransE-2": {"embedding_dim": 6, "scoring_fct_norm": 2},
    "DistMult": {"embedding_dim": 6},
    "ComplEx": {"embedding_dim": 6},
    "RESCAL": {"embedding_dim": 6},
    "SimplE": {"embedding_dim": 6},
    "CP": {"embedding_dim": 3, "rank": 2},
    "RotatE": {"embedding_dim": 6},
    "PairRE": {"embedding_dim": 6},
}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return toy_graph(ENTITIES, RELATIONS, 400)


def factory_of(graph: Graph, reciprocal: bool, triples: torch.Tensor | None = None) -> Any:
    from pykeen.triples import TriplesFactory

    return TriplesFactory(
        mapped_triples=graph.train if triples is None else triples,
        entity_to_id={name: i for i, name in enumerate(graph.entities.names.to_list())},
        relation_to_id={name: i for i, name in enumerate(graph.relations.names.to_list())},
        create_inverse_triples=reciprocal,
    )


def made(graph: Graph, name: str, reciprocal: bool) -> Any:
    """A model of PyKEEN whose scores are spread."""
    model_of = getattr(importlib.import_module("pykeen.models"), name.partition("-")[0])
    model = model_of(triples_factory=factory_of(graph, reciprocal), random_seed=1, **MODELS[name])
    with torch.no_grad():
        for i, (key, weight) in enumerate(model.named_parameters()):
            if "regularizer" not in key and not (name == "RotatE" and key.startswith("relation")):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def result_of(model: Any, graph: Graph, reciprocal: bool, folder: Path) -> Path:
    """What PyKEEN's pipeline saves: trained_model.pkl and training_triples/."""
    folder.mkdir()
    torch.save(model, folder / "trained_model.pkl")
    factory_of(graph, reciprocal).to_path_binary(folder / "training_triples")
    return folder


def all_triples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(200, 3, generator=generator) * torch.tensor([ENTITIES, RELATIONS, ENTITIES])).long()


def assert_same_scores(model: Any, ours: distkgd.TrainedModel, reciprocal: bool) -> None:
    """Of triples, and of all tails and all heads."""
    triples = all_triples()
    with torch.no_grad():
        theirs = model.predict_hrt(triples).squeeze(1)
        tails = model.predict_t(triples[:9, :2])
        heads = model.predict_h(triples[:9, 1:])
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours.score(triples, ids=True).to(theirs.dtype), theirs, rtol=1e-5, atol=1e-5)
    for i, (h, r, t) in enumerate(triples[:9].tolist()):
        every = range(ENTITIES)
        torch.testing.assert_close(
            ours.score([(h, r, e) for e in every], ids=True).to(tails.dtype), tails[i], rtol=1e-5, atol=1e-5
        )
        scores = ours.score([(e, r, t) for e in every], ask="head", ids=True)
        torch.testing.assert_close(scores.to(heads.dtype), heads[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_pykeen_scores_alike_here(name: str, reciprocal: bool, graph: Graph, tmp_path: Path) -> None:
    model = made(graph, name, reciprocal)
    folder = result_of(model, graph, reciprocal, tmp_path / "theirs")
    _, notes = import_model(f"pykeen:{folder}", tmp_path / "out", TRUST, Ranks())
    assert "256 triples score as in PyKEEN" in notes[0]
    assert_same_scores(model, distkgd.load(tmp_path / "out"), reciprocal)
    torch.save(model.state_dict(), tmp_path / "theirs" / "state_dict.pt")
    scorer = SCORER_OF[f"{name.partition('-')[0]}Interaction"]
    norm = {"TransE": 1, "TransE-2": 2}.get(name)
    import_model(f"pykeen:{folder}", tmp_path / "safe", Given(scorer=scorer, norm=norm), Ranks())
    first, second = (distkgd.load(tmp_path / one) for one in ("out", "safe"))
    triples = all_triples()
    torch.testing.assert_close(first.score(triples, ids=True), second.score(triples, ids=True), rtol=1e-6, atol=1e-6)


def test_every_scorer_that_both_have_is_in_this_test() -> None:
    assert {SCORER_OF[f"{name.partition('-')[0]}Interaction"] for name in MODELS} == set(SCORER_OF.values())


OUT = [
    ("transe", 1),
    ("transe", 2),
    ("rotate", 2),
    *((name, None) for name in SCORER_OF.values() if name not in ("transe", "rotate")),
]


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize(("name", "norm"), OUT)
def test_a_model_of_ours_scores_alike_there(
    name: str, norm: int | None, reciprocal: bool, graph: Graph, tmp_path: Path
) -> None:
    from distkgd.distributed.tables import ShardedTable
    from distkgd.models.model import Model
    from distkgd.scorers import build_scorer

    toy = toy_model(graph, name, 8, reciprocal=reciprocal)
    scorer = build_scorer(name, 8, norm=norm)
    ours = Model(
        scorer, ShardedTable(toy.entity.weight, ENTITIES, Ranks()), toy.relation.detach(), RELATIONS, reciprocal
    )
    save_model(tmp_path / "model", ours, graph, {})
    export_model(tmp_path / "model", tmp_path / "out", "pykeen", Ranks())
    model = torch.load(tmp_path / "out/trained_model.pkl", weights_only=False)
    assert_same_scores(model, distkgd.load(tmp_path / "model"), reciprocal)
    import_model(
        f"pykeen:{tmp_path / 'out'}", tmp_path / "again", Given(), Ranks()
    )  # its state dict, by our config.json
    import_model(f"pykeen:{tmp_path / 'out'}", tmp_path / "pickle", TRUST, Ranks())
    for folder in ("again", "pickle"):
        again = distkgd.load(tmp_path / folder)
        torch.testing.assert_close(
            again.score(all_triples(), ids=True), distkgd.load(tmp_path / "model").score(all_triples(), ids=True)
        )
    from pykeen.triples import TriplesFactory

    factory = TriplesFactory.from_path_binary(tmp_path / "out/training_triples")
    assert factory.entity_to_id["e007"] == 7 and factory.num_relations == RELATIONS * (1 + reciprocal)


@pytest.mark.parametrize("name", [*sorted(set(SCORERS) - set(SCORER_OF.values())), "rotate"])
def test_a_scorer_that_pykeen_lacks_or_computes_otherwise_is_refused(name: str, graph: Graph, tmp_path: Path) -> None:
    save_model(tmp_path / "model", toy_model(graph, name, 8), graph, {})
    with pytest.raises(ModelError, match="norm 1 cannot be exported" if name == "rotate" else f"PyKEEN has no {name}"):
        export_model(tmp_path / "model", tmp_path / "out", "pykeen", Ranks())
    assert not (tmp_path / "out").exists()


def test_pykeens_own_evaluator_gives_our_mrr(graph: Graph, tmp_path: Path) -> None:
    from pykeen.evaluation import RankBasedEvaluator

    save_model(tmp_path / "model", toy_model(graph, "complex", 8), graph, {})
    export_model(tmp_path / "model", tmp_path / "out", "pykeen", Ranks())
    model = torch.load(tmp_path / "out/trained_model.pkl", weights_only=False)
    ours = load_model(tmp_path / "model", Ranks()).model
    everything = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), ENTITIES)
    mrr = metrics(ranks_of(ours, graph.test, everything, Ranks()))["mrr"]
    found = RankBasedEvaluator().evaluate(
        model,
        graph.test,
        additional_filter_triples=[graph.train, graph.valid],
        use_tqdm=False,
        batch_size=16,
    )
    assert found.get_metric("both.realistic.inverse_harmonic_mean_rank") == pytest.approx(mrr, abs=1e-3)


# -- there and back ---------------------------------------------------------------------------------------------------


def their_mrr(model: Any, graph: Graph) -> float:
    """Of PyKEEN's evaluator, by the protocol of ours: filtered, both directions, realistic ranks, all entities."""
    from pykeen.evaluation import RankBasedEvaluator

    known = [graph.train, graph.valid]
    found = RankBasedEvaluator().evaluate(
        model, graph.test, additional_filter_triples=known, use_tqdm=False, batch_size=256
    )
    return float(found.get_metric("both.realistic.inverse_harmonic_mean_rank"))


def there_and_back(graph: Graph, data: str, folder: Path, teacher: dict[str, Any], student: dict[str, Any]) -> Any:
    """(MRR by PyKEEN, MRR by us) of a ComplEx that PyKEEN trained, then of its student, exported to PyKEEN again."""
    from pykeen.pipeline import pipeline

    from distkgd.common.console import Display
    from distkgd.pipeline.config import parse_config
    from distkgd.pipeline.plan import run_plan

    result = pipeline(
        training=factory_of(graph, True),
        testing=factory_of(graph, False, graph.test[:10]),  # it is evaluated below
        model="ComplEx",
        random_seed=0,
        device="cpu",
        use_tqdm=False,
        training_loop="lcwa",
        evaluation_kwargs={"use_tqdm": False, "batch_size": 256},
        loss="crossentropy",
        **teacher,
    )
    result.save_to_directory(folder / "theirs")
    config = {"data": data, "teacher": f"pykeen:{folder / 'theirs'}", "trust_pickle": True, "device": "cpu"}
    config |= {"student": {"scorer": "complex", "method": "bkd", **student}, "mlflow": {"enabled": False}}
    run_plan(parse_config(config, "test"), graph, Ranks(), folder / "run", resume=False, display=Display(False))
    everything = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    (imported,) = (folder / "run/imported").iterdir()
    student_folder = folder / "run/stages/student"
    export_model(student_folder, folder / "back", "pykeen", Ranks())
    back = torch.load(folder / "back/trained_model.pkl", weights_only=False)
    found = []
    for model, ours in ((result.model, imported), (back, student_folder)):
        ranks = ranks_of(load_model(ours, Ranks()).model, graph.test, everything, Ranks())
        found.append((their_mrr(model, graph), metrics(ranks)["mrr"]))
    return found


def test_a_teacher_of_pykeen_is_distilled_and_its_student_evaluated_by_pykeen(tmp_path: Path) -> None:
    from distkgd.data import load_graph

    data = small_data(tmp_path / "data", entities=60, relations=4, triples=900)
    graph = load_graph(str(data))
    size = {"model_kwargs": {"embedding_dim": 12}, "training_kwargs": {"num_epochs": 3, "batch_size": 64}}
    size["training_kwargs"]["use_tqdm"] = False
    size |= {"optimizer": "Adam", "optimizer_kwargs": {"lr": 0.02}}
    student = {"dim": 8, "epochs": 3, "batch_size": 100}
    for theirs, ours in there_and_back(graph, str(data), tmp_path, size, student):
        assert theirs == pytest.approx(ours, abs=1e-3) and theirs > 0.05


@pytest.mark.slow
def test_the_same_on_codex_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distkgd.data import load_graph

    graph = load_graph("codex-s")
    size = {"model_kwargs": {"embedding_dim": 128}, "training_kwargs": {"num_epochs": 40, "batch_size": 512}}
    size["training_kwargs"]["use_tqdm"] = False
    size |= {"optimizer": "Adagrad", "optimizer_kwargs": {"lr": 0.1}}
    student = {"dim": 32, "epochs": 20, "batch_size": 512, "optimizer": {"lr": 0.3}}
    found = there_and_back(graph, "codex-s", tmp_path, size, student)
    with capsys.disabled():
        sys.stdout.write(f"codex-s, (PyKEEN's MRR, ours) of teacher and student: {found}\n")
    for theirs, ours in found:
        assert theirs == pytest.approx(ours, abs=1e-3) and theirs > 0.05


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_pickle_is_not_read_untrusted(graph: Graph, tmp_path: Path) -> None:
    folder = result_of(made(graph, "ComplEx", False), graph, False, tmp_path / "theirs")
    with pytest.raises(ModelError, match=r"is a pickle, which can run anything.*--trust-pickle.*state_dict"):
        import_model(f"pykeen:{folder}", tmp_path / "out", Given(), Ranks())
    (folder / "trained_model.pkl").write_bytes((folder / "trained_model.pkl").read_bytes()[:500])
    with pytest.raises(ModelError, match=r"trained_model.pkl: truncated"):
        import_model(f"pykeen:{folder}", tmp_path / "out", TRUST, Ranks())
    with pytest.raises(ModelError, match=r"neither trained_model.pkl nor state_dict.pt"):
        import_model(f"pykeen:{tmp_path}", tmp_path / "out", TRUST, Ranks())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("TransH", {"embedding_dim": 6}, "TransH with TransHInteraction has no counterpart"),
        ("TransE", {"embedding_dim": 6, "power_norm": True}, "power_norm=True"),
        ("PairRE", {"embedding_dim": 6, "p": 2}, "PairRE with p=2"),
        ("SimplE", {"embedding_dim": 6, "clamp_score": 1.0}, "clamps its scores"),
    ],
)
def test_a_formula_without_counterpart_is_refused(
    name: str, options: dict[str, Any], said: str, graph: Graph, tmp_path: Path
) -> None:
    model_of = getattr(importlib.import_module("pykeen.models"), name)
    model = model_of(triples_factory=factory_of(graph, False), **options)
    folder = result_of(model, graph, False, tmp_path / "theirs")
    with pytest.raises(UnsupportedError, match=said):
        import_model(f"pykeen:{folder}", tmp_path / "out", TRUST, Ranks())


def test_what_a_state_dict_does_not_say_is_asked_for(graph: Graph, tmp_path: Path) -> None:
    model = made(graph, "TransE", False)
    folder = result_of(model, graph, False, tmp_path / "theirs")
    path = folder / "state_dict.pt"
    torch.save(model.state_dict(), path)
    for given, said in (
        (Given(), r"--scorer"),
        (Given(scorer="transe"), r"--norm"),
        (Given(scorer="cp"), r"has no entity_representations.1._embeddings.weight"),
        (Given(scorer="rescal"), r"do not fit Rescal"),
    ):
        with pytest.raises(DistkgdError, match=said):
            import_model(f"pykeen:{path}", tmp_path / "out", given, Ranks())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"state_dict.pt"):
        import_model(f"pykeen:{path}", tmp_path / "out", Given(scorer="transe", norm=1), Ranks())
    assert not (tmp_path / "out").exists()
