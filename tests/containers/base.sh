#!/usr/bin/env bash
# Make the image python:3.11.17-slim-trixie from Debian's packages and a Python 3.11 of this machine, as no registry of
# images may be reachable. The image has this machine's certificates and pip's settings, with the wheels that they name.
#   base.sh FOLDER PYTHON      # FOLDER is made and removed; needs root and debootstrap
set -euo pipefail
root=$1 python=$2
trap 'rm -rf "$root"' EXIT
packages=ca-certificates,netbase,tzdata,curl,libssl3t64,libffi8,libsqlite3-0,zlib1g,libbz2-1.0,liblzma5,libreadline8t64
packages+=,libncursesw6,libgdbm6t64,libuuid1,libexpat1,libdb5.3t64,libnsl2,libtirpc3t64
debootstrap --variant=minbase --include="$packages" trixie "$root"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
home=$("$python" -c 'import sys; print(sys.base_prefix)')
tar -C "$home" --exclude=lib/python3.11/site-packages --exclude=lib/python3.11/test -c \
  bin/python3.11 lib/python3.11 include/python3.11 $(cd "$home" && ls -d lib/libpython* 2>/dev/null) | tar -C "$root/usr/local" -x
mkdir -p "$root/usr/local/lib/python3.11/site-packages" "$root/opt/wheels"
ln -sf python3.11 "$root/usr/local/bin/python3"
ln -sf python3 "$root/usr/local/bin/python"
cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
wheels=$("$python" -m pip config get global.find-links 2>/dev/null || true)
[ -z "$wheels" ] || cp "$wheels"/*.whl "$root/opt/wheels/"
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /opt/wheels\ntimeout = 180\n' > "$root/etc/pip.conf"
chroot "$root" update-ca-certificates
chroot "$root" ldconfig
chroot "$root" python -m ensurepip
ln -sf pip3 "$root/usr/local/bin/pip"
tar -C "$root" -c . | docker import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'ENV LANG=C.UTF-8' --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' \
  --change 'CMD ["python3"]' - python:3.11.17-slim-trixie
