"""The peak of a step of a model of any depth and batches of any size, from traces of small ones.

Every layer of one kind makes the same storages, so what is alive in a part of a step is linear in the number of layers:
two depths are traced and the others follow, for each part by itself, since another part may be the largest at another
depth. A model whose layers alternate (Gemma 2) is cut at whole periods. In the same way what is alive is linear in the
rows of a batch once a chunk of the loss is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tuner.estimating.counting import PAGED, Region
from tuner.estimating.devices import Device
from tuner.estimating.shapes import Plan
from tuner.estimating.tracing import Peaks, trace
from tuner.memory.cuda_copies import IN_FLIGHT
from tuner.memory.offloading import AHEAD

TRACED_TOKENS = 2**13
"""Tokens of a batch up to which it is traced itself: its loss is 32 chunks, which take about as long as a layer."""

FEWEST_ROWS = 4
"""Of the larger of two batches that others follow from, so that no batch is one row, of which copies are views."""


FEWEST_OFFLOADED = IN_FLIGHT + AHEAD + 2
"""Layers that are traced where activations are moved: of fewer, all could be on their way at once."""


@dataclass(frozen=True)
class Peak:
    """What is alive when most is.

    Attributes:
        region: of the step.
        by_kind: bytes.
    """

    region: Region
    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return room(self.by_kind)


def room(by_kind: Mapping[str, int]) -> int:
    """Bytes that have to fit."""
    return sum(size for kind, size in by_kind.items() if kind != PAGED)


class Predictor:
    """Peaks of one plan on one device, for any rows and tokens.

    Args:
        plan: of the run.
        device: of the table.
    """

    def __init__(self, plan: Plan, device: Device) -> None:
        self.plan, self.device = plan, device
        self._found: dict[tuple[int, int], Peak] = {}
        self._traced: dict[tuple[int, int], Peaks] = {}

    def peak(self, rows: int | None = None, tokens: int | None = None) -> Peak:
        """Of the plan, with other batches where they are given."""
        size = rows or self.plan.rows, tokens or self.plan.tokens
        if size not in self._found:
            self._found[size] = self._largest(*size)
        return self._found[size]

    def _largest(self, rows: int, tokens: int) -> Peak:
        few = max(FEWEST_ROWS, TRACED_TOKENS // tokens)
        if rows <= few:
            peaks = self._of_depth(rows, tokens)
        else:
            peaks = between(self._of_depth(few // 2, tokens), few // 2, self._of_depth(few, tokens), few, rows)
        region = max(peaks, key=lambda region: room(peaks[region]))
        by_kind = dict(peaks[region])
        by_kind["temporary"] = by_kind.get("temporary", 0) + self.device.workspace_bytes
        return Peak(region, by_kind)

    def _of_depth(self, rows: int, tokens: int) -> Peaks:
        if (rows, tokens) not in self._traced:
            self._traced[rows, tokens] = self._trace(rows, tokens)
        return self._traced[rows, tokens]

    def _trace(self, rows: int, tokens: int) -> Peaks:
        plan = self.plan.of(rows=rows, tokens=tokens)
        depth = plan.model.num_hidden_layers
        if (depths := depths_to_trace(plan)) is None:
            return trace(plan, self.device)
        low, high = depths
        ends = low // 2 if plan.offloads_activations else low  # the last ones find others on their way, as in the whole
        traced = (by_ends(trace(plan.of(depth=each), self.device), each, ends) for each in (low, high))
        return between(next(traced), low, next(traced), high, depth)


def depths_to_trace(plan: Plan) -> tuple[int, int] | None:
    """Two depths from which the plan's follows; None where it has to be traced as it is.

    They differ by a period of the kinds of layers and leave the same rest as the whole.
    """
    depth, longest = plan.model.num_hidden_layers, plan.document_tokens or plan.tokens
    windows = [plan.model.window_of(layer) for layer in range(depth)]
    kinds = [window is not None and window < longest for window in windows]
    for period in range(1, depth // 3 + 1):
        if kinds[period:] == kinds[:-period]:
            low = period + depth % period
            fewest = max(plan.last_apart + 1, FEWEST_OFFLOADED if plan.offloads_activations else 0)
            low += -(-max(fewest - low, 0) // period) * period
            return (low, low + period) if plan.may_be_cut and low + period < depth else None
    return None


def by_ends(peaks: Peaks, depth: int, ends: int) -> Peaks:
    """The same with layers named by how far they are from the first and from the last, those in the middle left out.

    What is alive is linear in a layer's place too, so the largest of all is near one of the ends.
    """
    found: Peaks = {}
    for region, kinds in peaks.items():
        for name in names(region, depth, ends):
            found[name] = kinds
    return found


def names(region: Region, depth: int, ends: int) -> Iterator[Region]:
    """What a region is called in a model of any depth."""
    if "layer" not in region:
        yield region
        return
    *before, index = region
    if int(index) < ends:
        yield (*before, "from the first", index)
    if (behind := depth - 1 - int(index)) < ends:
        yield (*before, "from the last", str(behind))


def between(low: Peaks, at_low: int, high: Peaks, at_high: int, at: int) -> Peaks:
    """The straight line through two counts, at a third place."""
    share = (at - at_low) / (at_high - at_low)

    def line(region: Region, kind: str) -> int:
        first, second = low[region].get(kind, 0), high[region].get(kind, 0)
        return round(first + (second - first) * share)

    common = [region for region in high if region in low]
    return {region: {kind: line(region, kind) for kind in {*low[region], *high[region]}} for region in common}
