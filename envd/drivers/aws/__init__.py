"""Desktops that are EC2 instances of their own (`PROVIDER=aws`).

driver.py          AwsDriver: what is opened, and what runs beside the desktops
desktops.py        the desktops of one daemon: launched, renewed, put to sleep, ended
cloud.py           the open clients, and the one way in which AWS is called
refusals.py        what AWS says when it refuses, told apart and made into errors that say what to do
place.py           where desktops go: region, subnets, security groups; set, or found out
metadata.py        what EC2 tells an instance about itself
tags.py            how our instances and schedules are named and known again
launch.py          one RunInstances, and what it asks for
instances.py       what state our instances are in, by one question for all of them
boot.py            what is told of an instance while its system comes up
ttl.py             the schedule at AWS that ends an instance when nobody prolongs it
scheduler_role.py  the role as which the scheduler does that: found, or made
budget.py          limits of number and price
prices.py          what types cost
meter.py           what they have cost in this life of the daemon
sweep.py           what an earlier life or a failure left running, and its end
check.py           `envd aws check`: whether all of that can work, with findings.py, check_account.py, check_network.py,
                   check_permissions.py, and reach.py for the rules of security groups
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
