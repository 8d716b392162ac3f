# What makes a disk of a root filesystem (guest-disk/make-disk.sh), so that nothing of it is needed on the host.
ARG BASE
FROM ${BASE}
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -q \
    && apt-get install -q -y --no-install-recommends dosfstools e2fsprogs fdisk mtools qemu-utils syslinux syslinux-common \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb
COPY make-disk.sh /usr/local/bin/make-disk
ENTRYPOINT ["/bin/sh", "/usr/local/bin/make-disk"]
