"""Files of other trainers: the same content in every shape gives the same records."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig, SourceConfig
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


_TEXT = {"title": "A", "text": "x"}
# The scores of the positives and of the negatives that a row has.
SCORED: dict[str, tuple[dict[str, Any], dict[str, Any], list[float], list[float]]] = {
    "records": (
        {"query": "q", "positives": ["p"], "negatives": ["n", "m"]},
        {"positive_scores": [2], "negative_scores": [1, 0.5]},
        [2],
        [1, 0.5],
    ),
    "FlagEmbedding": (
        {"query": "q", "pos": ["p", "r"], "neg": ["n", "", "m"]},
        {"pos_scores": [0.9, 0.8], "neg_scores": [0.1, 7, 0.2]},
        [0.9, 0.8],
        [0.1, 0.2],
    ),
    "NeMo": (
        {"query": "q", "pos_doc": "p", "neg_doc": ["n"]},
        {"pos_doc_score": 3.5, "neg_doc_scores": [-1]},
        [3.5],
        [-1],
    ),
    "Tevatron": (
        {
            "query": "q",
            "positive_passages": [{**_TEXT, "score": 4}],
            "negative_passages": [{**_TEXT, "score": 0.5}, {"text": "", "score": 9}],
        },
        {},
        [4],
        [0.5],
    ),
    "Tevatron, some without": (
        {
            "query": "q",
            "positive_passages": [{**_TEXT, "score": 4}],
            "negative_passages": [{**_TEXT, "score": 0.5}, _TEXT],
        },
        {},
        [4],
        [],
    ),
    "margin": ({"query": "q", "positive": "p", "negative": "n"}, {"score": 1.5}, [0], [-1.5]),
    "margins": (
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"label": [1, 2.5]},
        [0],
        [-1, -2.5],
    ),
    "list": (
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"scores": [3, 1, 2.5]},
        [3],
        [1, 2.5],
    ),
    "of other things": (
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"label": 3},
        [],
        [],
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_a_teacher(tmp_path: Path, name: str) -> None:
    plain, scores, positive, negative = SCORED[name]
    path = lines(tmp_path / "raw.jsonl", [{**plain, **scores}])
    found = one(path)
    assert (found.positive_scores, found.negative_scores) == (positive, negative)
    bare = replace(found, positive_scores=[], negative_scores=[])
    if scores:
        assert bare == one(lines(tmp_path / "raw.jsonl", [plain]))


def test_columns_name_scores(tmp_path: Path) -> None:
    row = {"ask": "q", "yes": "p", "no": ["n", "m"], "teacher": {"yes": "0.75", "no": [0.5, -1]}}
    columns = {
        "query": "ask",
        "positives": "yes",
        "negatives": "no",
        "positive_scores": "teacher.yes",
        "negative_scores": "teacher.no",
    }
    path = lines(tmp_path / "raw.jsonl", [row])
    found = one(path, columns=columns)
    assert (found.positive_scores, found.negative_scores) == ([0.75], [0.5, -1])
    columns["negative_scores"] = "teacher.no.0"
    assert str(one(path, columns=columns)) == (
        f"{path}:1: negative_scores must have one finite number for each of negatives: "
        "it has 1 for 2: [0.5]"
    )
    columns["negative_scores"] = "no"
    assert str(one(path, columns=columns)) == f"{path}:1: no must be numbers, not ['n', 'm']"


def test_scores_of_documents_by_id(tmp_path: Path) -> None:
    docs = lines(
        tmp_path / "docs.jsonl", [{"id": n, "text": n * 2 if n != "c" else ""} for n in "abc"]
    )
    row = {"query": "q", "pos_doc": [{"id": "a"}], "neg_doc": [{"id": "c"}, {"id": "b"}]}
    row |= {"pos_doc_scores": [2], "neg_doc_scores": [9, 1]}
    found = one(lines(tmp_path / "raw.jsonl", [row]), documents=str(docs))
    assert (found.negatives, found.positive_scores, found.negative_scores) == (["bb"], [2], [1])


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
            f"{path}:1: names document 'd0', which is not in {store}"
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
    told = find(SourceConfig(path=str(path))).form.told
    assert "read as NeMo (question, pos_doc, neg_doc) in each 'data'" in told
