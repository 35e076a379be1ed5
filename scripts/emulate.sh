#!/bin/sh
# Run the sandbox's tests on another architecture: boot Debian's kernel for it in qemu and run them inside.
#   scripts/emulate.sh [aarch64|armhf|armhf-on-aarch64] [ARGUMENTS OF PYTEST]     default: aarch64 tests/sandbox and the lines of its GPIO chip
#
# The filters know system calls by numbers that differ between architectures, and the broker reads structures whose
# layout does. qemu's user mode has no seccomp, so only a whole machine, with a real kernel of that architecture, says
# whether they hold. `armhf-on-aarch64` is 32-bit Raspberry Pi OS on a 64-bit kernel, as a Pi 4 runs it.
#
# Nothing is installed and no disk image is made: Debian's packages (signatures checked by apt) and pytest are unpacked
# into an initramfs, to which each run adds sandbox/, tests/ and tools/ of this work tree. The tests run as root, then
# as nobody. This script needs no root. Its exit status is the tests' (the first that is not 0), 77 if something has to
# be installed first, 124 if the machine did not finish in time, 1 if it stopped without a result.
#
# Settings, from the environment: AGENTD_EMULATE_TIMEOUT  seconds the machine may run (3600)
#                                 AGENTD_EMULATE_SUITE    Debian's release (bookworm)
#                                 AGENTD_EMULATE_MIRROR   Debian's mirror (http://deb.debian.org)
# Downloads stay in ${XDG_CACHE_HOME:-~/.cache}/agentd-emulate. Delete that folder to have newer packages.
set -eu
export LC_ALL=C
umask 022
limit=${AGENTD_EMULATE_TIMEOUT:-3600}
suite=${AGENTD_EMULATE_SUITE:-bookworm}
mirror=${AGENTD_EMULATE_MIRROR:-http://deb.debian.org}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
packages="base-files busybox-static coreutils curl dash e2fsprogs findutils grep jq kmod libc-bin libseccomp2 mawk
    python3 sed tzdata util-linux"
modules="kernel/fs/ext4 kernel/fs/jbd2 kernel/fs/mbcache.ko* kernel/drivers/block/loop.ko* kernel/lib/*crc* kernel/crypto/crc32*"
requirements="pytest>=8.3 hypothesis>=6.120 pyseccomp>=0.1.2"
board="gpiozero>=2.0.1 lgpio>=0.2.2 pydantic>=2.10 apsw>=3.50"  # for tests/devices/test_board.py

machine=aarch64
case ${1:-} in
aarch64 | armhf | armhf-on-aarch64) machine=$1 && shift ;;
esac
if [ $# -eq 0 ]; then
    set -- tests/sandbox
    [ "$machine" != aarch64 ] || set -- "$@" tests/devices/test_board.py
fi

# Of the programs and of the kernel: Debian's name for the architecture. Then pip's name for it.
case $machine in
aarch64) programs=arm64 kernel=arm64 wheels=aarch64 requirements="$requirements $board" ;;
armhf) programs=armhf kernel=armhf wheels=armv7l ;;
armhf-on-aarch64) programs=armhf kernel=arm64 wheels=armv7l ;;
esac
case $kernel in
arm64) flavour=linux-image-arm64 qemu=qemu-system-aarch64 hardware="-machine virt -cpu cortex-a72" ;;
armhf) flavour=linux-image-armmp qemu=qemu-system-arm hardware="-machine virt,highmem=off -cpu cortex-a15" ;;
esac

repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

say() { echo "emulate: $*" >&2; }
fail() { say "$*" && exit 1; }

missing=
for need in "$qemu=qemu-system-arm" cpio=cpio apt-get=apt dpkg-deb=dpkg; do
    command -v "${need%=*}" >/dev/null || missing="$missing ${need#*=}"
done
[ -e "$keyring" ] || missing="$missing debian-archive-keyring"
"$python" -m pip --version >/dev/null 2>&1 || missing="$missing python3-pip"
if [ -n "$missing" ]; then
    say "some programs are missing: sudo apt-get install --no-install-recommends$missing"
    exit 77
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentd-emulate
mkdir -p "$cache"
work=$(mktemp -d "$cache/run.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

# debian ARCHITECTURE COMMAND...: one of apt's commands, about Debian for that architecture and not about this machine
debian() {
    home=$cache/apt-$suite-$1
    if [ ! -e "$work/read-$1" ]; then
        say "reading which packages Debian $suite has for $1"
        mkdir -p "$home/etc/apt.conf.d" "$home/etc/preferences.d" "$home/etc/trusted.gpg.d" "$home/etc/sources.list.d" \
            "$home/state/lists/partial" "$home/cache/archives/partial"
        : >"$home/status"
        # Only the release itself: a machine without a network, thrown away at once, can do without security updates.
        echo "deb [signed-by=$keyring] $mirror/debian $suite main" >"$home/etc/sources.list"
        cat >"$home/apt.conf" <<END
Dir::Etc "$home/etc";
Dir::State "$home/state";
Dir::State::status "$home/status";
Dir::Cache "$home/cache";
APT::Architecture "$1";
APT::Architectures { "$1"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
END
        export APT_CONFIG="$home/apt.conf"
        timeout 600 apt-get -qq update || fail "the lists of $mirror can't be read"
        apt-get -qq autoclean
        : >"$work/read-$1"
    fi
    export APT_CONFIG="$home/apt.conf"
    shift
    timeout 1800 "$@"
}

# pack FOLDER FILE: an initramfs in which everything is root's
pack() { (cd "$1" && find . -mindepth 1 | cpio --quiet -o -H newc -R +0:+0 | gzip -1) >"$2"; }

fetch_kernel() {
    debian "$kernel" apt-cache depends "$flavour" >"$work/depends"
    name=$(sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' "$work/depends" | head -n 1)
    say "fetching the kernel, $name"
    mkdir "$work/kernel"
    cd "$work/kernel"
    debian "$kernel" apt-get -qq download "$name" || fail "$name can't be fetched"
    for package in *.deb; do dpkg-deb -x "$package" .; done
    mv boot/vmlinuz-* "$1"
    mkdir -p "$work/modules/usr/lib/modules"
    cd lib/modules 2>/dev/null || cd usr/lib/modules
    # shellcheck disable=SC2086  # patterns
    for pattern in $modules "modules.builtin*" modules.order; do
        find . -path "./*/$pattern" -exec cp --parents -R {} "$work/modules/usr/lib/modules" \;
    done
    cd "$repository"
    pack "$work/modules" "$1.modules"
    rm -rf "$work/kernel"
}

make_base() {
    say "fetching Python and what belongs to it"
    # shellcheck disable=SC2086  # a list of words
    debian "$programs" apt-get -qq -y --download-only install $packages >"$work/log" || fail "the packages can't be fetched"
    root=$work/base
    mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/opt/site"
    for folder in bin sbin lib; do ln -s "usr/$folder" "$root/$folder"; done
    for package in "$cache/apt-$suite-$programs"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$root" \
            --exclude './usr/share/doc/*' --exclude './usr/share/man/*' --exclude './usr/share/locale/*' --exclude '*/gconv/*'
    done
    # What the packages' own scripts would do
    ln -sf dash "$root/bin/sh"
    ln -sf mawk "$root/usr/bin/awk"
    printf '%s\n' root:x:0:0::/root:/bin/sh nobody:x:65534:65534::/nonexistent:/bin/sh >"$root/etc/passwd"
    printf '%s\n' root:x:0: nogroup:x:65534: >"$root/etc/group"
    printf '%s\n' 'root:*:19000::::::' 'nobody:*:19000::::::' >"$root/etc/shadow"
    chmod 640 "$root/etc/shadow"
    printf '%s\n' '127.0.0.1 localhost' '::1 localhost' >"$root/etc/hosts"
    echo "hosts: files" >"$root/etc/nsswitch.conf"
    version=$(cd "$root/usr/bin" && echo python3.*)
    say "fetching pytest and hypothesis for $version"
    # shellcheck disable=SC2086
    timeout 900 "$python" -m pip -qq install --disable-pip-version-check --target "$root/opt/site" \
        --only-binary :all: --implementation cp --python-version "${version#python}" \
        --platform "manylinux_2_34_$wheels" --platform "manylinux_2_28_$wheels" --platform "manylinux_2_17_$wheels" --platform "manylinux2014_$wheels" --platform "linux_$wheels" $requirements ||
        fail "pytest and hypothesis can't be fetched"
    say "packing them"
    pack "$root" "$1"
    rm -rf "$root"
}

image=$cache/kernel-$suite-$kernel-$(echo "$modules" | cksum | cut -d ' ' -f 1)
if [ ! -e "$image" ]; then
    fetch_kernel "$work/image"
    mv "$work/image.modules" "$image.modules"
    mv "$work/image" "$image"
fi
# An edit of this script makes a new base, from the packages that are already here.
base=$cache/base-$suite-$programs-$(cksum <"$0" | cut -d ' ' -f 1)
if [ ! -e "$base" ]; then
    make_base "$work/packed"
    rm -f "$cache/base-$suite-$programs"-*
    mv "$work/packed" "$base"
fi

# What differs from run to run: the work tree, the arguments, and the first process.
guest=$work/guest
mkdir -p "$guest/repository"
(cd "$repository" && tar -c --exclude __pycache__ --exclude '*.gguf' agentd sandbox tests tools pyproject.toml) | tar -x --no-same-owner -C "$guest/repository"
chmod -R a+rX "$guest/repository"
if [ -t 1 ]; then colour=yes; else colour=no; fi
for argument in "$@"; do
    printf '%s\n' "$argument" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/' \\\\/"
done >"$work/arguments"
{
    cat <<'END'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 PYTHONPATH=/opt/site:/repository/sandbox:/repository
export AGENTD_EMULATED=1
export HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
finish() { echo "emulate-result: $*"; sync; busybox poweroff -f; }
trap 'finish the first process ended' EXIT
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
busybox mount -t securityfs securityfs /sys/kernel/security
busybox mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts /run /root /tmp
busybox mount -t devpts devpts /dev/pts
busybox mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
for link in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${link%:*} /dev/${link#*:}; done
busybox stty -F /dev/console -onlcr
busybox ip link set lo up
ldconfig
# The tests' files are on ext4, as they are on a Pi; file systems in memory take other lengths and attributes.
depmod
for module in loop ext4; do modprobe $module; done
truncate -s 1G /run/disk
mke2fs -q -F -t ext4 /run/disk && busybox mount -o loop /run/disk /tmp && chmod 1777 /tmp || exit
cd /repository
echo "emulate: $(uname -srvm), $(python3 -VV)"
python3 -c 'import struct; print("emulate:", struct.calcsize("P") * 8, "bits")'
echo "emulate: security modules $(cat /sys/kernel/security/lsm), at most $(cat /proc/sys/user/max_user_namespaces) user namespaces"
echo "emulate: sandbox $(python3 -m agentd_sandbox --levels)"
tests() { # USER COMMAND...
    echo "emulate: the tests as $1, $(busybox cut -d . -f 1 /proc/uptime) s after the start"
    export USER=$1 LOGNAME=$1
    shift
    setsid -w "$@" # what init starts has no process group of its own: its number is 0, which means one's own group
}
END
    # Time limits of hypothesis are meant for machines that are not emulated; its profile `ci` has none.
    printf '%s' "set -- python3 -m pytest -p no:cacheprovider --hypothesis-profile=ci --color=$colour "
    cat "$work/arguments"
    cat <<'END'

tests root "$@" </dev/null
root=$?
tests nobody setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all "$@" </dev/null
nobody=$?
trap - EXIT
finish "root=$root nobody=$nobody"
END
} >"$guest/init"
chmod 755 "$guest/init"
pack "$guest" "$work/added"
cat "$base" "$image.modules" "$work/added" >"$work/initramfs"

say "booting $machine; it may run for $limit s"
began=$(date +%s)
{
    ended=0
    # shellcheck disable=SC2086
    timeout --foreground -k 10 "$limit" "$qemu" $hardware -smp 2 -m 2048 -display none -monitor none -serial stdio \
        -nic none -no-reboot -kernel "$image" -initrd "$work/initramfs" -append "console=ttyAMA0 panic=-1 quiet" </dev/null 2>&1 ||
        ended=$?
    echo "$ended" >"$work/ended"
} | tee "$work/console"
ended=$(cat "$work/ended")
result=$(sed -n 's/.*emulate-result: root=\([0-9]*\) nobody=\([0-9]*\).*/\1 \2/p' "$work/console" | tail -n 1)
say "the machine ran for $(($(date +%s) - began)) s"
case $ended in
124 | 137) say "it did not finish within $limit s" && exit 124 ;;
esac
[ -n "$result" ] || fail "it stopped without a result (exit status of qemu: $ended)"
say "exit status of the tests: root ${result% *}, nobody ${result#* }"
[ "${result% *}" -eq 0 ] || exit "${result% *}"
exit "${result#* }"
