"""Comparing answers of the engine: bfloat16 logits are rounded by how, and beside whom, they are
computed, so two greedy answers may part where the two likeliest tokens are all but tied."""

from qlorachat import Reply

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
    shorter, longer = sorted((mine.logprobs, theirs.logprobs), key=len)
    if len(shorter) < len(longer):  # a stop, which has no text, where the other went on
        (_, chosen), (text, stop) = longer[len(shorter)].top[:2]
        assert not text
        assert chosen - stop < NEAR_TIE
        return
    assert mine.text == theirs.text
