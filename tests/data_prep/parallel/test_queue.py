"""The queue over the steps of many slides: everything is done once, in a possible order, whatever ends first."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.parallel.queue import Flat, Schedule


@dataclass(frozen=True)
class Node:
    plan: int
    number: int
    stage: int


@dataclass
class Graph:
    """A random graph as a plan: a node is possible when all before it that it needs are done."""

    number: int
    needs: list[set[int]]
    fails: int | None = None
    finished: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    running: int = 0
    failed: bool = False

    def _possible(self):
        new = [n for n, needs in enumerate(self.needs) if n not in self.given and needs <= self.finished]
        self.given.update(new)
        self.running += len(new)
        return [Node(self.number, n, n % 3) for n in new]

    def first(self):
        return self._possible()

    def done(self, step, result):
        assert self.needs[step.number] <= self.finished and step.number not in self.finished
        assert result == step.number
        self.finished.add(step.number)
        self.running -= 1
        self.failed = self.failed or step.number == self.fails
        steps = [] if self.failed else self._possible()
        return steps, self.drop(0) if not self.running else []

    def drop(self, steps):
        self.running -= steps
        return [self] if not self.running else []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_step_once_in_a_possible_order(data):
    graphs = []
    for number in range(data.draw(st.integers(0, 4))):
        size = data.draw(st.integers(1, 8))
        needs = [set(data.draw(st.lists(st.integers(0, n - 1), max_size=3))) if n else set() for n in range(size)]
        fails = data.draw(st.one_of(st.none(), st.integers(0, size - 1)))
        graphs.append(Graph(number, needs, fails))
    queue = Schedule(graphs)
    told, running = [], []
    workers = data.draw(st.integers(1, 5))
    while not queue.over:
        while len(running) < workers and (step := queue.take(data.draw(st.integers(0, 4)))) is not None:
            running.append(step)
        assert running
        step = running.pop(data.draw(st.integers(0, len(running) - 1)))
        told += queue.done(step, step.number)
    assert queue.take() is None
    assert sorted(graph.number for graph in told) == list(range(len(graphs)))
    for graph in graphs:
        assert graph.running == 0
        if graph.fails is None:
            assert graph.finished == set(range(len(graph.needs)))


def test_later_stages_first_then_the_order_of_plans():
    queue = Schedule([Graph(0, [set(), {0}, {1}]), Graph(1, [set()])])
    first = queue.take()
    assert first == Node(0, 0, 0)
    queue.done(first, 0)
    assert queue.take() == Node(0, 1, 1)  # before slide 1 is begun
    assert queue.take() == Node(1, 0, 0)


def test_what_fails_does_not_go_on():
    graph = Graph(0, [set(), set(), set(), {2}], fails=2)
    queue = Schedule([graph, Graph(1, [set()])])
    first = queue.take()
    assert first.number == 2
    running = queue.take()
    assert queue.done(first, 2) == []  # one of it is still being worked on
    assert queue.done(running, running.number) == [graph]
    assert queue.take() == Node(1, 0, 0) and graph.given == {0, 1, 2}


def test_flat():
    queue = Flat("ab")
    a, b = queue.take(), queue.take()
    assert (a, b, queue.take(), queue.over) == ("a", "b", None, False)
    assert queue.done(b, 2) == [2] and not queue.over
    assert queue.done(a, 1) == [1] and queue.over


def test_workers_go_on_where_they_were_and_share_what_is_left():
    queue = Schedule([Graph(0, [set() for _ in range(48)])])  # 16 of each stage; the last comes first
    free = {worker: queue.take(worker) for worker in range(2)}
    taken = {worker: [step.number] for worker, step in free.items()}
    for worker in (0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0):
        queue.done(free[worker], free[worker].number)
        free[worker] = queue.take(worker)
        taken[worker].append(free[worker].number)
    number = {n: i for i, n in enumerate(range(2, 48, 3))}
    assert [number[n] for n in taken[0]] == [0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 12, 11]
    assert [number[n] for n in taken[1]] == [8, 9, 10]
