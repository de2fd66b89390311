"""Jobs from many threads, run in batches by one: the oldest first, with those of its group that came meanwhile."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


class QueueFull(RuntimeError):
    """As many jobs wait as may."""


class Closed(RuntimeError):
    """The batcher takes no more jobs."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One request on its way. Its answer, or what went wrong, is in `future`; `abandoned` says that nobody waits for it."""

    adapter: str
    future: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    abandoned: bool = False

    def answer(self, value: Any) -> None:
        if not self.future.done():
            self.future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def abandon(self) -> None:
        """Drop it from the queue, or let its batch go on without it."""
        self.abandoned = True
        self.future.cancel()


class Batcher:
    """Calls run(jobs), which answers every job, in one thread of its own.

    A batch is the oldest job and those that wait with the same group_of(job), at most max_batch; it starts when it is full, or
    max_wait seconds after its oldest job came. A batch that fails is run again job by job, so that one bad job fails alone.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], None],
        group_of: Callable[[Job], Hashable],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
    ):
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._run, self._group_of = run, group_of
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._runner = ThreadPoolExecutor(1, "fastpeft-model")  # keeps whatever a batch raises: the thread lives on
        self._thread = threading.Thread(target=self._serve, name="fastpeft-batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let the job wait for its batch. Raises QueueFull or Closed."""
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._drop_abandoned()
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"expected at most {self.max_queue} waiting requests, got one more; try again later")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Take no more jobs, and return when those that wait are done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._runner.shutdown()

    def _serve(self) -> None:
        while batch := self._next():
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            error = self._error_of(batch) if batch else None
            if error is not None and len(batch) > 1:
                for job in batch:
                    self._finish(job, None if job.future.done() else self._error_of([job]))
            else:
                for job in batch:
                    self._finish(job, error)

    def _error_of(self, batch: list[Job]) -> BaseException | None:
        return self._runner.submit(self._run, batch).exception()

    def _finish(self, job: Job, error: BaseException | None) -> None:
        job.fail(error or RuntimeError("the batch ended without an answer"))  # an answered job stays answered

    def _next(self) -> list[Job]:
        """The next batch when it is time for it; [] at the end."""
        with self._changed:
            while True:
                self._drop_abandoned()
                if not self._waiting:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                group = self._group_of(self._waiting[0])
                batch = [job for job in self._waiting if self._group_of(job) == group][: self.max_batch]
                left = self._waiting[0].arrived + self.max_wait - time.monotonic()
                if len(batch) == self.max_batch or left <= 0 or self._closing:
                    taken = set(map(id, batch))
                    self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                    return batch
                self._changed.wait(left)

    def _drop_abandoned(self) -> None:
        if any(job.abandoned for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if not job.abandoned)
