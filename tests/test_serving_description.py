"""The served API against its own OpenAPI description."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case

from apt_ray.prompt_set import PromptSet
from serving.inspector import Inspector
from serving.orders import Order, StoredVersion
from serving.pools import Answering
from serving.settings import Batching
from tests.test_serving_root import LIMITS, root_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def description(prompt_set: PromptSet) -> object:
    inspector = Inspector(limits=LIMITS.image, batching=Batching(), shared=True)
    stored = StoredVersion(category="blister", version=7, run_id="r", data=prompt_set.to_bytes())
    inspector.load("blister", Order(version=7), stored)
    return schemathesis.openapi.from_asgi("/openapi.json", root_of(Answering(inspector)))


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case: Case) -> None:
    case.call_and_validate()
