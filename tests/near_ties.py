"""Comparing answers of the engine: bfloat16 logits are rounded by how, and beside whom, they are
computed, so two greedy answers may part where the two likeliest tokens are all but tied."""

from qlorachat import FinishReason, Reply

# natural-log probability; bench/parity.py measured at most 0.25 where answers parted
NEAR_TIE = 0.5
LOGPROBS = 2  # what a request has to ask for to be compared


def assert_same(mine: Reply, theirs: Reply) -> None:
    """Equal tokens with log-probabilities close to each other, up to a near-tie."""
    assert mine.logprobs
    assert theirs.logprobs
    for ours, others in zip(mine.logprobs, theirs.logprobs, strict=False):
        if ours.token != others.token:
            assert others.top[0][1] - others.top[1][1] < NEAR_TIE
            return
        assert abs(ours.logprob - others.logprob) < NEAR_TIE
    if len(mine.logprobs) == len(theirs.logprobs):
        assert mine.text == theirs.text
        return
    shorter, longer = sorted((mine, theirs), key=lambda reply: len(reply.logprobs or ()))
    assert shorter.finish_reason is FinishReason.STOP
    assert longer.text.startswith(shorter.text)
    assert shorter.logprobs is not None
    assert longer.logprobs is not None
    (_, chosen), (text, stop) = longer.logprobs[len(shorter.logprobs)].top[:2]
    assert not text  # the other's choice: a stop has none
    assert chosen - stop < NEAR_TIE
