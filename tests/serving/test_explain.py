"""What a verdict rests on, over HTTP: maps, regions, and what they should have looked like."""

import asyncio
import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from serving.api.access import Access
from serving.api.ingress import create_api
from serving.api.pools import Answering
from serving.controller.cache import Cache
from serving.controller.orders import Order, StoredVersion
from serving.replica.beside import Beside
from serving.replica.inspector import Inspector
from serving.settings import Auth, Decision
from tests.serving.engines import torch_inspector
from tests.serving.test_root import LIMITS, KnownController, ask, root_of


def inspector_of(prompt_set: PromptSet, folder: Path, *, threshold: float) -> Inspector:
    cache = Cache(str(folder), "registry")
    stored = StoredVersion(category="blister", version=7, run_id="r", data=prompt_set.to_bytes())
    cache.put(stored)
    beside = Beside(KnownController(), cache)  # type: ignore[arg-type]
    inspector = torch_inspector(limits=LIMITS.image, beside=beside)
    inspector.load("blister", Order(version=7, decision=Decision(threshold=threshold)), stored)
    return inspector


def picture(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def test_a_region_is_shown_beside_what_it_should_have_looked_like(
    prompt_set: PromptSet, category: Category, tmp_path: Path
) -> None:
    path = next(image.path for image in category.test if image.is_anomalous)
    inspector = inspector_of(prompt_set, tmp_path, threshold=0.1)
    for api in (
        create_api(inspector, http=LIMITS, access=Access(Auth())),
        root_of(Answering(inspector)),
    ):
        answer = ask(api, "POST", "/v1/blister/explain", content=path.read_bytes())
        assert answer.status_code == 200, answer.text
        found = answer.json()
        inspected = ask(api, "POST", "/v1/blister/inspect", content=path.read_bytes()).json()
        assert found["anomaly_score"] == pytest.approx(inspected["anomaly_score"], abs=1e-5)
        assert (found["version"], found["is_anomalous"], found["note"]) == (7, True, "")
        told = [
            {name: region[name] for name in inspected["regions"][0]} for region in found["regions"]
        ]
        assert told == inspected["regions"][:5]
        for region in found["regions"]:
            nearest = region["nearest"]
            assert nearest["image"] in prompt_set.provenance.support_names
            assert 0 <= nearest["x"] < nearest["x"] + nearest["box_width"] <= nearest["width"]
            assert 0 <= nearest["y"] < nearest["y"] + nearest["box_height"] <= nearest["height"]
            shown, expected = picture(region["picture_jpeg"]), picture(nearest["picture_jpeg"])
            assert shown.size == pytest.approx(expected.size, abs=2)
            similar = [each["similarity"] for each in region["resembles"]]
            assert len(similar) == 3
            assert 1 >= similar[0] >= similar[1] >= similar[2] >= -1
            assert all(each["about"] for each in region["resembles"])
        # What is unusual lies farther away than good parts do.
        assert found["regions"][0]["nearest"]["distance"] > 1
        for name in ("prompts_map_png", "memory_map_png"):
            drawn = picture(found[name])
            assert drawn.mode == "L"
            assert np.asarray(drawn).max() > 0
        assert found["prompts_map_png"] != found["memory_map_png"]


def test_what_cannot_be_shown_is_said(
    prompt_set: PromptSet, category: Category, tmp_path: Path
) -> None:
    data = next(image.path for image in category.test if image.is_anomalous).read_bytes()
    old = inspector_of(replace(prompt_set, thumbnails=()), tmp_path, threshold=0.1)
    api = create_api(old, http=LIMITS, access=Access(Auth()))
    found = ask(api, "POST", "/v1/blister/explain", content=data).json()
    assert found["regions"]
    assert all(region["nearest"] is None for region in found["regions"])
    assert all(region["resembles"] == [] for region in found["regions"])
    assert "fit and register the category again" in found["note"]

    good = inspector_of(prompt_set, tmp_path, threshold=1.0)
    api = create_api(good, http=LIMITS, access=Access(Auth()))
    found = ask(api, "POST", "/v1/blister/explain", content=data).json()
    assert (found["is_anomalous"], found["regions"]) == (False, [])

    for content, status in ((b"junk", 400), (bytes(300_000), 413)):
        assert ask(api, "POST", "/v1/blister/explain", content=content).status_code == status
    several = [("image", ("x", data, "image/png"))] * 2
    assert ask(api, "POST", "/v1/blister/explain", files=several).status_code == 400
    assert ask(api, "POST", "/v1/nut/explain", content=data).status_code == 503


def test_thumbnails_of_served_versions_take_no_memory(
    prompt_set: PromptSet, tmp_path: Path
) -> None:
    assert prompt_set.thumbnails
    inspector = inspector_of(prompt_set, tmp_path, threshold=0.5)
    assert inspector._served["blister"].detector.prompt_set.thumbnails == ()
    assert asyncio.run(inspector.describe("blister")).version == 7
