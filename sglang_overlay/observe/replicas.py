# SPDX-License-Identifier: Apache-2.0
"""Compare what replicas serve, rank by rank: servers compute checksums, and only those travel."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.observe.weights_report import STATE

SECONDS = 300.0
_BETWEEN_SCHEDULERS = " | "
"""What SGLang puts between the messages of several schedulers, one for each data-parallel replica."""

Rank = tuple[str, int, int]
"""Role of the model, pipeline stage and tensor parallel rank."""


class ReplicaError(StreamFP8Error):
    """A server could not be asked what it serves."""


@dataclass(frozen=True)
class ServedRank:
    """What a rank serves: the checksum of all of it, and of each layer, if known."""

    checksum: str | None
    layers: Mapping[str, str]


@dataclass(frozen=True)
class Replica:
    """A scheduler with all its ranks; ``name`` is its server's address, and its number if there are several."""

    name: str
    ranks: Mapping[Rank, ServedRank]


@dataclass(frozen=True)
class RankComparison:
    """One rank of all replicas.

    Attributes:
        rank: which.
        checksums: by the replicas' names; None where a replica lacks this rank, or its checksum.
        layers: those that are not the same everywhere.
    """

    rank: Rank
    checksums: Mapping[str, str | None]
    layers: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether all replicas serve the same."""
        return None not in self.checksums.values() and len(set(self.checksums.values())) == 1

    @property
    def name(self) -> str:
        """As for a reader."""
        role, pp, tp = self.rank
        return f"{role} PP{pp} TP{tp}"


def ask(url: str, api_key: str | None = None, seconds: float = SECONDS) -> list[Replica]:
    """Have a server compute the checksums of what it serves now.

    Args:
        url: its address, without a path.
        api_key: of the server, or its admin key.
        seconds: to wait at most.

    Raises:
        ReplicaError: it is not there, or does not tell.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    content = json.dumps({"action": STATE}).encode()
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/weights_checker", content, headers, method="POST")
        with urllib.request.urlopen(request, timeout=seconds) as response:
            answer = json.load(response)
        schedulers = [json.loads(told) for told in answer["message"].split(_BETWEEN_SCHEDULERS)]
        found = [_ranks(told) for told in schedulers]
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace").strip()
        raise ReplicaError(f"{url} answers {error.code}: {text[:500]}. {_ADVICE}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ReplicaError(f"{url} cannot be asked: {error}. {_ADVICE}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ReplicaError(f"{url} answers something else ({type(error).__name__}: {error}). {_ADVICE}") from error
    if not all(found):
        raise ReplicaError(f"{url} serves no model that was loaded with --quantization fp8 or mxfp8.")
    return [Replica(f"{url} #{number}" if found[1:] else url, ranks) for number, ranks in enumerate(found)]


_ADVICE = "It has to be a running SGLang with sglang-streamfp8"


def compare(replicas: Sequence[Replica]) -> list[RankComparison]:
    """What replicas have in common and what not, for each rank that any of them has."""
    ranks = dict.fromkeys(rank for replica in replicas for rank in replica.ranks)
    return [_comparison(rank, {replica.name: replica.ranks.get(rank) for replica in replicas}) for rank in ranks]


def to_json(comparisons: Sequence[RankComparison]) -> dict[str, Any]:
    """``comparisons`` as plain JSON data."""
    return {
        "schema": "sglang-streamfp8/compare",
        "version": 1,
        "equal": all(each.is_equal for each in comparisons),
        "ranks": [
            {
                **dict(zip(("role", "pp", "tp"), each.rank, strict=True)),
                "equal": each.is_equal,
                "checksums": dict(each.checksums),
                "layers": list(each.layers),
            }
            for each in comparisons
        ],
    }


def lines(comparison: RankComparison) -> list[str]:
    """A rank's comparison, for a reader."""
    told = {checksum or "none" for checksum in comparison.checksums.values()}
    if comparison.is_equal:
        return [f"{comparison.name}: equal, {told.pop()}"]
    found = [f"{comparison.name}: differs"]
    found += [f"  {checksum or 'none':16} {name}" for name, checksum in comparison.checksums.items()]
    return found + ([f"  in {', '.join(comparison.layers)}"] if comparison.layers else [])


def _comparison(rank: Rank, served: Mapping[str, ServedRank | None]) -> RankComparison:
    known = [each for each in served.values() if each is not None and each.layers]
    layers = dict.fromkeys(layer for each in known for layer in each.layers)
    differing = tuple(layer for layer in layers if len({each.layers.get(layer) for each in known}) > 1)
    return RankComparison(rank, {name: each.checksum if each else None for name, each in served.items()}, differing)


def _ranks(told: Sequence[Mapping[str, Any]]) -> dict[Rank, ServedRank]:
    return {
        (each["role"], each["ranks"]["pp"]["rank"], each["ranks"]["tp"]["rank"]): ServedRank(
            each["checksum"], each.get("layers", {})
        )
        for each in told
    }
