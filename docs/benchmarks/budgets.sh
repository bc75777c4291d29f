#!/usr/bin/env bash
# One line of `bench --json` for every budget of one GPU, from 8 to 40 GiB, the rest of the model in host memory.
#
#   budgets.sh PROGRAM MODEL > budgets.jsonl
set -euo pipefail
program=$1 model=$2
for gib in 8 10 12 14 16 18 20 24 28 32 36 40; do
    # Below 14 GiB the host computes layers: once is enough to see that.
    repeats=$((gib < 14 ? 1 : 3))
    echo "budgets: $gib GiB" >&2
    "$program" bench --backend cuda --model "$model" --max-memory "0:${gib}GiB,cpu:40GiB" --repeats "$repeats" --json 2>/dev/null |
        sed "s/^{/{\"budget_gib\":$gib,/"
done
