#!/bin/sh
# libvirt.sh DIR [ADDRESS PKI]: runs libvirtd and virtlogd with everything they keep below DIR, in namespaces of their own,
# so that the machine's libvirt notices nothing. It listens at ADDRESS, by the certificates in PKI. To be started by
# unshare as the first process; whatever it starts ends with it.
set -eu
at=$1 address=${2-} pki=${3-}
mkdir -p "$at/run/libvirt" "$at/etc/libvirt"
if [ "$(id -u)" = 0 ]; then
  mount --make-rprivate /
  for place in /run /etc /var/lib /var/cache /var/log; do
    mkdir -p "$place/libvirt" "$at$place/libvirt"
    mount --bind "$at$place/libvirt" "$place/libvirt"
  done
else
  # An ordinary user's libvirtd keeps everything in that user's directories.
  export HOME="$at" XDG_RUNTIME_DIR="$at/run" XDG_CONFIG_HOME="$at/etc" XDG_CACHE_HOME="$at/cache" \
    XDG_DATA_HOME="$at/data"
fi
cat > "$at/libvirtd.conf" << END
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:$at/libvirtd.log"
END
# Guests run as whoever runs the test, on files as they are.
cat > "$at/etc/libvirt/qemu.conf" << END
user = "+$(id -u)"
group = "+$(id -g)"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
security_driver = "none"
END
if [ "$address" ]; then
  cat >> "$at/libvirtd.conf" << END
listen_addr = "$address"
auth_tls = "none"
key_file = "$pki/server-key.pem"
cert_file = "$pki/server-cert.pem"
ca_file = "$pki/ca-cert.pem"
END
  cat >> "$at/etc/libvirt/qemu.conf" << END
backup_tls_x509_cert_dir = "$pki"
backup_tls_x509_verify = 1
END
fi
PATH=$PATH:/usr/sbin:/sbin
virtlogd --pid-file "$at/virtlogd.pid" &
libvirtd ${address:+--listen} --pid-file "$at/libvirtd.pid" --config "$at/libvirtd.conf" &
# As the first process this must also bury the emulators that libvirt sends into the background, which wait does.
wait $!
