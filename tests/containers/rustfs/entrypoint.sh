#!/bin/bash
# Ceph RGW on one node with its data under /data, in place of RustFS: port 9000, the administrator's keys of RUSTFS_*.
set -euo pipefail
: "${RUSTFS_ACCESS_KEY:?}" "${RUSTFS_SECRET_KEY:?}"
D=/data; F=$D/ceph.conf; K=$D/keyring; C="-c $F"; export CEPH_CONF=$F
rm -rf /tmp/run; mkdir -p /tmp/run $D/mon $D/osd $D/rgw
new=no; [ -s $D/done ] || new=yes
if [ $new = yes ]; then
  cat > $F <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
keyring = $K
mon host = v2:127.0.0.1:3300/0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 3221225472
bluestore fsck quick fix on mount = false
osd memory target = 939524096
osd data = $D/osd
mon data = $D/mon
run dir = /tmp/run
log to file = false
log to stderr = false
err to stderr = true
pid file = /tmp/run/\$name.pid
admin socket = /tmp/run/\$name.asok
[client.rgw.a]
rgw data = $D/rgw
rgw frontends = beast endpoint=0.0.0.0:9000
CONF
  fsid=$(sed -n 's/^fsid = //p' $F)
  ceph-authtool -C $K --gen-key -n mon. --cap mon 'allow *'
  ceph-authtool $K --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  ceph-authtool $K --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
  ceph-authtool $K --gen-key -n client.rgw.a --cap mon 'allow *' --cap osd 'allow *'
  monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:3300]" $D/monmap --clobber
  ceph-mon $C -i a --mkfs --monmap $D/monmap --keyring $K
fi
ceph-mon $C -i a -f --public-addr v2:127.0.0.1:3300 & mon=$!
until ceph $C --connect-timeout 5 -s >/dev/null 2>&1; do sleep 0.5; done
if [ $new = yes ]; then
  u=$(cat /proc/sys/kernel/random/uuid); ceph $C osd new "$u"; ceph-osd $C -i 0 --mkfs --osd-uuid "$u"
fi
ceph-osd $C -i 0 -f & osd=$!
radosgw $C -n client.rgw.a -f & rgw=$!
stop() { kill $rgw; wait $rgw || :; kill $osd; wait $osd || :; kill $mon; wait $mon || :; exit 0; }
trap stop TERM INT
until curl -sf http://127.0.0.1:9000/ >/dev/null; do sleep 0.5; done
if [ $new = yes ]; then
  radosgw-admin $C user create --uid=deal --display-name=deal --access-key="$RUSTFS_ACCESS_KEY" --secret-key="$RUSTFS_SECRET_KEY" >/dev/null
  radosgw-admin $C user create --uid=ready --display-name=ready --access-key=ready --secret-key=ready >/dev/null
  python /ready.py && echo 1 > $D/done
fi
echo ready
wait -n $mon $osd $rgw || :
stop
