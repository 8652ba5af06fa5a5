"""What draws for a server or a page, by name."""
from dataclasses import dataclass
from typing import Literal

from autoregressive.serve.protocol import EngineBackend
from autoregressive.serve.served import ServeFlags, served_models
from utils.cli import flag


@dataclass(kw_only=True)
class BackendFlags(ServeFlags):
    """How the models are run."""

    backend: Literal["native", "vllm"] = flag("native", "what draws: the decoder of this program, or vLLM (in the "
                                                        "environment that scripts/serve_env.sh makes)",
                                              choices=("native", "vllm"))
    slots: int = flag(64, "images of a model that are decoded at once, or fewer where memory is short")
    queue: int = flag(256, "images that may wait besides (there is always room for one request); a server answers 429 "
                            "to what goes beyond")


def make_backend(flags: BackendFlags) -> EngineBackend:
    """What draws with the models that the flags name. Raises ValueError or FileNotFoundError."""
    if flags.slots < 1 or flags.queue < 0:
        raise ValueError(f"--slots is {flags.slots} and --queue {flags.queue}: expected 1 or more, and 0 or more")
    models = served_models(flags)
    if flags.backend == "vllm":
        from autoregressive.serve.vllm_backend import VLLMBackend

        return VLLMBackend(models, slots=flags.slots, waiting=flags.queue)
    from autoregressive.serve.native_backend import NativeBackend

    return NativeBackend(models, slots=flags.slots, waiting=flags.queue)
