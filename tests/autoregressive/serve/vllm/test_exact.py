"""vLLM's best codes are those of this program's decoder, whatever its scheduler does. test_model_runner_v2.py runs this
file with vLLM's other model runner."""
import os

import pytest
import torch

from autoregressive.serve import vllm_engine, vllm_model
from tests.autoregressive.serve.vllm.tiny import TEXT, decoded, pipeline, served
from utils.finite import NotFiniteError

pytestmark = pytest.mark.processes  # vLLM asks lscpu about the processor
LABELS = [0, 1, 2, 3, 4, 5, 1, 2]  # 5: no class
SCALES = [2.5, 1.0, 7.5, 0.0, 1.25, 3.0, 2.5, 100.0]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = {"block_size": 32}


def texts(pipe) -> list[torch.Tensor]:
    """Of all lengths; some begin alike, so that a cache of prefixes finds something, and differ in how many they are,
    which the stream without the text depends on."""
    long = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    return [long[:38], long[:40], long[:34], long[:5].flip(0), pipe.conditions.nothing, long[:38], long[:1], long[:34]]


def few_blocks(pipe) -> dict:
    """So little memory that running images are pre-empted: not all of three fit."""
    return SMALL | {"kv_cache_memory_bytes": 6 * vllm_engine.block_bytes(pipe) // 4}


@pytest.mark.parametrize("arguments", ["plain", "pre-empted", "three tokens at a time", "cached prefixes"])
@pytest.mark.parametrize("condition", ["class", "text"])
def test_codes_are_the_decoders(condition, arguments, monkeypatch):
    size, images, times = ((5, 6), 4, 1) if INTERPRETED else ((8, 8), 8, 2)  # the interpreter is slow
    pipe = pipeline(**{} if condition == "class" else TEXT, **{"grid": size})
    given = (LABELS if condition == "class" else texts(pipe))[:images]
    preempted = count_preemptions(monkeypatch)
    found = served(pipe, given, SCALES[:images], times=times, **{
        "plain": {}, "pre-empted": few_blocks(pipe), "three tokens at a time": {"max_num_batched_tokens": 3},
        "cached prefixes": SMALL | {"enable_prefix_caching": True}}[arguments])
    expected = decoded(pipe, given, SCALES[:images])
    assert [one.tolist() for one in found] == [expected.tolist()] * times
    assert bool(preempted) == (arguments == "pre-empted")


def count_preemptions(monkeypatch) -> list:
    from vllm.v1.core.sched.scheduler import Scheduler

    seen, preempt = [], Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request",
                        lambda self, request, *rest, **more: seen.append(request.request_id)
                        or preempt(self, request, *rest, **more))
    return seen


@pytest.mark.parametrize("options", [{"dim": 200}, {"n_head": 4, "n_kv_head": 2}, {"grid": (2, 6)},
                                     {"dim": 200, "n_head": 1, "n_layer": 3}], ids=str)
def test_every_shape(options):
    pipe = pipeline(**options)  # width 200: two heads of 100, which are stored as 112
    assert served(pipe, LABELS, SCALES)[0].tolist() == decoded(pipe, LABELS, SCALES).tolist()


def test_guidance_of_the_first_steps_only():
    pipe = pipeline()
    pipe.settings["cfg_interval"] = 4
    interval = decoded(pipe, LABELS, SCALES)
    assert served(pipe, LABELS, SCALES)[0].tolist() == interval.tolist()
    pipe.settings["cfg_interval"] = -1
    assert decoded(pipe, LABELS, SCALES).tolist() != interval.tolist()


def test_the_stream_without_the_condition_is_there(monkeypatch):
    """What the comparisons above rest on: without it the codes are others."""
    pipe, forget = pipeline(), vllm_model.TwoStreams.embedded
    monkeypatch.setattr(vllm_model.TwoStreams, "embedded", lambda *given: forget(*given)[:1] * 2)
    assert served(pipe, LABELS, [2.5] * 8)[0].tolist() == decoded(pipe, LABELS, [1.0] * 8).tolist()
    assert decoded(pipe, LABELS, [1.0] * 8).tolist() != decoded(pipe, LABELS, [2.5] * 8).tolist()


def test_logits_that_are_not_finite_are_told():
    pipe = pipeline()
    pipe.gpt.output.weight[3], pipe.described["gpt_ckpt_sha256"] = float("nan"), "broken"
    with pytest.raises(NotFiniteError, match="from code 0 on"):
        served(pipe, [1], [2.0])


def test_which_model_runner_this_is():
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**vllm_engine.engine_arguments(pipeline(), max_num_seqs=2)).create_engine_config()
    assert config.use_v2_model_runner == INTERPRETED
