"""Tests of the documents: their links are valid, and the commands and configs that they name exist."""

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from rnncodec import __version__, cli
from rnncodec.arguments import command_line

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
DOCUMENTS = [ROOT / line for line in LISTED.stdout.splitlines()] or [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
LONGEST = {"README.md": 200, "rnncodec/pretrained/small.md": 90}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(path):
    """The lines of a document that are not code, without what is code in them."""
    lines, fenced = [], False
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            lines.append(line)
    return re.sub(r"`[^`]*`", "", "\n".join(lines))


def code(path):
    """Blocks of code line by line, with their continuations, and what is code within the text."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return blocks, re.findall(r"`([^`]+)`", re.sub(r"^(```| {4}).*$", "", text, flags=re.MULTILINE))


def links(text):
    """Targets of links and pictures that lie beside the document."""
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    return [target for target in found if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors(path):
    """What a link may name after #: every heading in lower case, without punctuation, with hyphens for spaces."""
    fenced, seen, result = False, Counter(), set()
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and (heading := re.match(r"#{1,6} +(.*?) *#*$", line)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return result


def lost(path):
    """Links of a document that lead nowhere."""
    missing = []
    for target in links(prose(path)):
        name, _, anchor = unquote(target).partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and (place.suffix != ".md" or anchor not in anchors(place))):
            missing.append(target)
    return missing


@each_document
def test_links_lead_somewhere(path):
    assert lost(path) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# The `b` of it: all\n\n## Two\n\n## Two\n\n```\n# code\n```\n")
    path = tmp_path / "a.md"
    path.write_text(
        "# A\n\n[b](b.md) ![c](c.png) [b](b.md#the-b-of-it-all) [`b`](b.md#two-1) [b](b.md#two-2) [b](b.md#code)\n"
        "[a](#a) [a](#b) `[code](code.md)` [web](https://example.org/x.md) [d][d]\n\n    [code](code.md)\n\n[d]: d.md\n"
    )
    assert lost(path) == ["c.png", "b.md#two-2", "b.md#code", "#b", "d.md"]


@pytest.mark.parametrize("name", LONGEST)
def test_what_is_read_first_is_short(name):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= LONGEST[name]


@each_document
def test_commands_and_configs_that_are_named_exist(path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = set(re.findall(r"^ {4}([a-z]+) ", capsys.readouterr().out, re.MULTILINE))
    assert {"encode", "decode", "train"} <= commands
    blocks, inline = code(path)
    text = "\n".join([*blocks, *inline])
    assert set(re.findall(r"\brnncodec ([a-z]+)\b", text)) <= commands
    named = re.findall(r"\bpython (\S+\.py)\b", text) + re.findall(r"\bconfigs/\w+\.yaml", text)
    named += [f"configs/{name}.yaml" for name in re.findall(r"--config (\w+)(?![\w./])", text)]
    assert [name for name in named if not (ROOT / name).is_file()] == []
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|\n)make (\w+)", text)) <= set(rules)


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    unreleased, latest, *_ = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == __version__
    assert unreleased == "Unreleased"
    assert re.fullmatch(re.escape(__version__) + r", \d{4}-\d\d-\d\d", latest)


def test_the_readme_says_how_to_call_the_command_line():
    blocks, _ = code(ROOT / "README.md")
    calls = [shlex.split(line, comments=True)[1:] for line in blocks if line.startswith("rnncodec ")]
    calls = [call for call in calls if call[0] not in cli.ROOMS]
    assert len(calls) > 5
    for call in calls:
        command_line("").parse_args(call)  # or it exits
