#!/usr/bin/env bash
# Everything worth asking a GPU, in one command, on a machine that has torch, nvcc, pytest and hypothesis but no network:
# build in place, run the tests that need torch alone (the gpu ones among them), run the bench.
#
#   bench/gpu.sh                  logs and JSON under bench/results/gpu
#   OUT=somewhere bench/gpu.sh    ... or under $OUT
#
# A failing step does not stop the later ones, since GPU time is dear; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

out="${OUT:-bench/results/gpu}"
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
status=0

step() {
  local name="$1"
  shift
  echo "== $name"
  if ! "$@" 2>&1 | tee "$out/$name.log"; then
    echo "== $name FAILED"
    status=1
  fi
}

step device "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)'
step build env ADVFLOW_CUDA=1 "$python" setup.py build_ext --inplace
step info "$python" -m advflow_ext.info
step tests "$python" -m pytest tests --ignore=tests/trainer -q -ra --durations=10
step bench "$python" -m bench --device cuda --json "$out/bench.json"
exit "$status"
