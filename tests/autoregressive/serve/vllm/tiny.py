"""Small models for the tests with vLLM, with weights for which no two logits nearly tie."""
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.sample.conditions import conditions_of
from autoregressive.serve import vllm_engine
from tests.autoregressive.sample.text import ENCODER
from tokenizer.build import TokenizerFlags, new_tokenizer

SETTINGS = {"cfg_scale": 2.5, "cfg_interval": -1, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
TEXT = {"model_type": "t2i", "caption_dim": 8, "cls_token_num": 40}
GPT_S = {"dim": 128, "n_layer": 4, "n_head": 2, "multiple_of": 64, "vocab_size": 256, "grid": (4, 4)}


def gpt(**options) -> Transformer:
    """A GPT in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(ModelArgs(**{"dim": 128, "n_layer": 2, "n_head": 2, "multiple_of": 64, "vocab_size": 64,
                                         "num_classes": 5, "grid": (4, 4), **options}))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def pipeline(**options) -> SimpleNamespace:
    """What of a pipeline vllm_engine.py looks at."""
    model = gpt(**options)
    return SimpleNamespace(gpt=model, settings=dict(SETTINGS), described={"gpt_ckpt_sha256": str(options)},
                           conditions=conditions_of(model, {}))


def decoded(pipe: SimpleNamespace, given: list, scales: list[float]) -> Tensor:
    """The best codes by this program's decoder, (B, h*w)."""
    asked = pipe.conditions.arguments(given, cfg_scale=1.0, device=torch.device("cpu"))
    kept = [scale if _says_something(pipe, one) else 1.0 for one, scale in zip(given, scales, strict=True)]
    return generate(pipe.gpt, max_new_tokens=pipe.gpt.config.block_size, sample_logits=False,
                    cfg_interval=pipe.settings["cfg_interval"], **asked | {"cfg_scale": kept})


def _says_something(pipe: SimpleNamespace, given: int | Tensor) -> bool:
    return given is not pipe.conditions.nothing if isinstance(given, Tensor) else given < pipe.gpt.config.num_classes


def served(pipe: SimpleNamespace, given: list, scales: list[float], *, times: int = 1, max_num_seqs: int = 3,
           **arguments) -> list[Tensor]:
    """The best codes by vLLM, drawn `times` times by one engine; `arguments`: of the engine."""
    from vllm import LLM

    engine = LLM(**vllm_engine.engine_arguments(pipe, max_num_seqs=max_num_seqs) | arguments)
    try:
        found = []
        for _ in range(times):
            prompts = [vllm_engine.prompt_for(pipe, one, scale=scale) for one, scale in zip(given, scales, strict=True)]
            sampling = vllm_engine.sampling_for(pipe, seed=0, temperature=0.0, top_k=0, top_p=1.0)
            answers = engine.generate(prompts, sampling, use_tqdm=False)
            found.append(torch.stack([vllm_engine.codes_from(pipe, one.outputs[0].token_ids) for one in answers]))
        return found
    finally:
        engine.llm_engine.engine_core.shutdown()


def save_models(folder: Path) -> dict[str, str]:
    """Checkpoints of a GPT of classes, one of text, and the tokenizer of both: {"gpt", "text", "vq"} → path."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        name, tokenizer = new_tokenizer(TokenizerFlags(vq_model="VQ-4-S"))
    common = {"gpt_model": "GPT-S", "grid": [4, 4]}
    contents = {
        "vq": {"model": tokenizer.state_dict(), "config": {"vq_model": name}},
        "gpt": {"model": gpt(**GPT_S, num_classes=3).state_dict(),
                "config": common | {"classes": ["red", "green", "blue"]}},
        "text": {"model": gpt(**GPT_S, model_type="t2i", caption_dim=8, cls_token_num=6).state_dict(),
                 "config": common | {"gpt_type": "t2i", "text_encoder": ENCODER}}}
    for key, content in contents.items():
        torch.save(content, folder / f"{key}.pt")
    return {key: str(folder / f"{key}.pt") for key in contents}
