"""The check of a GPU: its CPU form as a command, what its report makes of failures, what it would see of graphs."""
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import gpu_check, sampling_checks, training_checks
from benchmarks.check_report import CheckResult, NotTriedError, Outcome, within
from benchmarks.gpu_check import CHECKS, GPUCheckFlags, json_parts, outcome_of
from tests.conftest import ROOT
from tests.house.test_packaging import OPTIONAL
from utils import cli, dist

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVELOPERS = [*OPTIONAL, "pytest", "scipy", "skimage", "torch_fidelity", "ruff"]


def good(device):
    """Holds."""
    yield within("a difference", 0.5, 0.5)
    yield CheckResult(None, "a | number")


def bad(device):
    """Fails."""
    yield CheckResult(True, "one thing")
    yield CheckResult(False, "another: 3 of 4\nwrong", "what the command wrote")


def broken(device):
    """Raises."""
    yield CheckResult(True, "found before")
    raise ZeroDivisionError("in the | middle")


def impossible(device):
    """Lacks something."""
    raise NotTriedError("there is no compiler")
    yield


def measured(device):
    """Promises nothing."""
    yield CheckResult(None, "a speed")


PRETENDED = {check.__name__: check for check in (good, bad, broken, impossible, measured)}


def in_this_process(name: str, config: GPUCheckFlags) -> Outcome:
    stdout = "\n".join(map(gpu_check.json.dumps, json_parts(gpu_check.CHECKS[name], CPU)))
    return outcome_of("a line of somebody else\n" + stdout, "", died="")


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(flags…) → (exit status, report) with pretended checks, in this process."""
    monkeypatch.setattr(gpu_check, "CHECKS", PRETENDED)
    monkeypatch.setattr(gpu_check, "run_apart", in_this_process)

    def run(*argv: str) -> tuple[int, str]:
        code = 0
        try:
            cli.run(gpu_check.main, GPUCheckFlags, ["--device", "cpu", "--report", str(tmp_path / "a" / "b.md"),
                                                      "--checks", "good", *argv])
        except SystemExit as stop:
            code = stop.code
        return code, (tmp_path / "a" / "b.md").read_text() if code < 2 else ""

    return run


def table(report: str) -> dict[str, tuple[str, str]]:
    """Check → (verdict, why)."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in report.splitlines() if line.startswith("| ")][1:]
    assert all(len(row) == 4 for row in rows)
    return {row[0].strip(): (row[1].strip(), row[2].strip()) for row in rows}


def test_what_fails_and_what_raises_is_reported_and_the_rest_goes_on(check, capsys):
    code, report = check("--checks", "good,bad,broken,impossible,measured")
    assert code == 1
    assert table(report) == {
        "good": ("held", "1 of 1 comparisons held"),
        "bad": ("did not hold", "1 of 2 comparisons held; another: 3 of 4 wrong"),
        "broken": ("error", "1 of 1 comparisons held; ZeroDivisionError: in the \\| middle"),
        "impossible": ("not tried", "there is no compiler"), "measured": ("measured", "nothing was promised")}
    assert "\nDid not hold: bad, broken. The CPU form" in report and "Not finished" not in report
    assert "- held: a difference: 0.5, allowed 0.5\n- measured: a | number\n" in report
    assert "- held: found before\n- error: ZeroDivisionError: in the | middle\n\n```\nTraceback" in report
    assert "yield CheckResult" not in report and 'raise ZeroDivisionError("in the | middle")' in report
    assert "```\nwhat the command wrote\n```" in report
    for name in ("commit", "torch", "CUDA, cuDNN, nccl", "Python", "CPU", "driver's cards", "cards"):
        assert re.search(rf"^- {name}: \S", report, flags=re.MULTILINE)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("report: ") and "bad: did not hold" in said.out


def test_nothing_failed(check):
    code, report = check("--checks", "good,impossible,measured,good")
    assert code == 0 and list(table(report)) == ["good", "impossible", "measured"] and "\nNothing failed. " in report


def test_the_report_is_written_before_and_after_each_check(check, monkeypatch):
    seen = []

    def look(name, config):
        seen.append(gpu_check.Path(config.report).read_text())
        return in_this_process(name, config)

    monkeypatch.setattr(gpu_check, "run_apart", look)
    check("--checks", "good,measured")
    assert [list(table(report)) for report in seen] == [[], ["good"]]
    assert "to come: good, measured." in seen[0] and "to come: measured." in seen[1]


@pytest.mark.parametrize(("words", "expected"), [
    (["--checks", "good,nonsense"], "--checks has 'nonsense', expected some of good,bad,broken"),
    (["--check-limit", "0"], "--check-limit is 0, expected seconds"),
    (["--check-limit", "nan"], "--check-limit is nan, expected seconds"),
    (["--report", "."], "--report . is a folder, expected a file such as report.md")])
def test_refusals(check, words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check(*words)[0] == 2
    error, = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.startswith("error: ") and expected in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("wanted", "cards", "said"), [
    ("auto", "A card, driver 470.1, 8 GiB", "has A card, driver 470.1, 8 GiB): take a torch for this driver (TORCH=2"),
    ("cuda", "", "the driver has no cards)")])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(check, monkeypatch, capsys, wanted, cards, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "nvidia_cards", lambda: cards)
    assert check("--device", wanted)[0] == 2 and said in capsys.readouterr().err
    assert gpu_check.chosen_device("cpu") == "cpu"
    monkeypatch.setattr(gpu_check, "nvidia_cards", lambda: "")
    assert gpu_check.chosen_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.chosen_device("auto") == gpu_check.chosen_device("cuda") == "cuda"


def test_not_a_number_does_not_hold():
    assert within("x", float("nan"), 1.0).held is False and within("x", 1.0, 1.0).held is True


# ---- in processes


@pytest.mark.processes
@pytest.mark.parametrize(("how", "limit", "expected"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, "the check's process was killed by SIGSEGV"),
    ("import sys; sys.exit('no such thing')", 60, "the check's process ended with 1"),
    ("import subprocess; subprocess.run(['sleep', '100'])", 3, "the check's process was stopped after 3 seconds")])
def test_a_check_that_dies_ends_alone(tmp_path, monkeypatch, how, limit, expected):
    script = tmp_path / "dies.py"
    script.write_text(f"""import json
print(json.dumps({{"held": True, "text": "found before"}}), flush=True)
{how}
""")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    outcome = gpu_check.run_apart("parity", GPUCheckFlags(check_limit=limit))
    assert outcome.verdict == "error" and outcome.error.startswith(expected)
    assert outcome.findings == [CheckResult(True, "found before")]
    assert ("no such thing" in outcome.traceback) == ("no such thing" in how)


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_ends_the_check_that_runs(tmp_path, number):
    script = tmp_path / "command.py"
    script.write_text(f"""import os, signal, sys, time
if "--one-check" in sys.argv:
    with open("begun.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename("begun.part", "begun")
    time.sleep(600)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import gpu_check
gpu_check.__file__ = {str(script)!r}
gpu_check.cli.run(gpu_check.main, gpu_check.GPUCheckFlags)
""")
    running = subprocess.Popen([sys.executable, script, "--device", "cpu", "--checks", "half"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert waited_for(lambda: (tmp_path / "begun").exists() or running.poll() is not None)
    check = int((tmp_path / "begun").read_text())
    running.send_signal(number)
    try:
        assert running.wait(60) == 128 + number
        assert waited_for(lambda: not lives(check))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(check, signal.SIGKILL)


def lives(number: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waited_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def run_command(folder, *words: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The report and its table of the real command, where it and all that it starts find no package that only
    developers have."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({DEVELOPERS}, None))\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", "--report",
                           folder / "report.md", *words], capture_output=True, text=True, env=environment, check=False)
    report = (folder / "report.md").read_text()
    assert done.returncode == 0, report + done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'report.md'}"
    return report, table(report)


@pytest.mark.processes
def test_the_quick_half_of_the_cpu_form(tmp_path):
    report, found = run_command(tmp_path, "--checks", "device,half,batches")
    assert {name: verdict for name, (verdict, _) in found.items()} == {
        "device": "measured", "half": "held", "batches": "held"}
    assert "The CPU form: small models, no GPU was used." in report
    assert re.search(r"- held: float16: RMS error of the logits, relative: 0.00\d+, allowed 0.01\n", report)


@pytest.mark.processes
@pytest.mark.slow
def test_the_whole_cpu_form(tmp_path):
    report, found = run_command(tmp_path)
    assert list(found) == list(CHECKS)
    verdicts = {name: verdict for name, (verdict, _) in found.items()}
    if verdicts["compile"] == "not tried":  # no compiler
        verdicts["compile"] = "held"
    assert verdicts == {name: "measured" if name in ("device", "speed") else "held" for name in CHECKS}, report
    assert "24 of 24" in found["parity"][1]
    assert "DDP, processes: 2 against one, loss: " in report and "FSDP2, processes: 2 against one, loss: " in report
    assert "side: plain; tokens/s: " in report and "side: ours; tokens/s: " in report


PRETENDED_PYTHON = """#!/usr/bin/env bash
printf '%s|' "$@" >> "$(dirname "${BASH_SOURCE[0]}")/calls"
echo >> "$(dirname "${BASH_SOURCE[0]}")/calls"
"""


@pytest.mark.processes
def test_the_script_installs_what_is_required_and_passes_flags_on(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PRETENDED_PYTHON)
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH"}
    subprocess.run(["bash", tmp_path / "scripts" / "gpu_check.sh", "--checks", "two words"], check=True, cwd=tmp_path,
                   env={**environment, "PYTHON": sys.executable}, capture_output=True)
    _, install, started = (python.parent / "calls").read_text().splitlines()
    assert install == f"-m|pip|install|--quiet|--editable|{tmp_path}|"
    assert started == f"{tmp_path}/benchmarks/gpu_check.py|--checks|two words|"


# ---- that each check can fail


class PretendedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def capture_begin(self, pool=None):
        return pool

    def replay(self):
        return "replayed"


def pretend_gpu(monkeypatch, *, heeds: bool = True, recaptures: bool = False, says: str = "", wrong: bool = False):
    """Let `drawn` act as sampling with graphs would on a GPU, with the given faults."""
    graphs = {}

    def drawn(model, images, **settings):
        if os.environ.get("LLAMAGEN_GRAPHS") != "0" or not heeds:
            if says:
                print(says, file=sys.stderr)
            if recaptures or len(images) not in graphs:
                graphs[len(images)] = torch.cuda.CUDAGraph()
                assert graphs[len(images)].capture_begin(pool="a pool") == "a pool"
            for _ in range(4):
                assert graphs[len(images)].replay() == "replayed"
            return torch.full((len(images), 4), int(wrong))
        return torch.zeros(len(images), 4)

    def random_model(device, dtype, *, family):
        graphs.clear()
        return SimpleNamespace(config=SimpleNamespace(block_size=4))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(sampling_checks, "drawn", drawn)
    monkeypatch.setattr(sampling_checks, "random_model", random_model)
    monkeypatch.setattr(sampling_checks, "timed", lambda work, device: [work(), 0.5][1])


@pytest.mark.parametrize(("faults", "expected"), [
    ({}, set()), ({"heeds": False}, {"LLAMAGEN_GRAPHS=0 replayed graphs 8 times"}),
    ({"recaptures": True}, {"captured [2, 2, 2] graphs (expected 0 at last) and replayed [8, 8, 8] times"}),
    ({"says": "note: CUDA graphs are not used"}, {"said of graphs: note: CUDA graphs are not used"}),
    ({"wrong": True}, {"0.00% of the codes are those without graphs"})], ids=str)
def test_faults_of_graphs_are_seen(monkeypatch, faults, expected):
    monkeypatch.setenv("LLAMAGEN_GRAPHS", "1")
    pretend_gpu(monkeypatch, **faults)
    findings = list(sampling_checks.check_graphs(GPU))
    wrong = [finding.text for finding in findings if finding.held is False]
    assert all(any(text in each for text in expected) for each in wrong), wrong
    assert len(wrong) >= 2 * len(expected) and len(findings) == 3 * 8
    assert "captured [2, 0, 0] graphs (expected 0 at last) and replayed [8, 8, 8] times" in findings[4].text or faults
    assert os.environ["LLAMAGEN_GRAPHS"] == "1" and PretendedGraph().replay() == "replayed"


def test_no_speed_of_graphs_is_told_where_there_are_none(monkeypatch):
    pretend_gpu(monkeypatch)
    texts = [finding.text for finding in sampling_checks.check_graphs(CPU)]
    assert len(texts) > 4 and not [text for text in texts if "ms a code" in text]


def test_graphs_that_are_never_used_do_not_hold(monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(sampling_checks, "drawn", lambda model, images, **settings: torch.zeros(len(images), 4))
    held = [finding.held for finding in sampling_checks.check_graphs(GPU)]
    assert held[:7] == [True, True, True, True, False, True, None]


def test_half_precision_that_is_wrong_is_seen(monkeypatch):
    to = nn.Module.to

    def wrong(module, *args, **options):
        module = to(module, *args, **options)
        if args == (torch.float16,):
            module.output.weight.data.mul_(1.02)
        return module

    monkeypatch.setattr(nn.Module, "to", wrong)
    assert [finding.held for finding in sampling_checks.check_half(CPU)] == [True, True, False, True]
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **options: to(module, *args, **options).apply(
        lambda part: args == (torch.float16,) and part._parameters.get("weight") is not None
        and part.weight.data.fill_(float("nan"))))
    assert [finding.held for finding in sampling_checks.check_half(CPU)] == [True, True, False, False]


def test_batches_that_change_images_are_seen(monkeypatch):
    drawn = sampling_checks.drawn

    def other(model, images, **settings):
        codes = drawn(model, images, **settings)
        return codes if len(images) < 8 else codes.roll(1, dims=1)

    monkeypatch.setattr(sampling_checks, "drawn", other)
    three, eight, windows = sampling_checks.check_batches(CPU)
    assert three.held and eight.held is False and windows.held is None and "all codes of 0 of 8 images" in eight.text


def test_parity_takes_the_tests_bounds_and_wider_ones_on_a_gpu(monkeypatch):
    found = {"before quantisation": 2e-4, "pixels": 2e-4, "wrong codes": 0.0, "clear codes": 1.0}
    references = SimpleNamespace(
        TOKENIZERS=["t"], GPTS=["g"], tokenizer_differences=lambda file, device: found, load_gpt=lambda *args: None,
        teacher_forced_differences=lambda gpt: {"logits": 3e-4, "logits in training": 0.0, "loss": 0.0},
        wrong_greedy_codes=lambda gpt: (0.25, 0.99), generated_codes=lambda gpt: (0, 50), ARPG_DRAWS=["d"],
        load_arpg=lambda *args: (None, None), wrong_arpg_codes=lambda *args: (1, 0.9),
        arpg_teacher_forced_differences=lambda *args: {"logits": 3e-4, "loss": 0.0})
    monkeypatch.setattr(sampling_checks, "references", references)
    held = {device: [finding.held for finding in sampling_checks.check_parity(device)] for device in (CPU, GPU)}
    assert held == {CPU: [False, True, True, False, True, True, False, True, False, True, False],
                    GPU: [True, True, True, True, True, True, False, True, True, True, False]}


@pytest.mark.parametrize("cards", [1, 3])
def test_trainings_that_differ_or_fail_are_seen(monkeypatch, cards):
    def trained(folder, device, *words, processes, batch):
        assert batch % processes == 0 and (folder / "codes" / "manifest.json").is_file()
        calls[words[1], words[3]] += 1
        if (words[1], processes) == ("bf16", cards) and calls["bf16", words[3]] == (1 if words[3] == "fsdp" else 2):
            raise subprocess.CalledProcessError(1, "train", stderr="a long\ntraceback: it broke")
        off = 2e-4 if words[3] == "fsdp" else 0.0
        return {"loss": np.linspace(5, 4, 20) + off, "grad_norm": np.ones(20) * (1 + 0.1 * off)}

    calls = Counter()
    monkeypatch.setattr(training_checks, "trained", trained)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    findings = list(training_checks.check_training(GPU))
    wrong = [finding for finding in findings if finding.held is False]
    assert re.match("fp32, FSDP2, processes: . against one, loss: 0.0002, allowed 0.0001", wrong[0].text)
    assert [finding.text.endswith("ended with 1: traceback: it broke") for finding in wrong[1:]] == [True] * (
        2 if cards > 1 else 1)
    assert wrong[-1].detail == "a long\ntraceback: it broke"
    assert any("DDP was not tried" in finding.text for finding in findings) == (cards == 1)
    assert calls["fp32", "ddp"] == (1 if cards == 1 else 2)


def test_compilation_that_changes_losses_is_seen(monkeypatch):
    toy = training_checks.toy_training
    monkeypatch.setattr(toy, "gpt", lambda *, dropout, compiled, device: compiled)
    monkeypatch.setattr(toy, "losses", lambda compiled, *, seed, steps: torch.linspace(3, 1, steps) + 0.01 * compiled)
    monkeypatch.setattr(toy, "ends", lambda compiled: torch.tensor([1.0, 1.01, 0.99]) + 0.05 * compiled)
    monkeypatch.setattr(torch, "_dynamo", SimpleNamespace(utils=SimpleNamespace(counters={"frames": {"ok": 1}})))
    monkeypatch.setattr(training_checks.shutil, "which", lambda name: "a compiler")
    assert [finding.held for finding in training_checks.check_compile(CPU)] == [True, True, False, False]
    monkeypatch.setattr(training_checks.shutil, "which", lambda name: None)
    assert list(json_parts(training_checks.check_compile, CPU)) == [
        {"missing": "torch.compile needs a C and C++ compiler, such as gcc and g++"}]
    monkeypatch.setattr(training_checks.importlib.util, "find_spec", lambda name: None)
    assert list(json_parts(training_checks.check_compile, GPU)) == [
        {"missing": "torch.compile needs the package triton on a GPU"}]


def test_rows_of_benchmarks(monkeypatch):
    def run(words, **options):
        name = words[1].name
        if name == "bench_train.py":
            raise subprocess.CalledProcessError(1, words, stderr="out of memory")
        cells = " | ".join(map(str, range(15)))
        return SimpleNamespace(stdout=f"measured, bf16\nCodes and pictures: GPT-B:256 | {cells}\n")

    monkeypatch.setattr(training_checks.subprocess, "run", run)
    row, lost = training_checks.check_benchmarks(GPU)
    assert row.held is None and row.text.startswith("case: GPT-B:256; device, threads: 0; versions, date: 1; ")
    assert lost == CheckResult(False, "bench_train.py ended with 1: out of memory", "out of memory")


def test_products_are_computed_without_tf32(monkeypatch):
    """Convolutions on a GPU would take it."""
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(dist, "setup", lambda wanted: SimpleNamespace(device=CPU))
    monkeypatch.setitem(CHECKS, "parity", lambda device: iter(
        [CheckResult(None, str(seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))))]))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.run(gpu_check.main, GPUCheckFlags, ["--one-check", "parity"])
    assert seen == [(False, "highest")]
