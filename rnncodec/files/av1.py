"""Reads the color that an AV1 stream states in its sequence header, section 5.5 of the AV1 specification."""

SEQUENCE_HEADER = 1  # a type of OBU
MAX_HEADER = 512  # bytes, more than all fields together
MAX_SIZE = 8  # bytes of the size of an OBU


class _Bits:
    """The bits of a sequence of bytes, the highest first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def take(self, count: int) -> int:
        """The number in the next bits.

        Raises:
            EOFError: there are not so many.
        """
        if count > self._left:
            raise EOFError
        self._left -= count
        return self._value >> self._left & (1 << count) - 1


def code_points(stream: bytes) -> tuple[int, int] | None:
    """Primaries and transfer (CICP) by the first sequence header in the start of a stream; None if there is none."""
    try:
        while stream:
            kind, stream, following = _split(stream)
            if kind == SEQUENCE_HEADER:
                return _color(_Bits(stream[:MAX_HEADER]))
            stream = following
    except EOFError:
        pass
    return None


def _split(stream: bytes) -> tuple[int, bytes, bytes]:
    """The type and the content of the first OBU, and what follows it."""
    kind, extended, sized = stream[0] >> 3 & 15, stream[0] & 4, stream[0] & 2
    start, size = 2 if extended else 1, 0
    if not sized:
        return kind, stream[start:], b""
    for place, byte in enumerate(stream[start : start + MAX_SIZE]):
        size |= (byte & 127) << 7 * place
        if byte < 128:
            start += place + 1
            return kind, stream[start : start + size], stream[start + size :]
    raise EOFError


def _color(bits: _Bits) -> tuple[int, int]:
    """Primaries and transfer by the content of a sequence header."""
    take = bits.take
    profile = take(3)
    take(1)  # still picture
    reduced = take(1)
    if reduced:
        take(5)  # level
    else:
        _skip_operating_points(bits)
    sides = take(4) + 1, take(4) + 1
    take(sum(sides))
    if not reduced and take(1):  # numbers of frames
        take(7)
    take(3)  # superblocks of 128 pixels, intra filters
    if not reduced:
        take(4)  # compound prediction, warped motion, dual filters
        order_hint = take(1)
        if order_hint:
            take(2)  # of compound prediction, of motion vectors
        screen_content = take(1) or take(1)  # chosen for each frame, or for all
        if screen_content and not take(1):
            take(1)  # whole motion vectors
        if order_hint:
            take(3)  # bits of it
    take(3)  # superresolution, two filters
    high_depth = take(1)
    if profile == 2 and high_depth:
        take(1)  # 12 bits
    if profile != 1:
        take(1)  # gray
    return (take(8), take(8)) if take(1) else (2, 2)  # unspecified


def _skip_operating_points(bits: _Bits) -> None:
    """Reads what only videos have: timing, and the layers that can be decoded."""
    take = bits.take
    delay_bits = None
    if take(1):  # timing
        take(64)
        if take(1):  # pictures in equal distance, which is a number of variable length
            zeros = 0
            while not take(1):
                zeros += 1
            take(zeros)
        if take(1):  # model of the decoder
            delay_bits = take(5) + 1
            take(32 + 5 + 5)
    has_display_delay = take(1)
    for _ in range(take(5) + 1):
        take(12)
        if take(5) > 7:  # level
            take(1)  # tier
        if delay_bits and take(1):
            take(2 * delay_bits + 1)
        if has_display_delay and take(1):
            take(4)
