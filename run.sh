#!/usr/bin/env bash
# run.sh – every stage of m2mKD in order, then the table: the student against its baseline.
#
#   bash run.sh configs/demo_nac.yaml [key=value …]        overrides go to every stage
#   bash run.sh configs/demo_nac.yaml --dry-run            check the config, print the stages
#   LAUNCH="torchrun --nproc_per_node=8" bash run.sh …     the same on eight GPUs
#
# A stage that is finished is skipped and an unfinished one goes on, so starting this again after a kill is always right.
set -euo pipefail
case ${1:---help} in -*) sed -n '2,8s/^# \{0,1\}//p' "$0"; case ${1:-} in -h | --help) exit 0 ;; esac; exit 2 ;; esac
config=$1; shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(command -v python || command -v python3)
launch=${LAUNCH:-$python}

# glibc returns every large tensor to the system and faults it in again; CPU training is faster if it keeps them.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8000000000} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}

# torchrun kills what still runs 30 s after SIGTERM. Writing the checkpoint of a large model takes about as long.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

for word in "$@"; do
    case $word in --dry-run | --help | -h) exec $launch "$here/finetune.py" --config "$config" "$@" ;; esac
done

# SIGTERM and Ctrl-C reach the stage at work, which saves; then this ends too.
trap '[ -z "$job" ] || kill -TERM "$job" || true; wait; exit 143' TERM INT
job=
run() { $launch "$here/$1" --config "$config" "${@:2}" </dev/null & job=$!; wait "$job"; job=; }

# Given weights are looked at first, and the stages that would make them are left out.
stages=$("$python" -c "import sys; sys.path.insert(0, '$here'); import models
def main():
    config, _ = models.command_line('', ['all'])
    models.check_inputs(config)
    for script, role, _ in models.stages(config): print(script, role)
models.run(main)" \
    --config "$config" "$@")
n=$(wc -l <<<"$stages") k=0
while read -r script role; do
    k=$((k + 1))
    STAGE="[$k/$n] " run "$script" "$@" "role=$role"
done <<<"$stages"
run evaluate.py "$@" role=all
