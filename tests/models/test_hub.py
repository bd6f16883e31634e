"""Exports on Hugging Face's hub, by its own client and a store of a few lines: pushed, loaded, checked."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import distkgd
from distkgd.commands.app import build_app
from distkgd.commands.cli import run_app
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError, StorageError, UnsupportedError
from distkgd.models.export import FORMATS, export_model
from distkgd.models.model_folder import save_model
from distkgd.models.remote import push_to_hub
from launch.export import main
from tests.jobs import toy_model
from tests.records import STAGE
from tests.toys import toy_graph

hub = pytest.importorskip("huggingface_hub")
constants = import_module("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Store(BaseHTTPRequestHandler):
    """What of the hub's interface a push and a download of small files use. repositories: name -> file -> bytes."""

    repositories: dict[str, dict[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match self.path.split("?")[0].strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                self.repositories.setdefault(name, {})
                self.answer({"url": f"{constants.ENDPOINT}/{name}", "name": name})
            case ["api", "validate-yaml"]:
                assert json.loads(body)["content"].startswith("---\nlibrary_name: distkgd\n")
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = [one["path"] for one in json.loads(body)["files"]]
                told = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                self.answer({"files": told} if f"{owner}/{name}" in self.repositories else None)
            case ["api", "models", owner, name, "commit", _]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
                address = f"{constants.ENDPOINT}/{owner}/{name}/commit/{COMMIT}"
                self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})
            case _:
                self.answer(None)

    def do_GET(self) -> None:
        match self.path.split("?")[0].strip("/").split("/"):
            case ["api", "models", owner, name, "revision", revision] if revision in ("main", COMMIT):
                found = f"{owner}/{name}" in self.repositories
                self.answer({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [], "tags": []} if found else None)
            case ["api", "models", owner, name, "tree", _]:
                files = self.repositories[f"{owner}/{name}"].items()
                self.answer(
                    [{"type": "file", "path": path, "size": len(data), "oid": git(data)} for path, data in files]
                )
            case [owner, name, "resolve", _, file]:
                self.send(self.repositories[f"{owner}/{name}"][file])
            case _:
                self.answer(None)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, found: Any) -> None:
        self.send(json.dumps(found).encode(), 200 if found is not None else 404)

    def send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "ETag": f'"{git(data)}"', "X-Repo-Commit": COMMIT}
        if status == 404:
            headers |= {"X-Error-Code": "RepoNotFound"}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    """The files of a hub's repositories, used in place of huggingface.co, with a cache of its own."""
    kind = type("OwnStore", (Store,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-the-test")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield kind.repositories  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    graph = toy_graph()
    about = {"data": graph.summary(), "source": str(tmp_path / "my_graph"), "method": "bkd"}
    save_model(tmp_path / "stage/model", toy_model(graph), graph, about)
    return tmp_path / "stage"


def pushed(*arguments: Any, **options: Any) -> int:
    given = {"format_": None, "dim": None, "bits": None, "relation_bits": None, "group": None} | options
    with pytest.raises(SystemExit) as ended:
        main(*arguments, **given)
    return int(ended.value.code or 0)


def command(*arguments: str) -> int:
    return run_app(build_app(), arguments)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_that_was_pushed_is_loaded_and_answers_alike(
    bits: int | None, stage: Path, store: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(stage, None, bits=bits, push="me/toy") == 0
    assert f"pushed: {constants.ENDPOINT}/me/toy" in "".join(capsys.readouterr().err.splitlines())
    assert {"README.md", "config.json", "entities.tsv", "relations.tsv"} < store["me/toy"].keys()
    found = distkgd.load("hf://me/toy")
    asked: dict[str, Any] = {"head": ["e001", "e002"], "relation": "r001", "k": 5}
    if bits is None:
        assert found.predict(**asked).names == distkgd.load(stage).predict(**asked).names
    else:
        assert found.config["packed"]["entity"]["bits"] == 4
    assert distkgd.load(f"hf://me/toy@{COMMIT}").predict(**asked).names == found.predict(**asked).names


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "pykeen"])
def test_what_is_pushed_names_the_data_and_no_folder_of_this_machine(
    kind: str, stage: Path, store: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    try:
        export_model(stage, out, kind, Ranks())
    except UnsupportedError as error:  # a library that this format needs
        pytest.skip(str(error))
    push_to_hub(out, "me/toy")
    assert json.loads((out / "config.json").read_text())["source"] == str(tmp_path / "my_graph")
    assert json.loads(store["me/toy"]["config.json"])["source"] == "my_graph"
    assert store["me/toy"].keys() == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert [name for name, content in store["me/toy"].items() if str(tmp_path).encode() in content] == []


def test_the_commands_take_a_model_of_the_hub(
    stage: Path, store: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export_model(stage, tmp_path / "out", "safetensors", Ranks())
    push_to_hub(tmp_path / "out", "me/toy")
    asked = ["--head", "e001", "--relation", "r001", "--top", "3"]
    said = []
    for model in ("hf://me/toy", str(stage)):
        assert command("predict", model, *asked) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "e001" in said[0]
    assert command("evaluate", "hf://me/toy") == 2
    assert "my_graph" in capsys.readouterr().err
    assert command("predict", "hf://me/nobody", *asked) == 2
    assert "fetching hf://me/nobody failed" in " ".join(capsys.readouterr().err.split())


def test_the_card_is_one_that_the_hub_understands(stage: Path, tmp_path: Path) -> None:
    figures = {"mrr": 0.4321, "hits_at_1": 0.1, "hits_at_3": 0.2, "hits_at_10": 0.3, "mean_rank": 7.0}
    (stage / "result.json").write_text(json.dumps(STAGE | {"valid": figures, "test": figures}))
    export_model(stage, tmp_path / "out", "safetensors", Ranks())
    card = hub.ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "distkgd" and "link-prediction" in card.data.tags
    mrr = [one for one in card.data.eval_results if one.metric_type == "mrr"]
    assert [(one.dataset_split, one.metric_value) for one in mrr] == [("valid", 0.4321), ("test", 0.4321)]


def test_nothing_that_runs_is_fetched_and_what_is_damaged_is_refused(
    stage: Path, store: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    export_model(stage, tmp_path / "out", "safetensors", Ranks())
    push_to_hub(tmp_path / "out", "me/toy")
    store["me/toy"] |= {"model.pkl": b"pickle", "modeling.py": b"import os", "entity.pt": b"pickle"}
    distkgd.load("hf://me/toy")
    fetched = {name for _, _, files in os.walk(tmp_path / "cache") for name in files}
    assert "entity.safetensors" in fetched and not {"model.pkl", "modeling.py", "entity.pt"} & fetched
    store["me/other"] = dict(store["me/toy"])
    store["me/other"]["entity.safetensors"] = store["me/toy"]["entity.safetensors"][:-1] + b"\1"
    with pytest.raises(
        ModelError, match=r"hf://me/other/entity\.safetensors is missing, or not what config\.json says"
    ):
        distkgd.load("hf://me/other")
    store["me/none"] = {"README.md": b"nothing"}
    with pytest.raises(ModelError, match="holds no model"):
        distkgd.load("hf://me/none")


def test_what_cannot_be_pushed_or_fetched_is_said_in_one_line(
    stage: Path,
    store: dict[str, dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StorageError, match="fetching hf://me/nobody failed"):
        distkgd.load("hf://me/nobody")
    assert pushed(stage, None) == 2
    assert "say where the export goes: OUT" in capsys.readouterr().err
    assert pushed(stage, tmp_path / "out", format_="pykeen", push="me/toy") == 2
    assert "a pickle, which is not pushed" in capsys.readouterr().err
    assert pushed(stage, tmp_path / "out", labels=4, push="me/toy") == 2
    assert "--labels writes no tables" in capsys.readouterr().err
    assert pushed(stage, None, labels=4) == 2
    assert "say where the labels go: OUT" in capsys.readouterr().err
    assert pushed(stage, tmp_path / "out", temperature=2.0) == 2
    assert "are for --labels" in capsys.readouterr().err
    assert pushed(stage, None, push="no such/name/at all") == 2
    assert "pushing to hf://no such/name/at all failed" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'distkgd\[hub\]'"):
        distkgd.load("hf://me/toy")
    assert not store and not (tmp_path / "out").exists()
