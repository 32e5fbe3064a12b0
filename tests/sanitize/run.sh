#!/usr/bin/env bash
# Builds main.cpp with the CPU forms it drives under the address and undefined-behaviour sanitizers, in the plainest
# instruction set and in this machine's, and runs it: sanitize/run.sh [compiler]
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${1:-g++}
flags=(-std=c++20 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! { echo 'int main() {}' | "$cxx" "${flags[@]}" -x c++ - -o "$folder/empty" && "$folder/empty"; } > "$folder/log" 2>&1
then
  echo "sanitize: SKIPPED, $cxx cannot build and run a program with its sanitizers: $(tail -n 1 "$folder/log")"
  exit 0
fi
quiet=(-Wno-psabi -Wno-unknown-warning-option -Wno-maybe-uninitialized)  # the last as in CMakeLists.txt
for isa in scalar native; do
  own=(-DFLOWCUT_ISA=$isa)
  if [ $isa = native ]; then own+=(-march=native); fi
  "$cxx" "${flags[@]}" "${own[@]}" -Wall -Wextra "${quiet[@]}" -ffp-contract=off -Icsrc/include \
    tests/sanitize/main.cpp csrc/cpu/score_select.cpp csrc/cpu/compact_kv.cpp csrc/cpu/compact_kv_paged.cpp csrc/cpu/patch_entropy.cpp \
    csrc/cpu/recycle_tokens.cpp csrc/cpu/received_attention.cpp -o "$folder/$isa"
  echo -n "sanitize: $isa: "
  "$folder/$isa"
done
