"""Downloads are whole or not there: broken ones are resumed, error pages and parts are not kept."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from lbr_ds.config import DataConfig, SourceConfig
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import DataError, EnvironmentProblem, LbrError
from lbr_ds.system.locate import cache_folder, cached_sha256, locate
from tests.loopback import listening

BODY = b"".join(b'{"id": "r%d", "text": "some words"}\n' % i for i in range(5000))
PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"


@dataclass
class Server:
    """What is served, the faults of the next answers, and what was asked for."""

    url: str = ""
    body: bytes = BODY
    faults: list[str] = field(default_factory=list)  # one a request, the first is next
    tag: str = '"v1"'
    ranges: list[str] = field(default_factory=list)  # the Range header of each request


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lbr_ds.system.download.RETRY_WAITS", (0.0, 0.0))
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked, fault = (
                self.headers.get("Range", ""),
                state.faults.pop(0) if state.faults else "",
            )
            state.ranges.append(asked)
            self.close_connection = True
            if fault.isdigit():
                self.send_error(int(fault))
                return
            start = int(asked[6:-1]) if asked and self.headers["If-Range"] == state.tag else 0
            body = state.body[start:]
            self.send_response(206 if start else 200)
            if start:
                end = len(state.body)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
            if state.tag:
                self.send_header("ETag", state.tag)
            if fault == "no end":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body) // 2, body[: len(body) // 2]))
                return
            if fault != "no length":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "half" else body)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with listening(Handler) as state.url:
        yield state


def kept() -> list[Path]:
    return [path for path in cache_folder().rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "faults", [[], ["503"], ["half"], ["half", "half"], ["no end"], ["half", "503"]]
)
def test_the_whole_file(server: Server, faults: list[str]) -> None:
    server.faults = list(faults)
    path = locate(f"{server.url}/a.jsonl")
    assert path.read_bytes() == BODY
    assert kept() == [path]
    assert len(server.ranges) == len(faults) + 1
    locate(f"{server.url}/a.jsonl")
    assert len(server.ranges) == len(faults) + 1


def test_it_is_resumed_where_it_broke(server: Server) -> None:
    server.faults = ["half", "half"]
    assert locate(f"{server.url}/a.jsonl").read_bytes() == BODY
    half = len(BODY) // 2
    assert server.ranges == ["", f"bytes={half}-", f"bytes={half + (len(BODY) - half) // 2}-"]


@pytest.mark.parametrize("tag", ["", 'W/"v1"'])
def test_without_a_strong_tag_it_starts_over(server: Server, tag: str) -> None:
    server.faults, server.tag = ["half"], tag
    assert locate(f"{server.url}/a.jsonl").read_bytes() == BODY
    assert server.ranges == ["", ""]


def test_a_file_that_changed_meanwhile_starts_over(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(seconds: float) -> None:
        server.tag, server.body = '"v2"', BODY[::-1]

    monkeypatch.setattr("lbr_ds.system.download.time.sleep", change)
    server.faults = ["half"]
    assert locate(f"{server.url}/a.jsonl").read_bytes() == BODY[::-1]


@pytest.mark.parametrize("fault", ["half", "no end", "503", "500"])
def test_what_stays_broken_is_not_kept(server: Server, fault: str) -> None:
    server.faults, server.tag = [fault] * 3, ""
    words = {"half": rf"truncated, {len(BODY) // 2} bytes of {len(BODY)}", "no end": "truncated"}
    with pytest.raises(EnvironmentProblem, match=words.get(fault, f"HTTP {fault}")):
        locate(f"{server.url}/a.jsonl")
    assert (len(server.ranges), kept()) == (3, [])
    assert locate(f"{server.url}/a.jsonl").read_bytes() == BODY


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("a.jsonl", PAGE, r"a web page \(HTML\)"),
        ("a.csv", b"\xef\xbb\xbf  \n<html lang='en'>", r"a web page \(HTML\)"),
        ("a", b"<?xml version='1.0'?>\n<!-- x -->\n<!DOCTYPE HTML PUBLIC>", r"a web page \(HTML\)"),
        ("a.jsonl.gz", BODY, r"no \.gz file \(it begins with b.{.id"),
        ("a.parquet", b"404: Not Found", r"no \.parquet file"),
    ],
)
def test_another_kind_of_file_is_not_kept(
    server: Server, name: str, body: bytes, words: str
) -> None:
    server.body = body
    with pytest.raises(DataError, match=words):
        locate(f"{server.url}/{name}")
    assert kept() == []


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.html", PAGE),
        ("a.xml", b"<?xml version='1.0'?><htmlike/>"),
        ("a.jsonl", b""),
        ("a.jsonl.gz", gzip.compress(BODY)),
        ("a.txt", b"html is a language"),
    ],
)
def test_files_that_are_what_they_say(server: Server, name: str, body: bytes) -> None:
    server.body = body
    assert locate(f"{server.url}/{name}").read_bytes() == body


def test_missing_and_hash(server: Server) -> None:
    server.faults = ["404"]
    with pytest.raises(DataError, match=r"a.jsonl: the server has no such file; check the address"):
        locate(f"{server.url}/a.jsonl")
    for digest in ("0" * 64, hashlib.sha256(BODY).hexdigest()):
        place = f"{server.url}/a.jsonl#sha256={digest}"
        if digest == "0" * 64:
            with pytest.raises(LbrError, match=r"file has sha256 .* but the address says"):
                locate(place)
            assert kept() == []
        else:
            assert locate(place).read_bytes() == BODY


def test_a_cached_file_that_cannot_be_read_is_named(server: Server, tmp_path: Path) -> None:
    """An error page that looks like nothing in particular, and a table that was cut when made."""
    server.body = b"404: Not Found\n"
    source = SourceConfig(path=f"{server.url}/a.jsonl")
    data = DataConfig(folder=tmp_path / "data", sources=[source])
    with pytest.raises(DataError, match=r"a.jsonl:1: not JSON.*: remove (\S+) to fetch it again"):
        prepare(data, 0)
    (cached,) = (path for path in kept() if path.name == "a.jsonl")
    assert locate(source.path) == cached


def test_no_length_is_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.faults = ["no length"]
    assert locate(f"{server.url}/a.jsonl").read_bytes() == BODY
    assert "the server sent no Content-Length" in caplog.text


def test_a_hash_is_remembered_for_as_long_as_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(BODY)
    wanted = hashlib.sha256(BODY).hexdigest()
    assert cached_sha256(path) == wanted
    assert kept() == []  # it has only just been written
    monkeypatch.setattr("lbr_ds.system.locate._SETTLED", 0)
    assert cached_sha256(path) == wanted
    with monkeypatch.context() as patched:
        patched.setattr("lbr_ds.system.locate.file_sha256", None)  # not read again
        assert cached_sha256(path) == wanted
    path.write_bytes(BODY[::-1])
    assert cached_sha256(path) == hashlib.sha256(BODY[::-1]).hexdigest()
    for entry in kept():
        entry.write_text("not a hash")
    assert cached_sha256(path) == hashlib.sha256(BODY[::-1]).hexdigest()
