"""Sample image codes from a GPT, token by token, with a KV cache and classifier-free guidance."""
import torch
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.models.kv_cache import KVCache
from autoregressive.models.sampling import check_sampling, draw, filter_logits, guide

ROW_MULTIPLE = 8  # batches are padded to it: below, the CPU's GEMM kernel, and so the last bit, depends on the batch


@torch.no_grad()  # not inference_mode: its codes could not be trained on
def generate(model: Transformer, cond: Tensor, max_new_tokens: int, emb_masks: Tensor | None = None,
             cfg_scale: float = 1.0, cfg_interval: int = -1, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, sample_logits: bool = True,
             generators: list[torch.Generator] | None = None) -> Tensor:
    """Generate codes (B, max_new_tokens) int64 in raster order.

    cond: labels (B,) or text features (B, N, caption_dim); emb_masks (B, N): 1 where the prefix is text, 0 where it is
    padding, which is hidden from attention. cfg_scale <= 1 runs one stream. cfg_interval i > -1 guides only while the
    index of the decoding step (0 is the first after the prefill) is <= i, then uses conditional logits alone.
    generators: one per sample; without them they are seeded from torch's global state. sample_logits=False takes the
    best code instead of drawing. Raises ValueError for labels, lengths or settings out of range.
    """
    config = model.config
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if not 0 < max_new_tokens <= config.block_size:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but the model's grid holds 1 to {config.block_size}")
    if config.model_type == "c2i" and (int(cond.min()) < 0 or int(cond.max()) > config.num_classes):
        raise ValueError(f"class labels lie in [{int(cond.min())}, {int(cond.max())}], the model has classes "
                         f"0 to {config.num_classes - 1} (and {config.num_classes} for none)")
    if config.model_type == "t2i" and cond.shape[1:] != (config.cls_token_num, config.caption_dim):
        raise ValueError(f"text features are {tuple(cond.shape)}, the model takes (batch, {config.cls_token_num}, "
                         f"{config.caption_dim})")
    if emb_masks is not None and emb_masks.shape != cond.shape[:2]:
        raise ValueError(f"emb_masks is {tuple(emb_masks.shape)}, expected {tuple(cond.shape[:2])} as the features")
    batch = cond.shape[0]
    if generators is None:
        generators = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (batch,)).tolist()]
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples")

    cond, emb_masks = pad_rows(cond), None if emb_masks is None else pad_rows(emb_masks)
    rows = cond.shape[0]
    guided = cfg_scale > 1.0
    if guided:
        cond = torch.cat([cond, model.cls_embedding.unconditional(cond)])
        emb_masks = None if emb_masks is None else torch.cat([emb_masks, emb_masks])
    prefix = model.cls_embedding(cond, drop=False)  # (rows or 2*rows, N, D)
    cache = KVCache(config.n_layer, prefix.shape[0], config.n_kv_head, prefix.shape[1] + max_new_tokens,
                    config.dim // config.n_head, device=prefix.device, dtype=prefix.dtype)
    mask = attention_mask(emb_masks, prefix.shape[1], prefix.shape[1] + max_new_tokens, device=prefix.device)

    codes = torch.empty(rows, max_new_tokens, dtype=torch.long, device=prefix.device)
    for step in range(max_new_tokens):
        if guided and cfg_interval > -1 and step - 1 > cfg_interval:  # the unconditional stream has done its work
            guided = False
            cache.keep_rows(rows)
            mask = mask[:rows]
        start, end = cache.length, cache.length + (prefix.shape[1] if step == 0 else 1)
        step_mask = mask[:, :, start:end, :end]
        if step == 0:
            logits = model.decode(None, prefix=prefix, cache=cache, mask=step_mask)
        else:
            newest = codes[:, step - 1]
            logits = model.decode(newest.repeat(2) if guided else newest, cache=cache, mask=step_mask)
        if guided:
            logits = guide(*logits.chunk(2), cfg_scale)
        if sample_logits:
            logits = filter_logits(logits[:batch], temperature=temperature, top_k=top_k, top_p=top_p)
            codes[:batch, step] = draw(logits, generators)
            codes[batch:, step] = codes[batch - 1, step]
        else:
            codes[:, step] = logits.argmax(-1)
    return codes[:batch]


def pad_rows(x: Tensor) -> Tensor:
    """Repeat the last row until the batch is a multiple of ROW_MULTIPLE."""
    missing = -x.shape[0] % ROW_MULTIPLE
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])


def attention_mask(emb_masks: Tensor | None, prefix: int, total: int, *, device: torch.device) -> Tensor:
    """Causal mask (B or 1, 1, total, total), bool; padded prefix positions are hidden from all but themselves."""
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()[None]
    if emb_masks is not None:
        mask = mask.repeat(emb_masks.shape[0], 1, 1)
        mask[:, :, :prefix] &= emb_masks.bool()[:, None]
        mask |= torch.eye(total, dtype=torch.bool, device=device)
    return mask[:, None]
