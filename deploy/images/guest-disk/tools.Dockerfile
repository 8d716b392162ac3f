# What makes a disk of a root filesystem (guest-disk/make-disk.sh), so that nothing of it is needed on the host; and the
# one program of the guest that is compiled.
ARG BASE
FROM ${BASE}
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -q \
    && apt-get install -q -y --no-install-recommends dosfstools e2fsprogs fdisk gcc libc6-dev mtools qemu-utils syslinux syslinux-common \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb
COPY identity.c /tmp/identity.c
RUN gcc -O2 -static -Wall -Wextra -Werror -o /usr/local/lib/envd-identity /tmp/identity.c -lm && rm /tmp/identity.c
COPY make-disk.sh /usr/local/bin/make-disk
ENTRYPOINT ["/bin/sh", "/usr/local/bin/make-disk"]
