"""A histogram that is quick enough for every event of every answer."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class Observations:
    """What was observed of one model. Only the event loop's thread may observe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # by bucket; the last one is without bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class EventHistogram(Collector):
    """
    A histogram by model. That of prometheus_client takes two locks for each observation, and three
    times as long: at 5,000 streams, a twentieth of the edge's time.
    """

    def __init__(
        self, name: str, about: str, bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._about = about
        self._bounds = bounds
        self._models: dict[str, Observations] = {}
        registry.register(self)

    def of_model(self, model: str) -> Observations:
        return self._models.setdefault(model, Observations(self._bounds))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._about, labels=("model_name",))
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for model, observed in self._models.items():
            buckets = [*zip(names, accumulate(observed.counts), strict=True)]
            family.add_metric((model,), buckets, observed.sum)
        yield family
