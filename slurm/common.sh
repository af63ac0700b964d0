# Sourced by every job script here: the program, the recipe, the ranks' meeting point, the end.
# README.md lists the variables that it reads; nothing in here needs an edit.
set -euo pipefail

# --- what to run -------------------------------------------------------------------------------
recipe=${RECIPE:-demo}
# Words are split at blanks, never expanded as file names. A value with a blank goes in the recipe.
IFS=$' \t\n' read -r -d '' -a overrides <<< "${OVERRIDES:-}" || true
IFS=$' \t\n' read -r -d '' -a srun_args <<< "${SRUN_ARGS:-}" || true
IFS=$' \t\n' read -r -d '' -a lbr_ds <<< "${LBR_DS:-lbr-ds}" || true

# --- where the program is ----------------------------------------------------------------------
venv=${VENV:-}
if [[ -z $venv && -f $SLURM_SUBMIT_DIR/.venv/bin/activate ]]; then
    venv=$SLURM_SUBMIT_DIR/.venv
fi
if [[ -n $venv ]]; then
    if [[ ! -f $venv/bin/activate ]]; then
        echo "VENV=$venv is not a virtual environment (no bin/activate); correct or unset VENV" >&2
        exit 6
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
fi
if ! command -v "${lbr_ds[0]}" > /dev/null; then
    echo "${lbr_ds[0]} not found on $(hostname); set VENV=/path/to/venv (one that all nodes see)," \
        "or make .venv in $SLURM_SUBMIT_DIR and install lbr-ds into it" >&2
    exit 6
fi

# --- where the ranks meet ----------------------------------------------------------------------
# The resolver may not know a node's SLURM name; the address that SLURM itself uses works.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$first_node
if ! getent hosts "$first_node" > /dev/null; then
    address=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_ADDR=${address:-$first_node}
fi
# Two jobs on one node need different ports; the kernel assigns ports from 32768 on.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
# Rank 0 copies this file into the run folder as submit.sbatch ($0 is SLURM's copy of the script).
LBR_SUBMIT_SCRIPT=$0
export MASTER_ADDR MASTER_PORT LBR_SUBMIT_SCRIPT

# --- CPU cores ---------------------------------------------------------------------------------
# srun does not take --cpus-per-task over from sbatch (SLURM 22.05 and later).
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
threads=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / ${SLURM_NTASKS_PER_NODE:-1}))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PYTHONUNBUFFERED=1 # lines reach the job's output when they are printed

# --- functions ---------------------------------------------------------------------------------

# program VERB ...: one task on one node, for verbs that are not distributed.
program() {
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_args[@]}" "${lbr_ds[@]}" "$@"
}

# all_nodes VERB ...: one task per node, for verbs whose nodes share the work; one that fails ends all.
all_nodes() {
    srun --kill-on-bad-exit=1 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        "${srun_args[@]}" "${lbr_ds[@]}" "$@"
}

# all_ranks VERB ...: one task per GPU on all nodes, for verbs whose ranks share the work. The first
# may end long after the others; one that fails ends all.
all_ranks() {
    warn_of_idle_gpus
    srun --kill-on-bad-exit=1 "${srun_args[@]}" "${lbr_ds[@]}" "$@"
}

# recipe_value data.folder: that value of the recipe, with the overrides applied.
recipe_value() {
    python3 - "$1" "$recipe" "${overrides[@]}" << 'END'
import sys
from functools import reduce

from lbr_ds.config import load
from lbr_ds.errors import LbrError

key, recipe, *overrides = sys.argv[1:]
try:
    print(reduce(getattr, key.split("."), load(recipe, overrides)))
except LbrError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
END
}

# run_step STAGE key=value ...: train with one task per GPU on all nodes, after all nodes were checked;
# sets `code`.
run_step() {
    warn_of_idle_gpus
    local words=("$recipe" --stage "$1" "${overrides[@]}" "${@:2}")
    stopping=0 code=0 step=""
    trap stop USR1 TERM
    if [[ ${CHECK_NODES:-1} != 0 ]]; then
        # One task per node, which waits for no other; each prints a line with the result.
        passing_signals srun --kill-on-bad-exit=0 --ntasks="$SLURM_JOB_NUM_NODES" \
            --ntasks-per-node=1 "${srun_args[@]}" "${lbr_ds[@]}" doctor "${words[@]}" \
            --nodes "$SLURM_JOB_NUM_NODES" --nproc "${SLURM_NTASKS_PER_NODE:-1}"
        if ((code > 0 && code <= 128)); then
            echo "no rank was started because of the node's error above (CHECK_NODES=0 skips the check)" >&2
        fi
    fi
    if ((code == 0)); then
        # After the first rank has ended the others have 60 s, then srun ends them. Killing them at
        # once (--kill-on-bad-exit=1) starts with a TERM, which a rank that only lost a peer would
        # take as a request to stop and exit with 85; srun returns the highest code, so a failure
        # would be requeued.
        passing_signals srun --kill-on-bad-exit=0 --wait=60 "${srun_args[@]}" \
            "${lbr_ds[@]}" train "${words[@]}"
    fi
    trap '' USR1 TERM # a late one must not keep the rest of the script from its work
}

# passing_signals srun ...: run it, and set `code` to its exit code.
# bash acts on a signal only between two commands, hence srun in the background and `wait`.
passing_signals() {
    "$@" &
    step=$!
    if ((stopping)); then # the signal came before there was an srun to pass it on to
        kill -USR1 "$step"
    fi
    wait_for_step
}

# train STAGE: run_step, and then end or requeue the job; does not return.
# The batch shell gets USR1 two minutes before the time limit (--signal=B:) and passes it on; the
# program then saves and exits 85, and the job goes back to the queue.
train() {
    if ((${SLURM_RESTART_COUNT:-0} > ${MAX_RESTARTS:-20})); then
        echo "job $SLURM_JOB_ID was restarted $SLURM_RESTART_COUNT times, more than MAX_RESTARTS;" \
            "find the cause, then submit it again: it resumes from its last checkpoint" >&2
        exit 1
    fi
    run_step "$1"
    end
}

warn_of_idle_gpus() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-1}
    if [[ $gpus =~ ^[0-9]+$ && $tasks =~ ^[0-9]+$ ]] && ((gpus > tasks)); then
        echo "warning: $gpus GPUs but $tasks task(s) on each node; add --ntasks-per-node=$gpus" >&2
    fi
}

# The trap. srun answers TERM by killing its tasks at once; it passes USR1 on.
stop() {
    echo "stopping; the program saves first" >&2
    stopping=1
    if [[ -n $step ]]; then
        kill -USR1 "$step" 2> /dev/null || true
    fi
}

# Set `code` to srun's exit code; a trapped signal ends a `wait` although srun lives on.
wait_for_step() {
    code=127
    while kill -0 "$step" 2> /dev/null; do
        code=0
        wait "$step" || code=$?
    done
    # Where a signal cut the last wait short, srun's own code is still to be had; else 127.
    local last=0
    wait "$step" 2> /dev/null || last=$?
    if ((last != 127)); then
        code=$last
    fi
}

# What the exit code means for this job (README.md has the table). 85 is the program's word for
# "saved, run me again", 86 for "a rank is gone, the last checkpoint is kept". Above 128 a task was
# killed: by the kernel for memory, with its node, or by a stop before it listened.
end() {
    case $code in
        0) exit 0 ;;
        2 | 3 | 4 | 5)
            echo "exit code $code: another attempt would fail in the same way; fix the cause and submit again" >&2
            exit "$code"
            ;;
    esac
    # A job that is lost again and again before its next checkpoint ends with 5, by the program.
    if ((code != 85 && code != 86 && code <= 128 || code == 130)); then
        echo "exit code $code; not requeued, the cause is above. To resume from the last" \
            "checkpoint submit the same command again" >&2
        exit "$code"
    fi
    # No longer RUNNING: SLURM ends this job itself. A cancelled one must stay so, a preempted one
    # SLURM requeues or not as the cluster is set up; one that only ran out of time is requeued here.
    local job
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID") || true
    if [[ $job != *" JobState=RUNNING "* && $job != *" Reason=TimeLimit "* ]]; then
        exit "$code"
    fi
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= ${MAX_RESTARTS:-20})); then
        echo "not requeued: restarted $restarts times already (MAX_RESTARTS)" >&2
        exit "$code"
    fi
    echo "stopped; back to the queue (restart $((restarts + 1)))" >&2
    scontrol requeue "$SLURM_JOB_ID" \
        || echo "this cluster does not let jobs requeue themselves; submit the same command again to resume" >&2
    exit "$code"
}
