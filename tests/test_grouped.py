"""Tests of the grouped context model: exactness against integer arithmetic, equal results everywhere, and files."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import GroupedReference, damaged, range_decode
from reference import chance as documented_chance

from rnncodec.entropy import ContextConfig, ContextModel, ContextSession, code_length, code_nats, grouped, probability
from rnncodec.entropy import exact as arithmetic
from rnncodec.files.fields import pack_bits
from rnncodec.files.format import CONTEXT, RAW, FormatError
from rnncodec.network import LatentConfig, RecurrentCodec, questions
from rnncodec.network.questions import Questions
from rnncodec.weights import WeightsError, load_weights, save_weights

CHANNELS, PASSES, BITS, GROUPS = 14, 3, 8, 2
SIZE = BITS // GROUPS


def asked(seed=0, groups=GROUPS):
    """Questions with random integers; channels 0 to 9 do not count as activity."""
    rng = np.random.default_rng(seed)
    made = Questions(CHANNELS, PASSES, BITS, groups).requires_grad_(False)
    channel = np.array([[rng.permutation(CHANNELS)[: BITS // groups] for _ in range(groups)] for _ in range(PASSES)])
    made.channel.copy_(torch.from_numpy(channel))
    made.cost.copy_(torch.from_numpy(rng.integers(10, 1500, made.cost.shape)))
    x, known = planes(height=12, width=12), None
    for t, bits in enumerate(x):
        number, known = torch.tensor(t), known or made.start(bits)
        for group, answers in enumerate(bits.chunk(groups, 1)):
            around = questions._around(known.activity)
            made.edges[t, group] = torch.quantile(around.double(), torch.arange(1, 5).double() / 5).round()
            known = made.told(number, group, known, made.case(number, group, known), answers)
    return made


def model(seed=0, channels=6, bits=BITS, groups=GROUPS, passes=PASSES, gain=3):
    """Random weights, as a rule large enough to reach the limits of activations."""
    torch.manual_seed(seed)
    made = ContextModel(ContextConfig("grouped", bits, channels, passes, groups))
    made.grouped.start_odds(torch.randn(passes, bits, grouped.CASES) * 2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("output.map"):
                parameter.normal_(0, gain / 4)
            elif name.endswith("map"):
                parameter.mul_(gain)
            elif "odds" not in name:
                parameter.sub_(0.2)
    return made


def planes(count=PASSES, batch=1, bits=BITS, height=5, width=7, seed=0, missing=0.0):
    rng = np.random.default_rng(seed)
    signs = np.where(rng.random((count, batch, bits, height, width)) < 0.3, 1.0, -1.0)
    return torch.from_numpy(signs * (rng.random(signs.shape) >= missing)).float()


def signed(*args, **kwargs):
    """Such planes of one image as coders take them, int8 [T, bits, rows, cols]."""
    return planes(*args, **kwargs)[:, 0].numpy().astype(np.int8)


def cases(made, x):
    """The cases of all bits."""
    known, found = made.start(x[0]), []
    for t, bits in enumerate(x):
        number = torch.tensor(min(t, PASSES - 1))
        _, case, known = made.walk(number, known, lambda g, _, bits=bits: bits.chunk(GROUPS, 1)[g])
        found.append(case)
    return torch.stack(found)


def random_cases(x, seed=0):
    return torch.randint(0, grouped.CASES, x.shape, generator=torch.Generator().manual_seed(seed))


def reference(exact, made):
    cost = made.cost.numpy().reshape(PASSES, GROUPS, SIZE, grouped.CASES, 2)
    return GroupedReference(exact, CHANNELS, made.channel.numpy(), cost, made.edges.numpy())


def session(exact=None, shape=(BITS, 7, 9)):
    return ContextSession(exact or model().quantize(), *shape, questions=asked())


def test_there_are_as_many_cases_as_the_questions_have():
    assert questions.CASES == grouped.CASES


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_exact_model_is_the_integer_reference(missing):
    exact, made = model().quantize(), asked()
    x = planes(PASSES + 1, missing=missing)
    known = cases(made, x)
    logits, expected = reference(exact, made).run(x[:, 0].numpy())
    np.testing.assert_array_equal(known[:, 0].numpy(), expected)
    assert len(np.unique(expected % 5)) == 5
    assert len(np.unique(expected // 5)) >= 14
    with torch.inference_mode():
        found = exact(x, known)[:, 0] * 256
    np.testing.assert_array_equal(found.numpy(), logits)
    assert len(np.unique(logits)) > 200


def test_exact_model_gives_the_same_everywhere(monkeypatch):
    exact = model(channels=64, bits=64, groups=4).quantize()  # as it is used
    x = planes(batch=3, bits=64, height=17, width=30, missing=0.1)
    known = random_cases(x)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            expected = exact(x, known)
            assert expected.unique().numel() > 500
            double = copy.deepcopy(exact).double()
            assert torch.equal(double(x.double(), known).float(), expected)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(exact(x, known), expected)
            torch.set_float32_matmul_precision("medium")  # products in bfloat16
            assert torch.equal(exact(x, known), expected)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert torch.equal(exact(x, known), expected)
                each = [exact(x[:, i : i + 1], known[:, i : i + 1]) for i in range(3)]
                assert torch.equal(torch.cat(each, 1), expected)
                monkeypatch.setattr(grouped, "SQUARES", 37)
            monkeypatch.setattr(arithmetic, "_int8_is_exact", lambda device: False)
            assert torch.equal(exact(x, known), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_gpu_gives_what_the_cpu_gives(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    exact = model(channels=64, bits=64, groups=4).quantize()
    x = planes(batch=2, bits=64, height=17, width=30)
    with torch.inference_mode():
        expected = exact(x, random_cases(x))
        assert torch.equal(copy.deepcopy(exact).cuda()(x.cuda(), random_cases(x).cuda()).cpu(), expected)
    small = model().quantize()
    on_cpu = session(small)
    on_gpu = ContextSession(copy.deepcopy(small).cuda(), BITS, 7, 9, questions=asked().cuda())
    for plane in signed(height=7, width=9):
        np.testing.assert_array_equal(on_gpu.decode(on_cpu.encode(plane)), plane)


def test_training_and_files_agree_but_for_rounding():
    made, x = model(channels=32, gain=1), planes(batch=4, height=12, width=12, missing=0.1)
    known = cases(asked(), x)
    with torch.no_grad():
        logits = made(x, known)
        odds = torch.stack(
            [
                o.flatten()[c + grouped.CASES * torch.arange(BITS).view(-1, 1, 1)]
                for o, c in zip(made.grouped.odds, known, strict=True)
            ]
        )
        error, correction = made.quantize()(x, known) - logits, logits - odds
    assert error.abs().mean() < 0.03 * correction.abs().mean()


def test_untrained_models_code_with_the_odds():
    torch.manual_seed(0)
    made = ContextModel(ContextConfig("grouped", BITS, 6, PASSES, GROUPS))
    odds = torch.randn(PASSES, BITS, grouped.CASES)
    made.grouped.start_odds(odds)
    x = planes()
    known = cases(asked(), x)
    with torch.no_grad():
        found = made(x, known)
    for t, k, r, c in ((0, 0, 0, 0), (1, 5, 2, 6), (2, 7, 4, 3)):
        assert found[t, 0, k, r, c] == odds[t, k, int(known[t, 0, k, r, c])]


def test_a_bit_depends_on_earlier_bits_only():
    made, x = model(), planes(2)
    known = cases(asked(), x)
    (band,) = [band for _, band in ContextSession(made.quantize(), BITS, 5, 7, questions=asked()).bands]
    order = band.order()
    assert sorted(order) == list(range(BITS * 35))
    with torch.no_grad():
        before = made(x, known)[:, 0].permute(0, 2, 3, 1).flatten(1)
        for place in (0, 37, 111, 279):
            changed = x.clone()
            changed[1, 0].permute(1, 2, 0)[np.unravel_index(order[place], (5, 7, BITS))] *= -1
            after = made(changed, known)[:, 0].permute(0, 2, 3, 1).flatten(1)
            assert torch.equal(after[0], before[0])
            same = (after[1] - before[1]).abs()[order] < 1e-6
            assert same[: place + 1].all()
            if place < 111:
                assert not same.all()


def test_bits_that_were_not_sent_say_and_cost_nothing():
    made, x = model(), planes(2, missing=0.3).requires_grad_()
    known = cases(asked(), x.detach())
    nats = code_nats(made(x, known), x)
    assert (nats[x == 0] == 0).all()
    assert (nats[x != 0] > 0).all()
    assert code_length(made(x, known), x).item() == pytest.approx(nats.sum().item() / np.log(2) / x.numel(), rel=1e-5)
    (gradient,) = torch.autograd.grad(nats.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[x == 0] == 0).all()
    assert (gradient[x != 0] != 0).any()


@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (1, 20), (20, 1), (17, 33)])
def test_payloads_decode_to_the_bits(shape):
    exact, threads = model().quantize(), torch.get_num_threads()
    encoder, decoder = session(exact, (BITS, *shape)), session(exact, (BITS, *shape))
    for plane in signed(PASSES + 1, height=shape[0], width=shape[1]):
        found = decoder.decode(encoder.encode(plane))
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, plane)
    assert torch.get_num_threads() == threads


def test_payloads_are_the_documented_ones(monkeypatch):
    """The reference decodes iterations in bands, of which the second is raw."""
    torch.manual_seed(0)
    made = ContextModel(ContextConfig("grouped", BITS, 6, PASSES, GROUPS))
    made.grouped.start_odds(torch.full((PASSES, BITS, grouped.CASES), -1.5))
    with torch.no_grad():
        made.grouped.output.map.normal_(0, 0.2)
    exact = made.quantize()
    monkeypatch.setattr(ContextSession, "BAND", 3 * 9 + 4)
    bands = [slice(0, 3), slice(3, 6), slice(6, 7)]
    x = signed(height=7, width=9)
    x[x > 0] = np.where(np.random.default_rng(1).random((x > 0).sum()) < 0.3, 1, -1)
    logits = [reference(exact, asked()).run(x[:, :, band])[0] for band in bands]
    encoder, decoder = session(exact), session(exact)
    for t, plane in enumerate(x):
        if t == 1:
            for coder in encoder, decoder:
                np.testing.assert_array_equal(coder.decode([(RAW, pack_bits(plane > 0))]), plane)
            continue
        ((coding, payload),) = encoder.encode(plane)
        assert coding == CONTEXT
        np.testing.assert_array_equal(decoder.decode([(coding, payload)]), plane)
        probabilities, bits = [], []
        for band, of_band in zip(bands, logits, strict=True):
            places = list(np.ndindex(band.stop - band.start, 9))
            for turn in range(2 * GROUPS):
                for r, c in places:
                    if (r + c) % 2 == turn % 2:
                        for k in range(turn // 2 * SIZE, (turn // 2 + 1) * SIZE):
                            probabilities.append(documented_chance(of_band[t, k, r, c]))
                            bits.append(bool(plane[k, band][r, c] > 0))
        assert range_decode(payload, probabilities) == bits


def test_chances_are_those_of_the_model_and_leave_no_trace():
    exact, x = model().quantize(), planes(height=7, width=9)
    with torch.inference_mode():
        expected = probability(exact(x, cases(asked(), x)))[:, 0].numpy()
    coder = session(exact)
    for plane, probabilities in zip(x[:, 0].numpy().astype(np.int8), expected, strict=True):
        coder.probabilities(-plane)
        np.testing.assert_array_equal(coder.probabilities(plane), probabilities)
        coder.probabilities(-plane)
        p = probabilities / 65536
        coder.encode(plane)
        assert coder.ideal_bits[-1] == pytest.approx(-np.log2(np.where(plane > 0, p, 1 - p)).sum())


def test_damaged_payloads_are_an_error_or_other_bits():
    torch.manual_seed(0)
    made = ContextModel(ContextConfig("grouped", BITS, 6, PASSES, GROUPS))
    made.grouped.start_odds(torch.full((PASSES, BITS, grouped.CASES), -1.0))
    exact, shape = made.quantize(), (BITS, 12, 12)
    (plane,) = signed(1, height=12, width=12)
    ((coding, payload),) = session(exact, shape).encode(plane)
    assert coding == CONTEXT
    errors = 0
    for changed in damaged(payload):
        try:
            assert session(exact, shape).decode([(coding, changed)]).shape == shape
        except FormatError:
            errors += 1
    assert errors > 0


def test_training_learns_structure():
    """The model learns that bits depend on those of the previous pass and of another group."""
    torch.manual_seed(0)
    made = ContextModel(ContextConfig("grouped", BITS, 16, 2, GROUPS))
    optimizer = torch.optim.AdamW(made.parameters(), 1e-2, weight_decay=0)

    def sample(seed):
        x = planes(1, batch=8, height=8, width=8, seed=seed).sign()
        x[:, :, SIZE:] = x[:, :, :SIZE]
        return torch.cat([x, -x])

    for step in range(100):
        x = sample(step)
        loss = code_length(made(x, torch.zeros_like(x).long()), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = sample(1000)
    with torch.no_grad():
        length, exact = (code_length(m(x, torch.zeros_like(x).long()), x).item() for m in (made, made.quantize()))
    assert length < 0.3  # a quarter of them have 0.88 bits
    assert exact == pytest.approx(length, rel=0.02)


def test_integers_restore_the_model_and_are_checked():
    exact = model().quantize()
    integers = exact.integers()
    again = ContextModel.from_integers(exact.config, integers)
    x = planes()
    known = cases(asked(), x)
    with torch.inference_mode():
        assert torch.equal(exact(x, known), again(x, known))
    for name, value, message in (
        ("grouped.known.exponent", -1, "more bits"),
        ("grouped.known.exponent", 17, "more bits"),
        ("grouped.middle.map", -128, "more bits"),
        ("grouped.odds", 2049, "too large"),
    ):
        with pytest.raises(ValueError, match=message):
            ContextModel.from_integers(exact.config, integers | {name: torch.full_like(integers[name], value)})
    wide = model(channels=8, bits=64, groups=4).quantize()
    large = {"grouped.known.map": torch.full_like(wide.integers()["grouped.known.map"], 127)}
    with pytest.raises(ValueError, match="more bits"):
        ContextModel.from_integers(wide.config, wide.integers() | large)


def test_training_goes_on_from_an_exact_model():
    exact, again = model().quantize(), model(seed=1)
    again.load_state_dict(exact.state_dict())
    x = planes()
    known = cases(asked(), x)
    with torch.no_grad():
        assert torch.equal(again.quantize()(x, known), exact(x, known))


def test_weights_hold_the_model(tmp_path):
    shape = LatentConfig(iterations=PASSES, bits=BITS, groups=GROUPS, latents=CHANNELS)
    network = RecurrentCodec(shape)
    exact, path = model().quantize(), tmp_path / "w.safetensors"
    save_weights(path, network, "w", {}, exact)
    loaded = load_weights(path).context
    assert loaded is not None
    assert loaded.config == exact.config
    for key, value in exact.integers().items():
        assert torch.equal(loaded.integers()[key], value)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        load_weights(path)


def test_the_room_knows_nothing_of_networks():
    code = "import sys, rnncodec.entropy; sys.exit(any(name.startswith('rnncodec.network') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="equal groups"):
        ContextConfig("grouped", 8, 8, 3, 3)
    with pytest.raises(ValueError, match="number of iterations"):
        ContextModel(ContextConfig("grouped", 8, 8, 0, 2))
    parallel = ContextModel(ContextConfig("parallel", BITS, 4, 0, GROUPS))
    with pytest.raises(ValueError, match="cases are for"):
        model()(planes())
    with pytest.raises(ValueError, match="cases are for"):
        parallel(planes(), random_cases(planes()))
    with pytest.raises(ValueError, match="questions are for"):
        ContextSession(model().quantize(), BITS, 7, 9)
    with pytest.raises(ValueError, match="questions are for"):
        ContextSession(parallel.quantize(), BITS, 7, 9, questions=asked())
    broken = model()
    with torch.no_grad():
        broken.grouped.turn[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        broken.quantize()


@pytest.mark.parametrize("int8", [True, False])
def test_products_are_those_of_whole_numbers(int8, monkeypatch):
    """Products in int8, or in floats on other processors, equal those of NumPy up to the ends of the range."""
    if not int8:
        monkeypatch.setattr(arithmetic, "_int8_is_exact", lambda device: False)
    rng = np.random.default_rng(3)
    for rows, inputs, outputs in ((1, 144, 64), (37, 576, 16), (512, 64, 8)):
        whole = rng.choice([-256, -255, -4, -3, -1, 0, 1, 3, 255, 256], (rows, inputs))
        weights = rng.choice([-127, -126, -1, 0, 1, 127], (inputs, outputs))
        factors = arithmetic.halves(torch.from_numpy(whole).float()).flatten(0, 1)
        found = arithmetic.product(factors, torch.from_numpy(weights).char())
        np.testing.assert_array_equal(found.long().numpy(), whole @ weights)
