#!/usr/bin/env bash
# Everything worth asking a GPU, in one command, on a machine that has torch, nvcc, pytest and hypothesis but no network:
# build in place, the GPU tests, the same under compute-sanitizer, the bench, table and plots; where diffusers and PEFT are
# installed, a step of SD3.5 Medium. Under 10 minutes.
#
#   make gpu-check PYTHON=python3      with the interpreter that has torch; nothing is installed
#   OUT=somewhere make gpu-check       results there instead of bench/results/<name of the GPU>
#   ADVFLOW_COMMIT=abc make gpu-check  what the results say was measured, in a copy without .git
#
# Without a CUDA device it runs what can be run there into a scratch folder, and says so. A failing step does not stop
# the later ones, since GPU time is dear; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
total=590 # seconds, of all steps together
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
status=0

# step NAME SECONDS COMMAND...: its output to the screen and to NAME.log; stopped after SECONDS.
step() {
  local name="$1" limit="$2" began=$SECONDS code
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) echo "== $name: $((SECONDS - began)) s" ;;
    124 | 137) echo "== $name FAILED: stopped after its $limit s" ;;
    *) echo "== $name FAILED: exit status $code" ;;
  esac
  return "$code"
}

# Options of pytest for so many processes, where pytest-xdist is installed.
processes() {
  if "$python" -c 'import xdist' 2>/dev/null; then echo "-n $1 --dist worksteal"; fi
}

# The same in the background, its output in the log alone.
background() {
  step "$@" >"$out/$1.status" 2>&1 &
  jobs+=($!)
  names+=("$1")
}

collect() {
  local i
  for i in "${!jobs[@]}"; do
    wait "${jobs[$i]}" || status=1
    tail -n 4 "$out/${names[$i]}.log"
    tail -n 1 "$out/${names[$i]}.status"
    rm "$out/${names[$i]}.status"
  done
  jobs=() names=()
}
jobs=() names=()

# Builds within so many seconds, and says what there is. In any case: where a module of the same sources is installed, that
# one would be tested in place of this tree's.
build() {
  mkdir -p "$out"
  step build "$1" "$python" setup.py build_ext --inplace || status=1
  step environment 30 "$python" -m advflow_ext.bench.harness.report "$out/environment.json" || status=1
  step info 30 "$python" -m advflow_ext.info || status=1
}

gpu_part() {
  out="${OUT:-bench/results/$("$python" -c 'import torch; from advflow_ext.bench.harness.report import slug; print(slug(torch.cuda.get_device_name()))')}"
  ADVFLOW_CUDA=1 build 140

  # Tests and sanitizers share the device; what is timed has it alone.
  local shards=8 i tool tests limit=$((total - SECONDS - 260)) files together
  # The longest first. Each failure is printed when it happens: the last lines of what is cut off are lost.
  files=(tests/trainer/test_gpu.py tests/{bench,contract,kernels,nn,ops,patches,policies}/test_*.py)
  tests=("$python" -m pytest -m gpu -v -ra --durations=5 -p no:cacheprovider -p tests.failures_at_once)
  together=$(processes $shards)
  if [[ -n $together ]]; then
    background tests "$limit" "${tests[@]}" $together "${files[@]}"
  else
    for ((i = 0; i < shards; i++)); do
      background "tests-$i" "$limit" "${tests[@]}" $(printf '%s\n' "${files[@]}" | awk "NR % $shards == $i")
    done
  fi
  if command -v compute-sanitizer >/dev/null; then
    local dtype
    for tool in memcheck racecheck initcheck synccheck; do
      for dtype in 0 1 2; do # fp32, fp16, bf16: all in one process outlast the limit
        # Without the caching allocator every tensor is an allocation of its own, whose ends the sanitizer can see.
        background "sanitizer-$tool-$dtype" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
          compute-sanitizer --tool "$tool" --error-exitcode 9 \
          "$python" -m pytest -m gpu -v -p no:cacheprovider tests/ops/test_every_op_gpu.py -k "test_small and dtype$dtype"
      done
    done
  else
    echo "== compute-sanitizer is not on PATH: memcheck, racecheck, initcheck and synccheck were left out" |
      tee "$out/sanitizer.log"
  fi
  collect

  local reserved=0
  if "$python" -c 'import diffusers, peft' 2>/dev/null; then
    reserved=130
  fi
  limit=$((total - SECONDS - 25 - reserved))
  step bench "$limit" "$python" -m advflow_ext.bench --device cuda --sweep --limit $((limit - 45)) --json "$out/bench.json" --plot "$out/bench.html" || status=1
  step render 25 "$python" -m advflow_ext.bench.harness.render "$out/bench.json" --out "$out" || status=1
  if ((reserved)); then
    # Without the compiled variants, which alone take minutes to compile.
    step step $((total - SECONDS)) "$python" -m bench.step --device cuda \
      --variants stock,ours --timesteps 3 --rounds 3 --json "$out/step.json" --out "$out/step.md" || status=1
  else
    echo "== step was left out: diffusers or peft cannot be imported" | tee "$out/step.log"
  fi
  echo "results: $out"
}

cpu_part() {
  out="${OUT:-$(mktemp -d)}"
  build 900
  step tests 900 env OMP_NUM_THREADS=1 "$python" -m pytest $(processes auto) -q tests --ignore=tests/trainer \
    -m "not gpu and not slow and not sanitizer" || status=1
  step bench 300 "$python" -m advflow_ext.bench --device cpu --quick --json "$out/bench.json" --plot "$out/bench.html" || status=1
  step render 60 "$python" -m advflow_ext.bench.harness.render "$out/bench.json" --out "$out" || status=1
  echo "logs: $out"
  echo "No GPU was found: this was the CPU part alone, and nothing on a GPU was checked."
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  gpu_part
else
  cpu_part
fi
exit "$status"
