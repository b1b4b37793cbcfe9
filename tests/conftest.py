"""Fixtures and options shared by all tests."""

import shutil
from pathlib import Path

import pytest
import skimage
import torch

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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors gain nothing from a second thread, and one thread keeps sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder with a few photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    return folder


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium with a profile of its own, driven by Selenium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path / 'browser'}",
        "window-size=1280,900",
    ):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()
