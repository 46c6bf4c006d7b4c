"""The life of one request, top to bottom; started by the ingress for every choice, driven by any `Port`.

    1. admit      wait at the gate for a fair turn
    2. place      choose the workers
    3. reserve    have the decode worker set KV blocks aside
    4. prefill    have the prompt computed, and its KV sent to those blocks
    5. hand_over  wait until it is done
    6. stream     wait for the end; tokens flow past this function, straight into the emission. Meanwhile the sequence
                  may go on at another worker, with its KV
    7. migrate    after a refusal, a failure or a death: let go, learn, and go round again
    8. end        account for it

Where prefill and decode are one worker, 3 asks nothing, 4 asks for both and 5 waits for the start. The only file of
the room that awaits, and it awaits nothing but the port. Raises `RequestError` or `RefusedError` when the request
ends without an answer: exactly one of return, raise or cancellation ends it, in bounded time.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.router.emission import Emission
from penstock.router.journey import AttemptError, Journey, RequestReport
from penstock.router.placement import Route
from penstock.router.port import Channel, Ended, Event, FirstToken, Lost, Port, Signal, TimedOut
from penstock.router.router import Router
from penstock.workers.protocol import Failed, FailureCode, GenerateRequest, Grant, Granted, Started, Stays

_LOOK_AGAIN_S = 0.5  # a waiter looks at the world at least this often
_LAST_WORD_S = 0.05
_WATCH_S = 0.1  # how often a suspect's progress is looked at


@dataclass(frozen=True, slots=True)
class Life:
    """What every step needs."""

    journey: Journey
    channel: Channel
    port: Port
    router: Router
    signal: Signal


async def serve_request(request: GenerateRequest, port: Port, router: Router, emission: Emission) -> RequestReport:
    """Serve one choice to its end: tokens into `emission`, the account as result. See the module's docstring."""
    signal = port.signal()
    journey = router.begin(request, emission, signal.set, port.now)
    life = Life(journey, port.open_channel(emission), port, router, signal)
    journey.nudge = life.channel.nudge
    try:
        await admit(life)
        while not emission.ended:
            try:
                route = await place(life)
                grant = await reserve(life, route)
                prefill(life, route, grant)
                await hand_over(life, route)
                await stream(life, route)
            except AttemptError as cause:
                await migrate(life, cause)
        return end(life)
    except Exception as error:
        router.fail(journey, error)
        raise
    finally:
        life.channel.close()
        router.finish(journey)


async def admit(life: Life) -> None:
    """Wait for a turn. Raises RefusedError: the line is full, the wait too long, or nobody is left to serve."""
    life.router.enter(life.journey)
    await _wait_turn(life)
    life.journey.mark("admitted")


async def place(life: Life) -> Route:
    """Choose the workers and start an attempt. Raises RefusedError when all refuse or none appears in time."""
    journey, attempts = life.journey, life.router.attempts
    while True:
        life.router.check_wait(journey)
        sibling_s = attempts.sibling_wait(journey)
        route = None if sibling_s else attempts.place(journey)
        if route is not None:
            journey.mark("placed")
            return route
        await life.signal.wait(sibling_s or _LOOK_AGAIN_S)


async def reserve(life: Life, route: Route) -> Grant | None:
    """Get the decode worker's promise of blocks; None where no KV will move."""
    journey, patience_s = life.journey, life.router.settings.retry.grant_patience_s
    if route.prefill is None or route.decode is None:
        return None
    life.channel.reserve(route.decode, journey.attempt, journey.resumed())
    while True:
        event = await _next_event(life, patience_s)
        if isinstance(event.body, Granted):
            journey.mark("granted")
            return event.body.grant
        if isinstance(event.body, TimedOut):
            life.router.attempts.check_move(journey)


def prefill(life: Life, route: Route, grant: Grant | None) -> None:
    """Have the context computed: for the granter, or to be decoded at the same place."""
    journey = life.journey
    if route.prefill is not None:
        life.router.attempts.check_open(journey, route.prefill)
        life.channel.prefill(route.prefill, journey.attempt, journey.resumed(), grant)
    else:
        life.channel.generate(route.computes, journey.attempt, journey.resumed())
    journey.mark("prefill_sent")


async def hand_over(life: Life, route: Route) -> None:
    """Wait for the prefill: its token in a split, its start where decode follows on the same worker."""
    journey, attempts = life.journey, life.router.attempts
    patience_s = life.router.settings.retry.grant_patience_s
    while True:
        event = await _next_event(life, patience_s, bystander=route.decode if route.split else None)
        if isinstance(event.body, Started) and event.worker_id == route.computes:
            attempts.started(journey, event.worker_id, event.body.cached_tokens)
            if route.prefill is None:
                return
        elif isinstance(event.body, FirstToken | Ended):
            return
        elif isinstance(event.body, Failed | Lost):
            # Decode is out. If prefill told it that the first token was the last, that token may still be on its way.
            await life.port.sleep(_LAST_WORD_S)
            if not journey.emission.ended:
                journey.raise_if_over(event)
        elif isinstance(event.body, TimedOut) and route.prefill is None:
            attempts.check_move(journey)


async def stream(life: Life, route: Route) -> None:
    """Wait for the end. A prefill worker lost now matters only if decode shows no life within a grace period."""
    journey, emission = life.journey, life.journey.emission
    bystander = route.prefill if route.split else None
    orphaned_at: float | None = None
    while not emission.ended:
        begin_move(life)
        watching = orphaned_at is not None or journey.alone_on is not None or journey.move is not None
        event = await _next_event(life, _WATCH_S if watching else None, bystander=bystander)
        now = life.port.now()
        if go_on_moving(life, event, now):
            continue
        if isinstance(event.body, Started) and event.worker_id == route.computes:
            life.router.attempts.started(journey, event.worker_id, event.body.cached_tokens)  # its tokens overtook it
        if isinstance(event.body, Lost | Failed):
            orphaned_at = now if orphaned_at is None else orphaned_at
        life.router.attempts.watch(journey)
        if emission.count > journey.attempt_base + 1 or journey.live_moves:
            orphaned_at = None
        elif orphaned_at is not None and now - orphaned_at > life.router.settings.retry.handover_grace_s:
            raise AttemptError(route.computes, FailureCode.TRANSFER_FAILED, "prefill was lost while handing over")


def begin_move(life: Life) -> None:
    """Where this stream is asked to leave its worker: have another one set blocks aside, while it goes on."""
    journey = life.journey
    if journey.left:  # taken over; what is left there is a name
        life.channel.cancel(journey.left)
        journey.left = ""
        life.router.moved(journey)
    if journey.leaving and (move := life.router.moves.begin(journey)) is not None:
        life.channel.take_over(move.target, move.attempt, journey.resumed())


def go_on_moving(life: Life, event: Event, now: float) -> bool:
    """Whether the event was about the stream's move alone. The move ends in the emission, or comes to nothing here."""
    journey, move = life.journey, life.journey.move
    if move is None:
        return isinstance(event.body, Stays)
    about_target = event.worker_id == move.target
    if about_target and isinstance(event.body, Granted):
        move.sent = True
        life.channel.move(move.source, journey.attempt, event.body.grant, move.emitted)
    elif move.comes_to_nothing(event, now):
        life.channel.cancel(move.target)
        life.router.moves.give_up(journey)
        life.router.moved(journey)
    else:
        life.router.moves.check(journey, move, now)
    return about_target or isinstance(event.body, Stays | Lost)


async def migrate(life: Life, cause: AttemptError) -> None:
    """Let go of the attempt, learn from its end, and get ready for the next. Raises when there is no next one."""
    journey, attempts = life.journey, life.router.attempts
    for worker_id in journey.stakes:
        life.channel.cancel(worker_id)
    pause_s = attempts.interrupted(journey, cause)
    if journey.emission.ended:
        return
    if pause_s:
        await life.port.sleep(pause_s)
    attempts.reenter(journey)
    await _wait_turn(life)


def end(life: Life) -> RequestReport:
    """Account for a choice that ended well."""
    return life.router.complete(life.journey)


async def _wait_turn(life: Life) -> None:
    while not life.journey.ticket.admitted:
        life.router.check_wait(life.journey)
        await life.signal.wait(_LOOK_AGAIN_S)


async def _next_event(life: Life, timeout_s: float | None, bystander: str | None = None) -> Event:
    """The next event of the current attempt, or `TimedOut`. Raises AttemptError when a worker that matters is out."""
    journey = life.journey
    while True:
        now = life.port.now()
        journey.check_end(now)
        left_s = journey.patience(now)
        event = await life.channel.next_event(left_s if timeout_s is None else min(timeout_s, left_s))
        if isinstance(event.body, TimedOut):
            return event
        current = event.attempt == journey.attempt or isinstance(event.body, Lost)
        if journey.move is not None and journey.move.concerns(event, life.port.now()):
            return event
        if not current or event.worker_id not in journey.stakes:
            continue
        if event.worker_id != bystander:
            journey.raise_if_over(event)
        return event
