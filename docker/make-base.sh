#!/usr/bin/env bash
# Makes a base image without any registry: a minimal Debian bookworm with its Python 3.11, by debootstrap, imported
# under the name given (default moshpitd-base:bookworm). Needs root and a Debian mirror: MIRROR, or debootstrap's own.
set -euo pipefail

tag=${1:-moshpitd-base:bookworm}
missing=()
for tool in debootstrap docker tar; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if ((${#missing[@]})); then
    echo "make-base: missing ${missing[*]}: apt-get install debootstrap docker.io" >&2
    exit 1
fi
if ((EUID)); then
    echo "make-base: debootstrap needs root; run 'sudo $0 $tag' once, then 'make image' with BASE=$tag" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

echo "make-base: making $tag with debootstrap, about a minute"
packages=python3,python3-venv,ca-certificates
if ! debootstrap --variant=minbase --include=$packages bookworm "$root" ${MIRROR:+"$MIRROR"} >"$work/log" 2>&1; then
    tail -n 20 "$work/log" >&2
    echo "make-base: debootstrap failed; is a Debian mirror reachable? MIRROR=URL names another" >&2
    exit 1
fi
# What an image has no use for: half of the size.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*
tar -C "$root" --numeric-owner -cf - . | docker import --change 'CMD ["python3"]' - "$tag" >/dev/null
echo "make-base: $tag is ready"
