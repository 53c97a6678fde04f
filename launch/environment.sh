# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv beside the code and installs the requirement files named as arguments into it,
# once for each content of those files. CONSTRAINTS=FILE (requirements.lock) fixes the versions, of what they need too.
make_environment() {
  local python=${PYTHON:-python3} constraints=${CONSTRAINTS:-} wanted stamp file flags=()
  if [ -n "$constraints" ] && [ ! -f "$constraints" ]; then
    echo "error: CONSTRAINTS names $constraints, which is no file; requirements.lock is there" >&2
    return 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; name one with PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  if [ ! -x .venv/bin/python ]; then
    echo "Making the environment .venv with $("$python" --version)"
    "$python" -m venv .venv || { echo "error: $python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; return 1; }
  fi
  wanted=$(cat "$@" ${constraints:+"$constraints"} | cksum | tr ' ' '-')
  stamp=.venv/installed-$wanted
  if [ ! -e "$stamp" ]; then
    for file in "$@"; do flags+=(-r "$file"); done
    if [ -n "$constraints" ]; then flags+=(-c "$constraints"); fi
    echo "Installing $* ${constraints:+in the versions of $constraints }(a few minutes)"
    .venv/bin/python -m pip install -qq --disable-pip-version-check "${flags[@]}" || return 1
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}

# What a script that made the environment ends with: it was active in the script alone.
say_how_to_activate() {
  echo "For the other commands, in this shell:  source .venv/bin/activate"
}
