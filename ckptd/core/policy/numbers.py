"""What a reported number says of training: healthy, not finite, or a spike. Pure: numbers in, a finding out.

A spike is a value that stands out upwards from the last `window` healthy ones of its rank by the modified z-score of
Iglewicz and Hoaglin ("How to Detect and Handle Outliers", 1993):

    z = (value - median) / scale,    scale = max(1.4826 * MAD, 0.01 * |median|)

where MAD is the median of |x - median| over the window, and 1.4826 makes it an estimate of the standard deviation of
normal values. It is one only if z exceeds `zscore` and the value exceeds everything in the window. The second term of
the scale is a floor: where a loss has gone flat, MAD is next to nothing and any trifle would be a spike. Median and MAD
do not move when less than half of the window is odd, which mean and standard deviation do with one value. Only what is
healthy joins the window, so a loss that stays up stays a spike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

NAN = "nan"
SPIKE = "spike"
LEAST = 16
"""Before so many values are known, or a window of fewer is full, nothing is called a spike."""
_MAD_TO_SIGMA = 1.4826
_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class NumbersPolicy:
    """What to watch of what ranks report, and what follows."""

    policy: str = "warn"
    """"warn", "step_back", or "off"."""
    metric: str = "loss"
    window: int = 128
    """How many healthy values of a rank a new one is compared with."""
    zscore: float = 10.0
    """From which modified z-score on a value is a spike; 0: never."""
    healthy: int = 3
    """How many steps must be reported healthy after a checkpoint before it counts as healthy itself."""

    @property
    def steps_back(self) -> bool:
        """Whether a bad number is a failure."""
        return self.policy == "step_back"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a value: its `kind`, and in words."""

    kind: str
    summary: str


def judge(window: Sequence[float], value: float, policy: NumbersPolicy) -> Finding | None:
    """Judge a value against the healthy ones before it; None when it is healthy, too."""
    if not math.isfinite(value):
        return Finding(NAN, f"{policy.metric} {value:g}")
    if not policy.zscore or len(window) < min(LEAST, policy.window) or value <= max(window):
        return None
    middle = median(window)
    scale = max(_MAD_TO_SIGMA * median(abs(item - middle) for item in window), _FLOOR * abs(middle))
    if not scale or value - middle <= policy.zscore * scale:
        return None
    times = (value - middle) / scale
    return Finding(
        SPIKE,
        f"{policy.metric} {value:.6g}, {times:.3g} deviations above the median {middle:.6g} of the last {len(window)}",
    )
