"""A GPT as vLLM reads models: a folder with config.json and model.safetensors, in the cache folder, made once for each
checkpoint and type of weights. It may be deleted at any time.
"""
import fcntl
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from autoregressive.control.adapter import PREFIX
from autoregressive.models.gpt import Transformer
from autoregressive.serve.vllm_places import PLACES
from utils.files import cache_folder, replacing, sweep

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on CPUs; those on GPUs have more


def stored_head_size(head_size: int) -> int:
    """The size with which keys are stored. Raises ValueError for heads that vLLM has no attention for."""
    found = next((size for size in HEAD_SIZES if size >= head_size), None)
    if found is None:
        raise ValueError(f"the GPT's heads have size {head_size}, vLLM's attention takes {HEAD_SIZES[-1]} at most")
    return found


def model_config(gpt: Transformer) -> dict:
    """The content of config.json. What vLLM derives of a config is given in full, as it does not derive it anew when
    values are replaced (`grid_config`)."""
    config = gpt.config
    return {"architectures": ["LlamaGenTwoStreams"], "model_type": "llamagen_two_streams",
            "torch_dtype": str(gpt.output.weight.dtype).removeprefix("torch."),
            "gpt": asdict(config), "vocab_size": config.vocab_size + 1,  # and the code that says "not finite"
            "hidden_size": config.dim, "intermediate_size": config.hidden, "num_hidden_layers": config.n_layer,
            "num_attention_heads": 2 * config.n_head, "num_key_value_heads": 2 * config.n_kv_head,
            "head_dim": stored_head_size(config.dim // config.n_head), "tie_word_embeddings": False,
            "mrope_section": [1, 1, 1],  # what makes vLLM ask the model for positions
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **grid_config(gpt, cfg_interval=-1)}


def grid_config(gpt: Transformer, *, cfg_interval: float) -> dict:
    """What of config.json belongs to how images are drawn. Raises ValueError for a grid that is too large."""
    length = gpt.config.cls_token_num + gpt.config.block_size
    if length > PLACES:
        raise ValueError(f"images of {'x'.join(map(str, gpt.config.grid))} codes are too large for vLLM here: prefix "
                         f"and codes are {length} tokens, expected at most {PLACES}; give a smaller --image-size")
    return {"grid": list(gpt.config.grid), "max_position_embeddings": length, "cfg_interval": cfg_interval}


def model_folder(gpt: Transformer, *, checkpoint_hash: str) -> Path:
    """The folder of a GPT that was read from a checkpoint with that hash; written if it is not there. Processes may ask
    for one at the same time, and one that is killed leaves nothing that is taken for whole."""
    config = json.dumps(model_config(gpt), indent=2, sort_keys=True)
    key = hashlib.sha256(f"{checkpoint_hash} {config}".encode()).hexdigest()[:24]
    folder = cache_folder() / "vllm" / key
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (folder / "config.json").is_file():
            sweep(folder)
            state = {name: tensor.contiguous() for name, tensor in gpt.state_dict().items()
                     if not name.startswith(PREFIX)}
            with replacing(folder / "model.safetensors") as temporary:
                save_file(state, temporary, metadata={"format": "pt"})
            with replacing(folder / "config.json") as temporary:  # the last: with it the folder is whole
                temporary.write_text(config + "\n")
    return folder
