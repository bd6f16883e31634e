"""The example of a method in docs/models.md: its code is run as it stands."""

import inspect
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from distkgd import methods
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.pipeline.config import parse_config
from distkgd.training.communication import expected_traffic
from tests.docs.pages import blocks, section
from tests.jobs import NaiveModel, spelled_out
from tests.ranks import run_on_threads
from tests.toys import toy_graph, toy_job, train_some

PAGE = "docs/models.md"
GRAPH = toy_graph()
# What Python itself, ABC and Generic put into a class.
OF_EVERY_CLASS = {*vars(object), "__module__", "__dict__", "__weakref__", "__annotations__", "__orig_bases__"}
OF_EVERY_CLASS |= {"__parameters__", "__abstractmethods__", "_abc_impl", "__static_attributes__", "__firstlineno__"}
OF_EVERY_CLASS -= {"__init__"}


def example() -> tuple[type[methods.Method[Any]], dict[str, Any]]:
    """The class of the example, and the stages of its config."""
    found = section(PAGE, "A method of your own")
    (code,), (config,) = blocks(found, "python"), blocks(found, "yaml")
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, PAGE, "exec"), namespace)
    return namespace["Match"], yaml.safe_load(config)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of the example, whose method is among METHODS."""
    kind, config = example()
    monkeypatch.setitem(methods.METHODS, "match", kind)  # type: ignore[arg-type]
    return {"dtype": "float64", "student": small(config)}


def small(config: dict[str, Any]) -> dict[str, Any]:
    return config["student"] | {"dim": 8, "batch_size": 60, "negatives": {"kind": "all"}, "move": "queries"}


def test_its_terms_are_what_its_docstring_says(known: dict[str, Any]) -> None:
    job = toy_job(known, Ranks(), Path("/nonexistent"), GRAPH)
    (update,) = job.method.updates(job.input_builder.inputs(*job.input_builder.parts(0, 1)))
    student, teacher = NaiveModel(job.method.student), NaiveModel(job.method.teachers[0])
    queries = spelled_out(job.input_builder, 0)
    gaps = torch.stack([(student.own(query) - teacher.own(query)).square() for query in queries])
    torch.testing.assert_close(update.terms["match"], 0.1 * gaps.mean())
    assert update.terms.keys() == {"hard", "match"}


def test_two_ranks_train_it_as_one_does(known: dict[str, Any]) -> None:
    one = train_some(Ranks(), known, steps=6)
    two = run_on_threads(2, train_some, config=known, steps=6)
    rows = torch.cat([each["tables"]["student"] for each in two])
    torch.testing.assert_close(rows, one["tables"]["student"], rtol=0, atol=1e-9)


def sent_and_expected(ranks: Ranks, config: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    job = toy_job(config, ranks, Path("/nonexistent"), GRAPH)
    ranks.traffic.clear()
    (update,) = job.method.updates(job.input_builder.inputs(*job.input_builder.parts(0, 1)))
    sum(update.terms.values()).backward()
    sent = dict(ranks.traffic)
    return sent, expected_traffic(job.input_builder, job.method, job.config, job.input_builder.move)


def test_what_it_sends_is_rehearsed_though_it_says_nothing_of_it(known: dict[str, Any]) -> None:
    for sent, expected in run_on_threads(2, sent_and_expected, config=known):
        for kind in ("queries", "partials"):
            assert sent[kind] == expected[kind] > 0


def test_a_method_has_few_members_and_needs_two_of_them() -> None:
    members = {name: value for name, value in vars(methods.Method).items() if name not in OF_EVERY_CLASS}
    functions = [name for name, value in members.items() if inspect.isfunction(value) or isinstance(value, property)]
    attributes = {*members, *methods.Method.__annotations__} - {*functions}
    assert len(functions) <= 12 and len(attributes) <= 4
    assert methods.Method.__abstractmethods__ == {"updates"}
    kind, _ = example()
    assert {name for name in vars(kind) if name not in OF_EVERY_CLASS} == {"name", "Settings", "updates"}


def test_its_settings_are_checked_like_all_others() -> None:
    kind, config = example()
    with patch.dict(methods.METHODS, {"match": kind}):
        assert parse_config(config, PAGE).student.distill.weight == 0.1
        with pytest.raises(ConfigError, match=r"no such option.*allowed here: weight"):
            parse_config(config | {"student": config["student"] | {"distill": {"wait": 1}}}, PAGE)
    with pytest.raises(ConfigError, match="there is no method 'match'"):
        parse_config(config, PAGE)
