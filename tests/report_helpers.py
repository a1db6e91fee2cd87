"""Small runs that a report can be made of, and a browser to look at one with."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

SMALL = ("model.widths=[16,16]", "tracking=disabled", "threads=1", "sweep=grid")


def write_packs(data_dir: Path, **channels: int) -> Path:
    """Handwritten digits, packed under the names of other data sets, so that they stand in for those."""
    found = load_digits()
    images = (found.images * 15.9).astype(np.uint8)[:, None]
    for name, planes in channels.items():
        (data_dir / name).mkdir(parents=True)
        for split, part in (("train", slice(0, 400)), ("test", slice(400, 600))):
            np.save(data_dir / name / f"{split}_images.npy", images[part].repeat(planes, axis=1))
            np.save(data_dir / name / f"{split}_labels.npy", found.target[part])
        (data_dir / name / "classes.json").write_text(json.dumps([str(digit) for digit in range(10)]))
    return data_dir


def altered(source: Path, destination: Path, config: dict[str, Any] = {}, **result: Any) -> Path:  # noqa: B006
    """A copy of a run directory that says something else: config's dotted keys, and keys of result.json."""
    shutil.copytree(source, destination)
    content = json.loads((destination / "result.json").read_text())
    for key, value in config.items():
        node = content["config"]
        *path, last = key.split(".")
        for name in path:
            node = node[name]
        node[last] = value
    content |= result
    (destination / "result.json").write_text(json.dumps(content))
    return destination


@contextmanager
def browser(width: int = 1280, dark: bool = False) -> Iterator[Any]:
    """Chromium without a window; skips, saying so, where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield window
    finally:
        window.quit()
