#!/usr/bin/env bash
# The comparison of sodabreak/MHA2HLA on a real model: the base and its conversions, each before and
# after tuning: perplexity, speed, memory, text. Writes docs/study.md.
#
#   scripts/study.sh [--quick] [--model FOLDER] [--device auto|cpu|cuda] [--output FILE.md]
#
# --help shows all options. Half an hour with --quick on 2 cores; a GPU is used where there is one.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
case " $* " in
  *" -h "* | *" --help "*) ;;
  *" --model "* | *" --model="*)
    [[ -x $root/build/hla ]] || HLA_SKIP_MODEL=1 "$root/scripts/setup.sh" hla
    ;;
  *) [[ -x $root/build/hla && -d $root/models/SmolLM2-135M-Instruct ]] || "$root/scripts/setup.sh" hla ;;
esac
HLA_CALLED_FROM=$PWD
export HLA_CALLED_FROM
cd -- "$root"
exec python3 scripts/study.py "$@"
