"""The served API against its own OpenAPI description."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import BaseSchema, Case
from schemathesis.specs.openapi.checks import positive_data_acceptance

from apt_ray.detection.prompt_set import PromptSet
from serving.api.pools import Answering
from serving.controller.orders import Order, StoredVersion
from tests.serving.engines import torch_inspector
from tests.serving.test_root import AUTH, LIMITS, KnownController, root_of

pytestmark = pytest.mark.slow

TOKEN = {"Authorization": "Bearer all"}


@pytest.fixture(scope="module")
def description(prompt_set: PromptSet) -> BaseSchema:
    inspector = torch_inspector(limits=LIMITS.image, shared=True)
    stored = StoredVersion(category="blister", version=7, run_id="r", data=prompt_set.to_bytes())
    inspector.load("blister", Order(version=7), stored)
    controller = KnownController()
    controller.states["washer"] = "READY"
    return schemathesis.openapi.from_asgi(
        "/openapi.json", root_of(Answering(inspector), controller, AUTH)
    )


def test_answers_are_as_described(description: BaseSchema) -> None:
    operations = [result.ok() for result in description.get_all_operations()]
    assert operations
    for operation in operations:

        @given(operation.as_strategy())
        @settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
        def check(case: Case) -> None:
            # No schema can say which bytes are an image.
            case.call_and_validate(headers=TOKEN, excluded_checks=[positive_data_acceptance])

        check()
