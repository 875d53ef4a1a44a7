"""The browser and the fleets of the console's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from serving.controller.orders import Order, StoredVersion
from serving.replica.inspector import Inspector
from tests.registry.fake import FakeRegistry
from tests.serving.console.browser import chromium
from tests.serving.console.fleets import (
    LIMITS,
    ConsoleFleet,
    MemoryController,
    WholeFleet,
    ready,
    served,
)
from tests.serving.engines import torch_inspector


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Headless Chromium, for the tests of this folder alone: see `chromium`."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="package")
def inspector(prompt_set: PromptSet, category: Category) -> Inspector:
    """The engine of a pool that serves the sample category."""
    inspecting = torch_inspector(limits=LIMITS.image, shared=True)
    stored = StoredVersion(
        category=category.name, version=7, run_id="r", data=prompt_set.to_bytes()
    )
    inspecting.load(category.name, Order(version=7), stored)
    return inspecting


@pytest.fixture
def fleet(inspector: Inspector, category: Category) -> Iterator[ConsoleFleet]:
    """A fleet that serves the sample category to everyone."""
    controller = MemoryController({category.name: ready()})
    with served(ConsoleFleet(inspector, controller)) as running:
        yield running


@pytest.fixture
def whole_fleet(prompt_set: PromptSet, tmp_path: Path) -> Iterator[WholeFleet]:
    """A fleet that has its prompt sets from a registry, open to everyone."""
    registry = FakeRegistry()
    registry.register(prompt_set, pictures={}, trials=[])
    with served(WholeFleet(registry, tmp_path)) as running:
        yield running
