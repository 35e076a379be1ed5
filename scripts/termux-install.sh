#!/data/data/com.termux/files/usr/bin/sh
# agentd on Android, in Termux: what Termux has as a package of its own is taken from there, since it compiles for minutes or not at all
# with pip. Then agentd itself, in an environment that sees those packages.
#   sh scripts/termux-install.sh [AGENTD]    AGENTD: what pip is to install: a wheel, or the checkout (default: the one this lies in)
#
# Not tried on a phone by those who wrote it. `agentd doctor` says what is missing afterwards.
set -eu
[ -n "${PREFIX:-}" ] && [ -d "$PREFIX/etc/termux" ] || { echo "This is for Termux; elsewhere: see docs/first-automation.md" >&2; exit 1; }
pkg update -y
pkg install -y python clang make cmake ninja libseccomp termux-api termux-services tzdata
for package in python-numpy python-grpcio python-cryptography python-apsw; do
    # Not all mirrors have all of them: pip makes the others.
    pkg install -y "$package" || echo "$package is no package here; pip compiles it" >&2
done
python -m venv --system-site-packages "$HOME/agentd"
"$HOME/agentd/bin/pip" install --upgrade pip
GRPC_PYTHON_DISABLE_LIBC_COMPATIBILITY=1 GRPC_PYTHON_BUILD_SYSTEM_OPENSSL=1 GRPC_PYTHON_BUILD_SYSTEM_ZLIB=1 \
    "$HOME/agentd/bin/pip" install "${1:-$(cd "$(dirname "$0")/.." && pwd)}"
ln -sf "$HOME/agentd/bin/agentd" "$PREFIX/bin/agentd"
agentd doctor || true
echo "Then: agentd service install. Take Termux out of battery optimisation, or Android ends it (docs/service.md)."
