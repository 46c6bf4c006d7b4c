"""Who keeps a cluster alive, on a clock of numbers."""

from __future__ import annotations

from penstock.cluster.attendance import Attendance, Attendant

A, B = Attendant("a", "old"), Attendant("b", "new")


def test_a_lease_ends() -> None:
    attendance = Attendance(20.0, now=0.0)
    assert attendance.silent_s(7.0) == 7.0
    attendance.enter(A, 10.0)
    attendance.expire(30.0)
    assert attendance.present == [A]
    assert attendance.silent_s(30.0) == 0.0
    attendance.expire(30.1)
    assert attendance.present == []
    assert attendance.silent_s(31.0) == 21.0


def test_an_edition_is_abandoned_once_its_last_attendant_left_and_another_edition_is_attended() -> None:
    attendance = Attendance(20.0, now=0.0)
    attendance.enter(A, 1.0)
    attendance.enter(Attendant("a2", "old"), 1.0)
    attendance.enter(B, 2.0)
    attendance.leave("a")
    assert attendance.abandoned() == set()
    attendance.leave("a2")
    assert attendance.abandoned() == {"old"}
    attendance.forget("old")
    assert attendance.abandoned() == set()


def test_the_only_edition_is_not_abandoned_while_its_ingress_is_away() -> None:
    attendance = Attendance(20.0, now=0.0)
    attendance.enter(A, 1.0)
    attendance.leave("a")
    assert attendance.abandoned() == set()
    attendance.enter(A, 5.0)
    attendance.enter(B, 6.0)
    assert attendance.abandoned() == set()
    attendance.expire(25.5)
    assert attendance.abandoned() == {"old"}
    attendance.enter(A, 26.0)
    assert attendance.abandoned() == set(), "it came back"


def test_goodbyes_of_strangers_are_nothing() -> None:
    attendance = Attendance(20.0, now=0.0)
    attendance.leave("nobody")
    assert attendance.editions() == set()


def test_who_could_not_be_heard_is_excused() -> None:
    attendance = Attendance(20.0, now=0.0)
    assert not attendance.overdue(20.0)
    assert attendance.overdue(20.5)
    attendance.enter(Attendant("a", "one"), 21.0)
    attendance.enter(Attendant("b", "two"), 30.0)
    assert attendance.overdue(41.5)
    attendance.excuse(41.5)
    attendance.expire(61.0)
    assert attendance.editions() == {"one", "two"}
    attendance.expire(61.6)
    assert attendance.editions() == set()
