"""Files of other trainers: the same content in every shape gives the same records."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import logging
import math
import random
import re
from collections.abc import Callable
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
from tests.corpora.toy import read_all

Item = tuple[str, str, str, list[tuple[str, str]]]  # query, title and text of the answer, negatives
CONTENT: dict[str, list[Item]] = {
    "English": [
        ("how do whales sleep?", "Whales", "They rest one half of the brain.", [("Bats", "Hang.")]),
        ("what melts ice", "Salt", "It lowers the freezing point.", [("Sand", "It gives grip.")]),
    ],
    "Chinese": [
        ("鲸鱼怎样睡觉?", "鲸", "它们让半个大脑休息。", [("蝙蝠", "它们倒挂着。")]),
        ("什么能融化冰?", "盐", "盐降低水的冰点。", [("沙", "沙子防滑。")]),
    ],
    "Japanese": [
        ("クジラはどう眠るのか", "クジラ", "脳の半分を休ませる。", [("コウモリ", "逆さに眠る。")]),
        ("氷を溶かすものは", "塩", "水の凝固点を下げる。", [("砂", "滑りを防ぐ。")]),
    ],
    "Arabic": [
        (
            "كيف تنام الحيتان؟",
            "الحيتان",
            "ترتاح نصف أدمغتها.",
            [("الخفافيش", "تتدلى رأسا على عقب.")],
        ),
        ("ما الذي يذيب الجليد؟", "الملح", "يخفض درجة التجمد.", [("الرمل", "يمنع الانزلاق.")]),
    ],
    "Thai": [
        ("วาฬนอนหลับอย่างไร", "วาฬ", "พักสมองทีละครึ่ง", [("ค้างคาว", "ห้อยหัวลง")]),
        ("อะไรละลายน้ำแข็ง", "เกลือ", "ลดจุดเยือกแข็งของน้ำ", [("ทราย", "กันลื่น")]),
    ],
}


def joined(title: str, text: str) -> str:
    return f"{title}. {text}"


def wanted(items: list[Item], negatives: bool = True) -> list[Record]:
    return [
        Record(
            f"toy-{n}",
            "toy",
            query,
            [joined(title, text)],
            [joined(*pair) for pair in others] if negatives else [],
        )
        for n, (query, title, text, others) in enumerate(items, 1)
    ]


def documents(passages: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"docid": "7", "title": title, "text": text} for title, text in passages]


Make = Callable[[str, str, str, list[tuple[str, str]]], Any]
# Shape: the row of a peer's file, and whether it holds negatives.
ROWS: dict[str, tuple[str, bool, Make]] = {
    "records": (
        "records",
        True,
        lambda q, t, x, n: {
            "query": q,
            "positives": [joined(t, x)],
            "negatives": [joined(*one) for one in n],
        },
    ),
    "pairs": ("pairs", False, lambda q, t, x, n: {"query": q, "positives": joined(t, x)}),
    "anchor, positive": (
        "triplets",
        False,
        lambda q, t, x, n: {"anchor": q, "positive": joined(t, x)},
    ),
    "anchor, positive, negative": (
        "triplets",
        True,
        lambda q, t, x, n: {"anchor": q, "positive": joined(t, x), "negative": joined(*n[0])},
    ),
    "n-tuple": (
        "triplets",
        True,
        lambda q, t, x, n: {
            "anchor": q,
            "positive": joined(t, x),
            **{f"negative_{k}": joined(*one) for k, one in enumerate(n, 1)},
            "negative_9": None,
        },
    ),
    "query, answer": ("triplets", False, lambda q, t, x, n: {"query": q, "answer": joined(t, x)}),
    "list of texts": (
        "triplets",
        True,
        lambda q, t, x, n: [q, joined(t, x), *(joined(*one) for one in n)],
    ),
    "score": (
        "scored_pairs",
        False,
        lambda q, t, x, n: {"sentence1": q, "sentence2": joined(t, x), "score": 0.9},
    ),
    "label": (
        "scored_pairs",
        False,
        lambda q, t, x, n: {"sentence1": q, "sentence2": joined(t, x), "label": 1},
    ),
    "nli": (
        "nli",
        False,
        lambda q, t, x, n: {"premise": q, "hypothesis": joined(t, x), "label": 0},
    ),
    "set": ("sets", False, lambda q, t, x, n: {"set": [q, joined(t, x)]}),
    "sentences": ("sets", False, lambda q, t, x, n: {"sentences": [q, joined(t, x)]}),
    "FlagEmbedding": (
        "flag_embedding",
        True,
        lambda q, t, x, n: {
            "query": q,
            "pos": [joined(t, x)],
            "neg": [joined(*one) for one in n],
            "pos_scores": [0.9],
            "neg_scores": [0.1],
            "type": "normal",
        },
    ),
    "GritLM": (
        "gritlm",
        True,
        lambda q, t, x, n: {
            "query": ["", q],
            "pos": [["", joined(t, x)]],
            "neg": [["", joined(*one)] for one in n],
        },
    ),
    "Tevatron": (
        "tevatron",
        True,
        lambda q, t, x, n: {
            "query_id": "1",
            "query": q,
            "positive_passages": documents([(t, x)]),
            "negative_passages": documents(n),
        },
    ),
    "NeMo": (
        "nemo",
        True,
        lambda q, t, x, n: {
            "query": q,
            "pos_doc": joined(t, x),
            "neg_doc": [joined(*one) for one in n],
        },
    ),
    "NeMo, question and objects": (
        "nemo",
        True,
        lambda q, t, x, n: {
            "question": q,
            "pos_doc": [{"text": joined(t, x)}],
            "neg_doc": [{"text": joined(*one)} for one in n],
        },
    ),
    "messages": (
        "messages",
        False,
        lambda q, t, x, n: {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": q},
                {"role": "assistant", "content": joined(t, x)},
                {"role": "user", "content": "And why?"},
                {"role": "assistant", "content": "Because."},
            ]
        },
    ),
    "messages of ms-swift": (
        "messages",
        True,
        lambda q, t, x, n: {
            "messages": [{"role": "user", "content": q}],
            "positive_messages": [[{"role": "user", "content": joined(t, x)}]],
            "negative_messages": [[{"role": "user", "content": joined(*one)}] for one in n],
        },
    ),
    "ShareGPT": (
        "conversations",
        False,
        lambda q, t, x, n: {
            "id": "a_0",
            "conversations": [
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": q},
                {"from": "gpt", "value": joined(t, x)},
            ],
        },
    ),
}


def lines(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("language", CONTENT)
def test_the_same_content_gives_the_same_records(tmp_path: Path, name: str, language: str) -> None:
    shape, negatives, make = ROWS[name]
    items = CONTENT[language]
    path = lines(tmp_path / "raw.jsonl", [make(*item) for item in items])
    corpus = find(SourceConfig(path=str(path), name="toy"))
    assert corpus.form.shape == shape
    assert [record for _, record in corpus.read()] == wanted(items, negatives)
    if name != "list of texts":  # in an array, texts are passages without an object
        path.write_text(json.dumps([make(*item) for item in items]))
        assert read(path) == wanted(items, negatives)
        path.write_text(json.dumps({"version": 2, "data": [make(*item) for item in items]}))
        nested = read(path)
        assert [record.id for record in nested] == ["toy-1-1", "toy-1-2"]
        assert [vars(r) | {"id": ""} for r in nested] == [
            vars(r) | {"id": ""} for r in wanted(items, negatives)
        ]
    # Named in the recipe, it is read without a guess.
    lines(path, [make(*item) for item in items])
    assert read(path, shape=shape) == wanted(items, negatives)


@pytest.mark.parametrize("name", [n for n in ROWS if n != "list of texts"])
def test_the_same_from_parquet(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    _, negatives, make = ROWS[name]
    items = CONTENT["English"]
    table = pyarrow.Table.from_pylist([make(*item) for item in items])
    pyarrow.parquet.write_table(table, tmp_path / "raw.parquet")
    assert read(tmp_path / "raw.parquet") == wanted(items, negatives)


def test_objects_of_lists_as_arrow_may_store_them(tmp_path: Path) -> None:
    passages = {"docid": ["1", "2"], "title": ["A", ""], "text": ["a", "b"]}
    turns = {"role": ["user", "assistant"], "content": ["q", "p"]}
    path = lines(tmp_path / "raw.jsonl", [{"query": "q", "positive_passages": passages}])
    assert one(path).positives == ["A. a", "b"]
    lines(path, [{"messages": turns}])
    assert (one(path).query, one(path).positives) == ("q", ["p"])


FLAT = ["pairs", "anchor, positive, negative", "query, answer", "score", "nli"]


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_the_same_from_tables(tmp_path: Path, name: str, language: str) -> None:
    _, negatives, make = ROWS[name]
    items = CONTENT[language]
    rows = [make(*item) for item in items]
    for kind, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
        with (tmp_path / f"raw.{kind}").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        found = read(tmp_path / f"raw.{kind}")
        assert [(r.query, r.positives, r.negatives) for r in found] == [
            (r.query, r.positives, r.negatives) for r in wanted(items, negatives)
        ]


ENCODINGS = [
    ("Chinese", "gb18030"),
    ("Chinese", "big5hkscs"),
    ("Japanese", "shift_jis"),
    ("Japanese", "utf-16"),
    ("Arabic", "cp1256"),
    ("Thai", "cp874"),
    ("Thai", "utf-16-le"),
    ("English", "latin-1"),
    ("Arabic", "utf-8-sig"),
]


@pytest.mark.parametrize(("language", "encoding"), ENCODINGS)
@pytest.mark.parametrize("name", ["FlagEmbedding", "Tevatron", "list of texts"])
def test_encodings(tmp_path: Path, language: str, encoding: str, name: str) -> None:
    _, _, make = ROWS[name]
    items = CONTENT[language]
    if encoding == "big5hkscs":
        items = [("鯨魚怎樣睡覺?", "鯨", "牠們讓半個大腦休息。", [("蝙蝠", "倒掛。")])] * 2
    path = lines(tmp_path / "raw.jsonl", [make(*item) for item in items], encoding)
    assert read(path, encoding=encoding) == wanted(items)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert read(path, encoding=encoding) == wanted(items)


@pytest.mark.parametrize("language", CONTENT)
def test_ms_marco_triples_and_ids(tmp_path: Path, language: str) -> None:
    items = CONTENT[language]
    longer = [(q, t, x + " " + x * 3, n) for q, t, x, n in items]
    table = [(q, joined(t, x), joined(*n[0])) for q, t, x, n in longer]
    triples = tmp_path / "triples.train.small.tsv"
    triples.write_text("".join("\t".join(row) + "\n" for row in table))
    assert read(triples) == wanted(longer)
    assert read(triples, shape="msmarco_triples") == wanted(longer)
    short = [(q, joined(t, x), joined(*n[0])) for q, t, x, n in items]
    triples.write_text("".join("\t".join(row) + "\n" for row in short))
    assert read(triples, shape="msmarco_triples") == wanted(items)

    folder = tmp_path / "passages"
    folder.mkdir()
    texts = [text for row in table for text in row[1:]]
    (folder / "collection.tsv").write_text("".join(f"{n}\t{t}\n" for n, t in enumerate(texts)))
    for split, numbers in (("dev.small", [1]), ("train", [0])):
        asked = "".join(f"{n}\t{table[n][0]}\n" for n in numbers)
        (folder / f"queries.{split}.tsv").write_text(asked)
        judged = "".join(f"{n}\t0\t{2 * n}\t1\n{n}\t0\t{2 * n + 1}\t0\n" for n in numbers)
        (folder / f"qrels.{split}.tsv").write_text(judged)
    (folder / "queries.dev.tsv").write_text(f"1\t{table[1][0]}\n")  # repeats those of dev.small
    (folder / "queries.eval.tsv").write_text("9\tnot judged\n")
    found = read(folder)
    assert [(r.id, r.query, r.positives, r.negatives) for r in found] == [
        (str(n), table[n][0], [table[n][1]], [table[n][2]]) for n in (1, 0)
    ]
    assert [r.id for r in read(folder, split="train")] == ["0"]
    with pytest.raises(DataError, match=r"passages: holds no qrels\.eval\.tsv; correct `split:`"):
        read(folder, split="eval")
    (folder / "queries.train.tsv").rename(folder / "queries.tsv")
    with pytest.raises(DataError, match=r"passages: holds no queries\.train\.tsv; correct"):
        read(folder, split="train")
    (folder / "queries.tsv").rename(folder / "queries.train.tsv")
    (folder / "qrels.train.tsv").write_text("0\t0\t99\t1\n")
    (fault,) = [r for r in read(folder, split="train") if isinstance(r, DataError)]
    assert str(fault).endswith(
        "qrels.train.tsv:1: names document '99', which is not in collection.tsv"
    )


def test_beir_gives_the_same(tmp_path: Path) -> None:
    items = CONTENT["Thai"]
    passages = [pair for _, t, x, n in items for pair in ((t, x), n[0])]
    docs = [{"_id": str(n), "title": t, "text": x} for n, (t, x) in enumerate(passages)]
    lines(tmp_path / "corpus.jsonl", docs)
    lines(
        tmp_path / "queries.jsonl", [{"_id": str(n), "text": q} for n, (q, *_) in enumerate(items)]
    )
    (tmp_path / "qrels").mkdir()
    judged = "".join(f"{n}\t{2 * n}\t1\n{n}\t{2 * n + 1}\t0\n" for n in range(2))
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    assert [(r.query, r.positives, r.negatives) for r in read(tmp_path)] == [
        (r.query, r.positives, r.negatives) for r in wanted(items)
    ]


BY_ID: dict[str, Callable[[str], dict[str, Any]]] = {
    "tevatron_ids": lambda q: {
        "query_id": "q1",
        "query_text": q,
        "positive_document_ids": ["d0"],
        "negative_document_ids": ["d1"],
        "query_image": None,
    },
    "nemo": lambda q: {
        "question_id": "q1",
        "question": q,
        "corpus_id": "docs",
        "pos_doc": [{"id": "d0"}],
        "neg_doc": [{"id": "d1"}],
    },
    "pairs": lambda q: {"query": q, "positives": "d0", "negatives": "d1"},
}


@pytest.mark.parametrize("shape", BY_ID)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_by_id(tmp_path: Path, shape: str, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    items = CONTENT["Japanese"][:1]
    ((query, title, text, others),) = items
    path = lines(tmp_path / "train.jsonl", [BY_ID[shape](query)])
    docs = [
        {"docid": f"d{n}", "title": t, "text": x}
        for n, (t, x) in enumerate([(title, text), *others, ("", " ")])
    ]
    store = tmp_path / f"corpus.{kind}"
    if kind == "jsonl":
        lines(store, docs)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(docs), store)
    assert read(path, documents=str(store)) == wanted(items)
    if kind == "jsonl":
        lines(store, docs[1:])
        assert str(one(path, documents=str(store))) == (
            f"{path}:1: names document 'd0', not in {store}"
        )
        lines(store, [*docs, docs[0]])
        with pytest.raises(DataError, match=r"corpus\.jsonl:4: its document id is taken"):
            read(path, documents=str(store))
        lines(store, [{"name": "d0", "text": "x"}])
        with pytest.raises(DataError, match=r"corpus\.jsonl:1: a document needs docid or doc_id"):
            read(path, documents=str(store))
    if shape != "pairs":  # whose ids cannot be told from texts
        cure = "name the file of the documents in data.sources.documents"
        with pytest.raises(DataError, match=rf"train\.jsonl:1: column .*; {cure}"):
            read(path)


def test_other_documents_are_other_data(tmp_path: Path) -> None:
    rows = [{"query": f"ask {n}", "positives": f"d{n}"} for n in range(30)]
    path = lines(tmp_path / "train.jsonl", rows)
    source = {"path": str(path), "documents": str(tmp_path / "docs.jsonl")}
    data = DataConfig.model_validate({"folder": tmp_path / "data", "sources": [source]})
    seen = []
    for word in ("one", "one", "two"):
        lines(tmp_path / "docs.jsonl", [{"id": f"d{n}", "text": f"{word} {n}"} for n in range(30)])
        seen.append(prepare(data, 0)["reused"])
        texts = {
            p for split in read_all(data.local_folder).values() for r in split for p in r.positives
        }
        assert texts <= {f"{word} {n}" for n in range(30)}
        assert texts
    assert seen == [False, True, False]


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
    assert told(path).endswith("to name another; pos_scores, neg_scores not used")
    path.write_text(json.dumps({"data": [{"anchor": "a", "positive": "b"}], "by": "x"}))
    assert "(anchor, positive) in each 'data'; use" in told(path)
    assert told(path, shape="triplets") == ""
    lines(path, [{"anchor": "a", "positive": "b", "negative": "c", "score": 0.3}])
    assert told(path, shape="triplets") == "corpus.jsonl: score not used"


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


def test_passages_with_titles(tmp_path: Path) -> None:
    """As the documents of a BEIR folder are read, so that both are one text to the leak proof."""
    rows = [{"_id": "1", "title": "T", "text": "x"}, {"_id": "2", "title": "", "text": "y"}]
    path = lines(tmp_path / "corpus.jsonl", rows)
    assert [record.text for record in read(path)] == ["T. x", "y"]
    assert [record.text for record in read(path, columns={"text": "text"})] == ["x", "y"]


def test_a_whole_nemo_file_with_its_corpus(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    items = CONTENT["Thai"]
    docs, rows = [], []
    for query, title, text, others in items:
        number = len(docs)
        docs += [{"id": f"d{number}", "text": joined(title, text)}]
        docs += [{"id": f"d{number + 1}", "text": joined(*others[0])}]
        rows.append(
            {
                "question_id": f"q{number}",
                "question": query,
                "corpus_id": "docs",
                "pos_doc": [{"id": f"d{number}"}],
                "neg_doc": [{"id": f"d{number + 1}"}],
            }
        )
    folder = tmp_path / "docs"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(docs), folder / "train.parquet")
    (folder / "merlin_metadata.json").write_text('{"corpus_id": "docs", "class": "TextQADataset"}')
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"corpus": [{"path": str(folder)}], "data": rows}, indent=1))
    found = read(path, documents=str(folder))
    assert [(r.query, r.positives, r.negatives) for r in found] == [
        (r.query, r.positives, r.negatives) for r in wanted(items)
    ]
    assert "read as NeMo (question, pos_doc, neg_doc) in each 'data'" in told(path)


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


def test_scores_of_another_scale_stop_the_run(tmp_path: Path) -> None:
    """Also with `skip`: 0.9 of 5 would be a pair otherwise."""
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n / 10} for n in range(51)]
    path = lines(tmp_path / "raw.jsonl", rows)
    data = {"folder": tmp_path / "data", "sources": [{"path": str(path)}], "on_error": "skip"}
    message = r"raw\.jsonl:12: score is 1\.1, but .*data\.sources\.min_score, or .*shape: triplets"
    with pytest.raises(DataError, match=message):
        prepare(DataConfig.model_validate(data), 0)
    lines(path, [{"sentence1": "a", "sentence2": "b", "score": "high"}])
    assert str(one(path)) == f"{path}:1: score must be a number, not 'high'"


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
        columns += rng.sample(["neg", "negative_1", "prompt", "positive_messages", "text"], 2)
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
