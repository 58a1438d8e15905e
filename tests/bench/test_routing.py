from bench.routing import RandomDirectory
from services.contract import subjects
from services.contract.codec import encode
from services.runtime.deliveries import Delivery
from tests.fakes import report


def test_random_ranking_chooses_any_worker() -> None:
    workers = RandomDirectory()
    for worker_id in "abc":
        workers.on_report(Delivery(subjects.report(worker_id), encode(report(worker_id)), ""))
    assert {workers.rank("_.s", None)[0] for _ in range(100)} == set("abc")
