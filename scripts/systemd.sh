#!/bin/sh
# The service of the machine under a real systemd, which boots in namespaces of its own over a view of this machine that is
# thrown away: installed, confined, killed, stopped in its tracks, woken by its socket, uninstalled. Nothing here is changed.
#   sudo scripts/systemd.sh [VENV]      with AGENTD_SYSTEMD=1 it fails where systemd does not boot; needs root, systemd, overlayfs, and /usr/bin/python3 of the environment's version
set -eu
cd "$(dirname "$0")/.."
venv=$(readlink -f "${1:-.venv}")
version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
packages="$venv/lib/python$version/site-packages"
if [ "$(id -u)" != 0 ] || ! [ -x /lib/systemd/systemd ] || ! [ -x "/usr/bin/python$version" ]; then
    echo "skipped: it needs root, systemd, and /usr/bin/python$version"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/box" "$work/told"
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target "$work/site" .
export work packages version
# shellcheck disable=SC2016
if ! unshare --mount --pid --fork --uts --cgroup --propagation private sh -eu -c '
    mount -t tmpfs none "$work/box"
    mkdir "$work/box/upper" "$work/box/work" "$work/box/root"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$work/box/upper,workdir=$work/box/work" "$work/box/root"
    mount -t sysfs sysfs "$work/box/root/sys"
    mount -t cgroup2 cgroup2 "$work/box/root/sys/fs/cgroup"
' 2> "$work/why"; then
    echo "skipped: this machine allows no namespaces with mounts of their own: $(cat "$work/why")"
    exit 0
fi
# No shell stays behind: systemd is the first process of its namespace, and what it ends with is not a shell's to see.
timeout 300 unshare --mount --pid --fork --kill-child --uts --cgroup --propagation private sh -eu -c '
box=$work/box root=$work/box/root
mount -t tmpfs -o size=512m none "$box"
mkdir "$box/upper" "$box/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$box/upper,workdir=$box/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs none "$root/run"
mount -t tmpfs none "$root/tmp"
mkdir -p "$root/opt/agentd/told" "$root/opt/agentd/site" "$root/opt/agentd/packages"
mount --bind "$work/told" "$root/opt/agentd/told"
mount --bind "$work/site" "$root/opt/agentd/site"
mount --bind "$packages" "$root/opt/agentd/packages"
"/usr/bin/python$version" -m venv --without-pip "$root/opt/agentd"
sed -i "s|^$root||" "$root/opt/agentd/pyvenv.cfg"
printf "%s\n" /opt/agentd/site /opt/agentd/packages > "$root/opt/agentd/lib/python$version/site-packages/agentd.pth"
printf "#!/opt/agentd/bin/python\nimport sys\nfrom agentd.cli import main\nsys.exit(main())\n" > "$root/opt/agentd/bin/agentd"
chmod 755 "$root/opt/agentd/bin/agentd"
cp scripts/systemd-inside.sh "$root/opt/agentd/try.sh"
units=$root/etc/systemd/system
for unit in systemd-tmpfiles-setup systemd-tmpfiles-setup-dev systemd-tmpfiles-clean systemd-udevd systemd-udev-trigger \
    systemd-modules-load systemd-sysctl systemd-remount-fs systemd-random-seed systemd-update-utmp systemd-journal-flush \
    systemd-sysusers systemd-binfmt systemd-boot-system-token systemd-machine-id-commit systemd-pstore; do
    ln -sf /dev/null "$units/$unit.service"
done
cat > "$units/try.service" <<END
[Unit]
Description=The trial
After=basic.target
Requires=basic.target
[Service]
Type=oneshot
ExecStart=/bin/sh /opt/agentd/try.sh
StandardOutput=append:/opt/agentd/told/out
StandardError=append:/opt/agentd/told/out
ExecStopPost=/bin/sh -c "echo \$EXIT_STATUS > /opt/agentd/told/status; systemctl exit"
TimeoutStartSec=240
END
: > "$root/etc/fstab"
mkdir "$root/before"
cd "$root"
pivot_root . before  # not chroot(1): who is in one may make no user namespace, and the sandbox makes them
umount -l /before
container=agentd exec /lib/systemd/systemd --system --unit=try.service --show-status=no --log-target=console
' > "$work/boot.log" 2>&1 || true
if ! [ -e "$work/told/out" ]; then
    echo "systemd did not boot in namespaces here, so nothing was tried:"
    tail -n 20 "$work/boot.log"
    if [ -n "${AGENTD_SYSTEMD:-}" ]; then exit 1; fi
    exit 0
fi
cat "$work/told/out"
test "$(cat "$work/told/status" 2>/dev/null)" = 0
echo "the service works under $(systemctl --version | head -n 1)"
