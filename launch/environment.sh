# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv beside the code and installs the requirement files named as arguments into it,
# once for each content of those files.
make_environment() {
  local python=${PYTHON:-python3} wanted stamp file flags=()
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; name one with PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  if [ ! -x .venv/bin/python ]; then
    echo "Making the environment .venv with $("$python" --version)"
    "$python" -m venv .venv || { echo "error: $python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; return 1; }
  fi
  wanted=$(cat "$@" | cksum | tr ' ' '-')
  stamp=.venv/installed-$wanted
  if [ ! -e "$stamp" ]; then
    for file in "$@"; do flags+=(-r "$file"); done
    echo "Installing $* (a minute or two)"
    .venv/bin/python -m pip install -qq --disable-pip-version-check "${flags[@]}" || return 1
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}
