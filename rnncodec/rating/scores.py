"""Computes from votes the strength of each codec at each rate, and how reliable the raters are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnncodec.rating.votes import Vote

HONEST = 0.8  # raters with a smaller share of right checks are left out
VIRTUAL = 0.5  # wins of each codec over each other: Jeffreys' prior of the probability to win
RESAMPLES = 4000  # of a bootstrap interval
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """The score of a codec at a rate.

    Attributes:
        rate: target in bits per pixel.
        codec: name of the codec.
        score: Bradley-Terry strength in natural logarithms; 0 is the average of the codecs at this rate.
        low: lower end of the 95 % interval of the score.
        high: upper end.
        probability: to win against an average codec, 0 to 1.
        votes: number of votes it took part in.
    """

    rate: float
    codec: str
    score: float
    low: float
    high: float
    probability: float
    votes: int


@dataclass(frozen=True)
class Summary:
    """The scores, and how reliable the raters are.

    Attributes:
        raters: how many voted and were not excluded.
        excluded: how many were excluded, for too many wrong checks.
        votes: votes behind the scores, on comparisons shown for the first time, by raters not excluded.
        undone: votes taken back, which count nowhere.
        checks: checks answered, by all raters.
        right: how many of these were answered correctly.
        repeats: repeats answered, by raters not excluded.
        consistent: how many of these were answered as the first time.
        scores: by rate, best first.
    """

    raters: int
    excluded: int
    votes: int
    undone: int
    checks: int
    right: int
    repeats: int
    consistent: int
    scores: list[Score]


def bradley_terry(wins: np.ndarray, virtual: np.ndarray | float = VIRTUAL) -> np.ndarray:
    """Strengths of codecs by maximum likelihood, where P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    The likelihood has a finite maximum only if every codec lost to every other, directly or through others, as virtual
    votes ensure. The maximum is found by Newton's method, because the simpler MM algorithm takes thousands of steps if
    a codec nearly always wins.

    Args:
        wins: [..., K, K], how often i was preferred to j; the diagonal is not used.
        virtual: is added to `wins`, a positive number or array.

    Returns:
        float [..., K], in natural logarithms, of mean 0.

    Source: Bradley and Terry, Rank analysis of incomplete block designs, Biometrika 39 (1952); Hunter, MM algorithms
    for generalized Bradley-Terry models, Annals of Statistics 32 (2004), for existence and uniqueness.
    """
    eye = np.eye(wins.shape[-1])
    wins = (wins + virtual) * (1 - eye)
    games, won = wins + wins.swapaxes(-1, -2), wins.sum(-1)
    scores = np.zeros(won.shape)
    for _ in range(200):
        p = _logistic(scores[..., :, None] - scores[..., None, :])
        gradient = won - (games * p).sum(-1)
        curvature = games * p * (1 - p)
        hessian = eye * curvature.sum(-1)[..., None] - curvature
        step = np.linalg.solve(hessian[..., 1:, 1:], gradient[..., 1:, None])[..., 0]  # the first score stays 0
        size = np.abs(step).max(-1, keepdims=True)
        scores[..., 1:] += step / np.maximum(size, 1)  # a longer step might overshoot
        if size.max() < 1e-9:
            break
    return scores - scores.mean(-1, keepdims=True)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)  # does not overflow


def bootstrap(wins: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the strengths by the Bayesian bootstrap, which are honest even if all votes agree.

    Raters get random weights, because the votes of one rater are not independent; if there is only one, votes get them.
    So do the virtual votes: n independent votes on two codecs, w of them for the first, thus leave its probability to
    win distributed as Beta(w + 1/2, n - w + 1/2), the posterior of Jeffreys' prior.

    Args:
        wins: integers [R, K, K], how often each rater preferred i to j.
        seed: of the weights.

    Returns:
        Lower and upper ends, float [K] each.

    Source: Rubin, The Bayesian bootstrap, Annals of Statistics 9 (1981); Newton and Raftery, Approximate Bayesian
    inference with the weighted likelihood bootstrap, Journal of the Royal Statistical Society B 56 (1994).
    """
    rng = np.random.default_rng(seed)
    size = RESAMPLES, *wins[0].shape
    if len(wins) > 1:
        samples = np.tensordot(rng.standard_exponential((RESAMPLES, len(wins))), wins, 1)
    else:
        samples = rng.standard_gamma(wins[0], size)  # the sum of as many exponential weights as there are votes
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(bradley_terry(samples, rng.standard_gamma(VIRTUAL, size)), (tail, 1 - tail), axis=0)
    return low, high


def summarize(votes: Sequence[Vote], seed: int = 0) -> Summary:
    """Scores of every codec at every rate."""
    valid = [vote for vote in votes if vote.undone is None]
    checks: dict[str, list[bool]] = {}
    for vote in valid:
        if vote.kind == "check":
            checks.setdefault(vote.rater, []).append(preferred(vote) == "original")
    excluded = {rater for rater, right in checks.items() if sum(right) < HONEST * len(right)}
    trusted = [vote for vote in valid if vote.rater not in excluded]
    normal = [vote for vote in trusted if vote.kind == "normal"]
    first = {(vote.rater, compared(vote)): preferred(vote) for vote in normal}
    again = [
        first[key] == preferred(vote)
        for vote in trusted
        if vote.kind == "repeat" and (key := (vote.rater, compared(vote))) in first
    ]
    scores = []
    for rate in sorted({vote.rate for vote in normal if vote.rate is not None}):
        here = [vote for vote in normal if vote.rate == rate]
        codecs = sorted({codec for vote in here for codec in (vote.left_codec, vote.right_codec)})
        raters = sorted({vote.rater for vote in here})
        wins = np.zeros((len(raters), len(codecs), len(codecs)), dtype=np.int64)
        for vote in here:
            left, right = codecs.index(vote.left_codec), codecs.index(vote.right_codec)
            pair = (left, right) if vote.choice == "left" else (right, left)
            wins[raters.index(vote.rater), *pair] += 1
        total = wins.sum(0)
        strengths = bradley_terry(total)
        columns = strengths, *bootstrap(wins, seed), _logistic(strengths), total.sum(0) + total.sum(1)
        rows = [Score(rate, codec, *(column[i].item() for column in columns)) for i, codec in enumerate(codecs)]
        scores += sorted(rows, key=lambda row: -row.score)
    return Summary(
        raters=len({vote.rater for vote in trusted}),
        excluded=len(excluded),
        votes=len(normal),
        undone=len(votes) - len(valid),
        checks=sum(map(len, checks.values())),
        right=sum(map(sum, checks.values())),
        repeats=len(again),
        consistent=sum(again),
        scores=scores,
    )


def preferred(vote: Vote) -> str:
    """The codec that was called closer to the original."""
    return vote.left_codec if vote.choice == "left" else vote.right_codec


def compared(vote: Vote) -> tuple[str, float | None, frozenset[tuple[str, float]]]:
    """What a vote compares, regardless of the sides."""
    sides = (vote.left_codec, vote.left_setting), (vote.right_codec, vote.right_setting)
    return vote.image, vote.rate, frozenset(sides)
