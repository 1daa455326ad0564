"""What people have to know of scores, as lines."""

from __future__ import annotations

from typing import Any

from relp_cli.config.memory import written
from relp_cli.spaces.scores import Scores


def scoring_notes(scores: Scores) -> list[str]:
    """What people have to know of scores: what `relp+auto` chose on how many pairs, what `screened` patched, what was
    learned, batches that memory did not hold, dictionaries that were trained on another model, exact effects that a narrow dtype
    rounds to 0.
    """
    notes, meta = [], scores.meta
    if other := meta.get("dictionary_of"):
        mine = meta["model"]
        if other.startswith(f"{mine}@"):  # by name they are the same: then revisions tell them apart
            mine = f"{mine}@{meta['revision']}"
        notes.append(f"WARNING: these dictionaries say that they are of model '{other}', not of '{mine}'")
    if meta["dtype"] in ("bfloat16", "float16") and (lost := meta.get("patched_share_no_effect")):
        notes.append(
            f"WARNING: in {meta['dtype']} {lost:.0%} of the patched runs left the metric as it was, to the last bit: effects "
            "smaller than the rounding of logits become 0; float32 keeps them"
        )
    if most := meta.get("out_of_memory_pairs_per_pass"):
        less = "a smaller --memory" if "memory" in meta else f"--batch-size {most}"
        notes.append(f"out of memory: batches were halved, to {most} pairs or fewer; {less} saves the attempts")
    if "memory" in meta:
        notes.append(f"memory: at most {meta['tokens_per_pass']} tokens a pass for a peak of {written(meta['memory'])}")
    if meta.get("layers_recomputed"):
        notes.append(
            "one pair's graph does not fit: layers were computed again in the backward pass, which takes longer"
        )
    if auto := meta.get("auto"):
        chosen = "; ".join(f"{kind}: {', '.join(rules) or 'no rules'}" for kind, rules in auto["chosen"].items())
        aside, of = auto["pairs_set_aside"], auto["pairs_set_aside"] + meta["n_pairs"]
        notes.append(f"auto: {aside} of {of} pairs were used to choose the rules; chosen for {chosen}")
    if ranking := meta.get("learned"):
        notes.append(_learned_note(meta["method"], ranking))
    return notes + [_screened_note(kind, row) for kind, row in meta.get("screened", {}).items()]


def _learned_note(method: str, row: dict[str, Any]) -> str:
    first, last = row["metric_first_tenth"], row["metric_last_tenth"]
    line = (
        f"{method}: {row['cells']} of {row['of']} nodes × positions change with the source and are ranked (the others: 0); "
        f"metric of masked runs {first:.3f} in the first, {last:.3f} in the last tenth of {row['steps']} steps"
    )
    if "threshold" in row:
        line += f"; {row['open']} gates are open (relp circuit RUN --threshold {row['threshold']:.6g})"
    return line


def _screened_note(kind: str, row: dict[str, Any]) -> str:
    line = f"screened: {row['exact']} of {row['of']} {kind} nodes patched exactly, the rest {row['slope']:.2f} × the estimate"
    if not row["audited"]:
        return line
    largest, most = row["audit_largest_error"], row["audit_95%"]
    return f"{line}; of {row['audited']} random ones among these the largest error is {largest:.3g}, 95 % are within {most:.3g}"
