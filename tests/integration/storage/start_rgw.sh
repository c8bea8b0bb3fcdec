#!/usr/bin/env bash
# One Ceph node with an S3 gateway, in memory and on loopback, from Debian's packages radosgw, ceph-mon, ceph-osd and
# ceph-common. Runs until it is ended; says "ready" once the gateway answers.
#   start_rgw.sh FOLDER PORT ACCESS_KEY SECRET_KEY
set -euo pipefail
folder=$1 port=$2 access=$3 secret=$4
monitor=$((port + 9))
fsid=$(cat /proc/sys/kernel/random/uuid)
classes=$(dirname "$(find /usr/lib -path '*/rados-classes/libcls_rgw.so' | head -n 1)")
mkdir -p "$folder"/{mon,osd,run,rgw}
cat > "$folder/ceph.conf" <<EOF
[global]
fsid = $fsid
keyring = $folder/keyring
mon host = v2:127.0.0.1:$monitor/0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
mon allow pool size one = true
mon data = $folder/mon
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
osd class dir = $classes
osd data = $folder/osd
memstore device bytes = 2147483648
run dir = $folder/run
log file = $folder/run/\$name.log
pid file = $folder/run/\$name.pid
admin socket = $folder/run/\$name.asok
ms bind port min = $((port + 19))
ms bind port max = $((port + 59))
[client.rgw.a]
rgw data = $folder/rgw
rgw frontends = beast endpoint=127.0.0.1:$port
EOF
keys=$folder/keyring
conf=(-c "$folder/ceph.conf")
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
ceph-authtool -C "$keys" --gen-key -n mon. --cap mon 'allow *'
ceph-authtool "$keys" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ceph-authtool "$keys" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
ceph-authtool "$keys" --gen-key -n client.rgw.a --cap mon 'allow *' --cap osd 'allow *'
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$monitor]" "$folder/monmap" --clobber
ceph-mon "${conf[@]}" -i a --mkfs --monmap "$folder/monmap" --keyring "$keys"
ceph-mon "${conf[@]}" -i a -f --public-addr "v2:127.0.0.1:$monitor" &
disk=$(cat /proc/sys/kernel/random/uuid)
ceph "${conf[@]}" osd new "$disk"  # waits for the monitor
ceph-osd "${conf[@]}" -i 0 --mkfs --osd-uuid "$disk"
ceph-osd "${conf[@]}" -i 0 -f &
until ceph "${conf[@]}" osd stat | grep -q '1 up'; do sleep 0.5; done
radosgw "${conf[@]}" -n client.rgw.a -f &
until curl -sf "http://127.0.0.1:$port/" >/dev/null; do sleep 0.5; done
radosgw-admin "${conf[@]}" user create --uid=deal --display-name=deal --access-key="$access" --secret-key="$secret" >/dev/null
echo ready
wait
