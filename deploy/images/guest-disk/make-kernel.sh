#!/bin/sh
# Fetch Debian's generic kernel, keep of its modules what QEMU's machines need, and make a small initial root of busybox
# and the modules without which there is no root filesystem: /boot/vmlinuz, /boot/initrd.img, /lib/modules. The
# package's own installation makes a general initrd instead, which takes an emulated guest several seconds.
set -eu
here=$(dirname "$0")

# What finds and mounts the root filesystem: the first group always, the second if there is no virtio disk.
virtio_disk='virtio_pci virtio_blk crc32c_generic ext4'
other_disks='virtio_scsi ahci ata_piix sd_mod nvme'
# What the running system loads (machine.py), and what it may be asked for.
running='virtio_net e1000 e1000e bochs xhci_pci ehci_pci uhci_hcd usbhid hid_generic virtio_input psmouse evdev button
    virtio_console virtio_rng virtio_balloon qemu_fw_cfg af_packet fuse loop overlay nls_utf8 vfat 9pnet_virtio 9p'

cd /tmp
package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*-amd64\)$/\1/p' | head -n 1)
apt-get download -q "$package"
dpkg -x "$package"_*.deb kernel
rm "$package"_*.deb
version=$(ls kernel/lib/modules)
depmod -b kernel "$version"

# The files of modules and of all they need, those first that others need.
files_of() {
    for module in "$@"; do
        modprobe -d /tmp/kernel -S "$version" --show-depends "$module" 2>/dev/null || true
    done | sed -n 's|^insmod /tmp/kernel\(/[^ ]*\).*|\1|p' | awk '!seen[$0]++'
}

for file in $(files_of $virtio_disk $other_disks $running); do
    mkdir -p "$(dirname "$file")"
    cp "kernel$file" "$file"
done
cp kernel/lib/modules/"$version"/modules.builtin kernel/lib/modules/"$version"/modules.builtin.modinfo \
    kernel/lib/modules/"$version"/modules.order /lib/modules/"$version"/
depmod "$version"
cp kernel/boot/vmlinuz-"$version" /boot/vmlinuz

root=/tmp/initrd
mkdir -p $root/bin $root/proc $root/sys $root/dev $root/new $root/modules
cp /bin/busybox $root/bin/
cp "$here"/init $root/init
chmod 755 $root/init
for group in virtio_disk other_disks; do
    eval "wanted=\$$group"
    for file in $(files_of $wanted); do
        cp "kernel$file" $root/modules/
        echo "/modules/${file##*/}"
    done >$root/modules/$group
done
(cd $root && find . | sort | cpio --quiet -o -H newc --reproducible) >/boot/initrd.img
rm -r kernel $root
