#!/usr/bin/env bash
# The small policy, from nothing: demonstrations in LIBERO, training, evaluation, export. A stopped run goes on.
#
#   recipes/nano.sh                                                         # two CPU cores: ten hours, by estimate
#   SUITES=libero_object TASKS=0 DEMOS=2 STEPS=4 LEAD=8 EVAL=0 recipes/nano.sh trial   # minutes: does everything run?
#   DEVICE=cuda BATCH=128 STEPS=8000 recipes/nano.sh                        # one GPU
#
# FOLDER [runs/nano] gets demos/, base/, first/, led/, run/, exported/, evaluation/ and policy/. Settings come as
# environment variables: SUITES, TASKS, DEMOS per task, STEPS of each of the two trainings, BATCH, LEAD (the most steps
# that the first policy acts before the expert goes on), EVAL (the official initial states to evaluate on), WORKERS,
# DEVICE. Demonstrations start from random placements, never from the official initial states, all of which are new to
# the policy. Needs `pip install -e ".[nano]"`, and OpenGL: MUJOCO_GL=egl or osmesa without a screen.
set -euo pipefail

FOLDER=${1:-runs/nano}
read -ra SUITES <<<"${SUITES:-libero_spatial libero_object}"
TASKS=${TASKS:-all} DEMOS=${DEMOS:-30} STEPS=${STEPS:-8000} BATCH=${BATCH:-16} LEAD=${LEAD:-120} EVAL=${EVAL:-0-9}
DEVICE=${DEVICE:-cpu} WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}
export MUJOCO_GL=${MUJOCO_GL:-egl}
export MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000  # keep what is freed: twice as fast on a CPU

DATA=()
demonstrate() {  # FOLDER OPTIONS…: a third in answer to another instruction than the scene is made for
  for suite in "${SUITES[@]}"; do
    [ -d "$1/$suite" ] || openvla demos "$suite" --tasks "$TASKS" --noise 0 --other-share 0.35 \
      --cameras agentview wrist --renderer fast --codec h264 --workers "$WORKERS" --out "$1/$suite" "${@:2}"
    DATA+=("$suite=$1/$suite")  # each suite with its own statistics
  done
}

train() {  # MODEL RUN LEARNING_RATE DATA…: chunks of eight actions, from two cameras and the state of the arm
  [ -d "$2/merged" ] || openvla finetune --model "$1" --output_dir "$2" --resume true --learning_rate "$3" \
    --data "${@:4}" --mode full --head l1 --chunk 8 --pad_chunks true \
    --cameras observation.images.agentview observation.images.wrist --proprio true --augment false --cache_images true \
    --bf16 true $([ "$DEVICE" = cpu ] && echo "--use_cpu true") --per_device_train_batch_size "$BATCH" \
    --gradient_checkpointing false --max_steps "$STEPS" --lr_scheduler_type cosine --warmup_steps 100 --ema 0.998 \
    --validation_share 0.02 --eval_steps 1000 --save_steps 500 --save_total_limit 1 --logging_steps 20
}

# 1. Demonstrations by the scripted expert, pushed off its way now and then
demonstrate "$FOLDER/demos" --random "$DEMOS" --push 0.04

# 2. The first eight blocks of DINOv2-small, and a language model of random weights: all of it learns
[ -d "$FOLDER/base" ] || python -m openvla.finetune.nano "$FOLDER/base"
train "$FOLDER/base" "$FOLDER/first" 3e-4 "${DATA[@]}"

# 3. Where that policy gets to, the expert shows how to go on; the policy learns from both
demonstrate "$FOLDER/led" --random $(((DEMOS * 3 + 4) / 5)) --seed 2000 --push 0.02 --lead "$FOLDER/first/merged" \
  --lead-steps "$LEAD"
train "$FOLDER/first/merged" "$FOLDER/run" 2.5e-4 "${DATA[@]}"

# 4. What is published, in bfloat16; in the simulator, with the official renderer, from the official initial states, and
#    asked for something else
[ -d "$FOLDER/exported" ] || openvla export "$FOLDER/run" "$FOLDER/exported" --dtype bfloat16
RESULTS=()
for suite in "${SUITES[@]}"; do
  for words in "" --ask-other; do
    openvla evaluate "$FOLDER/exported" --suite "$suite" --tasks "$TASKS" --episodes "$EVAL" --num-envs "$WORKERS" \
      --output-dir "$FOLDER/evaluation/$suite$words" $words
    RESULTS+=("$FOLDER/evaluation/$suite$words/evaluation.json")
  done
done

# 5. The same again with a card that tells the results: the folder to publish
[ -d "$FOLDER/policy" ] || openvla export "$FOLDER/run" "$FOLDER/policy" --dtype bfloat16 --evaluation "${RESULTS[@]}"
