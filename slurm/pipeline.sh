#!/bin/bash
# The whole way, each job waiting for the one before: prepare -> stage1 -> stage2 -> evaluate.
#   bash slurm/pipeline.sh
#   RECIPE=my.yaml bash slurm/pipeline.sh --gpus-per-node=8 --ntasks-per-node=8
# Arguments go to the sbatch of the two training jobs. PREPARE_ARGS and EVALUATE_ARGS are for the
# other two, such as EVALUATE_ARGS="--gpus-per-node=8 --ntasks-per-node=8".
# Prints the job ids; see README.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LBR_SLURM=$here # so that the jobs find common.sh wherever this is typed
export RECIPE=${RECIPE:-demo}

# submit NAME JOB sbatch-arguments...: prints the job id. JOB, if any, must end well first.
submit() {
    local name=$1 after=$2 job
    shift 2
    local chain=()
    if [[ -n $after ]]; then
        # Without --kill-on-invalid-dep a job behind a failed one would wait forever.
        chain=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
    fi
    job=$(sbatch --parsable "${chain[@]}" "$@" "$here/$name.sbatch")
    job=${job%%;*} # a federation answers "id;cluster"
    printf '%-8s  %s%s\n' "$name" "$job" "${after:+  after $after}" >&2
    echo "$job"
}

IFS=$' \t\n' read -r -d '' -a prepare_args <<< "${PREPARE_ARGS:-}" || true
IFS=$' \t\n' read -r -d '' -a evaluate_args <<< "${EVALUATE_ARGS:-}" || true

prepare=$(submit prepare "" "${prepare_args[@]}")
stage1=$(submit stage1 "$prepare" "$@")
stage2=$(submit stage2 "$stage1" "$@")
evaluate=$(submit evaluate "$stage2" "${evaluate_args[@]}")
echo "$prepare $stage1 $stage2 $evaluate"
