"""Models of the hub: loaded from everything that the commands read, saved as the commands read it, pushed over HTTP."""
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from autoregressive.hub import ARPG, GPT, Tokenizer
from autoregressive.models.args import ModelArgs
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.registry import MODELS, facts_of
from autoregressive.released import RELEASED, released_grid, tokenizer_of
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_gpt, load_pipeline
from autoregressive.sample.set_claim import checkpoint_name
from autoregressive.train import export
from tests.autoregressive.sample.text import DIM, LENGTH, save_text_model
from tests.data.references import DATA
from tokenizer.build import TokenizerFlags, load_tokenizer, tokenizer_sizes
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils import cli
from utils.checkpoints import containers
from utils.recipes import recipe_names

CPU = torch.device("cpu")
LAYOUTS = json.loads((DATA / "layouts.json").read_text())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def config_in(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def ckpt(request, tmp_path, gpt_ckpt, arpg_ckpt, vq_ckpt):
    """(class that loads it, path, what its weights are called)."""
    return {"gpt": (GPT, gpt_ckpt, "ema"), "arpg": (ARPG, arpg_ckpt, "model"), "tokenizer": (Tokenizer, vq_ckpt, "ema"),
            "text": (GPT, save_text_model(tmp_path / "text.pt"), "model"),
            "text arpg": (ARPG, save_text_model(tmp_path / "text_arpg.pt", "ARPG-S"), "model")}[request.param]


KINDS = ("gpt", "arpg", "tokenizer", "text", "text arpg")


@pytest.mark.parametrize("ckpt", KINDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_folder_holds_the_same_bits_and_says_the_same(ckpt, dtype, tmp_path):
    kind, path, key = ckpt
    content = containers.read(path)
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in content[key].items()}
    torch.save({"model": state, "config": content["config"]}, tmp_path / "given.pt")
    model = kind.from_pretrained(tmp_path / "given.pt")
    assert type(model) is kind and not model.training and same(model.state_dict(), state)
    model.save_pretrained(tmp_path / "a folder")
    assert sorted(file.name for file in (tmp_path / "a folder").iterdir()) == ["README.md", "config.json",
                                                                              "model.safetensors"]
    assert same(load_file(tmp_path / "a folder" / "model.safetensors"), state)
    again = kind.from_pretrained(str(tmp_path / "a folder"))
    assert same(again.state_dict(), state)
    again.save_pretrained(tmp_path / "again")
    first, second = (config_in(tmp_path / name) for name in ("a folder", "again"))
    assert first.pop("source") == "given.pt" and second.pop("source") == "a folder" and first == second
    assert first["dtype"] == ("fp32" if dtype == torch.float32 else "bf16")
    for name in ("classes", "grid", "text_encoder", "class_at_origin", "tokenizer"):
        assert first.get(name) == content["config"].get(name), name


@pytest.mark.parametrize("ckpt", ["gpt", "arpg", "tokenizer"], indirect=True)
def test_what_is_saved_is_what_the_export_writes(ckpt, tmp_path):
    kind, path, _ = ckpt
    flag = "--vq-ckpt" if kind is Tokenizer else "--gpt-ckpt"
    cli.run(export.main, export.ExportFlags, [flag, str(path), "--output", str(tmp_path / "exported")])
    kind.from_pretrained(path).save_pretrained(tmp_path / "saved")
    exported, saved = (config_in(tmp_path / name) for name in ("exported", "saved"))
    exported.pop("source_sha256")
    assert exported == saved and list(exported["measured"])[-1] == "step"
    for name in ("README.md", "model.safetensors"):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_the_commands_draw_the_same_from_a_saved_folder(gpt_ckpt, vq_ckpt, tmp_path):
    """A run's folder is loaded; both folders are given to the sampling pipeline."""
    GPT.from_pretrained(gpt_ckpt.parent.parent).save_pretrained(tmp_path / "gpt")
    Tokenizer.from_pretrained(vq_ckpt).save_pretrained(tmp_path / "vq")
    pictures = [load_pipeline(SampleFlags(gpt_ckpt=str(gpt), vq_ckpt=str(vq), precision="none"), device=CPU)(
        [0, 1, 2], seed=3, indices=[0, 1, 2]) for gpt, vq in ((gpt_ckpt, vq_ckpt), (tmp_path / "gpt", tmp_path / "vq"))]
    assert (pictures[0] == pictures[1]).all()
    assert GPT.from_pretrained(tmp_path / "gpt").class_names == ["blue", "green", "red"]


@pytest.mark.parametrize("model", ["GPT-S", "ARPG-S"])
def test_a_text_model_in_bfloat16_draws(model, tmp_path):
    """Its buffer stays in fp32, as exports write it."""
    path = save_text_model(tmp_path / "text.pt", model)
    cli.run(export.main, export.ExportFlags, ["--gpt-ckpt", str(path), "--dtype", "bf16", "--output",
                                              str(tmp_path / "out")])
    loaded = (GPT if model == "GPT-S" else ARPG).from_pretrained(tmp_path / "out")
    assert loaded.cls_embedding.uncond_embedding.dtype == torch.float32
    codes = generate(loaded, torch.ones(1, LENGTH, DIM), 16, cfg_scale=2.0, generators=[torch.Generator()])
    assert codes.shape == (1, 16)


def test_a_model_that_was_made_here_is_saved(tmp_path):
    """From sizes alone, and with a grid that is no square."""
    config = MODELS["GPT-S"](vocab_size=32, num_classes=3, grid=(2, 4)).config
    model = GPT(config)
    assert isinstance(model, Transformer) and isinstance(config, ModelArgs)
    model.save_pretrained(tmp_path / "out")
    assert config_in(tmp_path / "out") == {
        "gpt_model": "GPT-S", "grid": [2, 4], "kind": "gpt", "gpt_type": "c2i", "vocab_size": 32, "cls_token_num": 1,
        "num_classes": 3, "dtype": "fp32"}
    again = GPT.from_pretrained(tmp_path / "out")
    assert again.config.grid == (2, 4) and same(again.state_dict(), model.state_dict())
    arpg = ARPG(MODELS["ARPG-S"](vocab_size=32, num_classes=3, grid=(4, 4)).config)
    arpg.save_pretrained(tmp_path / "arpg")
    assert config_in(tmp_path / "arpg")["class_at_origin"] == arpg.config.class_at_origin
    Tokenizer(VQ_models["VQ-4-S"](codebook_size=32).config).save_pretrained(tmp_path / "vq")
    assert config_in(tmp_path / "vq")["vq_model"] == "VQ-4-S"
    assert Tokenizer.from_pretrained(tmp_path / "vq").codebook_size == 32


def test_measured_numbers_are_of_the_weights_that_are_saved(gpt_ckpt, tmp_path):
    model = GPT.from_pretrained(gpt_ckpt)
    model.save_pretrained(tmp_path / "as it was")
    run = gpt_ckpt.parent.parent
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = config_in(tmp_path / "as it was")["measured"]
    assert measured["loss"] == rows[-1]["loss"] and measured["step"] == rows[-1]["step"] and "lr" not in measured
    assert f"| loss | {rows[-1]['loss']:.6g} |" in (tmp_path / "as it was" / "README.md").read_text()
    with torch.no_grad():
        model.output.weight.add_(1)
    model.save_pretrained(tmp_path / "changed")
    assert "measured" not in config_in(tmp_path / "changed")
    assert "## Measured" not in (tmp_path / "changed" / "README.md").read_text()
    assert config_in(tmp_path / "changed")["classes"] == ["blue", "green", "red"]


def test_cards_are_written_anew_unless_somebody_took_them_over(gpt_ckpt, vq_ckpt, tmp_path):
    out = tmp_path / "out"
    GPT.from_pretrained(gpt_ckpt).save_pretrained(out)
    digest = containers.content_hash(out)
    Tokenizer.from_pretrained(vq_ckpt).save_pretrained(out)
    text = (out / "README.md").read_text()
    assert "--vq-ckpt owner/name" in text and "Tokenizer.from_pretrained" in text and "not stated" in text
    (out / "README.md").write_text("mine")
    GPT.from_pretrained(gpt_ckpt).save_pretrained(out)
    assert (out / "README.md").read_text() == "mine" and containers.content_hash(out) == digest
    Tokenizer.from_pretrained(vq_ckpt).save_pretrained(tmp_path / "mit", model_card_kwargs={"license": "mit"})
    assert "\nlicense: mit\n" in (tmp_path / "mit" / "README.md").read_text()


def test_a_config_of_a_stranger_makes_a_plain_card(gpt_ckpt, tmp_path):
    out = tmp_path / "out"
    GPT.from_pretrained(gpt_ckpt).save_pretrained(out)
    config = config_in(out) | {"measured": {"loss": "<b>", "fid": float("nan"), "a|b": 1.0, "x": [1]},
                               "recipe": "../../etc/passwd", "source": "\x1b[2J"}
    (out / "config.json").write_text(json.dumps(config))
    GPT.from_pretrained(out).save_pretrained(tmp_path / "again")
    text = (tmp_path / "again" / "README.md").read_text()
    assert "| a b | 1 |" in text and "<b>" not in text and "passwd" not in text and "\x1b" not in text


@pytest.mark.parametrize("ckpt", ["gpt", "arpg", "tokenizer"], indirect=True)
def test_the_wrong_class_is_named(ckpt):
    kind, path, _ = ckpt
    for other in {GPT, ARPG} - {kind} if kind is not Tokenizer else ():
        with pytest.raises(ValueError, match=rf"is {kind.KIND}, not {other.KIND}: {kind.__name__}\.from_pretrained"):
            other.from_pretrained(path)
    with pytest.raises(ValueError, match="no tokenizer checkpoint" if kind is not Tokenizer else "looks like a tokeni"):
        (Tokenizer if kind is not Tokenizer else GPT).from_pretrained(path)


def test_names_are_strict(gpt_ckpt, tmp_path):
    content = containers.read(gpt_ckpt)
    for change, said in (("missing", "missing norm.weight"), ("extra", "unexpected more")):
        state = dict(content["model"])
        if change == "missing":
            del state["norm.weight"]
        else:
            state["more"] = torch.zeros(1)
        torch.save({"model": state, "config": content["config"]}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=said):
            GPT.from_pretrained(tmp_path / "x.pt")


# ---- over HTTP


def test_a_model_goes_to_the_hub_and_comes_back(hub, gpt_ckpt, vq_ckpt, tmp_path):
    model = GPT.from_pretrained(gpt_ckpt)
    url = model.push_to_hub("me/my-gpt", token="hf_x", commit_message="first")
    assert url.startswith(f"{hub.url}/me/my-gpt/commit")
    assert hub.names("me/my-gpt") == ["README.md", "config.json", "model.safetensors"]
    assert hub.commits[0]["summary"] == "first"
    again = GPT.from_pretrained("me/my-gpt")
    assert same(again.state_dict(), model.state_dict()) and again.known["source"] == "me/my-gpt"
    saved = load_gpt(SampleFlags(gpt_ckpt="me/my-gpt", precision="none"), device=CPU)[1]
    assert saved["classes"] == ["blue", "green", "red"] and saved["grid"] == [4, 4]
    Tokenizer.from_pretrained(vq_ckpt).push_to_hub("me/vq", token="hf_x")
    name, tokenizer = load_tokenizer(TokenizerFlags(vq_ckpt="me/vq"), device=CPU)
    assert name == "VQ-4-S" and isinstance(tokenizer, VQModel)
    cached = GPT.from_pretrained("me/my-gpt", revision="v1", cache_dir=tmp_path / "other cache")
    assert list((tmp_path / "other cache").rglob("model.safetensors")) and cached.known["source"] == "me/my-gpt@v1"
    with pytest.raises(ValueError, match="name two revisions"):
        GPT.from_pretrained("me/my-gpt@main", revision="v1")


def test_a_push_that_is_refused_is_one_line(hub, gpt_ckpt):
    model = GPT.from_pretrained(gpt_ckpt)
    for options, said in (({}, "does not let you write to me/x: `hf auth login`"),
                          ({"token": "wrong"}, "does not let you write to me/x")):
        with pytest.raises(ValueError, match=said) as caught:
            model.push_to_hub("me/x", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is no name of a repository"):
        model.push_to_hub("a/b/c", token="hf_x")
    hub.faults["status"] = 500
    with pytest.raises(OSError, match=r"could not be written to http://.*: run it again"):
        model.push_to_hub("me/x", token="hf_x")


# ---- released files




@pytest.mark.parametrize(("file", "layout", "preset"), [
    ("c2i_B_256.pt", "GPT-B/c2i", "GPT-B"), ("arpg_300m.pt", "ARPG-L", "ARPG-L"),
    ("arpg_700m.pt", "ARPG-XL", "ARPG-XL"), ("arpg_1b.pt", "ARPG-XXL", "ARPG-XXL")])
def test_what_a_released_file_is_is_seen_by_name_and_shapes(file, layout, preset):
    state = {name: torch.empty(shape, device="meta") for name, shape in LAYOUTS[layout].items()}
    facts = facts_of(state)
    assert facts.preset() == RELEASED[file].model == preset and facts.num_classes == 1000
    assert released_grid(file, facts) == released_grid(f"owner/name:a/{file}", facts) == {
        "grid": [RELEASED[file].size // 16] * 2}
    assert released_grid("other.pt", facts) == {} and released_grid("c2i_L_384.pt", facts) == {}


@pytest.mark.parametrize("file", [file for file, one in RELEASED.items() if one.tokenizer is not None])
def test_every_released_preset_is_told_by_its_weights(file):
    """Built without memory."""
    text = {"model_type": "t2i", "cls_token_num": 120} if file.startswith("t2i") else {}
    with torch.device("meta"):
        facts = facts_of(MODELS[RELEASED[file].model](**text).state_dict())
    assert released_grid(file, facts) == {"grid": [RELEASED[file].size // 16] * 2}
    assert facts.condition == ("t2i" if text else "c2i") and RELEASED[file].recipe in recipe_names()


def test_all_released_files_of_a_folder_are_converted(tmp_path):
    """Small stand-ins under released names: what the weights show counts, and a size that does not fit is left open."""
    (tmp_path / "given").mkdir()
    states = {"vq_ds8_c2i.pt": VQ_models["VQ-4-S"](codebook_size=64, codebook_embed_dim=4),
              "c2i_B_256.pt": MODELS["GPT-S"](vocab_size=64, num_classes=3)}
    for file, model in states.items():
        torch.save({"model": model.state_dict()}, tmp_path / "given" / file)
    cli.run(export.main, export.ExportFlags, ["--released", str(tmp_path / "given"), "--output", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c2i_B_256", "vq_ds8_c2i"]
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out" / "vq_ds8_c2i")
    assert same(tokenizer.state_dict(), states["vq_ds8_c2i.pt"].state_dict())
    config = config_in(tmp_path / "out" / "c2i_B_256")
    assert config["gpt_model"] == "GPT-S" and "grid" not in config and config["recipe"] == "c2i_B_256"
    card = (tmp_path / "out" / "c2i_B_256" / "README.md").read_text()
    assert "| fid | 5.46 |" in card and "not measured on these weights" in card and "license: mit" in card
    assert "| rfid, by image size 256 | 0.59 |" in (tmp_path / "out" / "vq_ds8_c2i" / "README.md").read_text()


@pytest.mark.parametrize(("argv", "said"), [
    (["--released", "absent"], "there is no file with the name of a released one, such as vq_ds16_c2i.pt"),
    (["--released", "owner/name"], "repositories are FoundationVision/LlamaGen, hp-l33/ARPG, peizesun/llamagen_t2i"),
    (["--released", ".", "--gpt-ckpt", "x.pt"], "leave --gpt-ckpt")])
def test_mistakes_of_conversions_are_one_line(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.run(export.main, export.ExportFlags, argv)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("preset", ["VQ-16", "VQ-8"])
def test_a_tokenizer_is_known_by_its_shapes(preset):
    state = {name: torch.empty(shape, device="meta") for name, shape in LAYOUTS[preset].items()}
    assert tokenizer_sizes(state) == {"vq_model": preset, "codebook_size": 16384, "codebook_embed_dim": 8}


def test_a_released_gpt_is_drawn_at_its_size(hub, tmp_path, monkeypatch):
    """A stand-in of the size of GPT-B, by its name on the hub, on the command line's path: 256 pixels, not 384."""
    monkeypatch.setitem(RELEASED, "c2i_B_256.pt", replace(RELEASED["c2i_B_256.pt"], model="GPT-S", size=64))
    (hub.root / "FoundationVision" / "LlamaGen").mkdir(parents=True)
    model = MODELS["GPT-S"](vocab_size=64, num_classes=3)
    torch.save({"model": model.state_dict()}, hub.root / "FoundationVision" / "LlamaGen" / "c2i_B_256.pt")
    name = "FoundationVision/LlamaGen:c2i_B_256.pt"
    loaded = GPT.from_pretrained(name)
    assert loaded.config.grid == (4, 4) and loaded.config.num_classes == 3 and loaded.known["gpt_model"] == "GPT-S"
    assert load_gpt(SampleFlags(gpt_ckpt=name), device=CPU)[1]["grid"] == [4, 4]
    assert checkpoint_name(SampleFlags(gpt_ckpt=name)) == "c2i_B_256"
    assert tokenizer_of(name) == "FoundationVision/LlamaGen:vq_ds16_c2i.pt" and tokenizer_of("x.pt") is None
    monkeypatch.chdir(tmp_path)
    assert tokenizer_of("arpg_300m.pt") == "FoundationVision/LlamaGen:vq_ds16_c2i.pt"
    (tmp_path / "vq_ds16_c2i.pt").touch()
    assert tokenizer_of("arpg_300m.pt") == "vq_ds16_c2i.pt"
