#!/usr/bin/env bash
# Checks on one GPU what tests cannot check without one, and measures a training step at published shapes. Prints one
# Markdown table; ends with 0 only if every check passed. Under 8 minutes on an H100; downloads nothing.
#
#   bash scripts/check_gpu.sh --out table.md
#   bash scripts/check_gpu.sh --only attention trainer
#   bash scripts/check_gpu.sh --device cpu --tiny     the checks' own code, without a GPU's kernels
#
# It runs in the environment that scripts/setup.sh makes, on the first GPU of CUDA_VISIBLE_DEVICES. docs/gpu_checks.md
# says what each row means.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/lib.sh"

wants_gpu=1
previous=
for argument in "$@"; do
  case "$previous $argument" in
    "--device cpu" | *" --device=cpu" | *" -h" | *" --help") wants_gpu=0 ;;
  esac
  previous=$argument
done

python="$(environment_folder)/bin/python"
[ -x "$python" ] || die "there is no environment at $(environment_folder); make it by: bash scripts/setup.sh"
if [ "$wants_gpu" = 1 ]; then
  first_gpu="${CUDA_VISIBLE_DEVICES-0}"
  export CUDA_VISIBLE_DEVICES="${first_gpu%%,*}"
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die "torch of $(environment_folder) sees no GPU (CUDA_VISIBLE_DEVICES is '$CUDA_VISIBLE_DEVICES'). Where there is one," \
      "look at nvidia-smi, and set the environment up for it by: SLIME_SETUP_DEVICE=gpu bash scripts/setup.sh" \
      "Where there is none, only the checks' own code can be tried: bash scripts/check_gpu.sh --device cpu --tiny"
fi

end_with_script
# Relative paths among the arguments are the caller's; the package is found by PYTHONPATH.
export PYTHONPATH="$SLIME_REPO${PYTHONPATH:+:$PYTHONPATH}"
run_own "$python" -m scripts.checks.gpu "$@"
