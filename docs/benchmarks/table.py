#!/usr/bin/env python3
"""Markdown tables from what `cogvlm-shard bench --json` and `bench --kernels --json` print.

python3 docs/benchmarks/table.py bench.json [kernels.json ...] > table.md
"""
import json
import sys


def share(value):
    return "" if value is None else f"{100 * value:.0f} %"


def rate(value, unit):
    tera = unit == "FLOP/s" and value >= 1e12
    return f"{value / 1e12:.1f} T{unit}" if tera else f"{value / 1e9:.1f} G{unit}"


def ms(value):
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def deviation(percent):
    return "" if percent is None else f"{percent:+.0f} %"


def row(*cells):
    print("| " + " | ".join(cells) + " |")


def speeds(report):
    name = f"{report['model']}, {report['dtype']}, {report['backend']}"
    load, ceiling, predicted = report["load"], report["ceiling"], report["predicted"]
    row(name, "time", "tokens/s", "rate", "share of the ceiling", "beside the prediction")
    row(*["---"] * 6)
    copied = load["bytes_per_s"]
    row("load", ms(load["ms"]), "", "" if copied is None else rate(copied, "B/s"), share(load["share_of_ceiling"]), "")
    row("command to first token", ms(load["to_first_token_ms"]), "", "", "", "")
    row("request to first token", ms(report["ttft"]["ms"]), "", "", "", "")
    for what, tokens in [("vision", ""), ("prefill", f"{report['prefill']['tokens_per_s']:.0f}")]:
        part = report[what]
        if part["ms"] > 0:
            beside = deviation(predicted["image_deviation_percent"]) if what == "prefill" else ""
            label = what if what == "vision" else f"prefill, {report['prompt_tokens']} tokens"
            row(label, ms(part["ms"]), tokens, rate(part["flops_per_s"], "FLOP/s"), share(part["share_of_ceiling"]), beside)
    for index, decode in enumerate(report["decode"]):
        beside = deviation(predicted["decode_deviation_percent"]) if index == 0 else ""
        tokens = f"{decode['tokens_per_s']:.1f} (x {decode['speedup']:.2f})"
        row(f"decode, {decode['sequences']} at once", ms(decode["ms_per_step"]), tokens,
            rate(decode["bytes_per_s"], "B/s"), share(decode["share_of_ceiling"]), beside)
    ceilings(ceiling)


def kernels(report):
    row(f"{report['model']} on {report['gpu']['name']}, {report['path']}", "us", "rate", "share of the ceiling",
        "cuBLASLt us")
    row("---", "---:", "---:", "---:", "---:")
    for kernel in report["kernels"]:
        by_flops = kernel["bound"] == "arithmetic"
        reached = rate(kernel["flops_per_s"], "FLOP/s") if by_flops else rate(kernel["bytes_per_s"], "B/s")
        library = kernel["library_us"]
        row(kernel["name"], f"{kernel['us']:.1f}", reached, share(kernel["share_of_ceiling"]),
            "" if library is None else f"{library:.1f}")
    ceilings(report["ceiling"])


def ceilings(ceiling):
    if ceiling is None:
        return
    parts = [f"{rate(ceiling['read_bytes_per_s'], 'B/s')} ({ceiling['read_by']})",
             f"{rate(ceiling['flops_per_s'], 'FLOP/s')} ({ceiling['flops_by']})"]
    if ceiling["link_bytes_per_s"] is not None:
        parts.append(f"{rate(ceiling['link_bytes_per_s'], 'B/s')} ({ceiling['link_by']})")
    print(f"\nCeilings, measured in the same run: {', '.join(parts)}.\n")


TABLES = {"cogvlm-shard.bench/2": speeds, "cogvlm-shard.bench-kernels/1": kernels}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        table = TABLES.get(report.get("schema"))
        if table is None:
            sys.exit(f"{path}: no output of `bench --json`")
        table(report)
