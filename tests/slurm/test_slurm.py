"""The job scripts on a real two-node SLURM: with the program itself, and with a stand-in for it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_ds.api import prepare
from lbr_ds.config import load
from lbr_ds.shards import Manifest
from lbr_ds.system import resources
from tests.corpora.test_prepare import everything
from tests.faults.compare import differing_bits, steps_not_once
from tests.ranks import ROOT
from tests.slurm.cluster import SlurmCluster
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slurm

STAND_IN = f"{sys.executable} {Path(__file__).with_name('stand_in.py')}"
# Limits in seconds, for a slow machine too; the stand-in needs about 3, a training job about 15.
QUICK, TRAINING = 240, 900


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder such as `lbr-ds init` makes, from which jobs are submitted."""
    resources.copy_shipped(tmp_path)
    return tmp_path


def stand_in(run: Path, steps: int = 5, **more: str) -> dict[str, str]:
    """The environment for a job that runs the stand-in."""
    overrides = f"run={run} stage1.num_steps={steps}"
    return {"LBR_DS": STAND_IN, "RECIPE": "demo", "OVERRIDES": overrides, **more}


def steps_of(metrics: Path) -> list[int]:
    whole = metrics.read_text().split("\n")[:-1]  # without a line that is being written
    return [json.loads(line)["step"] for line in whole]


# --- the program itself ------------------------------------------------------------------------


def test_both_stages_run_on_two_nodes_and_are_scored(cluster: SlurmCluster, checkout: Path) -> None:
    """`sbatch slurm/stage1.sbatch`, then stage 2, as typed; only the recipe is given."""
    recipe = tiny_recipe(checkout / "tiny")
    env = {"RECIPE": str(recipe), "OVERRIDES": "run=runs/tiny  stage2.num_steps=4"}
    for stage in (1, 2):
        if stage == 2:  # and from the nodes' own disk
            env["OVERRIDES"] += f" data.folder=file://{checkout}/tiny/data"
            env["LBR_DS_CACHE"] = str(checkout / "local-disk")
        job = cluster.submit(f"slurm/stage{stage}.sbatch", cwd=checkout, env=env)
        state = cluster.wait(job, TRAINING)
        log = cluster.log(job)
        assert state["JobState"] == "COMPLETED", log
        assert state["NumNodes"] == "2"
        assert Path(state["StdOut"]) == checkout / f"slurm-lbr-stage{stage}-{job}.out"
        assert "world size 2" in log
        assert [f"n{i} is ready: 4 shard(s) of gl" in log for i in (1, 2)] == [stage == 1] * 2
        assert [f"n{i} is ready: 3 shard(s) of cl" in log for i in (1, 2)] == [stage == 2] * 2
        steps = steps_of(checkout / f"runs/tiny/stage{stage}/metrics.jsonl")
        assert steps == list(range(1, {1: 6, 2: 4}[stage] + 1))
    staged = {path.stem for path in (checkout / "local-disk/shards").glob("*.tar")}
    read = Manifest.load(checkout / "tiny/data")
    # Not trained.u64: the checkpoint of stage 1 has the same texts.
    assert staged == {shard.sha256 for name in ("cl", "eval") for shard in read.shards(name)}
    (model,) = checkout.glob("runs/tiny/stage2/checkpoints/step-000004/model")
    texts = checkout / "tiny/data/trained.u64"
    assert (model / "trained.u64").read_bytes() == texts.read_bytes()
    job = cluster.submit("slurm/evaluate.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, TRAINING)
    assert state["JobState"] == "COMPLETED", cluster.log(job)
    assert (checkout / f"runs/tiny/export/job-{job}/modules.json").is_file()
    assert json.loads((checkout / "runs/tiny/eval/stage2.json").read_text())["tasks"]


def test_a_stopped_training_saves_requeues_and_resumes(
    cluster: SlurmCluster, checkout: Path
) -> None:
    """USR1 to the batch shell is what --signal=B:USR1@120 sends before the time limit."""
    recipe = tiny_recipe(checkout / "tiny", stage1__num_steps=200, every__save=1000)
    metrics = checkout / "runs/tiny/stage1/metrics.jsonl"
    env = {"RECIPE": str(recipe), "OVERRIDES": "run=runs/tiny", "CHECK_NODES": "0"}
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    cluster.wait_until(lambda: metrics.exists() and steps_of(metrics) != [], TRAINING, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    state = cluster.wait(job, TRAINING)
    log = cluster.log(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    assert "back to the queue (restart 1)" in log
    assert log.count("steps 0 to 200") == 1
    assert steps_of(metrics) == list(range(1, 201))


def test_requeued_twice_and_a_node_lost_ends_in_the_same_bits(
    cluster: SlurmCluster, checkout: Path
) -> None:
    """`scontrol requeue` twice, then a node that is set down under the job and comes back.

    The oracle is the same run left alone: on two ranks of this host, no SLURM about it.
    """
    steps = 400
    recipe = tiny_recipe(checkout / "tiny", stage1__num_steps=steps, every__save=20)
    stage = checkout / "runs/tiny/stage1"
    one = {"OMP_NUM_THREADS": "1"}
    job = cluster.submit(
        "slurm/stage1.sbatch",
        cwd=checkout,
        env={"RECIPE": str(recipe), "OVERRIDES": "run=runs/tiny", "CHECK_NODES": "0", **one},
    )
    command = ["train", str(recipe), "--stage", "1", "--nproc", "2", f"run={checkout}/alone"]
    alone = subprocess.Popen(
        [sys.executable, "-m", "lbr_ds", *command], env={**os.environ, **one}, cwd=checkout
    )

    def has_progressed(starts: int) -> bool:
        """Whether that start has begun, and taken more steps than it found."""
        output, metrics = checkout / f"slurm-lbr-stage1-{job}.out", stage / "metrics.jsonl"
        if not (output.exists() and metrics.exists()):
            return False
        found = re.findall(rf"steps (\d+) to {steps}", output.read_text())
        return len(found) == starts and steps_of(metrics)[-1:] > [int(found[-1])]

    for start in (1, 2, 3):
        cluster.wait_until(functools.partial(has_progressed, start), TRAINING, job)
        if start < 3:
            cluster.run("scontrol", "requeue", job)
            continue
        try:
            cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
            cluster.wait_until(lambda: cluster.show(job)["Restarts"] == "3", QUICK, job)
        finally:
            with contextlib.suppress(RuntimeError):  # it has registered, and is back already
                cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    state = cluster.wait(job, TRAINING)
    log = cluster.log(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "3"), log
    assert alone.wait(TRAINING) == 0
    assert log.count("steps 0 to") == 1
    assert differing_bits(stage, checkout / "alone" / "stage1") == 0
    assert steps_not_once(stage, steps) == 0


def test_two_nodes_prepare_the_bytes_of_one(cluster: SlurmCluster, checkout: Path) -> None:
    """`sbatch --nodes=2 slurm/prepare.sbatch`; a job that lost a node's process resumes."""
    recipe = tiny_recipe(checkout / "tiny", prepared=False)
    alone, data = checkout / "alone", checkout / "tiny/data"
    prepare(load(str(recipe), [f"data.folder={alone}"]))
    env = {"RECIPE": str(recipe), "PREPARE_TASKS": "3", "LBR_DS": STAND_IN}
    job = cluster.submit("--nodes=2", "slurm/prepare.sbatch", cwd=checkout, env=env)
    assert cluster.wait(job, QUICK)["JobState"] == "COMPLETED", cluster.log(job)
    said = f"stand-in: prepare {recipe} --engine datatrove --tasks 3"
    assert cluster.log(job).count(said) == 2
    del env["LBR_DS"]
    job = cluster.submit("--nodes=2", "slurm/prepare.sbatch", cwd=checkout, env=env)
    cluster.wait_until((checkout / "tiny/.data.lbr-nodes/alive-1").exists, TRAINING, job)
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    assert cluster.wait(job, TRAINING)["JobState"] == "FAILED", cluster.log(job)
    assert not data.exists()
    job = cluster.submit("--nodes=2", "slurm/prepare.sbatch", cwd=checkout, env=env)
    assert cluster.wait(job, TRAINING)["JobState"] == "COMPLETED", cluster.log(job)
    assert cluster.log(job).count("written to") == 1
    assert everything(data) == everything(alone)


def test_a_broken_recipe_fails_with_code_2_and_is_not_requeued(
    cluster: SlurmCluster, checkout: Path
) -> None:
    recipe = tiny_recipe(checkout / "tiny", prepared=False)
    env = {"RECIPE": str(recipe), "OVERRIDES": "stage1.num_stepz=1"}
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, TRAINING)
    log = cluster.log(job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "did you mean 'num_steps'?" in log
    assert "another attempt would fail in the same way" in log


def test_benchmark_measures_the_program_on_two_nodes(cluster: SlurmCluster, checkout: Path) -> None:
    """`sbatch slurm/benchmark.sbatch` as typed, with a tiny recipe: it ends with the table."""
    recipe = tiny_recipe(checkout / "tiny")
    env = {"RECIPE": str(recipe), "STEPS": "2", "SCALING": "weak", "OMP_NUM_THREADS": "1"}
    job = cluster.submit("slurm/benchmark.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, TRAINING)
    log = cluster.log(job)
    assert state["JobState"] == "COMPLETED", log
    folder = checkout / f"runs/benchmark-{job}"
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert [(row["ranks"], row["nodes"], row["reason"]) for row in rows] == [
        (1, 1, None),
        (2, 2, None),
        (2, 2, None),
    ]
    assert [row["figures"].get("data") for row in rows] == ["real", None, "real"]
    assert (folder / "RESULT.md").read_text() in log
    assert (folder / "result.png").is_file()


# --- the scripts, with the stand-in ------------------------------------------------------------


def test_slow_ranks_of_a_stop_are_waited_for(cluster: SlurmCluster, checkout: Path) -> None:
    env = stand_in(checkout / "run", STAND_IN_HOLD="1", STAND_IN_SKEW="2")
    job = cluster.submit("slurm/stage2.sbatch", cwd=checkout, env=env)
    cluster.wait_until((checkout / "run/rank-1").exists, QUICK, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    state = cluster.wait(job, QUICK)
    log = cluster.log(job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("exit code 85") == 2
    assert log.count("of world size 2 starts at step 0") == 2
    assert log.count("is done at step 5") == 2


def test_a_signal_to_the_step_alone_requeues_too(cluster: SlurmCluster, checkout: Path) -> None:
    """So preemption may come: TERM to the tasks, nothing to the batch shell."""
    env = stand_in(checkout / "run", STAND_IN_HOLD="1")
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    cluster.wait_until((checkout / "run/rank-1").exists, QUICK, job)
    cluster.run("scancel", "--signal=TERM", f"{job}.1")  # step 0 has asked the nodes
    state = cluster.wait(job, QUICK)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)


def test_restarts_are_counted(cluster: SlurmCluster, checkout: Path) -> None:
    env = stand_in(checkout / "run", STAND_IN_HOLD="1", MAX_RESTARTS="0")
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    cluster.wait_until((checkout / "run/rank-1").exists, QUICK, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    state = cluster.wait(job, QUICK)
    ended = (state["JobState"], state["ExitCode"], state["Restarts"])
    assert ended == ("FAILED", "85:0", "0"), cluster.log(job)
    assert "not requeued: restarted 0 times already (MAX_RESTARTS)" in cluster.log(job)


def test_cancelled_stays_cancelled(cluster: SlurmCluster, checkout: Path) -> None:
    """The program answers the TERM of scancel with 85; that must not bring the job back."""
    env = stand_in(checkout / "run", STAND_IN_HOLD="1")
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    cluster.wait_until((checkout / "run/rank-1").exists, QUICK, job)
    cluster.run("scancel", job)
    cluster.wait_until(cluster.idle, QUICK, job)
    state = cluster.show(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)


@pytest.mark.parametrize("code", [1, 3, 4, 5])
def test_a_failure_is_not_requeued(cluster: SlurmCluster, checkout: Path, code: int) -> None:
    env = stand_in(checkout / "run", STAND_IN_CODE=str(code))
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, QUICK)
    ended = (state["JobState"], state["ExitCode"], state["Restarts"])
    assert ended == ("FAILED", f"{code}:0", "0"), cluster.log(job)
    hopeless = "another attempt would fail in the same way" in cluster.log(job)
    assert hopeless == (code in (3, 4, 5))


def test_a_node_that_is_not_fit_is_named(cluster: SlurmCluster, checkout: Path) -> None:
    """Before any rank starts, and the job stays failed; it can be told not to ask."""
    env = stand_in(checkout / "run", STAND_IN_SICK="n2")
    job = cluster.submit("slurm/stage2.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, QUICK)
    log = cluster.log(job)
    ended = (state["JobState"], state["ExitCode"], state["Restarts"])
    assert ended == ("FAILED", "6:0", "0"), log
    asked = f"doctor demo --stage 2 run={checkout}/run stage1.num_steps=5 --nodes 2 --nproc 1"
    assert log.count(asked) == 1  # the other node's
    assert log.count("lbr-ds: error: n2: GPU 3: made to fail") == 1
    assert "no rank was started because of the node" in log
    assert "starts at step" not in log
    job = cluster.submit("slurm/stage2.sbatch", cwd=checkout, env={**env, "CHECK_NODES": "0"})
    assert cluster.wait(job, QUICK)["JobState"] == "COMPLETED", cluster.log(job)
    assert "doctor" not in cluster.log(job)


def test_the_demo_is_prepared_when_it_is_not(cluster: SlurmCluster, checkout: Path) -> None:
    env = {
        **stand_in(checkout / "run"),
        "RECIPE": "",
        "OVERRIDES": f"run={checkout}/run stage1.num_steps=2 data.folder=d",
    }
    job = cluster.submit("slurm/stage1.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, QUICK)
    log = cluster.log(job)
    assert state["JobState"] == "COMPLETED", log
    assert log.count("stand-in: prepare demo") == 1
    assert "no d/manifest.json yet" in log


def test_benchmark_sweeps_and_resumes(cluster: SlurmCluster, checkout: Path) -> None:
    """One and two nodes; then, with the same folder, only what is missing, a failure among it."""
    recipe = tiny_recipe(checkout / "tiny", prepared=False)
    env = {"LBR_DS": STAND_IN, "RECIPE": str(recipe), "OUT": "bench", "SCALING": "weak"}
    names = [
        "1-ranks-256-tokens-zero3_cpu-4-samples",
        "network-2-ranks",
        "2-ranks-256-tokens-zero3_cpu-8-samples",
    ]
    job = cluster.submit("slurm/benchmark.sbatch", cwd=checkout, env=env)
    assert cluster.wait(job, QUICK)["JobState"] == "COMPLETED", cluster.log(job)
    rows = json.loads((checkout / "bench/result.json").read_text())["rows"]
    assert [row["measure"] for row in rows] == names
    assert [row["nodes"] for row in rows] == [1, 2, 2]
    assert [row.get("weak") for row in rows] == [1.0, None, 0.5]
    assert (checkout / "bench/RESULT.md").read_text() in cluster.log(job)
    for rank in (0, 1):
        said = (checkout / f"bench/rows/{names[2]}.rank-{rank}.log").read_text()
        assert said == f"rank {rank} of 2, 2 node(s)\n"
    more = {**env, "STAND_IN_CODE": "5", "TOKENS": "128,256"}
    job = cluster.submit("slurm/benchmark.sbatch", cwd=checkout, env=more)
    assert cluster.wait(job, QUICK)["JobState"] == "COMPLETED", cluster.log(job)
    assert "3 of 5 rows are in bench already" in cluster.log(job)
    after = json.loads((checkout / "bench/result.json").read_text())["rows"]
    assert [row["measure"] for row in after] == [
        *names,
        *(n.replace("256", "128") for n in names if n != "network-2-ranks"),
    ]
    assert [row["reason"] for row in after[:4]] == [None] * 4
    assert after[4]["reason"].startswith("made to fail (exit code")


def test_evaluate_exports_and_scores_the_recipes_run(cluster: SlurmCluster, checkout: Path) -> None:
    env = stand_in(Path("runs/x"), TASKS="A,B")
    job = cluster.submit("slurm/evaluate.sbatch", cwd=checkout, env=env)
    state = cluster.wait(job, QUICK)
    log = cluster.log(job)
    assert state["JobState"] == "COMPLETED", log
    assert f"stand-in: export runs/x runs/x/export/job-{job}" in log
    assert "stand-in: eval runs/x --data data/icd10cm --tasks A,B" in log


def test_evaluate_as_an_array(cluster: SlurmCluster, checkout: Path) -> None:
    """Two runs on two groups of tasks: four jobs, each with a file of its own; and one too many."""
    env = stand_in(Path("runs/x"), RUN="runs/a  runs/b/stage2", TASKS="A,B;MTEB(C, v1)", OUT="s")
    job = cluster.submit("--array=0-4", "slurm/evaluate.sbatch", cwd=checkout, env=env)

    def logs() -> list[str]:
        return [path.read_text() for path in checkout.glob("slurm-lbr-evaluate-*.out")]

    def ended() -> bool:
        return len(logs()) == 5 and all("stand-in" in text or "index" in text for text in logs())

    cluster.wait_until(ended, QUICK, job)
    cluster.wait_until(cluster.idle, QUICK, job)
    data = "--data data/icd10cm"
    assert sorted("".join(logs()).splitlines()) == [
        "RUN and TASKS make 4 job(s), index 0 to 3; see sbatch --array",
        f"stand-in: eval runs/a {data} --tasks A,B --out s/runs-a-A-B.json",
        "stand-in: eval runs/a --tasks MTEB(C, v1) --out s/runs-a-MTEB-C--v1-.json",
        f"stand-in: eval runs/b/stage2 {data} --tasks A,B --out s/runs-b-stage2-A-B.json",
        "stand-in: eval runs/b/stage2 --tasks MTEB(C, v1) --out s/runs-b-stage2-MTEB-C--v1-.json",
    ]


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"LBR_DS": "lbr-ds-of-nowhere"}, "lbr-ds-of-nowhere not found on"),
        ({"VENV": "nowhere"}, "VENV=nowhere is not a virtual environment"),
        ({"LBR_SLURM": "nowhere"}, "no nowhere/common.sh; submit from the folder"),
    ],
)
def test_what_is_missing_is_named(
    cluster: SlurmCluster, checkout: Path, env: dict[str, str], line: str
) -> None:
    job = cluster.submit("slurm/prepare.sbatch", cwd=checkout, env=env)
    assert cluster.wait(job, QUICK)["ExitCode"] == "6:0", cluster.log(job)
    assert line in cluster.log(job)


def test_pipeline_chains_its_jobs(cluster: SlurmCluster, checkout: Path) -> None:
    """Submitted from elsewhere; the first job is held so that the chain can be looked at."""
    env = stand_in(checkout / "run", 2, PREPARE_ARGS="--hold")
    pipeline = str(checkout / "slurm/pipeline.sh")
    elsewhere = checkout / "elsewhere"
    elsewhere.mkdir()
    jobs = cluster.run("bash", pipeline, "--comment=training", cwd=elsewhere, env=env).split()
    shown = [cluster.show(job) for job in jobs]
    assert [one["JobName"] for one in shown] == [
        "lbr-prepare",
        "lbr-stage1",
        "lbr-stage2",
        "lbr-evaluate",
    ]
    assert [one.get("Comment") for one in shown] == [None, "training", "training", None]
    for before, after in zip(jobs, shown[1:], strict=False):
        assert after["Dependency"].startswith(f"afterok:{before}")
    cluster.run("scontrol", "release", jobs[0])
    for job in jobs:
        assert cluster.wait(job, QUICK)["JobState"] == "COMPLETED", cluster.log(job)


def test_pipeline_ends_when_a_job_fails(cluster: SlurmCluster, checkout: Path) -> None:
    env = stand_in(checkout / "run", 2, STAND_IN_CODE="5")
    jobs = cluster.run("bash", "slurm/pipeline.sh", cwd=checkout, env=env).split()
    assert cluster.wait(jobs[1], QUICK)["JobState"] == "FAILED", cluster.log(jobs[1])
    assert cluster.wait(jobs[2], QUICK)["JobState"] == "CANCELLED"
    assert cluster.wait(jobs[3], QUICK)["JobState"] == "CANCELLED"


# --- shells in which a person types verbs ------------------------------------------------------


@pytest.mark.parametrize(
    "shell",
    [
        "salloc -N2 -n2",  # a shell on the login node
        "salloc -N2 -n2 srun --interactive --preserve-env --pty",  # use_interactive_step
        "srun -N1 -n1 --pty",
        "srun -N2 -n2 --pty",  # two shells, of which the second has nobody to type
    ],
)
def test_verbs_typed_in_a_shell_of_slurm(cluster: SlurmCluster, shell: str, tmp_path: Path) -> None:
    """`srun` in such a shell is a launcher, and the shell itself is none."""
    launched = f"{sys.executable} -m tests.processes.launched"
    script = tmp_path / "typed.sh"
    script.write_text(
        f"[ $SLURM_PROCID ] && [ $SLURM_PROCID != 0 ] && exit\n"
        f"export MASTER_ADDR=192.0.2.1 MASTER_PORT=9\n"
        f"{launched} '[{{}}]' > {tmp_path}/typed\n"
        f"[ $SLURM_NNODES = 1 ] || srun --overlap {launched} '[{{}}]' > {tmp_path}/nested\n"
        f"{sys.executable} -m lbr_ds mine demo data.folder={tmp_path}/none 2> {tmp_path}/mine\n"
        "[ $? = 3 ]\n"
    )
    cluster.run("script", "-qec", f"{shell} bash {script}", "/dev/null", cwd=ROOT)
    assert json.loads((tmp_path / "typed").read_text()) == [0]
    assert f"{tmp_path}/none" in (tmp_path / "mine").read_text()
    if "-N2" in shell:
        assert (tmp_path / "nested").read_text().split() == ["[2]", "[2]"]
