#!/bin/sh
# What scripts/systemd.sh tries, inside.
set -eu
export PATH=/opt/agentd/bin:$PATH AGENTD_SOCKET=/run/agentd/agentd.sock HOME=/root TERM=dumb
say() { printf '\n== %s\n' "$*"; }
until_true() { for _ in $(seq 1 200); do if "$@" > /dev/null 2>&1; then return 0; fi; sleep 0.2; done; echo "never true: $*"; return 1; }
main_pid() { systemctl show agentd.service -P MainPID; }
ask() { runuser -u agentd -- agentd "$@"; }
answers() { ask tools list --json > /tmp/tools 2>&1 && grep -q files.read /tmp/tools; }

say "install"
agentd service install --system
answers
test "$(stat -c %U "/proc/$(main_pid)")" = agentd
agentd service status --system

say "how well its tools are confined inside its own confinement"
ask grants add system.memory '*' > /tmp/added
ask tools call system.memory --json > /tmp/called
cat /tmp/called
grep -q '"sandbox_level": *"L4"' /tmp/called

say "killed: it is back, and the one before is gone"
before=$(main_pid)
kill -9 "$before"
back() { test "$(main_pid)" != "$before" && test "$(main_pid)" != 0 && answers; }
until_true back
test ! -e "/proc/$before"

say "stopped in its tracks: the watchdog finds out"
mkdir -p /etc/systemd/system/agentd.service.d
printf '[Service]\nWatchdogSec=3\nTimeoutAbortSec=2\n' > /etc/systemd/system/agentd.service.d/quick.conf
systemctl daemon-reload
systemctl restart agentd
before=$(main_pid)
kill -STOP "$before"
until_true back

say "what it logs has its priority"
mkdir -p /etc/agentd/automations
printf nonsense > /etc/agentd/automations/wrong.toml
chmod -R a+rX /etc/agentd
systemctl restart agentd
until_true answers
until_true sh -c 'journalctl -u agentd -p warning --no-pager | grep -q wrong.toml'

say "woken by its socket"
systemctl disable --now agentd.service
systemctl enable --now agentd.socket
test "$(systemctl is-active agentd.service || true)" != active
answers
test "$(systemctl is-active agentd.service)" = active

say "rating"
systemd-analyze security --threshold=25 agentd.service --no-pager > /tmp/rating || { cat /tmp/rating; exit 1; }
tail -n 1 /tmp/rating

say "uninstall"
agentd service uninstall --system
test "$(systemctl is-active agentd.service || true)" != active
echo "all of it is true"
