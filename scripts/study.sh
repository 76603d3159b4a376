#!/usr/bin/env bash
# The comparison of sodabreak/MHA2HLA on a real model: the base and its conversions, each before and
# after tuning: perplexity, speed, memory, text. Writes docs/study.md.
#
#   scripts/study.sh [--quick] [--model FOLDER] [--device auto|cpu|cuda] [--output FILE.md]
#
# --help shows all options. Under an hour with --quick on 2 cores; a GPU is used where there is one.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[[ -x build/hla && -d models/SmolLM2-135M-Instruct ]] || scripts/setup.sh hla
exec python3 scripts/study.py "$@"
