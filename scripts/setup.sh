#!/usr/bin/env bash
# Makes or reuses the Python environment that everything here runs in. Idempotent: a second call returns at once.
#
#   bash scripts/setup.sh                what the main job needs
#   bash scripts/setup.sh --dev          linters, type checker and test tools too
#   bash scripts/setup.sh --sglang-cpu   the separate environment of the real SGLang server on a CPU too
#
# The environment is the active one (virtualenv or conda, not conda's base), else .venv in the repository. With an
# NVIDIA GPU the packages are those of requirements/gpu.txt (SGLang included), else of requirements/cpu.txt.
#
# SLIME_SETUP_PIP_ARGS   more arguments for pip install (an index with smaller CPU wheels, say)
# SLIME_SETUP_PYTHON     the Python that makes the environment (default: the first of 3.11 or newer)
# SLIME_SETUP_DEVICE     cpu or gpu, whatever the machine has
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/lib.sh"

want_dev=0
want_sglang_cpu=0
for argument in "$@"; do
  case "$argument" in
    --dev) want_dev=1 ;;
    --sglang-cpu) want_sglang_cpu=1 ;;
    -h | --help)
      sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) die "$argument is no option of this script; it knows --dev and --sglang-cpu." ;;
  esac
done

device="${SLIME_SETUP_DEVICE:-$(if has_gpu; then echo gpu; else echo cpu; fi)}"
case "$device" in cpu | gpu) ;; *) die "SLIME_SETUP_DEVICE is $device; it must be cpu or gpu." ;; esac
read -r -a pip_args <<<"${SLIME_SETUP_PIP_ARGS:-}"
env_dir="$(environment_folder)"
env_python="$env_dir/bin/python"
lock="$SLIME_REPO/requirements/$device.txt"

# stamp_of FILE...: changes when a file does, when the checkout moves, or when the environment's Python does.
stamp_of() { printf '%s %s\n' "$SLIME_REPO $device" "$(cat "$@" "$env_dir/pyvenv.cfg" 2>/dev/null | cksum)"; }

up_to_date() { [ -x "$env_python" ] && [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

pip_install() { "$env_python" -m pip install -q --disable-pip-version-check ${pip_args[@]+"${pip_args[@]}"} "$@"; }

# compile_what_is_used: pip would byte-compile all of torch, sympy and the rest, over a minute for files that are never
# imported. Importing what a run imports compiles just that, and shows whether the environment is sound. It has to be
# done here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would compile anew.
compile_what_is_used() {
  local packages
  packages="$("$env_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  say "setup: importing what a run imports, so that its processes start faster"
  env -u PYTHONDONTWRITEBYTECODE PYTHONPATH="$SLIME_REPO" CUDA_VISIBLE_DEVICES= "$env_python" - <<'PYTHON'
import math_verify, matplotlib.pyplot, torch.utils.tensorboard, wandb
import torch.distributed.checkpoint, torch.distributed.fsdp
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers import Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

import slime.backends.megatron.backend
import slime.engines.transformers_engine.__main__
import slime.train
PYTHON
  # Ray's agents are processes of their own, and Ray gives them 30 s to start.
  env -u PYTHONDONTWRITEBYTECODE "$env_python" -m compileall -q \
    "$packages/ray/_private" "$packages/ray/dashboard" "$packages/ray/util" "$SLIME_REPO/slime" "$SLIME_REPO/examples"
}

make_environment() {
  if [ -x "$env_python" ]; then
    first_python "$env_python" >/dev/null ||
      die "the environment $env_dir has $("$env_python" --version 2>&1); Python 3.11 or newer is needed." \
        "Deactivate it, or activate one that fits."
    say "setup: using the environment $env_dir"
  else
    local python
    python="$(base_python)"
    say "setup: making the environment $env_dir with $("$python" --version)"
    "$python" -m venv "$env_dir" ||
      die "$python could not make an environment. On Debian and Ubuntu the package python3-venv is needed for that."
  fi
  "$env_python" -m pip --version >/dev/null 2>&1 || "$env_python" -m ensurepip --upgrade >/dev/null
}

install_runtime() {
  local stamp_file="$env_dir/.slime-setup" stamp torch
  stamp="$(stamp_of "$lock" "$SLIME_REPO/pyproject.toml")"
  if up_to_date "$stamp_file" "$stamp"; then
    say "setup: $env_dir is up to date ($device)"
    return
  fi
  make_environment
  rm -f "$stamp_file"
  torch="$(grep '^torch==' "$lock")"
  say "setup: installing $torch and the other $(($(grep -c '==' "$lock") - 1)) packages of requirements/$device.txt"
  pip_install --no-compile -c "$lock" "$torch"
  pip_install --no-compile --no-deps -r "$lock"
  say "setup: linking this checkout into the environment (pip install -e)"
  pip_install --no-deps --no-build-isolation -e "$SLIME_REPO"
  compile_what_is_used
  stamp_of "$lock" "$SLIME_REPO/pyproject.toml" >"$stamp_file"
  say "setup: ready after $SECONDS s"
}

install_dev() {
  local dev_lock="$SLIME_REPO/requirements/dev.txt" stamp_file="$env_dir/.slime-setup-dev" stamp
  stamp="$(stamp_of "$dev_lock")"
  if up_to_date "$stamp_file" "$stamp"; then
    return
  fi
  say "setup: installing the $(grep -c '==' "$dev_lock") packages of requirements/dev.txt (linters, type checker, tests)"
  pip_install --no-deps -r "$dev_lock"
  printf '%s\n' "$stamp" >"$stamp_file"
}

install_runtime
if [ "$want_dev" = 1 ]; then install_dev; fi
if [ "$want_sglang_cpu" = 1 ]; then
  SLIME_SETUP_PYTHON="${SLIME_SETUP_PYTHON:-$env_python}" bash "$SLIME_REPO/scripts/setup_sglang_cpu.sh"
fi
