"""A GPT over image codes as a model of vLLM, with classifier-free guidance inside it.

To vLLM an image is one ordinary sequence, which its scheduler may split, pre-empt and batch as it likes. Within the
model each token is two rows, one with the condition and one without: they share the linear layers, and are two groups
of heads to vLLM's attention, whose cache so holds both. Logits are linear in the last hidden state, so that guidance
mixes the hidden states of the two, h = u + scale * (c - u) in fp32, and the head runs once. Two requests in place of
two streams, with a logits processor that mixes them, give wrong codes whenever the scheduler parts them.

The layers are those of autoregressive/models. Imported by vLLM alone: see vllm_plugin.py.
"""
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from autoregressive.models.args import ModelArgs
from autoregressive.models.blocks import FeedForward
from autoregressive.models.gpt import Transformer
from autoregressive.serve.vllm_places import label_of, places_and_scales, positions
from utils.checkpoints import containers


class TwoStreams(nn.Module, SupportsMRoPE):
    """The model. Its config.json is written by vllm_folder.py."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.args = args = ModelArgs(**{**config.gpt, "grid": tuple(config.grid)})
        self.cfg_interval = config.cfg_interval
        self.head_size, self.stored_size = args.dim // args.n_head, config.head_dim
        with torch.device("meta"):
            self.gpt = Transformer(args)
        self.gpt.to_empty(device=torch.get_default_device()).eval().requires_grad_(False)
        self.attention = nn.ModuleList(
            Attention(2 * args.n_head, self.stored_size, self.head_size**-0.5, num_kv_heads=2 * args.n_kv_head,
                      cache_config=vllm_config.cache_config, prefix=f"{prefix}layers.{i}.attention")
            for i in range(args.n_layer))
        if not vllm_config.model_config.enforce_eager and vllm_config.device_config.device_type == "cpu":
            for part in self.gpt.modules():
                if isinstance(part, FeedForward):
                    part.compile(dynamic=True)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy a checkpoint's tensors, all of them. Returns the names of the own ones."""
        own = self.gpt.state_dict()
        found = dict(weights)
        containers.check_fit(own, found, "the model folder of vLLM", type(self).__name__)
        for name, tensor in found.items():
            own[name].copy_(tensor)
        if self.args.model_type == "t2i":
            table = self.gpt.cls_embedding
            self.register_buffer("without_text", table(table.uncond_embedding[None], drop=False)[0], persistent=False)
        return {f"gpt.{name}" for name in found}

    @staticmethod
    def get_model_state_cls() -> type[ModelState]:
        """What Model Runner V2 keeps of the requests."""
        return RequestStates

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """See `positions`; there are no pictures in prompts."""
        args = self.args
        return positions(input_tokens, vocab_size=args.vocab_size, prefix=args.cls_token_num,
                         num_classes=args.num_classes if args.model_type == "c2i" else None)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Codes (n,) → (n, D)."""
        return self.gpt.tok_embeddings(input_ids.clamp(0, self.args.vocab_size - 1))

    def embedded(self, input_ids: Tensor | None, places: Tensor, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the two streams start from, with and without the condition, (n, D) each."""
        args = self.args
        if args.model_type == "t2i":  # vLLM has embedded codes, and put the text's features where they belong
            nothing = self.without_text[places.clamp(max=args.cls_token_num - 1)]
            return inputs_embeds, torch.where((places < args.cls_token_num)[:, None], nothing, inputs_embeds)
        table, codes = self.gpt.cls_embedding.embedding_table, self.embed_input_ids(input_ids)
        labels = label_of(input_ids, vocab_size=args.vocab_size, num_classes=args.num_classes)
        prompt = (input_ids >= args.vocab_size)[:, None]
        return torch.where(prompt, table(labels), codes), torch.where(prompt, table.weight[args.num_classes], codes)

    def forward(self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: None = None,
                inputs_embeds: Tensor | None = None) -> Tensor:
        """Tokens (n,), or their embeddings (n, D), at M-RoPE positions (3, n) → guided hidden states (n, D)."""
        places, scales = places_and_scales(positions[0])
        rope = self.gpt.rope(positions.device)
        rope = rope[places.clamp(max=len(rope) - 1)]  # (n, K/2, 2); runs that measure memory go beyond the table
        x = torch.cat(self.embedded(input_ids, places, inputs_embeds))  # (2n, D)
        x = self.gpt.hidden_states(x[None], mask=None, rope=rope.repeat(2, 1, 1), cache=self)[0]
        conditional, unconditional = x.float().chunk(2)  # (n, D) each
        guided = scales > 1
        if self.cfg_interval > -1:  # the token at the end of the prefix asks for code 0, before decoding step 0
            guided &= places < self.args.cls_token_num + math.floor(self.cfg_interval) + 1
        mixed = unconditional + scales[:, None] * (conditional - unconditional)
        return torch.where(guided[:, None], mixed, conditional).type_as(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (m, D) → logits (m, V + 1). The code V is drawn in place of one whose logits are not finite."""
        logits = F.pad(self.gpt.output(hidden_states), (0, 1), value=-math.inf)  # (m, V + 1)
        broken = ~logits[:, :-1].isfinite().all(-1, keepdim=True)
        none = torch.full_like(logits[:1], -math.inf)
        none[:, -1] = 0
        return torch.where(broken, none, logits)

    # ---- as the cache of autoregressive/models/blocks.py

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep keys and values (2n, KV heads, K) of a layer until it attends."""
        self.written = k, v

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q (2n, H, K) in vLLM's cache → (2n, H, K). Sizes of heads that it lacks are filled up with
        zeros."""
        def merged(x: Tensor) -> Tensor:  # (2n, heads, K) → (n, 2 * heads * stored size)
            x = F.pad(x, (0, self.stored_size - self.head_size))
            return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(1)

        out = self.attention[layer](*map(merged, (q, *self.written)))
        out = out.view(len(q) // 2, 2, -1, self.stored_size).transpose(0, 1).flatten(0, 1)
        return out[..., :self.head_size]


class RequestStates(DefaultModelState):
    """Of Model Runner V2, which replaces the ids of a prompt that is given as embeddings by zeros: the positions are
    made of the ids as they were sent."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        sent, filled = new_req_data.prompt_token_ids, new_req_data.prefill_token_ids
        super().add_request(req_index, replace(new_req_data, prefill_token_ids=[*sent, *filled[len(sent):]]))
