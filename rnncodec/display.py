"""Shows what is in a file, and the scores of codecs that people rated, as text or as JSON."""

import json
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rnncodec.console import printable
from rnncodec.files import format
from rnncodec.files.records import unpack

if TYPE_CHECKING:
    from rnncodec.rating import Summary


def show_file(source: str, data: bytes, as_json: bool) -> None:
    """Prints the header of a file, and which iterations are complete."""
    file = format.read(data, max_pixels=2**32)
    header, found, records = file.header, len(file.payloads), unpack(file.records)
    there, whole = found / header.parts, len(header.entries) / header.parts
    sizes, bpp = header.sizes, header.bpp
    rows = [(end, sizes[end - 1], bpp[end - 1]) for end in header.ends]
    entries = [header.entries[start:end] for start, end in pairwise((0, *header.ends))]
    codings = [max(entry.coding for entry in own) for own in entries]
    if as_json:
        document = {
            "file": source,
            "version": header.version,
            "bytes": len(data),
            "width": header.width,
            "height": header.height,
            "weights": header.weights,
            "fingerprint": header.fingerprint.hex(),
            "complete": found // header.parts,
            "context": header.context.hex(),
            "parts": header.parts,
            "maps": header.maps,
            "records": {kind: len(value) for kind, value in records.items()},
            "records_bytes": header.records.length if header.records else 0,
            "iterations": [
                {"iteration": t, "bytes": size, "bpp": rate, "coding": coding}
                for t, ((_, size, rate), coding) in enumerate(zip(rows, codings, strict=True), 1)
            ],
            "sizes": sizes,
        }
        print(json.dumps(document))
        return
    print(f"{printable(source)}: {header.width}x{header.height}, {len(data)} bytes, version {header.version}")
    print(f"weights {header.weights} ({header.fingerprint.hex()}), {there:g} of {whole:g} iterations complete")
    if header.parts > 1 or header.maps:
        maps = ", locations stop where the picture needs no more" if header.maps else ""
        print(f"can be cut after {len(header.entries)} payloads, {header.parts} of each iteration{maps}")
    if header.records:
        listed = ", ".join(f"{kind.strip()} {len(value)} bytes" for kind, value in records.items()) or "missing"
        print(f"records {listed}; {header.records.length} bytes in the file")
    table = Table("iteration", "bytes", "bpp", "payload", "")
    for column in table.columns[:4]:
        column.justify = "right"
    for t, ((end, size, rate), coding, own) in enumerate(zip(rows, codings, entries, strict=True), 1):
        length = sum(entry.length for entry in own)
        payload = "raw" if coding == format.RAW else f"{length / (header.raw_length * len(own)):.1%}"
        missing = "" if end <= found else "missing" if end - len(own) >= found else "cut"
        table.add_row(str(t), str(size), f"{rate:.4f}", payload, missing)
    Console(highlight=False).print(table)


def show_scores(summary: "Summary", as_json: bool) -> None:
    """Prints the scores of codecs at each rate, and how reliable the raters were."""
    if as_json:
        print(json.dumps(asdict(summary)))
        return
    table = Table("bpp", "codec", "score", "95 % interval", "beats the average", "votes")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for score in summary.scores:
        interval = f"{score.low:+.2f} to {score.high:+.2f}"
        numbers = f"{score.score:+.2f}", interval, f"{score.probability:.1%}", str(score.votes)
        table.add_row(f"{score.rate:g}", Text(printable(score.codec)), *numbers)
    Console(highlight=False).print(table)

    def share(part: int, total: int) -> str:
        return f"{part} of {total}" + (f" ({part / total:.0%})" if total else "")

    print(f"{summary.votes} votes of {summary.raters} raters; excluded for wrong checks: {summary.excluded}")
    print(f"checks right: {share(summary.right, summary.checks)}; undone votes: {summary.undone}")
    print(f"repeats answered as the first time: {share(summary.consistent, summary.repeats)}")
