"""The backend with vLLM: pictures of its commands, partial pictures, cancelled jobs, an engine that is killed."""
import asyncio
import contextlib
import os
import signal

import numpy as np
import pytest
import torch

from autoregressive.sample import prompts
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.prompts import TextSampleFlags
from autoregressive.serve import vllm_backend
from autoregressive.serve.protocol import Job, OverloadedError, UnavailableError
from autoregressive.serve.served import ServedModel
from tests.autoregressive.sample.text import install
from tests.autoregressive.serve.vllm.tiny import save_models
from tests.conftest import call
from utils.images import load_png

pytestmark = pytest.mark.processes
PROMPT = "a red cat"


def served(folder) -> list[ServedModel]:
    paths = save_models(folder)
    own = {"vq_ckpt": paths["vq"], "precision": "none", "top_k": 0}
    return [ServedModel("classes", SampleFlags(gpt_ckpt=paths["gpt"], **own)),
            ServedModel("texts", TextSampleFlags(gpt_ckpt=paths["text"], **own))]


def job(model="classes", condition=1, **options) -> Job:
    return Job(model=model, condition=condition, **{"seed": 7, "cfg_scale": 2.0, **options})


async def drawn(backend, asked: Job) -> list:
    return [picture async for picture in backend.draw(asked)]


async def complete(backend, asked: Job) -> list[np.ndarray]:
    found = {one.which: one.pixels for one in await drawn(backend, asked) if one.partial is None}
    return [found[which] for which in range(len(asked.indices))]


async def until(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it never became true")


def test_the_backend(tmp_path, monkeypatch):
    """One test, as engines take 15 seconds to start."""
    monkeypatch.setattr(prompts, "load_text_encoder", None)
    install()
    models = served(tmp_path)
    asyncio.run(_tried(models, tmp_path, monkeypatch))


async def _tried(models, folder, monkeypatch) -> None:
    backend = vllm_backend.VLLMBackend(models, slots=3, waiting=5)
    backend.most = 8  # MOST_IMAGES is more
    with pytest.raises(UnavailableError):
        await drawn(backend, job())
    await backend.start()
    try:
        assert [card.name for card in backend.cards] == ["classes", "texts"] and backend.state == "ready"
        assert not backend.cards[0].edits
        await _pictures(backend)
        await _partials(backend)
        await _partials_of_a_list_that_grows(backend, monkeypatch)
        await _refusals(backend)
        await _cancelled(backend)
        from_server = [await complete(backend, job(condition=2, indices=(0,))),
                       await complete(backend, job("texts", PROMPT, indices=(0, 1)))]
        await _killed(backend)
    finally:
        await backend.stop()
    with pytest.raises(UnavailableError):
        await drawn(backend, job())
    assert not any(engine_processes())
    await asyncio.to_thread(_same_as_the_commands, models, folder, from_server)


async def _pictures(backend) -> None:
    whole = await complete(backend, job(indices=range(8)))
    assert all(one.shape == (16, 16, 3) and one.dtype == np.uint8 for one in whole)
    alone = await complete(backend, job(indices=(5,)))
    assert np.array_equal(alone[0], whole[5])
    beside = await asyncio.gather(complete(backend, job(indices=(5,))),
                                  complete(backend, job(condition=0, indices=range(3), cfg_scale=6.5, temperature=2)),
                                  complete(backend, job("texts", PROMPT, indices=(5,))),
                                  complete(backend, job("texts", None, seed=8)))
    assert np.array_equal(beside[0][0], whole[5])
    assert not np.array_equal(beside[1][0], whole[0]) and not np.array_equal(whole[0], whole[1])


async def _partials(backend) -> None:
    found = await drawn(backend, job(indices=(3, 4), partials=3))
    for which in (0, 1):
        own = [one for one in found if one.which == which]
        assert [one.partial for one in own][-1] is None and own[-1].share == 1
        numbers, shares = [one.partial for one in own[:-1]], [one.share for one in own]
        assert numbers and numbers == sorted(numbers) and shares == sorted(shares)
        last = own[-2].pixels
        shown = int(own[-2].share * 4) * 4  # rows of pixels that are surely there
        assert (last[shown + 4:] == last[-1, -1]).all() and not (last[:shown] == last[-1, -1]).all()
    assert np.array_equal(own[-1].pixels, (await complete(backend, job(indices=(4,))))[0])


async def _partials_of_a_list_that_grows(backend, monkeypatch) -> None:
    model, paint = backend._served["classes"], vllm_backend.partial_picture
    generate, lists = model.engine.generate, []

    async def watched(*arguments):
        async for answer in generate(*arguments):
            lists.append(answer.outputs[0].token_ids)
            yield answer

    def painted(pipeline, tokens):
        assert tokens is not lists[-1]
        return paint(pipeline, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "generate", watched)
        patch.setattr(vllm_backend, "partial_picture", painted)
        assert len(await drawn(backend, job(indices=(3,), partials=3))) > 1


async def _refusals(backend) -> None:
    with pytest.raises(ValueError, match="temperature is 3"):
        await drawn(backend, job(temperature=3))
    with pytest.raises(OverloadedError):
        await drawn(backend, job(indices=range(9)))
    assert (backend.decoding, backend.waiting) == (0, 0)


async def _cancelled(backend) -> None:
    """Closed while it draws: its images leave the engine."""
    pictures = backend.draw(job(indices=range(8), partials=2))
    await anext(pictures)
    assert backend.decoding == 3
    await pictures.aclose()
    assert (backend.decoding, backend.waiting) == (0, 0)
    engine = backend._served["classes"].engine
    await until(lambda: not engine.output_processor.has_unfinished_requests())


def engine_processes() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True)
            if child.is_running() and child.status() != "zombie" and "EngineCore" in " ".join(
                [child.name(), *child.cmdline()])]


async def _killed(backend) -> None:
    before = await complete(backend, job(indices=(1,)))
    model = backend._served["classes"]
    process, = model.engine.engine_core.resources.engine_manager.processes
    pictures = backend.draw(job(indices=range(8), partials=2))
    await anext(pictures)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError):
        async for _ in pictures:
            pass
    await until(lambda: model.engine is None)
    with pytest.raises(UnavailableError):
        await drawn(backend, job())
    assert len(await complete(backend, job("texts", PROMPT))) == 1  # the other model goes on
    await until(lambda: backend.state == "ready")
    assert backend.restarts == 1
    assert np.array_equal((await complete(backend, job(indices=(1,))))[0], before[0])


def _same_as_the_commands(models, folder, from_server) -> None:
    classes, texts = (model.flags for model in models)
    common = ["--seed", 7, "--cfg-scale", 2, "--top-k", 0, "--precision", "none", "--vq-ckpt", classes.vq_ckpt]
    call("served_grid", "--gpt-ckpt", classes.gpt_ckpt, *common, "--classes", "blue", "--output", folder / "c.png")
    call("served_prompts", "--gpt-ckpt", texts.gpt_ckpt, *common, "--prompt", PROMPT, "--images-per-prompt", 2,
         "--output", folder / "t.png")
    for path, pictures in (("c.png", from_server[0]), ("t.png", from_server[1])):
        sheet = load_png(folder / path)
        for picture in pictures:
            assert found_in(sheet, picture), path


def found_in(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture lies somewhere in a sheet."""
    h, w = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (h, w, 3))[:, :, 0]
    return bool((windows == picture).all(axis=(2, 3, 4)).any())


def test_arpgs_are_left_out_and_nothing_left_is_refused(tmp_path, monkeypatch, capsys):
    arpg = type("Pipeline", (), {"gpt": torch.nn.Identity()})()
    arpg.gpt.any_order = True
    monkeypatch.setattr(vllm_backend, "load_pipeline", lambda flags, device: arpg)
    with contextlib.suppress(UnavailableError), pytest.raises(ValueError, match="no model that vLLM draws with"):
        vllm_backend.models_for_vllm([ServedModel("any", SampleFlags(gpt_ckpt="a.pt", vq_ckpt="b.pt"))], 2)
    assert "any is an ARPG" in capsys.readouterr().err
