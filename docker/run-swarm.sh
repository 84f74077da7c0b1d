#!/usr/bin/env bash
# Brings the swarm of compose.yaml up, lets its judge say whether it was right, and takes it down, whatever happens.
#
#   IMAGE=NAME      image to run; default moshpitd:local (build-image.sh makes it)
#   DEADLINE_S=N    seconds the trainers have for their results; default 120
#   COMPOSE=CMD     default `docker compose` where it is, else docker-compose
#
# Exit code: the judge's (0 right, 1 wrong, 5 a result was missing at the deadline), else 1.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
deadline_s=${DEADLINE_S:-120}
export MOSHPIT_IMAGE=${IMAGE:-moshpitd:local} MOSHPIT_DEADLINE_S=$deadline_s
# A project of its own, so that runs beside each other and left-overs of a killed one do not meet.
export COMPOSE_PROJECT_NAME=moshpitd-swarm-$$

fail() {
    echo "run-swarm: $*" >&2
    exit 1
}

command -v docker >/dev/null || fail "there is no docker; on Debian: apt-get install docker.io docker-compose"
docker info >/dev/null 2>&1 || fail "no container engine answers; start it, or as root: docker/start-dockerd.sh"
docker image inspect "$MOSHPIT_IMAGE" >/dev/null 2>&1 || fail "there is no image $MOSHPIT_IMAGE: make image"
if [[ -n ${COMPOSE:-} ]]; then
    read -ra compose <<<"$COMPOSE"
elif docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
elif command -v docker-compose >/dev/null; then
    compose=(docker-compose)
else
    fail "there is no compose; on Debian: apt-get install docker-compose"
fi
compose+=(--file "$here/compose.yaml")

log=$(mktemp)
take_down() {
    local code=$?
    trap - EXIT
    trap '' INT TERM
    if ((code)); then
        cat "$log"
        echo "run-swarm: what the containers said last:"
        "${compose[@]}" ps || true
        "${compose[@]}" logs --no-color --tail 40 || true
        # Why a daemon is not healthy only its health check knows.
        local sick='{{range .Log}}{{$.Name}}: {{.Output}}{{end}}'
        local health="{{with .State.Health}}{{if ne .Status \"healthy\"}}$sick{{end}}{{end}}"
        "${compose[@]}" ps --quiet | xargs --no-run-if-empty docker inspect --format "$health" || true
    fi
    # Tears a swarm down that has been judged: nobody needs the drain of each daemon.
    "${compose[@]}" down --volumes --timeout 5 >"$log" 2>&1 || { cat "$log" >&2; code=$((code ? code : 1)); }
    rm -f "$log"
    exit "$code"
}
trap take_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "run-swarm: starting 4 daemons and 4 trainers of $MOSHPIT_IMAGE"
timeout $((deadline_s + 60)) "${compose[@]}" up --detach >"$log" 2>&1 || fail "the swarm did not come up"
judge=$("${compose[@]}" ps --quiet --all judge 2>/dev/null || "${compose[@]}" ps --quiet judge)
verdict=$(timeout $((deadline_s + 60)) docker wait "$judge") || fail "the judge did not end in time"
docker logs "$judge"
exit "$verdict"
