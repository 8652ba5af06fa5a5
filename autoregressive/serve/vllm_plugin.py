"""What vLLM imports in each of its processes, as a plugin of the group `vllm.general_plugins`: a GPT over image codes
becomes one of the models that it knows. Only the name of the model's class is given here: vLLM imports the class when
it loads such a model.
"""
from transformers import AutoConfig, PretrainedConfig
from vllm import ModelRegistry

ARCHITECTURE = "LlamaGenTwoStreams"  # in the config.json of a model folder


class TwoStreamsConfig(PretrainedConfig):
    """The config.json that vllm_folder.py writes; vLLM sends it to its processes."""

    model_type = "llamagen_two_streams"


def register() -> None:
    """Make the model known; called again, it changes nothing."""
    AutoConfig.register(TwoStreamsConfig.model_type, TwoStreamsConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "autoregressive.serve.vllm_model:TwoStreams")
