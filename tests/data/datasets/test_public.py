"""Public data sets: where they are looked for, how they are fetched from a (local) server, what is refused."""

import errno
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import pytest

from distkgd.data import load_graph
from distkgd.data.datasets import public
from distkgd.errors import DataError
from distkgd.kernels.build import library

FILES = {
    "train.txt": b"a\tr\tb\r\nb\tr\ta\r\n",
    "valid.txt": b"a\tr\ta\r\n",
    "test.txt": b"b\tr\tb\r\n",
}
LF_SHA256 = {
    name.removesuffix(".txt"): hashlib.sha256(data.replace(b"\r", b"")).hexdigest() for name, data in FILES.items()
}


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Server:
    """Serves `content` on 127.0.0.1; `short` bytes fewer than it promises."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.short = 0
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path not in outer.content:
                    self.send_error(404, "Not Found")
                    return
                data = outer.content[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) - outer.short])

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, and no way to a real address."""
    library("names")  # else the first reader would be compiled into this cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DISTKGD_DATA", raising=False)
    for name in public.PUBLIC:
        monkeypatch.setitem(public.PUBLIC, name, "http://127.0.0.1:9/nothing")
    return tmp_path / "cache" / "distkgd"


def serve_archive(server, monkeypatch, name="umls", members=FILES):
    server.content["/set.tar.gz"] = tar(members)
    monkeypatch.setitem(public.PUBLIC, name, f"{server.address}/set.tar.gz")
    monkeypatch.setitem(public.SHA256, name, LF_SHA256)


def left_on_disk(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*")) if cache.exists() else []


def test_an_archive_is_downloaded_once_checked_and_kept(server, monkeypatch, cache):
    serve_archive(server, monkeypatch)
    graph = load_graph("umls")
    assert graph.name == "umls"
    assert [len(graph.train), len(graph.valid), len(graph.test)] == [2, 1, 1]
    assert left_on_disk(cache) == ["umls", "umls/test.txt", "umls/train.txt", "umls/valid.txt"]
    again = load_graph("umls")
    assert again.sha256 == graph.sha256
    assert server.asked == ["/set.tar.gz"]


def test_single_files_are_downloaded_each(server, monkeypatch, cache):
    server.content = {f"/codex-s/{name}": data for name, data in FILES.items()}
    monkeypatch.setitem(public.PUBLIC, "codex-s", server.address + "/codex-s/{split}.txt")
    monkeypatch.setitem(public.SHA256, "codex-s", LF_SHA256)
    assert load_graph("codex-s").warnings == ()
    assert sorted(server.asked) == ["/codex-s/test.txt", "/codex-s/train.txt", "/codex-s/valid.txt"]
    assert "codex-s/valid.txt" in left_on_disk(cache)


def test_the_data_folder_comes_before_the_cache_and_the_cache_before_the_network(tmp_path, monkeypatch, cache):
    monkeypatch.setitem(public.SHA256, "umls", {})
    for place, entity in ((tmp_path / "data", "from_data"), (cache, "from_cache")):
        (place / "umls").mkdir(parents=True)
        (place / "umls" / "train.txt.gz").write_bytes(gzip.compress(f"{entity}\tr\tx\n".encode()))
    assert "from_cache" in load_graph("umls").entities.names
    monkeypatch.setenv("DISTKGD_DATA", str(tmp_path / "data"))
    assert "from_data" in load_graph("umls").entities.names
    monkeypatch.setenv("DISTKGD_DATA", str(tmp_path / "elsewhere"))
    assert "from_cache" in load_graph("umls").entities.names


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert public.cache_folder() == tmp_path / ".cache" / "distkgd"


def test_a_file_with_another_checksum_is_refused_and_nothing_kept(server, monkeypatch, cache):
    serve_archive(server, monkeypatch)
    monkeypatch.setitem(public.SHA256, "umls", LF_SHA256 | {"test": "1" * 64})
    with pytest.raises(DataError, match=r"nothing was kept: http://127.*test\.txt: the sha256 .*expected 1111") as e:
        load_graph("umls")
    assert str(cache) not in str(e.value)  # the temporary folder is gone: its name helps nobody
    assert left_on_disk(cache) == []


def test_a_changed_file_in_the_data_folder_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "umls"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    monkeypatch.setenv("DISTKGD_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(public.SHA256, "umls", LF_SHA256)
    assert load_graph("umls").num_entities == 2
    (folder / "valid.txt").write_bytes(b"b\tr\ta\n")
    with pytest.raises(DataError, match=r"umls/valid\.txt: the sha256 of its content is .*not the published file"):
        load_graph("umls")
    assert load_graph(folder).num_entities == 2  # as a folder of one's own it is fine


@pytest.mark.parametrize("name", ["codex-m", "codex-l"])
def test_a_set_without_published_checksum_says_so_with_the_one_it_has(server, monkeypatch, name):
    server.content = {f"/{file}": data for file, data in FILES.items()}
    monkeypatch.setitem(public.PUBLIC, name, server.address + "/{split}.txt")
    expected = hashlib.sha256(b"".join(FILES.values()).replace(b"\r", b"")).hexdigest()
    for _ in range(2):  # from the network and from the cache
        assert load_graph(name).warnings == (
            f"no sha256 is published for {name}: nothing could be checked; "
            f"sha256 of train, valid, test as read: {expected}",
        )


def test_yago_is_checked_by_the_md5_of_train(server, monkeypatch, cache):
    lf_md5 = hashlib.md5(FILES["train.txt"].replace(b"\r", b"")).hexdigest()
    serve_archive(server, monkeypatch, "yago3-10")
    monkeypatch.setitem(public.TRAIN_MD5, "yago3-10", lf_md5)
    monkeypatch.delitem(public.SHA256, "yago3-10")
    assert "only train could be checked, by its md5" in load_graph("yago3-10").warnings[0]
    (cache / "yago3-10" / "train.txt").write_bytes(b"a\tr\tb\n")
    with pytest.raises(DataError, match=rf"train\.txt: its md5 is .* expected {lf_md5}"):
        load_graph("yago3-10")


def test_a_download_that_breaks_off_is_refused(server, monkeypatch, cache):
    server.content = {f"/{file}": data for file, data in FILES.items()}
    server.short = 3
    monkeypatch.setitem(public.PUBLIC, "codex-m", server.address + "/{split}.txt")
    with pytest.raises(DataError, match=r"nothing was kept: .*11 bytes arrived, 14 were promised"):
        load_graph("codex-m")
    assert left_on_disk(cache) == []


def test_an_address_that_answers_with_an_error_is_named_with_a_way_out(server, monkeypatch, cache):
    monkeypatch.setitem(public.PUBLIC, "umls", f"{server.address}/gone.tar.gz")
    with pytest.raises(DataError, match=r"gone\.tar\.gz: HTTP Error 404.*put its files into \$DISTKGD_DATA/umls"):
        load_graph("umls")
    with pytest.raises(DataError, match=r"wn18rr was not downloaded.*127\.0\.0\.1:9/nothing: .*refused"):
        load_graph("wn18rr")
    assert left_on_disk(cache) == []


def test_only_the_three_files_leave_an_archive_and_only_into_its_own_folder(server, monkeypatch, cache, tmp_path):
    members = {
        "../../train.txt": FILES["train.txt"],
        "/valid.txt": FILES["valid.txt"],
        "x/test.txt": FILES["test.txt"],
    }
    serve_archive(server, monkeypatch, members=members | {"../evil.txt": b"!", "e1rel.txt": b"?"})
    assert len(load_graph("umls").train) == 2
    assert left_on_disk(cache) == ["umls", "umls/test.txt", "umls/train.txt", "umls/valid.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_link_in_an_archive_is_not_followed(server, monkeypatch, cache):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("train.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    server.content["/set.tar.gz"] = buffer.getvalue()
    monkeypatch.setitem(public.PUBLIC, "umls", f"{server.address}/set.tar.gz")
    with pytest.raises(DataError, match=r"the archive holds no test\.txt, train\.txt, valid\.txt"):
        load_graph("umls")


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_archive_is_refused(server, monkeypatch, cache, damage):
    serve_archive(server, monkeypatch, members={"train.txt": bytes(range(256)) * 4000})
    data = server.content["/set.tar.gz"]
    server.content["/set.tar.gz"] = data[: len(data) // 2] if damage == "cut" else b"noise" * 100
    with pytest.raises(DataError, match=r"set\.tar\.gz: the archive is damaged"):
        load_graph("umls")
    assert left_on_disk(cache) == []


def test_a_process_that_was_quicker_is_not_disturbed(server, monkeypatch, cache):
    serve_archive(server, monkeypatch)
    download = public._download

    def slow_download(source, folder):
        download(source, folder)
        (cache / "umls").mkdir()
        for name, data in FILES.items():
            (cache / "umls" / name).write_bytes(data)

    monkeypatch.setattr(public, "_download", slow_download)
    assert len(load_graph("umls").train) == 2
    assert left_on_disk(cache) == ["umls", "umls/test.txt", "umls/train.txt", "umls/valid.txt"]


def test_a_cache_that_cannot_be_created_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"no place for a download .*set XDG_CACHE_HOME or DISTKGD_DATA"):
        load_graph("umls")


@pytest.mark.parametrize("kind", ["archive", "files"])
def test_a_full_disk_is_told_with_the_folder_that_had_no_place(server, monkeypatch, cache, kind):
    serve_archive(server, monkeypatch)
    if kind == "files":
        server.content = {f"/{file}": data for file, data in FILES.items()}
        monkeypatch.setitem(public.PUBLIC, "umls", server.address + "/{split}.txt")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=rf"{cache / 'umls'}: no place for a download .*No space left") as e:
            load_graph("umls")
    assert "set XDG_CACHE_HOME or DISTKGD_DATA" in str(e.value) and left_on_disk(cache) == []


def test_every_public_set_has_an_https_address_and_some_check_or_is_known_to_have_none(monkeypatch):
    monkeypatch.undo()
    assert list(public.PUBLIC) == [
        "wn18rr", "fb15k-237", "yago3-10", "codex-s", "codex-m", "codex-l", "umls", "kinship", "nations",
    ]  # fmt: skip
    assert all(address.startswith("https://") for address in public.PUBLIC.values())
    assert set(public.PUBLIC) - set(public.SHA256) - set(public.TRAIN_MD5) == {"codex-m", "codex-l"}
    for sums in public.SHA256.values():
        assert list(sums) == ["train", "valid", "test"]
        assert all(len(bytes.fromhex(value)) == 32 for value in sums.values())
