"""Ask a language model behind an OpenAI-compatible server: many requests at once, with retries.

Only `POST /chat/completions` is needed; `GET /models` is asked first, to check address, key and
model, and servers without it are used all the same.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from queue import SimpleQueue
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from lbr_ds.config.synthesis import SynthesisConfig
from lbr_ds.errors import ConfigError, EnvironmentProblem, short
from lbr_ds.synthesis.prompts import Message, encodable
from lbr_ds.system.urls import public_url

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # what another try may get past
_CHECK_SECONDS = 20.0
_BACKOFF, _BACKOFF_MOST = 0.5, 60.0  # seconds: of the first pause, doubled each time, and at most
# After as many refusals in a row, and at the end after any, a request without a passage tells
# whether the server refuses these passages or, for example because of the key, every request.
_REFUSALS = 8
_NO_PASSAGE: list[Message] = [{"role": "user", "content": "Hello"}]


class Question(NamedTuple):
    """A chat about one passage, and the seed of its answer."""

    passage: str
    chat: list[Message]
    seed: int


class Answer(NamedTuple):
    """What the server said about a passage: a text, or why it refused the request."""

    passage: str
    text: str
    refused: str = ""


class Endpoint:
    """A server, and the model to ask there."""

    def __init__(self, settings: SynthesisConfig) -> None:
        self.settings = settings
        self.url = settings.url.rstrip("/")
        self.place = f"synthesis.url={public_url(self.url)}"
        self.model = settings.model
        self._local = threading.local()
        self._clock = _Clock(settings.requests_per_minute)

    def check(self) -> None:
        """Ask the server for its models; take the only one if the recipe names none.

        Raises:
            EnvironmentProblem: It cannot be reached, or refuses the key.
            ConfigError: It does not serve the model, or the recipe must name one.
        """
        try:
            found = self._session(0).get(f"{self.url}/models", timeout=_CHECK_SECONDS)
        except requests.RequestException as error:
            raise EnvironmentProblem(
                f"{self.place} cannot be reached ({short(_reason(error), 120)}); start the server, "
                "or correct the address"
            ) from None
        self._check_key(found)
        served = _served(found)
        if not self.model and len(served) == 1:
            self.model = served[0]
        if not self.model:
            raise ConfigError(
                f"synthesis.model is empty; name one of {self.place}: {_listing(served)}"
            )
        if served and self.model not in served:
            raise ConfigError(
                f"synthesis.model={self.model}: {self.place} does not serve it; "
                f"it has {_listing(served)}"
            )

    def ask(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Yield the answers as they come; `concurrency` requests are on their way at a time.

        Raises:
            EnvironmentProblem: A request failed after all retries, or every request is refused.
            ConfigError: The server has no such model.
        """
        todo: SimpleQueue[Question | None] = SimpleQueue()
        done: SimpleQueue[Answer | Exception] = SimpleQueue()
        number = self.settings.concurrency
        for _ in range(number):
            # Daemons: a program that is interrupted does not wait for requests on their way.
            threading.Thread(target=self._serve, args=(todo, done), daemon=True).start()
        source, waiting, refused = iter(questions), 0, 0
        try:
            while True:
                for question in islice(source, number - waiting):
                    todo.put(question)
                    waiting += 1
                if not waiting:
                    if refused:
                        self._check_answers()
                    return
                answer = done.get()
                waiting -= 1
                if isinstance(answer, Exception):
                    raise answer
                refused = refused + 1 if answer.refused else 0
                if refused == _REFUSALS:
                    self._check_answers()
                    refused = 0
                yield answer
        finally:
            for _ in range(number):
                todo.put(None)

    def _serve(
        self, todo: SimpleQueue[Question | None], done: SimpleQueue[Answer | Exception]
    ) -> None:
        """Answer questions until there is none; the work of one thread."""
        while (question := todo.get()) is not None:
            try:
                done.put(self._ask(question))
            except Exception as error:  # raised by `ask`, in the thread that called it
                done.put(error)

    def _ask(self, question: Question) -> Answer:
        settings = self.settings
        body: dict[str, Any] = {
            "model": self.model,
            "messages": question.chat,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "seed": question.seed,
        }
        self._clock.wait()
        session = self._session(settings.retries)
        try:
            found = session.post(
                f"{self.url}/chat/completions", json=body, timeout=settings.timeout
            )
        except requests.RequestException as error:
            raise self._gave_up(_reason(error)) from None
        if found.status_code in _AGAIN:
            raise self._gave_up(_said(found))
        self._check_key(found)
        if found.status_code == 404:
            raise ConfigError(
                f"synthesis.model={self.model}: {self.place} answers {_said(found)}; correct the "
                "model's name or the address, which usually ends with /v1"
            )
        if not found.ok:
            return Answer(question.passage, "", _said(found))
        try:
            text = found.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise EnvironmentProblem(
                f"{self.place}: its answer is not that of an OpenAI-compatible server: "
                f"{short(found.text, 120)}; correct the address, which usually ends with /v1"
            ) from None
        return Answer(question.passage, text or "")

    def _check_answers(self) -> None:
        """Raise EnvironmentProblem if a request without a passage is refused, too."""
        if reason := self._ask(Question("", _NO_PASSAGE, 0)).refused:
            raise EnvironmentProblem(
                f"{self.place} refuses every request: {reason}; correct what it names, or the key "
                f"in the environment variable {self.settings.api_key_variable}, and repeat the "
                "command: all answers so far are stored"
            )

    def _gave_up(self, reason: str) -> EnvironmentProblem:
        tries = self.settings.retries + 1
        return EnvironmentProblem(
            f"{self.place}: no answer after {tries} tries ({short(reason, 160)}); all answers so "
            "far are stored, and the same command continues"
        )

    def _check_key(self, found: requests.Response) -> None:
        if found.status_code == 401:  # 403 may mean one passage, or only the list of models
            variable = self.settings.api_key_variable
            which = "refuses the key in" if os.environ.get(variable) else "wants a key; set"
            raise EnvironmentProblem(
                f"{self.place} {which} the environment variable {variable} ({_said(found)})"
            )

    def _session(self, retries: int) -> requests.Session:
        """Return this thread's session, which keeps its connections; 0: one that does not retry."""
        kept: dict[int, requests.Session] | None = getattr(self._local, "kept", None)
        if kept is None:
            kept = self._local.kept = {}
        if retries not in kept:
            session = requests.Session()
            again = Retry(
                retries,
                allowed_methods=None,  # any, POST too: an answer that is lost is asked for again
                status_forcelist=_AGAIN if retries else (),
                backoff_factor=_BACKOFF,
                backoff_max=_BACKOFF_MOST,
                backoff_jitter=_BACKOFF,
                raise_on_status=False,
            )
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=again))
            key = os.environ.get(self.settings.api_key_variable)
            if key:
                session.headers["Authorization"] = f"Bearer {key}"
            kept[retries] = session
        return kept[retries]


class _Clock:
    """Let requests start no faster than at a rate."""

    def __init__(self, per_minute: float | None) -> None:
        self._pause = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._pause
        if begin > now:
            time.sleep(begin - now)


def _served(found: requests.Response) -> list[str]:
    """Return the names of the server's models; [] if it does not tell."""
    try:
        return [str(model["id"]) for model in found.json()["data"]] if found.ok else []
    except (ValueError, KeyError, TypeError):
        return []


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "(it does not list its models)"
    return shown + (", ..." if len(names) > 5 else "")


def _said(found: requests.Response) -> str:
    """Return status and message of a response."""
    try:
        error: Any = found.json()
        error = error.get("error", error)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = found.text
    return f"HTTP {found.status_code}: {encodable(short(str(text), 160))}"


def _reason(error: requests.RequestException) -> str:
    """Return the innermost reason of an error, without addresses of objects."""
    inner: Any = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return str(inner).rpartition(">: ")[2] or type(error).__name__
