# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the launchers
# The teacher of a launcher: its server is started, waited for, examined, started anew where it dies, and ended with the
# script; or it runs elsewhere. Sourced after launch.sh, never run.

WITH_TEACHER=1
TEACHER_RESTARTS_DONE=0

# --- defaults: each variable keeps what the environment says ------------------------------------------------------
: "${SLIME_SCRIPT_NUM_GPUS_TEACHER:=}"           # empty: half of the GPUs
: "${SLIME_SCRIPT_NUM_GPUS_STUDENT:=}"           # empty: the other half
: "${SLIME_SCRIPT_TEACHER_URL:=}"                # a teacher that runs elsewhere; none is started here then
: "${SLIME_SCRIPT_TEACHER_PORT:=13141}"
: "${SLIME_SCRIPT_TEACHER_TIMEOUT:=$([ "$SLIME_SCRIPT_NUM_GPUS" = 0 ] && echo 300 || echo 1800)}" # seconds until it is ready
: "${SLIME_SCRIPT_TEACHER_RESTARTS:=3}"          # how often a teacher that dies in the middle of the run is started anew
: "${SLIME_SCRIPT_DOCTOR_ARGS:=}"                # appended to the pre-flight: --allow chat-template, say
: "${SLIME_SCRIPT_SKIP_DOCTOR:=0}"               # 1: train without the pre-flight against the teacher
require_whole_numbers SLIME_SCRIPT_NUM_GPUS_TEACHER SLIME_SCRIPT_NUM_GPUS_STUDENT

# student_gpus: how many GPUs the student has by default, or as told.
student_gpus() { echo "${SLIME_SCRIPT_NUM_GPUS_STUDENT:-$((SLIME_SCRIPT_NUM_GPUS / 2))}"; }

# --- what the variables mean on this machine ------------------------------------------------------------------------

check_teacher_variables() {
  require_whole_numbers SLIME_SCRIPT_TEACHER_PORT SLIME_SCRIPT_TEACHER_TIMEOUT SLIME_SCRIPT_TEACHER_RESTARTS
  require_switches SLIME_SCRIPT_SKIP_DOCTOR
  if [ -n "$SLIME_SCRIPT_TEACHER_URL" ]; then
    [[ "$SLIME_SCRIPT_TEACHER_URL" =~ ^https?://[^/]+(/.*)?$ ]] ||
      die "SLIME_SCRIPT_TEACHER_URL is $(masked "$SLIME_SCRIPT_TEACHER_URL"); it must look like http://HOST:PORT."
  fi
}

# teacher_placement: sets TEACHER_PLACEMENT, what slime.ray.placement must know of the teacher.
teacher_placement() {
  TEACHER_PLACEMENT=(--teacher "$([ -n "$SLIME_SCRIPT_TEACHER_URL" ] && echo elsewhere || echo here)")
  if [ -n "$SLIME_SCRIPT_NUM_GPUS_TEACHER" ]; then TEACHER_PLACEMENT+=(--num-gpus-teacher "$SLIME_SCRIPT_NUM_GPUS_TEACHER"); fi
  if [ -n "$SLIME_SCRIPT_NUM_GPUS_STUDENT" ]; then TEACHER_PLACEMENT+=(--num-gpus-student "$SLIME_SCRIPT_NUM_GPUS_STUDENT"); fi
}

# resolve_teacher: sets TEACHER_PATH; RM_URL, the address that scores are asked from; PATIENCE_ARGS, the flags with which
# a run outlasts its restart.
resolve_teacher() {
  TEACHER_PATH=""
  PATIENCE_ARGS=()
  if [ -z "$SLIME_SCRIPT_TEACHER_URL" ]; then
    resolve_model SLIME_SCRIPT_TEACHER_MODEL
    TEACHER_PATH="$MODEL"
    if [ "$SLIME_SCRIPT_TEACHER_RESTARTS" -gt 0 ]; then
      # Longer than this script waits for a restart, so that it is the first to give up, and shows the teacher's log.
      PATIENCE_ARGS=(--teacher-patience "$((SLIME_SCRIPT_TEACHER_TIMEOUT + 60))")
    fi
  fi
  RM_URL="${SLIME_SCRIPT_TEACHER_URL:-http://127.0.0.1:$SLIME_SCRIPT_TEACHER_PORT}"
  [[ "$RM_URL" =~ ^https?://[^/]+/?$ ]] && RM_URL="${RM_URL%/}/generate"
  return 0
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

# build_doctor_command: reads the training command, and sets DOCTOR_COMMAND from it.
build_doctor_command() {
  local options
  options="$(read_train_args "$DOCTOR_OPTIONS")" || exit 1
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
    if [[ " $SLIME_SCRIPT_EXTRA_ARGS " == *" --deterministic-rollout "* ]]; then TEACHER_COMMAND+=(--deterministic); fi
  fi
  TEACHER_COMMAND+=(--model-path "$TEACHER_PATH" --host 127.0.0.1 --port "$SLIME_SCRIPT_TEACHER_PORT")
}

# --- doing it ------------------------------------------------------------------------------------------------------------

# ready_teacher: returns once there is a teacher that has passed the pre-flight.
ready_teacher() {
  if [ -z "$SLIME_SCRIPT_TEACHER_URL" ]; then
    build_teacher_command
    start_teacher
  fi
  check_teacher
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
  local where="${SLIME_SCRIPT_TEACHER_URL:+ The teacher is SLIME_SCRIPT_TEACHER_URL=$(masked "$SLIME_SCRIPT_TEACHER_URL").}"
  if [ "$SLIME_SCRIPT_SKIP_DOCTOR" = 1 ]; then return; fi
  if ! step "${DOCTOR_COMMAND[@]}"; then
    if teacher_ended; then log_tail "$TEACHER_LOG"; fi
    die "the teacher did not pass the pre-flight; what is wrong and what to do is above. Nothing has been trained.$where" \
      "SLIME_SCRIPT_DOCTOR_ARGS='--allow CHECK' lets one check pass; SLIME_SCRIPT_SKIP_DOCTOR=1 goes on without the pre-flight."
  fi
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
    die "the teacher cannot be started anew: $REST_SECONDS s after its end, processes of it are there or port $port is taken."
  forget_own "$TEACHER_PID"
  launch_teacher
}
