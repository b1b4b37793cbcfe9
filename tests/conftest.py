"""Fixtures and options shared by all tests."""

import os
import shutil
import signal
from pathlib import Path

import pytest

# Before NumPy and PyTorch load, and for programs that tests start. Small tensors gain nothing from a second thread, and
# one thread keeps sums in one order. Where tests use more, those that wait take no time from other tests.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

# A shell that starts the tests in the background has Ctrl-C ignored, by them and by the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import skimage
import torch
from selenium import webdriver

from rnncodec.network import NetworkConfig, RecurrentCodec
from rnncodec.weights import save_weights

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --runslow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "browser" in item.keywords and not (shutil.which("chromium") and shutil.which("chromedriver")):
            item.add_marker(pytest.mark.skip(reason="needs chromium and chromedriver"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Weights of a network that is as small as can be, and not trained."""
    torch.manual_seed(0)
    network = RecurrentCodec(NetworkConfig(bits=4, encoder_channels=(4, 4, 4, 4), decoder_channels=(4, 4, 4, 4, 4)))
    torch.nn.init.normal_(network.decoder.output.weight)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, network, "tiny", {})
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder with a few photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Evaluations with empty figures, which take most of the time of a quick one, for tests of their other results."""
    monkeypatch.setattr("rnncodec.evaluation.results.rendered", lambda drawing, format: b"")


@pytest.fixture
def alone(monkeypatch):
    """Without W&B, also without what another test left of it, and without the variables of another training."""
    import wandb

    wandb.finish()
    wandb.teardown()  # or it would keep to the variables of the test before
    for name in [name for name in os.environ if name.startswith(("WANDB_RUN", "WANDB_SWEEP", "WANDB_NAME", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium without a window; its logs hold what went wrong and what was requested."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
