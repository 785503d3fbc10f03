#!/usr/bin/env bash
# SFT -> reward model -> DPO over GSM8K's real right and wrong solutions, on one machine.
#   configs/chain/run.sh GSM8K MODEL [OUT]
# GSM8K: a directory with train.jsonl and example_model_solutions.jsonl; MODEL: a Hugging Face directory or hub id, for
# instance SmolLM2-135M-Instruct. The same command resumes.
set -euo pipefail
gsm8k=${1:?usage: run.sh GSM8K MODEL [OUT]} model=${2:?usage: run.sh GSM8K MODEL [OUT]} out=${3:-runs/chain}
here=$(dirname "$0")
python "$here/prepare.py" "$gsm8k" "$out/data"

stage() { # NAME MODEL DATA
  echo "+ posttrain train $here/$1.yaml --model.path $2 --data.train.0.path $3 --run.dir $out/$1"
  posttrain train "$here/$1.yaml" --model.path "$2" --data.train.0.path "$3" --run.dir "$out/$1" "${@:4}"
}
stage sft "$model" "$out/data/chats.jsonl"
stage reward "$out/sft/export" "$out/data/pairs.jsonl" --data.heldout.path "$out/data/heldout.jsonl"
stage dpo "$out/sft/export" "$out/data/pairs.jsonl" --data.heldout.path "$out/data/heldout.jsonl"

echo "+ posttrain score $out/reward/export $out/data/heldout.jsonl"
posttrain score "$out/reward/export" "$out/data/heldout.jsonl" --packed --out "$out/scores.jsonl"
