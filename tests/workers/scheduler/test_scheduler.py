"""The scheduler driven by hand: both phases, hand-over, prefix hits, queue, cancels, failures."""

import numpy as np
import pytest
from fakes.content_runner import expected_tokens, slot_values
from fakes.scheduler_stand import BLOCK, held_blocks, make_request, make_stand

from penstock.workers.errors import IntegrityError
from penstock.workers.protocol import EndReason, FailureCode, SamplingParams
from penstock.workers.scheduler.events import (
    EndedEvent,
    GrantedEvent,
    PreemptedEvent,
    QueuedEvent,
    RefusedEvent,
    StartedEvent,
)
from penstock.workers.scheduler.plan import StepResult
from penstock.workers.scheduler.scheduler import SequenceKey, Work

PROMPT = [7, 1, 8, 2, 8, 1, 8, 2, 8, 4]


def test_generates_to_its_length_and_gives_all_blocks_back():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 9))
    steps = stand.run()
    assert steps == 9
    assert stand.tokens[1] == expected_tokens(PROMPT, 9)
    assert stand.ends[1] == EndReason.LENGTH
    assert stand.outcomes[3].starts.tolist() == [3]
    assert stand.pool.num_free == 64
    assert [type(event) for event in stand.events] == [StartedEvent]


def test_stop_token_is_emitted_and_ends():
    stop = expected_tokens(PROMPT, 5)[4]
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 50, stop=(499, 498, stop)))
    stand.run()
    assert stand.tokens[1] == expected_tokens(PROMPT, 50, (stop,))
    assert stand.tokens[1][-1] == stop
    assert stand.ends[1] == EndReason.STOP


def test_emitted_tokens_count_as_context_and_indices_go_on():
    whole = expected_tokens(PROMPT, 9)
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 9, emitted=tuple(whole[:4])))
    stand.run()
    assert stand.tokens[1] == whole[4:]
    assert stand.outcomes[0].starts.tolist() == [4]


def test_decodes_come_first_and_chunks_fill_the_budget():
    stand = make_stand(max_num_batched_tokens=8, max_num_seqs=4)
    stand.submit(1, Work.GENERATE, make_request([5], 30))
    stand.step()
    stand.submit(2, Work.GENERATE, make_request(list(range(20)), 5))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert plan.num_decode == 1
    assert plan.offsets.tolist() == [0, 1, 8]
    assert plan.token_ids.tolist() == [stand.tokens[1][0], *range(7)]
    assert plan.sample_rows.tolist() == [0]
    stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
    stand.run()
    assert stand.tokens[2] == expected_tokens(list(range(20)), 5)


def test_plan_carries_every_sampling_parameter():
    stand = make_stand()
    sampling = SamplingParams(4, 0.5, 7, 0.9, 0.1, seed=(1 << 64) - 3, choice=2, logprobs=5)
    stand.submit(1, Work.GENERATE, make_request(PROMPT, sampling=sampling))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    batch = plan.sampling
    assert [float(column[0]) for column in (batch.temperature, batch.top_p, batch.min_p)] == pytest.approx(
        [0.5, 0.9, 0.1]
    )
    assert [int(column[0]) for column in (batch.top_k, batch.choice, batch.logprobs)] == [7, 2, 5]
    assert int(batch.seed[0]) == (1 << 64) - 3
    assert batch.position.tolist() == [len(PROMPT)]


# --- prefix cache -----------------------------------------------------------------------------------------------------


def test_second_request_shares_the_first_ones_blocks():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 4))
    stand.run()
    stand.submit(2, Work.GENERATE, make_request([*PROMPT, *stand.tokens[1], 9], 4))
    stand.run()
    # The last token's KV was never computed: 13 of 14 known tokens, so 3 full blocks.
    assert stand.of_kind(StartedEvent)[1].cached_tokens == 3 * BLOCK
    assert stand.tokens[2] == expected_tokens([*PROMPT, *stand.tokens[1], 9], 4)


def test_a_fully_cached_context_copies_its_last_block_and_computes_one_token():
    stand = make_stand()
    prompt = PROMPT[:8]
    stand.submit(1, Work.GENERATE, make_request(prompt, 3))
    stand.run()
    stand.submit(2, Work.GENERATE, make_request(prompt, 3))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert plan.num_tokens == 1
    assert plan.starts.tolist() == [7]
    assert len(plan.copies) == 1
    source, destination = plan.copies[0].tolist()
    assert plan.block_tables[0, 1] == destination != source
    assert {source, destination} <= held_blocks(stand.pool, stand.cache)
    stand.scheduler.check_integrity()
    outcome = stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
    assert outcome.tokens.tolist() == expected_tokens(prompt, 1)
    stand.scheduler.check_integrity()


def test_a_full_hit_without_room_for_the_copy_computes_the_last_block_again():
    stand = make_stand(num_blocks=3)
    prompt = PROMPT[:8]
    for slot in (1, 2):
        stand.submit(slot, Work.GENERATE, make_request(prompt, 5))
        stand.run()
        assert stand.tokens[slot] == expected_tokens(prompt, 5)
    assert [event.cached_tokens for event in stand.of_kind(StartedEvent)] == [0, 4]


@pytest.mark.parametrize("changes", [{"prefix_root": b"x" * 32}, {"cache_prefix": False}])
def test_another_root_or_no_caching_shares_nothing(changes):
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 4))
    stand.run()
    stand.submit(2, Work.GENERATE, make_request(PROMPT, 4, **changes))
    stand.run()
    assert [event.cached_tokens for event in stand.of_kind(StartedEvent)] == [0, 0]


def test_a_request_that_forbids_caching_publishes_nothing():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 20, cache_prefix=False))
    stand.run()
    assert stand.cache is not None
    assert len(stand.cache) == 0


def test_wrong_digests_from_outside_are_not_used_when_their_number_is_wrong():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 4, prefix_digests=b"d" * 32))
    stand.run()
    stand.submit(2, Work.GENERATE, make_request(PROMPT, 4))
    stand.run()
    assert stand.of_kind(StartedEvent)[1].cached_tokens == 8


# --- split over two workers -------------------------------------------------------------------------------------------


def send(stand, grant: GrantedEvent, context: list[int]) -> None:
    """Write the granted blocks as a transfer does."""
    for index, block in enumerate(grant.blocks, start=grant.first_block):
        part = context[index * BLOCK : (index + 1) * BLOCK]
        stand.runner.blocks[block, : len(part)] = slot_values(part, index * BLOCK)


def test_a_request_split_over_two_workers():
    prefill, decode = make_stand(max_num_batched_tokens=6), make_stand()
    key = decode.submit(1, Work.RESERVE, make_request(PROMPT, 6))
    assert decode.step() is None
    (grant,) = decode.of_kind(GrantedEvent)
    assert (grant.first_block, len(grant.blocks), grant.cached_tokens) == (0, 3, 0)
    assert decode.scheduler.stats().reserved == 1
    prefill.submit(1, Work.PREFILL, make_request(PROMPT, 6), sends_kv=True)
    prefill.run()
    offers = [[index for index, _ in offer.fragments] for o in prefill.outcomes for offer in o.offers]
    assert offers == [[0], [1, 2]]
    (tail,) = prefill.outcomes[-1].sent_tails
    assert tail == (key, expected_tokens(PROMPT, 1)[0], EndReason.NONE)
    assert prefill.scheduler.stats().sending == 1
    assert prefill.scheduler.stats().running == 0
    assert prefill.pool.num_owned == 3
    send(decode, grant, PROMPT)
    prefill.scheduler.kv_sent(key, 0.0)
    assert prefill.pool.num_owned == 0
    decode.scheduler.kv_arrived(key, (tail.first_token,), 0.0)
    decode.run()
    assert prefill.tokens[1] + decode.tokens[1] == expected_tokens(PROMPT, 6)
    assert decode.outcomes[0].starts.tolist() == [1]
    assert decode.pool.num_owned == 0
    assert decode.cache is not None
    assert len(decode.cache) == 3


def test_a_grant_counts_only_blocks_that_are_missing():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 2))
    stand.run()
    key = stand.submit(2, Work.RESERVE, make_request(PROMPT, 2))
    stand.step()
    (grant,) = stand.of_kind(GrantedEvent)
    assert (grant.first_block, len(grant.blocks), grant.cached_tokens) == (2, 1, 8)
    send(stand, grant, PROMPT)
    stand.scheduler.kv_arrived(key, (expected_tokens(PROMPT, 1)[0],), 0.0)
    stand.run()
    assert stand.tokens[2] == expected_tokens(PROMPT, 2)[1:]


def test_received_blocks_are_shared_as_soon_as_they_are_verified_and_not_before():
    stand = make_stand()
    first = stand.submit(1, Work.RESERVE, make_request(PROMPT, 30))
    stand.submit(2, Work.RESERVE, make_request(PROMPT, 30))
    stand.step()
    stand.scheduler.kv_arrived(first, (expected_tokens(PROMPT, 1)[0],), 0.0)
    stand.submit(3, Work.RESERVE, make_request(PROMPT, 30))
    send(stand, stand.of_kind(GrantedEvent)[0], PROMPT)
    stand.step()
    assert [grant.first_block for grant in stand.of_kind(GrantedEvent)] == [0, 0, 2]


def test_offers_count_from_the_granted_block_and_include_cached_ones():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 1))
    stand.run()
    stand.submit(2, Work.PREFILL, make_request(PROMPT, 4), sends_kv=True, first_block=1)
    outcome = stand.step()
    assert outcome is not None
    (offer,) = outcome.offers
    assert [index for index, _ in offer.fragments] == [0, 1]


def test_first_tokens_that_end_the_choice_end_it():
    first = expected_tokens(PROMPT, 1)[0]
    stand = make_stand()
    key = stand.submit(1, Work.RESERVE, make_request(PROMPT, 6, stop=(first,)))
    stand.step()
    send(stand, stand.of_kind(GrantedEvent)[0], PROMPT)
    stand.scheduler.kv_arrived(key, (first, 3), 0.0)
    stand.take()
    assert stand.of_kind(EndedEvent) == [EndedEvent(key, 0, (first,), EndReason.STOP)]
    assert stand.pool.num_free == 64


def test_several_first_tokens_become_one_chunk():
    whole = expected_tokens(PROMPT, 9)
    stand = make_stand(reserve_tokens=0)
    key = stand.submit(1, Work.RESERVE, make_request(PROMPT, 9))
    stand.step()
    send(stand, stand.of_kind(GrantedEvent)[0], PROMPT)
    stand.scheduler.kv_arrived(key, tuple(whole[:5]), 0.0)
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert plan.num_tokens == 5
    stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
    stand.run()
    assert whole[6:] == stand.tokens[1]


def test_a_prefill_that_ends_at_its_first_token_says_so_and_keeps_offered_blocks_until_sent():
    first = expected_tokens(PROMPT, 1)[0]
    stand = make_stand(max_num_batched_tokens=6)
    key = stand.submit(1, Work.PREFILL, make_request(PROMPT, 6, stop=(first,)), sends_kv=True)
    stand.run()
    assert stand.ends[1] == EndReason.STOP
    assert stand.outcomes[-1].sent_tails[0].end is EndReason.STOP
    assert not stand.outcomes[-1].offers
    assert stand.pool.num_owned == 3
    stand.scheduler.kv_sent(key, 0.0)
    assert stand.pool.num_owned == 0


def test_a_prefill_without_a_grant_ends_at_its_one_token():
    stand = make_stand()
    stand.submit(1, Work.PREFILL, make_request(PROMPT, 1))
    stand.run()
    assert (stand.tokens[1], stand.ends[1]) == (expected_tokens(PROMPT, 1), EndReason.LENGTH)


def test_a_peer_that_refuses_early_ends_the_prefill():
    stand = make_stand(max_num_batched_tokens=4)
    key = stand.submit(1, Work.PREFILL, make_request(PROMPT, 6), sends_kv=True)
    stand.step()
    stand.scheduler.kv_sent(key, 0.0)
    stand.take()
    assert [event.code for event in stand.of_kind(RefusedEvent)] == [FailureCode.TRANSFER_FAILED]
    assert stand.pool.num_owned == 0
    assert stand.step() is None


def test_a_cancelled_reservation_is_quarantined_until_closed():
    stand = make_stand(num_blocks=8)
    key = stand.submit(1, Work.RESERVE, make_request(PROMPT, 9))
    stand.step()
    stand.scheduler.cancel(key, 0.0)
    assert (stand.pool.num_quarantined, stand.pool.num_owned) == (3, 0)
    stand.scheduler.check_integrity()
    again = stand.submit(1, Work.RESERVE, make_request(PROMPT, 9))
    assert again == key
    stand.step()
    assert len(stand.of_kind(GrantedEvent)) == 1
    stand.scheduler.kv_closed(key, 0.0)
    assert stand.pool.num_quarantined == 0
    stand.step()
    assert len(stand.of_kind(GrantedEvent)) == 2


def test_a_grant_that_nobody_saw_needs_no_quarantine():
    stand = make_stand()
    key = stand.submit(1, Work.RESERVE, make_request(PROMPT, 9))
    stand.scheduler.plan(0.0)
    stand.scheduler.cancel(key, 0.0)
    assert stand.scheduler.take_events() == []
    assert (stand.pool.num_quarantined, stand.pool.num_free) == (0, 64)


@pytest.mark.parametrize("call", ["kv_failed", "kv_closed"])
def test_a_failed_transfer_is_reported_once(call):
    stand = make_stand()
    key = stand.submit(1, Work.RESERVE, make_request(PROMPT, 9))
    stand.step()
    getattr(stand.scheduler, call)(key, 0.0)
    getattr(stand.scheduler, call)(key, 0.0)
    stand.take()
    assert [event.code for event in stand.of_kind(RefusedEvent)] == [FailureCode.TRANSFER_FAILED]
    assert stand.pool.num_free == 64


# --- memory pressure --------------------------------------------------------------------------------------------------


def test_preemption_by_recompute_loses_nothing():
    stand = make_stand(num_blocks=8, reserve_tokens=0, max_preemptions=2)
    prompts = {slot: [slot * 3 + i for i in range(6)] for slot in (1, 2, 3)}
    for slot, prompt in prompts.items():
        stand.submit(slot, Work.GENERATE, make_request(prompt, 18))
    stand.run()
    preempted = [event.key.slot for event in stand.of_kind(PreemptedEvent)]
    assert preempted
    assert 1 not in preempted
    assert max(preempted.count(slot) for slot in prompts) <= 2
    for slot, prompt in prompts.items():
        assert stand.tokens[slot] == expected_tokens(prompt, 18)
    assert len(stand.of_kind(StartedEvent)) == 3
    assert stand.pool.num_free == 8
    assert stand.scheduler.stats().preemptions == len(preempted)


def test_whoever_may_not_be_preempted_reserves_everything():
    stand = make_stand(num_blocks=8, reserve_tokens=0, max_preemptions=0)
    for slot in (1, 2):
        stand.submit(slot, Work.GENERATE, make_request([slot] * 6, 18))
    stand.run()
    assert not stand.of_kind(PreemptedEvent)
    assert len(stand.tokens[2]) == 18


def test_the_watermark_is_kept_for_those_running():
    stand = make_stand(num_blocks=10, reserve_tokens=0, watermark=0.3)
    stand.submit(1, Work.GENERATE, make_request([1] * 16, 2))
    stand.submit(2, Work.GENERATE, make_request([2] * 16, 2))
    stand.step()
    assert [event.key.slot for event in stand.of_kind(StartedEvent)] == [1]
    assert [(event.key.slot, event.position) for event in stand.of_kind(QueuedEvent)] == [(2, 0)]
    stand.run()
    assert stand.tokens[2] == expected_tokens([2] * 16, 2)


# --- queue ------------------------------------------------------------------------------------------------------------


def test_the_head_that_does_not_fit_blocks_those_behind_it():
    stand = make_stand(num_blocks=8)
    stand.submit(1, Work.GENERATE, make_request([1] * 8, 12))
    stand.submit(2, Work.GENERATE, make_request([2] * 20, 4))
    stand.submit(3, Work.GENERATE, make_request([3] * 2, 2))
    stand.step()
    assert [event.key.slot for event in stand.of_kind(StartedEvent)] == [1]
    stand.run()
    assert [event.key.slot for event in stand.of_kind(StartedEvent)] == [1, 2, 3]


def test_queue_full_draining_deadline_and_duplicates():
    stand = make_stand(max_num_seqs=1, max_waiting=1)
    request = make_request([1, 2], 30)
    stand.submit(1, Work.GENERATE, request)
    stand.step()
    stand.submit(1, Work.GENERATE, request)
    stand.submit(2, Work.GENERATE, make_request([1, 2], 4, queue_timeout_s=5.0))
    stand.submit(3, Work.GENERATE, request)
    (full,) = stand.of_kind(RefusedEvent)
    assert (full.key.slot, full.code) == (3, FailureCode.QUEUE_FULL)
    assert full.retry_after_s >= 1
    assert stand.scheduler.next_deadline == 5.0
    stand.step(now=4.9)
    stand.step(now=5.0)
    late = stand.of_kind(RefusedEvent)[-1]
    assert (late.key.slot, late.code) == (2, FailureCode.DEADLINE)
    assert stand.scheduler.next_deadline is None
    stand.scheduler.drain()
    stand.submit(4, Work.GENERATE, request)
    assert stand.of_kind(RefusedEvent)[-1].code is FailureCode.DRAINING
    assert stand.scheduler.stats().draining
    stand.run()
    assert len(stand.tokens[1]) == 30


def test_cancel_router_ends_all_its_work_and_only_that():
    stand = make_stand(max_num_seqs=2)
    keys = [SequenceKey(router, slot, 0) for slot, router in enumerate("aabb")]
    for key in keys:
        stand.scheduler.submit(key, Work.GENERATE, make_request([key.slot], 5), 0.0)
    stand.step()
    assert stand.scheduler.cancel_router("a", 0.0) == keys[:2]
    assert stand.scheduler.cancel_router("nobody", 0.0) == []
    stand.run()
    assert set(stand.ends) == {2, 3}
    assert stand.outcomes[-1].router_ids == ("a", "b")
    assert stand.pool.num_free == 64


def test_stats_count_what_is_left_to_prefill():
    stand = make_stand(max_num_batched_tokens=8, max_num_seqs=1)
    stand.submit(1, Work.GENERATE, make_request(list(range(20)), 5))
    stand.submit(2, Work.GENERATE, make_request([1] * 7, 5))
    assert stand.scheduler.stats().queued_prefill_tokens == 27
    stand.step()
    stats = stand.scheduler.stats()
    assert (stats.running, stats.waiting, stats.queued_prefill_tokens) == (1, 1, 19)
    assert stats.cached_blocks == 2
    assert stats.free_blocks == stand.pool.num_free == 64 - 6


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_failed_step_costs_its_own_sequences_only():
    stand = make_stand(max_num_seqs=2)
    for slot in (1, 2, 3):
        stand.submit(slot, Work.GENERATE, make_request([slot], 5))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    assert {key.slot for key in stand.scheduler.abort_step(plan, 0.0)} == {1, 2}
    stand.scheduler.check_integrity()
    stand.run()
    assert stand.tokens == {3: expected_tokens([3], 5)}
    assert stand.pool.num_free == 64


def test_a_commit_must_fit_its_plan():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(PROMPT, 5))
    plan = stand.scheduler.plan(0.0)
    assert plan is not None
    with pytest.raises(IntegrityError, match="0 tokens sampled for 1 rows"):
        stand.scheduler.commit(plan, StepResult(np.zeros(0, np.int32)), 0.0)
    result = stand.runner.run(plan)
    stand.scheduler.commit(plan, result, 0.0)
    with pytest.raises(IntegrityError, match="not the step under way"):
        stand.scheduler.commit(plan, result, 0.0)


def test_the_same_input_gives_the_same_plans():
    def plans():
        stand = make_stand(num_blocks=10, reserve_tokens=0)
        for slot in range(6):
            stand.submit(slot, Work.GENERATE, make_request([slot] * (slot + 3), 9))
        seen = []
        while (plan := stand.scheduler.plan(0.0)) is not None:
            seen.append((plan.slots.tolist(), plan.token_ids.tolist(), plan.block_tables.tolist()))
            stand.scheduler.commit(plan, stand.runner.run(plan), 0.0)
        return seen

    assert plans() == plans()


def test_what_failed_steps_would_have_computed_is_not_shared():
    stand = make_stand()
    stand.submit(1, Work.GENERATE, make_request(range(1, 14), 5))
    first = stand.scheduler.plan(0.0)
    second = stand.scheduler.plan(0.0)
    assert second.follows
    assert second.token_ids.tolist() == [-1]
    with pytest.raises(IntegrityError, match="2 are not committed"):
        stand.scheduler.plan(0.0)
    with pytest.raises(IntegrityError, match="not the step that was planned last"):
        stand.scheduler.abort_step(first, 0.0)
    assert [key.slot for key in stand.scheduler.abort_step(second, 0.0)] == [1]
    assert stand.pool.num_free < 64, "the first step still computes the row"
    assert not stand.scheduler.abort_step(first, 0.0)
    stand.scheduler.check_integrity()
    assert (stand.pool.num_free, len(stand.cache)) == (64, 0)


def test_tokens_that_edits_depend_on_are_waited_for():
    for sampling, waits in (
        ({"presence_penalty": 1.0}, True),
        ({"bad_words": ((1, 2),)}, True),
        ({"min_p": 0.1}, False),
    ):
        stand = make_stand()
        stand.submit(1, Work.GENERATE, make_request(PROMPT, sampling=SamplingParams(5, **sampling)))
        first = stand.scheduler.plan(0.0)
        assert (stand.scheduler.plan(0.0) is None) == waits
        assert stand.scheduler.commit(first, stand.runner.run(first), 0.0).tokens.tolist() == expected_tokens(PROMPT, 1)
