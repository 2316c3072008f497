#!/usr/bin/env bash
# The small policy, from nothing: demonstrations in LIBERO, training, evaluation, export. A stopped run goes on.
#
#   recipes/nano.sh                                        # two CPU cores: all of libero_spatial, three hours
#   TASKS=0 DEMOS=2 STEPS=4 EVAL=0 recipes/nano.sh trial   # two minutes: does everything run?
#   DEVICE=cuda BATCH=128 STEPS=8000 recipes/nano.sh       # one GPU
#
# FOLDER [runs/nano] gets demos/, base/, run/, evaluation/ and policy/. Settings come as environment variables:
# SUITE, TASKS, DEMOS per task, STEPS, BATCH, EVAL (the official initial states to evaluate on), WORKERS, DEVICE.
# Demonstrations start from random placements, never from the official initial states, all of which are new to the
# policy. Needs `pip install -e ".[nano]"`, and OpenGL: MUJOCO_GL=egl or osmesa without a screen.
set -euo pipefail

FOLDER=${1:-runs/nano}
SUITE=${SUITE:-libero_spatial} TASKS=${TASKS:-all} DEMOS=${DEMOS:-30}
STEPS=${STEPS:-5000} BATCH=${BATCH:-16} EVAL=${EVAL:-0-19} WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}
DEVICE=${DEVICE:-cpu}
export MUJOCO_GL=${MUJOCO_GL:-egl}
export MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000  # keep what is freed: twice as fast on a CPU

# 1. Demonstrations by the scripted expert, pushed off its way now and then; a third of them in answer to another
#    instruction than the scene is made for
[ -d "$FOLDER/demos/$SUITE" ] || openvla demos "$SUITE" --tasks "$TASKS" --random "$DEMOS" --noise 0 --push 0.04 \
  --other-share 0.35 --cameras agentview wrist --renderer fast --codec h264 --workers "$WORKERS" \
  --out "$FOLDER/demos/$SUITE"

# 2. The first eight blocks of DINOv2-small, and a language model of random weights
[ -d "$FOLDER/base" ] || python -m openvla.finetune.nano "$FOLDER/base"

# 3. All of it learns chunks of eight actions, from two cameras and the state of the arm
[ -d "$FOLDER/run/merged" ] || openvla finetune --model "$FOLDER/base" --data "$FOLDER/demos/$SUITE" \
  --output_dir "$FOLDER/run" --resume true --mode full --head l1 --chunk 8 --pad_chunks true \
  --cameras observation.images.agentview observation.images.wrist --proprio true --augment false --cache_images true \
  --bf16 true $([ "$DEVICE" = cpu ] && echo "--use_cpu true") --per_device_train_batch_size "$BATCH" \
  --max_steps "$STEPS" --learning_rate 3e-4 --lr_scheduler_type cosine --warmup_steps 100 --ema 0.998 \
  --gradient_checkpointing false --validation_share 0.02 --eval_steps 1000 --save_steps 500 --save_total_limit 1 --logging_steps 20

# 4. In the simulator, with the official renderer, from the official initial states; and asked for something else
for words in "" --ask-other; do
  openvla evaluate "$FOLDER/run/merged" --suite "$SUITE" --tasks "$TASKS" --episodes "$EVAL" --num-envs "$WORKERS" \
    --output-dir "$FOLDER/evaluation$words" $words
done

# 5. One folder to publish
[ -d "$FOLDER/policy" ] || openvla export "$FOLDER/run" "$FOLDER/policy" --dtype bfloat16
