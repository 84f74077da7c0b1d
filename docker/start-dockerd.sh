#!/usr/bin/env bash
# Starts a container engine on a machine that has none running and no init system to do it (a sandbox, a CI runner).
# Needs root; does nothing where an engine answers already. The engine's log: DOCKERD_LOG, default /var/log/dockerd.log.
set -euo pipefail

log=${DOCKERD_LOG:-/var/log/dockerd.log}

fail() {
    echo "start-dockerd: $*" >&2
    exit 1
}

if docker info >/dev/null 2>&1; then
    echo "start-dockerd: an engine answers already"
    exit 0
fi
((EUID == 0)) || fail "needs root"
missing=()
for tool in dockerd containerd runc docker iptables; do command -v "$tool" >/dev/null || missing+=("$tool"); done
((${#missing[@]} == 0)) || fail "missing ${missing[*]}; on Debian: apt-get install docker.io iptables docker-compose"
mountpoint -q /sys/fs/cgroup || fail "no cgroups are mounted on /sys/fs/cgroup"

# Without iptables a kernel still runs containers that talk over one bridge, which is all that a swarm needs.
for options in "" "--iptables=false --ip6tables=false"; do
    # shellcheck disable=SC2086 # options are words
    setsid --fork dockerd $options >"$log" 2>&1 </dev/null
    for _ in $(seq 60); do
        sleep 0.5
        if docker info >/dev/null 2>&1; then
            echo "start-dockerd: running${options:+ with $options}; its log is $log"
            exit 0
        fi
        pgrep -x dockerd >/dev/null || break
    done
    # One that neither answers nor ends would hold the second one off.
    pgrep -x dockerd >/dev/null && fail "an engine started but does not answer; see $log"
done
tail -n 5 "$log" >&2
fail "the engine does not start; see $log"
