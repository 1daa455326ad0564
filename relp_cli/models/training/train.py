"""Train an embedded model, save it in half precision, and measure the saved weights on held-out pairs."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from relp_cli.models.catalog import EMBEDDED
from relp_cli.models.training.corpus import sentences
from relp_cli.models.training.shapes import SHAPES
from relp_cli.models.training.tokenizer import tokenizer_for
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.spec import list_tasks
from relp_cli.tasks.task import load_task


@dataclass(frozen=True)
class Settings:
    """Next-token loss, AdamW, one learning-rate cycle. Half of the batches begin with BOS, half do not."""

    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    seed: int = 0


# Some shapes find the duplicate-name pattern of IOI later than others.
SETTINGS = {"tiny-qwen2": Settings(steps=6000), "deep-gpt2": Settings(lr=1e-3)}


@dataclass(frozen=True)
class _Named:
    """What `Task.pairs` needs of a model."""

    name: str
    tokenizer: Any
    bos: int | None
    bos_asked: bool = True


def make(name: str, root: Path = EMBEDDED) -> dict[str, Any]:
    """Train model `name`, write its folder below `root`, and return its card. Seeded: same command, same weights."""
    settings = SETTINGS.get(name, Settings())
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    texts = sentences(settings.seed)
    tokenizer = tokenizer_for(texts)
    model = SHAPES[name](len(tokenizer))
    model.set_attn_implementation("eager")  # what Gemma-2's softcap needs and what every method here loads
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    started = time.monotonic()
    loss = _train(name, model, ids, settings)
    seconds = round(time.monotonic() - started)
    folder = root / name
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written as private to its owner, but meant to be shipped
    card = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {**asdict(settings), "sentences": len(texts), "final_loss": loss, "seconds": seconds},
        "heldout": measure(folder),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def _train(name: str, model: PreTrainedModel, ids: list[list[int]], settings: Settings) -> float:
    """Train in place; the mean loss of the last 100 steps."""
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps)
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    for step in range(1, settings.steps + 1):
        bos = [] if step % 2 else [int(model.config.bos_token_id)]
        loss = _loss(model, [bos + row for row in rng.sample(ids, settings.batch)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
        if step % 250 == 0 or step == settings.steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            left = (time.monotonic() - started) / step * (settings.steps - step)
            print(f"{name}: step {step}/{settings.steps}, loss {recent:.3f}, {left:.0f} s left", flush=True)
    return round(sum(losses[-100:]) / len(losses[-100:]), 4)


def _loss(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Next-token loss. Shorter rows are filled on the right, where causal attention never looks."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in rows])
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def measure(folder: Path, n: int = 100) -> dict[str, dict[str, float | str]]:
    """Held-out accuracy and mean metric per shipped task, of the weights as saved, read back as float32.

    With BOS and without: `accuracy`, `mean` (of the task's own metric), and the same with `_no_bos`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return {name: _measure_task(model, tokenizer, folder.name, name, n) for name in list_tasks()}


@torch.no_grad()
def _measure_task(
    model: PreTrainedModel, tokenizer: Any, model_name: str, task_name: str, n: int
) -> dict[str, float | str]:
    task = load_task(task_name)
    named = _Named(model_name, tokenizer, tokenizer.bos_token_id)
    row: dict[str, float | str] = {"metric": task.metric}
    for bos, ending in ((True, ""), (False, "_no_bos")):
        batches = task.pairs(named, n=n, split="heldout", bos=bos)
        right, value = [], []
        for batch in batches:
            logits = model(input_ids=batch.original, use_cache=False).logits[:, -1]
            right.append(METRICS["accuracy"].fn(logits, batch.answer, batch.foil))
            value.append(METRICS[task.metric].fn(logits, batch.answer, batch.foil))
        row[f"accuracy{ending}"] = round(float(torch.cat(right).mean()), 4)
        row[f"mean{ending}"] = round(float(torch.cat(value).mean()), 3)
        row["n"] = sum(map(len, batches))
    return row
