"""The batcher: what goes together, when, and what a failure, a full queue or a hang-up does to the rest."""

import threading
import time

import pytest

from fastpeft.serving.batcher import Batcher, Closed, Job, QueueFull


class Recorder:
    """Answers every job with its adapter's name, batch by batch, once `go` is set."""

    def __init__(self):
        self.batches, self.go, self.entered = [], threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, jobs):
        self.entered.set()
        assert self.go.wait(60)
        self.batches.append([job.adapter for job in jobs])
        if any(job.adapter == "bad" for job in jobs):
            raise MemoryError("planted")
        for job in jobs:
            job.answer(job.adapter)


@pytest.fixture
def recorder():
    return Recorder()


def make(recorder, **options):
    defaults = {"max_batch": 4, "max_wait": 0.05, "max_queue": 10}
    return Batcher(recorder, lambda job: job.adapter == "alone", **defaults | options)


def held(recorder, batcher):
    """A job that is being computed until recorder.go is set, so that what comes next waits."""
    recorder.go.clear()
    first = Job(adapter="first")
    batcher.submit(first)
    assert recorder.entered.wait(60)
    return first


def test_batches_are_full_or_as_old_as_may_be_and_of_one_group(recorder):
    batcher = make(recorder)
    held(recorder, batcher)
    jobs = [Job(adapter=name) for name in ("a", "alone", "b", "c", "alone", "d", "e")]
    for job in jobs:
        batcher.submit(job)
    recorder.go.set()
    assert [job.future.result(60) for job in jobs] == [job.adapter for job in jobs]
    assert recorder.batches == [["first"], ["a", "b", "c", "d"], ["alone", "alone"], ["e"]]
    batcher.close()


def test_a_lone_job_waits_no_longer_than_max_wait(recorder):
    batcher = make(recorder, max_wait=0.2)
    began = time.monotonic()
    job = Job(adapter="a")
    batcher.submit(job)
    job.future.result(60)
    assert time.monotonic() - began >= 0.2
    full = [Job(adapter="b") for _ in range(4)]
    batcher.max_wait = 1000
    for job in full:
        batcher.submit(job)
    assert [job.future.result(60) for job in full] == ["b"] * 4
    batcher.close()


def test_a_bad_job_fails_alone(recorder):
    batcher = make(recorder)
    held(recorder, batcher)
    good, bad, other = Job(adapter="good"), Job(adapter="bad"), Job(adapter="other")
    for job in (good, bad, other):
        batcher.submit(job)
    recorder.go.set()
    assert (good.future.result(60), other.future.result(60)) == ("good", "other")
    assert isinstance(bad.future.exception(60), MemoryError)
    assert recorder.batches[1:] == [["good", "bad", "other"], ["good"], ["bad"], ["other"]]
    batcher.close()


def test_a_job_without_an_answer_is_an_error_not_a_hang():
    batcher = Batcher(lambda jobs: None, lambda job: None, max_batch=1, max_wait=0, max_queue=1)
    job = Job(adapter="a")
    batcher.submit(job)
    assert "without an answer" in str(job.future.exception(60))
    batcher.close()


def test_a_full_queue_refuses_and_abandoned_jobs_make_room(recorder):
    batcher = make(recorder, max_queue=2)
    first = held(recorder, batcher)
    waiting = [Job(adapter="a"), Job(adapter="b")]
    for job in waiting:
        batcher.submit(job)
    with pytest.raises(QueueFull, match="at most 2"):
        batcher.submit(Job(adapter="c"))
    waiting[0].abandon()
    last = Job(adapter="d")
    batcher.submit(last)
    first.abandon()  # it is being computed: its answer goes nowhere
    recorder.go.set()
    assert last.future.result(60) == "d"
    assert waiting[0].future.cancelled()
    assert recorder.batches == [["first"], ["b", "d"]]
    batcher.close()


def test_closing_finishes_what_waits(recorder):
    batcher = make(recorder)
    held(recorder, batcher)
    job = Job(adapter="a")
    batcher.max_wait = 1000  # it does not wait for more
    batcher.submit(job)
    threading.Timer(0.1, recorder.go.set).start()
    batcher.close()
    assert job.future.result(0) == "a"
    assert not batcher.alive
    with pytest.raises(Closed):
        batcher.submit(Job(adapter="b"))
