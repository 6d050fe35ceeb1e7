#!/usr/bin/env bash
# run.sh – every stage of m2mKD in order, then the table: the student against its baseline.
#
#   bash run.sh configs/demo_nac.yaml [key=value …]        overrides go to every stage
#   bash run.sh configs/demo_nac.yaml --dry-run            check the config, print the stages
#   LAUNCH="torchrun --nproc_per_node=8" bash run.sh …     the same on eight GPUs
#
# A stage that is finished is skipped, an unfinished one goes on, so starting this again after a kill is always right.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash run.sh configs/NAME.yaml [key=value …]" >&2; exit 2; }
config=$1; shift
cd "$(dirname "$0")"
launch=${LAUNCH:-python}

# glibc returns every large tensor to the system and faults it in again; CPU training is faster if it keeps them.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8000000000} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}

stage() { $launch "$1" --config "$config" "${@:2}"; }

for word in "$@"; do [ "$word" != --dry-run ] || { stage finetune.py "$@"; exit; }; done

# weights from elsewhere (meta.checkpoint, teacher.checkpoint, student.start): the stages that would make them are left out
given=$(python -c 'import models; models.run(lambda: print(*(role for role in ("meta", "teacher", "student")
    if (c := models.command_line("", ["all"])[0][role]).get("checkpoint") or c.get("start"))))' --config "$config" "$@")
lacks() { [[ " $given " != *" $1 "* ]]; }

if lacks meta; then
    stage finetune.py "$@" role=meta            # 1. the meta model
fi
if lacks teacher; then
    stage distill_module.py "$@" role=teacher   # 2. incubate the teacher's modules in it
    stage assemble.py "$@" role=teacher
    stage finetune.py "$@" role=teacher         # 3. assemble and finetune the teacher
fi
if lacks student; then
    stage distill_module.py "$@"                # 4. m2mKD: the student's modules
    stage assemble.py "$@"
fi
stage finetune.py "$@"                          # 5. assemble and finetune the student
stage finetune.py "$@" role=baseline            # the same student, end to end from scratch
stage evaluate.py "$@" role=all
