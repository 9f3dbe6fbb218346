"""Processes that crash, hang and raise, and the one that asks them, which goes on."""

import os
import time

from benchmarks.workers import Worker, spread, tell


def prepare(name):
    os.environ["PREPARED"] = name


def work(what):
    tell(f"doing {what}")
    if what == "crash":
        os._exit(7)
    if what == "hang":
        time.sleep(60)
    if what == "raise":
        raise ValueError("no")
    return f"{what} by {os.environ['PREPARED']} {os.getpid()}"


def test_whatever_happens_the_next_is_done():
    with Worker(prepare, "one") as worker:
        first = worker.ask(60, work, "a")
        assert first.kind == "done"
        assert first.value.startswith("a by one ")
        again = worker.ask(60, work, "b").value
        assert again.split()[-1] == first.value.split()[-1]  # the same process
        assert worker.ask(60, work, "raise") == ("raised", "ValueError: no", "doing raise")
        fresh = worker.ask(60, work, "c").value
        assert fresh.split()[-1] != again.split()[-1]  # another: who knows what the error left
        assert worker.ask(60, work, "crash") == ("died", "its process ended with exit code 7", "doing crash")
        assert worker.ask(60, work, "d").kind == "done"
        assert worker.ask(0.5, work, "hang") == ("late", "nothing heard for 0 s", "doing hang")
        assert worker.ask(0, work, "e") == ("late", "not begun", "")
        assert worker.ask(60, work, "f").kind == "done"


def test_many_at_once():
    found = dict(spread(2, ["a", "crash", "b", "raise", "c"], lambda: 60, work, prepare, "two"))
    assert {item: answer.kind for item, answer in found.items()} == {
        "a": "done", "b": "done", "c": "done", "crash": "died", "raise": "raised"
    }  # fmt: skip
