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
: "${SLIME_SCRIPT_TEACHER_RESTARTS:=3}"         # how often a teacher that dies in the middle of the run is started anew
: "${SLIME_SCRIPT_EXTERNAL_RAY:=0}"              # 1: use the Ray cluster that is there
: "${SLIME_SCRIPT_MODEL_DIR:=$HOME/models}"
: "${SLIME_SCRIPT_DATA_DIR:=$HOME/datasets}"
: "${SLIME_SCRIPT_OUTPUT_DIR:=}"                 # empty: a fresh folder under outputs/
: "${SLIME_SCRIPT_EXTRA_ARGS:=}"                 # appended to the training command; a flag given twice counts as given last
: "${SLIME_SCRIPT_SKIP_SETUP:=0}"                # 1: the active environment is ready (a container, say); install nothing
: "${SLIME_SCRIPT_DOCTOR_ARGS:=}"               # appended to the pre-flight: --allow chat-template, say
: "${SLIME_SCRIPT_SKIP_DOCTOR:=0}"               # 1: train without the pre-flight against the teacher
: "${SLIME_SCRIPT_DRY_RUN:=0}"                   # 1: print every command, run none
require_whole_numbers SLIME_SCRIPT_NUM_GPUS SLIME_SCRIPT_NUM_GPUS_TEACHER SLIME_SCRIPT_NUM_GPUS_STUDENT
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

TEACHER_RESTARTS_DONE=0
readonly KNOBS=(STUDENT_MODEL TEACHER_MODEL DATASET_NAME TRAIN_BACKEND ENGINE NUM_GPUS NUM_GPUS_TEACHER NUM_GPUS_STUDENT
  NUM_GPUS_PER_ENGINE NUM_ROLLOUT ROLLOUT_BATCH_SIZE N_SAMPLES_PER_PROMPT MAX_RESPONSE_LEN LR EVAL_INTERVAL OPD_KL_COEF
  TASK_REWARD_WEIGHT TEACHER_URL TEACHER_PORT TEACHER_TIMEOUT TEACHER_RESTARTS EXTERNAL_RAY MODEL_DIR DATA_DIR OUTPUT_DIR EXTRA_ARGS
  DOCTOR_ARGS SKIP_SETUP SKIP_DOCTOR DRY_RUN)

# --- small helpers ------------------------------------------------------------------------------------------------

dry() { [ "$SLIME_SCRIPT_DRY_RUN" = 1 ]; }

# step COMMAND...: runs it as a process of ours; a dry run prints it.
step() {
  if dry; then show "$@"; else run_own "$@"; fi
}

# show COMMAND...: prints it as one line that can be pasted.
show() { printf '+%s\n' "$(quoted ' ' "$@")"; }

# show_by_flag COMMAND...: the same with one flag a line.
show_by_flag() { printf '  %s\n' "$(quoted $' \\\n    ' "$@")"; }

# quoted SEPARATOR WORD...: the words as a shell reads them, SEPARATOR instead of a space before each flag.
quoted() {
  local separator=$1 word
  shift
  for word in "$@"; do
    if [[ "$word" == --* ]]; then printf '%s' "$separator"; else printf ' '; fi
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf '%s' "$word"; else printf '%s' "${word@Q}"; fi
  done
}

# split_words TEXT: sets WORDS to the words that a shell would make of it.
split_words() {
  mapfile -d '' -t WORDS < <("$ANY_PYTHON" -c 'import shlex, sys; [print(w, end="\0") for w in shlex.split(sys.argv[1])]' "$1")
}

# hub_name NAME: whether it looks like owner/name.
hub_name() { [[ "$1" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; }

# model_complete FOLDER: whether config and all weights that its index names are there.
model_complete() {
  local shard
  [ -f "$1/config.json" ] || return 1
  compgen -G "$1/*.safetensors" >/dev/null || return 1
  if [ -f "$1/model.safetensors.index.json" ]; then
    while read -r shard; do
      [ -f "$1/$shard" ] || return 1
    done < <(grep -o '[^"]*\.safetensors' "$1/model.safetensors.index.json" | sort -u)
  fi
}

# split_file FOLDER SPLIT: the file or folder that holds a split; fails where there is none.
split_file() {
  local candidate
  for candidate in "$1/$2.parquet" "$1/$2.jsonl" "$1/$2" "$1/data/$2"-00000-of-00001.parquet; do
    if [ -e "$candidate" ]; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  return 1
}

has_splits() { split_file "$1" train >/dev/null && split_file "$1" test >/dev/null; }

# --- what the variables mean on this machine ------------------------------------------------------------------------

check_variables() {
  local name
  for name in $(compgen -v SLIME_SCRIPT_); do
    [[ " ${KNOBS[*]} " == *" ${name#SLIME_SCRIPT_} "* ]] ||
      die "the environment has $name, which this script does not know. It knows, after SLIME_SCRIPT_: ${KNOBS[*]}."
  done
  require_whole_numbers SLIME_SCRIPT_NUM_GPUS_PER_ENGINE SLIME_SCRIPT_TEACHER_PORT SLIME_SCRIPT_TEACHER_TIMEOUT \
    SLIME_SCRIPT_TEACHER_RESTARTS
  case "$SLIME_SCRIPT_ENGINE" in
    "" | sglang | transformers) ;;
    *) die "SLIME_SCRIPT_ENGINE is $SLIME_SCRIPT_ENGINE; it must be sglang or transformers." ;;
  esac
  for name in SLIME_SCRIPT_DRY_RUN SLIME_SCRIPT_SKIP_SETUP SLIME_SCRIPT_SKIP_DOCTOR SLIME_SCRIPT_EXTERNAL_RAY; do
    case "${!name}" in 0 | 1) ;; *) die "$name is ${!name}; it must be 0 or 1." ;; esac
  done
  if [ -n "$SLIME_SCRIPT_TEACHER_URL" ]; then
    [[ "$SLIME_SCRIPT_TEACHER_URL" =~ ^https?://[^/]+(/.*)?$ ]] ||
      die "SLIME_SCRIPT_TEACHER_URL is $SLIME_SCRIPT_TEACHER_URL; it must look like http://HOST:PORT."
  fi
}

# place: sets TEACHER_GPUS, STUDENT_GPUS and the rest of what slime.ray.placement prints.
place() {
  local options=(--num-gpus "$SLIME_SCRIPT_NUM_GPUS" --gpu-ids "$(visible_gpu_ids)"
    --rollout-num-gpus-per-engine "$SLIME_SCRIPT_NUM_GPUS_PER_ENGINE" --shell)
  if [ -n "$SLIME_SCRIPT_NUM_GPUS_TEACHER" ]; then options+=(--num-gpus-teacher "$SLIME_SCRIPT_NUM_GPUS_TEACHER"); fi
  if [ -n "$SLIME_SCRIPT_NUM_GPUS_STUDENT" ]; then options+=(--num-gpus-student "$SLIME_SCRIPT_NUM_GPUS_STUDENT"); fi
  if [ -n "$SLIME_SCRIPT_ENGINE" ]; then options+=(--engine "$SLIME_SCRIPT_ENGINE"); fi
  if [ -n "$SLIME_SCRIPT_TEACHER_URL" ]; then options+=(--external-teacher); fi
  local assignments
  assignments="$("$ANY_PYTHON" -m slime.ray.placement "${options[@]}")" || die "the GPUs cannot be split that way."
  eval "$assignments"
}

# resolve_model VARIABLE: sets MODEL to the local folder; for a hub name, the one it is or will be downloaded to.
resolve_model() {
  local name="${!1}"
  if [ -e "$name" ]; then
    MODEL="$(cd "$(dirname "$name")" && pwd)/$(basename "$name")"
    model_complete "$MODEL" ||
      die "$1 is $name, and that is no complete checkpoint: it needs config.json and all its .safetensors files."
  elif hub_name "$name"; then
    MODEL="$SLIME_SCRIPT_MODEL_DIR/${name##*/}"
    model_complete "$MODEL" || DOWNLOADS+=("$name" "$MODEL" model)
  else
    die "$1 is $name, which is neither a folder nor a hub name (owner/name)."
  fi
}

# resolve_dataset: sets TRAIN_DATA and TEST_DATA.
resolve_dataset() {
  local name="$SLIME_SCRIPT_DATASET_NAME" folder
  MAKE_TINY_DATA=0
  if [ "$name" = tiny ]; then
    folder="$SLIME_SCRIPT_DATA_DIR/slime_tiny_geometry"
    MAKE_TINY_DATA=1
  elif [ -d "$name" ]; then
    folder="$(cd "$name" && pwd)"
    has_splits "$folder" ||
      die "SLIME_SCRIPT_DATASET_NAME is $name; that folder must hold train.parquet and test.parquet (or .jsonl)."
  elif hub_name "$name"; then
    folder="$SLIME_SCRIPT_DATA_DIR/${name##*/}"
    has_splits "$folder" || DOWNLOADS+=("$name" "$folder" dataset)
  else
    die "SLIME_SCRIPT_DATASET_NAME is $name, which is neither a folder nor a hub name (owner/name) nor tiny."
  fi
  DATA_FOLDER="$folder"
  find_splits
}

find_splits() {
  TRAIN_DATA="$(split_file "$DATA_FOLDER" train || echo "$DATA_FOLDER/train.parquet")"
  TEST_DATA="$(split_file "$DATA_FOLDER" test || echo "$DATA_FOLDER/test.parquet")"
}

# resolve_folders: an output folder, fresh unless one is named; absolute paths, for actors work in folders of their own.
resolve_folders() {
  local variable suffix=""
  local stem
  stem="$SLIME_REPO/outputs/opd_vlm_$(date +%Y%m%d-%H%M%S)"
  while [ -e "$stem$suffix" ]; do suffix="-$((${suffix#-} + 1))"; done
  : "${SLIME_SCRIPT_OUTPUT_DIR:=$stem$suffix}"
  for variable in SLIME_SCRIPT_OUTPUT_DIR SLIME_SCRIPT_MODEL_DIR SLIME_SCRIPT_DATA_DIR; do
    [[ "${!variable}" == /* ]] || printf -v "$variable" '%s' "$PWD/${!variable}"
  done
}

# resolve_teacher_url: sets RM_URL, the address that scores are asked from.
resolve_teacher_url() {
  RM_URL="${SLIME_SCRIPT_TEACHER_URL:-http://127.0.0.1:$SLIME_SCRIPT_TEACHER_PORT}"
  [[ "$RM_URL" =~ ^https?://[^/]+/?$ ]] && RM_URL="${RM_URL%/}/generate"
  return 0
}

# --- the training command, by theme -----------------------------------------------------------------------------------

build_train_command() {
  CKPT_ARGS=(--hf-checkpoint "$STUDENT_PATH")
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
  REWARD_ARGS=(
    --rm-type math
    --rm-url "$RM_URL"
    --custom-rm-path examples.opd_vlm.opd_vlm_reward.reward_func
    --custom-reward-post-process-path examples.opd_vlm.opd_vlm_reward.post_process_rewards
    --task-reward-weight "$SLIME_SCRIPT_TASK_REWARD_WEIGHT"
  )
  if [ -z "$SLIME_SCRIPT_TEACHER_URL" ] && [ "$SLIME_SCRIPT_TEACHER_RESTARTS" -gt 0 ]; then
    # Longer than this script waits for a restart, so that it is the first to give up, and shows the teacher's log.
    REWARD_ARGS+=(--teacher-patience "$((SLIME_SCRIPT_TEACHER_TIMEOUT + 60))")
  fi
  OPD_ARGS=(--use-opd --opd-type sglang --opd-kl-coef "$SLIME_SCRIPT_OPD_KL_COEF" --advantage-estimator grpo
    --disable-grpo-std-normalization # a weight on rewards in the reward file then means what it says
    --calculate-per-token-loss)
  OPTIM_ARGS=(--lr "$SLIME_SCRIPT_LR" --lr-decay-style constant --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.98)
  EVAL_ARGS=(--eval-prompt-data test "$TEST_DATA" --eval-interval "$SLIME_SCRIPT_EVAL_INTERVAL" --eval-rm-type math
    --eval-max-response-len "$SLIME_SCRIPT_MAX_RESPONSE_LEN" --eval-teacher)
  CLUSTER_ARGS=(--train-backend "$SLIME_SCRIPT_TRAIN_BACKEND" --engine "$ENGINE" --output-dir "$SLIME_SCRIPT_OUTPUT_DIR")
  WANDB_ARGS=()
  if [ -n "${WANDB_API_KEY:-}" ]; then WANDB_ARGS=(--use-wandb --wandb-project slime --wandb-group opd-vlm); fi
  if [ "$NUM_GPUS" = 0 ]; then
    OPTIM_ARGS+=(--train-dtype float32 --use-dynamic-batch-size --max-tokens-per-gpu 4096)
  else
    OPTIM_ARGS+=(--train-dtype bfloat16 --gradient-checkpointing --use-dynamic-batch-size --max-tokens-per-gpu 16384)
    CKPT_ARGS+=(--save "$SLIME_SCRIPT_OUTPUT_DIR/checkpoints" --save-interval 50)
    CLUSTER_ARGS+=(--actor-num-nodes 1 --actor-num-gpus-per-node "$NUM_ACTOR_GPUS" --rollout-num-gpus "$NUM_ROLLOUT_GPUS"
      --rollout-num-gpus-per-engine "$GPUS_PER_ENGINE")
  fi
  if [ "$SLIME_SCRIPT_EXTERNAL_RAY" = 1 ]; then CLUSTER_ARGS+=(--ray-address auto); fi
  split_words "$SLIME_SCRIPT_EXTRA_ARGS"
  TRAIN_ARGS=("${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${REWARD_ARGS[@]}" "${OPD_ARGS[@]}" "${OPTIM_ARGS[@]}" "${EVAL_ARGS[@]}"
    "${CLUSTER_ARGS[@]}" ${WANDB_ARGS[@]+"${WANDB_ARGS[@]}"} ${WORDS[@]+"${WORDS[@]}"})
  TRAIN_COMMAND=(env "CUDA_VISIBLE_DEVICES=$STUDENT_GPUS" "PYTHONPATH=$PYTHONPATH" "$PYTHON" -m slime.train "${TRAIN_ARGS[@]}")
}

# What the pre-flight asks is what the run will ask, of every server that the run will ask, so it is read from the run's
# own arguments.
readonly DOCTOR_OPTIONS='
import shlex
from slime.arguments import parse_args

args = parse_args()
options = {
    "--student-path": args.hf_checkpoint,
    "--max-tokens": (args.max_prompt_length or 0) + args.rollout_max_response_len,
    "--samples": args.rollout_batch_size * args.n_samples_per_prompt,
    "--image-min-pixels": args.image_min_pixels,
    "--image-max-pixels": args.image_max_pixels,
    "--timeout": args.teacher_timeout,
}
words = [word for url in args.teacher_urls for word in ("--teacher-url", url)]
words += [str(word) for option in options.items() if option[1] is not None for word in option]
print(shlex.join(words))'

# read_train_args: the run's own parser reads the command before anything is installed, downloaded or loaded. Sets
# DOCTOR_COMMAND.
read_train_args() {
  local options
  options="$("$ANY_PYTHON" -c "$DOCTOR_OPTIONS" "${TRAIN_ARGS[@]}")" ||
    die "the training command was refused; nothing has been started."
  eval "options=($options)"
  split_words "$SLIME_SCRIPT_DOCTOR_ARGS"
  DOCTOR_COMMAND=(env CUDA_VISIBLE_DEVICES= "PYTHONPATH=$PYTHONPATH" "$PYTHON" -m slime.engines.doctor "${options[@]}"
    ${WORDS[@]+"${WORDS[@]}"})
}

build_teacher_command() {
  TEACHER_COMMAND=(env "CUDA_VISIBLE_DEVICES=$TEACHER_GPUS" "PYTHONPATH=$PYTHONPATH")
  if [ "$TEACHER_ENGINE" = sglang ]; then
    TEACHER_COMMAND+=("$PYTHON" -m slime.engines.sglang_engine --role teacher --tp "$TEACHER_TP" --end-with-parent)
  else
    TEACHER_COMMAND+=(OMP_NUM_THREADS=1 "$PYTHON" -m slime.engines.transformers_engine)
  fi
  TEACHER_COMMAND+=(--model-path "$TEACHER_PATH" --host 127.0.0.1 --port "$SLIME_SCRIPT_TEACHER_PORT")
}

print_configuration() {
  local name variable
  say "$PLACEMENT"
  if [ "$NUM_GPUS" = 0 ] && [ "$SLIME_SCRIPT_DATASET_NAME" = tiny ]; then
    say "Without a GPU the tiny preset runs: tiny Qwen3-VL models on generated pictures, through the same code as the real ones."
  elif [ "$NUM_GPUS" != 0 ]; then
    say "Student $SLIME_SCRIPT_STUDENT_MODEL learns from ${SLIME_SCRIPT_TEACHER_URL:-$SLIME_SCRIPT_TEACHER_MODEL}."
  fi
  say "Configuration:"
  for name in "${KNOBS[@]}"; do
    variable="SLIME_SCRIPT_$name"
    say "  $variable=${!variable}"
  done
  say "Training command:"
  show_by_flag "${TRAIN_COMMAND[@]}"
}

# --- doing it ------------------------------------------------------------------------------------------------------------

download_missing() {
  local i
  for ((i = 0; i < ${#DOWNLOADS[@]}; i += 3)); do
    say "Downloading ${DOWNLOADS[i]} to ${DOWNLOADS[i + 1]}"
    step "$(dirname "$PYTHON")/hf" download "${DOWNLOADS[i]}" --repo-type "${DOWNLOADS[i + 2]}" --local-dir "${DOWNLOADS[i + 1]}"
  done
  if [ "$MAKE_TINY_DATA" = 1 ]; then step "$PYTHON" -m slime.tiny --data "$DATA_FOLDER"; fi
}

start_teacher() {
  local port="$SLIME_SCRIPT_TEACHER_PORT"
  if dry; then
    show "${TEACHER_COMMAND[@]}"
    return
  fi
  if port_taken "$port"; then
    die "port $port is taken, and the teacher is to listen there. Choose another by SLIME_SCRIPT_TEACHER_PORT, or end what" \
      "uses it."
  fi
  TEACHER_LOG="$SLIME_SCRIPT_OUTPUT_DIR/logs/teacher_$TEACHER_ENGINE.log"
  mkdir -p "$(dirname "$TEACHER_LOG")"
  ln -sfn "$TEACHER_LOG" "${TMPDIR:-/tmp}/teacher_sglang_$(basename "$SLIME_SCRIPT_OUTPUT_DIR").log"
  say "Starting the teacher ($TEACHER_ENGINE); its log: $TEACHER_LOG"
  launch_teacher
  wait_ready teacher "$TEACHER_PID" 127.0.0.1 "$port" "$TEACHER_LOG" "$SLIME_SCRIPT_TEACHER_TIMEOUT"
  say "The teacher is ready."
}

launch_teacher() {
  START_LOG="$TEACHER_LOG" start_own "${TEACHER_COMMAND[@]}"
  TEACHER_PID=$STARTED
}

# teacher_ended: whether there is a teacher of ours that has ended.
teacher_ended() { [ -n "${TEACHER_PID:-}" ] && ! alive "$TEACHER_PID"; }

# check_teacher: the pre-flight against the living teacher, ours or not, before anything is trained.
check_teacher() {
  local where="${SLIME_SCRIPT_TEACHER_URL:+ The teacher is SLIME_SCRIPT_TEACHER_URL=$SLIME_SCRIPT_TEACHER_URL.}"
  if [ "$SLIME_SCRIPT_SKIP_DOCTOR" = 1 ]; then return; fi
  if ! step "${DOCTOR_COMMAND[@]}"; then
    if teacher_ended; then log_tail "$TEACHER_LOG"; fi
    die "the teacher did not pass the pre-flight; what is wrong and what to do is above. Nothing has been trained.$where" \
      "SLIME_SCRIPT_DOCTOR_ARGS='--allow CHECK' lets one check pass; SLIME_SCRIPT_SKIP_DOCTOR=1 goes on without the pre-flight."
  fi
}

# train: ends with the driver. A teacher of ours that ends before is started anew.
train() {
  local status=0
  if dry; then
    show "${TRAIN_COMMAND[@]}"
    return
  fi
  start_own "${TRAIN_COMMAND[@]}"
  TRAIN_PID=$STARTED
  while alive "$TRAIN_PID"; do
    if teacher_ended; then revive_teacher; fi
    sleep 0.5
  done
  wait "$TRAIN_PID" || status=$?
  forget_own "$TRAIN_PID"
  if [ "$status" != 0 ]; then die "training ended with status $status; see above, and the logs in the output folder."; fi
}

# revive_teacher: returns once the teacher is ready again, however many restarts that takes, or training has ended.
# Training goes on meanwhile; its scoring requests are tried again for --teacher-patience seconds.
revive_teacher() {
  local give_up=$((SECONDS + SLIME_SCRIPT_TEACHER_TIMEOUT))
  while alive "$TRAIN_PID"; do
    if teacher_ended; then
      restart_teacher
    elif http_ok 127.0.0.1 "$SLIME_SCRIPT_TEACHER_PORT" /ready; then
      say "The teacher is ready again."
      return
    fi
    if [ "$SECONDS" -ge "$give_up" ]; then
      log_tail "$TEACHER_LOG"
      die "the teacher's server ended in the middle of the run and was not ready again within" \
        "$SLIME_SCRIPT_TEACHER_TIMEOUT s (SLIME_SCRIPT_TEACHER_TIMEOUT); the end of its log is above, all of it in $TEACHER_LOG"
    fi
    sleep 0.5
  done
}

# restart_teacher: starts the teacher that has ended anew, by the same command, once nothing of the old one is left; ends the
# run where SLIME_SCRIPT_TEACHER_RESTARTS are used up.
restart_teacher() {
  local status=0 port="$SLIME_SCRIPT_TEACHER_PORT" allowed="$SLIME_SCRIPT_TEACHER_RESTARTS"
  wait "$TEACHER_PID" || status=$?
  if [ "$TEACHER_RESTARTS_DONE" -ge "$allowed" ]; then
    log_tail "$TEACHER_LOG"
    die "the teacher's server ended (status $status) in the middle of the run, and its restarts are used up" \
      "($TEACHER_RESTARTS_DONE of $allowed, SLIME_SCRIPT_TEACHER_RESTARTS); the end of its log is above, all of it in $TEACHER_LOG"
  fi
  TEACHER_RESTARTS_DONE=$((TEACHER_RESTARTS_DONE + 1))
  log_tail "$TEACHER_LOG" 10
  say "The teacher's server ended (status $status) in the middle of the run; restart $TEACHER_RESTARTS_DONE of $allowed. Its log" \
    "goes on in $TEACHER_LOG"
  # On a GPU a second one beside what is left of the first would not find the memory that it needs.
  end_rest "$TEACHER_PID" "$port" ||
    die "the teacher cannot be started anew: $STOP_GRACE_SECONDS s after its end, processes of it are there or port $port is taken."
  forget_own "$TEACHER_PID"
  launch_teacher
}

say_output() { say "Output folder: $SLIME_SCRIPT_OUTPUT_DIR"; }

# resolve: everything that can be known, and be wrong, before anything is installed, downloaded or started.
resolve() {
  check_variables
  DOWNLOADS=()
  place
  SLIME_SCRIPT_ENGINE="$ENGINE"
  resolve_folders
  resolve_model SLIME_SCRIPT_STUDENT_MODEL
  STUDENT_PATH="$MODEL"
  TEACHER_PATH=""
  if [ -z "$SLIME_SCRIPT_TEACHER_URL" ]; then
    resolve_model SLIME_SCRIPT_TEACHER_MODEL
    TEACHER_PATH="$MODEL"
  fi
  resolve_dataset
  resolve_teacher_url
  build_train_command
  read_train_args
}

set_up() {
  local options=()
  if [ "$SLIME_SCRIPT_SKIP_SETUP" = 1 ]; then return; fi
  if [ "$NUM_GPUS" = 0 ] && [[ "$ENGINE $TEACHER_ENGINE" == *sglang* ]]; then options+=(--sglang-cpu); fi
  step bash "$SLIME_REPO/scripts/setup.sh" ${options[@]+"${options[@]}"}
}

main() {
  PYTHON="$(environment_folder)/bin/python"
  # Before the set-up any Python will do: placement and arguments need nothing but the standard library.
  ANY_PYTHON="$PYTHON"
  if [ ! -x "$PYTHON" ]; then ANY_PYTHON="$(base_python)"; fi
  if [ "$SLIME_SCRIPT_SKIP_SETUP" = 1 ]; then PYTHON="$ANY_PYTHON"; fi
  export PYTHONPATH="$SLIME_REPO${PYTHONPATH:+:$PYTHONPATH}"
  # Guards the control endpoints of all servers of this run; in the environment, never on a command line.
  export SLIME_ENGINE_ADMIN_KEY="${SLIME_ENGINE_ADMIN_KEY:-$(random_key)}"
  resolve
  # SGLang takes a while to give GPU memory back; killed in between it may keep it.
  if [ "$NUM_GPUS" != 0 ]; then STOP_GRACE_SECONDS=60; fi
  end_with_script say_output
  say_output
  print_configuration

  set_up
  dry || mkdir -p "$SLIME_SCRIPT_OUTPUT_DIR"
  download_missing
  find_splits
  build_train_command
  if [ -z "$SLIME_SCRIPT_TEACHER_URL" ]; then
    build_teacher_command
    start_teacher
  fi
  check_teacher
  train
}

main
