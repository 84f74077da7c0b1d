#!/usr/bin/env bash
# Builds the image: first wheels of moshpitd, its client and all they need into docker/wheels, then the Dockerfile.
#
#   BASE=IMAGE   base image; default python:X.Y-slim, X.Y that of PYTHON; where no registry has it, one by make-base.sh
#   IMAGE=NAME   name of the image to make; default moshpitd:local
#   PYTHON=PATH  Python that builds the wheels; default the repository's .venv, else python3
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
image=${IMAGE:-moshpitd:local}
python=${PYTHON:-$repository/.venv/bin/python}
[[ -x $python ]] || python=${PYTHON:-python3}

fail() {
    echo "build-image: $*" >&2
    exit 1
}

command -v docker >/dev/null || fail "there is no docker; on Debian: apt-get install docker.io"
docker info >/dev/null 2>&1 || fail "no container engine answers; start it, or as root: docker/start-dockerd.sh"
[[ $(uname -s) == Linux ]] || fail "the wheels would not fit the image, they are this system's; run this on Linux"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"

if [[ -n ${BASE:-} ]]; then
    base=$BASE
else
    base=python:$version-slim
    if ! docker image inspect "$base" >/dev/null 2>&1 && ! docker pull --quiet "$base"; then
        base=moshpitd-base:bookworm
        echo "build-image: no registry has python:$version-slim for us, so the base is $base"
        [[ $version == 3.11 ]] || fail "its Python is 3.11, but $python is $version: give PYTHON, or BASE"
        docker image inspect "$base" >/dev/null 2>&1 || "$here/make-base.sh" "$base"
    fi
fi

# From a copy: setuptools would pick up what an earlier build left in build/, modules since deleted included.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
tar -C "$repository" --exclude='./.*' --exclude=./docker --exclude=build --exclude='*.egg-info' -cf - . |
    tar -C "$sources" -xf -
rm -rf "$here/wheels"
echo "build-image: wheels with $python ($version)"
"$python" -m pip wheel --quiet --wheel-dir "$here/wheels" "$sources" "$sources/clients/python"

echo "build-image: $image from $base"
docker build --build-arg "BASE=$base" --tag "$image" "$here"
docker run --rm "$image" version
