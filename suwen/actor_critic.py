"""Policy, critic and reference on one backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from suwen.head import score_actions
from suwen.models import without_adapter


class Actions(NamedTuple):
    """What is known of N tokens that a policy drew, each (N,)."""

    logps: torch.Tensor
    entropy: torch.Tensor  # nats, of the distribution that the token was drawn from
    values: torch.Tensor  # the return that the critic expects before the token; 0 without a critic


class ActorCritic(torch.nn.Module):
    """A language model that scores drawn tokens, with a critic on the hidden states that its head reads too.

    A module of its own, so that one forward pass, seen by DDP and DeepSpeed, gives both; the language model inside
    stays as it is, generates, and is saved alone.
    """

    def __init__(self, model: Any, critic: bool, critic_head: torch.Tensor | None = None) -> None:
        """`critic_head`: (H,) of a reward model; else the critic begins with 0."""
        super().__init__()
        self.model = model
        self.value_head: torch.nn.Linear | None = None
        if critic:
            self.value_head = torch.nn.Linear(without_adapter(model).config.get_text_config().hidden_size, 1)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)
            if critic_head is not None:
                self.value_head.weight.data[0] = critic_head

    def forward(
        self,
        score_at: torch.Tensor,
        score_labels: torch.Tensor,
        temperature: float = 1.0,
        num_chunks: int | None = None,
        **inputs: Any,
    ) -> Actions:
        """Score the tokens `score_labels` (N,) at the positions before them, `score_at`, see `add_scoring_head`."""
        causal = without_adapter(self.model)
        hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[score_at]
        logps, entropy = score_actions(causal, hidden, score_labels, temperature, num_chunks)
        if self.value_head is None:
            return Actions(logps, entropy, torch.zeros_like(logps))
        with torch.autocast(hidden.device.type, enabled=False):  # a return is no probability: 16 bit would round it
            values = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0].float()
        return Actions(logps, entropy, values)


class Reference:
    """The model as it was at the start, in the place of the policy for as long as it is asked.

    A new adapter is switched off. Where other weights are trained (all of them, or an adapter that goes on), copies of
    those, and of no other, are kept beside them and swapped in.
    """

    def __init__(self, model: Any, new_adapter: bool) -> None:
        self.model = model
        # Under ZeRO-3 a parameter is empty, and what this rank holds of it is its ds_tensor
        self.held = [
            getattr(parameter, "ds_tensor", parameter)
            for parameter in model.parameters()
            if parameter.requires_grad and not new_adapter
        ]
        self.copies = [tensor.detach().clone() for tensor in self.held]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.held:
            assert isinstance(self.model, PeftModel)
            with self.model.disable_adapter():
                yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for place, tensor in enumerate(self.held):
            tensor.data, self.copies[place] = self.copies[place], tensor.data
