"""Prompt files of text-to-image benchmarks, the folders that their scorers read, GenEval's table."""
import json

import numpy as np
import pytest
import torch

from evaluations.t2i.geneval import TASKS, summarise_geneval
from evaluations.t2i.layouts import (
    LAYOUTS,
    DPGLayout,
    FlatLayout,
    GenEvalLayout,
    Prompt,
    PromptJob,
    layout_for,
    read_prompts,
    remaining_jobs,
)
from evaluations.t2i.sample_folder import read_samples
from utils import images
from utils.dist import Process

ALONE = Process(0, 1, torch.device("cpu"))


def test_tables_are_read_with_their_quotes(tmp_path):
    coco = tmp_path / "coco_captions.csv"
    coco.write_text('Prompt\nA dog, a cat, and a "hat"\n"A sign, ""STOP"", in snow"\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(coco)] == ['A dog, a cat, and a "hat"', 'A sign, "STOP", in snow']
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\nπ, and a café\tA\tB\t\n"""oui"" on a wall"\tA\tB\n',
                     encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(parti)] == ["π, and a café", '"oui" on a wall']
    (tmp_path / "two.csv").write_text('id,Prompt\r\n7,"a, b"\r\n', encoding="utf-8-sig")
    assert [prompt.text for prompt in read_prompts(tmp_path / "two.csv")] == ["a, b"]
    assert layout_for(coco) == layout_for(parti) == "flat"


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "Caption\na\n", "has the columns Caption: expected one called Prompt"),
    ("a.csv", "Prompt\n", "holds no prompts"),
    ("a.csv", 'Prompt\na\n"b\nc\n', "goes over several lines (is a quote not closed?)"),
    ("a.csv", 'Prompt\na\n" "\n', "line 3: the prompt is empty"),
    ("a.csv", "id,Prompt\n1,a, b\n", "line 2: 3 columns, the header has 2"),
    ("a.jsonl", '{"tag": "colors"}\n', 'line 1: expected a JSON object with "prompt"'),
    ("a.jsonl", '{"prompt": "a"}\n[]\n', 'line 2: expected a JSON object with "prompt"'),
])
def test_bad_prompts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_absent_prompts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        read_prompts(tmp_path / "absent.tsv")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path)
    for name in ("a.1.txt", "a.2.txt"):
        (tmp_path / name).write_text("a cat")
    with pytest.raises(ValueError, match="equal up to the first dot"):
        read_prompts(tmp_path)


def picture(job: PromptJob, *, size: int = 4) -> np.ndarray:
    """A picture that says whose it is."""
    return np.full((size, size, 3), (job.prompt_index, job.image_index, job.seed(0) % 251), np.uint8)


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_flat_folder(tmp_path):
    prompts = [Prompt('a "cat"'), Prompt("Bär, rot")]
    layout = FlatLayout(tmp_path, prompts, images_per_prompt=2)
    jobs = remaining_jobs(layout, ALONE)
    assert [job[1:] for job in jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for job in jobs:
        layout.write(job, picture(job))
    assert files(tmp_path) == ["captions.txt", *(f"images/{i:06d}.png" for i in range(4)), "result.jsonl"]
    read, captions, padding = read_samples(tmp_path)
    assert captions == ['a "cat"', 'a "cat"', "Bär, rot", "Bär, rot"] and padding == 0
    assert [tuple(images.load_png(file)[0, 0, :2]) for file in read] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    assert rows[2] == {"text": "Bär, rot", "image_path": "images/000002.png"}
    assert layout.settings_path == tmp_path / "config.json"


def test_geneval_folder(tmp_path):
    source = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
             {"tag": "colors", "include": [], "prompt": "a photo of a red cow"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert layout_for(source) == "geneval"
    layout = LAYOUTS["geneval"](tmp_path / "out", read_prompts(source))
    jobs = remaining_jobs(layout, ALONE)
    assert len(jobs) == 8 and jobs[0].prompt.text == "a photo of a bench"
    for job in jobs:
        layout.write(job, picture(job))
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == lines[1]
    assert files(tmp_path / "out/00000") == ["metadata.jsonl", *(f"samples/{j:05d}.png" for j in range(4))]
    assert tuple(images.load_png(tmp_path / "out/00001/samples/00002.png")[0, 0, :2]) == (1, 2)
    with pytest.raises(ValueError, match="layout needs prompts with"):
        GenEvalLayout(tmp_path, [Prompt("a cat")])


@pytest.fixture
def dpg(tmp_path):
    """DPG-Bench's folder of three prompts."""
    (tmp_path / "prompts").mkdir()
    for name, text in (("0", "a cat\non a mat\n"), ("COCOval2014000000000123", "ein Bär"), ("partiprompts97", "c")):
        (tmp_path / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    return read_prompts(tmp_path / "prompts")


def test_dpg_grids_hold_nothing_else_whenever_it_stops(tmp_path, dpg):
    assert dpg[0].text == "a cat on a mat" and layout_for(tmp_path / "prompts") == "dpg"
    out = tmp_path / "out"
    layout = DPGLayout(out, dpg)
    for job in remaining_jobs(layout, ALONE)[:7]:  # one prompt, and three tiles of the next
        layout.write(job, picture(job))
        assert set(files(out)) <= {"0.png"}
    (out / ".0.png.killed.tmp").touch()  # a writer that was killed
    layout = DPGLayout(out, dpg)
    jobs = remaining_jobs(layout, ALONE)
    assert files(out) == ["0.png"]
    assert [job[1:] for job in jobs] == [(p, j) for p in (1, 2) for j in range(4)]
    for job in jobs:
        layout.write(job, picture(job))
    assert files(out) == ["0.png", "COCOval2014000000000123.png", "partiprompts97.png"]
    grid = images.load_png(out / "partiprompts97.png")
    assert grid.shape == (8, 8, 3)
    tiles = [[grid[:4, :4], grid[:4, 4:]], [grid[4:, :4], grid[4:, 4:]]]
    for j, tile in enumerate(tile for row in tiles for tile in row):
        assert (tile == picture(PromptJob(dpg[2], 2, j))).all()
    assert layout.settings_path == tmp_path / "out.json"


def test_dpg_needs_four_and_ids(tmp_path, dpg):
    with pytest.raises(ValueError, match="grids have 4"):
        DPGLayout(tmp_path, dpg, images_per_prompt=2)
    with pytest.raises(ValueError, match="prompts with ids"):
        DPGLayout(tmp_path, [Prompt("a cat")])
    with pytest.raises(ValueError, match="at least 1"):
        FlatLayout(tmp_path, dpg, images_per_prompt=0)


@pytest.mark.parametrize("name", ["flat", "dpg"])
def test_sharing_and_resuming_change_no_picture(tmp_path, monkeypatch, dpg, name):
    """Three processes, one of them cut short, then one alone: the same files as from one process."""
    def make(folder, process, *, at_most=None):
        layout = LAYOUTS[name](folder, dpg, images_per_prompt=4)
        jobs = remaining_jobs(layout, process)
        for job in jobs[:at_most]:
            layout.write(job, picture(job))
        return jobs

    make(tmp_path / "a", ALONE)
    box = []  # what rank 0 tells the others
    monkeypatch.setattr("utils.dist.broadcast_object", lambda value: (box.append(value) if value else None) or box[0])
    jobs = [make(tmp_path / "b", Process(rank, 3, ALONE.device), at_most=2 if rank == 1 else None)
            for rank in range(3)]
    monkeypatch.undo()
    assert sorted(job[1:] for part in jobs for job in part) == [(p, j) for p in range(3) for j in range(4)]
    again = make(tmp_path / "b", ALONE)
    assert {job.prompt_index for job in again} == {1}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for file in files(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_seeds_tell_pictures_apart():
    seeds = {PromptJob(Prompt("a"), p, j).seed(g) for p in range(5) for j in range(5) for g in range(3)}
    assert len(seeds) == 75


def test_geneval_summary(tmp_path):
    rows = [(task, i <= k) for k, task in enumerate(TASKS) for i in range(1, 6)]  # k of 5 are correct
    rows += [("single_object", False)] * 5  # more of one task must not weigh more
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps({"tag": tag, "correct": correct}) + "\n" for tag, correct in rows))
    scores = summarise_geneval(path)
    assert scores["single_object"] == 0 and scores["color_attr"] == 1
    assert scores["overall"] == pytest.approx((0 + 0.2 + 0.4 + 0.6 + 0.8 + 1) / 6)
    path.write_text('{"tag": "colors", "correct": true}\n')
    with pytest.raises(ValueError, match="has results for colors: expected single_object"):
        summarise_geneval(path)
    path.write_text('{"tag": "colors", "correct": "False"}\n')
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        summarise_geneval(path)
