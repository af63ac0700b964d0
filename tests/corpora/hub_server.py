"""A server on this host that answers as the Hugging Face hub does for data sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_NAME = r"(?P<name>\w+/\w+)"


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        url: Its address.
        files: For each data set, contents by path.
        ranges: The path and the first and last byte of each range that was asked for.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        routes = {
            rf"/api/datasets/{_NAME}(/revision/\w+)?": self._data_set,
            rf"/api/datasets/{_NAME}/tree/\w+/?(?P<path>.*)": self._folder,
            rf"/datasets/{_NAME}/resolve/({COMMIT}|main)/(?P<path>.*)": self._file,
        }
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match and (files := self.state.files.get(match["name"])) is not None:
                answer(files, **match.groupdict())
                return
        self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _data_set(self, files: dict[str, bytes], name: str) -> None:
        self._json({"id": name, "sha": COMMIT, "siblings": [], "tags": []})

    def _folder(self, files: dict[str, bytes], name: str, path: str) -> None:
        """Say what files and folders a folder holds."""
        folder = f"{path}/" if path else ""
        inside = {file: raw for file, raw in files.items() if file.startswith(folder)}
        names = {file.removeprefix(folder).partition("/")[0] for file in inside}
        found: list[dict[str, Any]] = []
        for one in sorted(folder + name for name in names):
            raw = inside.get(one)
            entry = {"type": "directory", "path": one, "oid": "0" * 40, "size": 0}
            if raw is not None:
                sha256 = hashlib.sha256(raw).hexdigest()
                lfs = {"oid": sha256, "size": len(raw), "pointerSize": 130}
                entry |= {"type": "file", "oid": sha256[:40], "size": len(raw), "lfs": lfs}
            found.append(entry)
        self._json(found)

    def _file(self, files: dict[str, bytes], name: str, path: str) -> None:
        """Send a file or a range of it."""
        whole = files.get(path)
        if whole is None:
            self._refuse("EntryNotFound")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(whole))
        self.send_response(206 if asked else 200)
        if asked:
            self.state.ranges.append((path, begin, end))
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(whole)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self._send(whole[begin:end])

    def _json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(value).encode())

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self._send(b"")

    def _send(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the block ends."""
    state = Hub()
    with listening(type("Handler", (_Handler,), {"state": state})) as state.url:
        yield state
