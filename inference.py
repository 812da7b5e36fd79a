"""Ask a model: in the terminal, or a whole file of questions.

    python inference.py --base_model outputs/sft-merged --interactive
    python inference.py --base_model Qwen/Qwen3-8B --lora_model outputs/sft --interactive --temperature 0.7
    python inference.py --base_model outputs/dpo --data_file questions.jsonl --output_file answers.jsonl

Without --base_model the newest finished stage in outputs/ answers, else the embedded model; without --interactive and
--data_file a few example questions are answered. A file of questions (.jsonl with prompt, messages, conversations,
question or instruction, .csv, .parquet, or .txt with a question a line) is answered in batches; the same command again
goes on where it was stopped. The answers are research output, not medical advice.
"""

from __future__ import annotations

import argparse
import sys
import time

from suwen.arguments import run
from suwen.prompts import AnswerFile, Prompt, folder_state, load_prompts, prompts_sha256, with_system_prompt
from suwen.serving import (
    Served,
    add_model_flags,
    add_removed_flags,
    add_sampling_flags,
    check_serving_flags,
    generation_settings,
    load_served,
    say,
    serving_parser,
)

EXAMPLES = (
    "高血压患者在饮食上应该注意什么？",
    "感冒和流感有什么区别？",
    "孩子发烧到三十九度应该怎么处理？",
    "阿莫西林有哪些常见的不良反应？",
)
HELP = """/clear   forget the conversation (the system prompt stays)
/help    this list
/exit    leave, as end of file (Ctrl-D) does
Ctrl-C   stop the answer"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = serving_parser(__doc__ or "")
    group = parser.add_argument_group("what to do")
    group.add_argument("--interactive", action="store_true", help="talk to the model, over several turns")
    group.add_argument(
        "--single_turn", "--single_tune", action="store_true", help="with --interactive: each question for itself"
    )
    group.add_argument("--data_file", metavar="FILE", help="questions to answer")
    group.add_argument(
        "--output_file",
        "--predictions_file",
        metavar="FILE",
        help="answers, one JSON object a line (default: predictions.jsonl)",
    )
    group.add_argument("--with_prompt", action="store_true", help="write or print each question with its answer")
    group.add_argument(
        "--batch_size", "--eval_batch_size", type=int, default=8, metavar="N", help="questions at once (default: 8)"
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_removed_flags(parser, {"max_length": "use --max_new_tokens; a prompt may fill the model's window"})
    args = parser.parse_args(argv)
    if args.interactive and args.data_file:
        raise ValueError("--interactive and --data_file: give one of them")
    if args.output_file and not args.data_file:
        raise ValueError("--output_file: needs --data_file, the questions to answer")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size: found {args.batch_size}, expected at least 1")
    check_serving_flags(args)
    return args


def answer_batches(served: Served, prompts: list[Prompt], todo: list[int], args: argparse.Namespace):
    """Yield (index, answer) for the prompts in `todo`; see `generate_many`."""
    from suwen.generation import fit_prompt, generate_many

    settings = generation_settings(args)
    encoded: dict[int, list[int]] = {}
    for index in todo:
        try:
            encoded[index], dropped = fit_prompt(
                served.encoder, prompts[index].messages, served.window, settings.max_new_tokens
            )
        except ValueError as error:
            raise ValueError(f"{prompts[index].where}: {error}") from None
        if dropped:
            say(f"note: {prompts[index].where}: oldest turns ({dropped} tokens) left out to fit the model's window")
    yield from generate_many(served.model, served.encoder, encoded, settings, args.batch_size, say)


def answer_file(served: Served, prompts: list[Prompt], args: argparse.Namespace) -> None:
    from tqdm import tqdm

    settings = (
        "template_name quantization dtype thinking max_new_tokens temperature top_p top_k repetition_penalty seed"
    )
    record = {
        "model": {name: folder_state(name) for name in served.names},
        "tokenizer": args.tokenizer_path,
        "questions": prompts_sha256(prompts),
        **{name: getattr(args, name) for name in (*settings.split(), "with_prompt")},
    }
    output = AnswerFile(args.output_file or "predictions.jsonl", len(prompts), record)
    todo = output.missing
    if output.done:
        say(f"{output.path}: {len(output.done)} of {len(prompts)} questions are answered already")
    started, tokens = time.perf_counter(), 0
    with tqdm(total=len(prompts), initial=len(output.done), unit="question", disable=not todo) as progress:
        for index, answer in answer_batches(served, prompts, todo, args):
            tokens += len(answer.token_ids)
            output.append([answer_row(index, prompts[index], answer, args.with_prompt)])
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            progress.update()
    output.finish()
    say(f"{len(prompts)} answers: {output.path}")


def answer_row(index: int, prompt: Prompt, answer, with_prompt: bool) -> dict:
    row: dict = {"index": index}
    if with_prompt:
        row["prompt"] = prompt.messages[-1]["content"]
        if len(prompt.messages) > 1:
            row["messages"] = prompt.messages
    row["response"] = answer.content
    if answer.reasoning:
        row["reasoning"] = answer.reasoning
    return row | {"finish_reason": answer.finish_reason, "num_tokens": len(answer.token_ids)}


def answer_examples(served: Served, args: argparse.Namespace) -> None:
    say("no --interactive and no --data_file: answering the example questions")
    prompts = [
        Prompt(f"example {number}", with_system_prompt([{"role": "user", "content": text}], args.system_prompt))
        for number, text in enumerate(EXAMPLES, start=1)
    ]
    answers = dict(answer_batches(served, prompts, list(range(len(prompts))), args))
    for index, prompt in enumerate(prompts):
        print(f"\n问：{prompt.messages[-1]['content']}")
        if answers[index].reasoning:
            print(f"思考：{answers[index].reasoning}")
        print(f"答：{answers[index].content}", flush=True)


class Chat:
    """A conversation in the terminal: its messages, and what its commands do."""

    def __init__(self, served: Served, args: argparse.Namespace) -> None:
        self.served, self.args = served, args
        self.settings = generation_settings(args)
        self.start = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        self.messages = list(self.start)

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False when it ends the conversation."""
        name = line.split()[0]
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            self.messages = list(self.start)
            print("(the conversation is forgotten)")
        else:
            print(HELP if name == "/help" else f"unknown command {name}\n{HELP}")
        return True

    def ask(self, question: str) -> None:
        """Stream the answer to stdout; Ctrl-C keeps what came so far."""
        from suwen.generation import fit_prompt, stream

        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            ids, dropped = fit_prompt(self.served.encoder, messages, self.served.window, self.settings.max_new_tokens)
        except ValueError as error:
            print(f"({error})")
            return
        if dropped:
            print(f"(the oldest turns, {dropped} tokens, no longer fit the model's window and are left out)")
        if self.args.with_prompt:
            print(self.served.encoder.render(messages, add_generation_prompt=True))
        parts = {"reasoning": "", "content": ""}
        pieces = stream(self.served.model, self.served.encoder, ids, self.settings)
        try:
            for kind, text in pieces:
                if kind == "reasoning" and not parts["reasoning"]:
                    text = f"[思考] {text}"
                elif kind == "content" and not parts["content"] and parts["reasoning"]:
                    print("\n[回答] ", end="")
                parts[kind] += text
                print(text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        finally:
            pieces.close()
        if self.args.single_turn or not parts["content"]:
            return  # an unanswered question is not part of the conversation
        answer = {"role": "assistant", "content": parts["content"]}
        if parts["reasoning"]:
            answer["reasoning_content"] = parts["reasoning"].removeprefix("[思考] ")
        self.messages = [*messages, answer]


def chat(served: Served, args: argparse.Namespace) -> None:
    try:
        import readline  # noqa: F401  line editing that knows wide characters, and the history of the session
    except ImportError:
        pass
    conversation = Chat(served, args)
    print("素问 Suwen: research output, not medical advice (不构成医疗建议；急症请拨打120). /help lists the commands.")
    while True:
        try:
            line = input("\n问：").strip()
            # Bytes that the terminal's encoding does not know arrive as lone surrogates, which no tokenizer takes.
            line = line.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)")
            continue
        if line.startswith("/"):
            if not conversation.command(line):
                return
        elif line:
            print("答：", end="", flush=True)
            conversation.ask(line)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the program

    prompts = load_prompts(args.data_file, args.system_prompt) if args.data_file else []
    served = load_served(args)
    if args.interactive:
        chat(served, args)
    elif args.data_file:
        answer_file(served, prompts, args)
    else:
        answer_examples(served, args)


if __name__ == "__main__":
    run(main)
