"""vLLM as a backend of the server and the page: for each model an engine in a process of its own, started again should
it die.

An image is a request to vLLM, with a seed made of (seed, index) as the commands beside this file make it: the server
draws their pictures, whatever is drawn beside them. They are others than those of the native backend, whose random
streams vLLM does not have. ARPGs are left out, and nothing is edited.
"""
import asyncio
import contextlib
import itertools
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from autoregressive.sample.batch_size import batch_that_fits
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from autoregressive.sample.prompts import TextSampleFlags, encoder_for, load_text_pipeline
from autoregressive.serve.model_engine import KEPT_PROMPTS, card_of
from autoregressive.serve.native_backend import FIRST_PAUSE, LONGEST_PAUSE
from autoregressive.serve.preview import preview
from autoregressive.serve.protocol import (
    MOST_IMAGES,
    FailedError,
    Job,
    ModelCard,
    OverloadedError,
    Picture,
    UnavailableError,
)
from autoregressive.serve.served import ServedModel
from autoregressive.serve.vllm_engine import (
    check_limits,
    codes_from,
    engine_arguments,
    fit_for_vllm,
    free_layers,
    prepare_vllm,
    prompt_for,
    register_here,
    sampling_for,
)
from evaluations.t2i.layouts import Prompt, PromptJob
from language.text_encoder import TextEncoder
from utils import cli, dist
from utils.seeding import derive_seed

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

LOOK_EVERY = 0.2  # seconds between two looks whether an engine lives
FOR_CANCELLED = 2.0  # seconds to wait until images that nobody wants are out of the engine


@dataclass(eq=False)
class Model:
    """A served model: what stays in this process, and its engine while there is one."""

    card: ModelCard
    pipeline: Pipeline  # without the layers
    encoder: TextEncoder | None
    dtype: torch.dtype  # of text features
    arguments: dict[str, Any]  # of the engine
    engine: "AsyncLLM | None" = None
    features: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    jobs: dict[int, asyncio.Queue] = field(default_factory=dict)

    def given(self, condition: int | str | None) -> int | Tensor:
        """What is drawn after for a label or prompt."""
        if condition is None or self.encoder is None:
            return self.pipeline.conditions.nothing if condition is None else int(condition)
        if condition not in self.features:
            self.features[condition] = self.encoder([condition])[0].to("cpu", self.dtype)
            while len(self.features) > KEPT_PROMPTS:
                self.features.popitem(last=False)
        return self.features[condition]


class VLLMBackend:
    """See `Backend`. At most `slots` images of a model are decoded at once, and at most `waiting` more wait."""

    def __init__(self, models: Sequence[ServedModel], *, slots: int = 64, waiting: int = 256) -> None:
        assert slots > 0 and waiting >= 0, (slots, waiting)
        prepare_vllm()
        self.models, self.slots, self.most = list(models), slots, max(MOST_IMAGES, slots * len(models) + waiting)
        self.restarts, self._left, self._stopped = 0, {}, False
        self._served: dict[str, Model] = {}
        self._numbers = itertools.count()
        self._worker = ThreadPoolExecutor(1, "pixels")  # models of this process: one call at a time
        self._watching: list[asyncio.Task] = []

    @property
    def cards(self) -> list[ModelCard]:
        """See `Backend`."""
        return [model.card for model in self._served.values()]

    @property
    def state(self) -> Literal["ready", "loading"]:
        """See `Backend`."""
        up = bool(self._served) and all(model.engine is not None for model in self._served.values())
        return "ready" if up and not self._stopped else "loading"

    @property
    def decoding(self) -> int:
        """See `Backend`."""
        return min(self.slots, sum(self._left.values()))

    @property
    def waiting(self) -> int:
        """See `Backend`."""
        return sum(self._left.values()) - self.decoding

    async def start(self) -> None:
        """See `Backend`."""
        for model in await self._in_worker(models_for_vllm, self.models, self.slots):
            model.engine = await asyncio.to_thread(start_engine, model.arguments)
            self._served[model.card.name] = model
            self._watching.append(asyncio.create_task(self._watch(model)))

    async def stop(self) -> None:
        """See `Backend`."""
        self._stopped = True
        for task in self._watching:
            task.cancel()
        for model in self._served.values():
            give_up(model, "the server is being stopped")
            engine, model.engine = model.engine, None
            if engine is not None:
                await asyncio.to_thread(engine.shutdown)
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def draw(self, job: Job) -> AsyncIterator[Picture]:
        """See `Backend`."""
        model = self._served.get(job.model)
        if model is None or model.engine is None or self._stopped:
            raise UnavailableError("the models are being loaded: try again in some seconds")
        check_limits(cfg_scale=job.cfg_scale, temperature=job.temperature)
        outstanding = sum(self._left.values())
        if outstanding + len(job.indices) > self.most:
            raise OverloadedError(f"{outstanding} images are being drawn or wait, and {len(job.indices)} more are too "
                                  f"many: there is room for {self.most}", seconds=max(1, outstanding // self.slots))
        number, events = next(self._numbers), asyncio.Queue()
        model.jobs[number], self._left[number] = events, len(job.indices)
        task = asyncio.create_task(self._draw_images(model, number, job, events))
        try:
            while self._left[number]:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if event.partial is None:
                    self._left[number] -= 1
                yield event
        finally:
            del self._left[number], model.jobs[number]
            task.cancel()
            await asyncio.wait([task], timeout=FOR_CANCELLED)

    async def _draw_images(self, model: Model, number: int, job: Job, events: asyncio.Queue) -> None:
        """Put the pictures of a job, or the first error, into its queue. Cancelled, it takes the images out of the
        engine."""
        images: list[asyncio.Task] = []
        try:
            given = await self._in_worker(model.given, job.condition)
            images += [asyncio.create_task(self._draw_image(model, number, job, given, which, index, events))
                       for which, index in enumerate(job.indices)]
            await asyncio.gather(*images)
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                error = UnavailableError("vLLM has died and is being started again: try again in some seconds")
            elif not isinstance(error, ValueError | UnavailableError):
                error = FailedError(f"{type(error).__name__}: {cli.message(error)}")
            events.put_nowait(error)
        finally:
            for image in images:
                image.cancel()
            await asyncio.gather(*images, return_exceptions=True)

    async def _draw_image(self, model: Model, number: int, job: Job, given: int | Tensor, which: int, index: int,
                          events: asyncio.Queue) -> None:
        """Draw one image."""
        from vllm.sampling_params import RequestOutputKind

        pipeline, codes = model.pipeline, model.pipeline.gpt.config.block_size
        sampling = sampling_for(pipeline, seed=stream_seed(job, index), temperature=job.temperature, top_k=job.top_k,
                                top_p=job.top_p)
        sampling.output_kind = RequestOutputKind.CUMULATIVE if job.partials else RequestOutputKind.FINAL_ONLY
        tokens, shown = [], 0
        prompt = prompt_for(pipeline, given, scale=job.cfg_scale)
        async for answer in model.engine.generate(prompt, sampling, f"{number}-{which}"):
            tokens = list(answer.outputs[0].token_ids)  # vLLM lengthens its own list while the worker paints
            due = min(job.partials, len(tokens) * (job.partials + 1) // codes)
            if shown < due and len(tokens) < codes:
                pixels = await self._in_worker(partial_picture, pipeline, tokens)
                events.put_nowait(Picture(which, pixels, len(tokens) / codes, due - 1))
                shown = due
        if len(tokens) != codes:
            raise FailedError(f"vLLM has drawn {len(tokens)} of {codes} codes")
        pixels = await self._in_worker(whole_picture, pipeline, tokens)
        events.put_nowait(Picture(which, pixels, 1.0))

    async def _in_worker(self, function: Callable, *arguments: Any) -> Any:
        """Call something in the worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    async def _watch(self, model: Model) -> None:
        """Look after an engine: when it has died its jobs fail at once, and another is started."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if not model.engine.errored:
                continue
            engine, model.engine = model.engine, None
            give_up(model, "vLLM has died and is being started again: try again in some seconds")
            cli.warn(f"the engine of {model.card.name} has died; another one is started", kind="note")
            with contextlib.suppress(Exception):  # of what is left of it
                await asyncio.to_thread(engine.shutdown)
            await self._start_again(model)

    async def _start_again(self, model: Model) -> None:
        """Start engines, after longer and longer pauses, until one lives."""
        pause = FIRST_PAUSE
        while model.engine is None:
            self.restarts += 1
            try:
                engine = await asyncio.to_thread(start_engine, model.arguments)
            except Exception as error:  # whatever vLLM raises where memory or a GPU is missing
                cli.warn(f"{cli.message(error)}; tried again in {pause:g} s")
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
                continue
            if self._stopped:
                engine.shutdown()
                return
            model.engine = engine


def models_for_vllm(models: Sequence[ServedModel], slots: int) -> list[Model]:
    """The models that vLLM can draw with, without their engines. Raises ValueError or FileNotFoundError."""
    device, found = dist.setup().device, []
    for served in models:
        flags = fit_for_vllm(served.flags, device=device)
        text = isinstance(flags, TextSampleFlags)
        pipeline = load_text_pipeline(flags, device=device) if text else load_pipeline(flags, device=device)
        if pipeline.gpt.any_order:
            cli.warn(f"{served.name} is an ARPG, which draws many codes at once: vLLM cannot, and it is left out",
                     kind="note")
            continue
        encoder = encoder_for(flags, pipeline, device=device) if text else None
        card = replace(card_of(served.name, pipeline, flags.gpt_ckpt), edits=False)
        fitting = batch_that_fits(pipeline, device, most=slots)
        arguments = engine_arguments(pipeline, max_num_seqs=fitting, compile=flags.compile)
        free_layers(pipeline)
        found.append(Model(card, pipeline, encoder, torch.bfloat16 if flags.precision == "bf16" else torch.float32,
                           arguments))
    if not found:
        raise ValueError("there is no model that vLLM draws with: give a GPT by --gpt-ckpt, or --backend native")
    return found


def start_engine(arguments: dict[str, Any]) -> "AsyncLLM":
    """An engine in a process of its own; returns when it can be asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that vLLM imports
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        register_here()
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def give_up(model: Model, why: str) -> None:
    """Tell a model's jobs that they will not be finished."""
    for events in model.jobs.values():
        events.put_nowait(UnavailableError(why))


def stream_seed(job: Job, index: int) -> int:
    """The seed of an image: that of the grid commands, where a prompt is the first of its command."""
    if isinstance(job.condition, str):
        return PromptJob(Prompt(job.condition), 0, index).seed(job.seed)
    return derive_seed(job.seed, index)


def partial_picture(pipeline: Pipeline, tokens: Sequence[int]) -> Any:
    """The picture uint8 (H, W, 3) of an image's first codes."""
    config = pipeline.gpt.config
    codes = torch.zeros(config.block_size, dtype=torch.long)
    codes[:len(tokens)] = codes_from(pipeline, tokens)
    device = next(pipeline.tokenizer.parameters()).device
    return preview(pipeline.tokenizer, codes.to(device), (torch.arange(len(codes)) < len(tokens)).to(device),
                   config.grid)


def whole_picture(pipeline: Pipeline, tokens: Sequence[int]) -> Any:
    """The picture uint8 (H, W, 3) of all codes of an image."""
    device = next(pipeline.tokenizer.parameters()).device
    return pipeline.to_pixels(codes_from(pipeline, tokens)[None].to(device))[0]
