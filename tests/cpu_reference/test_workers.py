# SPDX-License-Identifier: Apache-2.0
"""Jobs run beside the loader, bounded in number, and their errors surface once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from core import pipelined, streams

from sglang_overlay.cpu_reference.workers import Workers, one_thread_each, threads_beside_loader


def test_caller_waits_once_enough_are_under_way():
    pipeline, gate, done = Workers(2), threading.Event(), []
    for _ in range(6):
        pipeline.submit(lambda: gate.wait(30))
    caller = threading.Thread(target=pipeline.submit, args=(lambda: done.append(threading.current_thread()),))
    caller.start()
    caller.join(0.1)
    assert caller.is_alive()
    gate.set()
    caller.join(30)
    assert not caller.is_alive()
    pipeline.close()
    assert [thread.name.startswith("streamfp8-") for thread in done] == [True]


def test_many_callers_have_all_their_jobs_done_once():
    pipeline, done = Workers(2), []
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda number: pipeline.submit(lambda: done.append(number)), range(500)))
    pipeline.close()
    assert sorted(done) == list(range(500))


def test_jobs_that_come_while_it_closes_are_done():
    for _ in range(50):
        pipeline, done = Workers(2), []
        with ThreadPoolExecutor(4) as callers:
            for number in range(100):
                callers.submit(pipeline.submit, partial(done.append, number))
            pipeline.close()
        assert sorted(done) == list(range(100))


def test_jobs_that_fail_leave_room_for_others():
    pipeline, done = Workers(1), []
    for _ in range(20):
        pipeline.submit(lambda: 1 / 0)
    pipeline.submit(lambda: done.append(1))
    pipeline.close()
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        pipeline.check()


def test_error_of_a_job_surfaces_once():
    pipeline = Workers(1)
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
    pipeline = Workers(1)
    pipeline.submit(lambda: [][0])
    pipeline.submit(lambda: {}[0])
    pipeline.close()
    with ThreadPoolExecutor(4) as askers:
        found = [asked.exception() for asked in [askers.submit(pipeline.check) for _ in range(8)]]
    assert [type(error) for error in found if error is not None] == [IndexError]


def test_pipeline_can_be_closed_twice():
    pipeline = Workers(1)
    pipeline.close()
    pipeline.close()


def test_workers_end_where_not_all_can_be_started(monkeypatch):
    start, started, before = threading.Thread.start, [], torch.get_num_threads()

    def start_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Workers(4)
    for thread in started:
        thread.join(10)
    assert [thread.is_alive() for thread in started] == [False, False]
    assert torch.get_num_threads() == before


def test_without_workers_a_job_runs_where_it_is_submitted():
    where = []
    pipeline = Workers(0)
    pipeline.submit(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]
    pipeline.close()


def test_workers_compute_with_one_thread_and_others_keep_theirs():
    before = torch.get_num_threads()
    pipeline = Workers(2)
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


def test_one_thread_each_is_for_this_thread_and_those_that_start_meanwhile():
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as loader, one_thread_each():
        seen = [torch.get_num_threads(), loader.submit(torch.get_num_threads).result()]
    assert seen == [1, 1]
    assert torch.get_num_threads() == before


def test_one_thread_each_ends_with_an_error_as_well():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread_each():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("threads", "workers"), [(4, 4), (1, 0)])
def test_there_are_workers_where_they_are_not_alone(monkeypatch, threads, workers):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert threads_beside_loader() == workers


@pytest.mark.parametrize(("columns", "is_beside"), [(64, False), (4096, True)])
def test_only_units_worth_it_are_quantized_beside_the_loader(monkeypatch, columns, is_beside):
    pipeline, seen = Workers(1), []
    pipelined.use(monkeypatch)
    monkeypatch.setattr(pipelined, "EXECUTOR", pipelined.InThreads(pipeline))
    streamed, weight = streams.per_expert((1, 32, columns)), torch.randn(1, 32, columns).to(torch.bfloat16)
    streamed.stream._progress = lambda _: seen.append(threading.current_thread())
    streamed.sources.offer(weight)
    streamed.stream.write(streamed.placeholder, weight)
    pipeline.close()
    assert [thread is not threading.current_thread() for thread in seen] == [is_beside]
