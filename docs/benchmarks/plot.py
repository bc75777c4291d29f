#!/usr/bin/env python3
"""Decode rate and time to first token against the budget of one GPU, from `budgets.sh`, beside the reference's.

python3 docs/benchmarks/plot.py budgets.jsonl budgets.svg         needs matplotlib
"""
import json
import sys

import matplotlib

matplotlib.use("svg")
# The same file from the same data.
matplotlib.rcParams["svg.hashsalt"] = "budgets"
import matplotlib.pyplot as plt  # noqa: E402

# transformers and accelerate 0.24.1 on an H100, GiB of GPU memory: decode tokens/s, ms to the first token of an image
# (docs/benchmarks/README.md, "The reference").
REFERENCE = {20: (1.02, 2300), 35: (13.6, 136)}


def main(data, out):
    runs = [json.loads(line) for line in open(data)]
    budgets = [run["budget_gib"] for run in runs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(budgets, [run["decode"][0]["tokens_per_s"] for run in runs], "o-", label="cogvlm-shard")
    left.plot(list(REFERENCE), [decode for decode, _ in REFERENCE.values()], "s", label="transformers + accelerate")
    left.set_ylabel("decoded tokens/s, one sequence")
    right.plot(budgets, [run["ttft"]["ms"] for run in runs], "o-", label="cogvlm-shard")
    right.plot(list(REFERENCE), [ttft for _, ttft in REFERENCE.values()], "s", label="transformers + accelerate")
    right.set_ylabel("ms to the first token, image and 32 text tokens")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("GPU budget, GiB; the rest in host memory")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:3])
