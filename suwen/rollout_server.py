"""Answers drawn by a server that is handed the policy's weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from suwen.client import Endpoint, EndpointError, complete_chats, open_client
from suwen.encoding import ChatEncoder
from suwen.generation import Answer, decode_answer
from suwen.generation_settings import GenerationSettings


@dataclass
class RolloutServer:
    """An OpenAI-compatible server that takes LoRA adapters while it runs, as vLLM does.

    vLLM: `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank R`, where the output
    folder is seen under the same path. Answers come as text and are encoded again.
    """

    url: str
    folder: Path  # adapters are put below it
    loaded: str = ""
    told: dict[str, object] = field(default_factory=dict)  # of all updates, see Endpoint

    def hand_over(self, trainer: Any, step: int) -> None:
        """Give the server the policy as it is now; every rank takes part."""
        name = f"suwen-{step}"
        if name == self.loaded:
            return
        trainer.save_model(str(self.folder / name))
        if trainer.accelerator.is_main_process:
            with open_client(Endpoint(self.url, name)) as client:
                base = Endpoint(self.url, name).url.removesuffix("/chat/completions")
                path = str((self.folder / name).resolve())
                load = {"lora_name": name, "lora_path": path}
                for address, body in (
                    ("load_lora_adapter", load),
                    ("unload_lora_adapter", {"lora_name": self.loaded}),
                ):
                    if not body["lora_name"]:
                        continue
                    try:
                        response = client.post(f"{base}/{address}", json=body)
                    except httpx.HTTPError as error:
                        raise EndpointError(f"--rollout_server {self.url}: {error}") from None
                    if response.status_code != 200:
                        raise EndpointError(
                            f"--rollout_server {base}/{address}: HTTP {response.status_code}, expected a server that "
                            "takes adapters while it runs (vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)"
                        )
            if self.loaded:
                shutil.rmtree(self.folder / self.loaded, ignore_errors=True)
        self.loaded = name
        trainer.accelerator.wait_for_everyone()

    def draw_answers(
        self,
        encoder: ChatEncoder,
        conversations: Sequence[list[dict]],
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
    ) -> list[Answer]:
        endpoint = Endpoint(self.url, self.loaded, told=self.told)
        found: list[Answer | None] = [None] * len(prompts)
        sampling = {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        for place, reply in complete_chats(endpoint, conversations, [seed % 2**31 for seed in seeds], **sampling):
            message = {"role": "assistant", "content": reply.content}
            if reply.reasoning:
                message["reasoning_content"] = reply.reasoning
            ids = encode_reply(encoder, conversations[place], message, reply.finish_reason == "length")
            found[place] = decode_answer(encoder, prompts[place], ids)
        return [answer for answer in found if answer is not None]


def encode_reply(encoder: ChatEncoder, messages: list[dict], message: dict, cut: bool) -> list[int]:
    """Ids of an answer that came as text: with its stop token, unless it was cut off."""
    encoded = encoder.encode_answers(messages, [message], None)
    assert encoded is not None  # there is no limit to be longer than
    [ids] = encoded[1]
    return [i for i in ids if i not in encoder.stop_token_ids] if cut else ids
