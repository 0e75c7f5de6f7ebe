"""Work in the background is in order, bounded, and loses neither an item nor an error; nothing hangs."""

import subprocess
import sys
import threading
import weakref

import pytest

from stages.background import BackgroundWorker

SAFETY_S = 30


class DiskFullError(Exception):
    pass


class Held:
    """Work that begins each item in its time and goes on only when it is told to."""

    def __init__(self, fails_at=None):
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.done, self.discarded, self.fails_at = [], [], fails_at

    def work(self, item):
        self.begun.set()
        assert self.go_on.wait(SAFETY_S)
        if item == self.fails_at:
            raise DiskFullError(item)
        self.done.append(item)

    def background(self, num_waiting=2):
        return BackgroundWorker(self.work, num_waiting, self.discarded.append)


def call_in_thread(function, *arguments):
    """Starts the call; returns its thread, and a list that gets the error it raises."""
    raised = []

    def call():
        try:
            function(*arguments)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, raised


def ended(thread):
    thread.join(SAFETY_S)
    return not thread.is_alive()


def test_items_are_worked_on_in_order_by_one_other_thread_and_all_at_the_end():
    done, threads = [], set()

    def work(item):
        done.append(item)
        threads.add(threading.current_thread())

    with BackgroundWorker(work, 2) as background:
        for item in range(100):
            background.submit(item)
    assert done == list(range(100))
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads) or ended(threads.pop())


@pytest.mark.parametrize("num_waiting", [1, 3])
def test_put_waits_only_when_the_queue_is_full(num_waiting):
    held = Held()
    with held.background(num_waiting) as background:
        background.submit("in work")
        assert held.begun.wait(SAFETY_S)
        for item in range(num_waiting):
            background.submit(item)  # would hang here if these did not fit
        thread, raised = call_in_thread(background.submit, "one too many")
        thread.join(0.05)  # gives a queue without bound the time to show it
        assert thread.is_alive()
        held.go_on.set()
        assert ended(thread)
    assert raised == []
    assert held.done == ["in work", *range(num_waiting), "one too many"]
    assert held.discarded == []


def test_no_more_than_the_bound_is_ever_outstanding():
    lock, outstanding, most = threading.Lock(), 0, 0

    def count(change):
        nonlocal outstanding, most
        with lock:
            outstanding += change
            most = max(most, outstanding)

    with BackgroundWorker(lambda item: count(-1), 3) as background:
        for item in range(500):
            background.submit(item)
            count(+1)
    assert outstanding == 0
    assert most <= 3 + 1


def test_put_raises_the_workers_own_error_and_discards_what_it_refuses():
    held = Held(fails_at="bad")
    held.go_on.set()
    with pytest.raises(DiskFullError) as caught, held.background() as background:
        background.submit("good")
        background.submit("bad")
        for item in range(1000):
            background.submit(item)
    assert caught.traceback[-1].name == "work"
    assert held.done == ["good"]
    assert held.discarded == list(range(len(held.discarded)))
    assert len(held.discarded) > 0


def test_the_blocks_end_raises_the_workers_error_and_what_waited_is_discarded():
    held = Held(fails_at="bad")
    with pytest.raises(DiskFullError, match="bad"), held.background() as background:
        for item in ("bad", "second", "third"):
            background.submit(item)
        held.go_on.set()
    assert held.done == []
    assert held.discarded == ["second", "third"]


def test_a_put_that_waits_for_room_is_woken_by_the_workers_error():
    held = Held(fails_at="bad")
    with pytest.raises(DiskFullError), held.background(1) as background:
        background.submit("bad")
        assert held.begun.wait(SAFETY_S)
        background.submit("second")
        thread, raised = call_in_thread(background.submit, "third")
        thread.join(0.05)
        assert thread.is_alive()
        held.go_on.set()
        assert ended(thread)
        assert [type(error) for error in raised] == [DiskFullError]
    assert sorted(held.discarded) == ["second", "third"]


def test_an_error_in_the_block_drops_what_waits_and_finishes_the_item_under_way():
    held = Held()
    with pytest.raises(KeyError, match="the block's own"), held.background() as background:
        for item in ("under way", "second", "third"):
            background.submit(item)
            assert held.begun.wait(SAFETY_S)
        threading.Timer(0.05, held.go_on.set).start()
        raise KeyError("the block's own")
    assert held.done == ["under way"]
    assert held.discarded == ["second", "third"]


def test_the_blocks_error_is_not_masked_by_the_workers():
    held = Held(fails_at="bad")
    with pytest.raises(KeyError) as caught, held.background() as background:
        background.submit("bad")
        assert held.begun.wait(SAFETY_S)
        held.go_on.set()
        raise KeyError("the block's own")
    assert caught.value.__notes__ == ["The background worker had failed too: DiskFullError('bad')"]


def test_an_item_that_is_done_is_not_kept_in_memory():
    class Unit:
        pass

    freed = threading.Event()
    with BackgroundWorker(lambda item: None, 1) as background:
        unit = Unit()
        weakref.finalize(unit, freed.set)
        background.submit(unit)
        del unit
        assert freed.wait(SAFETY_S)


def test_nothing_can_be_put_after_the_end():
    held = Held()
    with held.background() as background:
        pass
    with pytest.raises(RuntimeError, match="submit after the end"):
        background.submit("late")
    assert held.discarded == ["late"]


def test_at_least_one_item_may_wait():
    with pytest.raises(ValueError, match="num_waiting must be at least 1, not 0"):
        BackgroundWorker(print, 0)


INTERRUPTED = """
import signal, sys, threading, time
from stages.background import BackgroundWorker

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
go_on, done, discarded = threading.Event(), [], []
main = threading.main_thread().ident

def work(item):
    assert go_on.wait(30)
    done.append(item)

def interrupt():
    while sys._current_frames()[main].f_code.co_name != "wait":  # as it is in waiting for room, or for the end
        time.sleep(0.01)
    time.sleep(0.05)
    signal.pthread_kill(main, signal.SIGINT)
    time.sleep(0.05)
    go_on.set()

try:
    with BackgroundWorker(work, 1, discarded.append) as background:
        background.submit("first")
        while background._waiting:
            time.sleep(0.01)
        background.submit("second")
        threading.Thread(target=interrupt).start()
        if sys.argv[1] == "submit":
            background.submit("third")
except KeyboardInterrupt:
    print("interrupted:", done, discarded)
"""


@pytest.mark.parametrize(("where", "discarded"), [("submit", ["third", "second"]), ("end", ["second"])])
def test_an_interrupt_lets_the_item_under_way_finish_and_drops_the_rest(where, discarded):
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, where], capture_output=True, text=True, timeout=SAFETY_S, check=True
    )
    assert ran.stdout == f"interrupted: ['first'] {discarded}\n"
    assert ran.stderr == ""
