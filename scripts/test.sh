#!/usr/bin/env bash
# Sets up, then checks everything: style, types, import directions, shell scripts, tests.
#
#   bash scripts/test.sh              all but the tests marked slow, sglang or gpu
#   bash scripts/test.sh --slow       the tests marked slow, and only those
#   bash scripts/test.sh --sglang     the tests marked sglang: the engine's contract against the real SGLang server on
#                                     a CPU, whose environment is made first
#   bash scripts/test.sh --gpu        the tests marked gpu
#   bash scripts/test.sh -k words tests/unit/losses …    what else is given goes to pytest, and only pytest runs
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/lib.sh"
cd "$SLIME_REPO"

selection="not slow and not sglang and not gpu"
setup_args=(--dev)
run_linters=1
pytest_args=()
for argument in "$@"; do
  case "$argument" in
    --slow) selection="slow and not sglang and not gpu" run_linters=0 ;;
    --sglang) selection="sglang" run_linters=0 setup_args+=(--sglang-cpu) ;;
    --gpu) selection="gpu" run_linters=0 ;;
    *) pytest_args+=("$argument") run_linters=0 ;;
  esac
done

end_with_script
run_own bash scripts/setup.sh "${setup_args[@]}"
bin="$(environment_folder)/bin"

# Two cores for a test process and the servers that it starts: one thread each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$SLIME_REPO${PYTHONPATH:+:$PYTHONPATH}"

FAILED=()
# check NAME COMMAND...: runs it and goes on, so that one call shows all that is wrong.
check() {
  local name=$1 begin=$SECONDS
  shift
  say "== $name"
  if run_own "$@"; then
    say "   passed, $((SECONDS - begin)) s"
  else
    FAILED+=("$name")
    say "   FAILED, $((SECONDS - begin)) s"
  fi
}

if [ "$run_linters" = 1 ]; then
  mapfile -t scripts < <(git ls-files -co --exclude-standard '*.sh' '.ci/run')
  check "ruff check" "$bin/ruff" check .
  check "ruff format" "$bin/ruff" format --check .
  check "import directions" "$bin/lint-imports"
  check "shellcheck" "$bin/shellcheck" -x "${scripts[@]}"
  check "basedpyright" "$bin/basedpyright"
fi
if [ "$run_linters" = 1 ]; then
  # These start few processes of their own, so two of them can run side by side.
  beside=(tests/unit tests/invariants tests/contracts)
  check "pytest ${beside[*]}" "$bin/python" -m pytest -n 2 --dist loadfile -m "$selection" "${beside[@]}"
  pytest_args=("${beside[@]/#/--ignore=}")
fi
check "pytest ($selection)" "$bin/python" -m pytest -m "$selection" ${pytest_args[@]+"${pytest_args[@]}"}

if [ "${#FAILED[@]}" -gt 0 ]; then
  say "scripts/test.sh: FAILED after $SECONDS s: $(IFS=,; echo "${FAILED[*]}")"
  exit 1
fi
say "scripts/test.sh: all passed after $SECONDS s"
