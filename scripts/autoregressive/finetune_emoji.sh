#!/usr/bin/env bash
# Teach a GPT a class that it has never seen: emoji without clocks, then clocks alone by LoRA; merge, sample, score.
#   bash scripts/autoregressive/finetune_emoji.sh
# Takes the quickstart's tokenizer if there is one, else trains its own. Everything goes to runs/finetune_emoji. Run it
# again to continue after an interruption.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_venv.sh" lora,quickstart
cd "$root"
run=runs/finetune_emoji
export VIRTUAL_ENV="$root/.venv" PATH="$root/.venv/bin:$PATH"
export nproc_per_node=1 # models this small gain nothing from a second GPU

vq=runs/quickstart/tokenizer/000-VQ-4-S
if [ ! -d "$vq" ]; then
    vq="$run/tokenizer/000-VQ-4-S"
    bash scripts/tokenizer/train_vq.sh --dataset emoji --image-size 48 --vq-model VQ-4-S --results-dir "$run/tokenizer" \
        --resume auto --epochs 14 --global-batch-size 8 --lr 3e-3 --lr-schedule cosine --warmup-steps 50 \
        --perceptual-weight 0 --disc-weight 0 --log-every 25 --ckpt-every 400
fi
for part in emoji_without_clocks emoji_only_clocks; do
    bash scripts/autoregressive/extract_codes_c2i.sh --dataset "$part" --image-size 48 --vq-ckpt "$vq" --no-mirror \
        --code-path "$run/codes"
done
small=(--vq-ckpt "$vq" --resume auto --lr-schedule cosine --dropout-p 0 --token-dropout-p 0 --token-noise 0.1 --log-every 25)
bash scripts/autoregressive/train_c2i.sh --code-path "$run/codes/emoji_without_clocks48_codes" --gpt-model GPT-S \
    --results-dir "$run/pretrained" --epochs 14 --global-batch-size 16 --lr 3e-3 --warmup-steps 100 --ckpt-every 400 \
    "${small[@]}"
bash scripts/autoregressive/train_c2i.sh --code-path "$run/codes/emoji_only_clocks48_codes" --lora-rank 8 \
    --init-from "$run/pretrained/000-GPT-S" --results-dir "$run/adapted" --epochs 40 --global-batch-size 13 --lr 1e-3 \
    --warmup-steps 20 --ckpt-every 40 "${small[@]}"
bash scripts/_torchrun.sh autoregressive/train/export.py --gpt-ckpt "$run/adapted/000-GPT-S" --output "$run/gpt"
bash scripts/autoregressive/sample_c2i.sh --gpt-ckpt "$run/gpt" --vq-ckpt "$vq" --num-fid-samples 96 \
    --label-mode balanced --cfg-scale 2.0 --temperature 0.9 --sample-dir "$run/samples"
bash scripts/_torchrun.sh evaluations/c2i/class_accuracy.py --dataset emoji --image-size 48 \
    --samples "$(ls -t "$run"/samples/*.npz | head -1)" --output "$run/class_accuracy.json"
