#!/bin/sh
# The sandbox's tests once more as nobody, after they ran as root: what confines must not depend on who asks for it.
#   scripts/test-unprivileged.sh [VENV]        does nothing unless run by root
#
# A copy is made of what they need, since nobody may be shut out of this folder, and a Python that nobody may start is
# looked for: the environment's own, or the system's of the same version.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
[ "$(id -u)" = 0 ] || exit 0

version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
as_nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups -- env -i PATH=/usr/bin:/bin HOME=/nonexistent "$@"; }
python=
for candidate in "$(readlink -f "$venv/bin/python")" "/usr/bin/python$version"; do
    if as_nobody "$candidate" -c '' 2>/dev/null; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
    echo "The sandbox's tests did not run as nobody: there is no Python $version that nobody may start."
    exit 0
fi

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
packages="$venv/lib/python$version/site-packages"
mkdir "$copy/site-packages" "$copy/tmp"
for name in pytest _pytest py.py pluggy iniconfig packaging xdist pytest_xdist-*.dist-info execnet pygments "*hypothesis*" sortedcontainers \
    pyseccomp pyseccomp.py trustme cryptography cffi _cffi_backend* idna; do
    for found in "$packages"/$name; do
        if [ -e "$found" ]; then cp -R "$found" "$copy/site-packages/"; fi
    done
done
cp -R sandbox tests tools pyproject.toml "$copy/"
find "$copy" -name __pycache__ -prune -exec rm -rf {} +
chmod -R a+rX "$copy"
chown 65534:65534 "$copy/tmp"
echo "The sandbox's tests as nobody:"
cd "$copy"
as_nobody PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$copy/site-packages:$copy/sandbox:$copy" HYPOTHESIS_STORAGE_DIRECTORY="$copy/tmp/h" \
    "$python" -m pytest -n auto --dist loadfile -p no:cacheprovider --basetemp "$copy/tmp/pytest" tests/sandbox
