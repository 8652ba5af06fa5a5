"""What stays between calls of `generate`: only buffers, whatever came before. And what if kernels are missing."""
import contextlib
import copy
import gc
import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from autoregressive.models import generate as calls
from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.engines import TorchEngine
from autoregressive.models.generate import generate, release
from autoregressive.models.native_engine import NativeEngine
from native import build
from tests.autoregressive.models.decoding import engine_of, keys_of, plain_codes, streams
from tests.autoregressive.models.test_gpt import tiny
from utils.finite import NotFiniteError

ONE, WINDOWS = {"decode": "sequential"}, {"decode": "jacobi", "window": 3}


def test_calls_of_any_size_follow_each_other(engine):
    model, cond = tiny(grid=(3, 4)), torch.arange(9) % 3
    for batch, length, scale, way in ((2, 12, 2.0, ONE), (9, 3, 1.0, WINDOWS), (1, 12, 3.0, WINDOWS),
                                      (9, 12, 2.0, WINDOWS), (9, 12, 2.0, ONE), (4, 1, 2.0, WINDOWS)):
        codes = generate(model, cond[:batch], length, cfg_scale=scale, generators=streams(batch), **way)
        fresh = generate(tiny(grid=(3, 4)), cond[:batch], length, cfg_scale=scale, generators=streams(batch), **way)
        assert torch.equal(codes, fresh) and codes.shape == (batch, length)
        assert type(engine_of(model)) is engine
    before = codes.clone()
    generate(model, cond[:4], 1, generators=streams(4, seed=1))
    assert torch.equal(codes, before)  # a result does not live in the engine's buffers


@pytest.mark.parametrize("way", [ONE, WINDOWS], ids=str)
def test_after_an_error_the_next_call_is_a_good_one(way, engine, monkeypatch):
    model, cond = tiny(), torch.arange(3)
    expected = generate(model, cond, 9, cfg_scale=2.0, generators=streams(3), **way)
    calls, forward = [], engine.forward

    def failing(*args, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("the third step")
        return forward(*args, **keywords)

    monkeypatch.setattr(engine, "forward", failing)
    with pytest.raises(MemoryError, match="the third step"):
        generate(model, cond, 9, cfg_scale=3.0, generators=streams(3, seed=1), **way)
    assert engine_of(model) is None
    assert torch.equal(generate(model, cond, 9, cfg_scale=2.0, generators=streams(3), **way), expected)


def test_weights_changed_in_place_and_models_cast_between_calls(engine):
    model, cond = tiny(), torch.arange(3)
    codes = generate(model, cond, 9, sample_logits=False)
    other = tiny(seed=1)
    model.load_state_dict(other.state_dict())
    changed = generate(model, cond, 9, sample_logits=False)
    assert not torch.equal(changed, codes)
    assert torch.equal(changed, generate(other, cond, 9, sample_logits=False))
    model.bfloat16()
    half = generate(model, cond, 9, sample_logits=False)
    fresh = generate(tiny(seed=1).bfloat16(), cond, 9, sample_logits=False)
    assert torch.equal(half, fresh)
    assert torch.equal(generate(model.float(), cond, 9, sample_logits=False),
                       generate(tiny(seed=1).bfloat16().float(), cond, 9, sample_logits=False))
    assert type(engine_of(model)) is engine


def test_not_a_number_does_not_outlive_its_call(engine):
    model, cond = tiny(), torch.arange(3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    codes = generate(model, cond, 9, cfg_scale=2.0, generators=streams(3))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="in 3 of 3 images"):
        generate(model, cond, 9, cfg_scale=2.0, generators=streams(3))
    model.load_state_dict(weights)
    assert torch.equal(generate(model, cond, 9, cfg_scale=2.0, generators=streams(3)), codes)


def test_models_in_training_sample_in_eval_mode_and_go_on_training(engine, monkeypatch):
    model, cond = tiny(), torch.arange(3)
    codes = generate(model, cond, 9, generators=streams(3))
    model.train().layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(generate(model, cond, 9, generators=streams(3)), codes)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(engine, "forward", lambda *args, **keywords: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, cond, 9)
    assert [module.training for module in model.modules()] == modes


def test_of_two_calls_at_once_the_last_ends_eval_mode(engine, monkeypatch):
    model, forward, modes = tiny().train(), engine.forward, []
    begun, ended = threading.Event(), threading.Event()

    def waiting(self, x, batch):  # the second call begins and ends later
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(60)
        else:
            begun.set()
            assert ended.wait(60)
            modes.append(model.training)
        return forward(self, x, batch)

    monkeypatch.setattr(engine, "forward", waiting)
    with ThreadPoolExecutor(1) as pool:
        evaluating = calls._evaluating

        @contextlib.contextmanager
        def first(model):
            with evaluating(model):
                if threading.current_thread() is threading.main_thread():
                    found.append(pool.submit(generate, model, torch.arange(3), 9, **ONE))
                yield

        found = []
        monkeypatch.setattr(calls, "_evaluating", first)
        generate(model, torch.arange(3), 9, **ONE)
        ended.set()
        found[0].result(60)
    assert modes and not any(modes) and model.training and not calls._CALLS


def test_calls_inside_and_outside_of_inference_mode(engine):
    model, cond = tiny(), torch.arange(3)
    with torch.inference_mode():
        first = generate(model, cond, 9, generators=streams(3))
    assert torch.equal(generate(model, cond, 9, generators=streams(3)), first)
    with torch.inference_mode():
        assert torch.equal(generate(model, cond, 9, generators=streams(3)), first)


def test_labels_may_be_a_column(engine):
    model, cond = tiny(), torch.arange(3)
    codes = generate(model, cond, 9, generators=streams(3))
    assert torch.equal(generate(model, cond[:, None], 9, generators=streams(3)), codes)


def test_an_engine_does_not_keep_its_model_alive(engine):
    model = tiny()
    generate(model, torch.arange(3), 9)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_the_switch_between_engines_is_read_at_each_call(native, monkeypatch):
    model, cond = tiny(), torch.arange(3)
    codes = generate(model, cond, 9, generators=streams(3))
    assert type(engine_of(model)) is NativeEngine
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    assert torch.equal(generate(model, cond, 9, generators=streams(3)), codes)
    assert type(engine_of(model)) is TorchEngine


def test_models_can_be_copied_and_pickled_after_a_call(engine):
    model, cond = tiny(), torch.arange(3)
    codes = generate(model, cond, 9, generators=streams(3))
    size = len(pickle.dumps(tiny()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert engine_of(twin) is None
        with torch.no_grad():
            twin.output.weight.neg_()  # its own weights
        assert not torch.equal(generate(twin, cond, 9, generators=streams(3)), codes)
        assert torch.equal(generate(model, cond, 9, generators=streams(3)), codes)
    assert len(pickle.dumps(model)) < 1.2 * size


def test_calls_at_once_have_a_decoder_each_and_leave_one(engine):
    """Eight threads, each with an image of its own."""
    model, start = tiny(grid=(4, 4)), threading.Barrier(8)
    expected = generate(model, torch.arange(8) % 3, 16, cfg_scale=2.0, sample_logits=False)

    def call(i: int) -> torch.Tensor:
        start.wait()
        return generate(model, torch.tensor([i % 3]), 16, cfg_scale=2.0, sample_logits=False)[0]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert torch.equal(torch.stack(list(pool.map(call, range(8)))), expected)
    gc.collect()
    decoders = [one for one in gc.get_objects() if type(one) is CodeDecoder and one.model.config is model.config]
    assert len(decoders) == 1 and decoders[0].engine is engine_of(model)
    release(model)
    assert engine_of(model) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow(engine):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model, cond = tiny(vocab_size=1024, n_layer=1), torch.arange(6) % 3

    def call(count: int) -> None:
        for i in range(count):
            way = (ONE, WINDOWS)[i % 2]
            generate(model, cond[:1 + i % 6], 4, cfg_scale=1 + i % 2, generators=streams(1 + i % 6), **way)

    call(40)
    before = resident()
    call(200)
    assert resident() - before < 8 * 2**20  # leaked logits of every step would be some 30 MB


@pytest.mark.parametrize("trouble", ["missing", "broken"])
def test_without_a_compiler_pytorch_does_the_work(trouble, own_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAMAGEN_NATIVE", "1")
    monkeypatch.delenv("CXX", raising=False)
    if trouble == "missing":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    else:  # starts, and fails with a message
        compiler = tmp_path / "broken"
        compiler.write_text("#!/bin/sh\ncase $1 in --version) echo 1 ;; *) echo 'out of order' >&2; exit 1 ;; esac\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    build._compiler.cache_clear(), build._load.cache_clear()
    try:
        model, codes = tiny(), []
        for _ in range(2):
            codes.append(generate(model, torch.arange(3), 9, generators=streams(3)))
        assert type(engine_of(model)) is TorchEngine
        lines = capsys.readouterr().err.splitlines()
    finally:
        build._compiler.cache_clear(), build._load.cache_clear()
    for found in codes:
        assert torch.equal(found, plain_codes(model, torch.arange(3), 9, keys=keys_of(streams(3))))
    assert all("PyTorch's kernels do the work" in line for line in lines)
    if trouble == "missing":
        assert len(lines) == 1 and "no C++ compiler found" in lines[0]
    else:
        assert len(lines) <= 2 and all("out of order" in line and str(compiler) in line for line in lines)


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(native, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build._load.__wrapped__("sample", ()) is not None
