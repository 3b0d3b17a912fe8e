"""Print one short line for each JSON line on standard input."""

from __future__ import annotations

import json
import sys
from typing import Any


def roof(r: dict[str, Any]) -> str:
    keys = ("tflops", "gb_per_s", "gb_per_s_read_plus_write")
    extra = " ".join(f"{k}={r[k]}" for k in keys if k in r)
    return f"roofline {r['what']}: {r.get('error') or str(r['ms']) + ' ms ' + extra}"


def setting(r: dict[str, Any]) -> str:
    """What was run."""
    words = [f"{r['peer']:10}", r["model"], f"{r['quant']:4}", f"r{r['rank']}", f"{r['targets']:3}"]
    words += [f"{r['batch']}x{r['seq']}", f"ckpt={r['checkpoint']:3}"]
    words.append(r["data"][:6] + ("+pack" if r["packing"] == "on" else ""))
    words += [k for k in ("compile", "autocast") if r[k] == "on"]
    words += [f"{k}={r[k]}" for k in ("recompute", "fp8", "fast") if k in r]
    return " ".join(words)


def result(r: dict[str, Any]) -> str:
    """What came of it."""
    words = [f"{r['tokens_per_s']:.0f} tok/s {r['step_ms']:.1f} ms over {r.get('sustained_s', '?')} s"]
    words.append(f"peak {r['peak_mem_gb']} / {r['peak_reserved_gb']} GB pad {r['pad_fraction']:.2f}")
    words.append(f"loss {r['loss0']}..{r['lossN']}")
    words.append(f"grad {r.get('grad_norm0')}..{r.get('grad_normN')}")
    words.append(f"attn {r['attn']} build {r['build_s']} run {r['run_s']} s {r['note']}")
    if not r["finite"] or r["params_without_grad"]:
        words.append("BAD")
    if r.get("left_over_gb"):
        words.append(f"LEFT {r['left_over_gb']} GB")
    return " ".join(words)


def main() -> None:
    for line in sys.stdin:
        try:
            r = json.loads(line)
        except ValueError:
            continue
        if r["peer"] == "roofline":
            print(roof(r), flush=True)
        elif "error" in r:
            print(f"{setting(r)}: ERROR {r['error'][:160]}", flush=True)
        else:
            print(f"{setting(r)}: {result(r)}", flush=True)
            for note in r.get("layers", []):
                print(f"     {note}", flush=True)


if __name__ == "__main__":
    main()
