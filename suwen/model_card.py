"""README.md of a finished model: what it is made of, in place of the library's form of empty fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STAGES = {
    "pt": "continued pretraining",
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation",
    "orpo": "odds-ratio preference optimisation",
    "rm": "reward modelling",
    "ppo": "reinforcement learning",
}
OF_THE_RUN = ("runtime", "samples_per_second", "steps_per_second")  # in an evaluation, but not of the model


def model_card(record: dict[str, Any], adapter: bool) -> str:
    """Markdown with the head that model hubs read, made of what goes into run.json.

    Args:
        adapter: only a LoRA adapter was saved, which stands on the model that the run went on from.
    """
    stage, start = record["stage"], record["start"]
    head = [
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {'text-classification' if stage == 'rm' else 'text-generation'}",
        f"tags: [suwen, {stage}]",
        *([] if Path(start).exists() else [f"base_model: {start}"]),
    ]
    data, training = record["data"], record["training"]
    found = {
        name.removeprefix("eval_"): value
        for name, value in record.get("evaluation", {}).items()
        if name.startswith("eval_") and isinstance(value, float) and name.removeprefix("eval_") not in OF_THE_RUN
    }
    rows = {
        "goes on from": " on ".join(f"`{entry['path']}`" for entry in reversed(record["lineage"])),
        "data": ", ".join(f"`{Path(name).name}` ({count:,} rows)" for name, count in data["files"].items()),
        "fingerprint of the data": f"`{data['fingerprint']}`",
        "trained": f"{training['steps']:,} steps, {training['tokens']:,} tokens",
        "held out": ", ".join(f"{name} {value:.4g}" for name, value in found.items()),
    }
    kind = "LoRA adapter" if adapter else "Model"
    return "\n".join(
        [
            "---", *head, "---", "",
            f"# {kind} by {STAGES.get(stage, stage)}", "",
            "| | |", "|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items() if text), "",
            "All arguments, versions and hashes are in `run.json`, the prompt template, if there is one, in",
            "`chat_template.jinja`. Not reviewed for clinical use; no answer of it is medical advice.", "",
        ]
    )  # fmt: skip
