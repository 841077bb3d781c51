#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything a GPU is needed for, in one command of at most ten minutes: facts, tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu.sh [--parts "facts tests sanitizer benchmarks"] [BINARIES]
#
# BINARIES: a wheel, or a folder, that holds llmkern/_C.abi3.so (or _C.abi3.so itself), copied into this checkout.
# Without it, or where it cannot be loaded, the library is built in place; nothing is downloaded.
#
# Environment: OUT      folder for the results; default benchmarks/results/local
#              PYTHON   default python3
#              SECONDS_IN_ALL  default 570; no part gets more than what is left of it
#              TORCH_CUDA_ARCH_LIST, MAX_JOBS  for the build; default: the GPU's own architecture, all cores
#
# Eight files: summary.txt, log.txt (facts, build, tests, sanitizer), benchmarks.txt, and a JSON document a family.
# Parts do not stop one another, and families are processes of their own: an error of the GPU ends a process, not a run.
# The card's settings are left alone.

# No -e: a part that fails is reported, and the next one runs.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
BUDGET=${SECONDS_IN_ALL:-570}
OUT=${OUT:-$ROOT/benchmarks/results/local}
PARTS="facts tests sanitizer benchmarks"
BINARIES=
# Most valuable first: what is left of the time may not suffice for the last.
FAMILIES=(lstm training cross_entropy sampling embedding)
declare -A FAMILY_LIMIT=([lstm]=90 [training]=70 [cross_entropy]=60 [sampling]=45 [embedding]=35)
TOOLS=(memcheck racecheck synccheck initcheck)
FOUND_ERRORS=86

usage() {
  sed -n '6,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# ---- what happened ----

lines=()
failures=0

# record NAME RESULT SECONDS: one line of the table.
record() {
  local line
  line=$(printf '%-26s %5s s  %s' "$1" "$3" "$2")
  lines+=("$line")
  [[ $2 == passed* ]] || failures=$((failures + 1))
  echo "gpu.sh: $line"
}

# verdict STATUS LIMIT: an exit status in words.
verdict() {
  case $1 in
    0) echo passed ;;
    124 | 137) echo "failed: stopped after $2 s" ;;
    *) echo "failed: exit status $1" ;;
  esac
}

# limited SECONDS COMMAND...: interrupted then, so that pytest still reports what it has seen. A shell gives its
# background jobs an ignored SIGINT, which Python would respect.
limited() {
  local seconds=$1
  shift
  timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@"
}

# left MOST: the smaller of MOST and what is left of the budget, at least 0.
left() {
  local rest=$((BUDGET - SECONDS))
  ((rest > $1)) && rest=$1
  ((rest > 0)) || rest=0
  echo "$rest"
}

wanted() {
  [[ " $PARTS " == *" $1 "* ]]
}

heading() {
  printf '\n======== %s ========\n' "$1" >>"$LOG"
}

# missing_modules NAME...: those that Python does not find.
missing_modules() {
  "$PYTHON" -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}

# ---- parts ----

facts() {
  heading facts
  {
    date -u
    uname -a
    nproc
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,utilization.gpu --format=csv
    nvcc --version
    compute-sanitizer --version
    "$PYTHON" -c '
import sys, torch
print("python", sys.version)
print("torch", torch.__version__, "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
print("gpu", torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None)'
  } >>"$LOG" 2>&1
  nvidia-smi >/dev/null 2>&1
}

# loads: whether the library in this checkout can be loaded and has CUDA kernels; says what it is.
loads() {
  "$PYTHON" -c '
import sys, llmkern
print(llmkern.info())
sys.exit(0 if llmkern.info()["cuda_version"] else "llmkern: the library has no CUDA kernels")' >>"$LOG" 2>&1
}

# take BINARIES: copies the library out of a wheel or a folder.
take() {
  local folder=$1 library
  if [[ -f $1 ]]; then
    folder=$WORK/wheel
    "$PYTHON" -m zipfile -e "$1" "$folder" >>"$LOG" 2>&1 || return 1
  fi
  for library in "$folder/llmkern/_C.abi3.so" "$folder/_C.abi3.so"; do
    if [[ -f $library ]]; then
      echo "library: $library" >>"$LOG"
      # A new file, not new content: a process that has the old one loaded goes on undisturbed.
      cp "$library" llmkern/.new.so && mv llmkern/.new.so llmkern/_C.abi3.so
      return
    fi
  done
  echo "expected llmkern/_C.abi3.so in $1, found none" >>"$LOG"
  return 1
}

# build LIMIT: in place, with what is there.
build() {
  local missing architecture
  missing=$(missing_modules torch setuptools pybind11 ninja numpy)
  command -v nvcc >/dev/null || missing+=" nvcc"
  command -v g++ >/dev/null || missing+=" g++"
  if [[ -n ${missing// /} ]]; then
    echo "cannot build: missing $missing" | tee -a "$LOG"
    return 1
  fi
  "$PYTHON" -c '
import setuptools, sys
major = int(setuptools.__version__.split(".")[0])
sys.exit(0 if major >= 77 else f"cannot build: needs setuptools >= 77, found {setuptools.__version__}")' \
    2>&1 | tee -a "$LOG" || return 1
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  # 9.0a has instructions of its own that 9.0 lacks.
  [[ ${architecture:=9.0} == 9.0 ]] && architecture=9.0a
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$architecture} MAX_JOBS=${MAX_JOBS:-$(nproc)} LLMKERN_CUDA=1
  limited "$1" "$PYTHON" setup.py build_ext --inplace >>"$LOG" 2>&1
}

library() {
  local began=$SECONDS status limit
  heading library
  if [[ -n $BINARIES ]]; then
    if take "$BINARIES" && loads; then
      record library "passed (from $(basename "$BINARIES"))" $((SECONDS - began))
      return
    fi
    record "library as given" "failed: cannot be used, see log.txt; building instead" $((SECONDS - began))
    began=$SECONDS
  fi
  limit=$(left 200)
  build "$limit"
  status=$?
  if ((status == 0)) && loads; then
    record library "passed (built here)" $((SECONDS - began))
    return
  fi
  ((status == 0)) && status=1
  record library "$(verdict "$status" "$limit"), see log.txt" $((SECONDS - began))
  tail -n 15 "$LOG" | cut -c 1-300
  return 1
}

# outcome LOG: the last line of a pytest run, and failure unless something passed.
outcome() {
  local last
  last=$(grep -aE '(passed|failed|error|skipped|deselected|no tests ran).* in [0-9.]+' "$1" | tail -n 1 | tr -d '=')
  echo "${last:-no summary}"
  [[ $last == *passed* ]]
}

# tests: a process for each file, side by side.
tests() {
  local file name status limit began=$SECONDS
  local -A pids=()
  local -a names=()
  limit=$(left 150)
  for file in tests/cuda/test_*.py; do
    name=$(basename "$file" .py)
    OMP_NUM_THREADS=3 limited "$limit" "$PYTHON" -m pytest "$file" -m cuda -o addopts="" -q -W default --tb=short --maxfail=25 \
      --durations=5 -rfE -p no:cacheprovider >"$WORK/$name.log" 2>&1 &
    pids[$name]=$!
    names+=("$name")
  done
  for name in "${names[@]}"; do
    wait "${pids[$name]}"
    status=$?
    report "tests $name" "$status" "$limit" "$WORK/$name.log" $((SECONDS - began))
  done
}

# report NAME STATUS LIMIT LOG SECONDS: of a pytest run.
report() {
  local said result
  heading "$1"
  cat "$4" >>"$LOG"
  result=$(verdict "$2" "$3")
  if ! said=$(outcome "$4") && (($2 == 0)); then
    result="failed: nothing passed"
  fi
  (($2 == FOUND_ERRORS)) && result="failed: errors found"
  (($2 == 2)) && grep -q 'Interrupted: --stop-after' "$4" && result="passed in part, no time for the rest"
  record "$1" "$result: ${said# }" "$5"
}

# sanitizer: the four tools side by side over the small cases.
sanitizer() {
  local tool status limit began=$SECONDS help
  local -A pids=()
  local -a only
  limit=$(left 130)
  if ! command -v compute-sanitizer >/dev/null; then
    record sanitizer "failed: no compute-sanitizer on the PATH" 0
    return
  fi
  help=$(compute-sanitizer --help 2>&1)
  for tool in "${TOOLS[@]}"; do
    only=()
    # initcheck has to see the writes of all kernels; the others need not look into torch's.
    if [[ $tool != initcheck && $help == *--kernel-name* ]]; then
      only=(--kernel-name kns=llmkern)
    fi
    # Without torch's caching every tensor is an allocation of its own, whose end and whose first write can be seen.
    OMP_NUM_THREADS=2 PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$limit" \
      compute-sanitizer --tool "$tool" --error-exitcode "$FOUND_ERRORS" --print-limit 20 "${only[@]}" \
      "$PYTHON" -m pytest tests/cuda -m "cuda and sanitize" -o addopts="" -q -W default --tb=short --maxfail=10 \
      -p no:cacheprovider >"$WORK/$tool.log" 2>&1 &
    pids[$tool]=$!
  done
  for tool in "${TOOLS[@]}"; do
    wait "${pids[$tool]}"
    status=$?
    report "sanitizer $tool" "$status" "$limit" "$WORK/$tool.log" $((SECONDS - began))
  done
}

# benchmarks: a family after the other, each alone on the machine.
benchmarks() {
  local family status limit began
  : >"$OUT/benchmarks.txt"
  for family in "${FAMILIES[@]}"; do
    began=$SECONDS
    limit=$(left "${FAMILY_LIMIT[$family]}")
    if ((limit < 15)); then
      record "benchmarks $family" "failed: not run, no time left" 0
      continue
    fi
    # It stops by itself before it would be stopped, and reports the cases it had time for.
    limited "$limit" "$PYTHON" -m pytest "benchmarks/bench_$family.py" -o addopts="" -q -W default --tb=short \
      -p no:cacheprovider --benchmark-only --device cuda --seconds 0.4 --stop-after $((limit - 12)) \
      --results "$WORK/$family" >"$WORK/$family.log" 2>&1
    status=$?
    sed -n '/llmkern and its peers/,$p' "$WORK/$family.log" >>"$OUT/benchmarks.txt"
    cp "$WORK/$family"/local/*.json "$OUT/$family.json" 2>/dev/null
    report "benchmarks $family" "$status" "$limit" "$WORK/$family.log" $((SECONDS - began))
  done
}

# ---- the run ----

while (($#)); do
  case $1 in
    --parts)
      PARTS=${2:?--parts needs a list}
      shift
      ;;
    -h | --help)
      usage
      exit
      ;;
    -*)
      echo "gpu.sh: unknown option $1" >&2
      usage >&2
      exit 2
      ;;
    *) BINARIES=$(realpath -m "$1") ;;
  esac
  shift
done
for part in $PARTS; do
  if [[ ! $part =~ ^(facts|tests|sanitizer|benchmarks)$ ]]; then
    echo "gpu.sh: expected parts among facts, tests, sanitizer and benchmarks, got $part" >&2
    exit 2
  fi
done
if [[ -n $BINARIES && ! -e $BINARIES ]]; then
  echo "gpu.sh: $BINARIES does not exist" >&2
  exit 2
fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
LOG=$OUT/log.txt
# What an earlier run left must not pass for this one's.
rm -f "$OUT"/{summary,log,benchmarks}.txt
for family in "${FAMILIES[@]}"; do rm -f "$OUT/$family.json"; done
: >"$LOG"
cd "$ROOT" || exit 2
export PYTHONUNBUFFERED=1

missing=$(missing_modules torch numpy pytest pytest_benchmark tokenizers safetensors typer rich)
if [[ -n $missing ]]; then
  record python "failed: $PYTHON lacks $missing" 0
fi
if wanted facts; then
  began=$SECONDS
  if facts; then record facts passed $((SECONDS - began)); else record facts "failed: nvidia-smi" $((SECONDS - began)); fi
fi
if library; then
  wanted tests && tests
  wanted sanitizer && sanitizer
  wanted benchmarks && benchmarks
fi

{
  documents=()
  for family in "${FAMILIES[@]}"; do
    [[ -f $OUT/$family.json ]] && documents+=("$OUT/$family.json")
  done
  ((${#documents[@]})) && "$PYTHON" benchmarks/compare.py "${documents[@]}" 2>&1
  echo
  printf '%s\n' "${lines[@]}"
  echo "$failures failed, $SECONDS s in all; results in $(basename "$OUT")"
} | tee "$OUT/summary.txt"
((failures == 0))
