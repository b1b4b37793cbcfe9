"""Makes the session of an entropy coder by its name."""

from rnncodec.entropy.classical import CLASSICAL
from rnncodec.entropy.coders import ContextSession, PartsSession
from rnncodec.entropy.context import ContextModel
from rnncodec.entropy.grouped import Questions
from rnncodec.entropy.ranges import Session
from rnncodec.files.codings import EntropyName


def new_session(
    entropy: EntropyName,
    shape: tuple[int, int, int],
    context: ContextModel | None = None,
    questions: Questions | None = None,
    parts: int = 1,
    maps: bool = False,
) -> Session:
    """A new session.

    Args:
        entropy: the coder.
        shape: bits, rows and columns of an iteration.
        context: the exact context model, which the coder `context` needs.
        questions: those that the bits answer, if the context model is of the kind `grouped`.
        parts: payloads of an iteration.
        maps: whether locations may stop.

    Raises:
        ValueError: there is no such coder, or it cannot code parts or stops.
        FormatError: the parts do not divide the groups of the context model.
    """
    if entropy not in ("context", *CLASSICAL) or (entropy == "context" and context is None):
        raise ValueError(f"entropy is one of context, {', '.join(CLASSICAL)}, not {entropy!r}")
    if parts == 1 and not maps:
        if context is None or entropy in CLASSICAL:
            return CLASSICAL[entropy](*shape)
        return ContextSession(context, *shape, questions)
    if questions is None or context is None or entropy != "context":
        raise ValueError("stop maps and parts of iterations need a context model of the kind grouped")
    return PartsSession(context, *shape, questions, parts, maps)
