"""The pipeline in the manner of diffusers draws what the commands draw."""
import numpy as np
import pytest
import torch

from autoregressive.hub import LlamaGenPipeline
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.prompts import draw_jobs, features_of
from autoregressive.sample.sample_c2i import GridFlags
from evaluations.t2i.layouts import Prompt, PromptJob
from tests.autoregressive.sample import text


@pytest.fixture
def pipe(gpt_ckpt, vq_ckpt):
    return LlamaGenPipeline.from_pretrained(gpt_ckpt, tokenizer=vq_ckpt)


def drawn(pipe, labels=(0, 2), **options):
    return pipe(class_labels=list(labels), output_type="np", **options).images


def test_images_of_a_seed_are_those_of_the_command(pipe, gpt_ckpt, vq_ckpt):
    expected = load_pipeline(GridFlags(gpt_ckpt=str(gpt_ckpt), vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))(
        [0, 2, 1], seed=5, indices=[0, 1, 2])
    images = pipe(class_labels=["blue", 2, "1"], seed=5).images
    assert (np.stack([np.asarray(image) for image in images]) == expected).all()
    one = pipe(class_labels=2, seed=5, indices=[1], output_type="pt").images
    assert one.shape == (1, 3, 16, 16) and ((one * 255).round().permute(0, 2, 3, 1).numpy() == expected[1:2]).all()


def test_generators(pipe):
    first = drawn(pipe, generator=torch.Generator().manual_seed(1))
    assert (drawn(pipe, [0], generator=torch.Generator().manual_seed(1)) == first[:1]).all()
    alone = drawn(pipe, [2], generator=[torch.Generator().manual_seed(2)])
    assert (drawn(pipe, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])[1:] == alone).all()
    assert len(drawn(pipe, num_images_per_prompt=3)) == 6 and not (first[0] == first[1]).all()


@pytest.mark.parametrize(("options", "said"), [
    ({"class_labels": [3]}, "out of range"), ({"class_labels": "cat"}, "unknown"), ({"prompt": "cat"}, "class_labels"),
    ({}, "class_labels"), ({"class_labels": []}, "expected 1 or more"),
    ({"class_labels": 0, "num_inference_steps": 4}, "--step is for ARPG"), ({"class_labels": 0, "top_p": 2.0}, "top"),
    ({"class_labels": 0, "indices": [1]}, "give seed="), ({"class_labels": 0, "seed": 1, "indices": [1, 2]}, "2 indic"),
    ({"class_labels": 0, "generator": []}, "0 generators for 1"), ({"class_labels": 0, "output_type": "jpg"}, "jpg")])
def test_mistakes_are_told(pipe, options, said):
    with pytest.raises(ValueError, match=said):
        pipe(**options)


def test_a_saved_pipeline_draws_the_same(arpg_ckpt, vq_ckpt, tmp_path):
    pipe = LlamaGenPipeline.from_pretrained(arpg_ckpt, tokenizer=vq_ckpt)
    pipe.save_pretrained(tmp_path / "a pipe")
    again = LlamaGenPipeline.from_pretrained(tmp_path / "a pipe").to("cpu")
    assert (drawn(pipe, seed=3, num_inference_steps=4) == drawn(again, seed=3, num_inference_steps=4)).all()
    with pytest.raises(ValueError, match="which tokenizer"):
        LlamaGenPipeline.from_pretrained(arpg_ckpt)


def test_prompts(vq_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr("autoregressive.sample.prompts.load_text_encoder", None)
    text.install()
    pipe = LlamaGenPipeline.from_pretrained(text.save_text_model(tmp_path / "t.pt"), tokenizer=vq_ckpt)
    images = pipe("a red cat", seed=0, num_images_per_prompt=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    jobs = [PromptJob(Prompt(words), p, j) for p, words in enumerate(["a red cat", "a cat"]) for j in range(2)]
    features = features_of(pipe.encoder, ["a red cat", "a cat"], precision="bf16")
    pipe.pipeline.settings |= {"cfg_scale": 7.5, "top_k": 1000}
    commands = pipe.pipeline.to_pixels(draw_jobs(pipe.pipeline, jobs, features, seed=0)) / np.float32(255)
    both = pipe(["a red cat", "a cat"], seed=0, num_images_per_prompt=2, output_type="np").images
    assert (both == commands).all() and (both[:2] == images).all()
    assert (pipe(["a red cat", "a cat"], seed=0, indices=[1, 9], output_type="np").images[0] == images[1]).all()


def test_a_pipeline_goes_to_the_hub_and_comes_back(hub, pipe):
    assert pipe.push_to_hub("me/pipe", token="hf_x").startswith(hub.url)
    again = LlamaGenPipeline.from_pretrained("me/pipe")
    assert (drawn(pipe, seed=3) == drawn(again, seed=3)).all()
