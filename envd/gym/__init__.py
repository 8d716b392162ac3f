"""Desktops as Gymnasium environments: `DesktopEnv`, and `DesktopVectorEnv` for many at once.

    pip install 'envd-server[gym]'

An episode is one OSWorld task on a fresh desktop. An observation has the screen and the task's instruction; an action
is what the model said (or a pyautogui program, or a gesture: see `actions`); every reward is 0.0 but the last one,
which is the score that the task's own evaluator returned.

    import envd.gym
    import gymnasium

    task = {
        "id": "no-such-thing",
        "instruction": "Sort the seas by height.",
        "evaluator": {"func": "infeasible"},
    }
    env = gymnasium.make("envd/Desktop-v0", url=URL, tasks=task, max_steps=15)
    observation, info = env.reset(seed=7)
    assert observation["instruction"] == "Sort the seas by height."
    assert observation["screenshot"].shape[2] == 3

    done = False
    for said in ("Thought: Let me see.\\nAction: wait()", "Thought: It has none.\\nAction: call_user()"):
        observation, reward, terminated, truncated, info = env.step(said)
        done = terminated or truncated
    assert done and reward == 1.0 and info["verdict"].status == "scored"
    env.close()

`terminated` is the model's doing: it said that it is done or gives up, or said what cannot be read. `truncated` is
everybody else's: `max_steps`, the episode's time. Both are judged. `info["end_reason"]` says which it was.

**A failure is never a number.** When a desktop is lost, or the episode has no score, `reset` and `step` raise what
happened, an `envd.errors.EnvdError` with `code`, `fault` and `retryable`; `reset` then begins anew. With
`on_failure="mask"` a step does not raise: the episode ends truncated, its reward is not a number (`nan`), and `info`
has `mask` True and the `error`. Leave those episodes out of the batch. A vector of envs always does that, so that the
others go on.

    envs = gymnasium.make_vec("envd/Desktop-v0", num_envs=2, url=URL, tasks=[task], max_steps=15)
    observations, infos = envs.reset(seed=7)
    observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
    keep = ~infos["mask"]
    assert observations["screenshot"].shape[0] == 2 and keep.all()
    envs.close()

The envs of a vector are had by one lease, all or none, and step at the same time. `make_vec` with
`vectorization_mode="sync"`, or a `gymnasium.vector.SyncVectorEnv`, works as well: give each env the same
`lease=envd.gym.DesktopLease(count, url)`, or they take leases one by one and may wait for each other for ever.

A lease is renewed for as long as its process lives, and outlives restarts of the daemon. One that was lost is asked
for again by the next `reset`.
"""

from __future__ import annotations

from ..errors import MissingDependency

try:
    import gymnasium
    import numpy  # noqa: F401 - the spaces need it
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"envd.gym needs the package {error.name}, which is not installed.",
        hint="pip install 'envd-server[gym]'",
    ) from error

from .desktop import DesktopEnv
from .holding import DesktopLease
from .vector import DesktopVectorEnv

__all__ = ["ID", "DesktopEnv", "DesktopLease", "DesktopVectorEnv"]

ID = "envd/Desktop-v0"

if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point="envd.gym.desktop:DesktopEnv",
        vector_entry_point="envd.gym.vector:DesktopVectorEnv",
        nondeterministic=True,
    )
