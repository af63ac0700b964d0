"""Run folders -> the three files: what is in them, and what a broken or partial run does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lbr_ds.errors import ConfigError, DataError
from lbr_ds.report import write_report
from tests.shards.server import serve

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps headings, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())


def test_all_sections(run: Path, tmp_path: Path) -> None:
    report = write_report([run], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    source = (tmp_path / "out" / "report.html").read_text()
    page = Page(source)
    for heading in (
        "Retrieval",
        "Beside the paper",
        "Held-out queries",
        "Training",
        "Stage 1",
        "Stage 2",
        "Data",
        "Recipe",
        "Environment",
        "Repeat this run",
    ):
        assert heading in page.headings
    assert source.count("<svg") == 6 + 5 + 6  # the effective rank was never a number
    assert "started from stage1/checkpoints/step-000045" in source
    assert report["runs"][0]["stages"]["1"]["evaluations"][1]["step"] == 90
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Started from | \u2013 | stage1/checkpoints/step-000045 |" in text
    assert "| After stage 2 (GR-CL) | 0.650 | 0.550 | 0.550 | +0.450 |" in text
    assert f"lbr-ds train {run}/recipe.yaml --stage 1 --nproc 2" in text
    # The checkpoint that was scored, not the last; without its name the last.
    assert f"lbr-ds eval {run}/stage2/checkpoints/step-000020 --data" in text
    assert f"lbr-ds eval {run}/stage1/checkpoints/step-000090 --data" in text


def test_one_file_that_fetches_and_runs_nothing(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path)
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    links = [v for k, v in page.attributes if k in ("href", "xlink:href", "src")]
    assert all(value and value.startswith("#") for value in links)


def test_drawings_take_their_colours_from_the_page(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path)
    source = (tmp_path / "report.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert "var(--series-1)" in drawings
    assert "var(--series-2)" in drawings
    assert not re.search(r"(fill|stroke): #[0-9a-f]{6}", drawings)
    ids = re.findall(r'id="([^"]+)"', drawings)
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', drawings))
    assert referenced <= set(ids)


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "a")
    write_report([run], tmp_path / "b")
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_texts_are_escaped(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path)
    assert "what is &lt;thing&gt; 1 &amp; co?" in (tmp_path / "report.html").read_text()
    assert "the \\| answer 1" in (tmp_path / "report.md").read_text()


def test_values_that_are_no_numbers(run: Path, tmp_path: Path) -> None:
    report = write_report([run], tmp_path)
    assert any("loss is not a finite number" in note for note in report["runs"][0]["notes"])
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_numbers(run: Path, tmp_path: Path) -> None:
    (made,) = write_report([run], tmp_path)["runs"]
    first = made["stages"]["1"]
    assert first["steps"] == 90
    assert (first["world_size"], first["zero_stage"]) == (2, 3)
    assert first["seconds"] == pytest.approx(180)
    assert first["data_wait_share"] == pytest.approx(0.05)
    assert first["tokens_per_second"] == pytest.approx(1045.5)
    (table,) = made["retrieval"]
    assert [row["gain"] for row in table["rows"]] == [None, *map(pytest.approx, (0.2, 0.45))]
    assert table["pairs"]["better"] == 12
    assert table["pairs"]["low"] == pytest.approx(0.45) == table["pairs"]["high"]
    assert [list(e["found"]) for e in made["examples"]] == [["base", "stage2"]] * 2


def test_a_resumed_run_counts_a_step_once(run: Path, tmp_path: Path) -> None:
    path = run / "stage2" / "metrics.jsonl"
    again = json.dumps({"step": 29, "loss": 1.0, "step_seconds": 2.0}) + "\n"
    path.write_text(path.read_text() + again)
    assert write_report([run], tmp_path)["runs"][0]["stages"]["2"]["seconds"] == pytest.approx(60)


@pytest.mark.parametrize("missing", ["eval", "environment.json", "recipe.yaml", "stage2", "stage1"])
def test_a_part_that_is_missing_is_left_out(run: Path, tmp_path: Path, missing: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = write_report([run], tmp_path / "out")
    Page((tmp_path / "out" / "report.html").read_text())
    assert report["runs"][0]["notes"]
    assert ("Retrieval" in (tmp_path / "out" / "report.html").read_text()) == (missing != "eval")


def test_data_behind_a_url(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = write_report([run], tmp_path / "near")["runs"][0]["data"]
    recipe = (run / "recipe.yaml").read_text()
    monkeypatch.setattr("lbr_ds.system.download.RETRY_WAITS", ())
    with serve(tmp_path / "data") as server:
        (run / "recipe.yaml").write_text(recipe.replace(str(tmp_path / "data"), server.url))
        far = write_report([run], tmp_path / "far")["runs"][0]
        assert far["data"] == {**near, "folder": server.url}
        assert server.asked == ["/data/manifest.json", "/data/curation.json"]
    gone = write_report([run], tmp_path / "gone")["runs"][0]
    assert gone["data"] == {}
    assert any("is not here, so its counts" in note for note in gone["notes"])


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n\n')
    write_report([tmp_path / "run"], tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "Stage 1" in page.headings
    assert "Retrieval" not in page.headings


def test_scores_without_a_base_or_of_another_kind(run: Path, tmp_path: Path) -> None:
    (run / "eval" / "base.json").unlink()
    path = run / "eval" / "stage2.json"
    result = json.loads(path.read_text())
    result["tasks"]["Other"] = {
        "main_score": 0.5,
        "metric": "accuracy",
        "queries": None,
        "documents": None,
    }
    path.write_text(json.dumps(result))
    tables = write_report([run], tmp_path)["runs"][0]["retrieval"]
    assert [table["task"] for table in tables] == ["made-up-eval", "Other"]
    assert all(table["pairs"] is None for table in tables)
    assert "accuracy" in (tmp_path / "report.html").read_text()


def test_written_queries_are_named(run: Path, tmp_path: Path) -> None:
    sources = [{"name": "synthetic queries", "format": "synthesize"}]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"sources": sources}))
    audit = {
        "passages": 6541,
        "queries_written": 12345,
        "kept": 9000,
        "settings": {"model": "a <writer>"},
        "dropped": {"near_evaluation": 45, "surplus": 0, "not_retrieved": 3300},
    }
    (tmp_path / "data" / "synthesis.json").write_text(json.dumps(audit))
    write_report([run], tmp_path / "out")
    assert (
        "(a &lt;writer&gt;) wrote for 6,541 passages of cl: 9,000 of 12,345 were kept. Dropped: "
        "45 near evaluation, 3,300 not retrieved."
    ) in (tmp_path / "out" / "report.html").read_text()


def test_the_knowledge_split_is_named(run: Path, tmp_path: Path) -> None:
    for path in (run / "eval").glob("*.json"):
        result = json.loads(path.read_text())
        result["protocol"] = "knowledge split"
        for part in ("tasks", "per_query"):
            result[part]["made-up-control"] = result[part]["made-up-eval"]
        path.write_text(json.dumps(result))
    curation = tmp_path / "data" / "curation.json"
    counts = {**json.loads(curation.read_text()), "protocol": "knowledge"}
    counts["splits"]["control"] = {"records": 5}
    curation.write_text(json.dumps(counts))
    (made,) = write_report([run], tmp_path)["runs"]
    assert [table["about"] for table in made["retrieval"]] == [
        "Knowledge split, known from stage 1 only.",
        "Knowledge split, control: in no training split.",
    ]
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "Knowledge split, control: in no training split." in text
        assert "control: in no training split" in text
    assert "<h3>made-up-control</h3>" in (tmp_path / "report.html").read_text()
    assert made["data"]["protocol"] == "knowledge split"


def test_rows_of_different_data_are_flagged(run: Path, tmp_path: Path) -> None:
    assert "Not comparable" not in _html_of(run, tmp_path)
    path = run / "eval" / "base.json"
    path.write_text(path.read_text().replace('"queries": 12', '"queries": 11'))
    assert "Not comparable" in _html_of(run, tmp_path)


def _html_of(run: Path, folder: Path) -> str:
    write_report([run], folder)
    return (folder / "report.html").read_text()


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    report = write_report([run, other] * 4, tmp_path)
    assert len(report["runs"]) == 8
    source = (tmp_path / "report.html").read_text()
    Page(source)
    assert source.count("<svg") == 17
    assert "Curves of the first 6 runs" in source


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "3"}', "\u00ff"])
def test_a_corrupt_line_is_named(run: Path, tmp_path: Path, line: str) -> None:
    path = run / "stage1" / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"stage1/metrics\.jsonl:2: .*remove the line"):
        write_report([run], tmp_path)


FOREIGN = {
    '{"scores": 1}': "missing key tasks",
    '{"tasks": []}': "tasks: Input should be",
    '{"tasks": {"x": {"recall_at_10": "high"}}}': r"tasks\.x\.recall_at_10",
    '{"tasks": {}, "per_query": {"x": {"q": null}}}': r"per_query\.x\.q",
    '{"tasks": {}, "examples": [{"id": "x"}]}': r"missing key examples\.0\.query",
}


def test_other_faults_are_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path)
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report([tmp_path / "nowhere"], tmp_path)
    for text, words in FOREIGN.items():
        (run / "eval" / "base.json").write_text(text)
        with pytest.raises(DataError, match=rf"base\.json: not a result of .*{words}.*remove it"):
            write_report([run], tmp_path)
    (run / "eval" / "base.json").write_text("{")
    with pytest.raises(DataError, match=r"base\.json: not readable as JSON \(.*remove it"):
        write_report([run], tmp_path)


def test_a_login_node_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lbr_ds.report import write_report\n"
        f"write_report([Path({str(run)!r})], Path({str(tmp_path)!r}))\n"
        "heavy = {'torch', 'mteb', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
