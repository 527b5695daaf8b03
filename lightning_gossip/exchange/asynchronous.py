"""The clock of asynchronous gossip: a rank exchanges at its own pace, and waits for nobody (design §11).

Usable from any training loop::

    exchange.begin()   # tick; in a round of its own, take the snapshot of θ(t) and ask a partner
    ...                # forward, backward: others may copy θ(t) meanwhile
    exchange.shut()    # not any more; before anything changes the parameters
    ...                # the optimizer's step: θ(t) + u(t)
    exchange.end()     # apply what was agreed by now: θ(t+1) = θ(t) + u(t) − weight · Σ (s_i − s_k)

Both partners apply the same pair of snapshots, each at the end of its present step, or neither does
(:mod:`~lightning_gossip.exchange.agreement`): so under elastic gossip the mean of the replicas moves by the optimizers
alone, whatever the order of events, as it does not where only one side of a pair is averaged, or both at different
moments (AD-PSGD, Lian et al. 2018, arXiv:1710.06952).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store

from lightning_gossip.arguments import check_choice
from lightning_gossip.control.run import Control
from lightning_gossip.exchange.callers import Pulled, Pushed
from lightning_gossip.exchange.flat import FlatBuffer, FlatLayout, travelling
from lightning_gossip.exchange.in_flight import InFlight
from lightning_gossip.exchange.mixer import Mixer
from lightning_gossip.exchange.outer_gossip import OuterGossip
from lightning_gossip.exchange.pairs import Pairs
from lightning_gossip.exchange.partners import Partners
from lightning_gossip.exchange.snapshots import Agreed, Standing
from lightning_gossip.exchange.standstill import Standstill
from lightning_gossip.exchange.stats import NONFINITE, ExchangeStats, NonFinite, mean_distance
from lightning_gossip.rules import asking
from lightning_gossip.rules.mixing import MixingRule
from lightning_gossip.rules.outer import OuterStep
from lightning_gossip.rules.schedule import Schedule

GREETED = 16
"""Links are made at the beginning where a rank has so many neighbours at most; else each when it is needed."""


@dataclass
class AsynchronousStats(ExchangeStats):
    """What the exchanges of this rank did; see :class:`ExchangeStats`.

    Attributes:
        rounds: of this rank since the start.
        without_partner: of these, in which it came to no exchange until the next: everybody that was asked was busy.
        partner_step_lag: of the exchange applied in the last step: the step of the own snapshot minus the partner's,
            the mean over its partners; None where there was none.
    """

    rounds: int = 0
    without_partner: int = 0
    partner_step_lag: float | None = None

    @property
    def busy(self) -> float | None:
        """Share of rounds without a partner; None before the first."""
        return self.without_partner / self.rounds if self.rounds else None


@dataclass(frozen=True)
class Applied:
    """An exchange that was applied: with all ranks' records, a replay gives the same parameters to rounding.

    A rank's parameters change at the end of each step, and by an exchange that is applied between two (at a meeting);
    a *moment* says how often they have.

    Attributes:
        moment: to which it leads.
        between: whether it was applied between two steps.
        own: moment of the own snapshot.
        others: the partners, in ascending rank, each with the moment of its snapshot.
        lag: steps of which the own snapshot was ahead of theirs, on the mean.
    """

    moment: int
    between: bool
    own: int
    others: tuple[tuple[int, int], ...]
    lag: float


class AsynchronousExchange:
    """One rank's exchanges over a training, for which neither it nor its partners wait.

    Args:
        rank, world_size, schedule, rule, parameters, wire_dtype, outer, nonfinite: as of
            :class:`~lightning_gossip.exchange.clock.Exchange`; ``schedule`` tells whom a rank asks, at its own steps.
        control: of the run.
        store: of the run, on a connection that nobody blocks.

    Attributes:
        records: what was applied; None where nobody wants it.

    Raises:
        ValueError: if the world size does not suit the schedule.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        schedule: Schedule,
        rule: MixingRule,
        control: Control,
        store: Store,
        parameters: Callable[[], Mapping[str, Tensor]],
        wire_dtype: torch.dtype | None = None,
        outer: OuterStep | None = None,
        nonfinite: NonFinite = "error",
    ) -> None:
        schedule.check_world_size(world_size)
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.stats = AsynchronousStats()
        self.on_heal: Callable[[], None] = lambda: None  # called after this replica took a partner's snapshot
        self.measure = False  # whether to compute `stats.partner_distance`, one more pass over the snapshots
        self.records: list[Applied] | None = None
        self._schedule = schedule
        self._control = control
        self._parameters = parameters
        self._wire_dtype = wire_dtype
        self._outer = None if outer is None else OuterGossip(outer)
        heals = check_choice("nonfinite", nonfinite, NONFINITE) == "heal"
        self._mixer = Mixer(rank, rule, self._outer, heals)
        self._still = Standstill()
        self._standing = Standing(1, 0, FlatLayout({}), {})
        self._signature: tuple[int, ...] = ()  # of the parameters that travel
        self._in_step = self._has_greeted = False
        self._moment = 0
        self._bytes_sent = 0  # of which the stats know
        self._proposal: tuple[FlatBuffer, FlatBuffer] | None = None  # the outer step's result, exact and as it travels
        self._proposed: FlatBuffer | None = None  # the room for it
        self._partners: Partners | None = None
        asks = rule.transfers(np.array([1, -1]), 0)
        sends = bool(asks.send_to), bool(asks.receive_from)
        self._rounds = asking.OwnRounds(in_pairs=all(sends))
        if world_size > 1:
            kind: type[Partners] = Pairs if all(sends) else Pulled if sends[1] else Pushed
            self._partners = kind(control, store, self._still, lambda: self._standing, self._another, sends)

    @property
    def in_flight(self) -> bool:
        """Whether this rank has asked for an exchange, or is in one, that is not applied yet."""
        return self._partners is not None and self._partners.under_way

    # -- a step -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a step: advance the clock and, in a round of this rank's, ask for an exchange.

        Raises:
            PartnerLost: if a partner died or stayed silent past the timeout, and the run ends with that.
            RunStopped: if that was because some rank stopped.
        """
        self.step += 1
        self.stats.wait_seconds = self.stats.mix_seconds = 0.0
        self.stats.partner = -1
        self.stats.partner_distance = self.stats.partner_step_lag = None
        if self._partners is not None:
            self._partners.check()
        self._stand()
        if self._outer is not None:
            self._outer.follow(self._standing.tensors)
        self._in_step = True
        if self._partners is not None:
            if not self._has_greeted:
                self._has_greeted = True
                neighbours = asking.neighbours(self._schedule, self.rank, self.world_size)
                self._partners.greet(neighbours if len(neighbours) <= GREETED else ())
            self._partners.come_back()
        self._still.open()
        if self._schedule.is_round(self.step) and self._standing.tensors:
            start = time.perf_counter()
            self._begin_round()
            self.stats.mix_seconds += time.perf_counter() - start

    def shut(self) -> None:
        """Let nobody copy the parameters until :meth:`end`: something is about to change them.

        It waits for a copy that is under way; called again, it does nothing.
        """
        self.stats.wait_seconds += self._still.shut()

    def end(self) -> None:
        """End a step, after the optimizer's update: apply what was agreed.

        Raises:
            PartnerLost, RunStopped: as :meth:`begin`.
            NotFinite: if a replica is not finite, and ``nonfinite`` is ``"error"``.
        """
        self.shut()
        if self._partners is not None:
            self._partners.check()
        self._moment += 1
        self._apply()
        self._in_step = False
        self._stand(self.step + 1)
        self._still.open()

    def align(self, clock: int) -> None:
        """Set the clock, where a training goes on: every rank's is its own, and meetings leave it as it is."""
        self.step = max(self.step, clock)

    def reset_links(self, generation: int) -> None:
        """Nothing: links that failed are made anew when they are needed."""

    # -- meetings and the end -------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Begin no exchange until the next step begins: what the module holds may be swapped for something else."""
        if self._partners is not None:
            self._partners.leave()
        self._still.leave()

    def arrive(self) -> None:
        """Come to a meeting: be in no exchange any more, and apply what is agreed, unless a step is under way.

        Whoever asks this rank is told that it is busy, until its next step begins.

        Raises:
            PartnerLost, RunStopped, NotFinite: as :meth:`end`.
        """
        self.leave()
        if self._partners is not None:
            self._partners.await_settled()
        if not self._in_step:
            self._apply()

    def drop(self) -> None:
        """Give up what is under way, on all ranks alike: the parameters to which it belongs are replaced.

        Raises:
            PartnerLost, RunStopped: as :meth:`begin`.
        """
        self.leave()
        if self._partners is not None:
            self._partners.await_settled()
            self._partners.release()
        self._proposal = None
        if self._outer is not None:
            self._outer.begin_anew()

    def settle(self) -> None:
        """Apply what is agreed, and be in no exchange any more: at the end of training.

        Raises:
            PartnerLost, RunStopped, NotFinite: as :meth:`end`.
        """
        self._in_step = False
        self.arrive()

    def state_to_join(self) -> dict[str, Any]:
        """Return what a rank begins with that takes over this replica between two steps: nobody's counts."""
        state: dict[str, Any] = {"step": self.step, "stats": asdict(AsynchronousStats()), "in_flight": None}
        if self._outer is not None:
            state["outer"] = self._outer.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return clock, counts and the outer step's state; of exchanges nothing is under way at a meeting.

        Raises:
            PartnerLost, RunStopped, NotFinite: as :meth:`end`.
        """
        self.arrive()
        state: dict[str, Any] = {"step": self.step, "stats": asdict(self.stats), "in_flight": None}
        if self._outer is not None:
            state["outer"] = self._outer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned on this rank; what is under way now is given up.

        Raises:
            ValueError: if an exchange was in flight: the state is of gossip by step, with a delay.
            PartnerLost, RunStopped: as :meth:`begin`.
        """
        if state.get("in_flight") is not None:
            raise ValueError(
                "an exchange of gossip by step was in flight, which `asynchronous=True` can not apply: save where none"
                " is, at an epoch's end with `delay=0`, or go on with `asynchronous=False`"
            )
        self.drop()
        self.step = int(state["step"])
        self.stats = AsynchronousStats.of(state["stats"])
        if self._outer is not None and "outer" in state:
            self._outer.load_state_dict(state["outer"], self._parameters())

    def close(self) -> None:
        """Give up what is under way and release links and threads."""
        self._still.leave()
        if self._partners is not None:
            self._partners.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _stand(self, step: int | None = None) -> None:
        """Note what stands still: who copies, in whatever thread, copies that."""
        tensors = travelling(self._parameters()) if step is None else self._standing.tensors
        signature = tuple(map(id, tensors.values()))
        layout = self._standing.layout
        if signature != self._signature:
            layout, self._signature = FlatLayout(tensors, self._wire_dtype), signature
        self._standing = Standing(self.step if step is None else step, self._moment, layout, tensors)

    def _begin_round(self) -> None:
        partners, standing = self._partners, self._standing
        if self._outer is not None:
            if self._proposed is None or self._proposed.layout is not standing.layout:
                self._proposed = FlatBuffer.empty(standing.layout, torch.device("cpu"))
            self._proposal = self._outer.propose(standing.tensors, self._proposed), self._proposed
        if partners is None:
            return
        asked = asking.first(self._schedule, self.step, self.rank, self._whole(), self.world_size)
        if asked < 0:
            return
        asks, was_alone = self._rounds.begin(partners.counts.agreed, partners.under_way)
        self.stats.rounds += 1
        self.stats.without_partner += was_alone
        if asks:
            partners.ask(asked, standing, self._write)

    def _write(self, buffer: FlatBuffer) -> None:
        if self._proposal is not None:
            buffer.storage.copy_(self._proposal[1].storage)
        else:
            buffer.pack(self._standing.tensors)

    def _another(self, step: int, tried: set[int], silent: set[int]) -> int:
        return asking.another(self._schedule, step, self.rank, self._whole(), tried, silent, self.world_size)

    def _whole(self) -> tuple[int, ...]:
        return tuple(sorted(self._control.whole))

    @torch.no_grad()
    def _apply(self) -> None:
        """Make the own outer step, if it is due, and apply what was agreed, if anything was."""
        start = time.perf_counter()
        if self._proposal is not None:
            (exact, travels), self._proposal = self._proposal, None
            standing = self._standing
            self._mixer.mix(
                InFlight(self.step, standing.tensors, standing.layout, travels.storage, None, proposal=exact), []
            )
        if self._partners is not None and (agreed := self._partners.take()) is not None:
            self._mix(agreed)
            self._partners.release()
        if self._partners is not None:
            sent = self._partners.counts.bytes_sent
            self.stats.bytes_sent += sent - self._bytes_sent
            self._bytes_sent = sent
        self.stats.mix_seconds += time.perf_counter() - start

    def _mix(self, agreed: Agreed) -> None:
        of, own = agreed.own.of, agreed.own.payload
        layout = agreed.own.buffer.layout
        received = [theirs.payload for theirs in agreed.received]
        ranks = tuple(theirs.rank for theirs in agreed.received)
        lag = of.step - sum(theirs.step for theirs in agreed.received) / len(ranks)
        exchange = InFlight(of.step, of.tensors, layout, own, None, received, ranks[0], None, ranks)
        self.stats.partner = ranks[0]
        self.stats.partner_step_lag = lag
        if self.measure:
            self.stats.partner_distance = mean_distance(layout.split(own), [layout.split(x) for x in received])
        if not self._mixer.mix(exchange, received):
            received = self._mixer.mix_finite(exchange, received, self._note_healing)
        self.stats.exchanges += len(received)
        if not self._in_step:
            self._moment += 1
        if self.records is not None:
            others = tuple((theirs.rank, theirs.moment) for theirs in agreed.received)
            self.records.append(Applied(self._moment, not self._in_step, of.moment, others, lag))

    def _note_healing(self) -> None:
        self.stats.healed += 1
        self.on_heal()
