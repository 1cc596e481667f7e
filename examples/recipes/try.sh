#!/usr/bin/env bash
# Three real steps of every recipe in two processes, of one layer, on bytes of a corpus that comes with the library:
# whether a recipe starts, before it is given to a cluster. About two minutes on two cores.
#   examples/recipes/try.sh [NAME …]
set -euo pipefail
cd "$(dirname "$0")/../.."
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
names=("$@")
((${#names[@]})) || names=(170m 340m 400m 760m 1.3b)
for name in "${names[@]}"; do
    python -m torch.distributed.run --nproc-per-node 2 --module titans train \
        --config-file "examples/recipes/$name.yml" --data excerpt --tokenizer bytes --hold-out 0 --output "$output/$name" \
        --config num_hidden_layers=1 num_persistent_tokens=4 --steps 3 --batch-size 2 --sequence-length 64 \
        --log-every 1 --save-every 99 --eval-every 99 --warmup-steps 1 --threads 1
done
