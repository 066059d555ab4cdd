#!/usr/bin/env bash
# On-policy distillation of a vision-language model on geometry problems, from nothing to the closing table:
#
#   bash examples/opd_vlm/run_opd_vlm_geo3k.sh
#
# With NVIDIA GPUs: Qwen3-VL-30B-A3B-Thinking teaches Qwen3-VL-4B-Thinking on geo3k; half of the GPUs serve the teacher.
# Without: tiny models of the same kind on a generated geometry set, through the same code. Everything is changed by
# SLIME_SCRIPT_* variables: the block below and those of scripts/launch.sh and scripts/teacher.sh, or the table in
# README.md beside this file.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/scripts/launch.sh"
# shellcheck source=scripts/teacher.sh
source "$SLIME_REPO/scripts/teacher.sh"

# --- defaults: each variable keeps what the environment says -----------------------------------------------------
: "${SLIME_SCRIPT_OPD_KL_COEF:=1.0}"
: "${SLIME_SCRIPT_TASK_REWARD_WEIGHT:=0}"        # above 0: hybrid, the task's grade beside the teacher
: "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=32}"
if [ "$SLIME_SCRIPT_NUM_GPUS" = 0 ]; then
  : "${SLIME_SCRIPT_STUDENT_MODEL:=$TINY_CHECKPOINTS/student}"
  : "${SLIME_SCRIPT_TEACHER_MODEL:=$TINY_CHECKPOINTS/teacher}"
  : "${SLIME_SCRIPT_DATASET_NAME:=tiny}"         # generated on the spot
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=20}"
  : "${SLIME_SCRIPT_N_SAMPLES_PER_PROMPT:=4}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=96}"
  : "${SLIME_SCRIPT_LR:=3e-4}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=5}"
else
  # One GPU for all of the student's training cannot hold a 4B model with its optimizer.
  : "${SLIME_SCRIPT_STUDENT_MODEL:=Qwen/Qwen3-VL-$([ "$(student_gpus)" -le 1 ] && echo 2B || echo 4B)-Thinking}"
  : "${SLIME_SCRIPT_TEACHER_MODEL:=Qwen/Qwen3-VL-$([ "$SLIME_SCRIPT_NUM_GPUS" = 1 ] && echo 4B || echo 30B-A3B)-Thinking}"
  : "${SLIME_SCRIPT_DATASET_NAME:=chenhegu/geo3k_imgurl}"
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=200}"
  : "${SLIME_SCRIPT_N_SAMPLES_PER_PROMPT:=8}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=4096}"
  : "${SLIME_SCRIPT_LR:=1e-6}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=20}"
fi

: "${SLIME_SCRIPT_OPD_TYPE:=sglang}"             # megatron: the trainer holds the teacher; no server runs
case "$SLIME_SCRIPT_OPD_TYPE" in
  sglang) ;;
  megatron) WITH_TEACHER=0 ;;
  *) die "SLIME_SCRIPT_OPD_TYPE is $SLIME_SCRIPT_OPD_TYPE; it must be sglang or megatron." ;;
esac

RUN_NAME=opd_vlm
TINY_SET=geometry
TINY_PRESET="tiny Qwen3-VL models on generated pictures"
SMALL_MODELS_NOTE="All share the one GPU: by default a 2B student and a 4B teacher."
readonly KNOBS=(STUDENT_MODEL TEACHER_MODEL DATASET_NAME TRAIN_BACKEND ENGINE COLOCATE NUM_GPUS NUM_GPUS_TEACHER NUM_GPUS_STUDENT
  NUM_GPUS_PER_ENGINE NUM_ROLLOUT ROLLOUT_BATCH_SIZE N_SAMPLES_PER_PROMPT MAX_RESPONSE_LEN LR EVAL_INTERVAL OPD_TYPE OPD_KL_COEF
  TASK_REWARD_WEIGHT TEACHER_URL TEACHER_PORT TEACHER_TIMEOUT TEACHER_RESTARTS EXTERNAL_RAY MODEL_DIR DATA_DIR OUTPUT_DIR EXTRA_ARGS
  DOCTOR_ARGS SKIP_SETUP SKIP_PREFLIGHT SKIP_DOCTOR DRY_RUN)

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
  if [ "$SLIME_SCRIPT_OPD_TYPE" = megatron ]; then
    resolve_model SLIME_SCRIPT_TEACHER_MODEL
    TEACHER_ARGS=(--opd-teacher-load "$MODEL" --eval-teacher)
  else
    TEACHER_ARGS=(
      --rm-url "$RM_URL"
      --custom-rm-path examples.opd_vlm.opd_vlm_reward.reward_func
      --custom-reward-post-process-path examples.opd_vlm.opd_vlm_reward.post_process_rewards
      --eval-teacher
      "${PATIENCE_ARGS[@]}"
    )
  fi
  REWARD_ARGS=(--rm-type math --task-reward-weight "$SLIME_SCRIPT_TASK_REWARD_WEIGHT")
  OPD_ARGS=(--use-opd --opd-type "$SLIME_SCRIPT_OPD_TYPE" "${TEACHER_ARGS[@]}" --opd-kl-coef "$SLIME_SCRIPT_OPD_KL_COEF" --advantage-estimator grpo
    --disable-grpo-std-normalization # a weight on rewards in the reward file then means what it says
    --calculate-per-token-loss)
  OPTIM_ARGS=(--lr "$SLIME_SCRIPT_LR" --lr-decay-style constant --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.98
    "${PRECISION_ARGS[@]}")
  EVAL_ARGS=(--eval-prompt-data test "$TEST_DATA" --eval-interval "$SLIME_SCRIPT_EVAL_INTERVAL" --eval-rm-type math
    --eval-max-response-len "$SLIME_SCRIPT_MAX_RESPONSE_LEN")
  TRAIN_ARGS=("${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${REWARD_ARGS[@]}" "${OPD_ARGS[@]}" "${OPTIM_ARGS[@]}" "${EVAL_ARGS[@]}")
}

launch
