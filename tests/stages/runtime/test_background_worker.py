"""Tests of the background worker: order, bound, errors and interrupts."""

import subprocess
import sys
import threading
import weakref

import pytest

from kdpipe.stages.runtime.background_worker import BackgroundWorker

SAFETY_S = 30


class DiskFullError(Exception):
    pass


class PausedWork:
    """Work that starts each item but finishes it only after `go_on` is set."""

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
    """Start the call; returns its thread, and a list that receives its error."""
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


def test_one_other_thread_processes_all_items_in_order():
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
def test_submit_waits_only_when_the_queue_is_full(num_waiting):
    paused = PausedWork()
    with paused.background(num_waiting) as background:
        background.submit("in work")
        assert paused.begun.wait(SAFETY_S)
        for item in range(num_waiting):
            background.submit(item)  # would hang here if these did not fit
        thread, raised = call_in_thread(background.submit, "one too many")
        thread.join(0.05)  # gives a queue without bound the time to show it
        assert thread.is_alive()
        paused.go_on.set()
        assert ended(thread)
    assert raised == []
    assert paused.done == ["in work", *range(num_waiting), "one too many"]
    assert paused.discarded == []


def test_number_of_outstanding_items_is_bounded():
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


def test_submit_raises_worker_error_and_discards_item():
    paused = PausedWork(fails_at="bad")
    paused.go_on.set()
    with pytest.raises(DiskFullError) as caught, paused.background() as background:
        background.submit("good")
        background.submit("bad")
        for item in range(1000):
            background.submit(item)
    assert caught.traceback[-1].name == "work"
    assert paused.done == ["good"]
    assert paused.discarded == list(range(len(paused.discarded)))
    assert len(paused.discarded) > 0


def test_block_end_raises_worker_error_and_discards_waiting():
    paused = PausedWork(fails_at="bad")
    with pytest.raises(DiskFullError, match="bad"), paused.background() as background:
        for item in ("bad", "second", "third"):
            background.submit(item)
        paused.go_on.set()
    assert paused.done == []
    assert paused.discarded == ["second", "third"]


def test_waiting_submit_is_woken_by_worker_error():
    paused = PausedWork(fails_at="bad")
    with pytest.raises(DiskFullError), paused.background(1) as background:
        background.submit("bad")
        assert paused.begun.wait(SAFETY_S)
        background.submit("second")
        thread, raised = call_in_thread(background.submit, "third")
        thread.join(0.05)
        assert thread.is_alive()
        paused.go_on.set()
        assert ended(thread)
        assert [type(error) for error in raised] == [DiskFullError]
    assert sorted(paused.discarded) == ["second", "third"]


def test_block_error_discards_waiting_and_finishes_current():
    paused = PausedWork()
    with pytest.raises(KeyError, match="the block's own"), paused.background() as background:
        for item in ("under way", "second", "third"):
            background.submit(item)
            assert paused.begun.wait(SAFETY_S)
        threading.Timer(0.05, paused.go_on.set).start()
        raise KeyError("the block's own")
    assert paused.done == ["under way"]
    assert paused.discarded == ["second", "third"]


def test_block_error_is_not_masked_by_worker_error():
    paused = PausedWork(fails_at="bad")
    with pytest.raises(KeyError) as caught, paused.background() as background:
        background.submit("bad")
        assert paused.begun.wait(SAFETY_S)
        paused.go_on.set()
        raise KeyError("the block's own")
    assert caught.value.__notes__ == ["The background worker had failed too: DiskFullError('bad')"]


def test_processed_item_is_freed():
    class Unit:
        pass

    freed = threading.Event()
    with BackgroundWorker(lambda item: None, 1) as background:
        unit = Unit()
        weakref.finalize(unit, freed.set)
        background.submit(unit)
        del unit
        assert freed.wait(SAFETY_S)


def test_submit_after_the_end_is_an_error():
    paused = PausedWork()
    with paused.background() as background:
        pass
    with pytest.raises(RuntimeError, match="after shutdown"):
        background.submit("late")
    assert paused.discarded == ["late"]


INTERRUPTED = """
import signal, sys, threading, time
from kdpipe.stages.runtime.background_worker import BackgroundWorker

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
begun, go_on, done, discarded = threading.Event(), threading.Event(), [], []
main = threading.main_thread().ident

def work(item):
    begun.set()
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
        begun.wait()
        background.submit("second")
        threading.Thread(target=interrupt).start()
        if sys.argv[1] == "submit":
            background.submit("third")
except KeyboardInterrupt:
    print("interrupted:", done, discarded)
"""


@pytest.mark.parametrize(("where", "discarded"), [("submit", ["third", "second"]), ("end", ["second"])])
def test_interrupt_finishes_current_item_and_discards_rest(where, discarded):
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, where], capture_output=True, text=True, timeout=SAFETY_S, check=True
    )
    assert ran.stdout == f"interrupted: ['first'] {discarded}\n"
    assert ran.stderr == ""
