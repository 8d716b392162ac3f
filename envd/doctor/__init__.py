"""`envd doctor`: why desktops cannot be had, one finding at a time, each with what to do.

    host.py      on the server: which looks there are, and what of this host they need
    machine.py   platform, Python and packages, clock
    serving.py   settings, state directory, port, who can come in, the daemon that runs
    kvm.py       whether /dev/kvm executes guests, and what of it is missing
    desktops.py  what desktops of each provider are made of, evaluators, what earlier daemons left
    capacity.py  how many desktops fit, and what binds
    remote.py    from another host: names, connections, proxies, access, clock, speed
    trial.py     a desktop that is had, used and given back, and its seconds
    wire.py      one question to one server, without a proxy and without a second try

Nothing here changes anything, but for the trial, which somebody has to ask for.
"""
