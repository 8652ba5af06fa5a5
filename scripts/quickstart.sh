#!/usr/bin/env bash
# From pixels to pictures on this machine: train a small tokenizer and a small GPT on emoji, sample, score, report.
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --model arpg     an ARPG in place of the GPT, or after it with the same tokenizer
#   bash scripts/quickstart.sh --task t2i       a GPT that draws what a text says, with the same tokenizer
# Everything goes to runs/quickstart; look at runs/quickstart/report.html. Run it again to continue after an interruption.
set -euo pipefail
refuse() { # refuse WHAT: say what is wrong with the command line and how it goes, in one line
    echo "error: $1: expected bash scripts/quickstart.sh [--model gpt|arpg] [--task c2i|t2i]" >&2
    exit 2
}
model=gpt task=c2i
while [ $# -gt 0 ]; do
    case "$1" in
        --model) [ $# -gt 1 ] || refuse "--model lacks its value"; model="$2"; shift 2 ;;
        --model=*) model="${1#*=}"; shift ;;
        --task) [ $# -gt 1 ] || refuse "--task lacks its value"; task="$2"; shift 2 ;;
        --task=*) task="${1#*=}"; shift ;;
        -h | --help) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
        *) refuse "$1 is no flag of the quickstart" ;;
    esac
done
case "$model" in gpt | arpg) ;; *) refuse "--model is '$model'" ;; esac
case "$task" in c2i) ;; t2i) [ "$model" = gpt ] || refuse "--task t2i trains a GPT" ;; *) refuse "--task is '$task'" ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" quickstart
cd "$root"
run=runs/quickstart
mkdir -p "$run"
export nproc_per_node=1 # models this small gain nothing from a second GPU

note_time() { printf '%s\t%s\n' "$stage_name" "$((SECONDS - stage_start))" >> "$run/times.tsv"; }
stage() { # stage NAME COMMAND…: run it and note how long it took, also when it is cut short
    stage_name="$1" stage_start=$SECONDS
    shift
    printf '\n== %s\n' "$stage_name"
    trap note_time EXIT
    "$@"
    trap - EXIT
    note_time
}
newest() { find "$run/$1" -path '*/checkpoints/[0-9]*' -prune ! -name '*.damaged' | sort | tail -1; }
newest_npz() { ls -t "$run/$1"/*.npz | head -1; }

# 48 pixels at 4 per token: 144 codes an image, what two CPU cores learn to write well in six minutes.
data=(--dataset emoji --image-size 48)
stage "tokenizer" bash scripts/tokenizer/train_vq.sh "${data[@]}" --vq-model VQ-4-S --results-dir "$run/tokenizer" \
    --resume auto --epochs 14 --global-batch-size 8 --lr 3e-3 --lr-schedule cosine --warmup-steps 50 \
    --perceptual-weight 0 --disc-weight 0 --log-every 25 --ckpt-every 400
vq=$(newest tokenizer)
stage "reconstructions" bash scripts/tokenizer/reconstruction_vq.sh --dataset emoji_heldout --image-size 48 \
    --vq-ckpt "$vq" --sample-dir "$run/reconstructions"
# codes in random order, and captions, are harder to learn: in minutes Muon gets much further than AdamW (not in torch 2.8)
optimizer=$("$python" -c 'import torch; print("muon" if hasattr(torch.optim, "Muon") else "adamw")')
training=(--vq-ckpt "$vq" --resume auto --global-batch-size 16 --lr 3e-3 --lr-schedule cosine --warmup-steps 100
    --dropout-p 0 --token-dropout-p 0 --token-noise 0.1 --log-every 25 --ckpt-every 400)
if [ "$task" = t2i ]; then # emoji and their names; the names of emoji_unseen are made of words that emoji_seen has too
    stage "codes and captions" bash scripts/autoregressive/extract_codes_t2i.sh --dataset emoji_seen --image-size 48 \
        --vq-ckpt "$vq" --code-path "$run/codes_t2i"
    codes="$(ls -d "$run"/codes_t2i/*_codes)"
    stage "text features" bash scripts/_torchrun.sh language/extract_t5_feature.py --data-path "$codes" \
        --t5-path "$run/features" --t5-model-type minilm
    stage "text model" bash scripts/_torchrun.sh autoregressive/train/train_t2i.py "${training[@]}" --data-path "$codes" \
        --t5-feat-path "$run/features" --gpt-model GPT-S --results-dir "$run/t2i" --epochs 30 --optimizer "$optimizer"
    for kind in seen:1 unseen:4; do
        stage "pictures of prompts" bash scripts/_torchrun.sh autoregressive/sample/sample_t2i_ddp.py \
            --gpt-ckpt "$(newest t2i)" --vq-ckpt "$vq" --prompt-csv "emoji_${kind%:*}" --images-per-prompt "${kind#*:}" \
            --cfg-scale 1.5 --top-k 0 --temperature 0.8 --sample-dir "$run/samples_t2i_${kind%:*}"
        stage "retrieval" "$python" evaluations/t2i/retrieval.py --dataset emoji_all --image-size 48 \
            --fake-dir "$(dirname "$(ls -t "$run/samples_t2i_${kind%:*}"/*/captions.txt | head -1)")" \
            --output "$run/retrieval_${kind%:*}.json"
    done
    printf '\n== report\n'
    exec "$python" evaluations/quickstart_report.py --run-dir "$run" --model t2i
fi
stage "codes" bash scripts/autoregressive/extract_codes_c2i.sh "${data[@]}" --vq-ckpt "$vq" --code-path "$run/codes" \
    --no-mirror
training+=(--code-path "$run/codes")
if [ "$model" = gpt ]; then
    stage "GPT" bash scripts/autoregressive/train_c2i.sh "${training[@]}" --gpt-model GPT-S \
        --results-dir "$run/gpt" --epochs 30
    stage "samples" bash scripts/autoregressive/sample_c2i.sh --gpt-ckpt "$(newest gpt)" --vq-ckpt "$vq" \
        --num-fid-samples 192 --label-mode balanced --cfg-scale 2.0 --temperature 0.9 --sample-dir "$run/samples"
    stage "class accuracy" "$python" evaluations/c2i/class_accuracy.py "${data[@]}" \
        --samples "$(newest_npz samples)" --output "$run/class_accuracy.json"
    samples=samples scores=class_accuracy distance=distance
else
    stage "ARPG" bash scripts/autoregressive/train_arpg.sh "${training[@]}" --gpt-model ARPG-S \
        --results-dir "$run/arpg" --epochs 27 --optimizer "$optimizer"
    arpg=$(newest arpg)
    for steps in 8 16 32 64; do
        stage "ARPG samples" bash scripts/autoregressive/sample_arpg.sh --gpt-ckpt "$arpg" --vq-ckpt "$vq" \
            --num-fid-samples 192 --label-mode balanced --step "$steps" --cfg-scale 4.0 --temperature 0.9 \
            --sample-dir "$run/samples_arpg/$steps"
        stage "class accuracy" "$python" evaluations/c2i/class_accuracy.py "${data[@]}" \
            --samples "$(newest_npz "samples_arpg/$steps")" --output "$run/class_accuracy_arpg_$steps.json"
    done
    samples=samples_arpg/64 scores=class_accuracy_arpg_64 distance=distance_arpg
fi
for name in emoji emoji_heldout; do
    stage "distances" bash scripts/tokenizer/val.sh --dataset "$name" --image-size 48 --sample-dir "$run/real"
done
# in the classifier's features, for want of Inception: how far are samples, and how far new real emoji, from the training set?
measure_distance() { # measure_distance NAME SAMPLES
    stage "distances" "$python" evaluations/c2i/evaluator.py "$run/real/"val_emoji-size*.npz "$2" \
        --features "$run/${scores}_features.pt" --output "$run/${distance}_$1.json"
}
measure_distance samples "$(newest_npz "$samples")"
measure_distance heldout "$(ls -t "$run"/real/*heldout*.npz | head -1)"
if [ "$model" = arpg ]; then # of pictures never trained on: the middle drawn anew; samples that follow their edges
    heldout="$(ls -d "$run"/real/val_emoji_heldout-size*/ | head -1)"
    drawing=(--vq-ckpt "$vq" --cfg-scale 4.0 --temperature 0.9)
    pictures=(faces:000001 people:000011 hands:000035 animals:000047 food:000061 flags:000078 clocks:000098 signs:000100)
    for picture in "${pictures[@]}"; do
        stage "inpainting" bash scripts/autoregressive/edit.sh "${drawing[@]}" --gpt-ckpt "$arpg" \
            --image "$heldout${picture#*:}.png" --classes "${picture%:*}" --box 16,16,16,16 --paste 4 --variants 4 \
            --output "$run/inpainted/${picture%:*}"
    done
    stage "codes with edges" bash scripts/autoregressive/extract_codes_c2i.sh "${data[@]}" --vq-ckpt "$vq" --no-mirror \
        --code-path "$run/codes_edges" --control canny
    stage "ARPG with edges" bash scripts/autoregressive/train_c2i.sh "${training[@]}" --gpt-model ARPG-S \
        --code-path "$run/codes_edges" --init-from "$arpg" --control canny --warmup-steps 20 --epochs 4 \
        --results-dir "$run/arpg_edges"
    files="${pictures[*]/#*:/$heldout}" names="${pictures[*]%:*}"
    stage "edge control" "$python" autoregressive/sample/sample_c2i.py "${drawing[@]}" --control canny \
        --gpt-ckpt "$(newest arpg_edges)" --classes "${names// /,}" --control-image "${files// /.png,}.png" \
        --output "$run/edges.png"
fi
printf '\n== report\n'
"$python" evaluations/quickstart_report.py --run-dir "$run" --model "$model"
