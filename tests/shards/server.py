"""A real HTTP server on loopback that serves a folder and misbehaves when told to."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from tests.loopback import listening


@dataclass
class Server:
    """What is served where, what was asked for, and the faults of the next answers."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # one a request for a tar: the first is next
    together: int = 0  # a tar is sent once so many have been under way at the same time,
    patience: float = 60.0  # or after so many seconds
    under_way: int = 0  # tars
    tars_at_once: int = 0  # the most that were under way at the same time
    password: str = ""  # USER:PASSWORD that a request must bring

    @property
    def tars(self) -> list[str]:
        return [path for path in self.asked if path.endswith(".tar")]


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve `folder` below /data while the block runs."""
    state, counting = Server(folder), threading.Condition()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            state.asked.append(path)
            fault = state.faults.pop(0) if path.endswith(".tar") and state.faults else ""
            wanted = "Basic " + base64.b64encode(state.password.encode()).decode()
            file = state.folder / path.removeprefix("/data/")
            if state.password and self.headers["Authorization"] != wanted:
                self.send_error(401)
            elif fault == "busy":
                self.send_error(503)
            elif fault == "hang up":
                self.connection.close()
            elif not file.is_file():
                self.send_error(404)
            elif path.endswith(".tar"):
                with counting:
                    state.under_way += 1
                    state.tars_at_once = max(state.tars_at_once, state.under_way)
                    counting.notify_all()
                    counting.wait_for(lambda: state.tars_at_once >= state.together, state.patience)
                    state.under_way -= 1
                self.answer(file.read_bytes(), fault)
            else:
                self.answer(file.read_bytes(), fault)

        def answer(self, body: bytes, fault: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "flip":
                body = body[:700] + bytes([body[700] ^ 1]) + body[701:]
            self.wfile.write(body[:-600] if fault == "cut" else body)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with listening(Handler) as address:
        state.url = f"{address}/data"
        yield state
