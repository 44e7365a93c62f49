"""Several requests in flight: short-lived threads that share a queue, each with what it needs for itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Request = TypeVar("Request")


def run(requests: Iterable[Request], prepare: Callable[[], Callable[[Request], None]], threads: int) -> None:
    """Serve all requests with up to `threads` threads, roughly in their order; raise the first error.

    Each thread calls `prepare` once and what that returns for every request that it takes. After an error no further
    request is begun, and when this returns or raises every thread has ended: nobody touches the memory afterwards.
    """
    queue = deque(requests)

    def work() -> None:
        serve = prepare()
        try:
            while queue:
                try:
                    request = queue.popleft()
                except IndexError:  # another thread took the last one
                    return
                serve(request)
        except BaseException:
            queue.clear()
            raise

    threads = min(threads, len(queue))
    if threads <= 1:
        work()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-io") as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            while futures:
                futures.pop(0).result()
        except BaseException:
            queue.clear()  # an interrupt of this thread must not wait for all of it
            futures.clear()  # or error, traceback, this frame and future would keep each other, and the memory
            raise
