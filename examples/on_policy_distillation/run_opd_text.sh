#!/usr/bin/env bash
# On-policy distillation of a language model on mathematics in words, no pictures:
#
#   bash examples/on_policy_distillation/run_opd_text.sh
#
# With NVIDIA GPUs: Qwen3-32B teaches Qwen3-8B on dapo-math-17k, evaluated on aime-2024; half of the GPUs serve the
# teacher. Without: tiny models of the same kind on generated questions, through the same code. Everything is changed by
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
: "${SLIME_SCRIPT_N_SAMPLES_PER_PROMPT:=4}"
if [ "$SLIME_SCRIPT_NUM_GPUS" = 0 ]; then
  : "${SLIME_SCRIPT_STUDENT_MODEL:=$TINY_CHECKPOINTS/text_student}"
  : "${SLIME_SCRIPT_TEACHER_MODEL:=$TINY_CHECKPOINTS/text_teacher}"
  : "${SLIME_SCRIPT_DATASET_NAME:=tiny}"         # generated on the spot
  : "${SLIME_SCRIPT_EVAL_DATASET_NAME:=}"        # empty: the test split of that
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=20}"
  : "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=32}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=96}"
  : "${SLIME_SCRIPT_LR:=3e-4}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=5}"
  : "${SLIME_SCRIPT_N_SAMPLES_PER_EVAL_PROMPT:=1}"
else
  # What the student's share of the GPUs can train: float32 weights, gradients and Adam's moments are 16 bytes a parameter.
  case "$(student_gpus)" in
    0 | 1) size=1.7B ;;
    2 | 3) size=4B ;;
    *) size=8B ;;
  esac
  : "${SLIME_SCRIPT_STUDENT_MODEL:=Qwen/Qwen3-$size}"
  : "${SLIME_SCRIPT_TEACHER_MODEL:=Qwen/Qwen3-$([ "$SLIME_SCRIPT_NUM_GPUS" = 1 ] && echo 4B || echo 32B)}"
  : "${SLIME_SCRIPT_DATASET_NAME:=zhuzilin/dapo-math-17k}"
  : "${SLIME_SCRIPT_EVAL_DATASET_NAME=zhuzilin/aime-2024}" # set to nothing: the test split of DATASET_NAME
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=300}"
  : "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=16}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=16384}"
  : "${SLIME_SCRIPT_LR:=1e-6}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=20}"
  : "${SLIME_SCRIPT_N_SAMPLES_PER_EVAL_PROMPT:=16}" # aime-2024 has 30 questions
fi

RUN_NAME=opd_text
TINY_SET=words
TINY_PRESET="tiny Qwen3 models on generated questions"
SMALL_MODELS_NOTE="All share the one GPU: by default a 1.7B student and a 4B teacher."
readonly KNOBS=(STUDENT_MODEL TEACHER_MODEL DATASET_NAME EVAL_DATASET_NAME TRAIN_BACKEND ENGINE COLOCATE NUM_GPUS NUM_GPUS_TEACHER
  NUM_GPUS_STUDENT NUM_GPUS_PER_ENGINE NUM_ROLLOUT ROLLOUT_BATCH_SIZE N_SAMPLES_PER_PROMPT MAX_RESPONSE_LEN LR EVAL_INTERVAL
  N_SAMPLES_PER_EVAL_PROMPT OPD_KL_COEF TASK_REWARD_WEIGHT TEACHER_URL TEACHER_PORT TEACHER_TIMEOUT TEACHER_RESTARTS EXTERNAL_RAY
  MODEL_DIR DATA_DIR OUTPUT_DIR EXTRA_ARGS DOCTOR_ARGS SKIP_SETUP SKIP_PREFLIGHT SKIP_DOCTOR DRY_RUN)

# --- the training command, by theme -----------------------------------------------------------------------------------

build_train_args() {
  CKPT_ARGS=(--hf-checkpoint "$STUDENT_PATH" "${SAVE_ARGS[@]}")
  ROLLOUT_ARGS=(
    --prompt-data "$TRAIN_DATA"
    --input-key prompt --label-key label --multimodal-keys '{}'
    --apply-chat-template
    --rollout-shuffle
    --num-rollout "$SLIME_SCRIPT_NUM_ROLLOUT"
    --rollout-batch-size "$SLIME_SCRIPT_ROLLOUT_BATCH_SIZE"
    --n-samples-per-prompt "$SLIME_SCRIPT_N_SAMPLES_PER_PROMPT"
    --rollout-max-response-len "$SLIME_SCRIPT_MAX_RESPONSE_LEN"
    --rollout-temperature 1.0
  )
  REWARD_ARGS=(
    --rm-type math
    --rm-url "$RM_URL"
    --custom-rm-path slime.rollout.on_policy_distillation.reward_func
    --custom-reward-post-process-path slime.rollout.on_policy_distillation.post_process_rewards
    --task-reward-weight "$SLIME_SCRIPT_TASK_REWARD_WEIGHT"
    "${PATIENCE_ARGS[@]}"
  )
  OPD_ARGS=(--use-opd --opd-type sglang --opd-kl-coef "$SLIME_SCRIPT_OPD_KL_COEF" --advantage-estimator grpo
    --disable-grpo-std-normalization --calculate-per-token-loss)
  OPTIM_ARGS=(--lr "$SLIME_SCRIPT_LR" --lr-decay-style constant --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.98
    "${PRECISION_ARGS[@]}")
  EVAL_ARGS=(--eval-prompt-data test "$TEST_DATA" --eval-interval "$SLIME_SCRIPT_EVAL_INTERVAL" --eval-rm-type math
    --eval-max-response-len "$SLIME_SCRIPT_MAX_RESPONSE_LEN" --eval-teacher)
  if [ "$SLIME_SCRIPT_N_SAMPLES_PER_EVAL_PROMPT" != 1 ]; then
    EVAL_ARGS+=(--n-samples-per-eval-prompt "$SLIME_SCRIPT_N_SAMPLES_PER_EVAL_PROMPT" --eval-temperature 1.0)
  fi
  TRAIN_ARGS=("${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${REWARD_ARGS[@]}" "${OPD_ARGS[@]}" "${OPTIM_ARGS[@]}" "${EVAL_ARGS[@]}")
}

launch
