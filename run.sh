#!/usr/bin/env bash
# run.sh – every stage of m2mKD in order, then the table: the student against its baseline.
#
#   bash run.sh configs/demo_nac.yaml [key=value …]        overrides go to every stage
#   bash run.sh configs/demo_nac.yaml --dry-run            check the config, print the stages and what they cost
#                                                          (with WORLD_SIZE=8 in front, for eight processes)
#   LAUNCH="torchrun --nproc_per_node=8" bash run.sh …     the same on eight GPUs
#   GOAL=distill bash run.sh …                             only what this stage needs, and the stage itself
#
# What is finished is left out and an unfinished stage goes on, so starting this again after a kill is right.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
case ${1:---help} in -*) sed -n '2,10s/^# \{0,1\}//p' "$0"; case ${1:-} in -h | --help) exit 0 ;; esac; exit 2 ;; esac
config=$1; shift
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=$(command -v python || command -v python3)
read -rd '' -a launch <<<"${LAUNCH:-}" || true
[ ${#launch[@]} -gt 0 ] || launch=("$python")

# glibc returns every large tensor to the system and faults it in again; CPU training is faster if it keeps them.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8000000000} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
# Threads that wait for one another by spinning would take the cores that they wait for.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# DistributedDataParallel would warn in each process that no parameter is unused (models.Stage says why).
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# torchrun kills what still runs 30 s after SIGTERM. Writing the checkpoint of a large model takes about as long.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

words=() dry=
for word in "$@"; do
    case $word in
        --dry-run) dry=1 ;;
        -h | --help) exec "$python" "$here/finetune.py" --help ;;
        *) words+=("$word") ;;
    esac
done
[ -z "$dry" ] || exec "$python" "$here/tools/cost.py" --config "$config" ${words[@]+"${words[@]}"}

# A signal reaches the stage at work, which saves; then this ends too.
trap '[ -z "$job" ] || kill -TERM "$job" || true; wait; exit 143' TERM INT HUP
job=
run() { "$@" </dev/null & job=$!; wait "$job"; job=; }

# Everything that can be wrong is looked at before anything is trained.
commands=$("$python" "$here/tools/cost.py" --config "$config" ${words[@]+"${words[@]}"} --list)
n=$(grep -c 'py role=' <<<"$commands" || true) k=0
while IFS= read -r line; do
    script=${line%% *} word=${line#* }  # which may begin or end with a space
    case $script in
        '') ;;
        tools/report.py) "$python" "$here/$script" "$word" ;;
        *)
            k=$((k + 1))
            export STAGE="[$k/$n] "
            run "${launch[@]}" "$here/$script" --config "$config" ${words[@]+"${words[@]}"} "$word"
            ;;
    esac
done <<<"$commands"
