#!/usr/bin/env bash
# Builds and runs tests/sanitize/main.cpp: the CPU kernels under address and undefined-behaviour sanitizers.
#
#   scripts/sanitize.sh [FIRST_SEED [TIMES]]    TIMES scales the number of calls
#
# Objects are kept in build/sanitize. CXX and PYTHON override c++ and python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=build/sanitize
mkdir -p "$folder"
export CXX="${CXX:-c++}"
# -Og compiles in two thirds of the time of -O1. maybe-uninitialized gives false positives with sanitizers.
export FLAGS="-std=c++17 -Og -g1 -fno-math-errno -ffp-contract=fast -fopenmp -Icsrc
  -Wall -Wextra -Wshadow -Werror -Wno-maybe-uninitialized
  -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# Lines of "level flag flag".
levels=$("${PYTHON:-python3}" -c '
from build_tools.toolchain import LEVELS, machine_name
for level, flags in LEVELS.get(machine_name(), {"portable": ()}).items():
    print(level, *flags)
')

# Whether this processor runs a level: what it cannot run is not compiled.
runs_here() {
  local feature
  case $1 in
    v4) feature=avx512vl ;;
    v3) feature=avx2 ;;
    *) return 0 ;;
  esac
  printf 'int main() { return !__builtin_cpu_supports("%s"); }' "$feature" | $CXX -x c++ - -o "$folder/probe" || exit 1
  "$folder/probe"
}

have=""
commands=()
while read -r level flags; do
  if ! runs_here "$level"; then
    echo "$level is left out: this processor does not run it"
    continue
  fi
  have+=" -DWMK_HAVE_${level^^}"
  for source in csrc/cpu/*/*.cpp; do
    if [[ $source == */dispatch/* || $source == */api.cpp ]]; then continue; fi
    commands+=("$source $folder/$(basename "$source" .cpp).$level.o $flags -DWMK_ISA=$level")
  done
done <<<"$levels"
for source in csrc/cpu/dispatch/*.cpp csrc/cpu/*/api.cpp tests/sanitize/*.cpp; do
  commands+=("$source $folder/$(basename "$(dirname "$source")").$(basename "$source" .cpp).o $have")
done

# Rebuilds an object if a dependency is newer.
compile() {
  local source=$1 object=$2
  shift 2
  if [ -f "$object" ] && [ -f "$object.d" ]; then
    local stale=""
    for needed in $(sed -e 's/^[^:]*://' -e 's/\\$//' "$object.d"); do
      if [ ! -e "$needed" ] || [ "$needed" -nt "$object" ]; then stale=yes; fi
    done
    if [ -z "$stale" ]; then return 0; fi
  fi
  echo "compile $source${*:+ ($*)}"
  $CXX $FLAGS "$@" -MD -MF "$object.d" -c "$source" -o "$object"
}
export -f compile
printf '%s\n' "${commands[@]}" | xargs -P "$(nproc)" -I{} bash -euc 'compile {}'

objects=()
for command in "${commands[@]}"; do
  read -r _ object _ <<<"$command"
  objects+=("$object")
done
$CXX $FLAGS "${objects[@]}" -o "$folder/kernels"

# No leak detection: the OpenMP runtime keeps its threads. No use-after-return detection: GCC before 13.2 does not align
# its frames to the 64 bytes of AVX-512 (bug 110027).
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0" UBSAN_OPTIONS="print_stacktrace=1"
"$folder/kernels" "$@"
