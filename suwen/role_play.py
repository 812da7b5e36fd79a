"""Dialogues played by a model in two roles, a patient and a clinician, through any OpenAI-compatible endpoint.

After MedicalGPT's role_play_data, where a model asks as a patient and answers as a doctor or a nurse. Each role has
its own prompt and sees the talk from its own side, who meets whom is drawn by a seed, and a talk that went wrong (an
empty or cut-off turn, the same words again) is left out with its reason.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from suwen.client import Endpoint, complete_chat, open_client
from suwen.readers import Refusal, find_encoding, read_records

PATIENT_KEYS = ("name", "person", "complaint", "background", "manner")
CLINICIAN_KEYS = ("name", "person", "manner")
GOODBYE = "【结束】"
OPENING = "请说出你来看病时的第一句话。"
PATIENT = (
    "你扮演一位患者，正在和{clinician}对话。你是：{person}。主诉：{complaint}。背景：{background}。性格：{manner}。\n"
    "只说患者自己的话，每次一到三句，像平时说话那样；不要一次说完所有情况，被问到才说；不要给出诊断，不要写旁白和角色名。"
    f"问题都得到回答后，道谢并在句末写{GOODBYE}。"
)
CLINICIAN = (
    "你是{person}，正在和一位患者对话。要求：{manner}。每次回答不超过一百五十字，一次最多问两个问题。"
    "情况紧急时请对方马上就医或拨打120；没有把握时说明需要检查；不编造检查结果。不要写旁白和角色名。"
)
LABEL = ("患者：", "医生：", "护士：", "药师：", "病人：")


@dataclass(frozen=True)
class Scene:
    """Who meets whom, and how long they may talk."""

    index: int
    patient: dict[str, str]
    clinician: dict[str, str]
    rounds: int  # of a question and an answer, at most
    seed: int


@dataclass
class Talk:
    """A dialogue that was played; `problem` says why it is not good."""

    scene: Scene
    messages: list[dict[str, str]] = field(default_factory=list)
    problem: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def load_roles(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Roles of a file, a row each, with text under all of `keys`.

    Raises:
        ValueError: the first row that lacks one, by file and line; or no row at all.
    """
    roles = []
    for record in read_records(path, find_encoding(path)):
        if isinstance(record, Refusal):
            raise ValueError(record.message)
        where, row = record
        missing = [key for key in keys if not (isinstance(row, dict) and str(row.get(key) or "").strip())]
        if missing:
            raise ValueError(f"{where}: no {missing[0]}, expected an object with {', '.join(keys)}")
        roles.append({key: str(row[key]).strip() for key in keys})
    if not roles:
        raise ValueError(f"{path}: found no roles, expected objects with {', '.join(keys)}")
    return roles


def draw_scenes(
    patients: Sequence[dict[str, str]], clinicians: Sequence[dict[str, str]], count: int, rounds: int, seed: int
) -> list[Scene]:
    """`count` meetings: all pairs once in random order, then all once more. More scenes keep the first ones."""
    scenes: list[Scene] = []
    lap = 0
    while len(scenes) < count:
        rng = random.Random(f"scenes {seed} {lap}")
        pairs = list(itertools.product(patients, clinicians))
        rng.shuffle(pairs)
        for patient, clinician in pairs[: count - len(scenes)]:
            length = rng.randint(min(2, rounds), rounds)
            scenes.append(Scene(len(scenes), patient, clinician, length, rng.randrange(2**31)))
        lap += 1
    return scenes


class Pace:
    """Lets a request go when its turn has come: evenly, at most so many a minute."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + self.gap
        time.sleep(start - now)


def play(endpoint: Endpoint, client: httpx.Client, scene: Scene, pace: Pace, **sampling: Any) -> Talk:
    """One dialogue: the patient speaks first; it ends when the patient says so, or with an answer after all rounds."""
    talk = Talk(scene)
    ask = PATIENT.format(clinician=scene.clinician["person"], **{k: scene.patient[k] for k in PATIENT_KEYS[1:]})
    treat = CLINICIAN.format(person=scene.clinician["person"], manner=scene.clinician["manner"])

    def speak(system: str, seen: list[dict[str, str]], turn: int) -> str | None:
        messages = [{"role": "system", "content": system}, *seen]
        reply = complete_chat(endpoint, client, messages, pace.wait, seed=(scene.seed + turn) % 2**31, **sampling)
        talk.prompt_tokens += reply.prompt_tokens
        talk.completion_tokens += reply.completion_tokens
        text = reply.content.strip()
        for label in LABEL:
            text = text.removeprefix(label).strip()
        if not text.replace(GOODBYE, "").strip():
            talk.problem = "empty turn"
        elif reply.finish_reason == "length":
            talk.problem = "cut-off turn"
        elif any(text == message["content"] for message in talk.messages):
            talk.problem = "the same words again"
        return None if talk.problem else text

    for turn in range(scene.rounds):
        mirrored = {"user": "assistant", "assistant": "user"}
        seen = [{"role": mirrored[m["role"]], "content": m["content"]} for m in talk.messages]
        text = speak(ask, [{"role": "user", "content": OPENING}, *seen], 2 * turn)
        if text is None or (GOODBYE in text and talk.messages):
            break  # a goodbye needs no answer
        talk.messages.append({"role": "user", "content": text.replace(GOODBYE, "").strip()})
        answer = speak(treat, talk.messages, 2 * turn + 1)
        if answer is None:
            break
        talk.messages.append({"role": "assistant", "content": answer.replace(GOODBYE, "").strip()})
    if talk.problem and len(talk.messages) >= 4:  # two good rounds stand for themselves
        talk.messages = talk.messages[: len(talk.messages) // 2 * 2]
        talk.problem = ""
    return talk


def play_all(
    endpoint: Endpoint, scenes: Sequence[Scene], requests_per_minute: float | None = None, **sampling: Any
) -> Iterator[Talk]:
    """Play scenes, `endpoint.concurrency` at once, as they end. An error of the endpoint stops all.

    Raises:
        EndpointError: as complete_chat.
    """
    pace = Pace(requests_per_minute)
    with open_client(endpoint) as client, ThreadPoolExecutor(endpoint.concurrency) as pool:
        pending: set[Future[Talk]] = {pool.submit(play, endpoint, client, s, pace, **sampling) for s in scenes}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in pending:
                future.cancel()
