"""What the daemon tells of itself to whoever operates it.

about.py      what a request is about, gathered while it is served, for its log line and its headers
metrics.py    what is counted and timed as it happens
state.py      what is looked at when `/metrics` is asked for
tracing.py    spans, where the extra `otel` is installed and an endpoint is set
lines.py      the last lines of the log
watchdog.py   who holds up the event loop

All of it is fed by the one log of events and by the edge of the HTTP app; nothing below knows of it.
"""
