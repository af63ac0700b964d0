"""From passages to pairs: every reason is counted, a kill costs nothing, no leak is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import RunConfig
from lbr_ds.corpora.curate.segmentation import key, similarity
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.mining.mine import mine
from lbr_ds.records import Record
from lbr_ds.report.data import read_data
from lbr_ds.shards import Manifest, read_split, verify
from lbr_ds.synthesis import judging, rules
from lbr_ds.synthesis.synthesize import synthesize
from lbr_ds.system import process_pool
from tests.mining.toy import file_bytes
from tests.mining.toy import make_run as make_pairs
from tests.synthesis.server import MODEL, Fault, serving
from tests.synthesis.toy import good_queries, make_run, number_of, with_synthesis


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small work in many jobs: starting helper processes would take most of the time."""
    monkeypatch.setattr(process_pool, "cores", lambda: 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_run(tmp_path_factory.mktemp("toy"))


def copy(prepared: RunConfig, folder: Path) -> RunConfig:
    """A copy of the prepared data in another folder."""
    shutil.copytree(str(prepared.data.folder), folder / "data")
    data = prepared.data.model_copy(update={"folder": folder / "data"})
    return prepared.model_copy(update={"data": data})


@pytest.fixture
def run(prepared: RunConfig, tmp_path: Path) -> RunConfig:
    return copy(prepared, tmp_path)


def split(run: RunConfig, name: str) -> list[Record]:
    return list(read_split(run.data.folder, name))


def test_passages_become_pairs_that_keep_what_they_had(run: RunConfig) -> None:
    before = {r.text: r for r in split(run, "cl")}
    gl, held_out = split(run, "gl"), split(run, "eval")
    with serving(good_queries) as server:
        audit = synthesize(with_synthesis(run, url=server.url))
        assert audit is not None
        assert len(server.requests) == len(before) == 40
        assert {r["model"] for r in server.requests} == {MODEL}
        assert len({r["seed"] for r in server.requests}) == 40
        again = synthesize(with_synthesis(run, url=server.url, model=MODEL))
        assert len(server.requests) == 40
    made = split(run, "cl")
    assert again is not None
    assert again["reused"] is False  # the settings name the model now
    assert len(made) == audit["kept"] == audit["queries_written"] == 80
    for record in made:
        (text,) = record.positives
        assert record.query in (f"what is disease{number_of(text)}?",) or "Who gets" in record.query
        assert record.group == before[text].group
        assert record.source == "documents"
        assert record.instruction == "Find: "
        assert record.id.partition("#q")[0] == before[text].id
    assert [r.query for r in made] != sorted(r.query for r in made)
    assert split(run, "gl") == gl
    assert split(run, "eval") == held_out
    manifest = verify(Path(str(run.data.folder)))
    assert (
        manifest.instructions.only("query") is None
        or manifest.instructions.within("cl").only("query") == "Find: "
    )
    assert {r.text for r in read_split(run.data.folder, "passages")} == set(before)
    assert manifest.sources[-1]["format"] == "synthesize"
    assert prepare(run.data, run.seed)["reused"] is True


def test_the_same_settings_reuse_what_is_there(run: RunConfig) -> None:
    with serving(good_queries) as server:
        named = with_synthesis(run, url=server.url, model=MODEL)
        synthesize(named)
        before = file_bytes(Path(str(run.data.folder)))
    audit = synthesize(named)  # the server is gone: nothing is asked
    assert audit is not None
    assert audit["reused"] is True
    assert file_bytes(Path(str(run.data.folder))) == before


class Stopped(BaseException):
    """What ends the program between two answers."""


class StopAfter:
    """A progress callback that ends the program at its n-th call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, part: str, done: int, total: int | None) -> None:
        self.calls -= 1
        if not self.calls:
            raise Stopped


def test_a_killed_command_resumes_to_the_same_bytes(prepared: RunConfig, tmp_path: Path) -> None:
    whole, killed = (copy(prepared, tmp_path / name) for name in ("whole", "killed"))
    with serving(good_queries) as server:
        synthesize(with_synthesis(whole, url=server.url, model=MODEL))
        asked = len(server.requests)
        work = tmp_path / "killed" / "data.synthesis"
        for stop in (1, 7, 19):
            with pytest.raises(Stopped):
                synthesize(with_synthesis(killed, url=server.url, model=MODEL), StopAfter(stop))
            (file,) = work.glob("*/answers-*.jsonl")
            raw = file.read_bytes()
            assert raw.endswith(b"\n")
            file.write_bytes(raw + raw[: len(raw) // (2 * stop)])  # cut in the middle of a line
        audit = synthesize(with_synthesis(killed, url=server.url, model=MODEL))
        assert audit is not None
        assert len(server.requests) - asked < asked + 3 * 16  # what was on its way three times
    passages = [json.loads(line)["passage"] for line in file.read_text().splitlines()]
    assert len(passages) == len(set(passages)) == 40
    assert file_bytes(tmp_path / "killed" / "data") == file_bytes(tmp_path / "whole" / "data")


def test_every_reason_is_counted(run: RunConfig) -> None:
    """One passage for each fault; the others get one good query."""
    held = [r.query for r in split(run, "eval")]
    texts = [r.text for r in split(run, "cl")]
    first, second = (number_of(text) for text in texts[9:11])
    long_one = (
        "what do all of the many people with disease{} in this big old town say they feel now"
    )
    faults = {
        texts[0]: held[0].upper(),
        texts[1]: f"{held[1]} please",
        texts[2]: "what is the matter with them",
        texts[3]: "What is the matter, with them?",
        texts[4]: texts[4],
        texts[5]: "\n".join(f"query {i} on disease{number_of(texts[5])}" for i in range(4)),
        texts[6]: "x" * 30_000,
        texts[7]: "Here are the queries:\n",
        texts[8]: "",
        "": "Hello!",
        texts[9]: long_one.format(first),
        texts[10]: long_one.format(first) + f" disease{second}",
    }

    def write(text: str, request: dict[str, Any]) -> str:
        if text == texts[11]:
            raise Fault(400, "the prompt is too long")
        return faults.get(text, f"what is disease{number_of(text)}?")

    with serving(write) as server:
        audit = synthesize(with_synthesis(run, url=server.url, queries=3))
    assert audit is not None
    assert {reason: count for reason, count in audit["dropped"].items() if count} == {
        "evaluation": 1,
        "near_evaluation": 1,
        "duplicate": 1,
        "not_retrieved": 1,
        "repeats_the_passage": 1,
        "surplus": 1,
        "too_long": 1,
        "near_duplicate": 1,
    }
    assert set(audit["dropped"]) == set(rules.REASONS)
    assert audit["queries_written"] == audit["kept"] + sum(audit["dropped"].values())
    assert audit["passages_refused_by_the_server"] == 1
    assert audit["server_refusals"] == ["HTTP 400: the prompt is too long"]
    assert audit["kept"] == 28 + 3 + 1
    assert audit["passages_without_query"] == 40 - 28 - 2
    assert sum(audit["ranks"].values()) == audit["kept"]
    assert audit["examples_dropped"]["evaluation"][0]["query"] == held[0].upper()
    assert json.loads((Path(str(run.data.folder)) / "synthesis.json").read_text()) == {
        name: value for name, value in audit.items() if name != "reused"
    }


def test_no_query_of_cl_is_near_a_text_of_eval(run: RunConfig) -> None:
    """Counted here again; and the proof notices what the rules would let through."""
    held = [r.query for r in split(run, "eval")]

    def write(text: str, request: dict[str, Any]) -> str:
        number = number_of(text)
        return f"what is disease{number}\n{held[number % 20]}\n{held[number % 20]} now {number}"

    with serving(write) as server:
        asked = with_synthesis(run, url=server.url, keep_rank=None)
        synthesize(asked)
        judged = {t for r in split(run, "eval") for t in r.texts()}
        for record in split(run, "cl"):
            assert key(record.query) not in set(map(key, judged))
            assert all(similarity(record.query, text) < 0.7 for text in judged)
        before = file_bytes(Path(str(run.data.folder)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judging, "distinct", lambda candidates, *others: list(candidates))
            with pytest.raises(DataError, match=r"eval shares texts with training"):
                synthesize(with_synthesis(asked, queries=2))
            patch.setattr(judging.leaks, "prove_no_equal_texts", lambda folder: None)
            with pytest.raises(DataError, match=r"queries of cl are near a text of eval"):
                synthesize(with_synthesis(asked, queries=4))
    assert file_bytes(Path(str(run.data.folder))) == before


def test_held_out_passages_are_never_asked_for(run: RunConfig) -> None:
    with serving(good_queries) as server:
        synthesize(with_synthesis(run, url=server.url, passages=("cl", "gl")))
    asked = [r["messages"][-1]["content"].partition("Passage:\n")[2] for r in server.requests]
    assert len(asked) == 60
    assert not set(asked) & {t for r in split(run, "eval") for t in r.texts()}
    assert {number_of(r.positives[0]) for r in split(run, "cl")} == set(range(60))


def test_mining_and_writing_again_start_from_what_they_should(run: RunConfig) -> None:
    folder = Path(str(run.data.folder))
    with serving(good_queries) as server:
        first = with_synthesis(run, url=server.url, model=MODEL)
        synthesize(first)
        written, fingerprint = split(run, "cl"), Manifest.load(folder).fingerprint
        audit = mine(run)
        assert audit is not None
        assert audit["kept"] > 0
        mined = split(run, "cl")
        assert [(r.id, r.positives) for r in mined] == [(r.id, r.positives) for r in written]
        assert any(r.negatives for r in mined)
        assert Manifest.load(folder).fingerprint.endswith(f"-{fingerprint}")
        assert synthesize(first) == {
            **json.loads((folder / "synthesis.json").read_text()),
            "reused": True,
        }
        assert (folder / "mining.json").exists()
        synthesize(with_synthesis(first, queries=1))
    assert len(split(run, "cl")) == 40
    assert not (folder / "mining.json").exists()
    assert "given" not in Manifest.load(folder).splits
    assert len(list(read_split(folder, "passages"))) == 40
    assert Manifest.load(folder).fingerprint.count("-") == 1


def test_a_server_that_fails_now_and_then_is_asked_again(run: RunConfig) -> None:
    seen: set[str] = set()

    def write(text: str, request: dict[str, Any]) -> str:
        if text not in seen:
            seen.add(text)
            raise Fault(503, "busy")
        return good_queries(text, request)

    with serving(write) as server:
        audit = synthesize(with_synthesis(run, url=server.url, max_passages=5))
    assert audit is not None
    assert (audit["passages"], len(server.requests), audit["kept"]) == (5, 10, 10)


def test_a_key_is_sent_and_never_stored(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVER", "a-hidden-value")
    with serving(good_queries) as server:
        synthesize(
            with_synthesis(run, url=server.url, api_key_variable="MY_SERVER", max_passages=3)
        )
    assert set(server.keys) == {"Bearer a-hidden-value"}
    for folder in ("data", "data.synthesis"):
        files = file_bytes(Path(str(run.data.folder)).with_name(folder))
        assert not [name for name, raw in files.items() if b"a-hidden-value" in raw]


def test_half_a_surrogate_pair_of_an_answer_is_replaced_and_not_asked_again(
    run: RunConfig,
) -> None:
    """A model that is stopped within an emoji gives half of it; whole pairs stay."""
    settings = {"model": MODEL, "max_passages": 4, "keep_rank": None}

    def write(text: str, request: dict[str, Any]) -> str:
        return f"what is disease{number_of(text)} \U0001f600 \ud83d"

    with serving(write) as server:
        audit = synthesize(with_synthesis(run, url=server.url, **settings))
        stored = {p: p.read_bytes() for p in Path(f"{run.data.folder}.synthesis").rglob("*.jsonl")}
        again = synthesize(with_synthesis(run, url=server.url, **{**settings, "keep_rank": 30}))
        assert len(server.requests) == 4
    assert audit is not None
    assert again is not None
    assert audit["kept"] == again["kept"] == 4
    assert all(r.query.endswith(" \U0001f600 \ufffd") for r in split(run, "cl"))
    assert all(raw == path.read_bytes() for path, raw in stored.items())


def test_half_a_surrogate_pair_of_a_refusal_is_replaced(run: RunConfig) -> None:
    refused = split(run, "cl")[0].text

    def write(text: str, request: dict[str, Any]) -> str:
        if text == refused:
            raise Fault(400, "too long: \ud83d")
        return good_queries(text, request)

    with serving(write) as server:
        audit = synthesize(with_synthesis(run, url=server.url))
    assert audit is not None
    assert audit["server_refusals"] == ["HTTP 400: too long: \ufffd"]


def refusing(status: int) -> Any:
    def write(text: str, request: dict[str, Any]) -> str:
        raise Fault(status, "no")

    return write


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, EnvironmentProblem, r"refuses every request: HTTP 400: no"),
        (401, EnvironmentProblem, r"wants a key; set the environment variable OPENAI_API_KEY"),
        (403, EnvironmentProblem, r"request: HTTP 403: no; .* key in .* variable OPENAI_API_KEY"),
        (404, ConfigError, r"synthesis.model=writer: .* answers HTTP 404: no; correct the model"),
        (500, EnvironmentProblem, r"no answer after 1 tries \(HTTP 500: no\); all answers so far"),
    ],
)
def test_a_server_that_refuses(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, status: int, kind: Any, message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before = file_bytes(Path(str(run.data.folder)))
    with serving(refusing(status)) as server, pytest.raises(kind, match=message):
        synthesize(with_synthesis(run, url=server.url, retries=0))
    assert file_bytes(Path(str(run.data.folder))) == before


@pytest.mark.parametrize("number", [1, 12])
def test_refused_passages_are_counted_also_if_only_they_are_left(
    run: RunConfig, number: int
) -> None:
    """A gateway's moderation answers HTTP 403 for some passages, more in a row than the limit."""
    moderated = {r.text for r in split(run, "cl")[:number]}

    def write(text: str, request: dict[str, Any]) -> str:
        if text in moderated:
            raise Fault(403, "blocked by the content filter")
        return good_queries(text, request)

    with serving(write) as server:
        for keep_rank in (3, 4):
            first = len(server.requests)
            audit = synthesize(with_synthesis(run, url=server.url, keep_rank=keep_rank))
            assert audit is not None
            assert audit["passages_refused_by_the_server"] == number
            assert audit["server_refusals"] == ["HTTP 403: blocked by the content filter"]
            assert audit["kept"] == 2 * (40 - number)
        again = [r["messages"][-1]["content"] for r in server.requests[first:]]
    asked = [text.partition("Passage:\n")[2] for text in again]
    assert sorted(filter(None, asked)) == sorted(moderated)


@pytest.mark.parametrize(("passages", "answers"), [(3, 0), (3, 2), (40, 0), (40, 20)])
def test_passages_are_not_refused_because_of_a_key_that_stops_working(
    run: RunConfig, passages: int, answers: int
) -> None:
    """The command ends, also before the limit; with a good key it asks for all that is missing."""
    given: list[str] = []

    def write(text: str, request: dict[str, Any]) -> str:
        if len(given) >= answers:
            raise Fault(403, "not allowed")
        given.append(text)
        return good_queries(text, request)

    def settings(url: str) -> RunConfig:
        return with_synthesis(
            run, url=url, model=MODEL, max_passages=passages, concurrency=1, keep_rank=None
        )

    with serving(write) as server:
        with pytest.raises(EnvironmentProblem, match="refuses every request: HTTP 403: not all"):
            synthesize(settings(server.url))
        assert len(server.requests) == min(answers + 8, passages) + 1
    with serving(good_queries) as server:
        audit = synthesize(settings(server.url))
    assert audit is not None
    assert audit["passages_refused_by_the_server"] == 0
    assert len(server.requests) == passages - answers


def test_a_server_that_refuses_to_list_its_models_is_used(run: RunConfig) -> None:
    """As OpenAI does with a key that is restricted to chats."""
    with serving(good_queries, models=None) as server:
        audit = synthesize(with_synthesis(run, url=server.url, model=MODEL))
    assert audit is not None
    assert audit["kept"] == 80


def test_wrong_models_and_addresses(run: RunConfig) -> None:
    with serving(good_queries, ("one", "two")) as server:
        with pytest.raises(ConfigError, match=r"model is empty; name one of .*: one, two"):
            synthesize(with_synthesis(run, url=server.url))
        with pytest.raises(
            ConfigError, match=r"model=three: .* does not serve it; it has one, two"
        ):
            synthesize(with_synthesis(run, url=server.url, model="three"))
    with pytest.raises(EnvironmentProblem, match=r"cannot be reached \(.*refused.*\); start the"):
        synthesize(with_synthesis(run, url=server.url, model="one"))


def test_data_without_passages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cl holds no plain passage"):
        synthesize(make_pairs(tmp_path))


def test_the_report_says_that_the_queries_are_written(run: RunConfig) -> None:
    folder = Path(str(run.data.folder))
    assert read_data(folder)["synthesis"] == {}
    with serving(good_queries) as server:
        synthesize(with_synthesis(run, url=server.url, model=MODEL, queries=1))
    assert read_data(folder)["synthesis"] == {
        "passages": 40,
        "written": 80,
        "kept": 40,
        "model": MODEL,
        "dropped": {"surplus": 40},
    }
