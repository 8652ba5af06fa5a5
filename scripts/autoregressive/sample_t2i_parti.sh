#!/usr/bin/env bash
# Sample the PartiPrompts: images/, captions.txt and result.jsonl, as evaluations/t2i/evaluation.py reads them.
# Prompts and tokenizer lie where LlamaGen has them, unless others are typed or in a --recipe.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/sample/sample_t2i_ddp.py \
    --prompt-csv evaluations/t2i/PartiPrompts.tsv --sample-dir samples_parti \
    --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt -- "$@"
