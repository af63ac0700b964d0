"""Which folders a table needs, which of them it shares, and what is made of their scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.config import load
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.reproduce import list_jobs, reproduce
from lbr_ds.reproduce.jobs import Job, RecipeSource, jobs_of, link, sorted_jobs
from lbr_ds.reproduce.results import _ranks, separation_predicts
from lbr_ds.reproduce.tables import TABLES, Variant
from tests.tiny import seal, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with prepared data; nothing is trained in this file."""
    return tiny_recipe(tmp_path_factory.mktemp("jobs"), count=120)


def plan(recipe: Path, name: str = "table3", seeds: tuple[int, ...] = (0,), *more: str) -> Any:
    """The rows' jobs, and all jobs in order."""
    source = RecipeSource(str(recipe), more, recipe.parent / "root")
    table = TABLES[name](load(recipe, list(more)))
    rows = {(v.name, s): jobs_of(v, s, source) for v in table.variants for s in seeds}
    return rows, sorted_jobs(list(rows.values()))


def test_table_3_shares_its_stage_1_runs(recipe: Path) -> None:
    rows, jobs = plan(recipe)
    assert [job.phase for job in jobs] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    own = {name: row[-1] for (name, _), row in rows.items()}
    assert len({job.folder for job in own.values()}) == 10
    for first, second in (("LLM+GL", "LLM+GL+CL"), ("LLM+IB-GL", "LLM+IB-GL+CL")):
        assert ("stage1", own[first].folder / "stage1") in own[second].links
    assert [name for name, _ in own["LLM+CL"].links] == ["backbone"]
    assert own["LLM+CL"].run.stage2.start_from == "backbone"
    # Where the row of stage 1 alone is scored; a user's word prevails.
    assert own["LLM+IB-GL+CL"].run.stage2.start_from == "last"
    own = plan(recipe, "table3", (0,), "stage2.from=best")[0]
    assert own["LLM+IB-GL+CL", 0][-1].run.stage2.start_from == "best"
    assert own["LLM+CL", 0][-1].run.stage2.start_from == "backbone"
    _, both = plan(recipe, "table3", (0, 1))
    assert len(both) == 22
    # Table 2 needs nothing more, table 4 two other readings of what table 3 has.
    names = {job.folder for job in jobs}
    assert {job.folder for job in plan(recipe, "table2")[1]} <= names
    more = {job.folder for job in plan(recipe, "table4")[1]} - names
    assert sorted(f.name.split("-")[0] for f in more) == ["backbone"] * 2 + ["stage2"] * 2


def test_a_backbone_is_scored_if_a_row_shows_it(recipe: Path) -> None:
    rows, jobs = plan(recipe)
    shown = {row[-1].folder for row in rows.values()}
    scored = {job.folder for job in jobs if not job.scored(None, generation=False)}
    assert scored == shown
    assert sum(job.phase == 0 for job in jobs if job.folder in shown) == 2  # not IB-GL's
    rows, jobs = plan(recipe, "beyond")
    scored = {job.folder for job in jobs if not job.scored(None, generation=False)}
    assert {job.folder for job in jobs} - scored == {job.folder for job in jobs if job.phase == 0}


def test_a_folder_is_named_by_what_decides_its_numbers(recipe: Path) -> None:
    def folders(*more: str) -> set[str]:
        return {job.folder.name for job in plan(recipe, "table3", (0,), *more)[1]}

    before = folders()
    assert folders("every.save=7", "engine.timeout_minutes=3") == before
    assert folders("stage1.micro_batch_tokens=512", "name=other") == before
    stage1 = {name for name in before if name.startswith("stage1")}
    changed = folders("stage2.temperature=0.3")
    assert before - changed == {name for name in before if name.startswith("stage2")}
    changed = folders("stage1.optim.lr=0.5")
    assert stage1 <= before - changed
    # Contrastive learning alone knows no stage 1.
    assert len(before & changed) == 5
    assert not before & folders("seed=3", "model.num_layers=1")
    # Where numbers lie decides none of them; how wide they are does.
    whole, cut, single = (folders(f"engine.ds_config={n}") for n in ("zero2", "zero3", "zero3_cpu"))
    assert whole == cut
    assert {name.split("-")[0] for name in whole & single} == {"backbone"}


def test_a_backbone_counts_by_its_content(recipe: Path, tmp_path: Path) -> None:
    def folders(*more: str) -> list[str]:
        return [job.folder.name for job in plan(recipe, "table3", (0,), *more)[1]]

    moved = shutil.copytree(recipe.parent / "backbone", tmp_path / "moved")
    at_moved, before = f"model.backbone={moved}", folders()
    assert folders(at_moved) == before
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert not set(folders(at_moved)) & set(before)
    # Of weights for stage 2 as well; a name is the same on every node.
    weights = f"stage2.from={moved}"
    from_moved = folders(weights)
    shutil.copytree(moved, tmp_path / "again")
    assert folders(f"stage2.from={tmp_path / 'again'}") == from_moved
    (moved / "config.json").write_text(json.dumps(config))
    assert folders(weights) != from_moved
    named = folders("model.backbone=owner/name")
    assert named == folders("model.backbone=owner/name")
    assert not set(named) & set(before)


def test_links(recipe: Path, tmp_path: Path) -> None:
    rows, _ = plan(recipe)
    job = rows["LLM+GL+CL", 0][-1]
    with pytest.raises(ConfigError, match="backbone, which a job of an earlier phase makes"):
        link(job)
    for _, target in job.links:
        target.mkdir(parents=True, exist_ok=True)
    link(job)
    link(job)
    for name, target in job.links:
        assert (job.folder / name).resolve() == target.resolve()


def test_the_list_touches_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "new", prepared=False)
    lines = list_jobs("table3", str(recipe), seeds=[0, 1], nproc=2, max_queries=9)
    assert lines[0] == f"# lbr-ds prepare {recipe}"
    assert [line.split()[0] for line in lines[1:]] == [str(n) for n in range(22)]
    assert "--stage 2 --nproc 2 && lbr-ds eval" in lines[-1]
    assert "--max-queries 9" in lines[-1]
    assert not (recipe.parent / "data").exists()
    assert not (recipe.parent / "run").exists()


def test_faults_are_one_line(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="unknown table 'table9'; one of table1"):
        list_jobs("table9", str(recipe))
    with pytest.raises(ConfigError, match="--only 11: table3 has jobs 0 to 10"):
        reproduce("table3", str(recipe), only=11)


def made_up(job: Job, number: int, generation: bool = False) -> None:
    """An evaluation as `evaluate` leaves it, with a score that only this job has."""
    rng = np.random.default_rng(number)
    per_query = {f"q{i}": float(x) for i, x in enumerate(rng.uniform(size=30))}
    mean = round(float(np.mean(list(per_query.values()))), 5)
    result: dict[str, Any] = {
        "max_queries": None,
        "tasks": {
            "data-eval": {
                "recall_at_10": mean,
                "ndcg_at_10": mean,
                "queries": 30,
                "documents": 50,
                "separation_ratio": 1 + mean,
            }
        },
        "per_query": {"data-eval": per_query},
    }
    if generation:
        result["generation"] = {
            "prompts": {
                "visible": {"bleu_4": 4.0, "rouge_l": 5.0, "chrf": 6.0},
                "bottleneck": {"bleu_4": 4.0, "rouge_l": None, "chrf": 6.0},
            }
        }
    job.scores.parent.mkdir(parents=True, exist_ok=True)
    job.scores.write_text(json.dumps(result))
    if job.phase == 1:
        rows = [{"step": s, "step_seconds": 1.0 + number} for s in (1, 2, 2)]
        (job.folder / "stage1").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (job.folder / "stage1" / "metrics.jsonl").write_text(lines)


@pytest.mark.parametrize("name", [n for n in TABLES if n != "table3"])
def test_every_table_is_written_from_its_scores(
    recipe: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With made-up scores for two seeds; another's model that cannot be had is left out."""
    monkeypatch.setattr(Job, "trained", lambda job: True)

    def no_network(model: str, **_: Any) -> None:
        raise EnvironmentProblem(f"cannot load {model}")

    monkeypatch.setattr("lbr_ds.evaluation.evaluate", no_network, raising=False)
    more = (f"run={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}")
    more += ("data.splits={gl: 0.5, cl: 0.3, eval: 0.2}",)
    source = RecipeSource(str(recipe), more, tmp_path / "run" / "reproduce")
    from lbr_ds import reproduce as room

    request = room._Request(name, str(recipe), more, (), None, None)
    room._prepare(request)
    table = request.table
    jobs = {j.folder: j for v in table.variants for s in (0, 1) for j in jobs_of(v, s, source)}
    for number, job in enumerate(jobs.values()):
        if not job.model or job.model == "bm25":
            made_up(job, number, table.generation)
    result = reproduce(name, str(recipe), more, seeds=[0, 1])
    assert result is not None
    folder = tmp_path / "run" / "reproduce" / name
    text = (folder / "RESULT.md").read_text()
    assert (folder / "result.png").stat().st_size > 5000
    assert json.loads((folder / "result.json").read_text()) == result
    own = [v for v in table.variants if not v.model]
    assert len([r for r in result["rows"] if r["seed"] is not None]) == 2 * len(own)
    assert all(f"| {v.name} |" in text for v in own)
    for line in result["summary"]:
        rows = [r["ndcg_at_10"] for r in result["rows"] if r["variant"] == line["variant"]]
        assert line["ndcg_at_10"]["mean"] == pytest.approx(np.mean(rows))
        low, high = line["ndcg_interval"]
        assert low < line["ndcg_at_10"]["mean"] < high
    means = {line["variant"]: line["ndcg_at_10"]["mean"] for line in result["summary"]}
    for c in result["comparisons"]:
        assert c["difference"] == pytest.approx(means[c["a"]] - means[c["b"]], abs=2e-5)
    if name == "table1":
        assert len(result["notes"]) == 5
        assert "BM25" in means
        assert "`lbr-ds eval bge" in text
        assert "| BGE | 0.689 |" in text  # the paper's, though ours is left out
    if name == "table6":
        seconds = {line["variant"]: line["stage1_seconds"]["mean"] for line in result["summary"]}
        assert f"| {seconds['IB-GL (PT)'] / seconds['Standard PT']:.2f} |" in text
    if name == "table2":
        assert "| B-4, B alone | R-L, B alone | chrF, B alone |" in text
        assert "| 4.00 +- 0.000 | 5.00 +- 0.000 | 6.00 +- 0.000 |" in text
        assert "| 4.00 +- 0.000 |  | 6.00 +- 0.000 |" in text  # what could not be scored is empty


def test_the_control_has_columns_of_its_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks in an evaluation: the first is the row's, the second its control."""
    monkeypatch.setattr(Job, "trained", lambda job: True)
    more = (f"run={tmp_path / 'run'}",)
    source = RecipeSource(str(recipe), more, tmp_path / "run" / "reproduce")
    run = load(str(recipe), more)
    jobs = {j.folder: j for v in TABLES["table3"](run).variants for j in jobs_of(v, 0, source)}
    for number, job in enumerate(jobs.values()):
        made_up(job, number)
        told = json.loads(job.scores.read_text())
        made_up(job, number + 100)
        other = json.loads(job.scores.read_text())
        for part in ("tasks", "per_query"):
            told[part]["data-control"] = other[part]["data-eval"]
        made_up(job, number)  # its metrics
        job.scores.write_text(json.dumps(told))
    result = reproduce("table3", str(recipe), more)
    assert result is not None
    text = (tmp_path / "run" / "reproduce" / "table3" / "RESULT.md").read_text()
    means = {r["variant"]: r for r in result["rows"]}
    assert len(result["control"]) == len(result["comparisons"]) == 11
    for c, held_out in zip(result["control"], result["comparisons"], strict=True):
        gain = means[c["a"]]["control_ndcg_at_10"] - means[c["b"]]["control_ndcg_at_10"]
        assert c["difference"] == pytest.approx(gain, abs=2e-5)
        beyond = held_out["difference"] - c["difference"]
        assert c["beyond"]["difference"] == pytest.approx(beyond)
    for row in result["rows"]:
        assert row["control_ndcg_at_10"] != row["ndcg_at_10"]
        assert f"{row['control_ndcg_at_10']:.3f} |" in text
    assert "| control R@10 | control N@10 |" in text
    assert "30 held-out queries and 30 of the control among 50 passages" in text
    assert "| N@10 on the control set | difference |" in text


def test_figure_3_needs_the_random_split(recipe: Path) -> None:
    more = ["data.protocol=knowledge", "data.splits={}", "data.sources=[{path: x, role: both}]"]
    with pytest.raises(ConfigError, match="use a recipe with protocol random"):
        TABLES["figure3"](load(str(recipe), more))


def test_separation_predicts_is_spearmans(recipe: Path, tmp_path: Path) -> None:
    """Against the definition with equal values; below three runs there is none."""
    pairs = [(1.0, 0.2), (1.5, 0.1), (1.5, 0.4), (2.0, 0.5)]
    for number, (ratio, ndcg) in enumerate(pairs):
        before, after = tmp_path / f"stage1-{number}", tmp_path / f"stage2-{number}"
        place = before / "stage1" / "checkpoints" / "step-000001"
        place.mkdir(parents=True)
        seal(place, {"step": 1})
        after.mkdir()
        (after / "stage1").symlink_to(before / "stage1")
        for folder, name, scores in (
            (before, "stage1", {"separation_ratio": ratio}),
            (after, "stage2", {"ndcg_at_10": ndcg}),
        ):
            (folder / "eval").mkdir()
            (folder / "eval" / f"{name}.json").write_text(json.dumps({"tasks": {"t": scores}}))
        found = separation_predicts(tmp_path)
        assert found["runs"] == number + 1
        assert (found["spearman"] is None) is (number < 2)
    # Ranks 0, 1.5, 1.5, 3 and 1, 0, 2, 3.
    expected = np.corrcoef([0, 1.5, 1.5, 3], [1, 0, 2, 3])[0, 1]
    assert found["spearman"] == pytest.approx(expected)
    assert _ranks(np.array([5.0, 5.0, 1.0, 7.0])).tolist() == [1.5, 1.5, 0, 3]


def test_another_models_job_belongs_to_no_seed(recipe: Path) -> None:
    source = RecipeSource(str(recipe), (), recipe.parent / "root")
    variant = Variant("BM25", model="bm25")
    (first,), (second,) = (jobs_of(variant, seed, source) for seed in (0, 1))
    assert first.folder == second.folder
    assert first.trained()
    assert "--generation" not in first.eval_command(None, True)
