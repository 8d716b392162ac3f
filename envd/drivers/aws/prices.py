"""What an hour of an instance costs, roughly."""

from __future__ import annotations

from typing import Final

# Families from large upwards double with each size.
_LARGE: Final = {
    "t2": 0.0928,
    "t3": 0.0832,
    "t3a": 0.0752,
    "m5": 0.096,
    "m5a": 0.086,
    "m6i": 0.096,
    "m6a": 0.0864,
    "m7i": 0.1008,
    "m7i-flex": 0.09576,
    "m7a": 0.11592,
    "c5": 0.085,
    "c5a": 0.077,
    "c6i": 0.085,
    "c6a": 0.0765,
    "c7i": 0.08925,
    "c7a": 0.10264,
    "r5": 0.126,
    "r5a": 0.113,
    "r6i": 0.126,
    "r6a": 0.1134,
    "r7i": 0.1323,
}
_SIZES: Final = {"large": 1, "xlarge": 2, "2xlarge": 4, "4xlarge": 8}
_SMALLER: Final = {"t2.medium": 0.0464, "t3.small": 0.0208, "t3.medium": 0.0416, "t3a.medium": 0.0376}
_ABSENT: Final = {f"{family}.4xlarge" for family in ("t2", "t3", "t3a")}

PRICES: Final[dict[str, float]] = _SMALLER | {
    f"{family}.{size}": round(price * times, 6)
    for family, price in _LARGE.items()
    for size, times in _SIZES.items()
    if f"{family}.{size}" not in _ABSENT
}
"""US dollars an hour of x86 types that desktops are run on: Linux, on demand, in us-east-1, as AWS's price list had
them in January 2026. Approximate: most other regions are dearer, by up to some 60 %, and neither disks, public
addresses, traffic nor the surplus processor time of t types is in it. ENVD_AWS_PRICES is put over it."""
