#!/bin/sh
# make-disk ROOT.tar DISK.qcow2 [MEGABYTES]: makes a disk that boots by BIOS of a root filesystem. It needs no privileges
# but to own files as anybody: nothing is mounted. Disk: a boot record, a FAT partition with kernel, initial root and
# boot loader, and an ext4 partition with the rest.
set -eu
archive=$1
target=$2
size_mb=${3:-8192}
boot_start=2048 boot_sectors=131072
root_start=$((boot_start + boot_sectors))
root_mb=$((size_mb - root_start / 2048 - 1))
# Times and identifiers are always the same.
export E2FSPROGS_FAKE_TIME=1700000000 SOURCE_DATE_EPOCH=1700000000 MTOOLS_SKIP_CHECK=1
uuid=6f2d1c1e-0000-4000-8000-656e76640001

work=$(mktemp -d)
cd "$work"
mkdir root boot
tar -C root --numeric-owner -xf "$archive"
mv root/boot/* boot/
rm -rf root/.dockerenv root/dev root/proc root/sys root/run
mkdir root/dev root/proc root/sys root/run
install -m 755 /usr/local/lib/envd-identity root/opt/envd/lib/identity
# As long as the name of a clone, whose files are then written over (identity.c).
printf '127.0.0.1 localhost\n127.0.1.1 desktop-template\n::1 localhost\n' >root/etc/hosts
printf 'desktop-template\n' >root/etc/hostname
printf 'nameserver 10.0.2.3\n' >root/etc/resolv.conf
rm -f root/etc/machine-id root/var/lib/dbus/machine-id

# No checksums of metadata and no tables to be made later: both would be work for an emulated processor.
truncate -s "${size_mb}M" disk
mke2fs -q -t ext4 -d root -U $uuid -E offset=$((root_start * 512)),hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=0,nodiscard \
    -O ^metadata_csum,^orphan_file -J size=32 -i 32768 -m 0 -L envd-root disk ${root_mb}M

printf 'label: dos\nlabel-id: 0x656e7664\n%s,%s,6,*\n%s,%s,83\n' \
    $boot_start $boot_sectors $root_start $((root_mb * 2048)) | sfdisk -q disk
dd if=/usr/lib/syslinux/mbr/mbr.bin of=disk bs=440 count=1 conv=notrunc status=none
cat >boot/syslinux.cfg <<'END'
DEFAULT envd
PROMPT 0
LABEL envd
  LINUX /vmlinuz
  INITRD /initrd.img
  APPEND console=tty0 console=ttyS0,115200 quiet net.ifnames=0 mitigations=off audit=0 nowatchdog random.trust_cpu=on panic=1
END
truncate -s $((boot_sectors * 512)) boot.fat
mkfs.fat -F 16 -n ENVD-BOOT -i 656e7664 --invariant -h $boot_start boot.fat >/dev/null
mcopy -i boot.fat boot/* ::/
syslinux --install boot.fat
dd if=boot.fat of=disk bs=1M seek=$((boot_start / 2048)) conv=notrunc,sparse status=none
qemu-img convert -f raw -O qcow2 disk "$target"
