"""Dialogues of patients with doctors, nurses and pharmacists, played by a model in both roles.

    python tools/build_dialogues.py --api_base http://127.0.0.1:8000/v1 --model suwen --count 200
    OPENAI_API_KEY=... python tools/build_dialogues.py --api_base https://HOST/v1 --model NAME --requests_per_minute 60

Any OpenAI-compatible endpoint will do, api_server.py and vLLM among them. Roles are in data/roles; files of your own
have the same keys. The output is read by training as it is. The same command goes on where it was stopped, and tries
again what went wrong. Tokens are counted; with the endpoint's prices, so is what they cost. What a model invents is no
medical advice, and has to be read before it is trained on.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, check_output_file, run

ROLES = Path(__file__).resolve().parents[1] / "data" / "roles"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api_base", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name there, for both roles")
    parser.add_argument("--output_file", default="outputs/dialogues.jsonl", metavar="FILE")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="dialogues (100)")
    parser.add_argument("--patients", type=Path, default=ROLES / "patients.jsonl", metavar="FILE", help="seed roles")
    parser.add_argument(
        "--clinicians", type=Path, default=ROLES / "clinicians.jsonl", metavar="FILE", help="seed roles"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of a question and an answer, at most (5)")
    parser.add_argument("--max_new_tokens", type=int, default=300, metavar="N", help="of a turn (300)")
    parser.add_argument("--temperature", type=float, default=0.9, metavar="T", help="of both roles (0.9)")
    parser.add_argument("--seed", type=int, default=42, metavar="S", help="of who meets whom, and of the replies (42)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="dialogues at once (8)")
    parser.add_argument("--requests_per_minute", type=float, metavar="N", help="at most (no limit)")
    parser.add_argument("--price_input", type=float, metavar="P", help="of a million tokens that are read")
    parser.add_argument("--price_output", type=float, metavar="P", help="of a million tokens that are written")
    args = parser.parse_args(argv)
    for name in ("count", "rounds", "max_new_tokens", "concurrency"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: found {getattr(args, name)}, expected 1 or more")
    for name in ("temperature", "requests_per_minute", "price_input", "price_output"):
        value = getattr(args, name)
        if value is not None and (value < 0 or name == "requests_per_minute" and not value):
            raise ValueError(f"--{name}: found {value:g}, expected a number above 0")
    for name in ("patients", "clinicians"):
        if not getattr(args, name).is_file():
            raise ValueError(f"--{name}: {getattr(args, name)} not found, expected a file of roles")
    if (args.price_input is None) != (args.price_output is None):
        raise ValueError("--price_input and --price_output: give both, or none")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from tqdm import tqdm

    from suwen.client import Endpoint
    from suwen.prompts import AnswerFile
    from suwen.readers import hash_file
    from suwen.role_play import CLINICIAN_KEYS, PATIENT_KEYS, draw_scenes, load_roles, play_all

    endpoint = Endpoint(args.api_base, args.model, concurrency=args.concurrency)
    patients, clinicians = load_roles(args.patients, PATIENT_KEYS), load_roles(args.clinicians, CLINICIAN_KEYS)
    scenes = draw_scenes(patients, clinicians, args.count, args.rounds, args.seed)
    kept = ("api_base", "model", "rounds", "max_new_tokens", "temperature", "seed")
    record = {name: getattr(args, name) for name in kept}
    record["roles"] = [hash_file(args.patients), hash_file(args.clinicians)]
    check_output_file(args.output_file)
    output = AnswerFile(args.output_file, len(scenes), record, key="messages")
    if output.done:
        print(f"{output.path}: {len(output.done)} of {len(scenes)} dialogues are there already")
    problems: Counter[str] = Counter()
    tokens = Counter(read=0, written=0)
    todo = [scenes[index] for index in output.missing]
    settings = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
    with tqdm(total=len(scenes), initial=len(output.done), desc="dialogues", disable=None) as bar:
        for talk in play_all(endpoint, todo, args.requests_per_minute, **settings):
            tokens.update(read=talk.prompt_tokens, written=talk.completion_tokens)
            if talk.problem:
                problems[talk.problem] += 1
                continue
            names = {"patient": talk.scene.patient["name"], "clinician": talk.scene.clinician["name"]}
            output.append([{"index": talk.scene.index, "messages": talk.messages, **names, "recipe": "role play"}])
            bar.update()
    output.finish()
    turns = sum(len(json.loads(line)["messages"]) for line in output.path.read_text(encoding="utf-8").splitlines())
    print(f"{output.path}: {len(output.done)} dialogues, {turns} turns")
    if problems:
        reasons = ", ".join(f"{reason} {count}" for reason, count in problems.most_common())
        print(f"left out: {reasons}; the same command tries them again")
    line = f"tokens: {tokens['read']:,} read, {tokens['written']:,} written"
    if args.price_input is not None:
        cost = (tokens["read"] * args.price_input + tokens["written"] * args.price_output) / 1e6
        line += f"; cost {cost:.4f}"
    print(line)


if __name__ == "__main__":
    run(main)
