"""Who is answered when, and who is refused: against a policy that says when it is done."""

import asyncio
import threading
import time

import pytest

from openvla.serve.batching import Batcher, Busy, Failed, Stale, Superseded, TimedOut, Turn, Unfit
from openvla.serve.safety import Forbidden


class Policy:
    """Answers with what it was asked; waits while `busy` is set; raises what an observation holds."""

    def __init__(self):
        self.batches, self.free = [], threading.Event()
        self.free.set()

    def __call__(self, observations: list[dict]) -> list[dict]:
        self.batches.append([each["number"] for each in observations])
        assert self.free.wait(10)
        for each in observations:
            if "raises" in each:
                raise each["raises"]
        return [{"answer": each["number"]} for each in observations]


@pytest.fixture
def policy():
    return Policy()


def run(policy, script, **options):
    """Of a coroutine `script(batcher)`."""

    async def main():
        batcher = Batcher(policy, **options)
        try:
            return await asyncio.wait_for(script(batcher), 20)
        finally:
            policy.free.set()
            batcher.stop()

    return asyncio.run(main())


async def occupy(batcher, policy, **options):
    """The policy is busy with number 0."""
    policy.free.clear()
    first = asyncio.create_task(batcher.infer({"number": 0}, Turn(**options)))
    while not policy.batches:
        await asyncio.sleep(0.001)
    return first


async def outcome(task) -> object:
    try:
        return (await task)["answer"]
    except Exception as error:
        return type(error)


def test_who_waits_together_is_answered_together(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        others = [asyncio.create_task(batcher.infer({"number": number}, Turn())) for number in range(1, 6)]
        await asyncio.sleep(0)
        policy.free.set()
        return [(await task)["answer"] for task in (first, *others)]

    assert run(policy, script, max_batch=4) == [0, 1, 2, 3, 4, 5]
    assert policy.batches == [[0], [1, 2, 3, 4], [5]]


def test_the_first_waits_for_others(policy):
    async def script(batcher):
        first = asyncio.create_task(batcher.infer({"number": 0}, Turn()))
        await asyncio.sleep(0.05)
        return [(await task)["answer"] for task in (first, asyncio.create_task(batcher.infer({"number": 1}, Turn())))]

    assert run(policy, script, max_batch=2, max_wait=5.0) == [0, 1]
    assert policy.batches == [[0, 1]]  # and not after five seconds


def test_the_newest_of_a_session_wins(policy):
    async def script(batcher):
        first = await occupy(batcher, policy, session="arm")
        sessions = ["arm", "arm", "other", "arm"]
        later = [
            asyncio.create_task(batcher.infer({"number": number}, Turn(session=session)))
            for number, session in enumerate(sessions, 1)
        ]
        await asyncio.sleep(0)
        policy.free.set()
        return [await outcome(task) for task in (first, *later)]

    assert run(policy, script) == [0, Superseded, Superseded, 3, 4]


def test_the_newest_of_a_session_wins_whichever_was_decoded_first(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        now = time.monotonic()
        later = [
            asyncio.create_task(batcher.infer({"number": number}, Turn(now + number, session="arm")))
            for number in (3, 1, 2)
        ]
        await asyncio.sleep(0)
        policy.free.set()
        return [await outcome(task) for task in (first, *later)]

    assert run(policy, script) == [0, 3, Superseded, Superseded]


def test_a_batch_that_never_ends_is_a_problem(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        told = [batcher.problem]
        await asyncio.sleep(0.1)
        told.append(batcher.problem)
        policy.free.set()
        await outcome(first)
        await asyncio.sleep(0.05)
        return [*told, batcher.problem]

    before, late, after = run(policy, script, timeout=0.05)
    assert before is None and after is None and "busy with one batch" in late


def test_the_queue_is_bounded(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        later = [asyncio.create_task(batcher.infer({"number": number}, Turn())) for number in range(1, 5)]
        await asyncio.sleep(0)
        policy.free.set()
        return [await outcome(task) for task in (first, *later)]

    assert run(policy, script, max_queue=2) == [0, 1, 2, Busy, Busy]


def test_what_is_old_gets_no_action(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        ages = [{"max_age": 0.02}, {"max_age": 5.0}, {"age": 9.0, "max_age": 5.0}, {"age": 9.0}]
        later = [asyncio.create_task(batcher.infer({"number": n}, Turn(**age))) for n, age in enumerate(ages, 1)]
        await asyncio.sleep(0.05)
        policy.free.set()
        return [await outcome(task) for task in (first, *later)]

    assert run(policy, script) == [0, Stale, 2, Stale, 4]
    assert policy.batches == [[0], [2, 4]]


def test_no_answer_in_time(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        second = asyncio.create_task(batcher.infer({"number": 1}, Turn()))
        found = [await outcome(first), await outcome(second)]
        policy.free.set()
        return [*found, (await batcher.infer({"number": 2}, Turn()))["answer"]]

    assert run(policy, script, timeout=0.1) == [TimedOut, TimedOut, 2]
    assert policy.batches == [[0], [2]]  # what nobody waits for is not asked


@pytest.mark.parametrize(
    "error, refusal, words",
    [
        (ValueError("no picture"), Unfit, "no picture"),
        (Forbidden("x beyond 1"), Failed, "x beyond 1"),
        (RuntimeError("secret path"), Failed, "the server's log"),
        (MemoryError(), Failed, "the server's log"),
    ],
)
def test_one_that_fails_does_not_spoil_the_others(policy, error, refusal, words):
    async def script(batcher):
        first = await occupy(batcher, policy)
        asked = [{"number": 1}, {"number": 2, "raises": error}, {"number": 3}]
        later = [asyncio.create_task(batcher.infer(each, Turn())) for each in asked]
        await asyncio.sleep(0)
        policy.free.set()
        with pytest.raises(refusal, match=words) as raised:
            await later[1]
        assert "secret" not in str(raised.value)
        return [await outcome(task) for task in (first, later[0], later[2])]

    assert run(policy, script) == [0, 1, 3]
    assert policy.batches == [[0], [1, 2, 3], [1], [2], [3]]


def test_a_client_that_leaves_is_not_answered(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        gone = asyncio.create_task(batcher.infer({"number": 1}, Turn()))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0.01)
        waiting = len(batcher.waiting)
        policy.free.set()
        return await outcome(first), waiting

    assert run(policy, script) == (0, 0)
    assert policy.batches == [[0]]


def test_sizes_and_times_are_told(policy):
    told = []

    async def script(batcher):
        await batcher.infer({"number": 0}, Turn())

    start = time.perf_counter()
    run(policy, script, on_batch=lambda size, seconds: told.append((size, seconds)))
    assert [size for size, _ in told] == [1] and 0 <= told[0][1] < time.perf_counter() - start


def test_an_older_one_of_a_session_that_took_longer_to_decode(policy):
    async def script(batcher):
        older, newer = Turn(session="arm"), Turn(session="arm")
        found = [(await batcher.infer({"number": 1}, newer))["answer"]]
        return [*found, await outcome(batcher.infer({"number": 2}, older))]

    assert run(policy, script) == [1, Superseded]


def test_time_runs_from_the_arrival(policy):
    async def script(batcher):
        late = Turn(arrived=time.monotonic() - 3)
        old = Turn(arrived=time.monotonic() - 3, max_age=2.0)
        return [await outcome(batcher.infer({"number": n}, turn)) for n, turn in enumerate((late, old, Turn()))]

    assert run(policy, script, timeout=2.0) == [TimedOut, TimedOut, 2]
    assert run(policy, script, timeout=9.0) == [0, Stale, 2]


def test_after_a_failure_in_company_age_counts_again(policy):
    def slow(observations):
        time.sleep(0.1)
        return policy(observations)

    async def script(batcher):
        first = await occupy(batcher, policy)
        asked = [
            ({"number": 1, "raises": ValueError("x")}, {}),
            ({"number": 2}, {"max_age": 0.15}),
            ({"number": 3}, {}),
        ]
        later = [asyncio.create_task(batcher.infer(each, Turn(**told))) for each, told in asked]
        await asyncio.sleep(0)
        policy.free.set()
        return [await outcome(task) for task in (first, *later)]

    slow.free = policy.free
    assert run(slow, script) == [0, Unfit, Stale, 3]


def test_refusals_that_the_policy_returns(policy):
    async def script(batcher):
        return await outcome(batcher.infer({"number": 0}, Turn())), await outcome(batcher.infer({"number": 1}, Turn()))

    def answers(observations):
        return [Forbidden("x") if each["number"] else {"answer": 0} for each in observations]

    answers.free = threading.Event()
    assert run(answers, script) == (0, Failed)


def test_what_the_policy_has_is_refused_when_the_server_stops(policy):
    async def script(batcher):
        first = await occupy(batcher, policy)
        batcher.stop()
        return await outcome(first)

    assert run(policy, script) is Busy
