#!/usr/bin/env bash
# Set up, build and run the tests.
#
#   scripts/test.sh [ARGUMENT…]     arguments for ctest, e.g. -R model/
set -euo pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
# Two at a time: many wait for files or processes of their own. ctest alone calls it a success when there is no
# test to run.
exec ctest --preset release --output-on-failure --no-tests=error -j 2 "$@"
