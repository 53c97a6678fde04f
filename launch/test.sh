#!/usr/bin/env bash
# From a fresh machine to a tested one: environment, lint, import rules, the whole suite. Needs Python 3.11 or newer.
# --fast leaves out PyTorch and the slow tests: about two minutes, after installing.
#
#   bash launch/test.sh [--fast] [pytest arguments, such as tests/models]
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,5s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")/.."
needed=(requirements.txt requirements-fast.txt requirements-test.txt)
if [ "${1:-}" = --fast ]; then needed=("${needed[@]:0:2}"); fi
source launch/environment.sh
make_environment "${needed[@]}"
# Not among the others, since pip takes it with --no-deps alone: see the file.
if [ "${1:-}" != --fast ]; then python -m pip install -qq --disable-pip-version-check --no-deps -r requirements-page.txt; fi
ruff check .
ruff format --check .
lint-imports
python -m pytest -n 2 --dist loadfile "$@"
say_how_to_activate
