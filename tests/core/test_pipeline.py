# SPDX-License-Identifier: Apache-2.0
"""Jobs run beside the loader, bounded in number, and their errors surface once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from core import pipelined, streams
from sglang_overlay.core.pipeline import Pipeline


def test_caller_does_its_job_itself_once_enough_are_under_way():
    pipeline, gate = Pipeline(2), threading.Event()
    threads = torch.get_num_threads()
    for _ in range(6):
        pipeline.submit(lambda: gate.wait(10))
    seen = []
    pipeline.submit(lambda: seen.append((threading.current_thread(), torch.get_num_threads())))
    assert seen == [(threading.current_thread(), 1)]
    assert torch.get_num_threads() == threads
    gate.set()
    pipeline.close()


def test_callers_that_do_their_jobs_themselves_take_turns():
    pipeline, gate = Pipeline(1), threading.Event()
    for _ in range(3):
        pipeline.submit(lambda: gate.wait(30))
    together, most = [], []

    def job():
        together.append(None)
        time.sleep(0.01)
        most.append(len(together))
        together.pop()

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(pipeline.submit, [job] * 8))
    gate.set()
    pipeline.close()
    assert most == [1] * 8


def test_error_of_the_callers_own_job_is_raised_at_once_and_gives_its_threads_back():
    pipeline, gate = Pipeline(1), threading.Event()
    threads = torch.get_num_threads()
    for _ in range(3):
        pipeline.submit(lambda: gate.wait(10))
    with pytest.raises(ZeroDivisionError):
        pipeline.submit(lambda: 1 / 0)
    assert torch.get_num_threads() == threads
    gate.set()
    pipeline.close()
    pipeline.check()


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


def test_first_of_several_errors_surfaces_to_one_of_those_who_ask():
    pipeline = Pipeline(1)
    pipeline.submit(lambda: [][0])
    pipeline.submit(lambda: {}[0])
    pipeline.close()
    with ThreadPoolExecutor(4) as askers:
        found = [asked.exception() for asked in [askers.submit(pipeline.check) for _ in range(8)]]
    assert [type(error) for error in found if error is not None] == [IndexError]


def test_pipeline_can_be_closed_twice():
    pipeline = Pipeline(1)
    pipeline.close()
    pipeline.close()


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


@pytest.mark.parametrize(("columns", "is_beside"), [(64, False), (4096, True)])
def test_only_units_worth_it_are_quantized_beside_the_loader(monkeypatch, columns, is_beside):
    pipeline, seen = Pipeline(1), []
    pipelined.use(monkeypatch)
    monkeypatch.setattr(pipelined, "PIPELINE", pipeline)
    streamed, weight = streams.per_expert((1, 32, columns)), torch.randn(1, 32, columns).to(torch.bfloat16)
    streamed.stream._count = lambda _: seen.append(threading.current_thread())
    streamed.sources.offer(weight)
    streamed.stream.write(streamed.placeholder, weight)
    pipeline.close()
    assert [thread is not threading.current_thread() for thread in seen] == [is_beside]
