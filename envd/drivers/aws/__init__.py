"""Desktops that are EC2 instances of their own (`PROVIDER=aws`).

driver.py     AwsDriver: the promise of `drivers/base.py`, put together from what follows
desktops.py   the desktops: made, ended, renewed, put to sleep
cloud.py      the open clients, and the one way in which AWS is called
refusals.py   what AWS says when it refuses, told apart and made into errors that say what to do
place.py      where desktops go: region, subnets, security groups; set, or found out
metadata.py   what EC2 tells an instance about itself
tags.py       how our instances and schedules are named and known again
launch.py     one RunInstances, and what it asks for
boot.py       what can be told of an instance while its system comes up
instances.py  what state our instances are in, by one question for all of them
ttl.py        the schedule at AWS that ends an instance when nobody prolongs it
budget.py     limits of number and price, and what types cost
sweep.py      what an earlier life or a failure left running, and its end
check.py      `envd aws check`: whether all of that can work
"""

from __future__ import annotations

from ...errors import MissingDependency

try:
    from .driver import AwsDriver
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"PROVIDER=aws needs the Python package {error.name}.", hint="Run: pip install 'envd-server[aws]'"
    ) from error

__all__ = ["AwsDriver"]
