"""A hub on this machine: what huggingface_hub needs of one to create and fill a repository.

Written from the client's requests: create, preupload, the LFS batch protocol, and the commit.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class Hub:
    """What the server was asked for, and the files that it holds."""

    def __init__(self) -> None:
        self.url = ""
        self.token = "hf_" + "t" * 34
        self.repositories: dict[
            str, dict[str, Any]
        ] = {}  # name: {"private", "files": {path: bytes}}
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """The status and JSON content for a POST."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in self.repositories:
                return 409, {"url": f"{self.url}/{name}", "error": "You already created it"}
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.repositories[name] = {"private": bool(private), "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._wanted(item) for item in json.loads(body)["objects"]],
            }
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    }
                    for file in files
                ]
            }
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(self.repositories[name]["files"], body)
            return 200, {
                "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        return 404, {"error": f"{path}: not served here"}

    def _wanted(self, item: dict[str, Any]) -> dict[str, Any]:
        """Where an object goes; one that is there already is not asked for again."""
        if item["oid"] in self.stored:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._send(401, {"error": "Invalid username or password."})
            else:
                self._send(*hub.answer(self.path.partition("?")[0], body))

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
            hub.stored[self.path.rpartition("/")[2]] = body
            self._send(200, {})

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status: int, content: Any) -> None:
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
