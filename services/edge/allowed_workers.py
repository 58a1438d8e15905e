"""What a key with certain models is shown of the workers."""

from msgspec.structs import replace

from services.client.routing import WorkerDirectory
from services.contract.messages import WorkerReport
from services.edge.keys import ApiKey


class AllowedWorkers(WorkerDirectory):
    """
    The workers of `workers` that have a model, or an adapter of it, which the key may use. It
    answers questions only: requests are routed by `workers`.
    """

    def __init__(self, workers: WorkerDirectory, key: ApiKey) -> None:
        super().__init__()
        self._workers = workers
        self._key = key

    def reports(self) -> list[WorkerReport]:
        visible = map(self._visible, self._workers.reports())
        return [report for report in visible if report is not None]

    def model_names(self) -> list[str]:
        return [name for name in super().model_names() if self._key.allows(name)]

    def _visible(self, report: WorkerReport) -> WorkerReport | None:
        """Return the report without the adapters that the key may not use."""
        info = report.model
        if info is None:
            return report if report.name and self._key.allows(report.name) else None
        allowed = (each for each in info.adapters if self._key.allows(f"{info.name}:{each}"))
        adapters = tuple(allowed)
        if not adapters and not self._key.allows(info.name):
            return None
        return replace(report, model=replace(info, adapters=adapters))
