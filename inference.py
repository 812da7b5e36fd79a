"""Ask a model: in the terminal, or a whole file of questions.

    python inference.py --base_model outputs/sft-merged --interactive
    python inference.py --base_model Qwen/Qwen3-8B --lora_model outputs/sft --interactive --temperature 0.7
    python inference.py --base_model outputs/dpo --data_file questions.jsonl --output_file answers.jsonl
    python inference.py --base_model outputs/dpo --interactive --knowledge_index outputs/knowledge

Without --base_model the newest finished stage in outputs/ answers, else the embedded model; without --interactive and
--data_file a few example questions are answered. A file of questions (.jsonl with prompt, messages, conversations,
question or instruction, .csv, .parquet, or .txt with a question a line) is answered in batches; the same command again
goes on where it was stopped; answers go to .jsonl or .csv. `accelerate launch inference.py` shares the questions out
to all GPUs; --api_base asks a server instead, many questions at once. With --knowledge_index (tools/build_index.py)
answers name their sources. They are research output, not medical advice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suwen.client import Endpoint, EndpointError
from suwen.command_line import check_output_file, run
from suwen.prompts import Prompt, load_prompts, with_system_prompt
from suwen.retrieval.flags import add_retrieval_flags, check_retrieval_flags, load_knowledge
from suwen.serving import (
    Served,
    add_endpoint_flags,
    add_model_flags,
    add_removed_flags,
    add_sampling_flags,
    check_endpoint_flags,
    check_serving_flags,
    generation_settings,
    load_served,
    say,
    serving_parser,
)
from suwen.tables import printable

if TYPE_CHECKING:
    from suwen.chat_models import Ask
    from suwen.retrieval.search import Hit, KnowledgeBase

EXAMPLES = (
    "高血压患者在饮食上应该注意什么？",
    "感冒和流感有什么区别？",
    "孩子发烧到三十九度应该怎么处理？",
    "阿莫西林有哪些常见的不良反应？",
)
HELP = """/clear           forget the conversation (the system prompt stays)
/system [TEXT]   set the system prompt, from the next question on; without TEXT remove it
/retrieve TEXT   passages of the knowledge base for TEXT, without asking the model
/save FILE       append the conversation to FILE, one JSON object a line, as training reads it
/help            this list
/exit            leave, as end of file (Ctrl-D) does
Ctrl-C           stop the answer
A line that ends with \\ goes on in the next one; several lines may stand between two lines of three quotes (\"\"\")."""


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
        help="answers, one JSON object a line, or a table where it ends in .csv (default: predictions.jsonl)",
    )
    group.add_argument("--with_prompt", action="store_true", help="write or print each question with its answer")
    group.add_argument(
        "--batch_size", "--eval_batch_size", type=int, default=8, metavar="N", help="questions at once (default: 8)"
    )
    add_model_flags(parser)
    add_endpoint_flags(parser)
    add_sampling_flags(parser)
    add_retrieval_flags(parser)
    add_removed_flags(parser, {"max_length": "use --max_new_tokens; a prompt may fill the model's window"})
    args = parser.parse_args(argv)
    if args.interactive and args.data_file:
        raise ValueError("--interactive and --data_file: give one of them")
    if args.output_file and not args.data_file:
        raise ValueError("--output_file: needs --data_file, the questions to answer")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size: found {args.batch_size}, expected at least 1")
    if args.api_base and not args.model:
        raise ValueError("--api_base: also needs --model, the model's name there")
    if args.interactive and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--interactive: for one process, found several; start it by python")
    check_endpoint_flags(args)
    check_serving_flags(args)
    check_retrieval_flags(args)
    return args


def answer_examples(served: Served | Endpoint, args: argparse.Namespace, knowledge: KnowledgeBase | None) -> None:
    from suwen.file_answers import answers_of

    say("no --interactive and no --data_file: answering the example questions")
    prompts = [
        Prompt(f"example {number}", with_system_prompt([{"role": "user", "content": text}], args.system_prompt))
        for number, text in enumerate(EXAMPLES, start=1)
    ]
    found = answers_of(served, prompts, list(range(len(prompts))), args, knowledge)
    answers = {index: (answer, hits) for index, answer, hits in found}
    for index, prompt in enumerate(prompts):
        answer, hits = answers[index]
        print(f"\n问：{prompt.messages[-1]['content']}")
        if answer.reasoning:
            print(f"思考：{printable(answer.reasoning)}")
        print(f"答：{printable(answer.content)}", flush=True)
        print_sources(answer.content, hits)


def print_sources(answer: str, hits: Sequence[Hit]) -> None:
    """The passages that an answer was given, those it cites marked, and what is wrong with its citations."""
    if not hits:
        return
    from suwen.retrieval.grounding import check_citations, describe_sources

    citations = check_citations(answer, [hit.passage for hit in hits])
    print("资料（*：回答中引用）：")
    print(printable("\n".join(describe_sources(hits, citations))))
    if citations.unknown:
        print(f"注意：引用了不存在的资料 {list(citations.unknown)}")
    if citations.unsupported:
        print(f"注意：所引资料中没有找到相应内容 {list(citations.unsupported)}")


class Chat:
    """A conversation in the terminal: its messages, and what its commands do."""

    def __init__(
        self, names: list[str], ask: Ask, args: argparse.Namespace, knowledge: KnowledgeBase | None = None
    ) -> None:
        self.names, self.ask_model, self.args, self.knowledge = names, ask, args, knowledge
        self.settings = generation_settings(args)
        self.system_prompt = args.system_prompt
        self.turns: list[dict] = []

    @property
    def messages(self) -> list[dict]:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *self.turns]

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False when it ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            self.turns = []
            print("(the conversation is forgotten)")
        elif name == "/system":
            self.system_prompt = rest
            print("(the system prompt is set)" if rest else "(no system prompt)")
        elif name == "/save":
            self.save(rest)
        elif name == "/retrieve":
            self.retrieve(rest)
        else:
            print(HELP if name == "/help" else f"unknown command {name}\n{HELP}")
        return True

    def save(self, path: str) -> None:
        if not path or not self.turns:
            print("(/save FILE: expected a file)" if not path else "(nothing to save yet)")
            return
        row = {"messages": self.messages, "model": " + ".join(self.names), "ai_generated": True}
        try:
            with open(Path(path).expanduser(), "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"({path}: {error.strerror or error})")
        else:
            print(f"(saved: {path})")

    def retrieve(self, question: str) -> None:
        if self.knowledge is None or not question:
            print("(no --knowledge_index)" if self.knowledge is None else "(/retrieve TEXT: expected a question)")
            return
        from suwen.retrieval.grounding import describe_sources

        hits = self.knowledge.search(question, self.args.num_passages)
        print(printable("\n".join(describe_sources(hits))) if hits else "(nothing found)")

    def ask(self, question: str) -> None:
        """Stream the answer to stdout; Ctrl-C keeps what came so far."""
        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            reply = self.ask_model(messages, self.settings, self.knowledge)
        except ValueError as error:
            print(f"({error})")
            return
        if reply.dropped:
            print(f"(the oldest turns, {reply.dropped} tokens, no longer fit the model's window and are left out)")
        if self.args.with_prompt and reply.prompt:
            print(printable(reply.prompt))
        parts = {"reasoning": "", "content": ""}
        try:
            for kind, text in reply.pieces:
                if kind == "reasoning" and not parts["reasoning"]:
                    print("[思考] ", end="")
                elif kind == "content" and not parts["content"] and parts["reasoning"]:
                    print("\n[回答] ", end="")
                parts[kind] += text
                print(printable(text), end="", flush=True)
            print("" if parts["content"] else "(the model gave no answer)")
        except KeyboardInterrupt:
            print(" (stopped)")
        except EndpointError as error:
            print(f"({error})")
        finally:
            reply.pieces.close()
        print_sources(parts["content"], reply.hits)
        if self.args.single_turn or reply.abstained or not parts["content"]:
            return  # an unanswered question is not part of the conversation
        answer = {"role": "assistant", "content": parts["content"]}
        if parts["reasoning"]:
            answer["reasoning_content"] = parts["reasoning"]
        self.turns += [messages[-1], answer]


def read_entry(prompt: str) -> str:
    """What is typed, up to the end of its line, or of its lines: after a backslash, or between three quotes."""
    line = input(prompt)
    if line.strip().startswith('"""'):
        lines = [line.strip().removeprefix('"""')]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("… "))
        lines[-1] = lines[-1].rstrip().removesuffix('"""')
    else:
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(input("… "))
    # Bytes that the terminal's encoding does not know arrive as lone surrogates, which no tokenizer takes.
    return "\n".join(lines).strip().encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def chat(served: Served | Endpoint, args: argparse.Namespace, knowledge: KnowledgeBase | None) -> None:
    from suwen.chat_models import alone, endpoint_model

    try:
        import readline  # noqa: F401  line editing that knows wide characters, and the history of the session
    except ImportError:
        pass
    if isinstance(served, Served):
        conversation = Chat(served.names, alone(served), args, knowledge)
    else:
        conversation = Chat([served.model], endpoint_model(served).ask, args, knowledge)
    print("素问 Suwen: research output, not medical advice (不构成医疗建议；急症请拨打120). /help lists the commands.")
    while True:
        try:
            entry = read_entry("\n问：")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)")
            continue
        if entry.startswith("/"):
            if not conversation.command(entry):
                return
        elif entry:
            print("答：", end="", flush=True)
            conversation.ask(entry)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the program

    prompts = load_prompts(args.data_file, args.system_prompt) if args.data_file else []
    if args.data_file and not args.interactive:
        check_output_file(args.output_file or "predictions.jsonl")
    knowledge = load_knowledge(args)
    if args.api_base:
        served: Served | Endpoint = Endpoint(args.api_base, args.model, concurrency=args.concurrency)
    else:
        served = load_served(args)
    if args.interactive:
        chat(served, args, knowledge)
    elif args.data_file:
        from suwen.file_answers import answer_file

        answer_file(served, prompts, args, knowledge)
    else:
        answer_examples(served, args, knowledge)


if __name__ == "__main__":
    run(main)
