#!/bin/sh
# build.sh PACKAGES OUT: makes a small Linux guest out of Debian packages, on files alone: no root, no mount, no loop
# device, nothing installed.
#
#   OUT/disk.qcow2                boots by itself; GPT; partition 1 is ext4 with busybox, the real guest agent, the writer
#   OUT/vmlinuz, OUT/initrd.img   the same kernel for an emulator that starts it directly: root=auto rw
set -eu
here=$(cd "$(dirname "$0")" && pwd)
packages=$(cd "$1" && pwd)
out=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# sgdisk, mke2fs, depmod and modprobe; an ordinary user's path lacks them.
PATH=$PATH:/usr/sbin:/sbin

unpack() { dpkg-deb -x "$1" "$2"; }

mkdir "$work/kernel" "$work/debian"
for package in "$packages"/*.deb; do
  case ${package##*/} in
    linux-image-*) unpack "$package" "$work/kernel" ;;
    *) unpack "$package" "$work/debian" ;;
  esac
done
version=$(basename "$work"/kernel/lib/modules/*)
cp "$work/kernel/boot/vmlinuz-$version" "$out/vmlinuz"
depmod -b "$work/kernel" "$version"

# The files of a driver and of all it needs, in loading order; nothing when this kernel has it built in or not at all.
driver() {
  modprobe -d "$work/kernel" -S "$version" --ignore-install --show-depends "$1" 2> /dev/null |
    awk '$1 == "insmod" { print $2 }'
}

# --- the first file system: busybox and what it takes to find the disk and talk to the agent's port
first=$work/first
mkdir -p "$first/bin" "$first/dev" "$first/proc" "$first/sys" "$first/root" "$first/drivers"
cp "$work/debian/bin/busybox" "$first/bin/busybox"
install -m 755 "$here/first-init" "$first/init"
for name in virtio_pci virtio_blk virtio_scsi sd_mod nvme virtio_console crc32c_generic ext4 button evdev; do
  driver "$name"
done | awk '!seen[$0]++' | while read -r file; do
  cp "$file" "$first/drivers/"
  echo "${file##*/}" >> "$first/drivers/order"
done
(cd "$first" && find . | cpio -o -H newc -R 0:0 --quiet | gzip -1) > "$out/initrd.img"

# --- the disk
root=$work/root
mkdir -p "$root/bin" "$root/sbin" "$root/etc/qemu" "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/tmp" \
  "$root/var/log" "$root/root" "$root/data" "$root/mnt" "$root/usr/sbin" "$root/usr/bin" \
  "$root/etc/acpi/PWRF"
cp "$work/debian/bin/busybox" "$root/bin/busybox"
for name in init writer shutdown; do install -m 755 "$here/$name" "$root/sbin/$name"; done
# What the power button does.
ln -s /sbin/shutdown "$root/etc/acpi/PWRF/00000080"
install -m 755 "$here/freeze-hook" "$root/etc/qemu/fsfreeze-hook"
echo 'root::0:0:root:/root:/bin/sh' > "$root/etc/passwd"
echo 'root:x:0:' > "$root/etc/group"
echo guest > "$root/etc/hostname"
# Drivers for file systems and devices that only some tests use; mount and modprobe find them.
for name in xfs btrfs vfat nls_ascii nbd virtio_net; do driver "$name"; done | sort -u | while read -r file; do
  at=$root${file#"$work/kernel"}
  mkdir -p "$(dirname "$at")"
  cp "$file" "$at"
done
depmod -b "$root" "$version" 2> /dev/null
# The agent with the libraries it loads, as their own loader finds them.
cp "$work/debian/usr/sbin/qemu-ga" "$root/usr/sbin/"
loader=$(find "$work/debian/lib" "$work/debian/usr/lib" -name 'ld-linux-x86-64.so.2' | head -n 1)
at=lib/x86_64-linux-gnu
load() { "$loader" --library-path "$work/debian/$at:$work/debian/usr/$at" "$@"; }
mkdir -p "$root/$at" "$root/lib64"
cp -L "$loader" "$root/lib64/"
load --list "$root/usr/sbin/qemu-ga" |
  awk '$3 ~ /^\// { print $3 }' | while read -r file; do cp -L "$file" "$root/$at/"; done
mkdir "$root/boot"
cp "$out/vmlinuz" "$out/initrd.img" "$root/boot/"

disk=$work/disk.raw
truncate -s 256M "$disk"
sgdisk --clear --new=1:2048:0 --typecode=1:8300 --change-name=1:root --set-alignment=1 --new=2:34:2047 --typecode=2:ef02 \
  "$disk" > /dev/null
sectors=$(sgdisk --info=1 "$disk" | awk '/^Partition size:/ { print $3 }')
mke2fs -q -t ext4 -L root -E offset=$((2048 * 512)),root_owner=0:0,nodiscard,lazy_itable_init=0 -d "$root" "$disk" \
  "$((sectors / 2))k"

# The boot loader. Its first sector and its core each hold the number of the sector where they go on; GRUB's own
# installer would want a device to ask. Places: boot.img has it at byte 0x5c, the core at byte 0x1f4, little-endian.
grub=$work/debian/usr/lib/grub/i386-pc
cat > "$work/grub.cfg" << END
set root=(hd0,gpt1)
linux /boot/vmlinuz root=auto rw quiet console=ttyS0 panic=1
initrd /boot/initrd.img
boot
END
load "$work/debian/usr/bin/grub-mkimage" --directory "$grub" --format i386-pc --output "$work/core.img" \
  --prefix '(hd0,gpt1)/boot' --config "$work/grub.cfg" biosdisk part_gpt ext2 linux
put() { dd bs=1 seek="$2" conv=notrunc of="$1" status=none; }
printf '\042' | put "$grub/boot.img" $((0x5c))
printf '\043' | put "$work/core.img" $((0x1f4))
head -c 440 "$grub/boot.img" | put "$disk" 0
dd if="$work/core.img" of="$disk" bs=512 seek=34 conv=notrunc status=none
qemu-img convert -O qcow2 "$disk" "$out/disk.qcow2"
