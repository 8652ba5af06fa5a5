"""The path of CUDA graphs, with a stand-in for the capture that runs on a CPU: what it replays, and how it gives up."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.models import attend, graphs, sampling
from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.generate import generate
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.plan import Groups, Request
from tests.autoregressive.models.decoding import streams
from tests.autoregressive.models.small_arpg import tiny as tiny_arpg
from tests.autoregressive.models.test_gpt import V, tiny


class Captures:
    """Stands in for `capture`: a replay does the step again, on the tensors that were held; counts both."""

    def __init__(self, monkeypatch) -> None:
        self.made = self.replayed = 0
        self.spoil = None
        monkeypatch.setattr(graphs, "possible", lambda device: not StepGraphs.broken)
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(StepGraphs, "broken", False)
        monkeypatch.setattr(StepGraphs, "compiles", True)
        monkeypatch.setitem(attend.BUCKET, "cpu", 64)  # what a replay reads must not depend on the step
        monkeypatch.setattr(sampling, "_fused", lambda: sampling._choose_plain)  # compiled in a test of its own

    def capture(self, step, device, pool):
        self.made += 1
        if isinstance(self.spoil, Exception):
            raise self.spoil

        def replay():
            self.replayed += 1
            results = step()
            if self.spoil is not None and self.spoil[0] <= self.made:
                spoilt = results[self.spoil[1]]
                spoilt[(-1,) * spoilt.ndim] += self.spoil[2]
            return results

        return replay, pool


@pytest.fixture
def captures(monkeypatch) -> Captures:
    return Captures(monkeypatch)


def test_sizes_that_alternate_are_captured_once(engine, captures):
    model, expected = tiny(grid=(4, 4)), {}
    for turn in range(3):
        for size in (8, 1, 3):
            codes = generate(model, torch.arange(size) % 3, 16, cfg_scale=2.0, cfg_interval=8, decode="sequential",
                             generators=streams(size))
            assert torch.equal(codes, expected.setdefault(size, codes)), (turn, size)
        # of 9 guided steps the second is captured, of 6 without guidance too; the first of each is done directly
        assert captures.made == 3 * 2 and captures.replayed == 3 * (8 + 5) + turn * 3 * (9 + 6)
    assert not StepGraphs.broken


def test_larger_batches_and_other_weights_are_captured_anew(engine, captures):
    model = tiny(grid=(4, 4))
    for size, made in ((2, 1), (5, 2), (2, 3), (5, 3)):  # the caches grew with five, so two came again
        codes = generate(model, torch.arange(size) % 3, 16, decode="sequential", generators=streams(size))
        assert captures.made == made
    model.bfloat16()
    half = generate(model, torch.arange(5) % 3, 16, decode="sequential", generators=streams(5))
    assert captures.made == 4 and half.shape == codes.shape


def test_other_filters_are_other_graphs(captures, monkeypatch):
    """What is filtered is known on the host, so a graph without a filter cannot serve a call with one."""
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    model = tiny(grid=(4, 4))
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 5}, {"top_k": V + 1}):
        generate(model, torch.arange(3), 16, decode="sequential", generators=streams(3), **settings)
    assert captures.made == 4  # more than all codes is no filter


def test_steps_of_groups_are_told_apart(captures, monkeypatch):
    """As many tokens in the same span of rows, but of fewer rows; as many asks, but of other rows."""
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    model, length = tiny_arpg(grid=(4, 8)), 32

    def codes(decoder: CodeDecoder, sizes: dict[int, list[int]]) -> list[list[int]]:
        for slot in range(4):
            plan = Groups(np.arange(length), np.ones(length), sizes.get(slot, [length]))
            decoder.join(Request(slot % 3, plan, slot))
        for slot in set(range(4)) - set(sizes):
            decoder.leave(slot)
        found = {}
        while decoder.active:
            found |= {done.slot: done.codes.tolist() for done in decoder.step()}
        return [found[slot] for slot in sizes]

    calls = [{slot: [1] * length for slot in range(4)}, {0: [2] * 16, 3: [2] * 16},
             {0: [2, 1, 3, 2] * 4, 3: [2, 3, 1, 2] * 4}]
    plain, decoder = CodeDecoder(model), CodeDecoder(model)
    plain.reserve(4, guided=False), decoder.reserve(4, guided=False)
    with monkeypatch.context() as context:
        context.setattr(graphs, "possible", lambda device: False)
        expected = [codes(plain, sizes) for sizes in calls]
    for _ in range(3):
        assert [codes(decoder, sizes) for sizes in calls] == expected
    assert captures.replayed > 20 and not StepGraphs.broken


def test_windows_of_drafts_are_done_directly(engine, captures):
    model = tiny(grid=(4, 4))
    codes = generate(model, torch.arange(3), 16, decode="jacobi", window=4, generators=streams(3))
    assert captures.made == 0
    assert torch.equal(generate(model, torch.arange(3), 16, decode="sequential", generators=streams(3)), codes)
    assert captures.made == 1


@pytest.mark.parametrize(("spoil", "said"), [
    ((1, 0, 1e-2), "other logits than the step done directly, by up to 0.01"), ((1, 1, 1), "other codes"),
    ((2, 1, 1), "other codes"), ((1, 0, float("nan")), "other logits"),
    (RuntimeError("out of order\nand more"), "sampling slower: out of order\n"),
    (MemoryError(), "slower: MemoryError")],
    ids=["logits", "codes", "the second graph", "nan", "failed capture", "no message"])
def test_after_a_difference_or_failure_steps_are_done_directly(spoil, said, engine, captures, capsys):
    model, cond = tiny(grid=(4, 4)), torch.arange(3)
    settings = {"cfg_scale": 3.0, "cfg_interval": 6, "decode": "sequential"}
    expected = generate(model, cond, 16, generators=streams(3), **settings)
    assert captures.made == 2 and not capsys.readouterr().err
    captures.made, captures.spoil = 0, spoil
    other = tiny(grid=(4, 4))
    for _ in range(2):
        assert torch.equal(generate(other, cond, 16, generators=streams(3), **settings), expected)
    lines = capsys.readouterr().err
    assert said in lines and lines.count("\n") == 1 and lines.startswith("note: CUDA graphs are not used")
    assert captures.made == (3 if isinstance(spoil, tuple) and spoil[0] == 2 else 2) and StepGraphs.broken


def test_a_choice_that_cannot_be_compiled_is_captured_plain(captures, monkeypatch, capsys):
    """No Triton, or no compiler, say: the rest of the step is a graph nevertheless."""
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    model, cond = tiny(grid=(4, 4)), torch.arange(3)
    expected = generate(model, cond, 16, decode="sequential", generators=streams(3))

    def missing():
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(sampling, "_fused", missing)
    other = tiny(grid=(4, 4))
    captures.made = captures.replayed = 0
    for scale in (1.0, 3.0):
        codes = generate(other, cond, 16, decode="sequential", cfg_scale=scale, generators=streams(3))
        assert scale > 1 or torch.equal(codes, expected)
    assert captures.made == 2 and captures.replayed > 20 and not StepGraphs.broken and not StepGraphs.compiles
    said = capsys.readouterr().err
    assert said == "note: the choice of codes is not compiled, which makes sampling slower: no Triton here\n"


def test_rounding_is_no_difference():
    close = [torch.tensor([1.0, 100.0 + 4e-5]), torch.tensor([3])]
    graphs.check_replay(close, [torch.tensor([1.0, 100.0]), torch.tensor([3])], rounding=4e-7)
    with pytest.raises(ValueError, match=r"by up to 0\.0001"):
        graphs.check_replay([torch.tensor([1.0001, 100.0])], [torch.tensor([1.0, 100.0])], rounding=4e-7)
    graphs.check_replay([torch.tensor([float("nan"), 1.0])], [torch.tensor([float("nan"), 1.0])], rounding=1e-6)


def test_graphs_are_for_gpus_and_can_be_turned_off(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert graphs.possible(gpu) and not graphs.possible(torch.device("cpu"))
    monkeypatch.setenv("LLAMAGEN_GRAPHS", "0")
    assert not graphs.possible(gpu)
    monkeypatch.delenv("LLAMAGEN_GRAPHS")
    monkeypatch.setattr(StepGraphs, "broken", True)
    assert not graphs.possible(gpu)


def test_few_graphs_are_kept(captures, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    monkeypatch.setattr(graphs, "MOST", 2)
    model = tiny(grid=(4, 4))
    for _ in range(2):
        for size in (8, 1, 3):
            generate(model, torch.arange(size) % 3, 16, decode="sequential", generators=streams(size))
    assert captures.made == 6


def test_a_graph_that_was_just_captured_is_not_the_first_to_go(captures, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    kept = StepGraphs()
    for name in "ABAC":
        batch = SimpleNamespace(shape=lambda bucket, name=name: name, fed=torch.zeros(1), tensors=[])
        batch.over = lambda tensors, batch=batch: batch
        kept.run(batch, lambda batch, fused: (), kind=None, rounding=0.0)
    assert [shape for shape, _ in kept.kept] == ["A", "C"] and captures.made == 1


@pytest.mark.slow
def test_the_compiled_choice_is_the_plain_one(monkeypatch):
    """Bit for bit on a CPU: Philox's whole numbers, guidance, filters and noise, for any number of draws."""
    monkeypatch.setenv("LLAMAGEN_NATIVE", "0")
    torch.manual_seed(0)
    images = 6
    for largest_k, uses_top_p in ((0, False), (9, False), (9, True)):
        for count in (1, 2, 7, 16):
            image = torch.randint(images, (count,))
            draws = torch.stack([torch.randint(5, (count,)), torch.randint(-1, 5, (count,)), image,
                                 torch.randint(576, (count,))])
            settings = sampling.Settings(
                torch.rand(images) + 0.5, torch.randint(largest_k + 1, (images,)),
                torch.rand(images) if uses_top_p else torch.ones(images), torch.randint(2**62, (images,)),
                torch.arange(images) == 2, largest_k, uses_top_p)
            logits, scale = torch.randn(5, 200), torch.rand(count) * 5
            plain, fused = (sampling.choose(logits, draws, scale, settings, fused=fused) for fused in (False, True))
            assert torch.equal(plain[0], fused[0]) and fused[1].all(), (largest_k, uses_top_p, count)
    logits[2, 5] = float("inf")
    assert torch.equal(*(sampling.choose(logits, draws, scale, settings, fused=fused)[1] for fused in (False, True)))
