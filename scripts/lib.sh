# shellcheck shell=bash
# What the project's scripts share: messages, the environment's Python, and processes that are started, waited for
# and ended by the script that started them. Sourced, never run. Nothing here ends a process it did not start.

SLIME_REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly SLIME_REPO

say() { printf '%s\n' "$*"; }

die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# require_whole_numbers VARIABLE...: ends with a message unless each is empty or a whole number.
require_whole_numbers() {
  local variable
  for variable in "$@"; do
    [[ "${!variable}" =~ ^[0-9]*$ ]] || die "$variable is ${!variable}; it must be a whole number."
  done
}

# environment_folder: the active virtual environment, else .venv in the repository. Conda's base environment does not
# count as active: it is everybody's.
environment_folder() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    printf '%s\n' "$VIRTUAL_ENV"
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    printf '%s\n' "$CONDA_PREFIX"
  else
    printf '%s\n' "$SLIME_REPO/.venv"
  fi
}

# first_python CANDIDATE...: the first that is Python 3.11 or newer. A pyenv shim can be there and not run: it is tried.
first_python() {
  local candidate
  for candidate in "$@"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# base_python: the Python that makes environments: SLIME_SETUP_PYTHON, else the first that fits.
base_python() {
  if [ -n "${SLIME_SETUP_PYTHON:-}" ]; then
    first_python "$SLIME_SETUP_PYTHON" && return 0
    die "SLIME_SETUP_PYTHON is $SLIME_SETUP_PYTHON, which is no Python 3.11 or newer. Name one that is, or unset it."
  fi
  first_python python3.11 python3.12 python3.13 python3 python && return 0
  die "no Python 3.11 or newer was found (tried python3.11, python3.12, python3.13, python3, python)." \
    "Install one, or name it by SLIME_SETUP_PYTHON=/path/to/python3.11."
}

# has_gpu: whether the driver lists at least one GPU.
has_gpu() { [ "$(gpu_count)" -gt 0 ]; }

gpu_count() {
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  else
    echo 0
  fi
}

# visible_gpu_ids: the GPUs that programs may use, as CUDA_VISIBLE_DEVICES has them; an empty line where there is none.
visible_gpu_ids() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    printf '%s\n' "$CUDA_VISIBLE_DEVICES"
  else
    local count
    count="$(gpu_count)"
    if [ "$count" -gt 0 ]; then seq -s , 0 $((count - 1)); else echo; fi
  fi
}

# random_key: 128 random bits in hex.
random_key() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

# port_taken PORT [HOST]: whether something answers there.
port_taken() { (exec 3<>"/dev/tcp/${2:-127.0.0.1}/$1") 2>/dev/null; }

# http_ok HOST PORT PATH: whether a GET there is answered with status 200.
http_ok() {
  (
    exec 3<>"/dev/tcp/$1/$2" || exit 1
    printf 'GET %s HTTP/1.0\r\nHost: %s\r\nConnection: close\r\n\r\n' "$3" "$1" >&3
    IFS= read -r -t 10 status <&3 || exit 1
    [[ "$status" == HTTP/1.?\ 200* ]]
  ) 2>/dev/null
}

# --- processes of our own ---------------------------------------------------------------------------------------
OWN_PIDS=()
STOP_GRACE_SECONDS="${STOP_GRACE_SECONDS:-60}"

# start_own COMMAND...: runs it in the background as the leader of a process group of its own; its PID is in STARTED.
# The group keeps a Ctrl-C at the terminal away from it: ending is this script's business, in its own order.
# With START_LOG=FILE before it, its output is appended to that file.
start_own() {
  set -m
  if [ -n "${START_LOG:-}" ]; then
    "$@" </dev/null >>"$START_LOG" 2>&1 &
  else
    "$@" </dev/null &
  fi
  STARTED=$!
  set +m
  OWN_PIDS+=("$STARTED")
}

# run_own COMMAND...: start_own, then wait. Unlike a foreground command this lets a signal be answered at once.
run_own() {
  local pid status=0
  start_own "$@"
  pid=$STARTED
  wait "$pid" || status=$?
  forget_own "$pid"
  return "$status"
}

forget_own() {
  local pid kept=()
  for pid in ${OWN_PIDS[@]+"${OWN_PIDS[@]}"}; do
    [ "$pid" = "$1" ] || kept+=("$pid")
  done
  OWN_PIDS=(${kept[@]+"${kept[@]}"})
}

# alive PID: whether a process that start_own started still runs.
alive() { kill -0 "$1" 2>/dev/null; }

# group_alive PID: whether a process of this leader's group still runs. What has ended and is never reaped (a container's
# first process may not do it) does not count.
group_alive() {
  local file line state group
  kill -0 -- "-$1" 2>/dev/null || return 1
  for file in /proc/[0-9]*/stat; do
    read -r line 2>/dev/null <"$file" || continue
    # PID (NAME) STATE PARENT GROUP …; a name may hold spaces and brackets
    read -r state _ group _ <<<"${line##*) }"
    if [ "$group" = "$1" ] && [ "$state" != Z ]; then return 0; fi
  done
  return 1
}

# end_rest PID PORT: of a leader that has ended, ends what is left of its group; returns once that is gone and nothing
# answers at its port, and fails where it takes longer than REST_SECONDS.
REST_SECONDS="${REST_SECONDS:-60}"
end_rest() {
  local ticks=$((REST_SECONDS * 10))
  kill -KILL -- "-$1" 2>/dev/null || true
  while group_alive "$1" || port_taken "$2"; do
    if [ "$ticks" -le 0 ]; then return 1; fi
    sleep 0.1
    ticks=$((ticks - 1))
  done
}

# stop_pid PID: asks the leader to end, gives it STOP_GRACE_SECONDS, then ends what is left of its group.
stop_pid() {
  local pid=$1 ticks=$((STOP_GRACE_SECONDS * 10))
  kill -TERM "$pid" 2>/dev/null || true
  while alive "$pid" && [ "$ticks" -gt 0 ]; do
    sleep 0.1
    ticks=$((ticks - 1))
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
}

# stop_own: ends all that start_own started and nothing else, the newest first.
stop_own() {
  local i
  for ((i = ${#OWN_PIDS[@]} - 1; i >= 0; i--)); do
    stop_pid "${OWN_PIDS[$i]}"
  done
  OWN_PIDS=()
}

# end_with_script [COMMAND]: stop_own on every exit path, then COMMAND, with the exit codes that a shell gives for signals.
end_with_script() {
  AT_EXIT="${1:-true}"
  trap 'status=$?; trap "" INT TERM HUP; stop_own; "$AT_EXIT"; exit "$status"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
}

# wait_ready NAME PID HOST PORT LOG SECONDS: returns once GET /ready is answered with 200; shows the log's tail and
# fails when the process ends first or the time is over.
wait_ready() {
  local name=$1 pid=$2 host=$3 port=$4 log=$5 limit=$6 begin=$SECONDS
  until http_ok "$host" "$port" /ready; do
    if ! alive "$pid"; then
      log_tail "$log"
      die "the $name server ended before it was ready; the end of its log is above, all of it in $log"
    fi
    if [ $((SECONDS - begin)) -ge "$limit" ]; then
      log_tail "$log"
      die "the $name server was not ready after $limit s; the end of its log is above, all of it in $log"
    fi
    sleep 0.5
  done
}

# log_tail FILE [LINES]: its last lines, 40 unless told otherwise.
log_tail() {
  {
    echo "--- last lines of $1"
    tail -n "${2:-40}" "$1" || true
    echo "---"
  } >&2
}
