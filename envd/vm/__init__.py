"""Virtual machines: one QEMU process each, spoken to over QMP, cold booted once and cloned ever after.

    machine.py    what shapes a machine, and QEMU's command line for it
    monitor.py    the QMP connection to one of them
    cell.py       where a QEMU process runs: a container, or a sandboxed process of this host
    templates.py  frozen machines on memory-backed storage, and what they are keyed by
    engine.py     instances: clone, else restore, else cold boot
    console.py    screen, keyboard and pointer from outside the guest
    kvm.py        whether /dev/kvm really executes guests

The drivers `docker` and `qemu` differ only in their cells.
"""
