"""Evaluate a model on medical benchmarks, and compare stages: one command, no network.

    python evaluation.py --base_model outputs/sft --output_dir outputs/sft/eval
    python evaluation.py --base_model outputs/sft --tasks cmexam,huatuo --data_dir DIR --output_dir outputs/sft/eval
    python evaluation.py --compare outputs/pt/eval outputs/sft/eval outputs/dpo/eval
    python evaluation.py --base_model outputs/sft --knowledge_index outputs/knowledge --data_file questions.jsonl
    python evaluation.py --api_base http://127.0.0.1:8000/v1 --model NAME --tasks exam --output_dir outputs/served/eval

Without --tasks the project's own small sets are taken (data/evaluation). Choice questions are asked twice: which
letters the model finds likeliest, and what it writes when served. The output folder holds a record of every item,
results.json and report.html; the same command goes on where it was stopped. With --knowledge_index each question
({"question", "answer", "document"}) is asked closed book and with passages: retrieved, right and wrong ones. Scores
are no permission to give advice.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from suwen.benchmarks import TASK_SETS, TASKS
from suwen.command_line import make_folder, run
from suwen.retrieval.flags import add_retrieval_flags, check_retrieval_flags, load_knowledge
from suwen.serving import (
    add_endpoint_flags,
    add_model_flags,
    check_endpoint_flags,
    check_serving_flags,
    find_default_model,
    serving_parser,
)

MODES = {"both": ("likelihood", "generate"), "likelihood": ("likelihood",), "generate": ("generate",)}
ANSWER_TOKENS = 128  # of answers from passages
PROTOCOLS = ("suwen", "cmexam_official")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = serving_parser(__doc__ or "")
    group = parser.add_argument_group("what is evaluated")
    sets = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in TASK_SETS.items())
    group.add_argument(
        "--tasks", default="own", metavar="A,B", help=f"{', '.join(TASKS)}; or a set of them, own by default: {sets}"
    )
    group.add_argument("--data_dir", metavar="DIR", help="your files, found by name (data/evaluation/README.md)")
    group.add_argument("--data_file", metavar="FILE", help="the file of one task, or cmexam=FILE,huatuo=FILE")
    group.add_argument("--max_samples", type=int, metavar="N", help="at most so many items of a task, always the same")
    group.add_argument(
        "--modes", choices=tuple(MODES), default="both", help="of choice questions and facts (default: both)"
    )
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="suwen",
        help="cmexam_official: also CMExam's published scorer, on its own prompt (default: suwen)",
    )
    group.add_argument(
        "--output_dir",
        metavar="DIR",
        help="records, results.json, report.html (default: eval in a stage, else outputs/MODEL/eval)",
    )
    group.add_argument("--compare", nargs="+", metavar="DIR", help="compare evaluations, in this order; asks no model")
    group = parser.add_argument_group("answers")
    group.add_argument("--batch_size", type=int, default=32, metavar="N", help="answers written at once (default: 32)")
    group.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer (default: each task's own)")
    group.add_argument("--system_prompt", default="", metavar="TEXT", help="system prompt (default: none)")
    group.add_argument(
        "--thinking", choices=("auto", "on", "off"), default="auto", help="where the template can (default: auto)"
    )
    add_endpoint_flags(parser)
    add_model_flags(parser)
    add_retrieval_flags(parser)
    args = parser.parse_args(argv)
    for name in ("max_samples", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: found {value}, expected at least 1")
    if bool(args.api_base) != bool(args.model):
        raise ValueError("--api_base and --model: an endpoint needs both")
    check_endpoint_flags(args)
    check_retrieval_flags(args)
    if args.knowledge_index and not args.data_file:
        raise ValueError("--knowledge_index: needs --data_file, questions with the document that answers each")
    if args.api_base and args.modes == "likelihood":
        raise ValueError("--modes likelihood: an endpoint gives no likelihoods, expected generate or both")
    args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed = 0.0, 1.0, 0, 1.0, None
    answers, args.max_new_tokens = args.max_new_tokens, args.max_new_tokens or 1
    check_serving_flags(args)
    args.max_new_tokens = answers
    return args


def compare(folders: list[str], output_dir: str | None) -> None:
    """Print the comparison, and write comparison.json and report.html into --output_dir or the last folder."""
    from suwen.comparison import compare_folders
    from suwen.report import format_comparison

    target = Path(output_dir or folders[-1])
    make_folder(target)
    comparison = compare_folders(folders, target / "comparison.json", target / "comparison.html")
    print(format_comparison(comparison))
    print(f"written to {target / 'comparison.html'}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.compare:
        compare(args.compare, args.output_dir)
        return
    if args.output_dir:
        make_folder(args.output_dir)
    from suwen import evaluate
    from suwen.report import format_results

    # Inputs: tasks, their files, and items, so that a mistake in them shows before a model is loaded
    knowledge = load_knowledge(args)
    if knowledge is not None:
        from suwen.retrieval.evaluation import evaluate_retrieval, read_questions
        from suwen.retrieval.report import format_retrieval

        questions = read_questions(args.data_file)[: args.max_samples]
    else:
        tasks = evaluate.parse_tasks(args.tasks, args.protocol)
        named = evaluate.parse_data_files(args.data_file, tasks)
        files = {task.name: evaluate.find_task_files(task, args.data_dir, named) for task in tasks}
        settings = evaluate.Settings(
            MODES[args.modes], args.max_samples, args.max_new_tokens, args.batch_size, args.system_prompt
        )
        read = evaluate.read_tasks(tasks, files, settings)

    # Model: a local one, or an endpoint
    served: Any = None
    if args.api_base:
        from suwen.client import Endpoint

        endpoint = Endpoint(args.api_base, args.model, concurrency=args.concurrency)
        identity, ask = {"endpoint": args.api_base, "name": args.model}, evaluate.ask_endpoint(endpoint)
        folder = args.output_dir or f"outputs/{args.model.replace('/', '_')}/eval"
    else:
        from suwen.serving import load_served

        args.base_model = args.base_model or (None if args.lora_model else find_default_model())
        served = load_served(args)
        identity, ask = evaluate.model_identity(args, served.names), evaluate.ask_model(served, args.batch_size)
        stage = Path(served.names[-1])
        ours = (stage / "run.json").is_file() or (stage / "merge.json").is_file()
        folder = args.output_dir or (f"{stage}/eval" if ours else f"outputs/{stage.name}/eval")

    # Evaluation: records, scores, report
    make_folder(folder)
    if knowledge is not None:
        longest = args.max_new_tokens or ANSWER_TOKENS
        found = evaluate_retrieval(
            knowledge, questions, ask, longest, Path(folder), {"model": identity}, args.system_prompt
        )
        print(format_retrieval(found))
        print(f"written to {folder}: retrieval.json, retrieval_records.jsonl, report.html, answers/")
        return
    results = evaluate.evaluate(tasks, files, Path(folder), settings, identity, served, ask, read)
    print(format_results(results))
    print(f"written to {folder}: records/, results.json, report.html")


if __name__ == "__main__":
    run(main)
