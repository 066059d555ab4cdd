# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the launchers
# What the examples' launchers share: variables and what they mean on this machine, the dry run, downloads, the training
# command, training, the end. Sourced, never run; a launcher with a teacher sources teacher.sh after it.
#
# A launcher sets the defaults of its own variables, then:
#   RUN_NAME            how its output folders and its Weights & Biases group are called
#   TINY_SET            what DATASET_NAME=tiny stands for: geometry or words (python -m slime.tiny)
#   TINY_PRESET         what runs without a GPU, in words
#   KNOBS               its variables without the prefix SLIME_SCRIPT_, in the order in which they are printed
#   build_train_args    a function that sets TRAIN_ARGS from the paths and arrays below
# and calls `launch`, which resolves, before build_train_args:
#   STUDENT_PATH TRAIN_DATA TEST_DATA NUM_GPUS ENGINE    (with a teacher: RM_URL PATIENCE_ARGS)
#   SAVE_ARGS           checkpoints, the trained model, and what an earlier run in this folder left to go on from
#   PRECISION_ARGS      the precision and size of a forward pass on this machine
# shellcheck source=scripts/lib.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/lib.sh"

# --- defaults that all launchers share: each variable keeps what the environment says -----------------------------
: "${SLIME_SCRIPT_NUM_GPUS:=$(visible_gpu_ids | tr ',' '\n' | grep -c . || true)}"
: "${SLIME_SCRIPT_NUM_GPUS_PER_ENGINE:=1}"       # tensor parallelism of each of the student's engines
: "${SLIME_SCRIPT_ENGINE:=}"                     # sglang or transformers; empty: as the placement says
: "${SLIME_SCRIPT_COLOCATE:=}"                  # 1: training and generation take turns on the student's GPUs; empty: as the placement says
: "${SLIME_SCRIPT_TRAIN_BACKEND:=$([ "$SLIME_SCRIPT_NUM_GPUS" = 0 ] && echo fsdp || echo megatron)}"
: "${SLIME_SCRIPT_EXTERNAL_RAY:=0}"              # 1: use the Ray cluster that is there
: "${SLIME_SCRIPT_MODEL_DIR:=$HOME/models}"
: "${SLIME_SCRIPT_DATA_DIR:=$HOME/datasets}"
: "${SLIME_SCRIPT_OUTPUT_DIR:=}"                 # empty: a fresh folder under outputs/
: "${SLIME_SCRIPT_EXTRA_ARGS:=}"                 # appended to the training command; a flag given twice counts as given last
: "${SLIME_SCRIPT_SKIP_SETUP:=0}"                # 1: the active environment is ready (a container, say); install nothing
: "${SLIME_SCRIPT_SKIP_PREFLIGHT:=0}"            # 1: start without looking at the machine first
: "${SLIME_SCRIPT_DRY_RUN:=0}"                   # 1: print every command, run none
require_whole_numbers SLIME_SCRIPT_NUM_GPUS
WITH_TEACHER=0                                   # teacher.sh sets it to 1
SMALL_MODELS_NOTE=""                             # what fits where one GPU holds all of them
TINY_CHECKPOINTS="$SLIME_REPO/slime/tiny/checkpoints"

# --- small helpers ------------------------------------------------------------------------------------------------

dry() { [ "$SLIME_SCRIPT_DRY_RUN" = 1 ]; }

with_teacher() { [ "$WITH_TEACHER" = 1 ]; }

# step COMMAND...: runs it as a process of ours; a dry run prints it.
step() {
  if dry; then show "$@"; else run_own "$@"; fi
}

# show COMMAND...: prints it as one line that can be pasted.
show() { printf '+%s\n' "$(quoted ' ' "$@")"; }

# show_by_flag COMMAND...: the same with one flag a line.
show_by_flag() { printf '  %s\n' "$(quoted $' \\\n    ' "$@")"; }

# masked TEXT: with user and password of a URL left out, for what is printed may be kept.
masked() {
  if [[ "$1" =~ ^(.*://)[^/?#@]+@(.*)$ ]]; then printf '%s***@%s' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"; else printf '%s' "$1"; fi
}

# quoted SEPARATOR WORD...: the words as a shell reads them, SEPARATOR instead of a space before each flag.
quoted() {
  local separator=$1 word
  shift
  for word in "$@"; do
    if [[ "$word" == --* ]]; then printf '%s' "$separator"; else printf ' '; fi
    word="$(masked "$word")"
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

# whole_file FOLDER: the file of a set that has no splits, called like its folder (dapo-math-17k/dapo-math-17k.jsonl).
whole_file() {
  local candidate
  for candidate in "$1/${1##*/}.jsonl" "$1/${1##*/}.parquet"; do
    if [ -e "$candidate" ]; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  return 1
}

# has_splits FOLDER SPLIT...: whether it holds them; of a single one the whole set will do.
has_splits() {
  local folder=$1 split
  shift
  if [ "$#" = 1 ] && whole_file "$folder" >/dev/null; then return 0; fi
  for split in "$@"; do
    split_file "$folder" "$split" >/dev/null || return 1
  done
}

# --- what the variables mean on this machine ------------------------------------------------------------------------

check_variables() {
  local name
  for name in $(compgen -v SLIME_SCRIPT_); do
    [[ " ${KNOBS[*]} " == *" ${name#SLIME_SCRIPT_} "* ]] ||
      die "the environment has $name, which this script does not know. It knows, after SLIME_SCRIPT_: ${KNOBS[*]}."
  done
  require_whole_numbers SLIME_SCRIPT_NUM_GPUS_PER_ENGINE
  case "$SLIME_SCRIPT_ENGINE" in
    "" | sglang | transformers) ;;
    *) die "SLIME_SCRIPT_ENGINE is $SLIME_SCRIPT_ENGINE; it must be sglang or transformers." ;;
  esac
  if [ -n "$SLIME_SCRIPT_COLOCATE" ]; then require_switches SLIME_SCRIPT_COLOCATE; fi
  require_switches SLIME_SCRIPT_DRY_RUN SLIME_SCRIPT_SKIP_SETUP SLIME_SCRIPT_SKIP_PREFLIGHT SLIME_SCRIPT_EXTERNAL_RAY
  if with_teacher; then check_teacher_variables; fi
}

# require_switches VARIABLE...: ends with a message unless each is 0 or 1.
require_switches() {
  local name
  for name in "$@"; do
    case "${!name}" in 0 | 1) ;; *) die "$name is ${!name}; it must be 0 or 1." ;; esac
  done
}

# place: sets TEACHER_GPUS, STUDENT_GPUS and the rest of what slime.ray.placement prints.
place() {
  local options=(--num-gpus "$SLIME_SCRIPT_NUM_GPUS" --gpu-ids "$(visible_gpu_ids)"
    --rollout-num-gpus-per-engine "$SLIME_SCRIPT_NUM_GPUS_PER_ENGINE" --shell)
  if [ -n "$SLIME_SCRIPT_ENGINE" ]; then options+=(--engine "$SLIME_SCRIPT_ENGINE"); fi
  if [ -n "$SLIME_SCRIPT_COLOCATE" ]; then options+=(--colocate "$SLIME_SCRIPT_COLOCATE"); fi
  if with_teacher; then
    teacher_placement
    options+=("${TEACHER_PLACEMENT[@]}")
  else
    options+=(--teacher none)
  fi
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

# resolve_data: sets TRAIN_DATA and TEST_DATA, of one set with both splits or, with EVAL_DATASET_NAME, of two.
resolve_data() {
  TINY_FOLDER=""
  if [ -n "${SLIME_SCRIPT_EVAL_DATASET_NAME:-}" ]; then
    resolve_dataset SLIME_SCRIPT_DATASET_NAME train
    TRAIN_FOLDER="$DATA_FOLDER"
    resolve_dataset SLIME_SCRIPT_EVAL_DATASET_NAME test
    TEST_FOLDER="$DATA_FOLDER"
  else
    resolve_dataset SLIME_SCRIPT_DATASET_NAME train test
    TRAIN_FOLDER="$DATA_FOLDER"
    TEST_FOLDER="$DATA_FOLDER"
  fi
  find_data
}

# resolve_dataset VARIABLE SPLIT...: sets DATA_FOLDER, where the splits are or will be.
resolve_dataset() {
  local name="${!1}" files
  files="$(printf '%s.parquet and ' "${@:2}")"
  if [ "$name" = tiny ]; then
    DATA_FOLDER="$SLIME_SCRIPT_DATA_DIR/slime_tiny_$TINY_SET"
    TINY_FOLDER="$DATA_FOLDER"
  elif [ -d "$name" ]; then
    DATA_FOLDER="$(cd "$name" && pwd)"
    has_splits "$DATA_FOLDER" "${@:2}" || die "$1 is $name; that folder must hold ${files% and } (or .jsonl)."
  elif hub_name "$name"; then
    DATA_FOLDER="$SLIME_SCRIPT_DATA_DIR/${name##*/}"
    has_splits "$DATA_FOLDER" "${@:2}" || DOWNLOADS+=("$name" "$DATA_FOLDER" dataset)
  else
    die "$1 is $name, which is neither a folder nor a hub name (owner/name) nor tiny."
  fi
}

# find_data: again after a download, which shows how the files are called.
find_data() {
  TRAIN_DATA="$(data_file "$TRAIN_FOLDER" train)"
  TEST_DATA="$(data_file "$TEST_FOLDER" test)"
}

# data_file FOLDER SPLIT: the file of a split, or where it is expected once it is there.
data_file() {
  if split_file "$1" "$2"; then return; fi
  if [ "$TRAIN_FOLDER" = "$TEST_FOLDER" ]; then
    printf '%s\n' "$1/$2.parquet"
  else
    whole_file "$1" || printf '%s\n' "$1/${1##*/}.jsonl"
  fi
}

# resolve_folders: an output folder, fresh unless one is named; absolute paths, for actors work in folders of their own.
resolve_folders() {
  local variable suffix=""
  local stem
  stem="$SLIME_REPO/outputs/${RUN_NAME}_$(date +%Y%m%d-%H%M%S)"
  while [ -e "$stem$suffix" ]; do suffix="-$((${suffix#-} + 1))"; done
  : "${SLIME_SCRIPT_OUTPUT_DIR:=$stem$suffix}"
  for variable in SLIME_SCRIPT_OUTPUT_DIR SLIME_SCRIPT_MODEL_DIR SLIME_SCRIPT_DATA_DIR; do
    [[ "${!variable}" == /* ]] || printf -v "$variable" '%s' "$PWD/${!variable}"
  done
}

# --- the training command ---------------------------------------------------------------------------------------------

# build_train_command: what the launcher wants, then what this machine needs, then the user's own flags.
build_train_command() {
  local cluster wandb=()
  cluster=(--train-backend "$SLIME_SCRIPT_TRAIN_BACKEND" --engine "$ENGINE" --output-dir "$SLIME_SCRIPT_OUTPUT_DIR")
  if [ "$NUM_GPUS" = 0 ]; then
    save_args 10
    PRECISION_ARGS=(--train-dtype float32 --use-dynamic-batch-size --max-tokens-per-gpu 4096)
    # All at once, the short responses would end together and the teacher begin when the engine is done.
    cluster+=(--rollout-concurrency 64)
  else
    save_args 50
    PRECISION_ARGS=(--train-dtype bfloat16 --gradient-checkpointing --use-dynamic-batch-size --max-tokens-per-gpu 16384)
    cluster+=(--actor-num-nodes 1 --actor-num-gpus-per-node "$NUM_ACTOR_GPUS" --rollout-num-gpus "$NUM_ROLLOUT_GPUS"
      --rollout-num-gpus-per-engine "$GPUS_PER_ENGINE")
    if [ "$SLIME_SCRIPT_TRAIN_BACKEND" = megatron ]; then
      megatron_args
      cluster+=("${MEGATRON_ARGS[@]}")
    fi
  fi
  cluster+=(--weight-sync "$WEIGHT_SYNC")
  if [ "$COLOCATED" = 1 ]; then cluster+=(--colocate); fi
  if [ "$SLIME_SCRIPT_EXTERNAL_RAY" = 1 ]; then cluster+=(--ray-address auto); fi
  if [ -n "${WANDB_API_KEY:-}" ]; then wandb=(--use-wandb --wandb-project slime --wandb-group "${RUN_NAME//_/-}"); fi
  build_train_args
  split_words "$SLIME_SCRIPT_EXTRA_ARGS"
  TRAIN_ARGS+=("${cluster[@]}" ${wandb[@]+"${wandb[@]}"} ${WORDS[@]+"${WORDS[@]}"})
  TRAIN_COMMAND=(env "CUDA_VISIBLE_DEVICES=$STUDENT_GPUS" "PYTHONPATH=$PYTHONPATH" "$PYTHON" -m slime.train "${TRAIN_ARGS[@]}")
}

# save_args INTERVAL: sets SAVE_ARGS. A folder that holds a checkpoint is gone on with.
save_args() {
  local folder="$SLIME_SCRIPT_OUTPUT_DIR/checkpoints"
  SAVE_ARGS=(--save "$folder" --save-interval "$1" --save-hf-interval 0)
  if has_checkpoint; then SAVE_ARGS+=(--load "$folder"); fi
}

has_checkpoint() { compgen -G "$SLIME_SCRIPT_OUTPUT_DIR/checkpoints/rollout-*/state.json" >/dev/null; }

# say_resumed: says where an earlier run stands, unless the user's flags name another place.
say_resumed() {
  local name number
  if ! has_checkpoint || [[ " $SLIME_SCRIPT_EXTRA_ARGS" == *" --load"[\ =]* ]]; then return; fi
  name="$(cat "$SLIME_SCRIPT_OUTPUT_DIR/checkpoints/latest" 2>/dev/null)" || name=""
  if [[ ! "$name" =~ ^rollout-0*([0-9]+)$ ]]; then
    say "Resuming from $SLIME_SCRIPT_OUTPUT_DIR/checkpoints"
    return
  fi
  number=${BASH_REMATCH[1]}
  say "Resuming from $SLIME_SCRIPT_OUTPUT_DIR/checkpoints/$name (rollout $number of $SLIME_SCRIPT_NUM_ROLLOUT)"
  if [ "$number" -ge "$SLIME_SCRIPT_NUM_ROLLOUT" ]; then
    say "This run is complete; only its last evaluation is made again. A larger SLIME_SCRIPT_NUM_ROLLOUT goes on with it."
  fi
}

# megatron_args: sets MEGATRON_ARGS, what --train-backend megatron needs of this model on these GPUs. EXTRA_ARGS come after
# it, and the last one counts.
megatron_args() {
  local name="${SLIME_SCRIPT_STUDENT_MODEL##*/}" wanted size=1
  name="${name#Qwen3-VL-}"
  name="${name%-Thinking}"
  name="${name%-Instruct}"
  MODEL_ARGS=()
  if [ -f "$SLIME_REPO/scripts/models/qwen3-vl-$name.sh" ]; then
    # shellcheck source=scripts/models/qwen3-vl-4B.sh
    source "$SLIME_REPO/scripts/models/qwen3-vl-$name.sh"
  fi
  MEGATRON_ARGS=(${MODEL_ARGS[@]+"${MODEL_ARGS[@]}"} --use-distributed-optimizer)
  local mixture=0
  if [[ " ${MODEL_ARGS[*]-} " == *" --num-experts "* ]]; then mixture=1; fi
  # Layers are split over half of the student's GPUs and at most 4, as in the recipe; experts over at most 8.
  local gpus
  IFS=, read -ra gpus <<<"$STUDENT_GPUS"
  wanted=$((${#gpus[@]} / 2 > 4 ? 4 : ${#gpus[@]} / 2))
  if [ "$mixture" = 1 ]; then wanted=8; fi
  while [ $((size * 2)) -le "$wanted" ] && [ $((NUM_ACTOR_GPUS % (size * 2))) = 0 ]; do size=$((size * 2)); done
  if [ "$size" = 1 ]; then return; fi
  if [ "$mixture" = 1 ]; then
    MEGATRON_ARGS+=(--expert-model-parallel-size "$size" --expert-tensor-parallel-size 1)
  else
    MEGATRON_ARGS+=(--tensor-model-parallel-size "$size" --sequence-parallel)
  fi
}

# read_train_args PROGRAM: the run's own parser reads the command before anything is installed, downloaded or loaded;
# PROGRAM gets the training flags, calls it, and may print what it found.
read_train_args() {
  "$ANY_PYTHON" -c "$1" "${TRAIN_ARGS[@]}" || die "the training command was refused; nothing has been started."
}

print_configuration() {
  local name variable
  say "$PLACEMENT"
  if [ "$SMALL_MODELS" = 1 ] && [ -n "$SMALL_MODELS_NOTE" ]; then say "  $SMALL_MODELS_NOTE"; fi
  if [ "$NUM_GPUS" = 0 ] && [ "$SLIME_SCRIPT_DATASET_NAME" = tiny ]; then
    say "Without a GPU the tiny preset runs: $TINY_PRESET, through the same code as the real ones."
  elif [ "$NUM_GPUS" != 0 ]; then
    local signal="the task's reward"
    if with_teacher; then signal="$(masked "${SLIME_SCRIPT_TEACHER_URL:-$SLIME_SCRIPT_TEACHER_MODEL}")"; fi
    say "Student $SLIME_SCRIPT_STUDENT_MODEL learns from $signal."
  fi
  say_resumed
  say "Configuration:"
  for name in "${KNOBS[@]}"; do
    variable="SLIME_SCRIPT_$name"
    say "  $variable=$(masked "${!variable}")"
  done
  say "Training command:"
  show_by_flag "${TRAIN_COMMAND[@]}"
}

# --- doing it ------------------------------------------------------------------------------------------------------------

set_up() {
  local options=()
  if [ "$SLIME_SCRIPT_SKIP_SETUP" = 1 ]; then return; fi
  if [ "$NUM_GPUS" = 0 ] && [[ "$ENGINE $TEACHER_ENGINE" == *sglang* ]]; then options+=(--sglang-cpu); fi
  step bash "$SLIME_REPO/scripts/setup.sh" ${options[@]+"${options[@]}"}
}

# check_machine [before-downloads]: the preflight of the machine, before any model is loaded; all problems come at once. Before
# downloads it looks at what is known by then, the room for them included.
check_machine() {
  local i options=(--student-gpus "$STUDENT_GPUS" --writes SLIME_SCRIPT_OUTPUT_DIR "$SLIME_SCRIPT_OUTPUT_DIR")
  if [ "$SLIME_SCRIPT_SKIP_PREFLIGHT" = 1 ]; then return; fi
  if with_teacher && [ -n "$TEACHER_PATH" ]; then
    options+=(--teacher-path "$TEACHER_PATH" --teacher-gpus "$TEACHER_GPUS" --teacher-engine "$TEACHER_ENGINE"
      --teacher-port "$SLIME_SCRIPT_TEACHER_PORT")
  fi
  if [ "${1:-}" = before-downloads ]; then
    options+=(--writes SLIME_SCRIPT_MODEL_DIR "$SLIME_SCRIPT_MODEL_DIR" --writes SLIME_SCRIPT_DATA_DIR "$SLIME_SCRIPT_DATA_DIR")
    for ((i = 0; i < ${#DOWNLOADS[@]}; i += 3)); do options+=(--coming "${DOWNLOADS[@]:i:3}"); done
    if [ -n "$TINY_FOLDER" ]; then options+=(--coming tiny "$TINY_FOLDER" dataset); fi
  fi
  step env "CUDA_VISIBLE_DEVICES=$STUDENT_GPUS" "PYTHONPATH=$PYTHONPATH" "$PYTHON" -m slime.preflight "${options[@]}" \
    -- "${TRAIN_ARGS[@]}" ||
    die "this run cannot work here; what is wrong and what to do is above. No model has been loaded." \
      "SLIME_SCRIPT_SKIP_PREFLIGHT=1 starts it all the same."
}

download_missing() {
  local i
  for ((i = 0; i < ${#DOWNLOADS[@]}; i += 3)); do
    say "Downloading ${DOWNLOADS[i]} to ${DOWNLOADS[i + 1]}"
    step "$(dirname "$PYTHON")/hf" download "${DOWNLOADS[i]}" --repo-type "${DOWNLOADS[i + 2]}" --local-dir "${DOWNLOADS[i + 1]}"
  done
  if [ -n "$TINY_FOLDER" ]; then
    local set=()
    if [ "$TINY_SET" != geometry ]; then set=(--set "$TINY_SET"); fi
    step "$PYTHON" -m slime.tiny --data "$TINY_FOLDER" ${set[@]+"${set[@]}"}
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
    if with_teacher && teacher_ended; then revive_teacher; fi
    sleep 0.5
  done
  wait "$TRAIN_PID" || status=$?
  forget_own "$TRAIN_PID"
  if [ "$status" != 0 ]; then die "training ended with status $status; see above, and the logs in the output folder."; fi
}

say_output() { say "Output folder: $SLIME_SCRIPT_OUTPUT_DIR"; }

# resolve: everything that can be known, and be wrong, before anything is installed, downloaded or started.
resolve() {
  check_variables
  DOWNLOADS=()
  place
  SLIME_SCRIPT_ENGINE="$ENGINE"
  SLIME_SCRIPT_COLOCATE="$COLOCATED"
  resolve_folders
  resolve_model SLIME_SCRIPT_STUDENT_MODEL
  STUDENT_PATH="$MODEL"
  if with_teacher; then resolve_teacher; fi
  resolve_data
  build_train_command
  if with_teacher; then
    build_doctor_command
  else
    read_train_args 'from slime.arguments import parse_args; parse_args()'
  fi
}

# launch: the whole of it.
launch() {
  PYTHON="$(environment_folder)/bin/python"
  # Before the set-up any Python will do: placement and arguments need nothing but the standard library.
  ANY_PYTHON="$PYTHON"
  if [ ! -x "$PYTHON" ]; then ANY_PYTHON="$(base_python)"; fi
  if [ "$SLIME_SCRIPT_SKIP_SETUP" = 1 ]; then PYTHON="$ANY_PYTHON"; fi
  export PYTHONPATH="$SLIME_REPO${PYTHONPATH:+:$PYTHONPATH}"
  # Guards the control endpoints of all servers of this run; in the environment, never on a command line.
  export SLIME_ENGINE_ADMIN_KEY="${SLIME_ENGINE_ADMIN_KEY:-$(random_key)}"
  resolve
  # At its end a run finishes the training that it is in, and saves. SGLang takes a while to give GPU memory back; killed in
  # between it may keep it. Who has nothing to do ends at once, whatever the limit.
  if [ "$NUM_GPUS" != 0 ]; then STOP_GRACE_SECONDS=900; fi
  end_with_script say_output
  say_output
  print_configuration

  set_up
  if [ "${#DOWNLOADS[@]}" != 0 ]; then check_machine before-downloads; fi
  download_missing
  find_data
  build_train_command
  check_machine
  dry || mkdir -p "$SLIME_SCRIPT_OUTPUT_DIR"
  if with_teacher; then ready_teacher; fi
  train
}
