"""Pictures while they are drawn: seen as they come, stopped by whoever asked, freed when nobody looks."""
import asyncio

import numpy as np
import pytest

from autoregressive.serve import progress as module
from autoregressive.serve.progress import Progress, Runs
from autoregressive.serve.protocol import Job, OverloadedError, Picture
from tests.autoregressive.serve.coloured import CARDS, COLOURS, GREY, ColouredBackend


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)


def job(count: int = 1, *, condition: int = 0) -> Job:
    return Job(model="emoji-gpt", condition=condition, seed=0, indices=range(count), cfg_scale=2.0, partials=3)


def finished(backend: ColouredBackend, jobs: list[Job], *, then=None) -> tuple[Progress, list[float]]:
    """Draw; the last view and the shares of all. then(runs, number of the view): called at each."""
    async def draw():
        runs, progress, shares = Runs(backend), Progress(CARDS[0], sum(len(job.indices) for job in jobs)), []
        async for _ in runs.views("me", jobs, progress):
            shares.append(progress.share)
            if then is not None:
                await then(runs, len(shares))
        assert not runs.tasks and backend.open == 0
        return progress, shares

    return asyncio.run(draw())


def test_pictures_appear_row_by_row_and_are_complete_at_the_end():
    progress, shares = finished(ColouredBackend(), [job(2), job(condition=2)])
    assert shares == sorted(shares) and len(set(shares)) > 3 and shares[-1] == 1
    assert progress.state == "complete" and progress.words().startswith("3 pictures in ")
    assert [tuple(picture[0, 0]) for picture in progress.pictures] == [COLOURS[0], COLOURS[0], COLOURS[2]]


def test_progress_in_words():
    progress = Progress(CARDS[0], 1)
    assert progress.words() == "0 of 16 codes" and (progress.pictures[0] == GREY).all()
    progress.take(Picture(0, np.zeros((16, 16, 3), np.uint8), 5 / 16, 0))
    assert progress.words() == "5 of 16 codes"
    progress = Progress(CARDS[0], 3)
    progress.take(Picture(0, np.zeros((16, 16, 3), np.uint8), 1.0), first=1)
    progress.take(Picture(0, np.zeros((16, 16, 3), np.uint8), 0.25, 0), first=2)
    assert progress.words() == "1 of 3 pictures, 20 of 48 codes"
    progress.state = "stopped"
    assert progress.words() == "stopped after 1 of 3 pictures, 20 of 48 codes"


def test_stopping_keeps_what_is_there_and_frees_the_backend():
    async def stop(runs, view):
        if view == 2:
            await runs.stop("me")
            assert runs.backend.open == 0

    progress, shares = finished(ColouredBackend(pause=0.001), [job(3), job(2)], then=stop)
    assert progress.state == "stopped" and 0 < shares[-1] < 1
    asyncio.run(Runs(ColouredBackend()).stop("nobody"))


def test_a_new_run_replaces_that_of_the_same_visitor_and_no_other():
    async def draw():
        backend = ColouredBackend()
        backend.held = True
        runs, seen = Runs(backend), [Progress(CARDS[0], 1) for _ in range(3)]

        async def follow(key, progress):
            async for _ in runs.views(key, [job()], progress):
                pass

        followed = []
        for key, progress in zip("aba", seen, strict=True):
            followed.append(asyncio.create_task(follow(key, progress)))
            while len(backend.jobs) < len(followed):
                await asyncio.sleep(0)
        backend.held = False
        await asyncio.gather(*followed)
        return [progress.state for progress in seen]

    assert asyncio.run(draw()) == ["replaced", "complete", "complete"]


def test_two_clicks_at_once_draw_once():
    async def draw():
        class Slow(ColouredBackend):
            """Takes a while to let go of a job."""

            async def draw(self, job):
                try:
                    async for picture in super().draw(job):
                        yield picture
                finally:
                    await asyncio.sleep(0.05)

        backend = Slow(pause=0.01)
        runs, seen = Runs(backend), [Progress(CARDS[0], 1) for _ in range(3)]

        async def follow(progress):
            async for _ in runs.views("me", [job()], progress):
                pass

        first = asyncio.create_task(follow(seen[0]))
        while not backend.open:
            await asyncio.sleep(0)
        clicks = [asyncio.create_task(follow(progress)) for progress in seen[1:]]
        await asyncio.wait([first, *clicks])
        return [progress.state for progress in seen], backend.open, len(runs.tasks)

    assert asyncio.run(draw()) == (["replaced", "replaced", "complete"], 0, 0)


def test_closing_the_views_cancels_the_job():
    async def draw():
        backend = ColouredBackend(pause=0.001)
        progress = Progress(CARDS[0], 1)
        views = Runs(backend).views("me", [job()], progress)
        await anext(views)
        assert backend.open == 1
        await views.aclose()
        return backend.open, progress.state

    assert asyncio.run(draw()) == (0, "stopped")


def test_an_error_of_one_job_ends_all():
    backend = ColouredBackend(pause=0.001)
    backend.error, backend.good = OverloadedError("too many pictures are waiting", seconds=3), 6
    with pytest.raises(OverloadedError, match="too many"):
        finished(backend, [job(), job()])
    assert backend.open == 0
