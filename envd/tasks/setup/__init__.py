"""A task's set-up: the steps under `config` that run on a clean desktop before its first observation, and those under
`evaluator.postconfig` that run before it is judged. `runner.run` runs them; each type has a function in one of the
other modules."""
