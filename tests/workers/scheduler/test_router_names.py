"""Indices of routers are reused only when nobody uses them."""

from penstock.workers.scheduler.router_names import RouterNames


def test_indices_are_stable_while_used_and_bounded_by_live_routers():
    names = RouterNames()
    assert [names.enter(router) for router in ("a", "b", "a")] == [0, 1, 0]
    assert names.names == ("a", "b")
    names.leave(0)
    assert names.enter("c") == 2
    names.leave(0)
    assert names.enter("d") == 0
    assert names.names == ("d", "b", "c")
    assert names.enter("a") == 3
    for count in range(1000):
        names.leave(names.enter(f"router {count}"))
    assert len(names.names) == 5


def test_a_router_that_comes_back_keeps_its_index():
    names = RouterNames()
    names.leave(names.enter("a"))
    assert names.enter("a") == 0
    assert names.names == ("a",)
