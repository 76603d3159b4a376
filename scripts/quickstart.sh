#!/usr/bin/env bash
# From a fresh checkout to a converted model: set up, convert SmolLM2-135M-Instruct to a latent cache of half
# the size, and compare the two on three windows of WikiText-2.
#
#   scripts/quickstart.sh [OPTION…]     options for `hla convert`, e.g. --rope latent --kv-ratio 0.25
set -euo pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
scripts/setup.sh hla

hla=build/release/hla
base=models/SmolLM2-135M-Instruct
windows=0,73,147
results=build/quickstart
# Other options make another model: it does not take the name of the 50 % one.
converted=$base-HLA-50
(($# == 0)) || converted=$base-HLA-custom

# The conversion is kept as long as it was made from this base with these options.
stamp=$converted/.quickstart
made_from=$(stat -c '%s %Y' "$base/model.safetensors"; printf '%q ' "$@")
if [[ -f $stamp && $(<"$stamp") == "$made_from" ]]; then
  echo "[quickstart] $converted is there already"
else
  echo "[quickstart] converting $base to $converted"
  force=()
  [[ ! -e $converted ]] || force=(--force)
  "$hla" convert "$base" "$converted" "$@" "${force[@]}"
  printf '%s\n' "$made_from" >"$stamp"
fi

mkdir -p -- "$results"
for model in "$base" "$converted"; do
  name=${model##*/}
  echo "[quickstart] measuring $name"
  "$hla" info "$model" --json >"$results/$name.info.json"
  "$hla" ppl "$model" --windows "$windows" --json "$results/$name.ppl.json" --force >/dev/null
done

"${HLA_VENV:-.venv}/bin/python" - "$results" "${base##*/}" "${converted##*/}" <<'PYTHON'
import json
import sys

folder, *names = sys.argv[1:]
rows = []
for name in names:
    with open(f"{folder}/{name}.info.json") as file:
        info = json.load(file)
    with open(f"{folder}/{name}.ppl.json") as file:
        ppl = json.load(file)["results"][0]["perplexity"]
    rows.append((name, info["cache_bytes_per_token"], info["parameters"], ppl))

_, base_cache, _, base_ppl = rows[0]
width = max(map(len, names))
print()
print(f"{'model':{width}}  {'cache bytes/token':>19}  {'parameters':>11}  {'WikiText-2 perplexity':>22}")
for name, cache, parameters, ppl in rows:
    cache = f"{cache:,} ({cache / base_cache:4.0%})"
    ppl = f"{ppl:.3f} (x {ppl / base_ppl:.3f})"
    print(f"{name:{width}}  {cache:>19}  {parameters:>11,}  {ppl:>22}")
PYTHON

cat <<EOF

Perplexity: windows 0, 73 and 147 of the 148 windows of 2048 tokens in the WikiText-2 raw test split.

To try next:
  build/hla ppl $converted
  build/hla info $converted
  build/hla convert $base models/smaller --kv-ratio 0.25
  build/hla --help
EOF
