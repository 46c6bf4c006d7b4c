"""Leases end on time, not before, and once."""

from penstock.workers.leases import RouterLeases


def test_a_lease_ends_once_and_renewal_moves_its_end() -> None:
    leases = RouterLeases()
    leases.begin("a", 5.0, 100.0)
    leases.begin("b", 2.0, 100.0)
    assert leases.expired(101.9) == []
    leases.renew("a", 101.9)
    assert leases.expired(102.0) == ["b"]
    assert leases.expired(106.8) == []
    assert leases.expired(106.9) == ["a"]
    assert leases.expired(1000.0) == []
    assert "a" not in leases


def test_unknown_and_ended_routers_are_ignored() -> None:
    leases = RouterLeases()
    leases.renew("nobody", 1.0)
    leases.begin("a", 1.0, 0.0)
    leases.end("a")
    leases.end("a")
    leases.renew("a", 0.5)
    assert leases.expired(50.0) == []
