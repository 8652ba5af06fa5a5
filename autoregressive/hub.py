"""Models and pipelines of the Hugging Face hub, for programs that do not train.

    from autoregressive.hub import GPT, ARPG, LlamaGenPipeline, Tokenizer

    gpt = GPT.from_pretrained("FoundationVision/LlamaGen:c2i_B_256.pt")   # or runs/quickstart/gpt/000-GPT-S
    gpt.save_pretrained("my_gpt")                                         # config.json, model.safetensors, README.md
    gpt.push_to_hub("owner/name")

    pipe = LlamaGenPipeline.from_pretrained("my_gpt", tokenizer="FoundationVision/LlamaGen:vq_ds16_c2i.pt")
    pipe(class_labels=[207, 88], seed=0).images[0].save("dog.png")

A saved folder is what `--gpt-ckpt` and `--vq-ckpt` take, and what autoregressive/train/export.py makes of checkpoints.
"""
from autoregressive.hub_models import ARPG, GPT, Tokenizer
from autoregressive.hub_pipeline import LlamaGenPipeline

__all__ = ["ARPG", "GPT", "LlamaGenPipeline", "Tokenizer"]
