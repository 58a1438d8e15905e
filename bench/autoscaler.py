"""
The decisions of Kubernetes' HorizontalPodAutoscaler on figures that KEDA hands to it, as a pure
function of time: for the simulation in bench/scaling.py, and for a cluster of processes.

https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/#algorithm-details
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

QUERY = re.compile(r"(clamp_max\()?(?:max|sum)\(([\w:]+)\{")
TOLERANCE = 0.1  # within which the number stays
SYNC_SECONDS = 15.0  # between two decisions: --horizontal-pod-autoscaler-sync-period


class Target(NamedTuple):
    """
    `average` is that of a worker, of a metric of all workers together. A capped one keeps workers,
    but adds none.
    """

    metric: str
    average: float
    is_capped: bool = False


class Pace(NamedTuple):
    """At most `pods` in `period_seconds`, after the window in which nothing else was wanted."""

    window_seconds: float
    pods: int
    period_seconds: float


@dataclass(frozen=True)
class ScalingRule:
    targets: tuple[Target, ...]
    min_workers: int
    max_workers: int
    up: Pace
    down: Pace

    @classmethod
    def of(cls, scaled_object: Mapping[str, Any]) -> "ScalingRule":
        """Read it from a ScaledObject with one policy in each direction."""
        spec = scaled_object["spec"]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        return cls(
            tuple(_target(trigger["metadata"]) for trigger in spec["triggers"]),
            spec["minReplicaCount"],
            spec["maxReplicaCount"],
            _pace(behavior["scaleUp"]),
            _pace(behavior["scaleDown"]),
        )


def _target(metadata: Mapping[str, str]) -> Target:
    found = QUERY.match(metadata["query"])
    assert found, metadata["query"]
    return Target(found[2], float(metadata["threshold"]), is_capped=found[1] is not None)


def _pace(behavior: Mapping[str, Any]) -> Pace:
    (policy,) = behavior["policies"]
    return Pace(behavior["stabilizationWindowSeconds"], policy["value"], policy["periodSeconds"])


class Autoscaler:
    """Decides how many workers there should be; its memory is what it wanted and did before."""

    def __init__(self, rule: ScalingRule) -> None:
        self.rule = rule
        self._wanted: list[tuple[float, int]] = []  # times and numbers
        self._changes: list[tuple[float, int]] = []  # times and differences

    def decide(self, now: float, workers: int, figures: Mapping[str, float]) -> int:
        """
        Return the number of workers from now on. Without the figure of a target there may be more,
        but not fewer.
        """
        wanted = self._stabilized(now, workers, self._recommended(workers, figures))
        result = self._paced(now, workers, wanted)
        if result != workers:
            self._changes.append((now, result - workers))
        return result

    def _recommended(self, workers: int, figures: Mapping[str, float]) -> int:
        known = [target for target in self.rule.targets if target.metric in figures]
        numbers = [_needed(workers, figures[target.metric], target) for target in known]
        if len(known) < len(self.rule.targets):
            numbers.append(workers)
        return min(max(*numbers, self.rule.min_workers), self.rule.max_workers)

    def _stabilized(self, now: float, workers: int, recommended: int) -> int:
        """Return the number of now that is nearest to what was recommended during the windows."""
        self._wanted.append((now, recommended))
        up = min(n for at, n in self._wanted if at >= now - self.rule.up.window_seconds)
        down = max(n for at, n in self._wanted if at >= now - self.rule.down.window_seconds)
        self._wanted = [each for each in self._wanted if each[0] >= now - 3600]
        return min(max(workers, up), down)

    def _paced(self, now: float, workers: int, wanted: int) -> int:
        up, down = self.rule.up, self.rule.down
        if wanted > workers:
            added = self._changed(now - up.period_seconds, is_growth=True)
            return max(workers, min(wanted, workers - added + up.pods))
        removed = self._changed(now - down.period_seconds, is_growth=False)
        return min(workers, max(wanted, workers + removed - down.pods))

    def _changed(self, since: float, is_growth: bool) -> int:
        return sum(abs(n) for at, n in self._changes if at > since and (n > 0) == is_growth)


def _needed(workers: int, figure: float, target: Target) -> int:
    needed = figure / target.average
    if target.is_capped:
        needed = min(needed, workers)
    return workers if abs(needed / workers - 1) <= TOLERANCE else ceil(needed)
