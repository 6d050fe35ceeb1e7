#!/usr/bin/env bash
# reproduce.sh – the runs behind the tables of docs/results.md.
#
#   bash docs/reproduce.sh                          prints the sections and roughly how long each takes
#   bash docs/reproduce.sh SECTION [key=value …]    runs one; the overrides go to every command
#
# Sets are made in data/ first, and everything else goes to runs/. Finished stages are skipped and interrupted
# ones resume, so start a stopped section again. The figures were measured on a CPU with one thread a run.
# That is the default here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# CPU training is faster if glibc keeps the memory of large tensors instead of returning it to the system.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}

section=${1:-}
overrides=(device=cpu "${@:2}")

stage() { python "$@" "${overrides[@]}"; }
# The next five end with an evaluation, which prints accuracies and keeps them in results.json.
score() {  # where results.md has 5-shot accuracies, on new classes too
  stage evaluate.py "$@"
  case $section in glyphs | upcycling | fashion) stage tools/few_shot.py "$@" ;; esac
}
student() {  # m2mKD, assembly, fine-tuning
  stage distill_module.py "$@"
  assembled "$@"
}
assembled() {  # assembly and fine-tuning of modules that are there
  stage assemble.py "$@"
  whole "$@"
}
whole() {  # a whole model end to end, or a student whose assembled form is there
  stage finetune.py "$@"
  score "$@"
}
started_from() {  # FILE WORD …: a student that starts from the weights of a finished model
  stage tools/convert.py "${@:2}" student_assembled="$1"
  whole "${@:2}"
}
meta_and_teacher() {  # what students of one seed share
  stage finetune.py "$@" role=meta
  stage distill_module.py "$@" role=teacher
  stage assemble.py "$@" role=teacher
  stage finetune.py "$@" role=teacher
  score "$@" role=all
}
lengths() {  # RUN BASE EPOCHS WORD …: the modules of RUN and RUN-alpha0 fine-tuned, and the same end to end
  local run=$1 base=$2 epochs=$3
  student "${@:4}" "share=[$run,$base]" output_dir=$run-f$epochs train.student.epochs=$epochs
  student "${@:4}" "share=[$run-alpha0,$base]" output_dir=$run-alpha0-f$epochs distill.alpha=0 \
    train.student.epochs=$epochs
  whole "${@:4}" share=$base output_dir=$run-b$epochs role=baseline train.baseline_epochs=$epochs
}

# results.md, "Glyphs", and its curves in "Accuracy against the length of fine-tuning"
glyphs() {
  local seed kind base run shared paper more epochs
  for seed in 30 31 32 33 34 35 36 37 38 39; do for kind in nac vmoe; do
    # Meta model and teacher are trained once a seed, in the NAC's run, and shared with the V-MoE.
    base=runs/demo_nac-s$seed  run=runs/demo_$kind-s$seed
    mkdir -p "$base"  # share= wants a folder that exists
    shared="--config configs/demo_$kind.yaml seed=$seed share=$base"
    # The plain rows: meta model, teacher, m2mKD, end to end for the same epochs.
    bash run.sh configs/demo_$kind.yaml seed=$seed share=$base output_dir=$run "${overrides[@]}"
    [ $seed -lt 35 ] || continue
    whole $shared output_dir=$run role=baseline_kd
    student $shared output_dir=$run-alpha0 distill.alpha=0
    # A V-MoE's codes and stitches need no change to be as published.
    if [ $kind = nac ]; then paper="distill.codes=original assemble.stitches=drop"; else paper=; fi
    student $shared output_dir=$run-paper distill.reduction=mean $paper
    # All lengths with all seeds and α = 0. The table has three seeds, or no α = 0, at some.
    case $kind in nac) more="3 12 24 48";; vmoe) more="16 32 64 128";; esac
    for epochs in $more; do lengths $run $base $epochs $shared; done
  done; done
}

# results.md, "On a GPU": the demos there
gpu() {
  local seed kind precision base shared
  overrides[0]=device=cuda
  for seed in 30 31 32; do for precision in float32 bfloat16; do for kind in nac vmoe; do
    base=runs/demo_nac-gpu-$precision-s$seed
    mkdir -p "$base"
    bash run.sh configs/demo_$kind.yaml seed=$seed share=$base precision=$precision few_shot.root= \
      output_dir=runs/demo_$kind-gpu-$precision-s$seed "${overrides[@]}"
  done; done; done
}

# results.md, "Whose gain is it?", after glyphs: modules and baselines of its runs
transfer() {
  local seed kind run to drop epochs shared
  for seed in 30 31 32 33 34; do for kind in nac vmoe; do
    run=runs/demo_$kind-s$seed  to=runs/transfer_$kind-s$seed
    shared="--config configs/transfer_$kind.yaml seed=$seed"
    # A baseline has no stitches, so the student that starts from its weights has none either.
    case $kind in nac) drop=assemble.stitches=drop epochs=24;; vmoe) drop= epochs=32;; esac
    stage tools/convert.py $shared output_dir=$to student_modules=$run/student_modules
    assembled $shared output_dir=$to
    whole $shared output_dir=$to role=baseline
    stage tools/convert.py $shared distill.alpha=0 output_dir=$to-alpha0 \
      student_modules=$run-alpha0/student_modules
    assembled $shared distill.alpha=0 output_dir=$to-alpha0
    started_from $run-b$epochs/baseline.pt $shared output_dir=$to-pretrained $drop
  done; done
}

# Experts that start almost at zero (docs/deviations.md): std 1/√(3·48·48) = .012, in m2mKD and end to end
experts() {
  local seed set base run shared lengths epochs start
  [ -f data/fashion_mnist.npz ] || python tools/prepare.py fashion_mnist data/fashion_mnist.npz
  for seed in 40 41 42 43 44; do for set in demo fashion; do
    case $set in demo) lengths="8 16 32";; fashion) lengths="3 6 12";; esac
    base=runs/experts_$set-s$seed
    shared="--config configs/${set}_vmoe.yaml seed=$seed few_shot.root="
    meta_and_teacher $shared output_dir=$base
    for start in plain zero; do
      run=$base-$start
      [ $start = plain ] || shared="$shared student.expert_std=0.012"
      stage distill_module.py $shared share=$base output_dir=$run
      for epochs in $lengths; do
        student $shared "share=[$run,$base]" output_dir=$run-f$epochs train.student.epochs=$epochs
        whole $shared output_dir=$run-b$epochs role=baseline train.baseline_epochs=$epochs
      done
    done
  done; done
}

# results.md, "More modules". Not all of this is in its table: six modules at 24 epochs, ten on Fashion-MNIST
# at 24 and with α = 0, and α = 0 of deep_vmoe at 32 and of fashion_deep_vmoe at 48 are not.
depth() {
  local seed shape base shared drop epochs lengths
  [ -f data/fashion_mnist.npz ] || python tools/prepare.py fashion_mnist data/fashion_mnist.npz
  for seed in 60 61 62; do for shape in six_nac deep_nac deep_vmoe eight_vmoe fashion_deep_nac \
    fashion_deep_vmoe; do
    base=runs/$shape-s$seed
    shared="--config configs/deep_${shape##*_}.yaml seed=$seed"
    case $shape in
      six_nac)
        shared="$shared meta.depths=[1,1,1,1,1,1] teacher.depths=[2,2,2,2,2,2] student.propagators=4"
        ;;
      eight_vmoe)
        shared="$shared meta.depths=[1,1,1,1,1,1,1,1] teacher.depths=[2,2,2,2,2,2,2,2]"
        shared="$shared student.depths=[1,1,1,1,1,1,1,1]"
        ;;
      fashion*)
        shared="$shared data.root=data/fashion_mnist.npz data.classes=10 data.train_images=4000 data.pad=2"
        shared="$shared data.validation_images=2000 data.test_images=0 data.flip=0.5"
        ;;
    esac
    meta_and_teacher $shared output_dir=$base
    stage distill_module.py $shared output_dir=$base
    stage distill_module.py $shared share=$base output_dir=$base-alpha0 distill.alpha=0
    case $shape in
      fashion_deep_vmoe) lengths="3 12 24 48" ;;
      *nac) lengths="3 12 24" ;;
      *vmoe) lengths="8 16 32" ;;
    esac
    for epochs in $lengths; do lengths $base $base $epochs $shared; done
    # The same modules without stitches; experts that start almost at zero
    drop="$shared train.student.epochs=3 assemble.stitches=drop"
    case $shape in
      fashion_deep_nac) student $drop share=$base output_dir=$base-drop-f3 ;;
      six_nac)
        student $drop "share=[$base-alpha0,$base]" output_dir=$base-alpha0-drop-f3 distill.alpha=0
        ;;
      deep_vmoe)
        for epochs in 8 16; do
          whole $shared output_dir=$base-zero-b$epochs role=baseline train.baseline_epochs=$epochs \
            student.expert_std=0.012
        done
        ;;
    esac
  done; done
}

# results.md, "Sparse upcycling": a dense ViT of the student's shape, for as many multiply-adds as meta model,
# teacher and modules take together, and a V-MoE from it
upcycling() {
  local seed epochs dense config
  for seed in 30 31 32; do for epochs in 32 164; do
    dense=runs/demo_dense-s$seed-m$epochs  config="--config configs/demo_vmoe.yaml seed=$seed"
    whole $config output_dir=$dense role=meta train.meta.epochs=$epochs meta.width=48 teacher.width=48 \
      meta.mlp_ratio=1 meta.init_std=0.03
    config="$config output_dir=runs/demo_vmoe-s$seed-upcycled-m$epochs"
    stage tools/convert.py $config student_upcycled=$dense/meta.pt
    whole $config
  done; done
}

# results.md, "Fashion-MNIST", with its picture of accuracy against cost
fashion() {
  local seed kind base run shared paper longer epochs
  [ -f data/glyphs_2400.npz ] || python tools/prepare.py glyphs data/glyphs_2400.npz test=2400
  for seed in 3 4 5 6 7; do for kind in nac vmoe; do
    base=runs/fashion_nac-s$seed  run=runs/fashion_$kind-s$seed
    mkdir -p "$base"
    shared="seed=$seed share=$base"
    bash run.sh configs/fashion_$kind.yaml $shared output_dir=$run "${overrides[@]}"
    shared="--config configs/fashion_$kind.yaml $shared"
    # -total: about .8 (NAC) and .2 (V-MoE) of the multiply-adds of the whole pipeline
    case $kind in vmoe) longer=22;; nac) longer=24;; esac
    if [ $kind = nac ]; then paper="distill.codes=original assemble.stitches=drop"; else paper=; fi
    whole $shared output_dir=$run role=baseline_kd
    student $shared output_dir=$run-alpha0 distill.alpha=0
    student $shared output_dir=$run-paper distill.reduction=mean $paper
    whole $shared output_dir=$run-total role=baseline train.baseline_epochs=$longer
    [ $kind = vmoe ] || continue
    for epochs in 6 12; do
      whole $shared output_dir=$run-b$epochs role=baseline train.baseline_epochs=$epochs
    done
    for epochs in 1 6; do
      student $shared "share=[$run,$base]" output_dir=$run-f$epochs train.student.epochs=$epochs
    done
  done; done
}

# results.md, "Accuracy against the length of fine-tuning" on Fashion-MNIST, after fashion.
# As above, the table has three seeds, or no α = 0, at some lengths.
fashion_lengths() {
  local seed kind epochs
  for seed in 3 4 5 6 7; do for kind in nac vmoe; do for epochs in 6 12 24 48; do
    lengths runs/fashion_$kind-s$seed runs/fashion_nac-s$seed $epochs \
      --config configs/fashion_$kind.yaml seed=$seed
  done; done; done
}

# results.md, "What would keep the gain?": 58,000 images
fashion_all() {
  local seed run shared stage epochs
  for seed in 3 4 5; do
    run=runs/fashion58k_vmoe-s$seed
    shared="seed=$seed few_shot.root= data.train_images=0 train.meta.epochs=4 train.incubate.epochs=2"
    shared="$shared train.teacher.epochs=2 train.distill.epochs=2"
    for stage in meta incubate teacher distill student; do shared="$shared train.$stage.warmup=0.25"; done
    bash run.sh configs/fashion_vmoe.yaml $shared train.student.epochs=1 output_dir=$run "${overrides[@]}"
    for epochs in 3 6; do
      student --config configs/fashion_vmoe.yaml $shared share=$run output_dir=$run-f$epochs \
        train.student.epochs=$epochs
      whole --config configs/fashion_vmoe.yaml $shared output_dir=$run-b$epochs role=baseline \
        train.baseline_epochs=$epochs
    done
  done
}

# The same with 1,000 images, four times an epoch
fashion_small() {
  local seed kind base run shared stage epochs
  for seed in 3 4 5; do for kind in nac vmoe; do
    base=runs/fashion1k_nac-s$seed  run=runs/fashion1k_$kind-s$seed
    mkdir -p "$base"
    shared="seed=$seed few_shot.root= data.train_images=1000"
    for stage in meta incubate teacher distill student; do shared="$shared train.$stage.passes=4"; done
    bash run.sh configs/fashion_$kind.yaml $shared share=$base output_dir=$run "${overrides[@]}"
    shared="--config configs/fashion_$kind.yaml $shared"
    for epochs in 12 48; do
      student $shared "share=[$run,$base]" output_dir=$run-f$epochs train.student.epochs=$epochs
      whole $shared share=$base output_dir=$run-b$epochs role=baseline train.baseline_epochs=$epochs
    done
  done; done
}

own_teacher() {  # BASE WORD …: a student that the meta model of BASE teaches
  stage tools/convert.py "${@:2}" "teacher.depths=[1,1,1]" teacher=$1/meta.pt
  student "${@:2}" "teacher.depths=[1,1,1]"
}

# The same with a meta model that has the teacher's labels
knows_more() {
  local seed base run shared
  for seed in 1 2 3; do
    base=runs/fewk-s$seed  run=runs/fewk_vmoe-s$seed
    shared="--config configs/fashion_few_labels_vmoe.yaml seed=$seed train.meta.images=[24500,54500]"
    shared="$shared train.meta.passes=1 train.meta.epochs=2 train.meta.warmup=0.2"
    meta_and_teacher $shared output_dir=$base
    student $shared share=$base output_dir=$run
    student $shared share=$base output_dir=$run-alpha0 distill.alpha=0 train.distill.images=[0,500] \
      train.distill.passes=49 train.student.lr=0.032
    own_teacher $base $shared share=$base output_dir=$run-self
    student $shared "share=[$run,$base]" output_dir=$run-both1 train.student.alpha=1 train.student.epochs=1 \
      train.student.images=[0,24500] train.student.passes=1 train.student.lr=0.032 train.student.warmup=0.2
  done
}

# results.md, "500 labels", without the rows of section states
few_labels() {
  local seed kind base run shared labeled unlabeled kd drop epochs name
  for seed in 1 2 3 4 5; do
    base=runs/few-s$seed
    meta_and_teacher --config configs/fashion_few_labels_vmoe.yaml seed=$seed output_dir=$base
    for kind in vmoe nac; do
      run=runs/few_$kind-s$seed
      shared="--config configs/fashion_few_labels_$kind.yaml seed=$seed"
      labeled="train.distill.images=[0,500] train.distill.passes=49"
      unlabeled="train.student.images=[0,24500] train.student.passes=1 train.student.lr=0.032"
      unlabeled="$unlabeled train.student.warmup=0.2"
      kd="train.student.alpha=1 $unlabeled train.student.epochs=1"
      # A baseline has no stitches, so the student that starts from its weights has none either.
      if [ $kind = nac ]; then drop=assemble.stitches=drop; else drop=; fi
      student $shared share=$base output_dir=$run
      student $shared share=$base output_dir=$run-alpha0 distill.alpha=0 $labeled train.student.lr=0.032
      # These two take the modules of $run and of $run-alpha0, and fine-tune them differently.
      student $shared "share=[$run,$base]" output_dir=$run-both1 $kd
      student $shared "share=[$run-alpha0,$base]" output_dir=$run-a0kd distill.alpha=0 $labeled $kd
      started_from $run-both1/student.pt $shared share=$base output_dir=$run-both train.student.lr=0.004
      whole $shared share=$base output_dir=$run-e2e role=baseline train.student.lr=0.032
      for epochs in 1 2 3; do
        case $epochs in 1) name=kd;; 2) name=kd2;; 3) name=kdtotal;; esac
        whole $shared share=$base output_dir=$run-$name role=baseline_kd $unlabeled \
          train.student.epochs=$epochs
        started_from $run-$name/baseline_kd.pt $shared share=$base output_dir=$run-${name}lab \
          train.student.lr=0.004 $drop
      done
      student $shared share=$base output_dir=$run-half "train.distill.images=[0,12250]" $kd  # the NAC's row
      # From here on the V-MoE's rows
      [ $kind = vmoe ] || continue
      student $shared share=$base output_dir=$run-labelled $labeled
      own_teacher $base $shared share=$base output_dir=$run-self
      student $shared share=$base output_dir=$run-tau4 distill.tau=4
      whole $shared share=$base output_dir=$run-total role=baseline train.baseline_epochs=20
    done
  done
}

# The rows of this table that say "states". First few_labels, then the patch of docs/extend.md. Remove the
# patch afterwards: settings do not tell whether it was there.
states() {
  local seed base run shared kd
  if ! grep -q mse_loss distill_module.py; then
    echo "section states needs the patch of docs/extend.md: states instead of logits" >&2
    exit 2
  fi
  for seed in 1 2 3 4 5; do
    base=runs/few-s$seed  run=runs/few_vmoe-s$seed
    shared="--config configs/fashion_few_labels_vmoe.yaml seed=$seed"
    kd="train.student.alpha=1 train.student.images=[0,24500] train.student.passes=1 train.student.lr=0.032"
    kd="$kd train.student.warmup=0.2 train.student.epochs=1"
    student $shared share=$base output_dir=$run-states
    student $shared "share=[$run-states,$base]" output_dir=$run-statesboth1 $kd
  done
}

# results.md, "One thing changed", after few_labels. A line: a name, the number of labels, the change.
one_thing() {
  local seed name labels change base run shared
  for seed in 1 2 3 4 5; do
    while read -u 3 name labels change; do  # without -r, so that a backslash continues a line
      base=runs/$name-s$seed  run=runs/${name}_vmoe-s$seed
      shared="--config configs/fashion_few_labels_vmoe.yaml seed=$seed $change"
      meta_and_teacher $shared share=runs/few-s$seed output_dir=$base
      student $shared "share=[$base,runs/few-s$seed]" output_dir=$run
      student $shared "share=[$base,runs/few-s$seed]" output_dir=$run-alpha0 distill.alpha=0 \
        "train.distill.images=[0,$labels]" train.distill.passes=$((24500 / labels))
    done 3<<'END'
few100 100 train.meta.images=[0,100] train.meta.passes=60 \
  train.student.images=[0,100] train.student.passes=65
few2000 2000 train.meta.images=[0,2000] train.meta.passes=3 \
  train.student.images=[0,2000] train.student.passes=3
few_t4000 500 train.incubate.images=[24500,28500] train.incubate.passes=7 \
  train.teacher.images=[24500,28500] train.teacher.passes=7
END
  done
}

# results.md, "Inside the student": the demos as they were, with fewer epochs. A line: the student, a
# name, the change.
inside() {
  local seed kind name change base former run words
  for seed in 3 4 5 6 7; do
    base=runs/former-s$seed
    meta_and_teacher --config configs/demo_vmoe.yaml seed=$seed output_dir=$base
    # A teacher that is trained end to end, for -e2et
    whole --config configs/demo_vmoe.yaml seed=$seed output_dir=runs/former_e2e-s$seed role=meta \
      "meta.depths=[2,2,2]" train.meta.epochs=11
    while read -r -u 3 kind name change; do
      case $kind in
        nac) former="train.distill.epochs=3 train.student.epochs=2";;
        vmoe) former="train.distill.epochs=6 train.student.epochs=4 train.distill.lr=0.048"
              former="$former student.init_std=0.1";;
      esac
      run=runs/former_$kind-s$seed
      mkdir -p $run
      words="--config configs/demo_$kind.yaml seed=$seed $former share=[$run,$base]"
      words="$words output_dir=$run${name#config} $change"
      if [ $name = -e2et ]; then
        stage tools/convert.py $words teacher=runs/former_e2e-s$seed/meta.pt
      fi
      student $words
    done 3<<'END'
nac config
nac -drop assemble.stitches=drop
nac -keep assemble.stitches=keep
nac -original distill.codes=original
nac -hinge train.student.regularizer=0.1
nac -scale_free assemble.graph=scale_free
nac -scale_free-reg assemble.graph=scale_free train.student.regularizer=0.1
nac -planted_partition assemble.graph=planted_partition
nac -planted_partition-reg assemble.graph=planted_partition train.student.regularizer=1
nac -ring_of_cliques assemble.graph=ring_of_cliques
nac -ring_of_cliques-reg assemble.graph=ring_of_cliques train.student.regularizer=0.1
nac -erdos_renyi assemble.graph=erdos_renyi
nac -erdos_renyi-reg assemble.graph=erdos_renyi train.student.regularizer=0.1
vmoe config
vmoe -warmup train.distill.warmup=0.5
vmoe -keep train.distill.warmup=0.5 assemble.stitches=keep
vmoe -balance train.distill.warmup=0.5 student.balance=0.01
vmoe -experts2 train.distill.warmup=0.5 student.experts=2
vmoe -experts8 train.distill.warmup=0.5 student.experts=8
vmoe -e2et train.distill.warmup=0.5
END
  done
}

# The paper's comparison on Tiny-ImageNet, which we have not run: the NAC from its modules, and the same NAC
# end to end, for each graph prior. The modules learn on ImageNet first, once for all. MODULES=FOLDER takes
# the authors' modules instead. LAUNCH="torchrun --nproc_per_node=8" uses eight GPUs.
paper() {
  local modules=${MODULES:-runs/tiny_imagenet_modules/student_modules} prior words
  overrides[0]=device=auto
  if [ -z "${MODULES:-}" ]; then
    GOAL=distill bash run.sh configs/tiny_imagenet_modules.yaml output_dir=runs/tiny_imagenet_modules \
      "${overrides[@]}"
  fi
  for prior in scale_free planted_partition ring_of_cliques erdos_renyi; do
    words="output_dir=runs/tiny_imagenet_nac-$prior assemble.graph=$prior"
    # The planted partition has the block model as its regularizer, the others hinge repulsion.
    case $prior in
      planted_partition) words="$words train.student.regularizer=1";;
      *) words="$words train.student.regularizer=0.1";;
    esac
    if [ -d data/tiny_imagenet_r ]; then words="$words data.robustness=[data/tiny_imagenet_r]"; fi
    stage tools/convert.py --config configs/tiny_imagenet_nac.yaml $words student_modules=$modules
    bash run.sh configs/tiny_imagenet_nac.yaml $words "${overrides[@]}"
  done
}

case $section in
  glyphs | gpu | experts | depth | upcycling | transfer | inside)
    [ -f data/lower_case.npz ] || python tools/prepare.py demo
    ;;
  fashion | fashion_lengths | fashion_all | fashion_small | few_labels | states | knows_more | one_thing)
    [ -f data/fashion_mnist.npz ] || python tools/prepare.py fashion_mnist data/fashion_mnist.npz
    ;;
esac
case $section in
  glyphs | gpu | experts | depth | upcycling | transfer | fashion | fashion_lengths | fashion_all | \
    fashion_small | few_labels | states | knows_more | one_thing | inside | paper)
    "$section"
    ;;
  *)
    cat <<'END'
bash docs/reproduce.sh SECTION [key=value …]

section           about, on one CPU core
glyphs            7 hours       m2mKD against its baselines on glyphs, and for other lengths
gpu               40 minutes    the demos on a GPU (the time is of one GPU and one core)
experts           1.5 hours     a V-MoE whose experts start almost at zero, as the original's
depth             12 hours      six and ten modules of a NAC; eight, and four of three blocks, of a V-MoE
upcycling         20 minutes    a V-MoE from a dense ViT, against the one of glyphs
transfer          30 minutes    from glyphs to other letters; needs glyphs
fashion           2 hours       m2mKD against its baselines on Fashion-MNIST
fashion_lengths   3 hours       the same for other lengths of fine-tuning; needs fashion
fashion_all       40 minutes    a V-MoE on all 58,000 images
fashion_small     1 hour        both students on 1,000 images
few_labels        4 hours       500 labels and a teacher of 30,000 others
states            20 minutes    with the teacher's states; needs few_labels and docs/extend.md's patch
knows_more        30 minutes    500 labels, and a meta model of 30,000
one_thing         1.5 hours     100 or 2,000 labels, or a teacher of 4,000; needs few_labels
inside            1.5 hours     codes, stitches, graph priors, experts
paper             1,360 hours   the paper's NAC on Tiny-ImageNet with four graph priors (the time is of one
                                GPU at 150 TFLOP/s; with MODULES=FOLDER, the authors' modules, 14 hours, or
                                56 at the speed that a NAC had on an H100, see docs/speed.md)

Fashion-MNIST is Debian's package dataset-fashion-mnist, or, from a folder with its four .gz files:
    python tools/prepare.py fashion_mnist data/fashion_mnist.npz FOLDER
Section paper wants ImageNet in data/imagenet (train/<class>/*, val/<class>/*), Tiny-ImageNet in
data/tiny_imagenet and, if it is there, Tiny-ImageNet-R in data/tiny_imagenet_r:
    python tools/prepare.py tiny_imagenet data/tiny_imagenet FOLDER      and so tiny_imagenet_r
Mean and standard deviation over seeds: python tools/report.py runs/demo_nac-s*
END
    [ -z "$section" ] || exit 2
    ;;
esac
