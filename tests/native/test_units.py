"""The processor's units: a row's bits are its own on each of them, and no kernel reads or writes what it should not."""
import os
import platform
import subprocess
import sys

import pytest
import torch

from autoregressive.models.engines import engine_for
from autoregressive.models.native_engine import NativeEngine
from native import build
from tests.autoregressive.models.test_engine import logits_after
from tests.autoregressive.models.test_gpt import V, tiny
from tests.conftest import ROOT

ROWS = 640


@pytest.fixture(params=build.UNITS)
def unit(request, native, monkeypatch) -> str:
    """Kernels run on this unit and those before it."""
    if list(build.UNITS).index(request.param) >= build.units():
        pytest.skip(f"the processor has no {request.param}")
    monkeypatch.setenv("LLAMAGEN_NATIVE", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [48, 192])  # with 48 inputs, and 37 codes, the last tile is not full
@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_among_many(unit, dim, dtype, threads):
    model = tiny(dim=dim, grid=(1, 3), vocab_size=37).to(dtype)
    codes, conditions = torch.randint(37, (ROWS, 2)), torch.arange(ROWS) % 3
    threads(2)
    expected = logits_after(model, codes, conditions)
    assert type(engine_for(model)) is NativeEngine and expected.isfinite().all()
    for count, rows in ((1, 1), (2, 2), (3, 3), (1, 8), (2, 9), (2, 15), (3, 16), (2, 17), (1, 31), (2, 33), (2, 48),
                        (1, 64), (3, 65), (2, 97), (1, 320), (3, ROWS)):
        threads(count)
        for first in (0, ROWS - rows):
            some = slice(first, first + rows)
            found = logits_after(model, codes[some], conditions[some])
            assert torch.equal(found, expected[:, some]), (count, rows, first)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_rows_that_are_done_in_parts_have_the_bits_of_those_that_are_not(unit, dtype):
    """With 2048 inputs about a hundred rows make a part."""
    model, count = tiny(dim=2048, n_layer=1, grid=(1, 1), vocab_size=37).to(dtype), 250
    codes, conditions = torch.zeros(count, 1, dtype=torch.long), torch.arange(count) % 3
    codes[:, 0] = torch.arange(count) % 37
    expected = logits_after(model, codes, conditions).clone()
    for first in range(0, count, 50):
        some = slice(first, first + 50)
        assert torch.equal(logits_after(model, codes[some], conditions[some]), expected[:, some])


@pytest.mark.slow
@torch.no_grad()
def test_units_that_round_alike_give_the_same_bits(unit, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(dim=192, grid=(1, 3)).to(dtype)
        codes, conditions = torch.randint(V, (20, 2)), torch.arange(20) % 3
        monkeypatch.setenv("LLAMAGEN_NATIVE", unit)
        found = logits_after(model, codes, conditions).clone()
        monkeypatch.setenv("LLAMAGEN_NATIVE", "avx2")
        same = torch.equal(logits_after(model, codes, conditions), found)
        assert same == (dtype == torch.float32 or unit in ("avx2", "avx512"))


@pytest.mark.slow
@torch.no_grad()
def test_units_agree_as_far_as_they_round_alike(unit):
    model = tiny(dim=192, n_layer=3, grid=(2, 3)).bfloat16()
    codes, conditions = torch.randint(V, (20, 5)), torch.arange(20) % 3
    found = logits_after(model, codes, conditions)
    exact = tiny(dim=192, n_layer=3, grid=(2, 3)).bfloat16().double()(codes, conditions)[0].transpose(0, 1)
    error = (found - exact).norm() / exact.norm()
    assert error < (0.024 if unit in ("bf16dot", "amx") else 0.015), error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_weights_that_are_nan_huge_or_subnormal_spoil_nothing_else(unit, dtype):
    model = tiny(grid=(1, 3)).to(dtype)
    codes, conditions = torch.randint(V, (20, 2)), torch.arange(20) % 3
    expected = logits_after(model, codes, conditions).clone()
    model.output.weight[3] = float("nan")
    model.output.weight[5] = 1e30
    model.output.weight[7] = torch.finfo(dtype).tiny / 4
    found = logits_after(model, codes, conditions)
    others = [i for i in range(V) if i not in (3, 5, 7)]
    assert torch.equal(found[..., others], expected[..., others])
    assert found[..., 3].isnan().all() and found[..., 5].isfinite().all() and (found[..., 5].abs() > 1e27).all()
    assert (found[..., 7].abs() < 1e-30).all()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(platform.system() != "Linux", reason="needs LD_PRELOAD")
def test_kernels_pass_the_compiler_s_checks(native, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer, at -O1, where compilers trust what types say of alignment."""
    def library(name: str) -> str:
        found = subprocess.run([build._compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        return found.stdout.strip()

    asan = library("libasan.so")
    if not os.path.isabs(asan):
        pytest.skip("the compiler has no AddressSanitizer to preload")
    run = subprocess.run(
        [sys.executable, "-m", "tests.native.sanitized", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "LD_PRELOAD": f"{asan} {library('libstdc++.so.6')}", "ASAN_OPTIONS": "detect_leaks=0",
             "XDG_CACHE_HOME": str(tmp_path)})
    if "Shadow memory" in run.stderr or "unexpected memory mapping" in run.stderr:
        pytest.skip("the sanitizer does not work on this kernel")
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr[-3000:]
