#!/usr/bin/env bash
# The comparison of sodabreak/MHA2HLA on a real model: the base and its conversions, each before and
# after tuning: perplexity, speed, memory, text. Writes docs/study.md.
#
#   scripts/study.sh [--quick] [--model FOLDER] [--device auto|cpu|cuda] [--output FILE.md]
#
# --help shows all options. Half an hour with --quick on 2 cores; a GPU is used where there is one.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
set_up() { [[ -x $root/build/hla && (-n ${HLA_SKIP_MODEL:-} || -d $root/models/SmolLM2-135M-Instruct) ]] || "$root/scripts/setup.sh" hla; }
case " $* " in
  *" -h "* | *" --help "*) ;;
  *" --model"*models/SmolLM2-135M-Instruct*) set_up ;;
  *" --model "* | *" --model="*) HLA_SKIP_MODEL=1 set_up ;; # another one
  *) set_up ;;
esac
HLA_CALLED_FROM=$PWD
export HLA_CALLED_FROM
cd -- "$root"
exec python3 scripts/study.py "$@"
