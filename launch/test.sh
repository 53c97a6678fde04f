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
# Full-size programs for GPUs. XLA's GPU compiler (220 MB) lies in a folder of its own: where no GPU is, every process that
# finds it writes to stderr, which tests of commands read.
if [ $# = 0 ]; then
  compiler=.venv/gpu-compiler-$(python -c 'import jax; print(jax.__version__)')
  if [ -e "$compiler" ] || { rm -rf "$compiler.part" && python -m pip install -qq --disable-pip-version-check --no-deps \
    --target "$compiler.part" "jax-cuda12-plugin==${compiler##*-}" "jax-cuda12-pjrt==${compiler##*-}" \
    'nvidia-cuda-nvcc-cu12==12.9.86' && mv "$compiler.part" "$compiler"; }; then
    PYTHONPATH=$compiler JAX_PLATFORMS=cpu python -m pytest -n0 tests/planning/test_gpus.py -k h100
  else
    echo "XLA's GPU compiler could not be installed: its tests are left out"
  fi
fi
say_how_to_activate
