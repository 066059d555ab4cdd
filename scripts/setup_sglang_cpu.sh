#!/usr/bin/env bash
# Makes the environment in which the real SGLang server runs on a CPU. Idempotent: a second call returns at once.
#
#   bash scripts/setup_sglang_cpu.sh
#
# SLIME_SGLANG_ENV      where it lies                         (default: .venv-sglang in the repository)
# SLIME_SETUP_PIP_ARGS  more arguments for pip install        (an index with smaller CPU wheels, say)
# SLIME_SETUP_PYTHON    the Python that makes the environment (default: python3; 3.11 or newer)
#
# It is separate from the project's own environment because SGLang pins other versions and, without a GPU, is
# installed without the CUDA packages that its wheel asks for.
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
requirements="$repo/requirements/sglang-cpu.txt"
env_dir="${SLIME_SGLANG_ENV:-$repo/.venv-sglang}"
base_python="${SLIME_SETUP_PYTHON:-python3}"
stamp="$env_dir/.slime-sglang-cpu"
read -r -a pip_args <<<"${SLIME_SETUP_PIP_ARGS:-}"

die() {
  echo "setup_sglang_cpu: $*" >&2
  exit 1
}

[ -f "$requirements" ] || die "$requirements is missing; run this script from a full checkout."
wanted="$(cksum <"$requirements")"
if [ -x "$env_dir/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  echo "setup_sglang_cpu: $env_dir is up to date"
  exit 0
fi

"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$base_python is $("$base_python" --version 2>&1); Python 3.11 or newer is needed. Name one by SLIME_SETUP_PYTHON."

# Two callers at once (the launcher starts a teacher and a student) must not install into one folder together.
mkdir -p "$env_dir"
exec 9>"$env_dir/.lock"
if command -v flock >/dev/null; then flock 9; fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  echo "setup_sglang_cpu: $env_dir is up to date"
  exit 0
fi
rm -f "$stamp"

pinned() { sed -n "s/^$1==//p" "$requirements"; }
echo "setup_sglang_cpu: installing sglang $(pinned sglang), torch $(pinned torch) and $(grep -c '==' "$requirements") pinned packages into $env_dir (about 3.3 GB, 2 to 3 minutes)"
[ -x "$env_dir/bin/python" ] || "$base_python" -m venv "$env_dir"
# Torch brings its own dependencies: on a CPU wheel they are few, on the CUDA wheel it cannot be imported without them.
"$env_dir/bin/python" -m pip install -q ${pip_args[@]+"${pip_args[@]}"} "torch==$(pinned torch)"
"$env_dir/bin/python" -m pip install -q ${pip_args[@]+"${pip_args[@]}"} --no-deps -r "$requirements"
"$env_dir/bin/python" -c 'import importlib.metadata as m; m.version("sglang"); import torch, transformers'
printf '%s\n' "$wanted" >"$stamp"
echo "setup_sglang_cpu: ready ($("$env_dir/bin/python" -c 'import importlib.metadata as m; print("sglang", m.version("sglang"), "torch", m.version("torch"))'))"
