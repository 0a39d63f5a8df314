#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks.
#
#   scripts/gpu_check.sh [FOLDER]        logs, JSON and summary go to FOLDER, default gpu_check/
#   scripts/gpu_check.sh --list          the stages as a table, as docs/trust_without_a_gpu.md has it; needs no GPU
#
# Needs torch, triton, nvcc, pytest and hypothesis, and no network. Takes under eight minutes: each stage has a limit, and
# so has the whole. A failed stage does not stop the next; the exit status is 1 if any failed.
#
#   PYTHON                  the interpreter, default python3
#   WMKERNELS_CUDA_ARCHS    architectures to build for, default this GPU's own
#   GPU_CHECK_SKIP          names of stages to leave out
#   GPU_CHECK_SECONDS       limit of the whole, default 460
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
list=false
if [[ ${1:-} == --list ]]; then list=true; fi
folder=${1:-gpu_check}
if ! $list; then
  mkdir -p "$folder" || exit 1
  rm -f "$folder"/*.log "$folder"/summary.txt
fi
failed=0
allowed=${GPU_CHECK_SECONDS:-460}

# say TEXT: on the terminal and in the summary.
say() { echo "$*" | tee -a "$folder/summary.txt"; }

# stage NAME SECONDS DESCRIPTION COMMAND...: runs the command with its output in NAME.log, or lists the stage; exit status
# 124 and 137: over its limit.
stage() {
  local name=$1 limit=$2 description=$3 start=$SECONDS status outcome
  shift 3
  if $list; then
    echo "| $name | $limit s | $description |"
    return
  fi
  if ((limit > allowed - SECONDS)); then limit=$((allowed - SECONDS)); fi
  if [[ " ${GPU_CHECK_SKIP:-} " == *" $name "* ]]; then
    say "$(printf '%-10s left out' "$name")"
    return
  fi
  status=124
  if ((limit > 0)); then
    timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1
    status=$?
  fi
  case $status in
    0) outcome=pass ;;
    124 | 137) outcome="FAIL: over its limit of $limit s" ;;
    *) outcome="FAIL: exit status $status" ;;
  esac
  [[ $status -eq 0 ]] || failed=$((failed + 1))
  say "$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$outcome")"
  if [[ $status -ne 0 ]]; then tail -n 15 "$folder/$name.log" 2>/dev/null | sed 's/^/    /'; fi
}

if $list; then
  sanitizer=compute-sanitizer
  echo "| stage | limit | runs |"
  echo "|---|---|---|"
else
  # compute-sanitizer is on PATH, or beside nvcc.
  sanitizer=$(command -v compute-sanitizer || true)
  if [[ -z $sanitizer ]]; then
    nvcc=${WMKERNELS_NVCC:-$(command -v nvcc || true)}
    for home in "${CUDA_HOME:-}" ${nvcc:+"$(dirname "$(dirname "$(readlink -f "$nvcc")")")"} /usr/local/cuda; do
      for candidate in "$home/bin/compute-sanitizer" "$home/compute-sanitizer/compute-sanitizer"; do
        if [[ -z $sanitizer && -n $home && -x $candidate ]]; then sanitizer=$candidate; fi
      done
    done
  fi

  if ! capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>"$folder/gpu.log"); then
    say "FAIL: PyTorch sees no GPU"
    tail -n 5 "$folder/gpu.log"
    exit 1
  fi
  export WMKERNELS_CUDA_ARCHS=${WMKERNELS_CUDA_ARCHS:-$capability}
  export WMKERNELS_CUDA=1 PYTHONUNBUFFERED=1
  say "$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)')"
fi

# Tests of a backend on the GPU; emulator and interpreter are for machines without one.
select=(-q -p no:cacheprovider -p no:benchmark --maxfail=20 --durations=5 tests
  --ignore=tests/emulator --ignore=tests/triton/test_triton_interpreter.py
  --ignore=tests/triton/test_conv_lstm_interpreted.py --ignore=tests/e2e/test_benchmark.py --ignore=tests/e2e/test_build.py)
if "$python" -c 'import xdist' 2>/dev/null; then select+=(-n 8); fi

# Without pip's build isolation the build finds pybind11 and ninja, or says which of them is missing.
stage build 180 "the build for this GPU, without pip's isolation" "$python" -m pip install --no-build-isolation --no-deps --quiet -e .
stage info 30 "what was built and what runs here" "$python" -m wmkernels.info
CI=1 stage cuda 120 "tests of the CUDA kernels against the reference" "$python" -m pytest "${select[@]}" -k cuda
# The persistent kernel runs only where asked for.
WMKERNELS_PERSISTENT=1 CI=1 stage persistent 60 "tests of the ConvLSTM with the persistent kernel" \
  "$python" -m pytest -q -p no:cacheprovider tests/core/test_conv_lstm.py -k cuda
# Each example has kernels of its own to compile.
HYPOTHESIS_PROFILE=brief stage triton 180 "tests of the Triton kernels against the reference" "$python" -m pytest "${select[@]}" -k triton
if [[ -n $sanitizer ]]; then
  # PyTorch's allocator would hide an access beyond a tensor inside its own pool.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  stage memcheck 60 "every CUDA kernel under compute-sanitizer's memcheck" \
    "$sanitizer" --tool memcheck --error-exitcode 9 "$python" scripts/gpu_sanitize.py cuda
  stage racecheck 100 "the same under racecheck, short sequences in two dtypes" \
    "$sanitizer" --tool racecheck --error-exitcode 9 "$python" scripts/gpu_sanitize.py --quick cuda
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  say "memcheck   FAIL: compute-sanitizer is neither on PATH nor beside nvcc"
  say "racecheck  FAIL: compute-sanitizer is neither on PATH nor beside nvcc"
  failed=$((failed + 2))
fi
stage benchmark 180 "speed of the scans against the baselines" \
  "$python" benchmarks/scan_speed.py --device cuda --json "$folder/scan_speed.json"
stage conv_lstm 120 "speed of the ConvLSTM against the baselines" \
  "$python" benchmarks/conv_lstm_speed.py --device cuda --json "$folder/conv_lstm_speed.json"

if $list; then exit 0; fi
for log in "$folder"/benchmark.log "$folder"/conv_lstm.log; do
  [[ -f $log ]] || continue
  sed -n '/^targets/,/^$/p; /steps, .* elements)/p; /^training memory/p; /^baselines/p' "$log" |
    tee -a "$folder/summary.txt"
done
say "$failed stages failed; logs, JSON and this summary are in $folder/, after $SECONDS s"
exit $((failed > 0))
