"""A real HTTP server that sends ranges of files, and breaks off where a test wants it to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.loopback import listening


@dataclass
class Server:
    """What is served, and what was sent.

    Attributes:
        url: Its address.
        files: Contents by name.
        ranges: Whether it sends ranges.
        once: What happens to the first request up to each byte, if it is for more than one byte:
            "half" (it breaks off) or a status.
        always: The same, to all such requests.
        left: After so many such requests all fail with status 503.
        tag: The ETag of all files.
        sent: Bytes sent of each file.
        requests: The ranges that were asked for.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    once: str = ""
    always: str = ""
    left: int = 1 << 30
    broken: set[tuple[str, int]] = field(default_factory=set)
    tag: str = '"v1"'
    sent: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Count from zero again."""
        self.sent, self.requests = {}, []


@contextmanager
def serving() -> Iterator[Server]:
    """Serve until the block ends."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            name = self.path.lstrip("/")
            if name not in state.files:
                self.send_error(404)
                return
            body, total = state.files[name], len(state.files[name])
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, total)
            with state.lock:
                first = (name, end) not in state.broken
                fault = state.always or (state.once if first else "")
                state.left -= end - begin > 1
                fault = "503" if state.left < 0 else fault
                fault = fault if end - begin > 1 else ""
                if fault:
                    state.broken.add((name, end))
                state.requests.append((name, begin, end))
            if fault.isdigit():
                self.send_error(int(fault))
                return
            if asked and state.ranges:
                body = body[begin:end]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("ETag", state.tag)
            self.send_header("Content-Length", str(len(body)))
            body = body[: len(body) // 2] if fault == "half" else body
            # Counted before the headers are sent: a client that needs no more than these continues
            # at once, and a count that comes later may fall after its call of `forget`.
            with state.lock:
                state.sent[name] = state.sent.get(name, 0) + len(body)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with listening(Handler) as state.url:
        yield state
