"""The page: pictures of a class or a prompt that appear while they are drawn, and parts of pictures drawn anew."""
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autoregressive.serve import page_jobs, page_parts
from autoregressive.serve.page_parts import OF_MODEL, SEEN, VALUES
from autoregressive.serve.page_style import HEADING, TITLE
from autoregressive.serve.progress import Progress, Runs
from autoregressive.serve.protocol import Backend, Job, ModelCard
from dataset.pictures import PictureReader
from utils.cli import one_line

FORGOTTEN = 24 * 3600  # seconds after which pictures of the page are deleted from this machine's disk
KINDS = ("draw", "redraw")
PAINTED = ("picture", "canvas", "clear")  # of the editor
QUIET = {"show_progress": "hidden", "api_visibility": "private"}  # programs ask serve/api.py, not the page


class Page:
    """A page over a backend that is started. `blocks` is what gradio shows, `runs` what is being drawn."""

    def __init__(self, backend: Backend, *, seed: int = 0) -> None:
        import gradio as gr

        self.cards = {card.name: card for card in backend.cards}
        self.first = next(iter(self.cards.values()))
        self.runs = Runs(backend)
        self.examples: Progress | None = None  # complete, drawn for the first visitor
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, FORGOTTEN)) as self.blocks:
            gr.HTML(HEADING, elem_id="heading")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=300):
                    self.controls = page_parts.controls(list(self.cards), self.first, seed=seed)
                with gr.Column(scale=7, min_width=300), gr.Tabs() as self.tabs:
                    with gr.Tab("Draw", id="draw"):
                        drawn = page_parts.pictures("draw", go="Draw", onward="Redraw a part of this picture")
                    with gr.Tab("Inpaint", id="redraw"):
                        self.editor = page_parts.editor(self.first)
                        redrawn = page_parts.pictures("redraw", go="Redraw",
                                                      onward="Go on with this picture")
            self.areas = {"draw": drawn, "redraw": redrawn}
            self._connect_drawing()
            self._connect_model()
            self._connect_editor()
        self.blocks.queue(default_concurrency_limit=None)  # all visitors share the backend's batch, which has a bound

    # ---- what is drawn

    def card(self, name: str) -> ModelCard:
        """A model by its name. Raises ValueError."""
        if name not in self.cards:
            raise ValueError(f"there is no model {str(name)[:50]!r} here any more: load the page again")
        return self.cards[name]

    async def draw(self, key: tuple[str, str], card: ModelCard, jobs: list[Job],
                   captions: list[str] | None = None) -> AsyncIterator[list[Any]]:
        """Draw jobs for a visitor and yield updates of `SEEN` and of the seed; errors are told in a line."""
        import gradio as gr

        progress, failure = Progress(card, sum(len(job.indices) for job in jobs)), None
        seed = None if captions else jobs[0].seed

        def update(shown: int | None = None) -> list[Any]:
            return [*page_parts.seen(progress, sharp=page_jobs.is_small(card), seed=seed, captions=captions),
                    gr.skip() if shown is None else shown]

        yield update(seed)  # later a visitor may be typing another
        try:
            async with contextlib.aclosing(self.runs.views(key, jobs, progress)) as views:
                async for _ in views:
                    yield update()
        except (ValueError, OSError, RuntimeError) as error:
            failure = error
        if progress.state == "replaced":
            return
        yield update()
        if captions and progress.state == "complete":
            self.examples = progress
        if failure is not None:
            raise gr.Error(one_line(str(failure)), print_exception=False)

    async def first_visit(self, session: str) -> AsyncIterator[list[Any]]:
        """Updates that show a visitor who has just come what the first model draws."""
        import gradio as gr

        jobs, captions = page_jobs.example_jobs(self.first)
        if self.examples is not None:
            yield [*page_parts.seen(self.examples, sharp=page_jobs.is_small(self.first), captions=captions), gr.skip()]
            return
        async for update in self.draw((session, "draw"), self.first, jobs, captions):
            yield update

    def asked(self, model: str, another: bool, *values: Any) -> tuple[ModelCard, Job]:
        """The model and the job that the controls say. another: with a seed by chance."""
        card, values = self.card(model), dict(zip(VALUES, values, strict=True))
        if another:
            values["seed"] = secrets.randbelow(2**32)
        return card, page_jobs.asked_job(card, **values)

    # ---- what happens when

    def _connect_drawing(self) -> None:
        import gradio as gr

        async def on_load(request: gr.Request):
            async for update in self.first_visit(request.session_hash):
                yield update

        async def on_draw(request: gr.Request, *values):
            with errors_told():
                card, job = self.asked(*values)
            async for update in self.draw((request.session_hash, "draw"), card, [job]):
                yield update

        async def on_redraw(request: gr.Request, picture, canvas, keep, feather, *values):
            with errors_told():
                card, job = self.asked(*values)
                job = page_jobs.edit_job(card, job, picture, page_jobs.painted(canvas),
                                         paste=page_jobs.whole_number("blending", feather) if keep else None)
            async for update in self.draw((request.session_hash, "redraw"), card, [job]):
                yield update

        def stopper(*kinds: str) -> Callable:
            async def stop(request: gr.Request):
                for kind in kinds:
                    await self.runs.stop((request.session_hash, kind))
            return stop

        def on_select(event: gr.SelectData):
            return event.index

        asked = [self.controls[name] for name in ("model", "another", *VALUES)]
        edited = [self.editor[name] for name in ("picture", "canvas", "keep", "feather")]
        for kind, run, given in (("draw", on_draw, asked), ("redraw", on_redraw, [*edited, *asked])):
            area = self.areas[kind]
            shown = [*(area[name] for name in SEEN), self.controls["seed"]]
            area["go"].click(lambda: 0, None, area["selected"], **QUIET)
            area["go"].click(run, given, shown, **QUIET)
            area["stop"].click(stopper(kind), None, None, **QUIET)
            area["gallery"].select(on_select, None, area["selected"], **QUIET)
        self.blocks.load(on_load, None, [*(self.areas["draw"][name] for name in SEEN), self.controls["seed"]], **QUIET)
        self.blocks.unload(stopper(*KINDS))

    def _connect_model(self) -> None:
        import gradio as gr

        def choose(model: str, picture: np.ndarray | None):
            with errors_told():
                card = self.card(model)
            updates = [gr.update(**properties) for properties in page_parts.for_model(card).values()]
            updates.append(page_jobs.edit_note(card))
            if picture is None or picture.shape[:2] == card.image_size:
                return [*updates, gr.update(interactive=card.edits), *[gr.skip()] * 3]
            return [*updates, gr.update(interactive=card.edits), *self._to_paint(Image.fromarray(picture), card)]

        controls, editor = self.controls, self.editor
        controls["model"].change(
            choose, [controls["model"], editor["picture"]],
            [*(controls[name] for name in OF_MODEL), editor["note"], self.areas["redraw"]["go"],
             *(editor[name] for name in PAINTED)], **QUIET)
        controls["prompts"].click(lambda sample: sample[0], controls["prompts"], controls["prompt"], **QUIET)

    def _connect_editor(self) -> None:
        import gradio as gr

        def take(pictures: list | None, selected: int, model: str):
            with errors_told():
                if not pictures:
                    raise ValueError("there is no picture yet: draw some first")
                picture = pictures[min(selected, len(pictures) - 1)][0]
                return [*self._to_paint(Image.fromarray(picture), self.card(model)), gr.Tabs(selected="redraw")]

        def upload(path: str, model: str):
            with errors_told(path):
                return self._to_paint(PictureReader()(path), self.card(model))

        def clear(picture: np.ndarray | None, model: str):
            with errors_told():
                return page_parts.on_canvas(picture, sharp=page_jobs.is_small(self.card(model)))

        editor, model = self.editor, self.controls["model"]
        target = [editor[name] for name in PAINTED]
        for area in self.areas.values():
            area["onward"].click(take, [area["gallery"], area["selected"], model], [*target, self.tabs], **QUIET)
        editor["upload"].upload(upload, [editor["upload"], model], target, **QUIET)
        editor["clear"].click(clear, [editor["picture"], model], editor["canvas"], **QUIET)

    def _to_paint(self, picture: Image.Image, card: ModelCard) -> list[Any]:
        """Updates of the editor's picture, its canvas and the button that removes the paint."""
        import gradio as gr

        fitting = page_jobs.fitted(picture, card)
        return [fitting, page_parts.on_canvas(fitting, sharp=page_jobs.is_small(card)), gr.update(interactive=True)]


@contextlib.contextmanager
def errors_told(path: str | None = None) -> Iterator[None]:
    """Show a visitor's mistake in a line. path: of a file that was sent, which is called by its name alone."""
    import gradio as gr

    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error) if path is None else str(error).replace(str(path), Path(path).name)
        raise gr.Error(one_line(text), print_exception=False) from None
