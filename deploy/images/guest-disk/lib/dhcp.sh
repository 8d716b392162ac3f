#!/bin/sh
# What udhcpc calls when it got an address, or lost it.
busybox=/bin/busybox
case $1 in
bound | renew)
    $busybox ip address flush dev "$interface"
    $busybox ip address add "$ip/${mask:-24}" dev "$interface"
    [ -n "${router:-}" ] && $busybox ip route replace default via "${router%% *}"
    for server in ${dns:-}; do echo "nameserver $server"; done >/etc/resolv.conf
    ;;
esac
