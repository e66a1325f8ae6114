# SPDX-License-Identifier: Apache-2.0
"""Jobs run beside the loader, bounded in number, and their errors surface once."""

from __future__ import annotations

import threading

import pytest
import torch

from sglang_overlay.core.pipeline import Pipeline


def test_jobs_under_way_are_bounded():
    pipeline, gate = Pipeline(2), threading.Event()
    running, most, lock = [], [], threading.Lock()

    def job():
        with lock:
            running.append(1)
            most.append(len(running))
        gate.wait(10)
        with lock:
            running.pop()

    for _ in range(3):
        pipeline.submit(job)
    blocked = threading.Thread(target=lambda: pipeline.submit(job))
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    gate.set()
    blocked.join(10)
    pipeline.close()
    assert not blocked.is_alive()
    assert len(most) == 4
    assert max(most) == 2


def test_error_of_a_job_surfaces_once():
    pipeline = Pipeline(1)
    done = threading.Event()

    def fail():
        try:
            raise ValueError("from a job")
        finally:
            done.set()

    pipeline.submit(fail)
    done.wait(10)
    pipeline.close()
    with pytest.raises(ValueError, match="from a job"):
        pipeline.check()
    pipeline.check()


def test_without_workers_a_job_runs_where_it_is_submitted():
    where = []
    pipeline = Pipeline(0)
    pipeline.submit(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]
    pipeline.close()


def test_workers_compute_with_one_thread_and_others_keep_theirs():
    before = torch.get_num_threads()
    pipeline = Pipeline(2)
    seen = []
    for _ in range(4):
        pipeline.submit(lambda: seen.append(torch.get_num_threads()))
    pipeline.close()
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [1, 1, 1, 1]
    assert later == [before]
    assert torch.get_num_threads() == before
