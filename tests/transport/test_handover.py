"""A state on its way to one that joins: what is left of it once it has come."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from waiting import until

from lightning_gossip.transport import handover
from lightning_gossip.transport.header import LinkError
from lightning_gossip.transport.link import Link, gloo_device

LIMIT = timedelta(seconds=20)


def guests_end(store: HashStore, incarnation: int) -> Link:
    return Link(store, gloo_device(), f"guest2.{incarnation}", "donor0", LIMIT)


def test_nothing_of_it_stays_with_the_donor() -> None:
    store = HashStore()
    for incarnation in range(3):
        state = {"theta": torch.full((5,), float(incarnation))}
        donors = handover.donors_link(store, 0, 2, incarnation, LIMIT)
        sent = handover.serve(donors, 7, lambda state=state: state)  # type: ignore[misc]
        guests = guests_end(store, incarnation)
        assert torch.equal(handover._fetch(guests).result(20)["theta"], state["theta"])
        sent.result(20)
        guests.close()
        until(lambda donors=donors: donors.has_ended)  # type: ignore[misc]
    until(lambda: not _links())
    assert store.num_keys() == 0


def test_a_guest_that_dies_or_finds_it_torn_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    donors = handover.donors_link(store, 0, 2, 0, LIMIT)
    sent = handover.serve(donors, 7, lambda: {"theta": torch.zeros(5)})
    guests = guests_end(store, 0)

    def torn(payload: Any) -> int:
        return 7 if threading.current_thread().name.startswith("link-guest") else 8

    monkeypatch.setattr(handover, "_checksum", torn)
    with pytest.raises(LinkError, match="did not arrive whole"):
        handover._fetch(guests).result(20)
    with pytest.raises(RuntimeError):
        sent.result(20)
    until(lambda: donors.has_ended and guests.has_ended)


def _links() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("link-donor0", "link-guest2"))]
