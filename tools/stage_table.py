"""What each stage changed: every model on the same held-out texts, answers and preference pairs.

    python tools/stage_table.py --stages outputs/pt outputs/sft outputs/dpo

The held-out rows are those that the stages themselves split off (run.json names their data), so no model has trained on
them. Numbers go to stages.json beside the first stage too.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.arguments import DataArguments, build_parser, flag, run, split_dataclasses

KINDS = {"pt": "text", "sft": "conversation", "dpo": "preference", "orpo": "preference", "rm": "preference"}


@dataclasses.dataclass
class TableArguments:
    stages: str = flag("", "finished stage folders, in their order")
    max_samples: int = flag(200, "held-out rows of each kind, at most")
    batch_size: int = flag(4, "rows scored at once")


def held_out(stage: Path, record: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The rows that a stage held out, encoded as it encoded them; taken from its cache."""
    from suwen.data import prepare_data
    from suwen.encoding import ChatEncoder
    from suwen.models import load_tokenizer
    from suwen.rows import ConversationRows, DocumentRows, PreferenceRows
    from suwen.stage import thinking_mode

    known = {field.name for field in dataclasses.fields(DataArguments)}
    data = DataArguments(**{k: v for k, v in record["arguments"].items() if k in known})
    kind, length = KINDS[record["stage"]], record["max_length"]
    tokenizer = load_tokenizer(str(stage))
    if kind == "text":
        encode: Any = DocumentRows(tokenizer, length)
    else:
        encoder = ChatEncoder(tokenizer, thinking_mode(data.thinking))
        encode = ConversationRows(encoder, length, data.train_on_inputs)
        if kind == "preference":
            encode = PreferenceRows(encoder, length)
    validation = prepare_data(data, kind, encode, stage).validation
    return kind, list(validation) if validation is not None else []


def measure(
    path: str, rows: dict[str, list[dict[str, Any]]], batch_size: int, before: list[float]
) -> tuple[dict[str, float], list[float]]:
    """Perplexity and token accuracy on text and answers, and the share of pairs whose better answer is likelier.

    Args:
        before: margins of the pairs under the model before this one; empty for the first.

    Returns:
        the figures, and the margins of the pairs.
    """
    import torch

    from suwen.models import load_causal_lm
    from suwen.rows import rows_of_pair
    from suwen.scoring import score_rows

    model = load_causal_lm(path, device="cuda" if torch.cuda.is_available() else "cpu").eval()
    found: dict[str, float] = {}
    margins: list[float] = []
    for kind, name in (("text", "text"), ("conversation", "answer")):
        if rows.get(kind):
            scores = score_rows(model, rows[kind], batch_size, f"{path}: {name}")
            tokens = max(sum(s.tokens for s in scores), 1)
            found[f"{name} perplexity"] = math.exp(min(-sum(s.logp for s in scores) / tokens, 700))
            found[f"{name} token accuracy"] = sum(s.correct for s in scores) / tokens
    if pairs := rows.get("preference"):
        scores = score_rows(model, [row for pair in pairs for row in rows_of_pair(pair)], batch_size, f"{path}: pairs")
        margins = [better.logp - worse.logp for better, worse in zip(scores[::2], scores[1::2], strict=True)]
        found["preference accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        found["preference margin (nats)"] = sum(margins) / len(margins)
        if before:
            grown = [now > then for now, then in zip(margins, before, strict=True)]
            found["pairs with a larger margin"] = sum(grown) / len(grown)
    return found, margins


def format_table(names: list[str], columns: list[dict[str, float]], rows: dict[str, list[Any]]) -> str:
    lines = [["", *names]]
    for key in columns[-1]:
        digits = 1 if "perplexity" in key else 3
        lines.append([key, *(f"{c[key]:,.{digits}f}" if key in c else "-" for c in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
    counts = ", ".join(f"{len(found)} {kind} rows" for kind, found in rows.items())
    return f"{text}\nheld out: {counts}"


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    # --stages takes several words; the parser's flags take one
    if "--stages" in words:
        at = words.index("--stages") + 1
        until = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
        words = [*words[:at], ",".join(words[at:until]), *words[until:]]
    (args,) = split_dataclasses(build_parser(__doc__ or "", TableArguments).parse_args(words), TableArguments)
    stages = [Path(name) for name in args.stages.split(",") if name]
    if not stages:
        raise ValueError(
            "--stages: found nothing, expected finished stage folders, e.g. outputs/pt outputs/sft outputs/dpo"
        )

    from suwen.lineage import read_json
    from suwen.records import write_json
    from suwen.stage import quiet_libraries

    quiet_libraries()
    records = [read_json(stage / "run.json") for stage in stages]
    for stage, record in zip(stages, records, strict=True):
        if not record.get("finished"):
            raise ValueError(
                f"--stages {stage}: found no finished run.json, expected the output folder of a finished stage"
            )
    rows: dict[str, list[dict[str, Any]]] = {}
    for stage, record in zip(stages, records, strict=True):
        kind, found = held_out(stage, record)
        rows.setdefault(kind, found[: args.max_samples])
    names = ["start", *(record["stage"] for record in records)]
    columns: list[dict[str, float]] = []
    margins: list[float] = []
    for path in [records[0]["start"], *map(str, stages)]:
        figures, margins = measure(path, rows, args.batch_size, margins)
        columns.append(figures)
    print(format_table(names, columns, rows))
    write_json(stages[0].parent / "stages.json", {"models": dict(zip(names, columns, strict=True))})


if __name__ == "__main__":
    run(main)
