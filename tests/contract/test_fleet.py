"""What a hub replies: reports that are compressed, and what can be wrong with them."""

import zlib

import pytest

from services.contract import fleet
from services.contract.errors import ServiceError
from services.contract.fleet import HeardReport, pack, unpack
from services.contract.messages import ModelInfo, WorkerReport

REPORT = WorkerReport("w1", "ready", 2, 1, 0, model=ModelInfo("demo", "digest", 2048, 1))


def test_packed_reports_are_unpacked() -> None:
    assert unpack(pack([(1.5, REPORT)])) == (HeardReport(1.5, REPORT),)
    assert unpack(pack([])) == ()


def test_reports_of_a_thousand_workers_fit_one_message() -> None:
    reports = [
        WorkerReport(f"{number:032x}", "ready", 16, number % 16, 0, 64, model=REPORT.model)
        for number in range(1000)
    ]
    assert len(pack((number / 7, report) for number, report in enumerate(reports))) < 2**17


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zlib",
        pack([(1.5, REPORT)])[:-9],
        zlib.compress(b"{}"),
        zlib.compress(bytes(fleet.MAX_UNPACKED_BYTES + 1)),
    ],
    ids=["nothing", "not compressed", "cut off", "no reports", "too long"],
)
def test_invalid_reports_are_refused(data: bytes) -> None:
    with pytest.raises(ServiceError) as refused:
        unpack(data)
    assert refused.value.code == "invalid_request"
