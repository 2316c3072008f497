#!/usr/bin/env bash
# The small policy, from nothing: demonstrations in LIBERO, training, evaluation, export. A stopped run goes on.
#
#   recipes/nano.sh                                        # one CPU: three tasks of libero_spatial, some hours
#   TASKS=0 DEMOS=2 STEPS=4 EVAL=0 recipes/nano.sh trial   # two minutes: does everything run?
#
# FOLDER [runs/nano] gets demos/, base/, run/, evaluation/ and policy/. Settings come as environment variables:
# SUITE, TASKS, DEMOS per task, STEPS, BATCH, EVAL (the official initial states to evaluate on), WORKERS, DEVICE.
# Demonstrations start from random placements, never from the official initial states, all of which are new to the
# policy. Needs `pip install -e ".[nano]"`, and OpenGL: MUJOCO_GL=egl or osmesa without a screen.
set -euo pipefail

FOLDER=${1:-runs/nano}
SUITE=${SUITE:-libero_spatial} TASKS=${TASKS:-0-2} DEMOS=${DEMOS:-100}
STEPS=${STEPS:-6000} BATCH=${BATCH:-32} EVAL=${EVAL:-0-19} WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}
DEVICE=${DEVICE:-cpu}
export MUJOCO_GL=${MUJOCO_GL:-egl}

# 1. Demonstrations by the scripted expert, whose aim wavers by a centimetre per step
[ -d "$FOLDER/demos/$SUITE" ] || openvla demos "$SUITE" --tasks "$TASKS" --random "$DEMOS" \
  --noise 0.01 --cameras agentview wrist --renderer fast --codec h264 --workers "$WORKERS" --out "$FOLDER/demos/$SUITE"

# 2. DINOv2-small, and a language model of random weights
[ -d "$FOLDER/base" ] || python -m openvla.finetune.nano "$FOLDER/base"

# 3. All of it learns chunks of eight actions, from two cameras and the state of the arm
openvla finetune --model "$FOLDER/base" --data "$FOLDER/demos/$SUITE" --output_dir "$FOLDER/run" --resume true \
  --mode full --head l1 --chunk 8 --cameras observation.images.agentview observation.images.wrist --proprio true \
  --augment false --bf16 true $([ "$DEVICE" = cpu ] && echo "--use_cpu true") \
  --per_device_train_batch_size "$BATCH" --max_steps "$STEPS" --learning_rate 3e-4 --lr_scheduler_type cosine \
  --warmup_steps 100 --save_steps 500 --logging_steps 20 --dataloader_num_workers 1

# 4. In the simulator, with the official renderer, from the official initial states
openvla evaluate "$FOLDER/run/merged" --suite "$SUITE" --tasks "$TASKS" --episodes "$EVAL" --num-envs "$WORKERS" \
  --output-dir "$FOLDER/evaluation"

# 5. One folder to publish
openvla export "$FOLDER/run" "$FOLDER/policy" --dtype bfloat16
