#!/usr/bin/env bash
# A conversion of SmolLM2-135M-Instruct that is tuned on the texts of configs/smollm2-tune.json, as near as we get to the base
# tuned alike (docs/experiments.md, "Each half of the texts by a teacher that has not learnt it"). Takes hours.
#
#   scripts/tune_conversion.sh [RATIO [SETTING…]]
#
# RATIO: of the base's cache (default 0.25). SETTING: for every `hla finetune`, as eval.windows=1.
#
# It is healed with the base's own predictions, takes over what the base has learnt of one half of the texts, and learns that
# tuned base's predictions on the other half, which that has not learnt; then the other way round; takes over what the base has
# learnt of all, and learns its predictions. What is there already is kept: stopped, it goes on when the same command is given
# again.
#
# Makes models/original-25 (of 0.25), -matched, -healed, -tuned and what is between; the bases are
# models/SmolLM2-135M-Instruct-tuned, -tuned-first and -tuned-second.
set -euo pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
ratio=${1:-0.25}
base=models/SmolLM2-135M-Instruct
settings=("${@:2}")
name=models/original-$(awk -v r="$ratio" 'BEGIN { print 100 * r }')
first='["data/wikitext-2/wiki.valid.txt", "data/calibration/smollm2_samples.txt"]'
second='["data/calibration/wikipedia.txt", "data/calibration/wikipedia_later.txt"]'

# make OUT COMMAND…: unless OUT is there.
make() {
  local out=$1
  shift
  [[ -d $out ]] || (set -x && build/hla "$@")
}

# finetune CONFIG MODEL OUT [SETTING…]
finetune() {
  local config=$1 model=$2 out=$3 options=() setting
  for setting in "model=$model" "output=$out" "${@:4}" "${settings[@]}"; do options+=(--set "$setting"); done
  make "$out" finetune --config "configs/$config.json" "${options[@]}"
}

make "$name" convert "$base" "$name" --target-ratio "$ratio" --calib-tokens 16384
finetune smollm2-match "$name" "$name-matched"
finetune smollm2-predict "$name-matched" "$name-healed"
finetune smollm2-tune "$base" "$base-tuned-first" "data.train=$first"
make "$name-first" transfer "$name-healed" "$base" "$base-tuned-first" "$name-first"
finetune smollm2-predict "$name-first" "$name-first-healed" "data.train=$second" "distill.teacher=$base-tuned-first"
finetune smollm2-tune "$base" "$base-tuned-second" "data.train=$second"
make "$name-second" transfer "$name-first-healed" "$base-tuned-first" "$base-tuned-second" "$name-second"
finetune smollm2-predict "$name-second" "$name-second-healed" "data.train=$first" "distill.teacher=$base-tuned-second"
finetune smollm2-tune "$base" "$base-tuned"
make "$name-all" transfer "$name-second-healed" "$base-tuned-second" "$base-tuned" "$name-all"
finetune smollm2-predict "$name-all" "$name-tuned" "distill.teacher=$base-tuned" train.max_steps=180 \
  schedule.warmup_steps=6 optimizer.learning_rate=1.5e-4
