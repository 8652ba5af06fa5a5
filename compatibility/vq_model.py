"""tokenizer.tokenizer_image.vq_model as LlamaGen has it: a factory per tokenizer, and ModelArgs, our VQConfig."""
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.tokenizer_image.vq_model import VQConfig as ModelArgs

__all__ = ["VQ_8", "VQ_16", "ModelArgs"]

VQ_8, VQ_16 = VQ_models["VQ-8"], VQ_models["VQ-16"]
