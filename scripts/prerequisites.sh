#!/bin/sh
# What the installation needs and this machine lacks, each with the line that installs it.
#   scripts/prerequisites.sh [PYTHON]
set -u
python=${1:-python3}
missing=0
need() { # what, how to get it
    echo "missing: $1" >&2
    echo "    $2" >&2
    missing=1
}
if [ -n "${TERMUX_VERSION:-}" ]; then get="pkg install"; compilers="clang"; else get="sudo apt-get install"; compilers="g++ make"; fi
if ! command -v "$python" >/dev/null 2>&1; then
    need "Python 3.11 or newer" "$get python3 python3-venv"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    need "Python 3.11 or newer ($("$python" --version) is too old)" "$get python3 python3-venv"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    need "the venv module of Python" "$get python3-venv"
fi
command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
    need "a C++ compiler" "$get $compilers"
command -v make >/dev/null 2>&1 || need "make" "$get make"
[ $missing -eq 0 ] || exit 1
