"""Virtual machines: one QEMU process each, spoken to over QMP, cold booted once and cloned ever after.

    machine.py    what shapes a machine, and QEMU's command line for it
    monitor.py    the QMP connection to one of them
    cell.py       where a QEMU process runs: a container, or a sandboxed process of this host
    kvm.py        whether /dev/kvm really executes guests
    disks.py      which disks can be used, and overlays on them
    serial.py     what a guest writes to its serial console
    identity.py   what must differ between clones, and their clocks
    running.py    machines that run: started, connected to, watched, ended
    templates.py  frozen machines on memory-backed storage (frozen.py), and what they are keyed by
    keeping.py    what a daemon knows of its templates: the next one, those in use, those that failed
    saved.py      full states on disk, for when a template cannot be cloned
    making.py     how a template is made: boot, settle, freeze, trial
    trial.py      which ways past the guest work
    console.py    screen, keyboard and pointer from outside the guest (keyboard.py, pictures.py)
    capacity.py   memory and processors for one machine more
    history.py    how long boots took here
    engine.py     instances: clone, else full state, else cold boot

The drivers `docker` and `qemu` differ only in their cells.
"""
