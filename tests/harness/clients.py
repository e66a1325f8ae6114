"""What clients do to a running server while its weights are updated: long requests, sessions of tensors over HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from workbench.loads.serving import ANSWER_SECONDS, direct_client, post
from workbench.loads.updates import tensors_of

from harness.trainer import until_idle

NamedTensor = tuple[str, torch.Tensor]
_POLL_SECONDS = 0.02
_QUIET_SECONDS = 0.5


def generate(url: str, prompts: Sequence[Sequence[int]], new_tokens: int = 8, **fields: Any) -> list[list[int]]:
    """The tokens with which the server continues ``prompts``, greedily; ``fields`` are further ones of the request."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    content = {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": sampling, **fields}
    return [answer["output_ids"] for answer in post(url, "generate", content).json()]


class LongRequest:
    """A greedy request that is being answered, in a thread.

    Args:
        url: of the server.
        prompt: token ids.
        new_tokens: to generate.

    Attributes:
        tokens: generated so far.
        reason: why it ended, as SGLang says it; None before.
    """

    def __init__(self, url: str, prompt: Sequence[int], new_tokens: int) -> None:
        self.tokens: list[int] = []
        self.reason: str | None = None
        self._error: Exception | None = None
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        self._content = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
        self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()

    def _read(self, url: str) -> None:
        try:
            with (
                direct_client(ANSWER_SECONDS) as client,
                client.stream("POST", f"{url}/generate", json=self._content) as response,
            ):
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except Exception as error:
            self._error = error

    def _take(self, event: dict[str, Any]) -> None:
        if "output_ids" in event:
            self.tokens = event["output_ids"]
            reason = event["meta_info"]["finish_reason"]
            self.reason = reason and reason["type"]

    def wait_for(self, tokens: int) -> None:
        """Until so many tokens have come.

        Raises:
            RuntimeError: the request ended before.
        """
        while len(self.tokens) < tokens:
            if not self._thread.is_alive():
                raise RuntimeError(f"ended after {len(self.tokens)} tokens: {self.reason} {self._error}")
            time.sleep(_POLL_SECONDS)

    def wait_until_quiet(self) -> int:
        """Wait until no more tokens come; their number."""
        number = -1
        while number != len(self.tokens):
            number = len(self.tokens)
            time.sleep(_QUIET_SECONDS)
        return number

    def end(self) -> list[int]:
        """Wait until it is answered; its tokens."""
        self._thread.join(ANSWER_SECONDS)
        if self._error is not None:
            raise self._error
        return self.tokens


def serialized(tensors: Sequence[NamedTensor]) -> str:
    """As SGLang's HTTP interface takes tensors; they have to live until it has answered."""
    from sglang.srt.utils import MultiprocessingSerializer

    # Processes that do not descend from each other share memory by name only.
    with _shared_by_name():
        text: str = MultiprocessingSerializer.serialize(list(tensors), output_str=True)
        return text


@contextlib.contextmanager
def _shared_by_name() -> Iterator[None]:
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def send(url: str, tensors: Sequence[NamedTensor], ranks: int = 1, **fields: Any) -> None:
    """One call of ``update_weights_from_tensor``.

    Raises:
        ServerError: the server answered that it failed.
    """
    content = {"serialized_named_tensors": [serialized(tensors)] * ranks, **fields}
    post(url, "update_weights_from_tensor", content)


def send_all(url: str, checkpoint: Path, calls: int = 3, ranks: int = 1, **fields: Any) -> None:
    """A session that sends all tensors of ``checkpoint``, what belongs together in different calls.

    Raises:
        ServerError: the server answered that something failed.
    """
    tensors = list(tensors_of(checkpoint))
    post(url, "begin_weight_update", {})
    for call in range(calls):
        send(url, tensors[call::calls], ranks, **fields)
    post(url, "end_weight_update", {})


def update_from_disk(url: str, checkpoint: Path, **fields: Any) -> None:
    """Update from disk.

    Raises:
        ServerError: the server answered that it failed.
    """
    if not fields:
        until_idle(url)
    post(url, "update_weights_from_disk", {"model_path": str(checkpoint), **fields})
