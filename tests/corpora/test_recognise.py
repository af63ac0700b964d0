"""What the rows of a source are recognised as, what is refused, and the rules of each shape."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig, SourceConfig
from lbr_ds.config.sources import SHAPE_NAMES
from lbr_ds.corpora.formats.interface import Skipped
from lbr_ds.corpora.formats.peers import PEERS
from lbr_ds.corpora.formats.shapes import SHAPES
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.sources import find
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from tests.corpora.test_formats import one, read
from tests.corpora.test_shapes import lines


def told(path: Path, **fields: Any) -> str:
    source = SourceConfig.model_validate({"path": str(path), **fields})
    return find(source, "data.sources.3").form.told


def test_what_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line for each source, with the key that changes it."""
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "prompt": "I: ", "type": "x"} for n in range(30)]
    path = lines(tmp_path / "corpus.jsonl", rows)
    line = "corpus.jsonl: read as FlagEmbedding (query, pos, prompt); use {} to name another"
    assert told(path) == line.format("data.sources.3.shape")
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}]}
    with caplog.at_level(logging.INFO, "lbr_ds"):
        prepare(DataConfig.model_validate(data), 0)
    assert [r.message for r in caplog.records if "read as" in r.message] == [
        line.format("data.sources.0.shape")
    ]
    lines(path, [{"query": "q", "pos": ["p"], "pos_scores": [1.0], "neg": [], "neg_scores": []}])
    assert "(query, pos, pos_scores, neg, neg_scores); use" in told(path)
    path.write_text(json.dumps({"data": [{"anchor": "a", "positive": "b"}], "by": "x"}))
    assert "(anchor, positive) in each 'data'; use" in told(path)
    assert told(path, shape="triplets") == ""
    lines(path, [{"anchor": "a", "positive": "b", "negative": "c", "score": 0.3}])
    assert "(anchor, positive, negative, score); use" in told(path)


UNKNOWN: list[Any] = [
    {"frage": "a", "antwort": "b"},
    {"question": "a", "options": ["x", "y"], "answer": "A"},
    {"a": [{"frage": "b"}], "c": 1},
    {"text": ["a", "b"]},
]


@pytest.mark.parametrize("row", UNKNOWN, ids=str)
@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_an_unknown_form_is_refused(tmp_path: Path, row: Any, on_error: str) -> None:
    path = lines(tmp_path / "raw.jsonl", [row, row])
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}], "on_error": on_error}
    with pytest.raises(DataError) as raised:
        prepare(DataConfig.model_validate(data), 0)
    assert str(raised.value).startswith(
        f"{path}:1: the columns {', '.join(row)} have no known shape; name the shape in "
        "data.sources.0.shape, or the columns of query and positives (or of text) in "
        "data.sources.0.columns"
    )
    assert not (tmp_path / "data").exists()


def test_a_wrong_guess_is_one_key_away(tmp_path: Path) -> None:
    path = lines(tmp_path / "raw.jsonl", [{"query": "q", "answer": "a", "text": "t", "score": 0.1}])
    assert isinstance(one(path), Skipped)  # a score decides
    assert one(path, shape="triplets").positives == ["a"]
    assert one(path, shape="passages").text == "t"
    assert one(path, columns={"query": "text", "positives": "answer"}).query == "t"
    assert one(path, columns={"text": "query"}).text == "q"
    assert one(path, columns={"title": "text", "body": "query"}).positives == ["q"]
    named = one(path, columns={"group": "text"}, shape="triplets")
    assert (named.group, named.positives) == ("t", ["a"])
    other = one(path, shape="triplets", columns={"query": "text", "positives": ["query", "answer"]})
    assert (other.query, other.positives) == ("t", ["q", "a"])


def test_the_most_frequent_shape_counts(tmp_path: Path) -> None:
    good = {"anchor": "a", "positive": "b"}
    path = lines(tmp_path / "raw.jsonl", [good, {"text": "t"}, {"odd": 1}, good])
    first, *odd, last = read(path)
    assert (first.query, last.query) == ("a", "a")
    assert [str(row) for row in odd] == [
        f"{path}:2: no column 'anchor'; it has text",
        f"{path}:3: no column 'anchor'; it has odd",
    ]


def test_valid_rows_that_where_keeps_are_looked_at(tmp_path: Path) -> None:
    other = [{"text": f"t{n}", "kind": "note"} for n in range(60)]
    path = lines(tmp_path / "raw.jsonl", [*other, {"anchor": "a", "positive": "b", "kind": "pair"}])
    path.write_text("{\n" * 60 + path.read_text())
    *others, last = read(path, where={"kind": "pair"})
    assert (last.query, last.positives) == ("a", ["b"])
    assert {getattr(row, "rule", "bad") for row in others} == {"bad", "not_where"}
    assert read(path)[60].text == "t0"


def test_an_array_of_arrays(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps([["a", "b"], ["c", "d", "e", "f"], ["alone"]], indent=1))
    first, second, bad = read(path)
    assert (first.query, first.positives, first.negatives) == ("a", ["b"], [])
    assert (second.query, second.positives, second.negatives) == ("c", ["d"], ["e", "f"])
    assert str(bad) == f"{path}:12: item 3: a record must be a JSON object, not list"


SCORES: list[tuple[Any, float | None, bool]] = [
    (1, None, True),
    (0, None, False),
    ("1", None, True),
    ("0.79", None, False),
    (0.8, None, True),
    (-0.2, None, False),
    (4.5, 4, True),
    (3.9, 4, False),
    (0.5, 0.5, True),
]


@pytest.mark.parametrize(("score", "least", "kept"), SCORES)
def test_scores(tmp_path: Path, score: Any, least: float | None, kept: bool) -> None:
    path = lines(tmp_path / "raw.jsonl", [{"sentence1": "a", "sentence2": "b", "score": score}])
    found = one(path, min_score=least)
    assert isinstance(found, Record) is kept
    if not kept:
        assert found.rule == "below_min_score"
        assert found.example.startswith(f"{path}:1: score is ")


def test_a_label_may_be_a_subject(tmp_path: Path) -> None:
    path = lines(tmp_path / "raw.jsonl", [{"question": "a", "answer": "b", "label": "anatomy"}])
    assert one(path).positives == ["b"]
    assert told(path).endswith("to name another; label not used")


def test_scores_of_another_scale_stop_the_run(tmp_path: Path) -> None:
    """Also with `skip`: 0.9 of 5 would be a pair otherwise."""
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n / 10} for n in range(51)]
    path = lines(tmp_path / "raw.jsonl", rows)
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}], "on_error": "skip"}
    message = r"raw\.jsonl:12: score is 1\.1, but .*data\.sources\.min_score, or .*shape: triplets"
    with pytest.raises(DataError, match=message):
        prepare(DataConfig.model_validate(data), 0)
    lines(path, [{"sentence1": "a", "sentence2": "b", "score": "high"}])
    assert str(one(path, shape="scored_pairs")) == f"{path}:1: score must be a number, not 'high'"


@pytest.mark.parametrize("label", [0, "0", "entailment", "Entailment"])
def test_entailed_pairs(tmp_path: Path, label: Any) -> None:
    rows = [{"premise": "a", "hypothesis": f"b{n}", "label": n} for n in (label, 1, "neutral", -1)]
    first, *others, odd = read(
        lines(tmp_path / "raw.jsonl", [*rows, {**rows[0], "label": "maybe"}])
    )
    assert (first.query, first.positives) == ("a", [f"b{label}"])
    assert [r.rule for r in others] == ["not_entailed"] * 3
    assert "label 'maybe' is none of entailment (0), neutral (1)" in str(odd)


def test_instructions_of_peers(tmp_path: Path) -> None:
    flag = {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "Find: "}
    path = lines(tmp_path / "raw.jsonl", [flag, {**flag, "prompt": ""}, {**flag, "prompt": None}])
    assert [r.instruction for r in read(path)] == ["Find: ", "", ""]
    assert [r.instruction for r in read(path, instruction="Own: ")] == ["Find: ", "Own: ", "Own: "]
    grit = {"query": ["Ask", "q"], "pos": [["Tell", "p"]], "neg": [["Tell", "n"]]}
    lines(path, [grit, {**grit, "neg": [["Other", "n"]]}, {**grit, "pos": [["x"]]}])
    good, differs, short = read(path)
    assert good == Record("toy-1", "toy", "q", ["p"], ["n"], "", "Ask\n", "Tell\n")
    assert str(differs) == (
        f"{path}:2: its passages have different instructions ['Other', 'Tell']; a record has one "
        "for all of them"
    )
    assert str(short) == f"{path}:3: positives must be [instruction, text], not ['x']"


def test_chats(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": "text", "text": "this"}]
    rows = [
        [("user", parts), ("assistant", "A")],
        [("human", "again?"), ("human", "really?"), ("gpt", "B"), ("human", "c"), ("gpt", "C")],
        [("system", "s"), ("assistant", "alone")],
    ]
    path = lines(
        tmp_path / "raw.jsonl",
        [{"conversations": [{"from": who, "value": said} for who, said in row]} for row in rows],
    )
    first, second, bad = read(path)
    assert (first.query, first.positives) == ("see\nthis", ["A"])
    assert (second.query, second.positives) == ("really?", ["B"])
    assert str(bad) == (
        f"{path}:3: no user turn with an answer in column 'conversations'; its turns: system, "
        "assistant"
    )


BAD: dict[str, tuple[Any, str]] = {
    "no positives": ({"query": "q", "pos": []}, "positives is empty"),
    "no query": ({"query": " ", "pos": ["p"]}, "query is missing or empty"),
    "missing column": ({"query": "q"}, "no column 'pos'; it has query"),
    "object without text": (
        {"query": "q", "pos": [{"title": "t"}]},
        "column 'pos' holds {'title': 't'}, not text; name a part of it, as pos.title",
    ),
    "list inside": ({"query": "q", "pos": "p", "neg": [{"text": ["a", {"b": 1}]}]}, "not text"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = [{"query": f"q{n}", "pos": [f"p{n}"]} for n in range(3)]
    path = lines(tmp_path / "raw.jsonl", [*good, row])
    *records, bad = read(path)
    assert [r.query for r in records] == ["q0", "q1", "q2"]
    assert str(bad).startswith(f"{path}:4: ")
    assert message in str(bad)


def odd(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can hold."""
    kind = rng.randrange(4) if depth < 4 else 0
    if kind == 0:
        return rng.choice(["a", "", " ", "user", "assistant", 0, 1, 2.5, math.nan, None, True])
    if kind == 1:
        names = ["text", "title", "role", "content", "from", "value", "id"]
        return {rng.choice(names): odd(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]


@pytest.mark.parametrize("shape", ["", *PEERS])
@pytest.mark.parametrize("by_id", [False, True])
def test_odd_values_are_errors_of_rows(tmp_path: Path, shape: str, by_id: bool) -> None:
    """Whatever the columns hold, it is a record, a reason to skip or a DataError."""
    rng = random.Random(shape)
    docs = str(lines(tmp_path / "docs.jsonl", [{"id": "a", "text": "x"}])) if by_id else ""
    path = tmp_path / "raw.jsonl"
    for _ in range(15):
        peer = PEERS[shape or rng.choice(list(PEERS))]
        columns = [rng.choice(names) for names in (peer.query, peer.positives, peer.score) if names]
        others = [
            "neg",
            "negative_1",
            "prompt",
            "positive_messages",
            "text",
            "pos_scores",
            "scores",
        ]
        columns += rng.sample(others, 2)
        lines(path, [{name: odd(rng) for name in columns} for _ in range(4)])
        with contextlib.suppress(DataError):
            for row in read(path, shape=shape, documents=docs):
                assert isinstance(row, Record | Skipped | DataError)


def test_the_recipe_names_every_shape() -> None:
    assert set(SHAPE_NAMES) == SHAPES.keys()


README = Path(find.__code__.co_filename).parent / "formats" / "README.md"
EXAMPLES = re.findall(r"^\| `(\w+)` \|.*?\| `([\[{][^`]*[\]}])` \|", README.read_text(), re.M)


def test_every_peer_has_an_example() -> None:
    assert PEERS.keys() - {"msmarco_triples"} <= {shape for shape, _ in EXAMPLES}


@pytest.mark.parametrize(("shape", "example"), EXAMPLES)
def test_the_examples_of_the_readme(tmp_path: Path, shape: str, example: str) -> None:
    path = lines(tmp_path / "raw.jsonl", [json.loads(example), json.loads(example)])
    if shape in ("choices", "titled"):
        source = SourceConfig(path=str(path), shape=shape)
    else:
        source = SourceConfig(path=str(path))
        assert find(source).form.shape == shape
    if shape == "tevatron_ids":
        docs = lines(
            tmp_path / "docs.jsonl", [{"docid": n, "text": f"text {n}"} for n in ("d1", "d2")]
        )
        source = source.model_copy(update={"documents": str(docs)})
    assert all(isinstance(record, Record) for _, record in find(source).read())
