#!/usr/bin/env bash
# From a fresh machine to a tested one: environment, lint, the whole suite. Needs Python 3.11 or newer.
#
#   bash launch/test.sh [pytest arguments, such as tests/models]
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,4s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements.txt requirements-test.txt
ruff check .
ruff format --check .
lint-imports
python -m pytest -n 2 --dist loadfile "$@"
say_how_to_activate
