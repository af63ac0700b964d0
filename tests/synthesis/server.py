"""A real HTTP server that answers as OpenAI's API does; a small rule writes the queries."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Writer = Callable[[str, dict[str, Any]], str]
MODEL = "writer"


class Fault(Exception):
    """Makes the server answer with a status and a message."""

    def __init__(self, status: int, message: str = "fault") -> None:
        super().__init__(message)
        self.status = status


class _Http(ThreadingHTTPServer):
    request_queue_size = 64  # connections at the same time

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that was killed does not read its answer."""


class Server:
    """A running server.

    Attributes:
        url: Its address, with `/v1`.
        requests: The bodies of all chat requests so far.
        keys: The Authorization headers of all requests so far.
    """

    def __init__(self, write: Writer, models: tuple[str, ...] | None = (MODEL,)) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.keys.append(self.headers.get("Authorization"))
                if models is None:
                    self._reply(403, {"error": {"message": "this key may not list models"}})
                    return
                self._reply(200, {"object": "list", "data": [{"id": name} for name in models]})

            def do_POST(self) -> None:
                owner.keys.append(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                try:
                    passage = body["messages"][-1]["content"].partition("Passage:\n")[2]
                    text = write(passage, body)
                except Fault as fault:
                    self._reply(fault.status, {"error": {"message": str(fault)}})
                    return
                message = {"role": "assistant", "content": text}
                self._reply(200, {"choices": [{"index": 0, "message": message}]})

            def _reply(self, status: int, content: dict[str, Any]) -> None:
                raw = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *words: Any) -> None:
                pass

        self._http = _Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(write: Writer, models: tuple[str, ...] | None = (MODEL,)) -> Iterator[Server]:
    """Start a server whose answer to a passage is `write(passage, request)`.

    models: What it serves; None: it refuses to list that.
    """
    with Server(write, models) as server:
        yield server
