"""How answers use a knowledge base."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RetrievalSettings:
    num_passages: int = 4
    # Chosen on questions about drugs with and without a leaflet in the index: with one, 98 of 100 lie above it, without
    # one, half lie below.
    min_relevance: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.num_passages <= 50:
            raise ValueError(f"--num_passages: found {self.num_passages}, expected 1 to 50")
        if not 0 <= self.min_relevance <= 1:
            raise ValueError(f"--min_relevance: found {self.min_relevance}, expected 0 (any passage will do) to 1")
