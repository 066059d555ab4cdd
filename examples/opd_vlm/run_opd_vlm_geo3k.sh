#!/usr/bin/env bash
# On-policy distillation of a vision-language model on geometry problems, from nothing to the closing table:
#
#   bash examples/opd_vlm/run_opd_vlm_geo3k.sh
#
# With NVIDIA GPUs: Qwen3-VL-30B-A3B-Thinking teaches Qwen3-VL-4B-Thinking on geo3k; half of the GPUs serve the teacher.
# Without: tiny models of the same kind on a generated geometry set, through the same code. Everything is changed by
# SLIME_SCRIPT_* variables: the block below, or the table in README.md beside this file.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/scripts/lib.sh"

# --- defaults: each variable keeps what the environment says -----------------------------------------------------
: "${SLIME_SCRIPT_NUM_GPUS:=$(visible_gpu_ids | tr ',' '\n' | grep -c . || true)}"
: "${SLIME_SCRIPT_NUM_GPUS_TEACHER:=}"           # empty: half of the GPUs
: "${SLIME_SCRIPT_NUM_GPUS_STUDENT:=}"           # empty: the other half
: "${SLIME_SCRIPT_NUM_GPUS_PER_ENGINE:=1}"       # tensor parallelism of each of the student's engines
: "${SLIME_SCRIPT_ENGINE:=}"                     # sglang or transformers; empty: as the placement says
: "${SLIME_SCRIPT_TRAIN_BACKEND:=fsdp}"
: "${SLIME_SCRIPT_OPD_KL_COEF:=1.0}"
: "${SLIME_SCRIPT_TASK_REWARD_WEIGHT:=0}"        # above 0: hybrid, the task's grade beside the teacher
: "${SLIME_SCRIPT_TEACHER_URL:=}"                # a teacher that runs elsewhere; none is started here then
: "${SLIME_SCRIPT_TEACHER_PORT:=13141}"
: "${SLIME_SCRIPT_EXTERNAL_RAY:=0}"              # 1: use the Ray cluster that is there
: "${SLIME_SCRIPT_MODEL_DIR:=$HOME/models}"
: "${SLIME_SCRIPT_DATA_DIR:=$HOME/datasets}"
: "${SLIME_SCRIPT_OUTPUT_DIR:=}"                 # empty: a fresh folder under outputs/
: "${SLIME_SCRIPT_EXTRA_ARGS:=}"                 # appended to the training command; a flag given twice counts as given last
: "${SLIME_SCRIPT_DRY_RUN:=0}"                   # 1: print every command, run none
if [ "$SLIME_SCRIPT_NUM_GPUS" = 0 ]; then
  TINY="$SLIME_REPO/slime/tiny/checkpoints"
  : "${SLIME_SCRIPT_STUDENT_MODEL:=$TINY/student}"
  : "${SLIME_SCRIPT_TEACHER_MODEL:=$TINY/teacher}"
  : "${SLIME_SCRIPT_DATASET_NAME:=tiny}"         # generated on the spot
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=20}"
  : "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=32}"
  : "${SLIME_SCRIPT_N_SAMPLES_PER_PROMPT:=4}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=96}"
  : "${SLIME_SCRIPT_LR:=3e-4}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=5}"
  : "${SLIME_SCRIPT_TEACHER_TIMEOUT:=300}"
else
  # One GPU for all of the student's training cannot hold a 4B model with its optimizer.
  small_student=$([ "${SLIME_SCRIPT_NUM_GPUS_STUDENT:-$((SLIME_SCRIPT_NUM_GPUS / 2))}" -le 1 ] && echo 1 || echo 0)
  : "${SLIME_SCRIPT_STUDENT_MODEL:=Qwen/Qwen3-VL-$([ "$small_student" = 1 ] && echo 2B || echo 4B)-Thinking}"
  : "${SLIME_SCRIPT_TEACHER_MODEL:=Qwen/Qwen3-VL-$([ "$SLIME_SCRIPT_NUM_GPUS" = 1 ] && echo 4B || echo 30B-A3B)-Thinking}"
  : "${SLIME_SCRIPT_DATASET_NAME:=chenhegu/geo3k_imgurl}"
  : "${SLIME_SCRIPT_NUM_ROLLOUT:=200}"
  : "${SLIME_SCRIPT_ROLLOUT_BATCH_SIZE:=32}"
  : "${SLIME_SCRIPT_N_SAMPLES_PER_PROMPT:=8}"
  : "${SLIME_SCRIPT_MAX_RESPONSE_LEN:=4096}"
  : "${SLIME_SCRIPT_LR:=1e-6}"
  : "${SLIME_SCRIPT_EVAL_INTERVAL:=20}"
  : "${SLIME_SCRIPT_TEACHER_TIMEOUT:=1800}"
fi
