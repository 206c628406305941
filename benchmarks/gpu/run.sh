#!/usr/bin/env bash
# What only a GPU can tell, in the order of what it costs; each part writes its JSON to benchmarks/results as it ends. Needs this
# repository and an image with torch 2.11 and transformers 5.17 or later; parts whose packages are missing say so and the next
# one begins. `benchmarks/gpu/run.sh --smoke` runs all of them at sizes for a CPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
python=${PYTHON:-python3}
failed=()
part() {
  echo "== $*"
  "$python" "$@" || failed+=("$*")
}
smoke=("$@")
part -m pytest -q -n 0 tests/kvzip/test_cuda.py tests/ccm/test_cuda.py
part benchmarks/kvzip_gpu.py "${smoke[@]}"
part benchmarks/ccm_speed.py --device cuda "${smoke[@]}"
part benchmarks/mixup_step.py "${smoke[@]}"
part benchmarks/condensation_gpu.py --hours-only "${smoke[@]}"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
