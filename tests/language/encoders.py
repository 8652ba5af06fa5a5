"""Small text encoders, made on the spot as transformers saves them."""
from pathlib import Path

import torch

WORDS = ["a", "photo", "of", "the", "red", "green", "cat", "dog", "on", "grass", "in", "sky", "with", "and", "big",
         "small"]
WIDTH = 24


def write_t5(folder: Path, *, width: int = WIDTH, safe: bool = True, sentencepiece: bool = True, seed: int = 0) -> Path:
    """A T5 of encoder and decoder with a sentencepiece vocabulary, as LlamaGen's users have it."""
    import sentencepiece as pieces
    from transformers import T5Config, T5ForConditionalGeneration
    folder.mkdir(parents=True)
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4
    pieces.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(folder / "spiece"), vocab_size=60,
                                      pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 512, '
                                                  '"extra_ids": 0}')
    torch.manual_seed(seed)
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = T5ForConditionalGeneration(config)
    if safe:
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder
