"""Which models are served: those of the command line, of a list, of the quickstart; what is wrong with them."""
import json
import shutil

import pytest

from autoregressive.sample.options import SampleFlags
from autoregressive.sample.prompts import TextSampleFlags
from autoregressive.serve import served
from autoregressive.serve.served import ServeFlags, name_of, served_models
from tests.autoregressive.serve.models import listed_models, save_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models")).parent


def test_a_list_of_models_of_both_kinds(folder):
    found = listed_models(folder / "models.json")
    assert [(one.name, type(one.flags), one.flags.cfg_scale, one.flags.top_k) for one in found] == [
        ("gpt", SampleFlags, 3.0, 0), ("arpg", SampleFlags, 3.0, 0), ("text", TextSampleFlags, 3.0, 0)]
    assert {one.flags.precision for one in found} == {"none"}


def test_one_model_has_the_defaults_of_its_grid_command(folder):
    for file, name, scale, best in (("GPT-S.pt", "GPT-S", 4.0, 2000), ("GPT-S-text.pt", "mine", 7.5, 1000)):
        given = None if name == "GPT-S" else name
        found, = served_models(ServeFlags(gpt_ckpt=str(folder / file), vq_ckpt="vq.pt", model_name=given))
        assert (found.name, found.flags.cfg_scale, found.flags.top_k, found.flags.temperature) == (name, scale, best, 1)
    typed, = served_models(ServeFlags(gpt_ckpt=str(folder / "GPT-S.pt"), vq_ckpt="vq.pt", cfg_scale=1.5, top_k=5))
    assert (typed.flags.cfg_scale, typed.flags.top_k) == (1.5, 5)


def test_what_the_command_line_says_holds_for_a_list_that_does_not(folder, tmp_path):
    path = tmp_path / "models.json"
    path.write_text(json.dumps([{"gpt-ckpt": str(folder / "GPT-S.pt")},
                                {"gpt_ckpt": str(folder / "ARPG-S.pt"), "top_p": 0.5, "shared-order": True}]))
    first, second = served_models(ServeFlags(models=str(path), vq_ckpt="mine.pt", top_p=0.9))
    assert (first.name, first.flags.vq_ckpt, first.flags.top_p, first.flags.shared_order) == (
        "GPT-S", "mine.pt", 0.9, False)
    assert (second.name, second.flags.top_p, second.flags.shared_order) == ("ARPG-S", 0.5, True)


@pytest.mark.parametrize(("content", "said"), [
    ("[", "is no JSON"), ("{}", "expected a list"), ("[]", "expected a list"), ("[3]", "expected a list"),
    ('[{"vq-ckpt": "v"}]', "model 0 has no gpt-ckpt"), ('[{"gpt-ckpt": 3}]', "has no gpt-ckpt"),
    ('[{"name": "a", "gpt-ckpt": "g", "cfg-scal": 2}]', "model a has cfg_scal, which is no flag"),
    ('[{"name": "a", "gpt-ckpt": "g", "cfg-scale": "much"}]', "model a: cfg-scale is 'much'"),
    ('[{"name": "a", "gpt-ckpt": "g", "cfg-scale": [2]}]', "expected a number or a text"),
    ('[{"name": "a b", "gpt-ckpt": "g"}]', "'a b' is no name"),
    ('[{"name": "a", "gpt-ckpt": "g"}, {"name": "a", "gpt-ckpt": "h"}]', "two models named a"),
    ('[{"name": "a", "gpt-ckpt": "g", "models": "x"}]', "has models, which is no flag of a model"),
])
def test_lists_that_cannot_be_read(tmp_path, content, said):
    (tmp_path / "models.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        served_models(ServeFlags(models=str(tmp_path / "models.json")))


def test_flags_that_say_two_things(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        served_models(ServeFlags(models="a.json", gpt_ckpt="g.pt"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        served_models(ServeFlags(models=str(tmp_path / "a.json")))


def test_the_quickstarts_newest_models(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(served, "__file__", str(tmp_path / "a" / "b" / "served.py"))
    with pytest.raises(FileNotFoundError, match=r"run bash scripts/quickstart.sh, or give --gpt-ckpt"):
        served_models(ServeFlags())
    for place, file in (("tokenizer/000-VQ-4-S", "vq.pt"), ("gpt/000-GPT-S", "GPT-S.pt"), ("gpt/001-GPT-S", "GPT-S.pt"),
                        ("t2i/000-GPT-S", "GPT-S-text.pt")):
        run = tmp_path / "runs" / "quickstart" / place / "checkpoints" / "0000010"
        run.mkdir(parents=True)
        shutil.copy(folder / file, run / "consolidated.pth")
    (tmp_path / "runs/quickstart/gpt/002-GPT-S/checkpoints").mkdir(parents=True)  # was killed before its first one
    found = served_models(ServeFlags(temperature=0.5))
    assert [(one.name, one.flags.cfg_scale, one.flags.temperature) for one in found] == [
        ("emoji-gpt", 2.0, 0.5), ("emoji-text", 1.5, 0.5)]
    assert found[0].flags.gpt_ckpt.endswith("001-GPT-S")


@pytest.mark.parametrize(("path", "name"), [
    ("c2i_B_256.pt", "c2i_B_256"), ("gpt/000-GPT-S", "000-GPT-S"), ("a/000-GPT-S/checkpoints/0000400", "000-GPT-S"),
    ("owner/repository:c2i_B_256.pt", "c2i_B_256")])
def test_a_model_is_named_after_its_file(path, name):
    assert name_of(path) == name
