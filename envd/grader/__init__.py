"""The evaluator process: the getters and metrics of `desktop-env`, run where nothing of ours can be harmed.

This package runs in an interpreter of its own, which has desktop-env and not envd: it imports the standard library,
itself and what the evaluators bring. The daemon's side of it is `envd.tasks.grading`.

    zygote    one warm process: has imported the evaluators, forks a keeper for each grading
    keeper    guards one grading: deadline, cancellation, log, and that nothing of it is left behind
    jail      what a grading may see and use of the machine
    worker    one grading: getters, metrics, and how their numbers become one
    desktop   the `env` that getters are given, and the controller in it
    network   what getters ask of guests and of the internet by themselves, watched
    ledger    what became of each such call; whether a getter's value can be trusted
    library   where getters and metrics come from; placeholders for what is not installed
    extras    the few that newer task files name and desktop-env 1.0.2 lacks
    mended    getters of 1.0.2 that say something else than what is asked
    values    getter values as JSON and back
    frames    JSON messages over a pipe
"""
