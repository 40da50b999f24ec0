"""The engine's thread by itself: what jobs are told when one can't be served, and when the thread ends."""

import asyncio
import time

import pytest

from teal_fast.engine.load import load
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.server.errors import ApiError
from teal_fast.server.worker import Done, Job, Loaded, Work, Worker


@pytest.fixture
def worker(tiny):
    engine, tokenizer = load(tiny, context=64)
    ended = []
    worker = Worker(lambda: Loaded(engine, tokenizer, "tiny"), 8, ended.append)
    worker.ended = ended
    worker.thread.start()
    while worker.loaded is None:
        time.sleep(0.001)
    yield worker
    worker.close()


def new_job(constraint=None):
    request = Request([3, 4, 5], Sampling(0.0), 0.0, 4, (), constraint=constraint)
    return Job(Work(request), asyncio.get_running_loop())


async def read(job):
    return [item async for item in job.stream()]


def test_what_a_constraint_refuses_is_no_failure_of_the_server(worker):
    def refuse():
        raise ApiError(400, "the answer can't be held to it")

    async def run():
        worker.submit(job := new_job(refuse))
        with pytest.raises(ApiError, match="held to it") as refused:
            await read(job)
        assert refused.value.status == 400
        worker.submit(job := new_job())
        assert isinstance((await read(job))[-1], Done)

    asyncio.run(run())


def test_a_thread_that_ends_leaves_nobody_waiting(worker):
    """As after an error of a GPU, which all of its process's later work meets again."""

    async def run():
        second = new_job()

        def fail():
            worker.submit(second)
            raise RuntimeError("device lost")

        worker.loaded.engine.held.keep = fail
        worker.submit(first := new_job())
        assert len(await read(first)) == 6
        with pytest.raises(ApiError, match="stopping") as refused:
            await read(second)
        assert refused.value.status == 503 and second.state == "ended"
        with pytest.raises(ApiError, match="stopping"):
            worker.submit(new_job())

    asyncio.run(run())
    worker.thread.join(5)
    assert [str(error) for error in worker.ended] == ["device lost"]
