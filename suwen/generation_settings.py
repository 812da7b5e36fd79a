"""How an answer is drawn. Standard library only, so that a mistake in a flag is answered before torch loads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of an answer; `temperature` 0 takes the likeliest token each time, and `top_p` and `top_k` then rest."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: another answer each time

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens: found {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"--temperature: found {self.temperature}, expected 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p: found {self.top_p}, expected above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"--top_k: found {self.top_k}, expected 0 (no limit) or above")
        if not 0 < self.repetition_penalty <= 100:
            raise ValueError(f"--repetition_penalty: found {self.repetition_penalty}, expected above 0 (1: none)")
