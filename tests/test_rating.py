"""Tests of rating by people: matching, order of trials, storage, model, server and page."""

import base64
import csv
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import astuple, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize
from scipy.special import logit
from scipy.stats import beta, f

from rnncodec.cli import main
from rnncodec.metrics.curves import Point, read_points, to_csv
from rnncodec.rating import Server, Study, Vote, Votes, bootstrap, bradley_terry, match, summarize
from rnncodec.rating.votes import SCHEMA

RATES = (0.25, 0.5, 1.0)
ADA, BOB = "a" * 32, "b" * 32
COLUMNS = [field.name for field in fields(Point)]

# Codec, setting, bytes, PSNR and suffix of what each image is coded to; 64x64 pixels, so 128 bytes are 0.25 bpp.
CODED = (
    ("rnncodec-small", 1, 64, 18.0, ""),  # no picture was saved
    ("rnncodec-small", 2, 128, 22.0, "png"),
    ("rnncodec-small", 4, 256, 25.0, "png"),
    ("rnncodec-small", 8, 512, 28.0, "png"),
    ("jpeg", 10, 121, 19.0, "jpg"),  # 5.5 % from 128, and the worst of all
    ("jpeg", 12, 130, 21.5, "jpg"),
    ("jpeg", 14, 133, 21.7, "jpg"),  # within 5 %, but farther than 130
    ("jpeg", 30, 256, 25.5, "jpg"),
    ("jpeg", 80, 600, 29.0, "jpg"),
    ("webp", 5, 134, 23.0, "webp"),
    ("webp", 20, 300, 26.0, "webp"),
    ("webp", 60, 500, 29.5, "webp"),
    ("png", 9, 9000, np.inf, "png"),
)
# What can be compared: (rate, codec, setting, codec, setting).
EXPECTED = {
    (0.25, "jpeg", 12, "rnncodec-small", 2),
    (0.25, "jpeg", 12, "webp", 5),
    (0.25, "rnncodec-small", 2, "webp", 5),
    (0.5, "jpeg", 30, "rnncodec-small", 4),
    (1.0, "rnncodec-small", 8, "webp", 60),
}


def make_results(folder, images, rows=1, columns=1):
    """What evaluate.py leaves, as far as rating reads it; pictures of 64x64 blocks of so many pixels."""
    rng = np.random.default_rng(0)
    points = []
    for image in images:
        place = folder / "pictures" / image
        place.mkdir(parents=True)
        x = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8).repeat(rows, 0).repeat(columns, 1)
        Image.fromarray(x).save(place / "original.png")
        for codec, setting, size, psnr, suffix in CODED:
            picture = f"pictures/{image}/{codec}-{setting}.{suffix}" if suffix else ""
            if suffix:
                Image.fromarray(x // 8 * 8 + len(codec) % 8).save(folder / picture)
            points.append(Point(image, codec, setting, size, size / 512, psnr=psnr, picture=picture))
    (folder / "points.csv").write_text(to_csv(points))
    return folder


def write_points(folder, rows):
    with open(folder / "points.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def read_rows(folder):
    with open(folder / "points.csv", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="session")
def four_images(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("results"), ["lake", "market", "tower", "wharf"])


@pytest.fixture
def results(four_images, tmp_path):
    return Path(shutil.copytree(four_images, tmp_path / "results"))


@pytest.fixture(scope="session")
def study(four_images):
    return Study(four_images, RATES)


@pytest.fixture(scope="session")
def large_study(tmp_path_factory):
    return Study(make_results(tmp_path_factory.mktemp("large"), [f"image{i}" for i in range(20)]), RATES)


def rows_of(path):
    """The database as SQLite alone sees it."""
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM votes ORDER BY rowid")]


@pytest.fixture
def not_serving(monkeypatch):
    """If the command serves where it should fail, it ends at once."""

    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupt)


# What is compared


def test_matched_bytes(four_images):
    comparisons = match([point for point in read_points(four_images) if point.picture], RATES)
    for image in ("lake", "market", "tower", "wharf"):
        found = {
            (c.rate, c.first.codec, c.first.setting, c.second.codec, c.second.setting)
            for c in comparisons
            if c.image == image
        }
        assert found == EXPECTED
    assert len(comparisons) == 4 * len(EXPECTED)


def points(*sizes):
    """Reconstructions of an image of 8000 pixels, so that a byte is 0.001 bpp."""
    return [Point("x", codec, size, size, size / 1000, psnr=20, picture=f"{codec}{size}.png") for codec, size in sizes]


def sizes_at(comparisons):
    return {(c.rate, c.first.bytes, c.second.bytes) for c in comparisons}


def test_matching_rule():
    own = [("rnncodec-small", size) for size in (200, 400, 800)]
    for size, matched in ((210, True), (190, True), (211, False), (189, False)):
        if matched:
            assert sizes_at(match(points(*own, ("jpeg", size)), [0.2])) == {(0.2, size, 200)}
        else:
            with pytest.raises(ValueError, match="within 5%"):
                match(points(*own, ("jpeg", size)), [0.2])
    everything = points(*own, ("jpeg", 402), ("jpeg", 395), ("jpeg", 800))
    assert sizes_at(match(everything, [0.53])) == {(0.53, 402, 400)}
    # What is far from the target does not go by its name.
    for rate in (0.15, 0.55, 1.1, 100):
        with pytest.raises(ValueError, match=f"near {rate:g} bpp"):
            match(everything, [rate])
    # One reconstruction is not rated twice: 0.8 is the nearest to both targets, and nearer to 1.
    assert sizes_at(match(everything, [0.4, 1.0, 4.0])) == {(0.4, 402, 400), (1.0, 800, 800)}
    # Codecs that match are compared among themselves too, and only within an image.
    three = points(*own, ("jpeg", 402), ("webp", 398))
    assert sizes_at(match(three, [0.4])) == {(0.4, 402, 400), (0.4, 402, 398), (0.4, 400, 398)}
    other = [replace(point, image="y") for point in points(("jpeg", 200))]
    assert sizes_at(match(three + other, [0.4])) == sizes_at(match(three, [0.4]))


def test_nothing_to_compare(results, not_serving, capsys):
    rows = read_rows(results)
    no_pictures = [[*row[:-1], ""] for row in rows]
    only = {name: [row for row in rows if row[1] == name] for name in ("jpeg", "rnncodec-small")}
    for given, said in (
        (no_pictures, "--save-images"),
        ([], "no points"),
        (only["jpeg"], "no picture of rnncodec"),
        (only["rnncodec-small"], "no other codec has a picture within 5% of the bytes"),
    ):
        write_points(results, given)
        assert main(["rate", str(results), "--port", "0"]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("rnncodec: error: ")
        assert captured.err.count("\n") == 1
        assert said in captured.err
    assert not (results / "votes.sqlite").exists()


def changed(rows, column, value):
    """The rows with another value in the second."""
    second = list(rows[1])
    second[COLUMNS.index(column)] = value
    return [rows[0], second, *rows[2:]]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("picture", "../secret.png", "not in"),
        ("picture", "/etc/passwd", "not in"),
        ("picture", "link.png", "not in"),
        ("picture", "pictures/lake/none.png", "no such file"),
        ("picture", "pictures/lake", "no such file"),
        ("bytes", "many", "many"),
        ("bytes", "0", "line 3: bytes cannot be '0'"),
        ("bytes", "inf", "inf"),
        ("bpp", "nan", "bpp cannot be 'nan'"),
        ("bpp", "-1", "bpp cannot be '-1'"),
        ("setting", "2.5", "whole number"),
    ],
)
def test_faulty_points(results, not_serving, capsys, column, value, said):
    Image.new("RGB", (64, 64)).save(results.parent / "secret.png")
    (results / "link.png").symlink_to(results.parent / "secret.png")
    write_points(results, changed(read_rows(results), column, value))
    assert main(["rate", str(results), "--port", "0"]) == 1
    captured = capsys.readouterr()
    assert re.fullmatch(r"rnncodec: error: .*\n", captured.err)
    assert str(results) in captured.err
    assert ("points.csv" in captured.err) == (column != "picture")
    assert said in captured.err


def test_every_original_is_needed(results, not_serving, capsys):
    (results / "pictures" / "tower" / "original.png").unlink()
    assert main(["rate", str(results), "--port", "0"]) == 1
    assert capsys.readouterr().err == f"rnncodec: error: {results}: 'pictures/tower/original.png': no such file\n"


def test_not_points(results, not_serving, capsys):
    path = results / "points.csv"
    rows = path.read_bytes().splitlines(keepends=True)
    for content in (
        b"",
        b"\xff\xfe",
        b"image,codec\n",
        rows[0] + b"lake,jpeg\n",
        rows[0] + b"lake,jpeg,1,2,3,4,5,6,7,8,9,10\n",
        rows[0] + b'"' + bytes(200_000),
    ):
        path.write_bytes(content)
        assert main(["rate", str(results), "--port", "0"]) == 1
        captured = capsys.readouterr()
        assert re.fullmatch(r"rnncodec: error: .*points\.csv: .*\n", captured.err), captured.err
    path.unlink()
    assert main(["rate", str(results), "--port", "0"]) == 1
    assert "points.csv: No such file" in capsys.readouterr().err


# Order


def compared(image, rate, *pair):
    return image, rate, frozenset((point.codec, point.setting) for point in pair)


def pair(trial):
    return compared(trial.image, trial.rate, trial.left, trial.right)


def tokens(trials):
    return [trial.token for trial in trials]


def raters(count):
    return [f"{i:032x}" for i in range(count)]


def test_every_rater_sees_every_comparison_once(large_study):
    expected = Counter(compared(*comparison) for comparison in large_study.comparisons)
    assert len(expected) == 100
    for rater in raters(20):
        trials = large_study.trials(rater)
        assert len({trial.token for trial in trials}) == len(trials)
        assert Counter(pair(trial) for trial in trials if trial.kind == "normal") == expected
        kinds = Counter(trial.kind for trial in trials)
        assert kinds == {"normal": 100, "repeat": 10, "check": 5}  # 10 % and 5 %
        place = {pair(trial): i for i, trial in enumerate(trials) if trial.kind == "normal"}
        sides = {pair(trial): (trial.left, trial.right) for trial in trials if trial.kind == "normal"}
        for i, trial in enumerate(trials):
            if trial.kind == "repeat":
                assert i - place[pair(trial)] >= 5
                assert sides[pair(trial)] == (trial.right, trial.left)
            if trial.kind == "check":
                codecs = {trial.left.codec: trial.left, trial.right.codec: trial.right}
                assert codecs["original"].picture == f"pictures/{trial.image}/original.png"
                assert (codecs["jpeg"].setting, trial.rate) == (10, None)  # the lowest PSNR that has a picture
        assert len({trial.image for trial in trials if trial.kind == "check"}) == 5


def test_small_study_has_checks_and_repeats_too(study):
    kinds = Counter(trial.kind for trial in study.trials(ADA))
    assert kinds == {"normal": 20, "repeat": 2, "check": 1}


def test_order_and_sides_are_deterministic(study, four_images):
    assert tokens(study.trials(ADA)) == tokens(Study(four_images, RATES).trials(ADA))
    assert tokens(study.trials(ADA)) != tokens(Study(four_images, RATES, seed=1).trials(ADA))
    ada, bob = study.trials(ADA), study.trials(BOB)
    assert [pair(trial) for trial in ada] != [pair(trial) for trial in bob]
    assert not {*tokens(ada)} & {*tokens(bob)}
    code = "from pathlib import Path; from rnncodec.rating import Study; "
    code += f"print(Study(Path({str(four_images)!r}), {RATES}).trials({ADA!r})[7].token)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert other.stdout.strip() == ada[7].token  # in another process, with another seed of Python's own hash


def test_sides_and_order_are_balanced(large_study):
    left, early = Counter(), Counter()
    for rater in raters(100):
        normal = [trial for trial in large_study.trials(rater) if trial.kind == "normal"]
        share = sum(trial.left.codec < trial.right.codec for trial in normal)
        assert 25 <= share <= 75  # of 100: 5 standard deviations
        left.update(pair(trial) for trial in normal if trial.left.codec < trial.right.codec)
        early.update(pair(trial) for trial in normal[:50])
    assert abs(sum(left.values()) / 10_000 - 0.5) < 0.025  # 5 standard deviations
    for comparison in large_study.comparisons:
        assert 25 <= left[compared(*comparison)] <= 75
        assert 25 <= early[compared(*comparison)] <= 75


def test_more_rates_leave_what_was_there(four_images, study):
    fewer = Study(four_images, [0.25, 1.0])
    before = {pair(trial): trial for trial in study.trials(ADA) if trial.kind == "normal"}
    normal = [trial for trial in fewer.trials(ADA) if trial.kind == "normal"]
    assert len(normal) == 16
    assert tokens(normal) != tokens(before.values())
    for trial in normal:
        same = before[pair(trial)]
        assert (same.token, same.left.codec, same.left.setting) == (trial.token, trial.left.codec, trial.left.setting)


# Model


def test_two_codecs_have_their_log_odds():
    scores = bradley_terry(np.array([[0, 3_000_000], [1_000_000, 0]]))
    assert scores == pytest.approx([np.log(3) / 2, -np.log(3) / 2], abs=1e-6)


def test_three_codecs_of_known_strength():
    # Strengths 1, 2 and 4: the second beats the first 2 : 1, the third the first 4 : 1 and the second 2 : 1.
    wins = np.array([[0, 1, 1], [2, 0, 1], [4, 2, 0]]) * np.array([[1, 5, 3], [5, 1, 5], [3, 5, 1]])
    assert bradley_terry(1_000_000 * wins) == pytest.approx([-np.log(2), 0, np.log(2)], abs=1e-6)


def test_who_always_wins_has_a_finite_score():
    # 5 wins of 5, and half a virtual win and half a virtual loss: odds of 5.5 to 0.5.
    assert bradley_terry(np.array([[0, 5], [0, 0]])) == pytest.approx([np.log(11) / 2, -np.log(11) / 2], abs=1e-9)
    assert bradley_terry(np.zeros((4, 4))) == pytest.approx(np.zeros(4), abs=1e-12)
    huge = bradley_terry(np.array([[0, 10**6, 0], [0, 0, 10**6], [0, 0, 0]]))
    assert np.isfinite(huge).all()
    assert huge[0] > huge[1] > huge[2]


@pytest.mark.parametrize("seed", range(6))
def test_maximum_of_the_likelihood(seed):
    """Scores equal those of a general optimizer, also with codecs that never met or never lost."""
    rng = np.random.default_rng(seed)
    wins = rng.integers(0, 30, (3, 5, 5)) * (rng.random((3, 5, 5)) < 0.5)

    def loss(scores, wins):
        difference = scores[:, None] - scores[None]
        return np.sum(np.where(np.eye(5, dtype=bool), 0, wins + 0.5) * np.logaddexp(0, -difference))

    scores = bradley_terry(wins)
    for each, found in zip(wins, scores, strict=True):
        best = minimize(loss, np.zeros(5), args=(each,), tol=1e-12).x
        assert found == pytest.approx(best - best.mean(), abs=2e-4)
        assert found == pytest.approx(bradley_terry(each), abs=1e-9)


def simulate(rng, strengths, raters, votes):
    """Votes of raters on random pairs of codecs: integers [R, K, K]."""
    first, step = rng.integers(0, len(strengths), (raters, votes)), rng.integers(1, len(strengths), (raters, votes))
    second = (first + step) % len(strengths)
    first_wins = rng.random((raters, votes)) < 1 / (1 + np.exp(strengths[second] - strengths[first]))
    wins = np.zeros((raters, len(strengths), len(strengths)), dtype=np.int64)
    winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
    np.add.at(wins, (np.arange(raters)[:, None], winner, loser), 1)
    return wins


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (0, 4), (20, 0), (3, 2), (30, 10)])
@pytest.mark.parametrize("raters", ["one", "many"])
def test_intervals_of_two_codecs_are_those_of_jeffreys(won, lost, raters):
    """The usual interval of a share, from the beta distribution, is honest with one vote and with unanimous votes."""
    votes = np.array([[[0, 1], [0, 0]]] * won + [[[0, 0], [1, 0]]] * lost)
    low, high = bootstrap(votes.sum(0, keepdims=True) if raters == "one" else votes)
    expected = logit(beta.ppf([0.025, 0.975], won + 0.5, lost + 0.5)) / 2
    assert [low[0], high[0]] == pytest.approx(expected, abs=0.25)  # 2.5 standard errors of the far end
    assert [low[1], high[1]] == pytest.approx(-expected[::-1], abs=0.25)
    assert low[0] < bradley_terry(votes.sum(0))[0] < high[0]


@pytest.mark.parametrize("votes", [1, 5])
@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_intervals_from_few_votes_cover_the_truth(votes, strength, monkeypatch):
    monkeypatch.setattr("rnncodec.rating.scores.RESAMPLES", 200)
    rng = np.random.default_rng(0)
    truth = np.array([-strength, 0.0, strength])
    covered = []
    for _ in range(100):
        low, high = bootstrap(simulate(rng, truth, 1, votes))
        covered.append((low <= truth) & (truth <= high))
    assert np.mean(covered) > 0.92


@pytest.mark.parametrize("raters", [1, 40])
def test_intervals_cover_the_truth(raters, monkeypatch):
    monkeypatch.setattr("rnncodec.rating.scores.RESAMPLES", 200)
    rng = np.random.default_rng(raters)
    truth = np.array([-0.5, 0.0, 0.5])
    covered, widths = [], []
    for _ in range(200):
        low, high = bootstrap(simulate(rng, truth, raters, 240 // raters))
        covered.append((low <= truth) & (truth <= high))
        widths.append(high - low)
    assert 0.88 < np.mean(covered) < 0.99  # nominally 0.95, and a little less with few raters
    # Standard errors by Fisher's information of 80 votes on each of the three pairs.
    p = 1 / (1 + np.exp(truth - truth[:, None]))
    information = -80 * p * (1 - p)
    np.fill_diagonal(information, 0)
    np.fill_diagonal(information, -information.sum(1))
    expected = 2 * 1.96 * np.sqrt(np.diag(np.linalg.pinv(information)))
    assert np.mean(widths, 0) == pytest.approx(expected, rel=0.1)


def test_bootstrap_resamples_raters():
    """The uncertainty follows from the number of raters, if each is consistent but they disagree."""
    one_way, other_way = np.array([[0, 50], [0, 0]]), np.array([[0, 0], [50, 0]])
    wins = np.array([one_way, other_way] * 3)
    low, high = bootstrap(wins)
    # The odds are those of two sums of three exponential weights, an F distribution; virtual votes hardly count.
    odds = f.ppf([0.025, 0.975], 6, 6)
    assert low == pytest.approx([np.log(odds[0]) / 2] * 2, abs=0.05)
    assert high == pytest.approx([np.log(odds[1]) / 2] * 2, abs=0.05)
    votes_low, votes_high = bootstrap(np.array([one_way + other_way]) * 3)
    assert high[0] - low[0] > 3 * (votes_high[0] - votes_low[0])
    wins = simulate(np.random.default_rng(0), np.zeros(3), 10, 10)
    assert np.array_equal(bootstrap(wins), bootstrap(wins))  # seeded
    assert not np.array_equal(bootstrap(wins), bootstrap(wins, seed=1))


def vote(rater=ADA, codecs=("jpeg", "webp"), choice="left", kind="normal", rate: float | None = 0.5, **changes):
    left, right = codecs
    base = Vote(rater, "", "0" * 32, kind, "lake", rate, left, 1, 100, right, 2, 101, choice, 900, "2020-01-01")
    return replace(base, **changes)


def test_summary():
    good = ("original", "jpeg")
    votes = [
        *[vote(), vote(choice="right"), vote(codecs=("webp", "jpeg"), image="tower"), vote(BOB)],  # jpeg 2, webp 2
        vote(undone="2020-01-02"),
        vote(rate=1.0),
        *[vote(codecs=good, kind="check", rate=None)] * 4,
        vote(codecs=good, kind="check", rate=None, choice="right"),  # 4 of 5 are right: enough
        vote(codecs=("webp", "jpeg"), kind="repeat", choice="left", left_setting=2, right_setting=1),
        vote(BOB, codecs=("webp", "jpeg"), kind="repeat", choice="right", left_setting=2, right_setting=1),
        vote(codecs=("webp", "jpeg"), kind="repeat", left_setting=2, right_setting=1, rate=1.0),  # not as before
        # Three of four are not, and nothing else of this rater counts.
        *[vote("c" * 32, codecs=good, kind="check", rate=None)] * 3,
        vote("c" * 32, codecs=good, kind="check", rate=None, choice="right"),
        *[vote("c" * 32, choice="right")] * 9,
        vote("c" * 32, kind="repeat"),
    ]
    summary = summarize(votes)
    assert (summary.raters, summary.excluded, summary.votes, summary.undone) == (2, 1, 5, 1)
    assert (summary.right, summary.checks) == (7, 9)
    assert (summary.consistent, summary.repeats) == (2, 3)
    assert [(score.rate, score.codec, score.votes) for score in summary.scores] == [
        (0.5, "jpeg", 4),
        (0.5, "webp", 4),
        (1.0, "jpeg", 1),
        (1.0, "webp", 1),
    ]
    equal = summary.scores[:2]
    assert [score.score for score in equal] == pytest.approx([0, 0], abs=1e-12)
    assert [score.probability for score in equal] == [0.5, 0.5]
    assert all(score.low <= score.score <= score.high for score in summary.scores)
    best = summary.scores[2]
    assert best.probability == pytest.approx(1 / (1 + np.exp(-best.score)))
    assert summarize(votes) == summary


# Storage


def test_votes_are_stored_and_undone(tmp_path):
    path = tmp_path / "ödd name?#.sqlite"
    votes = Votes(path)
    first, second = vote(trial="1" * 32), vote(trial="2" * 32, rate=None, kind="check")
    assert votes.add(first)
    assert votes.add(second)
    assert not votes.add(replace(second, choice="right"))  # one vote on a trial
    assert votes.add(replace(second, rater=BOB))
    assert Votes(path).trials(ADA) == ["1" * 32, "2" * 32]
    assert not votes.undo(ADA, "1" * 32)  # not the last
    assert not votes.undo("c" * 32, "2" * 32)
    assert votes.undo(ADA, "2" * 32)
    assert not votes.undo(ADA, "2" * 32)
    assert votes.trials(ADA) == ["1" * 32]
    assert votes.add(second)
    rows = rows_of(path)
    assert list(rows[0]) == [field.name for field in fields(Vote)]
    assert [tuple(row.values()) for row in (rows[0], rows[3])] == [astuple(first), astuple(second)]
    assert [row["undone"] is None for row in rows] == [True, False, True, True]
    assert Votes(path, create=False).all() == [Vote(**row) for row in rows]


def test_a_kill_in_the_middle_of_writing(results):
    """Uncommitted changes, although partly on disk, are rolled back at the next access, even if it only reads."""
    path = results / "votes.sqlite"
    Votes(path).add(vote())
    code = f"""
import sqlite3, time
database = sqlite3.connect({str(path)!r})
database.execute("PRAGMA cache_size = 10")
database.execute("BEGIN")
database.execute("CREATE TABLE other (x)")
database.execute("UPDATE votes SET choice = 'right', name = hex(randomblob(100000))")
database.executemany("INSERT INTO other VALUES (hex(randomblob(1000)))", [()] * 1000)
print("written", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert path.with_name("votes.sqlite-journal").stat().st_size > 0
    assert Votes(path, create=False).all() == [vote()]


def test_other_databases_are_refused_and_left_alone(results, not_serving, capsys):
    path = results / "votes.sqlite"
    contents = {"text": b"these are no votes, but quite a long text" * 100}
    for name, schema in (
        ("other tables", "CREATE TABLE songs (title TEXT)"),
        ("other columns", "CREATE TABLE votes (rater TEXT)"),
        ("more tables", f"{SCHEMA}; CREATE TABLE songs (title TEXT)"),
    ):
        with closing(sqlite3.connect(results / "made")) as database:
            database.executescript(schema)
        contents[name] = (results / "made").read_bytes()
        (results / "made").unlink()
    for content in contents.values():
        path.write_bytes(content)
        for options in (["--port", "0"], ["--scores"]):
            assert main(["rate", str(results), *options]) == 1
            captured = capsys.readouterr()
            assert re.fullmatch(r"rnncodec: error: .*sqlite: .*(another layout|not a database).*\n", captured.err)
            assert path.read_bytes() == content
    path.unlink()
    assert main(["rate", str(results), "--scores"]) == 1
    assert "nobody has voted" in capsys.readouterr().err
    assert main(["rate", str(results), "--port", "0", "--votes", str(results / "no" / "votes")]) == 1
    assert "unable to open" in capsys.readouterr().err
    assert not path.exists()


# Server


class Client:
    """Speaks HTTP to a server, a connection for each request."""

    def __init__(self, url):
        address = urlsplit(url)
        self.host, self.port = str(address.hostname), int(address.port or 0)

    def request(self, method, path, body=None, **headers):
        """Status, headers and body of the answer; headers given as None are not sent."""
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=60)) as connection:
            given = {"Content-Length": None if body is None else str(len(body)), "Content-Type": "application/json"}
            given |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.putrequest(method, path, skip_host="Host" in given)
            for name, value in given.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

    def state(self, rater=ADA):
        status, _, body = self.request("GET", f"/state?rater={rater}")
        assert status == 200
        return json.loads(body)

    def post(self, path, document, **headers):
        status, _, body = self.request("POST", path, json.dumps(document).encode(), **headers)
        return status, json.loads(body) if status == 200 else body.decode()

    def vote(self, trial, rater=ADA, choice="left", **changes):
        document = {"rater": rater, "name": "", "trial": trial, "choice": choice, "milliseconds": 1500, **changes}
        return self.post("/vote", document)


@contextmanager
def serving(study, path, host="127.0.0.1"):
    with Server(study, Votes(path), host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(f"http://127.0.0.1:{server.server_address[1]}/")
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.sqlite"


@pytest.fixture
def client(study, path):
    with serving(study, path) as client:
        yield client


def test_a_vote_is_stored(client, study, path):
    trials = study.trials(ADA)
    state = client.state()
    assert (state["done"], state["total"], state["last"]) == (0, 23, None)
    assert [each["trial"] for each in state["trials"]] == [trial.token for trial in trials[:3]]
    status, state = client.vote(trials[0].token, choice="right", name="Ada, née Byron")
    assert status == 200
    assert state == client.state()
    assert (state["done"], state["last"]) == (1, trials[0].token)
    assert [each["trial"] for each in state["trials"]] == [trial.token for trial in trials[1:4]]
    (row,) = rows_of(path)
    assert (row["rater"], row["name"], row["choice"], row["milliseconds"]) == (ADA, "Ada, née Byron", "right", 1500)
    assert (row["kind"], row["image"], row["rate"]) == (trials[0].kind, trials[0].image, trials[0].rate)
    for side, shown in (("left", trials[0].left), ("right", trials[0].right)):
        stored = row[f"{side}_codec"], row[f"{side}_setting"], row[f"{side}_bytes"]
        assert stored == (shown.codec, shown.setting, shown.bytes)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", row["time"])
    assert row["undone"] is None
    assert client.state(BOB)["done"] == 0


def test_until_the_end_and_back(client, study, path):
    for trial in study.trials(ADA):
        assert client.vote(trial.token)[0] == 200
    state, trial = client.state(), study.trials(ADA)[-1]
    assert (state["done"], state["total"], state["trials"]) == (23, 23, [])
    assert client.vote(trial.token)[0] == 409
    status, state = client.post("/undo", {"rater": ADA, "trial": trial.token})
    assert (status, state["done"], [each["trial"] for each in state["trials"]]) == (200, 22, [trial.token])
    assert client.post("/undo", {"rater": ADA, "trial": trial.token})[0] == 409  # a second click
    assert client.vote(trial.token, choice="right")[0] == 200
    rows = rows_of(path)
    assert len(rows) == 24
    assert [row["choice"] for row in rows[-2:]] == ["left", "right"]
    assert [row["undone"] is None for row in rows] == [True] * 22 + [False, True]


def test_forged_votes_are_refused(client, study, path):
    first, second = study.trials(ADA)[:2]
    document = {"rater": ADA, "name": "", "trial": first.token, "choice": "left", "milliseconds": 10}
    for changes, expected in (
        ({"rater": BOB}, 400),  # not this rater's trial
        ({"rater": "A" * 32}, 400),
        ({"rater": "' OR 1=1"}, 400),
        ({"rater": None}, 400),
        ({"trial": "0" * 32}, 400),
        ({"trial": second.token}, 409),  # not yet
        ({"trial": [first.token]}, 400),
        ({"choice": "both"}, 400),
        ({"choice": ["left"]}, 400),
        ({"name": "x" * 61}, 400),
        ({"name": "a\nb"}, 400),
        ({"name": "\ud800"}, 400),
        ({"name": None}, 400),
        ({"milliseconds": -1}, 400),
        ({"milliseconds": 10**9}, 400),
        ({"milliseconds": 1.5}, 400),
        ({"milliseconds": True}, 400),
        ({"milliseconds": "10"}, 400),
        ({"kind": "normal"}, 400),
        ({"left_codec": "webp"}, 400),
    ):
        assert client.post("/vote", document | changes)[0] == expected, changes
    assert client.post("/vote", {key: document[key] for key in document if key != "choice"})[0] == 400
    for body, expected in (
        (b"", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 4096, 400),
        (json.dumps(document).encode() + b" " * 4096, 413),
    ):
        assert client.request("POST", "/vote", body)[0] == expected
    body = json.dumps(document).encode()
    assert client.request("POST", "/vote", body, Content_Length=None)[0] == 411
    assert client.request("POST", "/vote", body, Content_Length="-5")[0] == 411
    assert client.request("POST", "/vote", body, Content_Length="999999999999")[0] == 411
    assert client.request("POST", "/vote", body, Content_Type="text/plain")[0] == 415
    assert client.request("POST", "/votes", body)[0] == 404
    for changes, expected in (({}, 409), ({"trial": "0" * 32}, 400), ({"rater": BOB}, 400), ({"x": 1}, 400)):
        assert client.post("/undo", {"rater": ADA, "trial": first.token} | changes)[0] == expected
    for rater in ("", "a" * 31, "a" * 33, "../" * 8):
        assert client.request("GET", f"/state?rater={rater}")[0] == 400
    assert rows_of(path) == []
    assert client.post("/vote", document)[0] == 200  # all that was wrong is what was changed


def test_other_sites_are_refused(client, study, path):
    document = {"rater": ADA, "name": "", "trial": study.trials(ADA)[0].token, "choice": "left", "milliseconds": 10}
    here = f"127.0.0.1:{client.port}"
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{client.port}"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.0.1"},
        {"Host": ""},
        {"Host": None},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://localhost:{client.port}"},  # not the name this was asked under
        {"Host": here, "Origin": f"http://{here}.evil.example"},
    ):
        assert client.post("/vote", document, **headers)[0] == 403, headers
        assert client.request("GET", "/", **headers)[0] == 403, headers
    assert rows_of(path) == []
    assert client.post("/vote", document, Host=here, Origin=f"http://{here}")[0] == 200
    for host in (f"localhost:{client.port}", "LOCALHOST", "[::1]:99", "127.0.0.5:1"):
        assert client.request("GET", "/", Host=host)[0] == 200
        assert client.request("GET", "/", Host=host, Origin=f"http://{host}")[0] == 200


def test_all_addresses_accept_any_name(study, path):
    with serving(study, path, "0.0.0.0") as client:
        document = {"rater": ADA, "name": "", "trial": study.trials(ADA)[0].token, "choice": "left", "milliseconds": 1}
        assert client.request("GET", "/", Host="rating.example")[0] == 200
        assert client.post("/vote", document, Host="rating.example", Origin="http://evil.example")[0] == 403
        assert client.post("/vote", document, Host="rating.example", Origin="http://rating.example")[0] == 200


def test_nothing_else_is_served(client, four_images):
    for target in (
        "/points.csv",
        "/picture/",
        "/picture/points.csv",
        "/picture/../points.csv",
        "/picture/..%2fpoints.csv",
        "/picture/%2e%2e/points.csv",
        "/picture/pictures/lake/original.png",
        f"/picture/{'0' * 32}",
        f"/picture//{four_images}/points.csv",
        f"{four_images}/points.csv",
        "/../points.csv",
        "*",
    ):
        status, _, body = client.request("GET", target)
        assert (status, body) == (404, b"there is nothing here\n")
    assert client.request("PUT", "/vote", b"{}")[0] == 501


def test_pictures_do_not_say_whose_they_are(client, study, four_images):
    seen, everything = {}, []
    for trial in study.trials(ADA):
        shown = client.state()["trials"][0]
        assert shown["trial"] == trial.token
        assert set(shown) == {"trial", "original", "left", "right"}
        answers = {}
        for role, picture in (
            ("original", f"pictures/{trial.image}/original.png"),
            ("left", trial.left.picture),
            ("right", trial.right.picture),
        ):
            assert re.fullmatch("[0-9a-f]{32}", shown[role])
            status, headers, body = client.request("GET", f"/picture/{shown[role]}")
            assert status == 200
            with Image.open(io.BytesIO(body)) as served, Image.open(four_images / picture) as stored:
                assert (served.format, served.mode, served.info) == ("PNG", "RGB", {})
                assert np.array_equal(np.asarray(served), np.asarray(stored.convert("RGB")))
            answers[role] = {**headers, "Date": "", "size": len(body)}
            everything.append(f"{headers}")
        assert answers["original"] == answers["left"] == answers["right"]
        seen[trial.kind] = shown
        everything.append(json.dumps(shown))
        client.vote(trial.token)
    assert set(seen) == {"normal", "repeat", "check"}
    assert len({seen["check"][role] for role in ("original", "left", "right")}) == 3
    everything.append(client.request("GET", "/")[2].decode())
    for word in ("jpeg", "webp", "rnncodec-", "avif", 'repeat":', 'check":', *("lake", "market", "tower", "wharf")):
        assert not any(word in text.lower() for text in everything), word


def test_a_damaged_picture_is_an_error_and_not_the_end(results, path, capsys):
    study = Study(results, RATES)
    token = study.picture(study.trials(ADA)[0].left)
    study.pictures[token].write_bytes(b"damaged")
    with serving(study, path) as client:
        status, _, body = client.request("GET", f"/picture/{token}")
        assert (status, body) == (500, b"the server failed\n")
        assert client.state()["done"] == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("rnncodec: error: ")
    assert captured.err.count("\n") == 1


def test_a_vote_that_cannot_be_stored_is_not_acknowledged(client, study, path, capsys):
    path.unlink()
    assert client.vote(study.trials(ADA)[0].token) == (500, "the server failed\n")
    assert capsys.readouterr().err == f"rnncodec: error: {path}: unable to open database file\n"
    assert not path.exists()


def test_many_raters_at_once(client, study, path):
    failures = []

    def work(rater):
        for trial in study.trials(rater):
            if (status := client.vote(trial.token, rater)[0]) != 200:
                failures.append(status)

    threads = [threading.Thread(target=work, args=(rater,)) for rater in raters(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert Counter(row["rater"] for row in rows_of(path)) == dict.fromkeys(raters(8), 23)


def test_two_clicks_at_once_are_one_vote(client, study, path):
    trial = study.trials(ADA)[0].token
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(client.vote(trial)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(statuses) == {200: 1, 409: 7}
    assert len(rows_of(path)) == 1


# Command line


@contextmanager
def running(results, *options):
    """The command as a process of its own, and a client of it."""
    command = [sys.executable, "-m", "rnncodec", "rate", str(results), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url, _, rest = process.stdout.readline().partition(" ")
            assert rest == "serves 20 comparisons of 4 images; Ctrl-C ends it\n"
            yield process, Client(url)
        finally:
            process.kill()


def test_acknowledged_votes_outlive_a_kill(results):
    tokens = [trial.token for trial in Study(results, RATES).trials(ADA)]
    for count in range(3):
        with running(results) as (process, client):
            state = client.state()  # goes on where it was
            assert (state["done"], state["trials"][0]["trial"]) == (count, tokens[count])
            assert client.vote(tokens[count])[0] == 200
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        assert [row["trial"] for row in rows_of(results / "votes.sqlite")] == tokens[: count + 1]


def test_ctrl_c_ends_it(results, tmp_path):
    votes = tmp_path / "elsewhere.sqlite"
    with running(results, "--votes", str(votes)) as (process, client):
        trial = client.state()["trials"][0]["trial"]
        client.vote(trial)
        client.post("/undo", {"rater": ADA, "trial": trial})
        client.vote(trial)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, f"{votes}: 1 votes\n", "")
    assert not (results / "votes.sqlite").exists()


def test_scores(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    votes = Votes(results / "votes.sqlite")
    for i, each in enumerate([*[vote()] * 30, *[vote(choice="right")] * 10, vote(undone="2020-01-02")]):
        votes.add(replace(each, trial=f"{i:032x}"))
    assert main(["rate", str(results), "--scores", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {key: document[key] for key in ("votes", "raters", "excluded", "undone")} == {
        "votes": 40,
        "raters": 1,
        "excluded": 0,
        "undone": 1,
    }
    best, other = document["scores"]
    assert (best["codec"], best["rate"], best["votes"], other["codec"]) == ("jpeg", 0.5, 40, "webp")
    assert best["score"] == pytest.approx(np.log(3) / 2, abs=0.02)  # what the virtual votes take away
    assert best["low"] < np.log(3) / 2 < best["high"]
    assert best["probability"] == pytest.approx(np.sqrt(3) / (1 + np.sqrt(3)), abs=0.005)
    assert main(["rate", str(results), "--scores"]) == 0
    out = capsys.readouterr().out
    row = next(line.replace("│", " ").split() for line in out.splitlines() if "jpeg" in line)
    assert row[:3] == ["0.5", "jpeg", f"{best['score']:+.2f}"]
    assert row[-2:] == [f"{best['probability']:.1%}", "40"]
    assert "40 votes of 1 raters; excluded for wrong checks: 0" in out
    assert "repeats answered as the first time: 0 of 0" in out


@pytest.mark.parametrize("count", [1, 12])
def test_scores_of_unanimous_votes_have_wide_intervals(results, capsys, count):
    votes = Votes(results / "votes.sqlite")
    for i in range(count):
        votes.add(vote(rater=f"{i % 3:032x}", trial=f"{i:032x}"))
    assert main(["rate", str(results), "--scores", "--json"]) == 0
    best, other = json.loads(capsys.readouterr().out)["scores"]
    assert (best["codec"], best["score"]) == ("jpeg", pytest.approx(np.log(2 * count + 1) / 2))
    for score in (best, other):
        assert score["low"] + 2 < score["high"]
        assert score["low"] < score["score"] < score["high"]
    assert main(["rate", str(results), "--scores"]) == 0
    assert f"{best['low']:+.2f} to {best['high']:+.2f}" in capsys.readouterr().out


def test_wrong_usage(results, not_serving, capsys):
    for options in ("--json", "--port 65536", "--port x", "--rates 0", "--rates", "--rates nan"):
        with pytest.raises(SystemExit) as error:
            main(["rate", str(results), *options.split()])
        assert error.value.code == 2
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        capsys.readouterr()
        assert main(["rate", str(results), "--port", str(port)]) == 1
        assert capsys.readouterr().err == f"rnncodec: error: 127.0.0.1:{port}: Address already in use\n"
    for host in ("a..b", "192.0.2.1"):  # no name, and an address of documentation that no computer has
        assert main(["rate", str(results), "--host", host]) == 1
        assert capsys.readouterr().err.startswith(f"rnncodec: error: {host}:8000: ")


def test_rating_does_without_torch(results):
    Votes(results / "votes.sqlite").add(vote())
    code = "import sys; from rnncodec.cli import main; from rnncodec.rating import Server; "
    code += f"assert main(['rate', {str(results)!r}, '--scores']) == 0; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


# Page


class Rater:
    """Someone at a browser."""

    def __init__(self, browser):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.by, self.waiting = browser, By, WebDriverWait(browser, 60, 0.05)

    def find(self, name):
        return self.browser.find_element(self.by.ID, name)

    def data(self, name):
        return self.browser.execute_script("return document.body.dataset[arguments[0]]", name)

    def wait(self, condition):
        return self.waiting.until(lambda _: condition())

    def wait_for(self, view):
        self.wait(lambda: self.data("view") == view and (view != "rate" or self.data("ready") == "true"))

    def wait_for_trial(self, token):
        self.wait(lambda: self.data("trial") == token and self.data("ready") == "true")

    def press(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(key).perform()

    def hold(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).key_down(key).perform()

    def release(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).key_up(key).perform()

    def pixels(self, side, size):
        """The middle of a pane, uint8 [size, size, 3]."""
        script = """
            const canvas = document.querySelectorAll("canvas")[arguments[0]], size = arguments[1];
            const corner = [canvas.width, canvas.height].map(x => Math.round(x / 2 - size / 2));
            return [...canvas.getContext("2d").getImageData(...corner, size, size).data]"""
        data = self.browser.execute_script(script, side, size)
        return np.array(data, np.uint8).reshape(size, size, 4)[..., :3]


def severe(browser):
    """Errors on the browser's console since the last call, such as of scripts and of the content security policy."""
    return [row["message"] for row in browser.get_log("browser") if row["level"] == "SEVERE"]


@pytest.mark.browser
def test_page(browser, results):
    from selenium.webdriver.common.keys import Keys

    votes = results / "votes.sqlite"
    with running(results) as (process, client):
        url = f"http://127.0.0.1:{client.port}/"
        page = Rater(browser)
        severe(browser)  # of other tests
        browser.get(url)
        page.wait_for("welcome")
        page.find("name").send_keys("Ada")
        assert "23 pairs" in page.find("extent").text
        page.find("start").click()
        page.wait_for("rate")
        rater = browser.execute_script("return localStorage.rater")
        trials = Study(results, RATES).trials(rater)
        assert page.data("trial") == trials[0].token
        assert page.find("progress").text == "1 of 23"
        assert not page.find("undo").is_enabled()

        # Every pixel is that of the picture, once or, enlarged, a square of them.
        x, left, right = (
            np.asarray(Image.open(results / picture).convert("RGB"))
            for picture in (f"pictures/{trials[0].image}/original.png", trials[0].left.picture, trials[0].right.picture)
        )
        assert np.array_equal(page.pixels(0, 64), left)
        assert np.array_equal(page.pixels(1, 64), right)
        page.hold(" ")
        assert page.find("label").is_displayed()
        assert np.array_equal(page.pixels(0, 64), x)
        assert np.array_equal(page.pixels(1, 64), x)
        page.release(" ")
        assert not page.find("label").is_displayed()
        assert np.array_equal(page.pixels(0, 64), left)
        page.press("+")
        assert page.find("zoom").text == "2×"
        assert np.array_equal(page.pixels(1, 128), right.repeat(2, 0).repeat(2, 1))
        page.press("-")

        page.find("left").click()
        page.wait_for_trial(trials[1].token)
        page.press(Keys.ARROW_RIGHT)
        page.wait_for_trial(trials[2].token)
        page.press(Keys.ARROW_LEFT)
        page.wait_for_trial(trials[3].token)
        assert page.find("progress").text == "4 of 23"
        page.press(Keys.BACKSPACE)
        page.wait_for_trial(trials[2].token)
        page.find("undo").click()
        page.wait_for_trial(trials[1].token)
        page.find("right").click()
        page.wait_for_trial(trials[2].token)
        expected = [(0, "left", True), (1, "right", False), (2, "left", False), (1, "right", True)]
        rows = rows_of(votes)
        assert [(row["trial"], row["choice"], row["undone"] is None) for row in rows] == [
            (trials[i].token, choice, valid) for i, choice, valid in expected
        ]
        assert {(row["rater"], row["name"]) for row in rows} == {(rater, "Ada")}
        assert all(200 <= row["milliseconds"] < 120_000 for row in rows)
        assert (rows[0]["left_codec"], rows[0]["right_codec"]) == (trials[0].left.codec, trials[0].right.codec)

        # A pause hides the pictures and accepts no choice.
        page.find("pause").click()
        page.wait_for("paused")
        assert not page.find("panes").is_displayed()
        page.press(Keys.ARROW_LEFT)
        page.find("resume").click()
        page.wait_for("rate")
        assert len(rows_of(votes)) == 4

        source = browser.page_source.lower()
        assert not any(codec in source for codec in ("jpeg", "webp", "rnncodec-small"))
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
        assert asked
        assert all(name.startswith((url, "data:")) for name in asked)

        assert severe(browser) == []

        # The server dies right after a click was answered, then answers nothing, and is started again.
        page.press(Keys.ARROW_RIGHT)
        page.wait(lambda: page.data("trial") == trials[3].token)
        process.kill()
        process.wait(60)
        assert [row["trial"] for row in rows_of(votes)][4:] == [trials[2].token]
        page.wait_for_trial(trials[3].token)
        page.press(Keys.ARROW_LEFT)
        page.wait(lambda: page.find("alert").is_displayed())
        assert "cannot be reached" in page.find("alert").text
        assert len(rows_of(votes)) == 5
    with running(results, "--port", str(client.port)) as (process, client):
        page.find("retry").click()
        page.wait_for_trial(trials[4].token)
        assert not page.find("alert").is_displayed()
        assert [row["trial"] for row in rows_of(votes)][5:] == [trials[3].token]

        assert severe(browser) != []  # the lost connection, which shows that errors would be seen
        browser.get(url)
        page.wait_for("welcome")
        assert page.find("extent").text == "Welcome back: 4 of 23 are done."
        assert page.find("name").get_attribute("value") == "Ada"
        page.find("start").click()
        for trial in trials[4:]:
            page.wait_for_trial(trial.token)
            page.press(Keys.ARROW_RIGHT)
        page.wait_for("thanks")
        assert client.state(rater)["done"] == 23
        page.find("undo-last").click()
        page.wait_for_trial(trials[-1].token)
        page.press(Keys.ARROW_LEFT)
        page.wait_for("thanks")
        valid = [row for row in rows_of(votes) if row["undone"] is None]
        assert [row["trial"] for row in valid] == [trial.token for trial in trials]
        assert severe(browser) == []


CONTROLS = """
    return [...document.querySelectorAll("button, input")].filter(each => each.checkVisibility())
        .map(each => [each, each.getBoundingClientRect()])
        .map(([each, box]) => [each.id, box.left, box.top, box.right, box.bottom])"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Results of larger pictures, 512x384."""
    return make_results(tmp_path_factory.mktemp("photographs"), ["lake", "market", "tower", "wharf"], 6, 8)


@pytest.fixture
def phone(browser):
    """Makes the browser that of a phone with a number of pixels of its screen for each of a page."""

    def emulate(width, height, ratio):
        metrics = {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})

    yield emulate
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "ratio"), [(390, 844, 3), (390, 844, 1), (844, 390, 3), (320, 568, 2)])
def test_page_on_a_phone(browser, phone, photographs, tmp_path, width, height, ratio):
    results, votes = photographs, tmp_path / "votes.sqlite"
    phone(width, height, ratio)
    upright = height > width

    def touch(kind, *point):
        points = [{"x": x, "y": y} for x, y in point]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def check():
        """Everything is on the screen, and large enough for a finger."""
        assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
        controls = browser.execute_script(CONTROLS)
        for name, left, top, right, bottom in controls:
            assert left >= 0, name
            assert top >= 0, name
            assert right <= width, name
            assert bottom <= height, name
            assert min(right - left, bottom - top) >= 44, name
        return {name: ((left + right) / 2, (top + bottom) / 2) for name, left, top, right, bottom in controls}

    with running(results, "--votes", str(votes)) as (_, client):
        page = Rater(browser)
        browser.get(f"http://127.0.0.1:{client.port}/")
        browser.execute_script("localStorage.clear()")
        browser.get(f"http://127.0.0.1:{client.port}/")
        page.wait_for("welcome")
        check()
        page.find("start").click()
        page.wait_for("rate")
        controls = check()
        assert set(controls) == {"smaller", "larger", "undo", "pause", "left", "original", "right"}
        assert page.find("left").text == ("Upper is closer" if upright else "Left is closer")
        assert page.find("right").text == ("Lower is closer" if upright else "Right is closer")
        trial, following, *_ = Study(results, RATES).trials(browser.execute_script("return localStorage.rater"))
        pictures = [f"pictures/{trial.image}/original.png", trial.left.picture, trial.right.picture]

        # The whole picture is on the canvas, with room around it.
        size = browser.execute_script("const [c] = document.querySelectorAll('canvas'); return [c.width, c.height]")
        scale = min(ratio, size[0] / 512, size[1] / 384)
        assert (scale > 1) == (ratio == 3)
        scale = int(scale) or scale
        width_seen, height_seen = round(512 * scale), round(384 * scale)
        left, top = (int((side - length * scale + 1) / 2) for side, length in zip(size, (512, 384), strict=True))

        def seen(side):
            """A canvas, uint8 [H, W, 4]."""
            script = """
                const canvas = document.querySelectorAll("canvas")[arguments[0]];
                return canvas.toDataURL().split(",")[1]"""
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(browser.execute_script(script, side)))))

        def check_picture(side, picture):
            canvas, expected = seen(side), Image.open(results / picture).convert("RGB")
            drawn = np.argwhere(canvas[..., 3])
            assert drawn.min(0) == pytest.approx([top, left], abs=1)
            assert drawn.max(0) + 1 == pytest.approx([top + height_seen, left + width_seen], abs=1)
            found = canvas[top : top + height_seen, left : left + width_seen, :3]
            if scale > 1:  # every pixel is a square
                assert np.array_equal(found, np.asarray(expected).repeat(scale, 0).repeat(scale, 1))
            else:  # of another picture, it would differ by 85
                smaller = np.asarray(expected.resize((width_seen, height_seen), Image.Resampling.BOX))
                assert np.abs(found.astype(int) - smaller).mean() < 15

        check_picture(0, pictures[1])
        check_picture(1, pictures[2])
        touch("touchStart", controls["original"])
        page.wait(lambda: page.find("label").is_displayed())
        check_picture(0, pictures[0])
        check_picture(1, pictures[0])
        touch("touchEnd")
        page.wait(lambda: not page.find("label").is_displayed())
        check_picture(0, pictures[1])

        # Enlarged as far as it goes, a finger moves both pictures.
        while page.find("larger").is_enabled():
            page.find("larger").click()
        before = [seen(side) for side in (0, 1)]
        middle = browser.execute_script(
            "const pane = document.querySelector('.pane').getBoundingClientRect(); return [pane.left, pane.top]"
        )
        touch("touchStart", [middle[0] + 100, middle[1] + 60])
        touch("touchMove", [middle[0] + 80, middle[1] + 90])
        touch("touchEnd")
        moved = np.array([-20, 30]) * ratio
        for side in (0, 1):
            shifted = np.roll(before[side], moved[::-1], (0, 1))
            inner = slice(40 * ratio, -40 * ratio)
            assert np.array_equal(seen(side)[inner, inner], shifted[inner, inner])

        page.find("right").click()
        page.wait_for_trial(following.token)
        assert [(row["trial"], row["choice"]) for row in rows_of(votes)] == [(trial.token, "right")]
        page.find("pause").click()
        page.wait_for("paused")
        check()
