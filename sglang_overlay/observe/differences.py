# SPDX-License-Identifier: Apache-2.0
"""What tells one load of a fleet from the others: ranks, nodes and replicas that should have done the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from sglang_overlay.observe.formats import bytes_text, count_text, ratio_text, seconds_text
from sglang_overlay.observe.labels import labels_of, model_name, places_of, rank_text
from sglang_overlay.observe.report import LoadReport, ParallelRank, Ranks

NOTABLE = 1.1
"""A peak or time this many times the median is told; below, it is noise."""
_NAMES_SHOWN = 4

Count = Callable[[LoadReport], int]

_PROBLEMS: tuple[tuple[str, str, Count], ...] = (
    ("fell back", "layer", lambda load: len(load.layers.fallback)),
    ("not completely written", "parameter", lambda load: len(load.missing)),
    ("warned", "warning", lambda load: len(load.warnings)),
)
_SETTINGS: tuple[tuple[str, Callable[[LoadReport], str]], ...] = (
    ("scheme", lambda load: load.scheme),
    ("SGLang", lambda load: load.release),
    ("sglang-streamfp8", lambda load: load.overlay_version),
    ("load format", lambda load: load.load_format),
    ("tensor parallel size", lambda load: str(load.ranks.tp.size)),
    ("pipeline parallel size", lambda load: str(load.ranks.pp.size)),
    ("expert parallel size", lambda load: str(load.ranks.ep.size)),
)


@dataclass(frozen=True)
class _Job:
    """Loads of one model in one role, with a label and a place for each."""

    loads: list[LoadReport]
    labels: list[str]
    places: list[str]

    def names(self, chosen: Sequence[int]) -> str:
        """Labels of these loads; of a place whose loads are all among them, its name and their number."""
        whole = Counter(self.places)
        found = Counter(self.places[index] for index in chosen)
        shown: dict[str, None] = {}
        for index in chosen:
            place = self.places[index]
            everything = place and found[place] == whole[place] > 1
            shown[f"{place} (all {whole[place]})" if everything else self.labels[index]] = None
        return _listed(list(shown))


def differences(loads: Sequence[LoadReport], folders: Sequence[str]) -> list[str]:
    """What differs between loads of the same model, a sentence each, the gravest first; empty if nothing does.

    Args:
        loads: of any number of ranks, nodes, replicas and models.
        folders: the folder that each one's report lies in.
    """
    jobs = _jobs(loads, folders)
    found = []
    for (model, role), job in jobs.items():
        about = f"{model}, {role}: " if len(jobs) > 1 else ""
        found += [f"{about}{sentence}" for step in _STEPS for sentence in step(job)]
    return found


def _jobs(loads: Sequence[LoadReport], folders: Sequence[str]) -> dict[tuple[str, str], _Job]:
    jobs: dict[tuple[str, str], _Job] = {}
    for load, label, place in zip(loads, labels_of(loads, folders), places_of(loads, folders), strict=True):
        job = jobs.setdefault((model_name(load), load.role), _Job([], [], []))
        job.loads.append(load)
        job.labels.append(label)
        job.places.append(place)
    return jobs


def _absent(job: _Job) -> Iterator[str]:
    """Ranks with fewer reports than others: each place is one server if any has all ranks, else all places are."""
    by_size: defaultdict[tuple[int, int], defaultdict[str, Counter[tuple[int, int]]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for load, place in zip(job.loads, job.places, strict=True):
        tp, pp = load.ranks.tp, load.ranks.pp
        by_size[pp.size, tp.size][place][pp.rank, tp.rank] += 1
    for (pp_size, tp_size), by_place in by_size.items():
        ranks = [(pp, tp) for pp in range(pp_size) for tp in range(tp_size)]
        apart = any(len(counts) == len(ranks) for counts in by_place.values())
        servers = by_place if apart else {"": sum(by_place.values(), Counter())}
        for place, counts in servers.items():
            most = max(counts.values())
            short = [
                rank_text(Ranks(tp=ParallelRank(tp, tp_size), pp=ParallelRank(pp, pp_size)), "target")
                + (f" ({counts[pp, tp]} of {most})" if counts[pp, tp] else "")
                for pp, tp in ranks
                if counts[pp, tp] < most
            ]
            if short:
                yield f"no report{f' in {place}' if place else ''}: {_listed(short)}"


def _stock(job: _Job) -> Iterator[str]:
    stock = [index for index, load in enumerate(job.loads) if load.mode == "stock"]
    if 0 < len(stock) < len(job.loads):
        yield f"loaded as stock: {job.names(stock)}; {len(job.loads) - len(stock)} of {len(job.loads)} streamed"


def _problems(job: _Job) -> Iterator[str]:
    for what, noun, count in _PROBLEMS:
        by_count: defaultdict[int, list[int]] = defaultdict(list)
        for index, load in enumerate(job.loads):
            by_count[count(load)].append(index)
        clean = len(by_count.pop(0, ()))
        if clean and by_count:
            told = (f"{count_text(number, noun)} on {job.names(by_count[number])}" for number in sorted(by_count))
            yield f"{what}: {'; '.join(told)}; none on {count_text(clean, 'other')}"


def _settings(job: _Job) -> Iterator[str]:
    for what, value in _SETTINGS:
        by_value: defaultdict[str, list[int]] = defaultdict(list)
        for index, load in enumerate(job.loads):
            by_value[value(load)].append(index)
        # The rarest first: those are the ones to look at.
        values = sorted(by_value, key=lambda text: len(by_value[text]))
        if len(values) > 1:
            told = [f"{text} on {job.names(by_value[text])}" for text in values[:-1]]
            yield f"{what}: {'; '.join(told)}; {values[-1]} on {count_text(len(by_value[values[-1]]), 'other')}"


def _peak(job: _Job) -> Iterator[str]:
    ratios = [load.memory.peak_above_start / load.final_bytes if load.final_bytes else 0.0 for load in job.loads]
    if max(ratios) >= NOTABLE * median(ratios) > 0:
        at = ratios.index(max(ratios))
        peak = bytes_text(job.loads[at].memory.peak_above_start)
        yield (
            f"highest peak: {job.labels[at]}, +{peak}, {ratio_text(ratios[at])} its model; "
            f"median {ratio_text(median(ratios))}"
        )


def _slowest(job: _Job) -> Iterator[str]:
    seconds = [load.seconds for load in job.loads]
    if max(seconds) >= NOTABLE * median(seconds) > 0:
        at = seconds.index(max(seconds))
        yield f"slowest: {job.labels[at]}, {seconds_text(seconds[at])}; median {seconds_text(median(seconds))}"


_STEPS = (_absent, _stock, _problems, _settings, _peak, _slowest)


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _NAMES_SHOWN + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMES_SHOWN])} and {len(names) - _NAMES_SHOWN} more"
