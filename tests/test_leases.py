"""Who is leased what, and in which order: the decisions alone, without a daemon."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from envd.leases import GRACE, KEPT, MOST_KEPT, Book
from envd.models import Lease, LeaseEnd, LeaseState

TTL = 100.0


class Desk:
    """A book, and a clock that stands still unless it is told."""

    def __init__(self, envs: int) -> None:
        self.book = Book(envs)
        self.envs = range(envs)
        self.now = 1000.0
        self.stored: dict[str, Lease] = {}

    def ask(self, name: str, owner: str, count: int = 1) -> None:
        self.book.ask(name, owner, count, TTL, self.now)
        self.grant()

    def grant(self, busy: tuple[int, ...] = ()) -> list[str]:
        granted = self.book.grant([env for env in self.envs if env not in busy], self.now)
        self.store()
        return [lease.id for lease in granted]

    def end(self, name: str, busy: tuple[int, ...] = ()) -> list[str]:
        """Who is granted because of it."""
        self.book.end(name, LeaseEnd.RELEASED, self.now)
        for env in self.book.envs_leaving:
            self.book.has_left(env)
        return self.grant(busy)

    def store(self) -> None:
        for name, lease in self.book.take().items():
            if lease is None:
                self.stored.pop(name)
            else:
                self.stored[name] = Lease.model_validate_json(lease.model_dump_json())

    def restarted(self) -> Desk:
        self.store()
        other = Desk(len(self.envs))
        other.now, other.stored = self.now, self.stored
        other.book.restore(self.stored.values(), self.now)
        return other

    def line(self) -> list[str]:
        return [lease.id for lease in self.book.line()]

    def envs_of(self, name: str) -> tuple[int, ...]:
        lease = self.book.get(name)
        assert lease is not None
        return lease.envs


def test_a_lease_is_granted_whole_or_not_at_all() -> None:
    desk = Desk(3)
    desk.ask("a", "ann", 2)
    desk.ask("b", "bob", 2)
    assert (desk.envs_of("a"), desk.envs_of("b")) == ((0, 1), ())
    assert desk.end("a") == ["b"]
    assert len(desk.envs_of("b")) == 2


def test_owners_take_turns_and_each_is_first_come_first_served() -> None:
    desk = Desk(1)
    desk.ask("a1", "ann")
    for name in ("a2", "a3", "b1", "a4", "b2"):
        desk.ask(name, {"a": "ann", "b": "bob"}[name[0]])
    order = []
    holder = "a1"
    while granted := desk.end(holder):
        [holder] = granted
        order.append(holder)
    assert order == ["b1", "a2", "b2", "a3", "a4"]


def test_positions_are_the_order_of_the_grants() -> None:
    desk = Desk(1)
    for name, owner in (("a1", "ann"), ("a2", "ann"), ("a3", "ann"), ("b1", "bob"), ("c1", "cyd"), ("b2", "bob")):
        desk.ask(name, owner)
    assert desk.line() == ["b1", "c1", "a2", "b2", "a3"]
    assert {name: desk.stored[name].position for name in desk.line()} == {"b1": 1, "c1": 2, "a2": 3, "b2": 4, "a3": 5}


def test_free_envs_are_kept_for_who_is_next_though_others_could_use_them() -> None:
    desk = Desk(4)
    desk.ask("a", "ann", 3)
    desk.ask("big", "bob", 4)
    for number in range(5):
        desk.ask(f"small-{number}", f"owner-{number}")
    assert desk.line()[0] == "big"
    assert desk.end("a") == ["big"]


def test_whom_envs_are_kept_for_is_not_overtaken_by_one_served_longer_ago() -> None:
    desk = Desk(2)
    desk.ask("c", "cyd")
    desk.ask("b", "bob")
    desk.ask("big", "bob", 2)
    assert desk.end("b") == []  # one is free, and kept for big
    desk.ask("again", "cyd")
    assert desk.line() == ["big", "again"]
    assert desk.end("c") == ["big"]


def test_newcomers_without_end_do_not_keep_anybody_waiting() -> None:
    desk = Desk(1)
    desk.ask("b0", "bob")
    desk.ask("b1", "bob")
    holder, seen = "b0", []
    for number in range(5):
        desk.ask(f"new-{number}", f"newcomer-{number}")
        [holder] = desk.end(holder)
        seen.append(holder)
    assert seen[:2] == ["new-0", "b1"]


def test_no_env_is_granted_while_it_is_busy_or_has_not_left_its_last_lease() -> None:
    desk = Desk(2)
    desk.ask("a", "ann", 1)
    assert desk.envs_of("a") == (0,)
    desk.book.ask("b", "bob", 1, TTL, desk.now)
    assert desk.grant(busy=(1,)) == []
    desk.book.end("a", LeaseEnd.RELEASED, desk.now)
    assert desk.grant(busy=(1,)) == []
    ended = desk.book.get("a")
    assert ended is not None
    assert (ended.state, ended.leaving, ended.end_reason) == (LeaseState.ENDED, (0,), LeaseEnd.RELEASED)
    desk.book.has_left(0)
    assert desk.grant(busy=(1,)) == ["b"]
    assert desk.envs_of("b") == (0,)


def test_the_free_envs_that_come_first_are_given_first() -> None:
    book = Book(3)
    book.ask("a", "ann", 2, TTL, 0)
    [lease] = book.grant([2, 0, 1], 0)
    assert lease.envs == (0, 2)


def test_use_puts_the_end_off_and_a_lease_that_has_ended_is_not_renewed() -> None:
    desk = Desk(1)
    desk.ask("a", "ann")
    desk.now += 60
    desk.book.renew("a", desk.now)
    assert desk.book.overdue(desk.now + TTL - 1) == []
    assert [lease.id for lease in desk.book.overdue(desk.now + TTL)] == ["a"]
    desk.end("a")
    desk.book.renew("a", desk.now)
    assert desk.book.overdue(desk.now + 10 * TTL) == []


def test_a_restart_keeps_who_holds_who_waits_and_in_which_order() -> None:
    desk = Desk(2)
    desk.ask("c", "cyd")
    desk.ask("a1", "ann")
    for name, owner in (("a2", "ann"), ("a3", "ann"), ("c2", "cyd"), ("b1", "bob"), ("b2", "bob")):
        desk.ask(name, owner)
    desk.end("c")  # which grants one of them
    desk.now += 5 * TTL
    later = desk.restarted()
    assert later.line() == desk.line()
    assert [later.envs_of(name) for name in desk.stored] == [desk.envs_of(name) for name in desk.stored]
    assert later.book.overdue(desk.now + GRACE - 1) == []
    assert later.book.overdue(desk.now + GRACE)


def test_a_restart_keeps_envs_for_whom_they_were_kept() -> None:
    desk = Desk(2)
    desk.ask("c", "cyd")
    desk.ask("b", "bob")
    desk.ask("big", "bob", 2)
    desk.end("b")
    later = desk.restarted()
    later.ask("again", "cyd")
    assert later.line() == ["big", "again"]


def test_a_restart_with_fewer_envs_ends_what_they_are_too_few_for() -> None:
    desk = Desk(3)
    desk.ask("a", "ann", 1)
    desk.ask("b", "bob", 2)
    desk.ask("c", "cyd", 3)
    desk.ask("d", "dan", 1)
    book = Book(2)
    book.restore(desk.stored.values(), desk.now)
    assert [lease.id for lease in book.open()] == ["a", "d"]
    assert {lease.id: lease.leaving for lease in book.ended()} == {"b": (1,), "c": ()}


def test_those_that_ended_are_remembered_for_a_while_and_not_too_many() -> None:
    desk = Desk(1)
    desk.ask("a", "ann")
    desk.end("a")
    desk.book.forget(desk.now + KEPT - 1)
    assert desk.book.get("a") is not None
    desk.book.forget(desk.now + KEPT + 1)
    desk.store()
    assert desk.book.get("a") is None
    assert desk.stored == {}
    for number in range(MOST_KEPT + 5):
        desk.ask(f"b-{number}", "bob")
        desk.end(f"b-{number}")
    desk.book.forget(desk.now)
    desk.store()
    assert len(desk.stored) == MOST_KEPT
    assert "b-4" not in desk.stored
    assert "b-5" in desk.stored


ENVS = 3
OWNERS = ("ann", "bob", "cyd", "dan", "eve")


class AnyOrder(RuleBasedStateMachine):
    """Envs become busy and free, leases are asked for, used, ended and forgotten, and the daemon starts again."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(ENVS)
        self.busy: set[int] = set()
        self.asked = 0
        self.may_be_overtaken: dict[str, int] = {}
        """By waiting lease: how many of other owners, asked for later, may still be granted before it."""

    @property
    def book(self) -> Book:
        return self.desk.book

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(1, ENVS))
    def ask(self, owner: str, count: int) -> None:
        self.asked += 1
        self.desk.now += 1
        before = sum(1 for lease in self.book.line() if lease.owner == owner)
        self.book.ask(f"lease-{self.asked:04}", owner, count, TTL, self.desk.now)
        # Between two grants of an owner every other one has one at most.
        self.may_be_overtaken[f"lease-{self.asked:04}"] = (before + 1) * (len(OWNERS) - 1)

    @rule()
    def grant(self) -> None:
        free = [
            env
            for env in range(ENVS)
            if env not in self.busy and self.book.holder(env) is None and self.book.leaving(env) is None
        ]
        line = self.book.line()
        granted = self.book.grant([env for env in range(ENVS) if env not in self.busy], self.desk.now)
        taken = [env for lease in granted for env in lease.envs]
        assert [lease.id for lease in granted] == [lease.id for lease in line[: len(granted)]]
        assert len(taken) == len(set(taken))
        assert set(taken) <= set(free)
        assert all(len(lease.envs) == lease.count for lease in granted)
        rest = self.book.line()
        assert [lease.id for lease in rest] == [lease.id for lease in line[len(granted) :]]
        # Nobody waits for nothing, and nobody else is let through meanwhile.
        assert not rest or rest[0].count > len(free) - len(taken)
        for lease in granted:
            self.may_be_overtaken.pop(lease.id)
            for other in rest:
                if lease.created_at > other.created_at and lease.owner != other.owner:
                    self.may_be_overtaken[other.id] -= 1

    @rule(choice=st.integers(0, 99))
    def end(self, choice: int) -> None:
        if leases := self.book.open():
            lease = leases[choice % len(leases)]
            self.book.end(lease.id, LeaseEnd.EXPIRED, self.desk.now)
            self.may_be_overtaken.pop(lease.id, None)

    @rule()
    def hand_on(self) -> None:
        """The oldest lease is released, and what is free then is given out."""
        held = [lease for lease in self.book.open() if lease.envs]
        for lease in held[:1]:
            self.book.end(lease.id, LeaseEnd.RELEASED, self.desk.now)
            for env in lease.envs:
                self.book.has_left(env)
        self.grant()

    @rule(choice=st.integers(0, 99))
    def leave(self, choice: int) -> None:
        if leaving := self.book.envs_leaving:
            self.book.has_left(leaving[choice % len(leaving)])

    @rule(env=st.integers(0, ENVS - 1))
    def work(self, env: int) -> None:
        """A player without a lease begins, or is done."""
        if env in self.busy:
            self.busy.discard(env)
        elif self.book.holder(env) is None:
            self.busy.add(env)

    @rule(choice=st.integers(0, 99))
    def renew(self, choice: int) -> None:
        if leases := self.book.open():
            lease = leases[choice % len(leases)]
            self.book.renew(lease.id, self.desk.now)
            after = self.book.get(lease.id)
            assert after is not None
            assert after.expires_at == self.desk.now + TTL or after.expires_at == lease.expires_at > self.desk.now + TTL

    @rule(hours=st.integers(0, 2))
    def forget(self, hours: int) -> None:
        self.desk.now += 3600 * hours
        before = len(self.book.ended())
        self.book.forget(self.desk.now)
        self._allow((len(OWNERS) - 1) * (len(self.book.ended()) != before))

    @rule()
    def restart(self) -> None:
        before = self.desk.line(), {env: self.book.holder(env) for env in range(ENVS)}, self.book.envs_leaving
        self.desk = self.desk.restarted()
        assert self.desk.line() == before[0]
        assert [held and held.id for held in before[1].values()] == [
            held and held.id for held in map(self.book.holder, range(ENVS))
        ]
        assert sorted(self.book.envs_leaving) == sorted(before[2])
        self._allow(1)

    def _allow(self, more: int) -> None:
        """Who is forgotten comes as a newcomer once more, and who is next at a restart stays next."""
        self.may_be_overtaken = {name: left + more for name, left in self.may_be_overtaken.items()}

    @invariant()
    def an_env_is_in_one_lease_at_most(self) -> None:
        held = [env for lease in self.book.open() for env in lease.envs]
        assert len(held) == len(set(held))
        assert not set(held) & set(self.book.envs_leaving)
        for lease in self.book.open():
            assert len(lease.envs) == (lease.count if lease.state is LeaseState.HELD else 0)
            assert all(self.book.holder(env) == lease for env in lease.envs)

    @invariant()
    def the_line_has_everybody_who_waits_in_order(self) -> None:
        line = self.book.line()
        assert [lease.position for lease in line] == list(range(1, len(line) + 1))
        assert {lease.id for lease in line} == {
            lease.id for lease in self.book.open() if lease.state is LeaseState.WAITING
        }
        for owner in OWNERS:
            mine = [lease.created_at for lease in line if lease.owner == owner]
            assert mine == sorted(mine)

    @invariant()
    def nobody_is_overtaken_for_ever(self) -> None:
        assert all(left >= 0 for left in self.may_be_overtaken.values())

    @invariant()
    def what_is_stored_is_what_there_is(self) -> None:
        self.desk.store()
        known = {lease.id: lease for lease in (*self.book.open(), *self.book.ended())}
        assert self.desk.stored == known


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
