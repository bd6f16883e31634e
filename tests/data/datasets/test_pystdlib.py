"""The graph of the standard library."""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from inspect import getsource as source
from pathlib import Path

import pytest
import torch

from distkgd.data import load_graph
from distkgd.data.datasets import pystdlib
from distkgd.data.reading.folders import read_folder
from distkgd.errors import DataError


@pytest.fixture(scope="module")
def graph():
    return pystdlib.build()


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part of the library, in its place: to read all of it takes seconds."""
    for name in ("asyncio", "collections", "email", "json", "logging"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, tmp_path / name)
    monkeypatch.setattr(pystdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def named(graph, split):
    names, relations = graph.entities.names.to_list(), graph.relations.names.to_list()
    return [(names[h], relations[r], names[t]) for h, r, t in getattr(graph, split).tolist()]


def test_it_has_the_size_of_a_small_benchmark_and_a_dozen_relations(graph):
    assert 25_000 < len(graph.train) + len(graph.valid) + len(graph.test) < 60_000
    assert 3_000 < graph.num_entities < 12_000
    assert 8 <= graph.num_relations <= 12
    assert min(torch.bincount(graph.train[:, 1])) > 100
    assert graph.warnings == ()


def test_the_splits_are_ninety_five_five_without_overlap(graph):
    total = len(graph.train) + len(graph.valid) + len(graph.test)
    assert abs(len(graph.valid) - 0.05 * total) <= 1
    assert abs(len(graph.test) - 0.05 * total) <= 1
    assert len({*map(tuple, torch.cat([graph.train, graph.valid, graph.test]).tolist())}) == total


def test_train_has_every_entity_and_every_relation(graph):
    assert set(graph.train[:, [0, 2]].flatten().tolist()) == set(range(graph.num_entities))
    assert set(graph.train[:, 1].tolist()) == set(range(graph.num_relations))


def test_facts_that_anyone_can_look_up_are_in_it(graph):
    triples = {triple for split in ("train", "valid", "test") for triple in named(graph, split)}
    assert ("module:json", "imports", "module:json.decoder") in triples
    assert ("exception:json.decoder.JSONDecodeError", "inherits", "exception:ValueError") in triples
    assert ("class:collections.OrderedDict", "inherits", "class:dict") in triples
    assert ("class:threading.Thread", "has_method", "method:start") in triples
    assert ("module:json.decoder", "part_of", "module:json") in triples
    # argparse binds gettext by `from gettext import gettext as _`: an alias is followed to its definition.
    # Some distributions of Python import it in a `try`, which binds nothing for certain.
    if any(isinstance(node, ast.ImportFrom) and node.module == "gettext" for node in ast.parse(source(argparse)).body):
        assert ("class:argparse.ArgumentParser", "calls", "function:gettext.gettext") in triples


def test_no_entity_in_it_has_fewer_triples_than_the_threshold(graph):
    everything = torch.cat([graph.train, graph.valid, graph.test])
    degree = Counter(entity for head, _, tail in everything.tolist() for entity in {head, tail})
    assert min(degree.values()) >= pystdlib.MIN_DEGREE


def test_rare_entities_are_dropped_until_none_is_left():
    square = {(a, "r", b) for a in "abc" for b in "abc" if a < b}
    chain = {("c", "r", "d"), ("d", "r", "e")}  # without e, d is rare too
    assert pystdlib.drop_rare(square | chain, 2) == square


def test_the_split_keeps_a_lonely_triple_in_train():
    triples = {("x", "only", "y")} | {(f"a{i}", "r", f"a{j}") for i in range(12) for j in range(12) if i != j}
    train, valid, test = pystdlib.split(triples)
    assert ("x", "only", "y") in train
    assert len(valid) == len(test) == round(0.05 * len(triples))
    assert set(train) | set(valid) | set(test) == triples


def test_it_does_not_depend_on_the_hash_seed(part):
    code = "import sys; from distkgd.data.datasets import pystdlib\n"
    code += "pystdlib.sysconfig.get_path = lambda name: sys.argv[1]; print(pystdlib.build().sha256)"
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(pystdlib.__file__).parents[3])}
    run = subprocess.run([sys.executable, "-c", code, part], env=env, capture_output=True, text=True, check=True)
    assert len(pystdlib.build().train) > 1000
    assert run.stdout.strip() == pystdlib.build().sha256  # the seed of this process is another one


def test_it_does_not_depend_on_the_order_of_files(part, monkeypatch):
    def backwards(root):
        for folder, folders, files in os_walk(root):
            folders.sort(reverse=True)
            files.sort(reverse=True)
            yield folder, folders, files

    expected, os_walk = pystdlib.build().sha256, os.walk
    monkeypatch.setattr(pystdlib.os, "walk", backwards)
    assert pystdlib.build().sha256 == expected


def test_it_does_not_depend_on_who_prints(part, monkeypatch):
    """Ray puts a function of its own in place of print."""
    expected = pystdlib.build().sha256
    monkeypatch.setattr("builtins.print", lambda *_: None)
    monkeypatch.setattr("builtins.shout", lambda *_: None, raising=False)
    assert pystdlib.build().sha256 == expected


def test_written_as_a_folder_it_reads_back_the_same(graph, tmp_path):
    for split in ("train", "valid", "test"):
        text = "".join("\t".join(triple) + "\n" for triple in named(graph, split))
        (tmp_path / f"{split}.txt").write_text(text)
    again = read_folder(tmp_path)
    assert again.sha256 == graph.sha256
    for split in ("train", "valid", "test"):
        assert torch.equal(getattr(again, split), getattr(graph, split))


def test_entities_and_relations_have_labels_that_find_them(graph):
    row = graph.entities.id("class:json.decoder.JSONDecoder")
    assert graph.entities.label(row) == "class json.decoder.JSONDecoder"
    assert graph.entities.id("class json.decoder.JSONDecoder") == row
    assert graph.relations.label(graph.relations.id("has_method")) == "has method"


def test_load_graph_knows_it_by_name(part):
    assert load_graph("pystdlib").summary() == pystdlib.build().summary()


def test_a_python_without_sources_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pystdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=f"no sources in {tmp_path}.*name a folder or a public data set"):
        pystdlib.build()


def test_files_that_cannot_be_parsed_are_counted_and_left_out(monkeypatch, tmp_path):
    body = "class Base: ...\n" + "".join(f"class C{i}(Base):\n    def run(self): len('')\n" for i in range(9))
    (tmp_path / "good.py").write_text(body)
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("def :")
    monkeypatch.setattr(pystdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    small = pystdlib.build()
    assert small.warnings == ("1 source files could not be parsed and were left out",)
    assert ("class:good.C3", "calls", "function:len") in {
        t for s in ("train", "valid", "test") for t in named(small, s)
    }
