#!/bin/bash
# A table of the paper as job arrays: the jobs of a phase side by side, then the next phase, then one
# job that writes the result. The data must be prepared (slurm/prepare.sbatch).
#   TABLE=table3 RECIPE=my.yaml SEEDS=0,1,2 bash slurm/reproduce.sh --gpus-per-node=8
# Arguments go to every sbatch. Prints the last job's id; see README.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LBR_SLURM=$here # so that the jobs find common.sh wherever this is typed
export TABLE=${TABLE:-table3} RECIPE=${RECIPE:-demo}
IFS=$' \t\n' read -r -d '' -a overrides <<< "${OVERRIDES:-}" || true
IFS=$' \t\n' read -r -d '' -a lbr_ds <<< "${LBR_DS:-lbr-ds}" || true

list=$("${lbr_ds[@]}" reproduce "$TABLE" "$RECIPE" "${overrides[@]}" ${SEEDS:+--seeds "$SEEDS"} --dry-run)
if grep '^#' <<< "$list" >&2; then
    echo "the data is not there yet; run the line above first" >&2
    exit 3
fi

# submit NAME sbatch-arguments...: after the job before, if any; sets `after`.
after=""
submit() {
    local name=$1 chain=()
    shift
    if [[ -n $after ]]; then
        chain=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
    fi
    after=$(sbatch --parsable "${chain[@]}" "$@" "$here/reproduce.sbatch")
    after=${after%%;*} # a federation answers "id;cluster"
    printf '%-8s  %s\n' "$name" "$after" >&2
}

for phase in 0 1 2; do
    numbers=$(sed -n "s/^\([0-9]*\) phase $phase: .*/\1/p" <<< "$list" | grep -v '^$' | paste -sd, -)
    if [[ -n $numbers ]]; then
        submit "phase $phase" --array="$numbers" "$@"
    fi
done
submit result "$@"
echo "$after"
