#!/usr/bin/env bash
# GRPO of a vision-language model on geometry problems: the task's reward alone, no teacher.
#
#   bash examples/geo3k_vlm/run_geo3k_vlm.sh
#
# With NVIDIA GPUs: Qwen3-VL-2B-Instruct on geo3k; half of the GPUs train, half generate. Without: a tiny model of the
# same kind on a generated geometry set, through the same code. Everything is changed by SLIME_SCRIPT_* variables: the
# block below and that of scripts/launch.sh, or the table in README.md beside this file.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/scripts/launch.sh"

# --- defaults: each variable keeps what the environment says -----------------------------------------------------
: "${SLIME_SCRIPT_N_SAMPLES_PER_PROMPT:=8}"
if [ "$SLIME_SCRIPT_NUM_GPUS" = 0 ]; then
  : "${SLIME_SCRIPT_STUDENT_MODEL:=$TINY_CHECKPOINTS/student}"
  : "${SLIME_SCRIPT_DATASET_NAME:=tiny}"         # generated on the spot
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=30}"
  : "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=16}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=96}"
  : "${SLIME_SCRIPT_LR:=2e-4}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=5}"
else
  : "${SLIME_SCRIPT_STUDENT_MODEL:=Qwen/Qwen3-VL-2B-Instruct}"
  : "${SLIME_SCRIPT_DATASET_NAME:=chenhegu/geo3k_imgurl}"
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=400}"
  : "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=64}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=4096}"
  : "${SLIME_SCRIPT_LR:=1e-6}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=20}"
fi

RUN_NAME=geo3k_vlm
TINY_SET=geometry
TINY_PRESET="a tiny Qwen3-VL model on generated pictures"
SMALL_MODELS_NOTE="All of it on the one GPU: by default a 2B model."
readonly KNOBS=(STUDENT_MODEL DATASET_NAME TRAIN_BACKEND ENGINE COLOCATE NUM_GPUS NUM_GPUS_PER_ENGINE NUM_ROLLOUT ROLLOUT_BATCH_SIZE
  N_SAMPLES_PER_PROMPT MAX_RESPONSE_LEN LR EVAL_INTERVAL EXTERNAL_RAY MODEL_DIR DATA_DIR OUTPUT_DIR EXTRA_ARGS SKIP_SETUP
  SKIP_PREFLIGHT DRY_RUN)

# --- the training command, by theme -----------------------------------------------------------------------------------

build_train_args() {
  CKPT_ARGS=(--hf-checkpoint "$STUDENT_PATH" "${SAVE_ARGS[@]}")
  ROLLOUT_ARGS=(
    --prompt-data "$TRAIN_DATA"
    --input-key problem --label-key answer --multimodal-keys '{"image": "images"}'
    --apply-chat-template
    --rollout-shuffle
    --num-rollout "$SLIME_SCRIPT_NUM_ROLLOUT"
    --rollout-batch-size "$SLIME_SCRIPT_ROLLOUT_BATCH_SIZE"
    --n-samples-per-prompt "$SLIME_SCRIPT_N_SAMPLES_PER_PROMPT"
    --rollout-max-response-len "$SLIME_SCRIPT_MAX_RESPONSE_LEN"
    --rollout-temperature 1.0
  )
  REWARD_ARGS=(--rm-type math)
  GRPO_ARGS=(--advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --kl-loss-coef 0.0 --entropy-coef 0.0)
  OPTIM_ARGS=(--lr "$SLIME_SCRIPT_LR" --lr-decay-style constant --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.98
    "${PRECISION_ARGS[@]}")
  EVAL_ARGS=(--eval-prompt-data test "$TEST_DATA" --eval-interval "$SLIME_SCRIPT_EVAL_INTERVAL" --eval-rm-type math
    --eval-max-response-len "$SLIME_SCRIPT_MAX_RESPONSE_LEN")
  TRAIN_ARGS=("${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${REWARD_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIM_ARGS[@]}" "${EVAL_ARGS[@]}")
}

launch
